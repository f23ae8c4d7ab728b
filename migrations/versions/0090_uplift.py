"""Keep which column holds exposure, and whether a version claims uplift"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0090"
down_revision = "0089"
branch_labels = None
depends_on = None

_COMMENTS = {
    "method": "pgvae, or the baseline measured beside it on the same split: popularity, recency, item_knn, ease,"
    " graph_filter; of demand last_period, exponential_smoothing; of outcomes rfm (a regression on recency, frequency"
    " and amount), base_rate, last_period, popularity, random; of uplift exposed, withheld and experiment (what"
    " happened), response (users ranked by the probability of buying).",
    "split": "What was held out: temporal (the newest events), random (a share of each user's items, by chance), strong"
    " (users who were never trained on), horizon (the newest horizon_days of the model), experiment (assignments to"
    " exposed or withheld); with folds, as 5-fold strong.",
    "metric": "recall, ndcg, precision, hit_rate, mrr, map, novelty, coverage (at k), auc, and of scores that are"
    " probabilities log_loss, brier, calibration_error. ndcg_lead: pgvae's ndcg less that of this method, paired by"
    " user. demand_wape, demand_pinball, demand_coverage: of the items' units in the horizon. churn_auc, churn_brier,"
    " churn_log_loss, churn_ece (calibration error), churn_log_loss_lead (this method's less pgvae's): of who buys"
    " nothing. purchases_wape, purchases_bias: of the number of purchases. response_lift, response_ece,"
    " response_calibration_error, response_bias: of who buys what; audience_lift: of who buys one item."
    " uplift_assignments, uplift_response_rate, uplift_average_effect, uplift_balance_auc, uplift_checked_effect,"
    " uplift_qini, uplift_qini_lead (pgvae's less this method's): of who buys because of an offer.",
}


def upgrade() -> None:
    """Adds the columns; what is there claims no uplift, and offers choose by the response."""
    op.add_column(
        "models",
        sa.Column(
            "exposure_column",
            sa.Text(),
            comment="Column that says whether an offer was made (true) or withheld by chance (false); such rows are no"
            " behaviour. Null: there is none.",
        ),
        schema="vae",
    )
    op.add_column(
        "versions",
        sa.Column(
            "has_uplift",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="Whether the version claims uplift: whom an offer makes buy.",
        ),
        schema="vae",
    )
    op.add_column(
        "versions",
        sa.Column(
            "no_uplift",
            sa.Text(),
            comment="Why the version claims no uplift; null where it does.",
        ),
        schema="vae",
    )
    op.add_column(
        "offers",
        sa.Column(
            "choose_by",
            sa.Text(),
            server_default=sa.text("'response'"),
            nullable=False,
            comment="What ranks and chooses the users: response (who is likeliest to buy) or uplift (whom the offer"
            " makes buy).",
        ),
        schema="vae",
    )
    op.create_check_constraint(
        op.f("ck_offers_choose_by"), "offers", "choose_by in ('response', 'uplift')", schema="vae"
    )
    for column, comment in _COMMENTS.items():
        op.alter_column("metrics", column, comment=comment, schema="vae")
    # They have more arguments, or give more columns.
    op.execute(
        "drop function if exists vae.create_model(text, regclass, text, text, text, text, text, regclass, text, regclass,"
        " text, jsonb, jsonb, text[], text[])"
    )
    op.execute(
        "drop function if exists vae.create_offer(text, text, anyarray, numeric, numeric, numeric, integer, boolean,"
        " timestamptz, timestamptz)"
    )
    op.execute("drop function if exists vae_private.audience(integer, text[], integer, jsonb)")


def downgrade() -> None:
    """Refuses: pgvae upgrades forward only; `pgvae uninstall` removes it."""
    raise NotImplementedError("pgvae upgrades forward only; pgvae uninstall removes it")
