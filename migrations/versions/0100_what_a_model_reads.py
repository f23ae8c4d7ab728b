"""What is read can be chosen: event types that are ignored, the users of an offer"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0100"
down_revision = "0099"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds whom an offer is among, and drops the functions that have other arguments or columns from now on."""
    for column, comment in (
        ("among_schema", "Schema of the relation that lists whom the offer may go to; null: everybody."),
        ("among_table", "Name of that relation."),
        ("among_column", "Its column with the key of the user."),
    ):
        op.add_column("offers", sa.Column(column, sa.Text(), comment=comment), schema="vae")
    op.execute(
        "drop function if exists vae.create_offer(text, text, anyarray, numeric, numeric, numeric, integer, boolean,"
        " timestamptz, timestamptz, text)"
    )
    op.execute(
        "comment on column vae.event_types.event_type is"
        " 'Standard event type that it means: view, search, add_to_cart, purchase, review, share, register; or ignore.'"
    )
    op.add_column(
        "refreshes",
        sa.Column("left_out", sa.Text(), comment="Offers that the content lacks, and why; null: none."),
        schema="vae",
    )
    # It gives other columns, and takes another argument.
    op.execute("drop function if exists vae_private.last_run(integer, text)")
    op.execute("drop function if exists vae_private.finish_refresh(bigint, bigint, integer, bigint, text, text)")
    op.execute("drop function if exists vae.set_candidates(text, text, regclass, text, boolean)")


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
