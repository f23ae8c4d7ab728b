"""The report of a version: complete, self-contained, true to the tables, and harmless whatever the data holds."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, date, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import psycopg
import pytest
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.text import Text
from psycopg import sql
from psycopg.types.json import Jsonb

from conftest import as_role, create_database, drop_database
from pgvae.config import TrainingConfig
from pgvae.errors import PgvaeError
from pgvae.report import charts
from pgvae.report.insight import AGES, SAMPLE_USERS, Insight, look_into
from pgvae.report.page import Report, read_report, render, write
from pgvae.report.words import card, markdown, verdict
from pgvae.rows import CurvePoint, Metric
from pgvae.server import Server
from pgvae.simulate import SimulationConfig, simulate
from pgvae.versions import PublishedVersion, read_version, read_weights
from pgvae_runtime import forward, outcomes
from pgvae_runtime.tokens import age_bucket
from shop import SMALL, Shop, create_model, train, train_and_activate

Connection = psycopg.Connection[Any]
RunCli = Callable[..., subprocess.CompletedProcess[str]]

SECTIONS = [
    "verdict",
    "metrics",
    "calibration",
    "business",
    "attention",
    "latent",
    "learning",
    "quality",
    "lineage",
    "card",
]
EVIL = "<script>alert(1)</script>&\"'"


class Page(HTMLParser):
    """What a page consists of: its tags with their attributes, the text of each section, the ids."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self._section = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
            self.sections[self._section] = ""

    def handle_data(self, data: str) -> None:
        if self._section:
            self.sections[self._section] += f" {data}"

    def text(self, section: str) -> str:
        return " ".join(self.sections[section].split())


@pytest.fixture(scope="module")
def measured_dsn(server: Server, template: str) -> Iterator[str]:
    """The DSN of a simulated shop whose model `shop` has one version, and newer events than that was trained on."""
    name = "report"
    create_database(server, name, template)
    dsn = server.dsn(name)
    simulate(dsn, SimulationConfig(schema="web", users=600, items=200, until=date(2025, 1, 1)))
    newer = "occurred_at > timestamptz '2024-11-25'"
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"create table newer as select * from web.events where {newer}")
        connection.execute(f"delete from web.events where {newer}")
        create_model(connection, events="web.events", users="web.users", items="web.items", options=SMALL)
        train(dsn, config=TrainingConfig(epochs=4, hidden=16, latent=8))
        connection.execute("insert into web.events select * from newer")
    yield dsn
    drop_database(server, name)


@pytest.fixture(scope="module")
def report(measured_dsn: str) -> Report:
    return read_report(measured_dsn, "shop")


@pytest.fixture(scope="module")
def page(report: Report) -> Page:
    return Page(report.html())


@pytest.fixture
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the charts of a page undrawn, but for their words: drawing them takes a second or two."""

    def words(figure: Figure, label: str) -> Markup:
        return Markup("<svg>{}</svg>").format(" ".join(text.get_text() for text in figure.findobj(Text)))

    monkeypatch.setattr(charts, "_svg", words)


# The page


def test_every_section_is_there_and_says_something(page: Page) -> None:
    assert list(page.sections) == SECTIONS
    for section in SECTIONS:
        assert len(page.text(section)) > 60, section
    for section in ("metrics", "calibration", "attention", "latent", "learning"):
        assert "Not shown" not in page.text(section)
        assert "Not measured" not in page.text(section)
    assert sum(tag == "svg" for tag, _ in page.tags) >= 6


def test_the_page_loads_nothing_and_runs_nothing(report: Report, page: Page) -> None:
    html = report.html()
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "form", "foreignobject")
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                assert value and value.startswith("#"), (tag, name, value)
    assert "@import" not in html
    assert re.findall(r"url\((?!#)", html) == []
    # What is left of addresses are the names of XML's vocabularies.
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    policies = [attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_charts_take_their_colours_from_the_page_and_share_no_id(report: Report, page: Page) -> None:
    html = report.html()
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    for drawing in drawings:
        assert re.findall(r"#[0-9a-f]{6}\b", drawing) == [], "a colour that does not follow the page"
        assert "aria-label=" in drawing
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    light, dark = html.split("prefers-color-scheme: dark", 1)
    defined = set(re.findall(r"(--[\w-]+):", light))
    assert used <= defined
    assert defined == set(re.findall(r"(--[\w-]+):", dark))
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    references = set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", html))
    assert references <= set(ids)


def test_the_figures_are_those_of_the_tables(measured_dsn: str, page: Page) -> None:
    with psycopg.connect(measured_dsn) as connection:
        rows = connection.execute(
            "select method, metric, value, lower, upper, user_count from vae.metrics where slice = 'all'"
            " and metric in ('recall', 'ndcg')"
        ).fetchall()
        checks = connection.execute("select check_name, row_count from vae.check_events('shop')").fetchall()
        digest, seed, users = connection.execute("select code_digest, seed, user_count from vae.versions").fetchall()[0]
    assert {row[0] for row in rows} == {"pgvae", "popularity", "item_knn"}
    text = page.text("metrics")
    for _, _, *values, user_count in rows:
        for value in values:
            assert re.search(rf"\b{100 * value:.1f} %|\b{100 * value:.2f} %", text), value
        assert f"{user_count} people" in text
    assert checks
    for name, _ in checks:
        assert name.replace("_", " ") in page.text("quality")
    lineage = page.text("lineage")
    assert digest in lineage and f"Seed {seed} " in lineage
    assert f"{users:,} people" in page.text("card")
    assert {"latent 8", "hidden 16", "epochs 4"} <= {part.strip() for part in lineage.split(",")}


# What the weights say


def test_gates_are_those_of_the_runtime(measured_dsn: str, report: Report) -> None:
    """Of each event of the sample by itself, as the formula says: the mean of all gates is that of the groups."""
    insight = report.insight
    assert [gate.label for gate in insight.by_event_type] == report.version.event_types
    assert {gate.label for gate in insight.by_age} <= set(AGES)
    assert all(0 < gate.mean < 1 for gate in insight.by_event_type)
    by_type = sum(gate.mean * gate.events for gate in insight.by_event_type)
    by_age = sum(gate.mean * gate.events for gate in insight.by_age)
    assert by_type == pytest.approx(by_age, rel=0.02)
    with psycopg.connect(measured_dsn) as connection:
        count = connection.execute(
            "select count(*) from shop.clean_events where event_type = 'purchase' and occurred_at <= %s",
            [report.version.window_end],
        ).fetchall()[0][0]
    purchases = next(gate for gate in insight.by_event_type if gate.label == "purchase")
    assert purchases.events == count
    assert insight.users == report.version.user_count <= SAMPLE_USERS


def test_a_gate_that_favours_purchases_is_seen(measured_dsn: str, report: Report) -> None:
    def gates(*arguments: Any) -> Any:
        tokens = next(argument for argument in arguments if hasattr(argument, "event_type"))
        favoured = report.version.event_types.index("purchase")
        return np.where(tokens.event_type == favoured, 0.9, 0.1).astype(np.float32)

    with psycopg.connect(measured_dsn) as connection, pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "embed", lambda weights, tokens: tokens)
        patch.setattr(forward, "encoder_gates", gates)
        patch.setattr(forward, "encode", lambda weights, tokens: np.eye(tokens.user_count, 3))
        patch.setattr("pgvae.report.insight._since", lambda *arguments: None)
        insight = look_into(connection, report.version)
    means = {gate.label: round(gate.mean, 3) for gate in insight.by_event_type}
    assert means == {name: 0.9 if name == "purchase" else 0.1 for name in report.version.event_types}
    assert "Most weight have" in Page(render(report.version, insight)).text("attention")


def test_age_labels_are_those_of_the_buckets() -> None:
    days = np.array([0.5, 1.0, 2.9, 3.0, 6.9, 7.0, 2046.9, 2047.0, 9000.0])
    labels = [AGES[bucket] for bucket in age_bucket(days * 86_400)]
    assert labels == [
        "< 1 day", "1–2 days", "1–2 days", "3–6 days", "3–6 days", "7–14 days", "1023–2046 days", "2047 days or more",
        "2047 days or more",
    ]  # fmt: skip


def test_the_latent_map_is_the_widest_plane(report: Report) -> None:
    latent = report.insight.latent
    assert latent is not None
    assert latent.points.shape == (report.insight.users, 2)
    np.testing.assert_allclose(latent.points.mean(axis=0), 0, atol=1e-6)
    widths = latent.points.std(axis=0)
    assert widths[0] >= widths[1] > 0
    assert 0 < latent.explained[1] <= latent.explained[0] <= 1
    assert latent.group.max() < len(latent.groups)
    assert latent.points.T @ latent.points == pytest.approx(np.diag(len(latent.points) * widths**2), abs=1e-6)


def test_what_happened_since_is_judged_by_newer_events_only(measured_dsn: str, report: Report) -> None:
    since = report.insight.since
    assert since is not None
    with psycopg.connect(measured_dsn) as connection:
        users = connection.execute(
            "with bought as (select user_id, item_id, min(occurred_at) as at from shop.clean_events"
            " where event_type = 'purchase' group by 1, 2)"
            " select count(distinct user_id) from bought join (select distinct user_id from shop.clean_events"
            " where occurred_at <= %(end)s) u using (user_id) where at > %(end)s and item_id::text in"
            " (select item_key from vae_private.items)",
            {"end": report.version.window_end},
        ).fetchall()[0][0]
    assert since.users == users
    given, happened = since.reliability.T
    assert given.sum() == pytest.approx(1, abs=1e-3)
    assert happened.sum() == pytest.approx(1, abs=1e-3)
    assert since.error == pytest.approx(np.abs(given - happened).sum() / 2, abs=1e-3)
    assert 0 <= since.recall <= 1
    without = render(report.version, replace(report.insight, since=None))
    assert "Not measured" in Page(without).text("calibration")


def test_reading_the_weights_back_gives_what_was_published(measured_dsn: str, report: Report) -> None:
    with psycopg.connect(measured_dsn) as connection:
        weights = read_weights(connection, report.version.version_id)
    assert set(weights) == {*forward.SHAPES, *outcomes.SHAPES, "segment_centroids"}
    assert len(weights["item_popularity"]) == report.version.item_count
    assert weights["item_popularity"].sum() == pytest.approx(1, abs=1e-5)


# The verdict


def version_with(report: Report, *values: tuple[str, float, float]) -> PublishedVersion:
    """Gives a version that was measured as NDCG@20 (method, value, half the width of the interval)."""
    metrics = [
        Metric(
            method=method,
            split="temporal",
            slice="all",
            metric=metric,
            k=20,
            value=value,
            lower=value - width,
            upper=value + width,
            user_count=100,
        )
        for method, value, width in values
        for metric in ("ndcg", "recall")
    ]
    return replace(report.version, metrics=metrics)


@pytest.mark.usefixtures("without_charts")
@pytest.mark.parametrize(
    ("values", "tone", "words"),
    [
        ([("pgvae", 0.5, 0.05), ("popularity", 0.1, 0.05), ("ease", 0.3, 0.05)], "good", "Clearly better"),
        ([("pgvae", 0.5, 0.05), ("popularity", 0.1, 0.05), ("ease", 0.45, 0.05)], "mixed", "no clear margin"),
        ([("pgvae", 0.5, 0.05), ("popularity", 0.1, 0.05), ("ease", 0.65, 0.05)], "mixed", "behind EASE"),
        ([("pgvae", 0.5, 0.05), ("popularity", 0.48, 0.05), ("ease", 0.7, 0.05)], "mixed", "no clear margin ahead of"),
        ([("pgvae", 0.5, 0.05), ("popularity", 0.1, 0.05), ("ease", 0.52, 0.05)], "mixed", "Behind nothing compared"),
        ([("pgvae", 0.5, 0.05), ("popularity", 0.51, 0.05)], "bad", "Do not use its lists"),
        ([("pgvae", 0.1, 0.05), ("popularity", 0.2, 0.05), ("ease", 0.1, 0.05)], "bad", "Do not use its lists"),
        ([("pgvae", 0.5, 0.05)], "unknown", "Nobody knows"),
        ([], "unknown", "Nobody knows"),
    ],
)
def test_the_verdict_follows_from_the_figures(
    report: Report, values: list[tuple[str, float, float]], tone: str, words: str
) -> None:
    version = version_with(report, *values)
    found = verdict(version)
    assert found.tone == tone
    assert words in found.headline
    page = Page(render(version, report.insight))
    assert words in page.text("verdict")
    assert words in page.text("card")
    assert any(attributes.get("class") == f"verdict {tone}" for _, attributes in page.tags)


def test_a_paired_lead_decides_where_it_was_measured(report: Report) -> None:
    version = version_with(report, ("pgvae", 0.5, 0.2), ("popularity", 0.4, 0.2))
    assert verdict(version).tone == "mixed"
    lead = replace(version.metrics[-1], metric="ndcg_lead", method="popularity", value=0.1, lower=0.05, upper=0.15)
    assert verdict(replace(version, metrics=[*version.metrics, lead])).tone == "good"


def test_behind_is_what_a_paired_lead_says_too(report: Report) -> None:
    version = version_with(report, ("pgvae", 0.5, 0.01), ("popularity", 0.1, 0.01), ("ease", 0.51, 0.2))
    lead = replace(version.metrics[-1], metric="ndcg_lead", method="ease", value=-0.01, lower=-0.03, upper=0.01)
    of_popularity = replace(lead, method="popularity", value=0.4, lower=0.3, upper=0.5)
    chance = verdict(replace(version, metrics=[*version.metrics, lead, of_popularity]))
    assert chance.headline == "Behind nothing compared, but with no clear margin between it and EASE (linear)"
    sure = replace(lead, lower=-0.015, upper=-0.005)
    found = verdict(replace(version, metrics=[*version.metrics, sure, of_popularity]))
    assert found.headline == "Ahead of bestsellers, behind EASE (linear)"


def test_bestsellers_that_may_be_ahead_by_chance_are_ahead(report: Report) -> None:
    said = "With this many people the difference may be chance."
    assert said in verdict(version_with(report, ("pgvae", 0.5, 0.05), ("popularity", 0.51, 0.05))).sentences
    assert said not in verdict(version_with(report, ("pgvae", 0.5, 0.05), ("popularity", 0.7, 0.05))).sentences


@pytest.mark.usefixtures("without_charts")
def test_the_split_by_time_judges_where_there_are_several(report: Report) -> None:
    version = version_with(report, ("pgvae", 0.5, 0.01), ("popularity", 0.1, 0.01))
    others = [replace(row, split="strong", value=1 - row.value) for row in version.metrics]
    both = replace(version, metrics=others + version.metrics)
    assert verdict(both).tone == "good"
    text = Page(render(both, report.insight)).text("metrics")
    assert "Split: strong" in text
    assert text.index("newest events") < text.index("Split: strong")


@pytest.mark.usefixtures("without_charts")
def test_slices_stand_beside_bestsellers(report: Report) -> None:
    version = version_with(report, ("pgvae", 0.5, 0.01), ("popularity", 0.1, 0.01))
    labels = ["activity: 101 to 300 events", "activity: 2 to 100 events", "category: Toys & <b>Games</b>"]
    sliced = [replace(row, slice=label) for row in version.metrics for label in labels]
    html = render(replace(version, metrics=version.metrics + sliced), report.insight)
    text = Page(html).text("metrics")
    assert "For whom does it work?" in text
    assert text.index("2 to 100 events") < text.index("101 to 300 events")
    assert "Toys & <b>Games</b>" in text
    assert "<b>" not in html


# Versions that lack things


def test_a_version_without_metrics_says_so(database: str, connection: Connection) -> None:
    shop = Shop(user_keys=range(8))
    shop.make(connection)
    shop.create_model(connection, options={"min_events": 10, "min_users": 2, "min_items": 2})
    train(database)
    connection.execute("delete from vae.epochs")
    found = read_report(database, "shop")
    assert found.version.metrics == []
    page = Page(found.html())
    assert list(page.sections) == SECTIONS
    assert "Nobody knows yet" in page.text("verdict")
    assert "Not measured" in page.text("metrics")
    assert "Not measured" in page.text("calibration")
    assert "No passes were recorded" in page.text("learning")
    assert "Nobody knows yet" in found.card()


def test_a_shop_whose_events_are_gone_still_has_a_report(trained_database: str, trained: Connection) -> None:
    trained.execute("delete from events")
    page = Page(read_report(trained_database, "shop").html())
    assert "no event of the training window is left" in page.text("attention")
    assert "no event of the training window is left" in page.text("latent")
    assert page.text("lineage")


def test_weights_of_another_format_are_left_out(trained_database: str, trained: Connection) -> None:
    trained.execute("update vae.versions set format = 999")
    assert "have format 999" in Page(read_report(trained_database, "shop").html()).text("attention")


def test_corrupt_weights_are_left_out(trained_database: str, trained: Connection) -> None:
    trained.execute("alter table vae_private.tensors disable trigger all")
    trained.execute("update vae_private.tensors set sha256 = '\\x00' where name = 'item_embedding'")
    assert "item_embedding&#39; is corrupt" in read_report(trained_database, "shop").html()


def test_the_active_version_is_shown_by_default(trained_database: str) -> None:
    second = train(trained_database)
    assert read_report(trained_database, "shop").version.version == 1
    assert read_report(trained_database, "shop", second).version.version == second
    assert train_and_activate(trained_database) == 3
    assert read_report(trained_database, "shop").version.version == 3


def test_a_reader_gets_what_a_reader_may_see(trained_database: str, trained: Connection, role: str) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        read_report(as_role(trained_database, role), "shop")
    trained.execute(sql.SQL("grant vae_reader to {}").format(sql.Identifier(role)))
    try:
        found = read_report(as_role(trained_database, role), "shop")
        assert "permission denied" in Page(found.html()).text("attention")
        for grant in (
            "vae_scorer to {}",
            "usage on schema shop to {}",
            "select on all tables in schema public, shop to {}",
        ):
            trained.execute(sql.SQL("grant " + grant).format(sql.Identifier(role)))
        assert read_report(as_role(trained_database, role), "shop").insight.users > 0
        train(trained_database)
        assert "active versions only" in read_report(as_role(trained_database, role), "shop", 2).insight.missing
    finally:
        trained.execute(sql.SQL("drop owned by {}").format(sql.Identifier(role)))


@pytest.mark.usefixtures("without_charts")
def test_settings_are_written_as_people_write_them(report: Report) -> None:
    shortcut = {"way": "regression_100", "scale": 2.0}
    config = {**report.version.config, "shortcut": shortcut, "segments": None, "without": []}
    text = Page(render(replace(report.version, config=config), report.insight)).text("lineage")
    assert "segments – , shortcut way regression_100 scale 2.0 , temperature" in text
    assert text.endswith("without –")


# Whatever the data holds


def test_nothing_from_the_data_becomes_markup(report: Report) -> None:
    config = {**report.version.config, "event_types": [{"event_type": EVIL, "is_target": True}], EVIL: EVIL}
    evil = [replace(row, method=EVIL, split=EVIL, slice="all") for row in report.version.metrics[:1]]
    own = [replace(row, split=EVIL) for row in report.version.metrics if row.slice == "all"]
    column = {"name": EVIL, "kind": "category", "vocabulary": [EVIL], "edges": []}
    version = replace(
        report.version,
        model=EVIL,
        created_by=EVIL,
        state=EVIL,
        trainer_version=EVIL,
        config=config,
        durations={EVIL: 1.0},
        quality=[{"check_name": EVIL, "status": EVIL, "row_count": 1, "remedy": EVIL}],
        features={"users": {"columns": [column], "left_out": [{"name": EVIL, "reason": EVIL}]}, "items": None},
        metrics=[*own, *evil],
    )
    gates = tuple(replace(gate, label=EVIL) for gate in report.insight.by_event_type)
    latent = report.insight.latent
    assert latent
    insight = replace(
        report.insight, by_event_type=gates, latent=replace(latent, groups=[EVIL for _ in latent.groups], title=EVIL)
    )
    for looked in (insight, Insight(missing=EVIL)):
        html = render(version, looked)
        page = Page(html)
        assert "<script" not in html
        assert not any(tag == "script" for tag, _ in page.tags)
        assert list(page.sections) == SECTIONS
        assert EVIL in page.text("lineage")
    text = markdown(version, insight)
    assert re.search(r"(?<!\\)<script", text) is None


def test_event_names_of_the_shop_stay_text(trained_database: str, trained: Connection) -> None:
    """The names that a shop uses reach the report through the remedies of its quality gate."""
    quality = [{"check_name": "unknown_event_types", "status": "warn", "row_count": 3, "remedy": EVIL}]
    trained.execute("update vae.versions set quality = %s", [Jsonb(quality)])
    html = read_report(trained_database, "shop").html()
    assert "<script" not in html
    assert EVIL in Page(html).text("quality")


# The card and the command


def test_the_card_has_its_chapters_and_the_figures(report: Report) -> None:
    text = report.card()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == [
        "Intended use", "Data", "Metrics", "Limits", "Privacy", "Explainability", "Compute cost", "Figures",
    ]  # fmt: skip
    assert "| recall@20 |" in text
    page = Page(report.html())
    for chapter in card(report.version, report.insight):
        for point in chapter.points:
            assert " ".join(point.split()) in page.text("card")


def test_the_card_has_the_days_of_utc_whatever_zone_the_session_has(report: Report) -> None:
    evening = datetime(2024, 3, 1, 23, 30, tzinfo=UTC).astimezone(ZoneInfo("Europe/Berlin"))
    version = replace(report.version, window_end=evening, created_at=evening)
    assert " to 2024-03-01." in markdown(version, report.insight)
    assert "published 2024-03-01 by" in markdown(version, report.insight)


def test_the_command_writes_both_files(measured_dsn: str, run_cli: RunCli, tmp_path: Path) -> None:
    page, card_file = tmp_path / "a page.html", tmp_path / "card.md"
    done = run_cli("report", "shop", "-o", str(page), "--card", str(card_file), dsn=measured_dsn)
    assert done.returncode == 0, done.stderr
    assert f"wrote {page}" in done.stdout
    assert page.read_text().startswith("<!doctype html>")
    assert card_file.read_text().startswith("# Model card: shop, version 1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a page.html", "card.md"]


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("nothing",), 'model "nothing" does not exist', "there are: shop"),
        (("shop", "--version=99"), "model shop has no version 99", "hint: there are: 1"),
        (("shop", "-o", "/nowhere/page.html"), "cannot write /nowhere/page.html: No such file", "--output"),
    ],
)
def test_bad_input_is_refused(
    measured_dsn: str, run_cli: RunCli, arguments: tuple[str, ...], message: str, hint: str
) -> None:
    done = run_cli("report", *arguments, dsn=measured_dsn)
    assert done.returncode == 1
    assert f"error: {message}" in done.stderr
    assert hint in done.stderr


def test_a_model_without_a_version_has_no_report(database: str, connection: Connection) -> None:
    Shop().make(connection)
    Shop().create_model(connection)
    with pytest.raises(PgvaeError, match="model shop has no version yet"):
        read_version(connection, "shop")


def test_a_file_that_cannot_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(PgvaeError, match="cannot write"):
        write(folder, "text")
    beneath_a_file = tmp_path / "file" / "page.html"
    beneath_a_file.parent.write_text("no folder")
    with pytest.raises(PgvaeError, match="Not a directory"):
        write(beneath_a_file, "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_link_or_a_pipe_is_written_through_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("old")
    link = tmp_path / "latest.html"
    link.symlink_to("page.html")
    write(link, "new")
    assert link.is_symlink() and (tmp_path / "page.html").read_text() == "new"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as threads:
        read = threads.submit(pipe.read_text)
        write(pipe, "text")
        assert read.result(10) == "text"
    assert pipe.is_fifo()


# What it says of the shop


def points(curve: str, method: str, xy: Sequence[tuple[float, float]]) -> list[CurvePoint]:
    return [
        CurvePoint(
            curve=curve, method=method, position=place, label=EVIL, x=x, y=y, lower=0.0, upper=y + 1, weight=1.0
        )
        for place, (x, y) in enumerate(xy, start=1)
    ]  # fmt: skip


@pytest.mark.usefixtures("without_charts")
def test_the_page_shows_what_was_measured_of_the_shop_and_says_what_was_not(report: Report) -> None:
    bare = replace(report.version, points=[], metrics=[m for m in report.version.metrics if m.split != "horizon"])
    text = Page(render(bare, report.insight)).text("business")
    assert "needs sales over four times its horizon" in text
    assert "who will answer an offer is not measured" in text
    measured = [
        Metric(
            method=method, split="horizon", slice="all", metric=metric, k=0, value=value, lower=None, upper=None,
            user_count=9,
        )
        for method, metric, value in (
            ("pgvae", "demand_wape", 0.4), ("last_period", "demand_wape", 0.5), ("pgvae", "demand_coverage", 0.83),
            ("pgvae", "churn_auc", 0.81), ("rfm", "churn_auc", 0.77),
        )
    ]  # fmt: skip
    version = replace(
        bare,
        metrics=[*bare.metrics, *measured],
        points=[
            *points("demand", "pgvae", [(900.0, 1000.0), (3.0, 0.0)]),
            *points("churn_calibration", "pgvae", [(0.1, 0.12), (0.8, 0.75)]),
            *points("churn_calibration", "rfm", [(0.2, 0.3)]),
            *(replace(p, weight=50.0) for p in points("churn_bands", "pgvae", [(0.2, 0.1), (0.6, 0.7), (0.9, 1.0)])),
            *points("response_lift", "pgvae", [(0.1, 0.4), (1.0, 1.0)]),
            *points("response_lift", "popularity", [(0.1, 0.2), (1.0, 1.0)]),
        ],
    )
    html = render(version, report.insight)
    text = Page(html).text("business")
    assert "In the newest 28 days, and the two such spans before where sales reach so far," in text
    assert "off by 40.0" in text
    assert "50.0" in text
    assert "4.0 times as many as offers by chance; bestsellers 20.0" in text
    assert "Of 150 people 90 bought nothing in the newest 28 days, 85 were expected to." in text
    assert "in 81.0 % of the cases; by recency, frequency and money 77.0 %" in text
    assert "foretells it" not in text
    for upper, how in ((0.01, "about as well"), (-0.01, "better")):
        lead = replace(measured[0], method="rfm", metric="churn_log_loss_lead", value=-0.02, lower=-0.03, upper=upper)
        judged = render(replace(version, metrics=[*version.metrics, lead]), report.insight)
        assert f"recency, frequency and money foretells it {how}." in Page(judged).text("business")
    assert "Who is leaving" in text
    assert "Can the risk of leaving be planned with?" in text
    assert "Who answers an offer" not in text
    assert "<script" not in html
    closed = replace(version, metrics=[row for row in version.metrics if row.metric != "demand_wape"])
    assert "Of the items known before, none was sold" in Page(render(closed, report.insight)).text("business")
    answers = replace(
        version,
        metrics=[*version.metrics, replace(measured[0], metric="response_bias", value=0.96)],
        points=[*version.points, *points("response_calibration", "pgvae", [(0.1, 0.12), (0.3, 0.28)])],
    )
    text = Page(render(answers, report.insight)).text("business")
    assert "In the sum over all pairs, 96 purchases were expected for every 100 that came." in text
    # What an experiment says, claimed or not.
    of_trial = [
        replace(measured[0], split="experiment", method=method, metric=metric, value=value, lower=0.01, upper=0.03)
        for method, metric, value in (
            ("exposed", "uplift_response_rate", 0.05), ("withheld", "uplift_response_rate", 0.03),
            ("experiment", "uplift_average_effect", 0.02),
        )
    ]  # fmt: skip
    won = replace(
        version,
        has_uplift=True,
        metrics=[*version.metrics, *of_trial],
        points=[
            *version.points,
            *points("uplift", "pgvae", [(0.0, 0.0), (0.5, 0.015), (1.0, 0.02)]),
            *points("uplift", "response", [(0.0, 0.0), (0.5, 0.01), (1.0, 0.02)]),
        ],
    )
    text = Page(render(won, report.insight)).text("business")
    assert "So of 1,000 offers 20.0 made somebody buy (10.0 to 30.0)." in text
    assert "the likeliest buyers first" in render(won, report.insight)
    assert "No uplift" not in text
    unclaimed = replace(won, has_uplift=False, no_uplift="too few <b>buyers</b>")
    html = render(unclaimed, report.insight)
    assert "No uplift is claimed: too few <b>buyers</b>." in Page(html).text("business")
    assert "<b>buyers" not in html
    # A version that a simpler method equals does not boast.
    lead = replace(measured[0], method="rfm", metric="churn_log_loss_lead", value=0.001, lower=-0.01, upper=0.01)
    even = replace(version, metrics=[*version.metrics, lead])
    assert "foretells it about as well" in Page(render(even, report.insight)).text("business")
    equal = replace(
        version, metrics=[replace(m, value=0.4) if m.metric == "demand_wape" else m for m in version.metrics]
    )
    assert "a simpler method did as well" in Page(render(equal, report.insight)).text("business")
