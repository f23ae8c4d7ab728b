"""Puts a version's report together: what is read, what is drawn, and the page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pgvae import __version__
from pgvae.connection import connect, keep_open
from pgvae.files import write_file
from pgvae.report import charts, words
from pgvae.report.insight import Insight, look_into
from pgvae.rows import DESCRIPTIVE, CurvePoint, Metric
from pgvae.versions import PublishedVersion, read_version

_POPULARITY = "popularity"


@dataclass(frozen=True, kw_only=True)
class Report:
    """A version and what it was found to do."""

    version: PublishedVersion
    insight: Insight

    def html(self) -> str:
        """Gives the page: one file that loads nothing from anywhere."""
        return render(self.version, self.insight)

    def card(self) -> str:
        """Gives the model card as Markdown."""
        return words.markdown(self.version, self.insight)


def read_report(dsn: str | None, model: str, version: int | None = None) -> Report:
    """Reads a version, the active one or else the newest by default, and runs it on a sample of users.

    Needs the role vae_reader; the weights of versions that are not active only their owner may read, and the sample
    needs the shop's events: what the role may not read is left out, and the page says so.
    """
    with connect(dsn) as connection:
        keep_open(connection)
        found = read_version(connection, model, version)
        return Report(version=found, insight=look_into(connection, found))


def write(path: Path, text: str) -> None:
    """Writes a file in one step; PgvaeError where it cannot be."""
    write_file(path, text.encode(), hint="give another place with --output or --card")


def render(version: PublishedVersion, insight: Insight) -> str:
    """Gives the page of a version; whatever comes from the data is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"day": words.day, "moment": _moment, "setting": _setting}
    return environment.get_template("page.html").render(
        version=version,
        insight=insight,
        verdict=words.verdict(version),
        parts=_split_parts(version),
        curves=charts.learning_curves(version.passes) if version.passes else "",
        by_event_type=_gates(insight.by_event_type, "attention by kind of event"),
        evenness=words.evenness(insight),
        by_age=_gates(insight.by_age, "attention by age of event"),
        latent=charts.latent_map(insight.latent) if insight.latent else "",
        since=insight.since,
        reliability=charts.reliability(*insight.since.reliability.T.tolist()) if insight.since else "",
        calibration=_calibration(version),
        business=_business(version),
        percent=words.percent,
        pipelines={source: version.pipeline(source) for source in ("users", "items")},
        hyperparameters=[item for item in sorted(version.config.items()) if item[0] != "event_types"],
        card=words.card(version, insight),
        written=datetime.now(UTC),
        release=__version__,
    )


@dataclass(frozen=True, kw_only=True)
class _Business:
    """Pictures of what was predicted for the shop against what happened; empty where not measured."""

    demand: Markup | str
    demand_sentences: tuple[str, ...]
    bands: Markup | str
    churn_sentences: tuple[str, ...]
    pictures: list[tuple[str, Markup, str]]


def _business(version: PublishedVersion) -> _Business:
    curves: dict[str, list[CurvePoint]] = {}
    for point in version.points:
        curves.setdefault(point.curve, []).append(point)
    demand = [point for point in curves.get("demand", []) if point.method == words.OWN]
    bands = curves.get("churn_bands", [])
    pictures = [
        (
            heading,
            charts.calibration(curves[name], heading),
            meaning + (words.offer_sentence(version) if name == "response_calibration" else ""),
        )
        for name, (heading, meaning) in words.CALIBRATIONS.items()
        if name in curves
    ]
    if lift := curves.get("response_lift"):
        heading = "What choosing the audience is worth"
        pictures.append((heading, charts.gains(lift, heading), words.lift_sentence(lift)))
    if won := curves.get("uplift"):
        heading = "Whom an offer makes buy"
        pictures.append((heading, charts.uplift(won, heading), words.uplift_sentence(version)))
    return _Business(
        demand=charts.demand(demand) if demand else "",
        demand_sentences=words.demand_sentences(version),
        bands=charts.bands(bands) if bands else "",
        churn_sentences=words.churn_sentences(version, bands),
        pictures=pictures,
    )


def _gates(rows: Any, title: str) -> Markup | str:
    return charts.gates(rows, title) if rows else ""


@dataclass(frozen=True, kw_only=True)
class _Table:
    """Metrics of all methods: `rows` hold a metric's name, what it means, and a cell per method; the best is marked."""

    methods: list[str]
    rows: list[tuple[str, str, list[tuple[str, str, bool]]]]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What was measured on one split."""

    title: str
    users: int
    k: int
    chart: Markup
    main: _Table
    more: _Table
    slices: Markup | str


def _split_parts(version: PublishedVersion) -> list[_Part]:
    first = words.main_split(version)
    splits = sorted(words.ranked_splits(version), key=lambda name: (name != first[0].split, name))
    return [_part([row for row in version.metrics if row.split == split], split) for split in splits]


def _part(rows: list[Metric], split: str) -> _Part:
    everybody = [row for row in rows if row.slice == "all"]
    k = words.list_length(everybody)
    ndcg = words.methods_of(everybody, "ndcg", k)
    methods = [row.method for row in ndcg]
    keys = words.metrics_of(everybody)
    return _Part(
        title=split,
        users=max(row.user_count for row in everybody),
        k=k,
        chart=charts.comparison(ndcg, f"NDCG@{k}, {split}"),
        main=_table(everybody, methods, [key for key in keys if key[0] in words.MAIN]),
        more=_table(everybody, methods, [key for key in keys if key[0] not in words.MAIN]),
        slices=_slices(rows, split, k),
    )


def _table(rows: list[Metric], methods: list[str], keys: list[tuple[str, int]]) -> _Table:
    found = []
    for metric, k in keys:
        ranked = words.methods_of(rows, metric, k)
        own = {row.method: row for row in ranked}
        cells = []
        for method in methods:
            row = own.get(method)
            interval = "" if row is None or row.lower is None or row.upper is None else _interval(metric, row)
            text = "–" if row is None else words.figure(metric, row.value)
            best = metric not in DESCRIPTIVE and row is not None and row.value == ranked[0].value
            cells.append((text, interval, best))
        found.append((f"{metric}@{k}" if k else metric, words.METRICS[metric], cells))
    return _Table(methods=[words.method_name(method) for method in methods], rows=found)


def _interval(metric: str, row: Metric) -> str:
    assert row.lower is not None and row.upper is not None
    return f"{words.figure(metric, row.lower)} to {words.figure(metric, row.upper)}"


def _slices(rows: list[Metric], split: str, k: int) -> Markup | str:
    chosen = [row for row in rows if (row.metric, row.k) == ("ndcg", k)]
    other = {row.slice: row for row in chosen if row.method == _POPULARITY}
    own = [row for row in chosen if row.method == words.OWN]
    own.sort(key=lambda row: (row.slice != "all", _natural(row.slice)))
    if len(own) < 2:
        return ""
    return charts.slices(
        [("everybody" if row.slice == "all" else row.slice, row, other.get(row.slice)) for row in own],
        f"NDCG@{k} by part, {split}",
        words.method_name(_POPULARITY),
    )


def _natural(text: str) -> list[tuple[int, str]]:
    """Gives a key by which 3 comes before 12."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", text)]


def _calibration(version: PublishedVersion) -> list[tuple[str, str, str]]:
    """Gives the metrics of pgvae's shares as probabilities: name, value, meaning."""
    own = {row.metric: row for row in words.main_split(version) if row.method == words.OWN}
    return [
        (metric, words.figure(metric, own[metric].value), words.METRICS[metric])
        for metric in ("calibration_error", "log_loss", "brier")
        if metric in own
    ]


def _moment(moment: datetime | None) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC" if moment else "–"


def _setting(value: object) -> str:
    """Gives a value of the configuration as people write it; – for none."""
    if isinstance(value, dict):
        return " ".join(f"{name} {_setting(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_setting, value)) or "–"
    return "–" if value is None else str(value)
