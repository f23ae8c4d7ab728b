"""Create the tables of models, versions and logs"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("create schema vae_private")
    op.execute("comment on schema vae is 'pgvae: models, versions, metrics, logs, and the calls that manage them.'")
    op.execute("comment on schema vae_private is 'pgvae: internals, which may change with any release.'")
    op.create_table(
        "models",
        sa.Column(
            "model_id",
            sa.Integer(),
            sa.Identity(always=True),
            nullable=False,
            comment="Number of the model in this database.",
        ),
        sa.Column(
            "name",
            sa.Text(),
            nullable=False,
            comment="Name of the model and of the schema that holds its functions and views.",
        ),
        sa.Column("events_schema", sa.Text(), nullable=False, comment="Schema of the shop's event table."),
        sa.Column("events_table", sa.Text(), nullable=False, comment="Name of the shop's event table or view."),
        sa.Column(
            "user_id_column", sa.Text(), nullable=False, comment="Column of the event table that names the user."
        ),
        sa.Column(
            "item_id_column", sa.Text(), nullable=False, comment="Column of the event table that names the item."
        ),
        sa.Column(
            "occurred_at_column", sa.Text(), nullable=False, comment="Column of the event table that holds the time."
        ),
        sa.Column(
            "event_type_column",
            sa.Text(),
            nullable=True,
            comment="Column that holds the event type; null: every row is a purchase.",
        ),
        sa.Column(
            "quantity_column",
            sa.Text(),
            nullable=True,
            comment="Column that holds the quantity; rows at or below zero are returns.",
        ),
        sa.Column(
            "user_id_type",
            sa.Text(),
            nullable=False,
            comment="SQL type of the user's key: bigint, integer, uuid or text.",
        ),
        sa.Column(
            "item_id_type",
            sa.Text(),
            nullable=False,
            comment="SQL type of the item's key: bigint, integer, uuid or text.",
        ),
        sa.Column(
            "occurred_at_type",
            sa.Text(),
            nullable=False,
            comment="SQL type of the time: timestamptz, timestamp (read as UTC) or date.",
        ),
        sa.Column("users_schema", sa.Text(), nullable=True, comment="Schema of the table of users, if one was given."),
        sa.Column("users_table", sa.Text(), nullable=True, comment="Name of the table of users, if one was given."),
        sa.Column("users_key_column", sa.Text(), nullable=True, comment="Key column of the table of users."),
        sa.Column("items_schema", sa.Text(), nullable=True, comment="Schema of the table of items, if one was given."),
        sa.Column("items_table", sa.Text(), nullable=True, comment="Name of the table of items, if one was given."),
        sa.Column("items_key_column", sa.Text(), nullable=True, comment="Key column of the table of items."),
        sa.Column(
            "options",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="Thresholds of the quality gate and sizes, complete with defaults.",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the model was created.",
        ),
        sa.Column(
            "created_by",
            sa.Text(),
            server_default=sa.text("current_user"),
            nullable=False,
            comment="Role that created the model.",
        ),
        sa.CheckConstraint(
            "user_id_type in ('bigint', 'integer', 'uuid', 'text')", name=op.f("ck_models_user_id_type")
        ),
        sa.CheckConstraint(
            "item_id_type in ('bigint', 'integer', 'uuid', 'text')", name=op.f("ck_models_item_id_type")
        ),
        sa.CheckConstraint(
            "occurred_at_type in ('timestamptz', 'timestamp', 'date')", name=op.f("ck_models_occurred_at_type")
        ),
        sa.PrimaryKeyConstraint("model_id", name=op.f("pk_models")),
        sa.UniqueConstraint("name", name=op.f("uq_models_name")),
        schema="vae",
        comment="Models: which shop tables each one reads. One row per call of vae.create_model.",
    )
    op.create_table(
        "installation",
        sa.Column(
            "only_row", sa.Boolean(), server_default=sa.text("true"), nullable=False, comment="True: there is one row."
        ),
        sa.Column("release", sa.Text(), nullable=True, comment="Release of pgvae that is installed."),
        sa.Column(
            "runtime_digest",
            sa.Text(),
            nullable=True,
            comment="sha256 of the source that vae_private.load_runtime holds.",
        ),
        sa.Column(
            "created_extension",
            sa.Boolean(),
            nullable=False,
            comment="Whether pgvae created plpython3u, and so removes it.",
        ),
        sa.Column(
            "created_roles",
            postgresql.ARRAY(sa.Text()),
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="Roles that pgvae created, and so removes.",
        ),
        sa.Column(
            "installed_at", sa.DateTime(timezone=True), nullable=True, comment="When this release was installed."
        ),
        sa.CheckConstraint("only_row", name=op.f("ck_installation_only_row")),
        sa.PrimaryKeyConstraint("only_row", name=op.f("pk_installation")),
        schema="vae_private",
        comment="What is installed in this database, in one row.",
    )
    op.create_table(
        "activations",
        sa.Column(
            "activation_id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Number of the change."
        ),
        sa.Column("model_id", sa.Integer(), nullable=False, comment="Model, see vae.models."),
        sa.Column("version", sa.Integer(), nullable=False, comment="Version that became active."),
        sa.Column(
            "previous_version", sa.Integer(), nullable=True, comment="Version that was active before; null: none was."
        ),
        sa.Column("action", sa.Text(), nullable=False, comment="activate or rollback."),
        sa.Column(
            "forced", sa.Boolean(), nullable=False, comment="Whether a refusal was overridden with force => true."
        ),
        sa.Column("reason", sa.Text(), nullable=True, comment="What the caller gave as the reason."),
        sa.Column(
            "activated_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When it happened.",
        ),
        sa.Column(
            "activated_by",
            sa.Text(),
            server_default=sa.text("current_user"),
            nullable=False,
            comment="Role that did it.",
        ),
        sa.CheckConstraint("action in ('activate', 'rollback')", name=op.f("ck_activations_action")),
        sa.ForeignKeyConstraint(
            ["model_id"], ["vae.models.model_id"], name=op.f("fk_activations_model_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("activation_id", name=op.f("pk_activations")),
        schema="vae",
        comment="Log of activations and rollbacks.",
    )
    op.create_table(
        "event_types",
        sa.Column("model_id", sa.Integer(), nullable=False, comment="Model, see vae.models."),
        sa.Column("name", sa.Text(), nullable=False, comment="Event type as the shop's table spells it."),
        sa.Column(
            "event_type",
            sa.Text(),
            nullable=False,
            comment="Standard event type that it means: view, search, add_to_cart, purchase, review, share, register.",
        ),
        sa.Column(
            "weight",
            sa.REAL(),
            nullable=False,
            comment="How much one such event counts as a training target; 0: an input only.",
        ),
        sa.CheckConstraint("weight >= 0 and weight <= 1000", name=op.f("ck_event_types_weight")),
        sa.ForeignKeyConstraint(
            ["model_id"], ["vae.models.model_id"], name=op.f("fk_event_types_model_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("model_id", "name", name=op.f("pk_event_types")),
        schema="vae",
        comment="Event types of each model: the shop's spelling, the standard name, the weight in training.",
    )
    op.create_table(
        "refreshes",
        sa.Column(
            "refresh_id", sa.BigInteger(), sa.Identity(always=True), nullable=False, comment="Number of the refresh."
        ),
        sa.Column("model_id", sa.Integer(), nullable=False, comment="Model, see vae.models."),
        sa.Column("view", sa.Text(), nullable=False, comment="Prediction view that was refreshed."),
        sa.Column(
            "state",
            sa.Text(),
            server_default=sa.text("'running'"),
            nullable=False,
            comment="running, succeeded or failed; a row left running by a killed session is marked failed by the next refresh.",
        ),
        sa.Column("version", sa.Integer(), nullable=True, comment="Version whose scores the view holds since."),
        sa.Column(
            "started_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When it started.",
        ),
        sa.Column(
            "finished_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When it ended; null: it is running, or its session was killed.",
        ),
        sa.Column("seconds", sa.DOUBLE_PRECISION(), nullable=True, comment="Seconds that it took."),
        sa.Column("row_count", sa.BigInteger(), nullable=True, comment="Users in the view afterwards."),
        sa.Column(
            "error",
            sa.Text(),
            nullable=True,
            comment="Message of the failure; the view then still holds its last good content.",
        ),
        sa.Column(
            "started_by",
            sa.Text(),
            server_default=sa.text("current_user"),
            nullable=False,
            comment="Role that started it.",
        ),
        sa.Column(
            "backend_pid",
            sa.Integer(),
            server_default=sa.text("pg_backend_pid()"),
            nullable=False,
            comment="Server process that runs it, see pg_stat_activity.",
        ),
        sa.CheckConstraint("state in ('running', 'succeeded', 'failed')", name=op.f("ck_refreshes_state")),
        sa.ForeignKeyConstraint(
            ["model_id"], ["vae.models.model_id"], name=op.f("fk_refreshes_model_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("refresh_id", name=op.f("pk_refreshes")),
        schema="vae",
        comment="Log of the refreshes of prediction views, visible while they run.",
    )
    op.create_index(
        "ix_refreshes_model_id_started_at", "refreshes", ["model_id", "started_at"], unique=False, schema="vae"
    )
    op.create_table(
        "versions",
        sa.Column(
            "version_id",
            sa.BigInteger(),
            sa.Identity(always=True),
            nullable=False,
            comment="Number of the version in this database.",
        ),
        sa.Column("model_id", sa.Integer(), nullable=False, comment="Model, see vae.models."),
        sa.Column(
            "version",
            sa.Integer(),
            nullable=False,
            comment="Number within the model, from 1; the model_version of prediction rows.",
        ),
        sa.Column(
            "state",
            sa.Text(),
            server_default=sa.text("'loading'"),
            nullable=False,
            comment="loading, ready, active or retired; at most one version of a model is active.",
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="When the version was published.",
        ),
        sa.Column(
            "created_by",
            sa.Text(),
            server_default=sa.text("current_user"),
            nullable=False,
            comment="Role that published the version.",
        ),
        sa.Column(
            "activated_at", sa.DateTime(timezone=True), nullable=True, comment="When the version last became active."
        ),
        sa.Column(
            "retired_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the version last stopped being active.",
        ),
        sa.Column(
            "window_start",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Time of the oldest event that was trained on.",
        ),
        sa.Column(
            "window_end",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Time of the newest event that was trained on.",
        ),
        sa.Column("event_count", sa.BigInteger(), nullable=False, comment="Cleaned events that were trained on."),
        sa.Column("user_count", sa.BigInteger(), nullable=False, comment="Users that were trained on."),
        sa.Column("item_count", sa.Integer(), nullable=False, comment="Items that the version can recommend."),
        sa.Column("seed", sa.BigInteger(), nullable=False, comment="Seed of every random number in training."),
        sa.Column(
            "format",
            sa.Integer(),
            nullable=False,
            comment="Layout of the tensors; a runtime scores only the formats that it knows.",
        ),
        sa.Column(
            "code_digest",
            sa.Text(),
            nullable=False,
            comment="sha256 of the runtime's source that the version was evaluated with.",
        ),
        sa.Column("trainer_version", sa.Text(), nullable=False, comment="Release of pgvae that trained the version."),
        sa.Column(
            "config",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="Hyper-parameters of the training.",
        ),
        sa.Column(
            "durations",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="Seconds of each phase of the training.",
        ),
        sa.Column(
            "quality",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="Report of the quality gate at training time, as vae.check_events gave it.",
        ),
        sa.CheckConstraint("state in ('loading', 'ready', 'active', 'retired')", name=op.f("ck_versions_state")),
        sa.ForeignKeyConstraint(
            ["model_id"], ["vae.models.model_id"], name=op.f("fk_versions_model_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("version_id", name=op.f("pk_versions")),
        sa.UniqueConstraint("model_id", "version", name=op.f("uq_versions_model_id_version")),
        schema="vae",
        comment="Versions: immutable results of training, with their lineage. Join prediction rows on model_version.",
    )
    op.create_index(
        "ix_versions_active",
        "versions",
        ["model_id"],
        unique=True,
        schema="vae",
        postgresql_where=sa.text("state = 'active'"),
    )
    op.create_table(
        "epochs",
        sa.Column("version_id", sa.BigInteger(), nullable=False, comment="Version, see vae.versions."),
        sa.Column(
            "phase",
            sa.Text(),
            nullable=False,
            comment="evaluate: trained without the held-out part; publish: trained on all events.",
        ),
        sa.Column("epoch", sa.Integer(), nullable=False, comment="Number of the pass over the training users, from 1."),
        sa.Column(
            "loss",
            sa.DOUBLE_PRECISION(),
            nullable=False,
            comment="Mean training loss per user: weighted reconstruction plus weighted KL.",
        ),
        sa.Column(
            "reconstruction",
            sa.DOUBLE_PRECISION(),
            nullable=False,
            comment="Mean negative multinomial log-likelihood per user, in nats.",
        ),
        sa.Column(
            "kl", sa.DOUBLE_PRECISION(), nullable=False, comment="Mean KL divergence from the prior per user, in nats."
        ),
        sa.Column(
            "validation_ndcg",
            sa.DOUBLE_PRECISION(),
            nullable=True,
            comment="NDCG on the validation part after the epoch; null in the phase publish.",
        ),
        sa.Column("seconds", sa.DOUBLE_PRECISION(), nullable=False, comment="Seconds that the epoch took."),
        sa.ForeignKeyConstraint(
            ["version_id"], ["vae.versions.version_id"], name=op.f("fk_epochs_version_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("version_id", "phase", "epoch", name=op.f("pk_epochs")),
        schema="vae",
        comment="Learning curves: one row per epoch of each version's training.",
    )
    op.create_table(
        "metrics",
        sa.Column("version_id", sa.BigInteger(), nullable=False, comment="Version, see vae.versions."),
        sa.Column(
            "method", sa.Text(), nullable=False, comment="pgvae, or the baseline measured beside it on the same split."
        ),
        sa.Column("split", sa.Text(), nullable=False, comment="How train and test were divided: temporal."),
        sa.Column("metric", sa.Text(), nullable=False, comment="recall or ndcg, as LightGCN defines them."),
        sa.Column("k", sa.Integer(), nullable=False, comment="Length of the list that was judged."),
        sa.Column("value", sa.DOUBLE_PRECISION(), nullable=False, comment="Mean over the users of the test part."),
        sa.Column("lower", sa.DOUBLE_PRECISION(), nullable=True, comment="Lower bound of the 95 % bootstrap interval."),
        sa.Column("upper", sa.DOUBLE_PRECISION(), nullable=True, comment="Upper bound of the 95 % bootstrap interval."),
        sa.Column("user_count", sa.BigInteger(), nullable=False, comment="Users of the test part."),
        sa.ForeignKeyConstraint(
            ["version_id"], ["vae.versions.version_id"], name=op.f("fk_metrics_version_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("version_id", "method", "split", "metric", "k", name=op.f("pk_metrics")),
        schema="vae",
        comment="Metrics of each version on held-out events, with the baselines beside them.",
    )
    op.create_table(
        "items",
        sa.Column("version_id", sa.BigInteger(), nullable=False, comment="Version, see vae.versions."),
        sa.Column(
            "item_index", sa.Integer(), nullable=False, comment="Row of the item in the version's tensors, from 0."
        ),
        sa.Column("item_key", sa.Text(), nullable=False, comment="Key of the item as text."),
        sa.ForeignKeyConstraint(
            ["version_id"], ["vae.versions.version_id"], name=op.f("fk_items_version_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("version_id", "item_index", name=op.f("pk_items")),
        sa.UniqueConstraint("version_id", "item_key", name=op.f("uq_items_version_id_item_key")),
        schema="vae_private",
        comment="Catalogue of each version. Written only while a version is loading.",
    )
    op.create_table(
        "tensors",
        sa.Column("version_id", sa.BigInteger(), nullable=False, comment="Version, see vae.versions."),
        sa.Column("name", sa.Text(), nullable=False, comment="Name of the tensor in the model."),
        sa.Column("chunk", sa.Integer(), nullable=False, comment="Number of the chunk within the tensor, from 0."),
        sa.Column(
            "dtype", sa.Text(), nullable=False, comment="NumPy name of the element type, little-endian: <f4, <i4."
        ),
        sa.Column("shape", postgresql.ARRAY(sa.Integer()), nullable=False, comment="Shape of the whole tensor."),
        sa.Column("sha256", sa.LargeBinary(), nullable=False, comment="sha256 of the chunk's bytes."),
        sa.Column(
            "data", sa.LargeBinary(), nullable=False, comment="Raw bytes of the chunk in C order, at most 16 MiB."
        ),
        sa.ForeignKeyConstraint(
            ["version_id"], ["vae.versions.version_id"], name=op.f("fk_tensors_version_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("version_id", "name", "chunk", name=op.f("pk_tensors")),
        schema="vae_private",
        comment="Weights of the versions. Written only while a version is loading.",
    )
    # Alembic's own table, for whoever looks into the schema.
    op.execute("comment on table vae.alembic_version is 'Revision of the tables, kept by pgvae install.'")
    op.execute("comment on column vae.alembic_version.version_num is 'Name of the revision, see migrations/versions.'")


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
