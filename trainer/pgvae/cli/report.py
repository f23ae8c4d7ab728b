"""`pgvae report`: one page about a version."""
