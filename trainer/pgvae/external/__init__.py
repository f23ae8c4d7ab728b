"""Scoring outside, for databases that have no PL/Python: the same runtime, over a connection."""
