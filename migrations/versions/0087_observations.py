"""Log what drift and hit rate were found"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0087"
down_revision = "0052"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the log, empty."""
    op.create_table(
        "observations",
        sa.Column(
            "observation_id",
            sa.BigInteger(),
            sa.Identity(always=True),
            nullable=False,
            comment="Number of the observation.",
        ),
        sa.Column("version_id", sa.BigInteger(), nullable=False, comment="Version, see vae.versions."),
        sa.Column("measure", sa.Text(), nullable=False, comment="drift (population stability index) or hit rate."),
        sa.Column(
            "subject",
            sa.Text(),
            nullable=False,
            comment="What was measured: event types, items, a column, recommendations and so on.",
        ),
        sa.Column("value", sa.DOUBLE_PRECISION(), comment="What was found; null: there was nothing to measure."),
        sa.Column("chance", sa.DOUBLE_PRECISION(), comment="Of drift: what chance alone exceeds once in twenty times."),
        sa.Column("status", sa.Text(), nullable=False, comment="ok, warning, critical, or unknown."),
        sa.Column("detail", sa.Text(), comment="What was found, in words."),
        sa.Column("remedy", sa.Text(), comment="What to do; null where nothing is wrong."),
        sa.Column(
            "bins",
            postgresql.JSONB(),
            comment="Of drift: the share of each bin when the version was trained (expected) and now (actual).",
        ),
        sa.Column(
            "expected_count", sa.BigInteger(), comment="Of drift: users or rows then; of the hit rate: recommendations."
        ),
        sa.Column(
            "actual_count",
            sa.BigInteger(),
            comment="Of drift: users or rows now; of the hit rate: recommendations that were bought.",
        ),
        sa.Column("window_start", sa.DateTime(timezone=True), comment="From when on events were counted."),
        sa.Column("window_end", sa.DateTime(timezone=True), comment="Until when."),
        sa.Column(
            "observed_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When it was measured.",
        ),
        sa.Column(
            "observed_by",
            sa.Text(),
            server_default=sa.text("CURRENT_USER"),
            nullable=False,
            comment="Role that did it.",
        ),
        sa.CheckConstraint("measure in ('drift', 'hit rate')", name=op.f("ck_observations_measure")),
        sa.CheckConstraint("status in ('ok', 'warning', 'critical', 'unknown')", name=op.f("ck_observations_status")),
        sa.ForeignKeyConstraint(
            ["version_id"],
            ["vae.versions.version_id"],
            name=op.f("fk_observations_version_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("observation_id", name=op.f("pk_observations")),
        schema="vae",
        comment="Log of vae.check_drift and vae.hit_rate.",
    )
    op.create_index("ix_observations_version_id", "observations", ["version_id"], schema="vae")


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
