"""`pgvae report`: one self-contained page about a version, and its model card."""
