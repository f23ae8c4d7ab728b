"""Loads CSV and Parquet files into PostgreSQL: inferred types, COPY, rejected rows kept with their reason."""

from pgvae.load.columns import KINDS, Kind
from pgvae.load.plan import ColumnPlan, LoadOptions, Plan, make_plan
from pgvae.load.run import LoadSummary, load
from pgvae.load.sources import Source, open_source

__all__ = [
    "KINDS",
    "ColumnPlan",
    "Kind",
    "LoadOptions",
    "LoadSummary",
    "Plan",
    "Source",
    "load",
    "make_plan",
    "open_source",
]
