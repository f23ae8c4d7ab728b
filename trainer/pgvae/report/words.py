"""What a version's figures mean, in words for whoever must decide about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pgvae.report.insight import Insight
from pgvae.rows import LOWER_IS_BETTER, CurvePoint, Metric
from pgvae.versions import PublishedVersion

OWN = "pgvae"
_METHODS = {
    OWN: "pgvae",
    "popularity": "bestsellers",
    "recency": "current bestsellers",
    "item_knn": "bought together",
    "ease": "EASE (linear)",
    "graph_filter": "graph filter (linear)",
    "sequential_rules": "bought next",
    "rfm": "recency, frequency, money",
    "base_rate": "the average for everybody",
    "last_period": "as in the last period",
    "response": "the likeliest buyers first",
    "exponential_smoothing": "exponential smoothing",
}
METRICS = {
    "recall": "of what people went on to choose, the part that stood in the list",
    "ndcg": "the same, but a hit at the top counts more than one at the end; 100 % is a perfect list",
    "precision": "the part of the list that people went on to choose",
    "hit_rate": "the part of the people for whom at least one item of the list was right",
    "mrr": "one over the place of the first right item: 100 % if always on top, 50 % if always second",
    "map": "precision averaged over the places of the right items",
    "coverage": "the part of the catalogue that stands in anybody's list",
    "novelty": "how unknown the listed items are, in bits: one more is half as many people who know them",
    "auc": "how often a right item is ranked before another one; 50 % is chance",
    "log_loss": "surprise about what was chosen, in nats; lower is better",
    "brier": "squared error of the predicted shares, 0 to 2; lower is better",
    "calibration_error": "the part of all probability that lies on shares of the wrong size; lower is better",
}
# What says enough to somebody in a hurry.
MAIN = ("recall", "ndcg", "hit_rate", "coverage")
# Gates that differ by less are told apart by nobody.
_EVEN = 0.05
_NO_PERCENT = ("novelty", "log_loss", "brier")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`tone` is good, mixed, bad or unknown."""

    tone: str
    headline: str
    sentences: tuple[str, ...]


def method_name(method: str) -> str:
    """Gives a method's name as people say it."""
    return _METHODS.get(method, method.replace("_", " "))


def figure(metric: str, value: float) -> str:
    """Gives a metric's value as it is printed."""
    return f"{value:.3f}" if metric in _NO_PERCENT else percent(value)


def percent(value: float) -> str:
    """Gives a share in per cent, in three digits."""
    digits = 1 if abs(value) >= 0.1 or value == 0 else 2
    return f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def ranked_splits(version: PublishedVersion) -> set[str]:
    """Gives the splits on which lists were measured."""
    return {row.split for row in version.metrics if row.metric == "ndcg"}


def main_split(version: PublishedVersion) -> list[Metric]:
    """Gives the metrics of everybody on the split that a version is judged by: by time, where that was measured."""
    splits = sorted(ranked_splits(version), key=lambda split: (split != "temporal", split))
    return [row for row in version.metrics if splits and row.split == splits[0] and row.slice == "all"]


def methods_of(rows: Iterable[Metric], metric: str, k: int) -> list[Metric]:
    """Gives the rows of one metric, the best method first."""
    sign = 1 if metric in LOWER_IS_BETTER else -1
    return sorted(
        (row for row in rows if (row.metric, row.k) == (metric, k)),
        key=lambda row: (sign * row.value, row.method != OWN, row.method),
    )


def metrics_of(rows: Iterable[Metric]) -> list[tuple[str, int]]:
    """Gives the metrics, by name and length of list, in the order of METRICS."""
    names = list(METRICS)
    return sorted(
        {(row.metric, row.k) for row in rows if row.metric in METRICS}, key=lambda key: (names.index(key[0]), key[1])
    )


def list_length(rows: Iterable[Metric]) -> int:
    """Gives the length of list by which a version is judged: 20 where that was measured."""
    lengths = sorted({row.k for row in rows if row.metric == "ndcg"})
    return 20 if 20 in lengths or not lengths else lengths[-1]


def verdict(version: PublishedVersion) -> Verdict:
    """Says whether the version is worth using, by NDCG against each other method on the same split."""
    rows = main_split(version)
    k = list_length(rows)
    ndcg = {row.method: row for row in methods_of(rows, "ndcg", k)}
    recall = {row.method: row for row in methods_of(rows, "recall", k)}
    own = ndcg.get(OWN)
    if own is None or len(ndcg) < 2:
        return Verdict(
            tone="unknown",
            headline="Nobody knows yet whether it is any good",
            sentences=(
                "It was not measured: with so few people, or so few new choices at the end of the window, a figure"
                " would say nothing. Collect more events and train again, or compare it with what you use today.",
            ),
        )
    leads = {row.method: row for row in methods_of(rows, "ndcg_lead", k)}
    others = [method for method in ndcg if method != OWN]
    ahead = [method for method in others if _is_clear(own, ndcg[method], leads.get(method), sign=1)]
    behind = [method for method in others if _is_clear(own, ndcg[method], leads.get(method), sign=-1)]
    open_ = [method for method in others if method not in ahead + behind]
    sentences = _recall_sentences(version, recall, k)
    # As strict as vae.activate, which asks for no interval here.
    if "popularity" in ndcg and ndcg["popularity"].value > own.value:
        chance = () if "popularity" in behind else ("With this many people the difference may be chance.",)
        return Verdict(
            tone="bad",
            headline="Do not use its lists: a plain list of bestsellers ranks better",
            sentences=(
                *sentences,
                *chance,
                "Activation refuses it unless it is forced. More events, or pgvae tune, may help."
                " The forecasts of demand and of who leaves do not depend on it.",
            ),
        )
    if behind:
        bestsellers = "by no clear margin ahead of bestsellers" if "popularity" in open_ else "ahead of bestsellers"
        return Verdict(
            tone="mixed",
            headline=f"{bestsellers.capitalize()}, behind {_listed(method_name(method) for method in behind)}",
            sentences=(*sentences, "It may still be worth its place: see the parts below, and try pgvae tune."),
        )
    if open_:
        names = _listed(method_name(method) for method in open_)
        leads_all = all(ndcg[method].value <= own.value for method in open_)
        return Verdict(
            tone="mixed",
            headline=f"Ahead of everything compared, though over {names} by no clear margin"
            if leads_all
            else f"Behind nothing compared, but with no clear margin between it and {names}",
            sentences=(*sentences, "With this many people the difference may be chance."),
        )
    return Verdict(
        tone="good",
        headline="Clearly better than everything it was compared with",
        sentences=(*sentences, "In each comparison the difference is larger than chance explains (95 %)."),
    )


def _is_clear(own: Metric, other: Metric, lead: Metric | None, *, sign: int) -> bool:
    """Says whether the 95 % interval of the paired difference is above 0, or below it where `sign` is -1.

    Without it, whether the two intervals are apart.
    """
    if lead is None or lead.lower is None or lead.upper is None:
        if own.lower is None or own.upper is None or other.lower is None or other.upper is None:
            return False
        return own.lower > other.upper if sign > 0 else own.upper < other.lower
    return lead.lower > 0 if sign > 0 else lead.upper < 0


def _recall_sentences(version: PublishedVersion, recall: dict[str, Metric], k: int) -> tuple[str, ...]:
    own = recall.get(OWN)
    if own is None:
        return ()
    sure = ""
    if own.lower is not None and own.upper is not None:
        sure = f" (95 % sure: {percent(own.lower)} to {percent(own.upper)})"
    what = _listed(version.targets) or "event"
    text = (
        f"Measured on {own.user_count:,} people and events that it had not seen: of the items of each one's next"
        f" {what} events, {percent(own.value)} stood in its list of {k}{sure}"
    )
    bestsellers = recall.get("popularity")
    if bestsellers is None:
        return (f"{text}.",)
    times = f", {own.value / bestsellers.value:.1f} times as many" if bestsellers.value > 0 else ""
    return (f"{text}; in a list of the {k} bestsellers {percent(bestsellers.value)}{times}.",)


# Curves of predicted probabilities against what happened: a heading, and what it means for a manager.
CALIBRATIONS = {
    "churn_calibration": (
        "Can the risk of leaving be planned with?",
        "People in ten groups by their predicted risk. Where a dot is on the dashed line, as many left as predicted:"
        " the number may be used to plan with. Groups above the line left more often than predicted.",
    ),
    "response_calibration": (
        "Who answers an offer",
        "Pairs of a person and an item, by the predicted probability that the item is bought. On the dashed line the"
        " expected buyers may be added up over items; those of one that people buy again and again may be far off.",
    ),
}


def churn_sentences(version: PublishedVersion, bands: Sequence[CurvePoint]) -> tuple[str, ...]:
    """Says how well it is known who leaves, beside the baseline; `bands` are the points of the curve churn_bands."""
    found = {(row.method, row.metric): row for row in version.metrics if row.split == "horizon"}
    sentences = []
    people = sum(point.weight for point in bands)
    if people:
        left = sum(point.weight * point.y for point in bands)
        expected = sum(point.weight * point.x for point in bands)
        sentences.append(
            f"Of {people:,.0f} people {left:,.0f} bought nothing in the newest {version.horizon_days} days,"
            f" {expected:,.0f} were expected to."
        )
    own, other = (found.get((method, "churn_auc")) for method in (OWN, "rfm"))
    if own is not None:
        beside = f"; by recency, frequency and money {percent(other.value)}" if other is not None else ""
        sentences.append(
            "Of one who left and one who stayed, it names the one at higher risk rightly in"
            f" {percent(own.value)} of the cases{beside}, by chance 50 %."
        )
    lead = found.get(("rfm", "churn_log_loss_lead"))
    if lead is not None and lead.lower is not None and lead.upper is not None and lead.lower <= 0:
        how = "better" if lead.upper < 0 else "about as well"
        sentences.append(f"A regression on recency, frequency and money foretells it {how}.")
    return tuple(sentences)


def offer_sentence(version: PublishedVersion) -> str:
    """Says how far the expected buyers were off in the sum; nothing where it was not measured."""
    found = {(row.method, row.metric): row.value for row in version.metrics if row.split == "horizon"}
    bias = found.get((OWN, "response_bias"))
    if bias is None:
        return ""
    return f" In the sum over all pairs, {100 * bias:.0f} purchases were expected for every 100 that came."


def lift_sentence(points: Iterable[CurvePoint]) -> str:
    """Says what the tenth of the offers with the highest probabilities reach, beside the other methods."""
    nearest: dict[str, CurvePoint] = {}
    for point in points:
        best = nearest.get(point.method)
        if best is None or abs(point.x - 0.1) < abs(best.x - 0.1):
            nearest[point.method] = point
    own = nearest.pop(OWN, None)
    if own is None or own.x <= 0:
        return ""
    beside = _listed(f"{method_name(method)} {percent(point.y)}" for method, point in nearest.items())
    return (
        f"Of all possible offers, an item to a person each, the {percent(own.x)} that the model ranks first reach"
        f" {percent(own.y)} of the purchases, {own.y / own.x:.1f} times as many as offers by chance"
        + (f"; {beside}." if beside else ".")
    )


def uplift_sentence(version: PublishedVersion) -> str:
    """Says what the experiment measured, and whether it is foretold whom an offer makes buy."""
    found = {(row.method, row.metric): row for row in version.metrics if row.split == "experiment"}
    effect = found.get(("experiment", "uplift_average_effect"))
    sentences = []
    if effect is not None and effect.lower is not None and effect.upper is not None:
        exposed, withheld = (found[kind, "uplift_response_rate"].value for kind in ("exposed", "withheld"))
        sentences.append(
            f"Chance decided who got an offer: {percent(exposed)} of those who did bought the item, {percent(withheld)}"
            f" of those who did not. So of 1,000 offers {1000 * effect.value:.1f} made somebody buy"
            f" ({1000 * effect.lower:.1f} to {1000 * effect.upper:.1f})."
        )
    sentences.append(
        "The higher a line above the dashed one, the better is known whom to ask; the shade is the 95 % interval."
        if version.has_uplift
        else f"No uplift is claimed: {version.no_uplift}."
    )
    return " ".join(sentences)


def demand_sentences(version: PublishedVersion) -> tuple[str, ...]:
    """Says how far forecasts of demand were off, beside the baselines; nothing where none was measured."""
    found = {(row.method, row.metric): row.value for row in version.metrics if row.split == "horizon"}
    wape = {method: value for (method, metric), value in found.items() if metric == "demand_wape"}
    if OWN not in wape:
        is_measured = (OWN, "demand_coverage") in found
        return (
            ("Of the items known before, none was sold in the days that forecasts are measured on.",)
            if is_measured
            else ()
        )
    others = {method: value for method, value in wape.items() if method != OWN}
    beaten = all(wape[OWN] < value for value in others.values())
    beside = _listed(f"{method_name(method)} {percent(value)}" for method, value in sorted(others.items()))
    return (
        f"In the newest {version.horizon_days} days, and the two such spans before where sales reach so far, forecasts"
        f" of the units of each item were off by {percent(wape[OWN])} of all units sold; {beside}."
        + (
            " Less is better."
            if beaten
            else " Less is better: a simpler method did as well or better, and is good enough."
        ),
        f"What was sold lay within the interval for {percent(found[OWN, 'demand_coverage'])} of the items, where 80 %"
        " was meant; where items sell few units, more than that lie within it.",
    )


def _listed(names: Iterable[str]) -> str:
    *most, last = [*names] or [""]
    return f"{', '.join(most)} and {last}" if most else last


def evenness(insight: Insight) -> str:
    """Says in a sentence whether the gates tell events apart."""
    gates = [gate.mean for gate in (*insight.by_event_type, *insight.by_age)]
    if not gates or max(gates) - min(gates) < _EVEN:
        return "Here they hardly differ: the model counts all kinds and ages of events nearly alike."
    kind = max(insight.by_event_type, key=lambda gate: gate.mean, default=None)
    age = max(insight.by_age, key=lambda gate: gate.mean, default=None)
    most = _listed(gate.label for gate in (kind, age) if gate)
    return f"Most weight have, of the kinds and of the ages: {most}."


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """A part of the model card: a heading and its points."""

    heading: str
    points: tuple[str, ...]


def card(version: PublishedVersion, insight: Insight) -> list[Chapter]:
    """Gives the model card (Mitchell et al. 2019): what the version is for, what it saw, what it can and cannot do."""
    judged = verdict(version)
    seconds = sum(version.durations.values())
    targets = _listed(version.targets)
    chapters = [
        Chapter(
            heading="Intended use",
            points=(
                f"To rank the items of one shop for one person by what that person may choose next ({targets}).",
                "Not for decisions about people, such as credit, prices for one person, or access to a service.",
                "The score orders items. It is a share of the model's probability over the catalogue, no probability"
                " that somebody buys.",
            ),
        ),
        Chapter(
            heading="Data",
            points=(
                f"{version.event_count:,} events of {version.user_count:,} people on {version.item_count:,} items,"
                f" {day(version.window_start)} to {day(version.window_end)}.",
                f"Kinds of event: {', '.join(version.event_types)}. Predicted: {targets}.",
                "The events are those of the shop, cleaned by rules that anybody can read in SQL:"
                f" {version.model}.clean_events. They show what people did in this shop as it was, with what it"
                " offered and placed in front of them.",
                *_feature_points(version),
            ),
        ),
        Chapter(heading="Metrics", points=(judged.headline + ".", *judged.sentences)),
        Chapter(heading="Limits", points=_limits(version, insight)),
        Chapter(heading="Privacy", points=_privacy(version)),
        Chapter(
            heading="Explainability",
            points=(
                "Each event of a person has an attention gate between 0 and 1 that says how much it counts; the"
                " average gates of each kind of event and of each age are in the report. Beside that, each item of a"
                " history speaks for some others by fixed links, which no gate weighs, and may say less the more came"
                " after it.",
                "A live score is computed from the events that the person has at that moment, and from nothing else"
                " that is stored about the person"
                + (", besides the person's features." if version.pipeline("users").size else "."),
                "The formulas, with the code of each, are in docs/model.md.",
            ),
        ),
        Chapter(
            heading="Compute cost",
            points=(
                f"{seconds:,.0f} seconds from reading to the last pass, {sum(p.seconds for p in version.passes):,.0f}"
                f" of them in {len(version.passes)} passes over the people. Energy was not measured."
                if version.durations
                else "Not recorded.",
            ),
        ),
    ]
    return chapters


def _feature_points(version: PublishedVersion) -> list[str]:
    points = []
    for source in ("users", "items"):
        pipeline = version.pipeline(source)
        if pipeline.columns:
            points.append(f"Features of {source}: {', '.join(column.name for column in pipeline.columns)}.")
    return points or ["No features of people or items besides their events."]


def _limits(version: PublishedVersion, insight: Insight) -> tuple[str, ...]:
    points = [
        "It was measured on the past of this shop. Whether people choose more because of its lists, only an"
        " experiment with real people can tell.",
        "It learns what was shown and bought before: what was never offered cannot be liked, and popular items have"
        " an advantage.",
        "It knows the items of its training. An item added since is in no list until the next training.",
        "A person without events, marked is_cold_start, "
        + (
            "is scored by the own features, or gets the popular items where none are known."
            if version.pipeline("users").size
            else "gets the popular items."
        ),
    ]
    failed = [check["check_name"] for check in version.quality if check.get("status") == "fail"]
    if failed:
        points.append(f"It was trained although checks of the quality gate failed: {', '.join(map(str, failed))}.")
    if insight.since:
        points.append(
            f"Since its training, {insight.since.users:,} people of a sample chose something new; of those items"
            f" {percent(insight.since.recall)} stood in its list of 20."
        )
    else:
        points.append("How well its shares fit what happens since its training is not measured yet.")
    return tuple(points)


def _privacy(version: PublishedVersion) -> tuple[str, ...]:
    users = version.pipeline("users")
    return (
        "The version stores no row about a person: it holds numbers for items, kinds of event and ages of events, and"
        " networks that all people share. No name, key or event of a person is in it.",
        "Of the users' features it stores how they are read:"
        f" {', '.join(column.name for column in users.columns)}, with the values that were frequent enough to learn."
        if users.columns
        else "It stores nothing of the users' table.",
        "The predictions that a refresh writes name people by the shop's own key, beside item keys and scores;"
        f" {version.model}.explanations also says which of their events led to the first recommendation. They go when"
        " the model is dropped, and change with the next refresh.",
        "Who is removed from the shop's tables is out of live scores at once, out of the stored predictions with the"
        " next refresh (out of the tables beneath them with the next full one), and has no influence on the weights"
        " after the next training.",
        "The report shows averages, and a map of a sample of people as points without keys.",
    )


def day(moment: datetime | None) -> str:
    """Gives the day of UTC, whatever zone the session gave the moment in."""
    return f"{moment.astimezone(UTC):%Y-%m-%d}" if moment else "–"


def markdown(version: PublishedVersion, insight: Insight) -> str:
    """Gives the model card as Markdown, what comes from the data escaped."""
    lines = [f"# Model card: {_escaped(version.model)}, version {version.version}", ""]
    lines += [
        f"State {_escaped(version.state)}, published {day(version.created_at)} by {_escaped(version.created_by)}"
        f" with pgvae {_escaped(version.trainer_version)}.",
        "",
    ]
    for chapter in card(version, insight):
        lines += [f"## {chapter.heading}", "", *(f"- {_escaped(point)}" for point in chapter.points), ""]
    rows = main_split(version)
    names = metrics_of(rows)
    methods = [row.method for row in methods_of(rows, "ndcg", list_length(rows))]
    if rows:
        lines += ["## Figures", ""]
        lines.append("| Metric | " + " | ".join(_escaped(method_name(method)) for method in methods) + " |")
        lines.append("|---" * (len(methods) + 1) + "|")
        for metric, k in names:
            cells = {row.method: figure(metric, row.value) for row in methods_of(rows, metric, k)}
            label = f"{metric}@{k}" if k else metric
            lines.append(f"| {_escaped(label)} | " + " | ".join(cells.get(method, "") for method in methods) + " |")
        lines.append("")
    return "\n".join(lines)


_SPECIAL = str.maketrans({character: f"\\{character}" for character in "\\`*_{}[]<>#|"} | {"\n": " "})


def _escaped(text: str) -> str:
    return text.translate(_SPECIAL)
