"""pgvae: train a behaviour model on shop events and publish it into PostgreSQL."""

from importlib.metadata import version

__version__ = version("pgvae")
