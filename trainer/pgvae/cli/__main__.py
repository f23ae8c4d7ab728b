"""`python -m pgvae.cli` is the `pgvae` command."""

from pgvae.cli import main

main()
