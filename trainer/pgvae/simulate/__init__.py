"""A simulated shop in PostgreSQL whose true tastes, rates and churn are known.

`simulate(dsn, SimulationConfig(...))` fills a schema; `true_purchase_probability(dsn, ...)` gives what a perfect model
of that shop would predict. The formulas stand in docs/simulator.md.
"""

from pgvae.simulate.config import KeyType, SimulationConfig
from pgvae.simulate.run import SimulationSummary, simulate
from pgvae.simulate.truth import TrueItemPurchases, TruePurchases, true_item_probability, true_purchase_probability

__all__ = [
    "KeyType",
    "SimulationConfig",
    "SimulationSummary",
    "TrueItemPurchases",
    "TruePurchases",
    "simulate",
    "true_item_probability",
    "true_purchase_probability",
]
