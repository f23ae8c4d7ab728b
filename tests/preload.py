"""What the process imports of which tests/command.py makes forks."""

import gc
import importlib

from pgvae.cli import register_commands

register_commands()
# The last one is what PyTorch imports when the first optimizer is made.
for name in (
    "command",
    "pgvae.install",
    "pgvae.load.types",
    "pgvae.report.page",
    "pgvae.simulate",
    "pgvae.tune",
    "torch._dynamo",
):
    importlib.import_module(name)
# Otherwise each fork copies all of it when it collects garbage.
gc.freeze()
