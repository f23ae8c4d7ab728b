"""Alembic's environment: runs the revisions on the connection that `pgvae install` hands over."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from pgvae.schema import PRIVATE, PUBLIC, metadata


def include_name(name: str | None, type_: str, parent_names: object) -> bool:
    """Leaves the shop's own schemas out of autogenerate's comparison."""
    return type_ != "schema" or name in (PUBLIC, PRIVATE)


connection: Connection | None = context.config.attributes.get("connection")
if connection is None:
    raise SystemExit("migrations run through: pgvae install")

context.configure(
    connection=connection,
    target_metadata=metadata,
    version_table_schema=PUBLIC,
    include_schemas=True,
    include_name=include_name,
)
with context.begin_transaction():
    context.run_migrations()
