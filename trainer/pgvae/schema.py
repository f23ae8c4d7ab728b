"""The tables of pgvae as SQLAlchemy metadata: what the migrations add up to."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, DOUBLE_PRECISION, JSONB, REAL

PUBLIC = "vae"
PRIVATE = "vae_private"

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_now = text("now()")
_user = text("current_user")


def _timestamp(name: str, comment: str, *, default_now: bool = False) -> Column[object]:
    return Column(
        name,
        DateTime(timezone=True),
        nullable=not default_now,
        server_default=_now if default_now else None,
        comment=comment,
    )


def _model_id() -> Column[object]:
    return Column(
        "model_id",
        Integer,
        ForeignKey(models.c.model_id, ondelete="CASCADE"),
        nullable=False,
        comment="Model, see vae.models.",
    )


def _version_id() -> Column[object]:
    return Column(
        "version_id",
        BigInteger,
        ForeignKey(versions.c.version_id, ondelete="CASCADE"),
        nullable=False,
        comment="Version, see vae.versions.",
    )


models = Table(
    "models",
    metadata,
    Column(
        "model_id", Integer, Identity(always=True), primary_key=True, comment="Number of the model in this database."
    ),
    Column(
        "name",
        Text,
        nullable=False,
        unique=True,
        comment="Name of the model and of the schema that holds its functions and views.",
    ),
    Column("events_schema", Text, nullable=False, comment="Schema of the shop's event table."),
    Column("events_table", Text, nullable=False, comment="Name of the shop's event table or view."),
    Column("user_id_column", Text, nullable=False, comment="Column of the event table that names the user."),
    Column("item_id_column", Text, nullable=False, comment="Column of the event table that names the item."),
    Column("occurred_at_column", Text, nullable=False, comment="Column of the event table that holds the time."),
    Column("event_type_column", Text, comment="Column that holds the event type; null: every row is a purchase."),
    Column("quantity_column", Text, comment="Column that holds the quantity; rows at or below zero are returns."),
    Column("user_id_type", Text, nullable=False, comment="SQL type of the user's key: bigint, integer, uuid or text."),
    Column("item_id_type", Text, nullable=False, comment="SQL type of the item's key: bigint, integer, uuid or text."),
    Column(
        "occurred_at_type",
        Text,
        nullable=False,
        comment="SQL type of the time: timestamptz, timestamp (read as UTC) or date.",
    ),
    Column("users_schema", Text, comment="Schema of the table of users, if one was given."),
    Column("users_table", Text, comment="Name of the table of users, if one was given."),
    Column("users_key_column", Text, comment="Key column of the table of users."),
    Column("items_schema", Text, comment="Schema of the table of items, if one was given."),
    Column("items_table", Text, comment="Name of the table of items, if one was given."),
    Column("items_key_column", Text, comment="Key column of the table of items."),
    Column(
        "options",
        JSONB,
        nullable=False,
        server_default=text("'{}'"),
        comment="Thresholds of the quality gate and sizes, complete with defaults.",
    ),
    Column(
        "user_features",
        ARRAY(Text),
        nullable=False,
        server_default=text("'{}'"),
        comment="Columns of the table of users that the model reads as features.",
    ),
    Column(
        "item_features",
        ARRAY(Text),
        nullable=False,
        server_default=text("'{}'"),
        comment="Columns of the table of items that the model reads as features.",
    ),
    Column(
        "exposure_column",
        Text,
        comment="Column that says whether an offer was made (true) or withheld by chance (false); such rows are no"
        " behaviour. Null: there is none.",
    ),
    _timestamp("created_at", "When the model was created.", default_now=True),
    Column("created_by", Text, nullable=False, server_default=_user, comment="Role that created the model."),
    Column(
        "rebuild_error",
        Text,
        comment="Why the last upgrade of pgvae could not remake the model's functions and views; null: they are of this"
        " release.",
    ),
    # Types become part of the statements that make a model's schema.
    CheckConstraint("user_id_type in ('bigint', 'integer', 'uuid', 'text')", name="user_id_type"),
    CheckConstraint("item_id_type in ('bigint', 'integer', 'uuid', 'text')", name="item_id_type"),
    CheckConstraint("occurred_at_type in ('timestamptz', 'timestamp', 'date')", name="occurred_at_type"),
    schema=PUBLIC,
    comment="Models: which shop tables each one reads. One row per call of vae.create_model.",
)

event_types = Table(
    "event_types",
    metadata,
    _model_id(),
    Column("name", Text, nullable=False, comment="Event type as the shop's table spells it."),
    Column(
        "event_type",
        Text,
        nullable=False,
        comment="Standard event type that it means: view, search, add_to_cart, purchase, review, share, register; or ignore.",
    ),
    Column(
        "weight", REAL, nullable=False, comment="How much one such event counts as a training target; 0: an input only."
    ),
    PrimaryKeyConstraint("model_id", "name"),
    CheckConstraint("weight >= 0 and weight <= 1000", name="weight"),
    schema=PUBLIC,
    comment="Event types of each model: the shop's spelling, the standard name, the weight in training.",
)

candidates = Table(
    "candidates",
    metadata,
    _model_id(),
    Column("name", Text, nullable=False, comment="Name of the set, as the option candidates gives it."),
    Column("relation_schema", Text, nullable=False, comment="Schema of the table or view that lists the items."),
    Column("relation_table", Text, nullable=False, comment="Name of the table or view that lists the items."),
    Column("item_id_column", Text, nullable=False, comment="Column that names the item."),
    Column(
        "for_refresh",
        Boolean,
        nullable=False,
        comment="Whether refreshes recommend only these items; of one set of a model at most.",
    ),
    _timestamp("created_at", "When the set was first defined.", default_now=True),
    Column("created_by", Text, nullable=False, server_default=_user, comment="Role that first defined it."),
    PrimaryKeyConstraint("model_id", "name"),
    Index("ix_candidates_for_refresh", "model_id", unique=True, postgresql_where=text("for_refresh")),
    schema=PUBLIC,
    comment="Candidate sets: tables and views that say which items of a model may be recommended.",
)

offers = Table(
    "offers",
    metadata,
    Column(
        "offer_id",
        BigInteger,
        Identity(always=True),
        primary_key=True,
        comment="Number of the offer in this database.",
    ),
    _model_id(),
    Column("name", Text, nullable=False, comment="Name of the offer, of one model's offers."),
    Column("item_keys", ARRAY(Text), nullable=False, comment="Keys of the items that are offered."),
    Column("value", Numeric, comment="What a buyer brings, revenue or margin; null: not said."),
    Column("cost", Numeric, comment="What it costs to make the offer to one user; null: nothing."),
    Column("budget", Numeric, comment="What may be spent on it in all; null: no limit."),
    Column("max_users", Integer, nullable=False, comment="How many users a refresh lists at most."),
    Column(
        "exclude_buyers",
        Boolean,
        nullable=False,
        comment="Whether users who bought one of the items before are left out.",
    ),
    _timestamp("starts_at", "When the offer begins; null: it has begun."),
    _timestamp("ends_at", "When it ends: refreshes then list nobody for it; null: never."),
    _timestamp("created_at", "When the offer was defined.", default_now=True),
    Column("created_by", Text, nullable=False, server_default=_user, comment="Role that defined it."),
    Column(
        "choose_by",
        Text,
        nullable=False,
        server_default=text("'response'"),
        comment="What ranks and chooses the users: response (who is likeliest to buy) or uplift (whom the offer makes"
        " buy).",
    ),
    Column(
        "among_schema", Text, comment="Schema of the relation that lists whom the offer may go to; null: everybody."
    ),
    Column("among_table", Text, comment="Name of that relation."),
    Column("among_column", Text, comment="Its column with the key of the user."),
    UniqueConstraint("model_id", "name"),
    CheckConstraint("choose_by in ('response', 'uplift')", name="choose_by"),
    schema=PUBLIC,
    comment="Offers of each model: items that are offered to users, what a buyer brings and what asking costs.",
)

versions = Table(
    "versions",
    metadata,
    Column(
        "version_id",
        BigInteger,
        Identity(always=True),
        primary_key=True,
        comment="Number of the version in this database.",
    ),
    _model_id(),
    Column(
        "version",
        Integer,
        nullable=False,
        comment="Number within the model, from 1; the model_version of prediction rows.",
    ),
    Column(
        "state",
        Text,
        nullable=False,
        server_default=text("'loading'"),
        comment="loading, ready, active or retired; at most one version of a model is active.",
    ),
    _timestamp("created_at", "When the version was published.", default_now=True),
    Column("created_by", Text, nullable=False, server_default=_user, comment="Role that published the version."),
    _timestamp("activated_at", "When the version last became active."),
    _timestamp("retired_at", "When the version last stopped being active."),
    _timestamp("window_start", "Time of the oldest event that was trained on."),
    _timestamp("window_end", "Time of the newest event that was trained on."),
    Column("event_count", BigInteger, nullable=False, comment="Cleaned events that were trained on."),
    Column("user_count", BigInteger, nullable=False, comment="Users that were trained on."),
    Column("item_count", Integer, nullable=False, comment="Items that the version can recommend."),
    Column("seed", BigInteger, nullable=False, comment="Seed of every random number in training."),
    Column(
        "format",
        Integer,
        nullable=False,
        comment="Layout of the tensors; a runtime scores only the formats that it knows.",
    ),
    Column(
        "code_digest",
        Text,
        nullable=False,
        comment="sha256 of the runtime's source that the version was evaluated with.",
    ),
    Column("trainer_version", Text, nullable=False, comment="Release of pgvae that trained the version."),
    Column("config", JSONB, nullable=False, comment="Hyper-parameters of the training."),
    Column("durations", JSONB, nullable=False, comment="Seconds of each phase of the training."),
    Column(
        "quality",
        JSONB,
        nullable=False,
        comment="Report of the quality gate at training time, as vae.check_events gave it.",
    ),
    Column(
        "features",
        JSONB,
        nullable=False,
        server_default=text("'{}'"),
        comment="How columns of users and items become feature tokens: per column the kind and its categories, words or"
        " bins; left_out names the other columns and why.",
    ),
    Column(
        "demand",
        JSONB,
        comment="The forecast of demand: its horizon in days, coefficients and intervals; null: there is none.",
    ),
    Column(
        "has_uplift",
        Boolean,
        nullable=False,
        server_default=text("false"),
        comment="Whether the version claims uplift: whom an offer makes buy.",
    ),
    Column(
        "no_uplift",
        Text,
        comment="Why the version claims no uplift; null where it does.",
    ),
    Column(
        "origin",
        JSONB,
        comment="Where an imported version came from: database, model, version, when and by whom it was published"
        " and exported, sha256 of the file; null: it was trained here.",
    ),
    UniqueConstraint("model_id", "version"),
    CheckConstraint("state in ('loading', 'ready', 'active', 'retired')", name="state"),
    Index("ix_versions_active", "model_id", unique=True, postgresql_where=text("state = 'active'")),
    schema=PUBLIC,
    comment="Versions: immutable results of training, with their lineage. Join prediction rows on model_version.",
)

metrics = Table(
    "metrics",
    metadata,
    _version_id(),
    Column(
        "method",
        Text,
        nullable=False,
        comment="pgvae, or the baseline measured beside it on the same split: popularity, recency, item_knn, ease,"
        " graph_filter, sequential_rules; of demand last_period, exponential_smoothing; of outcomes rfm (a regression on"
        " recency, frequency and amount), base_rate, last_period, popularity, random; of uplift exposed, withheld and experiment (what"
        " happened), response (users ranked by the probability of buying).",
    ),
    Column(
        "split",
        Text,
        nullable=False,
        comment="What was held out: temporal (the newest events), random (a share of each user's items, by chance), strong"
        " (users who were never trained on), horizon (the newest horizon_days of the model), experiment (assignments to"
        " exposed or withheld); with folds, as 5-fold strong.",
    ),
    Column(
        "metric",
        Text,
        nullable=False,
        comment="recall, ndcg, precision, hit_rate, mrr, map, novelty, coverage (at k), auc, and of scores that are"
        " probabilities log_loss, brier, calibration_error. ndcg_lead: pgvae's ndcg less that of this method, paired by"
        " user. demand_wape, demand_pinball, demand_coverage: of the items' units in the horizon; demand_buyers_wape,"
        " demand_buyers_pinball, demand_buyers_coverage: of their buyers. churn_auc, churn_brier, churn_log_loss,"
        " churn_ece (calibration error), churn_log_loss_lead (this method's less pgvae's): of who buys nothing."
        " purchases_wape, purchases_bias: of the number of purchases. response_lift, response_ece,"
        " response_calibration_error, response_bias: of who buys what; audience_lift: of who buys one item."
        " uplift_assignments, uplift_response_rate, uplift_average_effect, uplift_balance_auc, uplift_checked_effect,"
        " uplift_qini, uplift_qini_lead (pgvae's less this method's): of who buys because of an offer.",
    ),
    Column(
        "k", Integer, nullable=False, comment="Length of the list that was judged; 0 where a metric judges no list."
    ),
    Column(
        "value",
        DOUBLE_PRECISION,
        nullable=False,
        comment="Mean over the users of the test part; coverage, calibration_error and those of demand: of all together.",
    ),
    Column(
        "lower",
        DOUBLE_PRECISION,
        comment="Lower bound of the 95 % bootstrap interval over users; null where there is none.",
    ),
    Column(
        "upper",
        DOUBLE_PRECISION,
        comment="Upper bound of the 95 % bootstrap interval over users; null where there is none.",
    ),
    Column(
        "user_count", BigInteger, nullable=False, comment="Users of the test part, or of the slice; of demand: items."
    ),
    Column(
        "slice",
        Text,
        nullable=False,
        server_default=text("'all'"),
        comment="all, or the part of the users or items that was judged: by activity, account age or category.",
    ),
    PrimaryKeyConstraint("version_id", "method", "split", "slice", "metric", "k"),
    schema=PUBLIC,
    comment="Metrics of each version on held-out events, with the baselines beside them.",
)

curves = Table(
    "curves",
    metadata,
    _version_id(),
    Column(
        "curve",
        Text,
        nullable=False,
        comment="What the points show, for example demand: expected units of items against what was sold.",
    ),
    Column("method", Text, nullable=False, comment="pgvae, or the baseline beside it."),
    Column("position", Integer, nullable=False, comment="Place of the point in its curve, from 1."),
    Column("label", Text, comment="What the point stands for, for example an item's key or a band's name."),
    Column("x", DOUBLE_PRECISION, nullable=False, comment="What was predicted, or how far along the curve is."),
    Column("y", DOUBLE_PRECISION, nullable=False, comment="What happened."),
    Column("lower", DOUBLE_PRECISION, comment="Lower bound of the predicted interval; null where there is none."),
    Column("upper", DOUBLE_PRECISION, comment="Upper bound of the predicted interval; null where there is none."),
    Column(
        "weight",
        DOUBLE_PRECISION,
        nullable=False,
        comment="How many users, items or pairs of them the point stands for.",
    ),
    PrimaryKeyConstraint("version_id", "curve", "method", "position"),
    schema=PUBLIC,
    comment="Points of the pictures about each version: what it predicted against what happened on held-out events.",
)

segments = Table(
    "segments",
    metadata,
    _version_id(),
    Column(
        "segment",
        Integer,
        nullable=False,
        comment="Number of the segment, the same from one version to the next as long as most of its users stay.",
    ),
    Column("place", Integer, nullable=False, comment="Row of its centre in the version's tensor, from 0."),
    Column(
        "name",
        Text,
        nullable=False,
        comment="Name, by what its users have events on, of any type, more often than all users do.",
    ),
    Column("share", REAL, nullable=False, comment="Share of the users when the version was trained."),
    Column("mean_events", REAL, nullable=False, comment="Mean number of events of its users, then."),
    Column(
        "top_categories",
        Text,
        nullable=False,
        comment="What its users have events on, of any type, more often than all users do, and by which factor: values"
        " of a column of the items, else keys of items.",
    ),
    Column(
        "similarity",
        REAL,
        nullable=False,
        comment="Mean cosine of its users and its centre: how much they resemble each other.",
    ),
    Column(
        "overlap",
        REAL,
        comment="Users in common with the segment of this number in the version that was active before, of those in"
        " either; null: it is new.",
    ),
    PrimaryKeyConstraint("version_id", "segment"),
    UniqueConstraint("version_id", "place"),
    schema=PUBLIC,
    comment="Segments of each version: groups of users with similar tastes.",
)

epochs = Table(
    "epochs",
    metadata,
    _version_id(),
    Column(
        "phase",
        Text,
        nullable=False,
        comment="evaluate: trained without the held-out part; publish: trained on all events.",
    ),
    Column("epoch", Integer, nullable=False, comment="Number of the pass over the training users, from 1."),
    Column(
        "loss",
        DOUBLE_PRECISION,
        nullable=False,
        comment="Mean training loss per user: weighted reconstruction plus weighted KL.",
    ),
    Column(
        "reconstruction",
        DOUBLE_PRECISION,
        nullable=False,
        comment="Mean negative multinomial log-likelihood per user, in nats.",
    ),
    Column("kl", DOUBLE_PRECISION, nullable=False, comment="Mean KL divergence from the prior per user, in nats."),
    Column(
        "validation_ndcg",
        DOUBLE_PRECISION,
        comment="NDCG on the validation part after the epoch; null in the phase publish.",
    ),
    Column("seconds", DOUBLE_PRECISION, nullable=False, comment="Seconds that the epoch took."),
    PrimaryKeyConstraint("version_id", "phase", "epoch"),
    schema=PUBLIC,
    comment="Learning curves: one row per epoch of each version's training.",
)

activations = Table(
    "activations",
    metadata,
    Column("activation_id", BigInteger, Identity(always=True), primary_key=True, comment="Number of the change."),
    _model_id(),
    Column("version", Integer, nullable=False, comment="Version that became active, or was dropped."),
    Column("previous_version", Integer, comment="Version that was active before; null: none was."),
    Column("action", Text, nullable=False, comment="activate, rollback or drop."),
    Column("forced", Boolean, nullable=False, comment="Whether a refusal was overridden with force => true."),
    Column("reason", Text, comment="What the caller gave as the reason."),
    _timestamp("activated_at", "When it happened.", default_now=True),
    Column("activated_by", Text, nullable=False, server_default=_user, comment="Role that did it."),
    Column("overridden", Text, comment="The refusals that force => true overrode; null: none."),
    CheckConstraint("action in ('activate', 'rollback', 'drop')", name="action"),
    schema=PUBLIC,
    comment="Log of activations, rollbacks and dropped versions.",
)

refreshes = Table(
    "refreshes",
    metadata,
    Column("refresh_id", BigInteger, Identity(always=True), primary_key=True, comment="Number of the refresh."),
    _model_id(),
    Column("view", Text, nullable=False, comment="Prediction view that was refreshed."),
    Column(
        "state",
        Text,
        nullable=False,
        server_default=text("'running'"),
        comment="running, succeeded or failed; a row left running by a killed session is marked failed by the next refresh.",
    ),
    Column(
        "phase",
        Text,
        comment="What it is at: comparing, scoring or storing; null once it has ended. pg_stat_activity.application_name tells more.",
    ),
    Column("version", Integer, comment="Version whose scores the view holds since."),
    # Not now(): the row is written in the transaction that refreshed the view before.
    Column(
        "started_at",
        DateTime(timezone=True),
        nullable=False,
        server_default=text("clock_timestamp()"),
        comment="When it started.",
    ),
    _timestamp("finished_at", "When it ended; null: it is running, or its session was killed."),
    Column("seconds", DOUBLE_PRECISION, comment="Seconds that it took."),
    Column("row_count", BigInteger, comment="Rows that the view holds afterwards; of recommendations: users."),
    Column("scored_count", BigInteger, comment="Rows among them that this refresh computed anew."),
    Column("mode", Text, comment="full: all rows were computed; incremental: only those of users that changed."),
    Column("error", Text, comment="Message of the failure; the view then still holds its last good content."),
    Column("started_by", Text, nullable=False, server_default=_user, comment="Role that started it."),
    Column(
        "backend_pid",
        Integer,
        nullable=False,
        server_default=text("pg_backend_pid()"),
        comment="Server process that runs it, see pg_stat_activity.",
    ),
    Column(
        "events_until",
        DateTime(timezone=True),
        nullable=False,
        server_default=text("statement_timestamp()"),
        comment="Until when events count in the content: until the call of vae.refresh, whenever the view had its turn;"
        " of what was scored outside, until it was read.",
    ),
    Column("left_out", Text, comment="Offers that the content lacks, and why; null: none."),
    CheckConstraint("state in ('running', 'succeeded', 'failed')", name="state"),
    Index("ix_refreshes_model_id_started_at", "model_id", "started_at"),
    # By its negative: the planner would read the primary key backwards, all of it for a view that is not in the log.
    Index("ix_refreshes_view", "model_id", "view", text("(-refresh_id)")),
    Index("ix_refreshes_running", "model_id", postgresql_where=text("state = 'running'")),
    schema=PUBLIC,
    comment="Log of the refreshes of prediction views, visible while they run.",
)

tensors = Table(
    "tensors",
    metadata,
    _version_id(),
    Column("name", Text, nullable=False, comment="Name of the tensor in the model."),
    Column("chunk", Integer, nullable=False, comment="Number of the chunk within the tensor, from 0."),
    Column("dtype", Text, nullable=False, comment="NumPy name of the element type, little-endian: <f4, <i4."),
    Column("shape", ARRAY(Integer), nullable=False, comment="Shape of the whole tensor."),
    Column("sha256", LargeBinary, nullable=False, comment="sha256 of the chunk's bytes."),
    Column("data", LargeBinary, nullable=False, comment="Raw bytes of the chunk in C order, at most 16 MiB."),
    PrimaryKeyConstraint("version_id", "name", "chunk"),
    schema=PRIVATE,
    comment="Weights of the versions. Written only while a version is loading.",
)

items = Table(
    "items",
    metadata,
    _version_id(),
    Column("item_index", Integer, nullable=False, comment="Row of the item in the version's tensors, from 0."),
    Column("item_key", Text, nullable=False, comment="Key of the item as text."),
    PrimaryKeyConstraint("version_id", "item_index"),
    UniqueConstraint("version_id", "item_key"),
    schema=PRIVATE,
    comment="Catalogue of each version. Written only while a version is loading.",
)

golden_users = Table(
    "golden_users",
    metadata,
    _version_id(),
    Column("number", Integer, nullable=False, comment="Number of the golden user, from 0."),
    Column(
        "items",
        ARRAY(Integer),
        nullable=False,
        comment="Items of the history's events, as rows of the version's tensors.",
    ),
    Column(
        "event_types",
        ARRAY(Integer),
        nullable=False,
        comment="Event types of the same events, as rows of the version's tensors.",
    ),
    Column(
        "occurred_at",
        ARRAY(DOUBLE_PRECISION),
        nullable=False,
        comment="Times of the same events, in seconds since 1970.",
    ),
    Column(
        "features",
        ARRAY(Integer),
        nullable=False,
        comment="Feature tokens, as rows of the version's tensors; empty where the version has none.",
    ),
    Column(
        "top_items",
        ARRAY(Integer),
        nullable=False,
        comment="Best items, best first, without those already bought.",
    ),
    Column(
        "top_scores",
        ARRAY(DOUBLE_PRECISION),
        nullable=False,
        comment="Scores of the best items, as the trainer's network gives them in double precision.",
    ),
    PrimaryKeyConstraint("version_id", "number"),
    schema=PRIVATE,
    comment="Golden users: made-up histories and the scores that each version gives them, which vae.verify replays.",
)

verifications = Table(
    "verifications",
    metadata,
    Column(
        "verification_id", BigInteger, Identity(always=True), primary_key=True, comment="Number of the verification."
    ),
    _version_id(),
    Column("device", Text, nullable=False, comment="What computed: cpu or cuda."),
    Column("passed", Boolean, nullable=False, comment="Whether every golden user got the same answer."),
    Column("golden_users", Integer, nullable=False, comment="Golden users that were scored."),
    Column(
        "max_difference",
        DOUBLE_PRECISION,
        comment="Largest relative difference of a score; null: there was none to compare.",
    ),
    Column(
        "top_k_agreement",
        DOUBLE_PRECISION,
        comment="Share of the golden users whose best items were the same, but for ties.",
    ),
    Column("runtime_digest", Text, nullable=False, comment="sha256 of the source of the runtime that scored."),
    Column("numpy_version", Text, nullable=False, comment="numpy of the server, or cupy for the device cuda."),
    Column("blas", Text, nullable=False, comment="Linear algebra library that numpy used; for cuda the GPU."),
    Column("detail", Text, comment="What differed; null where it passed."),
    _timestamp("verified_at", "When it was verified.", default_now=True),
    Column("verified_by", Text, nullable=False, server_default=_user, comment="Role that did it."),
    Index("ix_verifications_version_id", "version_id"),
    schema=PUBLIC,
    comment="Log of vae.verify: which version gave the scores of its training, with which code and libraries.",
)

observations = Table(
    "observations",
    metadata,
    Column("observation_id", BigInteger, Identity(always=True), primary_key=True, comment="Number of the observation."),
    _version_id(),
    Column("measure", Text, nullable=False, comment="drift (population stability index) or hit rate."),
    Column(
        "subject",
        Text,
        nullable=False,
        comment="What was measured: event types, items, a column, recommendations and so on.",
    ),
    Column("value", DOUBLE_PRECISION, comment="What was found; null: there was nothing to measure."),
    Column("chance", DOUBLE_PRECISION, comment="Of drift: what chance alone exceeds once in twenty times."),
    Column("status", Text, nullable=False, comment="ok, warning, critical, or unknown."),
    Column("detail", Text, comment="What was found, in words."),
    Column("remedy", Text, comment="What to do; null where nothing is wrong."),
    Column(
        "bins",
        JSONB,
        comment="Of drift: the share of each bin when the version was trained (expected) and now (actual).",
    ),
    Column("expected_count", BigInteger, comment="Of drift: users or rows then; of the hit rate: recommendations."),
    Column(
        "actual_count",
        BigInteger,
        comment="Of drift: users or rows now; of the hit rate: recommendations that were bought.",
    ),
    _timestamp("window_start", "From when on events were counted."),
    _timestamp("window_end", "Until when."),
    _timestamp("observed_at", "When it was measured.", default_now=True),
    Column("observed_by", Text, nullable=False, server_default=_user, comment="Role that did it."),
    CheckConstraint("measure in ('drift', 'hit rate')", name="measure"),
    CheckConstraint("status in ('ok', 'warning', 'critical', 'unknown')", name="status"),
    Index("ix_observations_version_id", "version_id"),
    schema=PUBLIC,
    comment="Log of vae.check_drift and vae.hit_rate.",
)

installation = Table(
    "installation",
    metadata,
    Column("only_row", Boolean, primary_key=True, server_default=text("true"), comment="True: there is one row."),
    Column("release", Text, comment="Release of pgvae that is installed."),
    Column("runtime_digest", Text, comment="sha256 of the source that vae_private.load_runtime holds."),
    Column(
        "created_extension", Boolean, nullable=False, comment="Whether pgvae created plpython3u, and so removes it."
    ),
    Column(
        "created_roles",
        ARRAY(Text),
        nullable=False,
        server_default=text("'{}'"),
        comment="Roles that pgvae created, and so removes.",
    ),
    _timestamp("installed_at", "When this release was installed."),
    Column(
        "is_external",
        Boolean,
        nullable=False,
        server_default=text("false"),
        comment="Whether the database has no PL/Python, and is scored from outside.",
    ),
    CheckConstraint("only_row", name="only_row"),
    schema=PRIVATE,
    comment="What is installed in this database, in one row.",
)

staged_runs = Table(
    "staged_runs",
    metadata,
    Column("token", Text, comment="What only the refresh knows that brought them."),
    Column(
        "backend_pid",
        Integer,
        nullable=False,
        server_default=text("pg_backend_pid()"),
        comment="Server process that wrote it: once that is gone, nobody will store them.",
    ),
    Column("model_id", Integer, comment="Model, see vae.models."),
    Column("view", Text, comment="Prediction view; or verify."),
    Column("version_id", BigInteger, nullable=False, comment="Version that scored, see vae.versions."),
    Column("row_count", BigInteger, nullable=False, comment="Rows that the view holds then."),
    Column("events_until", DateTime(timezone=True), nullable=False, comment="Until when events count in them."),
    Column("left_out", Text, comment="What the content lacks, and why; null: nothing."),
    Column("error", Text, comment="Why there are no rows; null: there are."),
    Column("hint", Text, comment="What to do about it."),
    Column("error_state", Text, comment="Its SQLSTATE."),
    PrimaryKeyConstraint("token", "model_id", "view"),
    schema=PRIVATE,
    comment="What was scored outside and is to be stored: a row for each prediction view.",
    prefixes=["UNLOGGED"],
)

staged_rows = Table(
    "staged_rows",
    metadata,
    Column("token", Text, nullable=False, comment="What only the refresh knows that brought it."),
    Column(
        "backend_pid",
        Integer,
        nullable=False,
        server_default=text("pg_backend_pid()"),
        comment="Server process that wrote it: once that is gone, nobody will store it.",
    ),
    Column("model_id", Integer, nullable=False, comment="Model, see vae.models."),
    Column("view", Text, nullable=False, comment="Prediction view; or verify."),
    Column("cells", ARRAY(Text), nullable=False, comment="The columns of the row, as texts."),
    Index("ix_staged_rows_token", "token"),
    schema=PRIVATE,
    comment="Rows that were scored outside and are to be stored in a prediction view.",
    prefixes=["UNLOGGED"],
)

__all__ = [
    "PRIVATE",
    "PUBLIC",
    "activations",
    "candidates",
    "epochs",
    "event_types",
    "golden_users",
    "installation",
    "items",
    "metadata",
    "metrics",
    "models",
    "observations",
    "refreshes",
    "segments",
    "staged_rows",
    "staged_runs",
    "tensors",
    "verifications",
    "versions",
]
