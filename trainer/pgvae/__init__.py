"""pgvae: train a behaviour model on shop events and publish it into PostgreSQL."""

import os
from importlib.metadata import version

# OpenMP's threads spin while they wait for each other. Beside one other busy process that makes an epoch three to five
# times as long, on an idle machine it gains nothing. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Without it cuBLAS refuses to multiply deterministically.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

__version__ = version("pgvae")
