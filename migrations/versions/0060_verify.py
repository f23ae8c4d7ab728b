"""Keep golden users, the log of verifications, and where an imported version came from"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0060"
down_revision = "0050"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the tables and columns; versions of before have no golden users."""
    op.create_table(
        "golden_users",
        sa.Column("version_id", sa.BigInteger(), nullable=False, comment="Version, see vae.versions."),
        sa.Column("number", sa.Integer(), nullable=False, comment="Number of the golden user, from 0."),
        sa.Column(
            "items",
            postgresql.ARRAY(sa.Integer()),
            nullable=False,
            comment="Items of the history's events, as rows of the version's tensors.",
        ),
        sa.Column(
            "event_types",
            postgresql.ARRAY(sa.Integer()),
            nullable=False,
            comment="Event types of the same events, as rows of the version's tensors.",
        ),
        sa.Column(
            "occurred_at",
            postgresql.ARRAY(sa.DOUBLE_PRECISION()),
            nullable=False,
            comment="Times of the same events, in seconds since 1970.",
        ),
        sa.Column(
            "features",
            postgresql.ARRAY(sa.Integer()),
            nullable=False,
            comment="Feature tokens, as rows of the version's tensors; empty where the version has none.",
        ),
        sa.Column(
            "top_items",
            postgresql.ARRAY(sa.Integer()),
            nullable=False,
            comment="Best items, best first, without those already bought.",
        ),
        sa.Column(
            "top_scores",
            postgresql.ARRAY(sa.DOUBLE_PRECISION()),
            nullable=False,
            comment="Scores of the best items, as the trainer's network gives them in double precision.",
        ),
        sa.ForeignKeyConstraint(
            ["version_id"], ["vae.versions.version_id"], name="fk_golden_users_version_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("version_id", "number", name="pk_golden_users"),
        schema="vae_private",
        comment="Golden users: made-up histories and the scores that each version gives them, which vae.verify replays.",
    )
    op.create_table(
        "verifications",
        sa.Column(
            "verification_id",
            sa.BigInteger(),
            sa.Identity(always=True),
            nullable=False,
            comment="Number of the verification.",
        ),
        sa.Column("version_id", sa.BigInteger(), nullable=False, comment="Version, see vae.versions."),
        sa.Column("device", sa.Text(), nullable=False, comment="What computed: cpu or cuda."),
        sa.Column("passed", sa.Boolean(), nullable=False, comment="Whether every golden user got the same answer."),
        sa.Column("golden_users", sa.Integer(), nullable=False, comment="Golden users that were scored."),
        sa.Column(
            "max_difference",
            sa.DOUBLE_PRECISION(),
            nullable=True,
            comment="Largest relative difference of a score; null: there was none to compare.",
        ),
        sa.Column(
            "top_k_agreement",
            sa.DOUBLE_PRECISION(),
            nullable=True,
            comment="Share of the golden users whose best items were the same, but for ties.",
        ),
        sa.Column(
            "runtime_digest", sa.Text(), nullable=False, comment="sha256 of the source of the runtime that scored."
        ),
        sa.Column(
            "numpy_version", sa.Text(), nullable=False, comment="numpy of the server, or cupy for the device cuda."
        ),
        sa.Column(
            "blas", sa.Text(), nullable=False, comment="Linear algebra library that numpy used; for cuda the GPU."
        ),
        sa.Column("detail", sa.Text(), nullable=True, comment="What differed; null where it passed."),
        sa.Column(
            "verified_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When it was verified.",
        ),
        sa.Column(
            "verified_by",
            sa.Text(),
            server_default=sa.text("current_user"),
            nullable=False,
            comment="Role that did it.",
        ),
        sa.ForeignKeyConstraint(
            ["version_id"], ["vae.versions.version_id"], name="fk_verifications_version_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("verification_id", name="pk_verifications"),
        schema="vae",
        comment="Log of vae.verify: which version gave the scores of its training, with which code and libraries.",
    )
    op.create_index("ix_verifications_version_id", "verifications", ["version_id"], schema="vae")
    op.add_column(
        "activations",
        sa.Column(
            "overridden", sa.Text(), nullable=True, comment="The refusals that force => true overrode; null: none."
        ),
        schema="vae",
    )
    op.add_column(
        "versions",
        sa.Column(
            "origin",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="Where an imported version came from: database, model, version, when and by whom it was published"
            " and exported, sha256 of the file; null: it was trained here.",
        ),
        schema="vae",
    )
    op.drop_constraint("ck_activations_action", "activations", schema="vae")
    op.create_check_constraint(
        op.f("ck_activations_action"), "activations", "action in ('activate', 'rollback', 'drop')", schema="vae"
    )
    op.alter_column("activations", "action", comment="activate, rollback or drop.", schema="vae")
    op.alter_column("activations", "version", comment="Version that became active, or was dropped.", schema="vae")
    op.create_table_comment(
        "activations",
        "Log of activations, rollbacks and dropped versions.",
        existing_comment="Log of activations and rollbacks.",
        schema="vae",
    )
    # It has an argument more now.
    op.execute("drop function if exists vae_private.switch_version(integer, integer, text, boolean, text)")


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
