"""The documentation: what it shows is run, what it names exists, and what exists is named."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import psycopg
import pytest
import typer
from psycopg import sql
from typer.testing import CliRunner

from conftest import create_database, drop_database
from pages import DOCS, ROOT, Runner, blocks, column, prose, squeezed
from pgvae import resources
from pgvae.cli import app, register_commands
from pgvae.server import Server
from pgvae.simulate import SimulationConfig, simulate
from shop import Shop

ANALYST, DBA, REFERENCE, FEATURES, LIFECYCLE, FILTERS, SEGMENTS, ERRORS = (
    DOCS / f"{name}.md"
    for name in (
        *("tutorial-analyst", "tutorial-dba", "sql-reference", "features", "lifecycle", "filters", "segments"),
        "errors",
    )
)
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
    if not path.name.startswith(".")
)
SETTINGS = {
    "vae.device",
    "vae.max_memory",
    "vae.max_threads",
    "vae.gpu_memory",
    "vae.gpu_precision",
    "vae.gpu_costs",
    "vae.log_retention",
    "vae.stale_after",
}
ROLES = ("shop_dashboard", "shop_app", "shop_refresh", "shop_training")


@pytest.fixture(scope="module")
def practice(server: Server, folder: Path, psql_folder: Path) -> Iterator[Runner]:
    """The database in which the tutorial for the DBA was followed from an empty one to its end."""
    create_database(server, "shop")
    runner = Runner(dsn=server.dsn("shop"), bindir=psql_folder, folder=folder)
    try:
        for block in blocks(DBA):
            runner.run(block)
        yield runner
    finally:
        with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
            for name in ("shop_copy", "shop"):
                admin.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))
            for role in ROLES:
                admin.execute(sql.SQL("drop role if exists {}").format(sql.Identifier(role)))


def test_the_tutorial_for_the_dba_runs(practice: Runner) -> None:
    with psycopg.connect(practice.dsn) as connection:
        states = connection.execute("select state from vae.refreshes order by refresh_id").fetchall()
    assert states[0] == ("succeeded",)
    assert states[-1] == ("succeeded",)


def test_a_restored_database_gives_the_same_scores(server: Server, practice: Runner) -> None:
    live = "select r.* from web.users u cross join lateral shop.recommend(u.user_id, k => 3) r where u.user_id <= 20"
    with psycopg.connect(practice.dsn) as original, psycopg.connect(server.dsn("shop_copy")) as copy:
        rows = original.execute(live).fetchall()
        assert len(rows) == 60
        assert copy.execute(live).fetchall() == rows
        count = "select count(*), count(distinct user_id) from shop.recommendations"
        assert copy.execute(count).fetchall() == original.execute(count).fetchall()


def test_the_examples_of_the_reference_run(practice: Runner) -> None:
    for block in blocks(REFERENCE):
        practice.run(block)


def test_the_questions_about_the_simulated_shop_are_answered(practice: Runner) -> None:
    answers = practice.answer(DOCS / "tutorial" / "simulated-shop.sql")
    assert {name.partition(".")[0] for name in answers} == {str(number) for number in range(1, 11)}
    assert [row["items"] for row in answers["2.1"]] == ["recommended", "all others"]
    assert column(answers["2.1"], "affinity")[0] > 0.3
    assert len({row["category"] for row in answers["3.1"]}) == 4
    assert answers["4.2"] == [{"dear": "0", "longest_list": "20"}]
    # By chance it would be 11.
    assert column(answers["5.1"], "found_among_twenty")[0] > 30
    assert [row["risk_band"] for row in answers["6.1"]] == ["high", "medium", "low"]
    assert column(answers["6.1"], "said") == pytest.approx(column(answers["6.1"], "true_probability"), abs=0.15)
    assert max(column(answers["7.1"], "of_one_true_interest")) > 2 * column(answers["7.2"], "of_one_true_interest")[0]
    assert all(float(row["low"]) <= float(row["units"]) <= float(row["high"]) for row in answers["8.1"])
    assert len({row["country"] for row in answers["9.1"]}) == 1


@pytest.mark.parametrize("page", [FILTERS, SEGMENTS, LIFECYCLE], ids=lambda page: page.stem)
def test_a_page_about_a_subject_runs(practice: Runner, page: Path) -> None:
    for block in blocks(page):
        practice.run(block)


def test_the_readme_runs(server: Server, template: str, folder: Path, psql_folder: Path) -> None:
    """On a table of the names that it uses. What it shows first is what there is at the end."""
    create_database(server, "readme", template)
    runner = Runner(dsn=server.dsn("readme"), bindir=psql_folder, folder=folder, ignored=("make", "pip", "export"))
    try:
        simulate(runner.dsn, SimulationConfig(schema="web", users=2000, until=date(2025, 1, 1)))
        with psycopg.connect(runner.dsn) as connection:
            connection.execute(
                "create table public.events as select user_id as customer_id, item_id as stock_code,"
                " event_type, occurred_at as at from web.events"
            )
        first, *others = (block for block in blocks(ROOT / "README.md") if block.language in ("sql", "sh"))
        for block in (*others, first):
            runner.run(block)
    finally:
        drop_database(server, "readme")


def test_the_page_of_features_runs(server: Server, template: str, folder: Path, psql_folder: Path) -> None:
    create_database(server, "features", template)
    runner = Runner(dsn=server.dsn("features"), bindir=psql_folder, folder=folder)
    try:
        simulate(runner.dsn, SimulationConfig(schema="web", users=300, items=60, until=date(2025, 1, 1)))
        for block in blocks(FEATURES):
            runner.run(block)
    finally:
        drop_database(server, "features")


@pytest.mark.parametrize("page", ["refresh", "monitoring"])
def test_a_page_about_the_tiny_shop_runs(
    server: Server, trained_template: str, folder: Path, psql_folder: Path, page: str
) -> None:
    create_database(server, page, trained_template)
    runner = Runner(dsn=server.dsn(page), bindir=psql_folder, folder=folder)
    try:
        for block in blocks(DOCS / f"{page}.md"):
            runner.run(block)
    finally:
        drop_database(server, page)
        with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
            admin.execute("drop role if exists shop_monitor")


def test_a_copy_by_the_newest_scored_at_misses_no_row(
    trained_database: str, folder: Path, psql_folder: Path, trained: psycopg.Connection
) -> None:
    runner = Runner(dsn=trained_database, bindir=psql_folder, folder=folder)
    make, copy = (block for block in blocks(DOCS / "refresh.md") if "recommendations_copy" in block.text)
    columns = "user_id, rank, item_id, score, model_version, scored_at"
    runner.run(make)
    runner.run(copy)
    for user in trained.execute("select distinct user_id from events order by 1 limit 2").fetchall():
        trained.execute("insert into events select %s, item_id, 'purchase', now() from events limit 1", user)
        trained.execute("call vae.refresh('shop', views => array['recommendations'])")
        runner.run(copy)
        copied = trained.execute(f"select {columns} from recommendations_copy order by 1, 2").fetchall()
        assert copied == trained.execute(f"select {columns} from shop.recommendations order by 1, 2").fetchall()


def test_every_block_that_is_not_run_says_why() -> None:
    silent = [
        block.place
        for path in (ANALYST, DBA, REFERENCE, FEATURES, LIFECYCLE, FILTERS, SEGMENTS)
        for block in blocks(path)
        if block.language in ("sql", "sh") and block.mark and not re.match(r"(not run|fails|run): \S", block.mark)
    ]
    assert silent == []


# The reference and the catalogue


@dataclass(frozen=True, kw_only=True)
class Documented:
    """An object of the catalogue and what the reference says of it."""

    name: str
    text: str


_ROUTINES = """
select n.nspname || '.' || p.proname, p.prokind = 'p', p.proname, pg_get_function_arguments(p.oid),
    pg_get_function_result(p.oid), obj_description(p.oid, 'pg_proc'), (
        select string_agg(r.rolname, ', ' order by r.rolname)
        from aclexplode(p.proacl) a join pg_roles r on r.oid = a.grantee where r.rolname ~ '^vae_')
from pg_proc p
join pg_namespace n on n.oid = p.pronamespace
where n.nspname in ('vae', 'shop')
-- Of functions of one name the last one is described.
order by 1, 4
"""
_RELATIONS = """
select n.nspname || '.' || c.relname, obj_description(c.oid, 'pg_class'), (
        select string_agg(r.rolname, ', ' order by r.rolname)
        from aclexplode(c.relacl) a join pg_roles r on r.oid = a.grantee
        where r.rolname ~ '^vae_' and a.privilege_type = 'SELECT'), (
        select array_agg(array[a.attname::text, format_type(a.atttypid, a.atttypmod), col_description(c.oid, a.attnum)]
            order by a.attnum)
        from pg_attribute a where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped)
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
where c.relkind in ('r', 'v') and (n.nspname = 'vae' and has_table_privilege('vae_reader', c.oid, 'select')
    or n.nspname = 'shop' and c.relname in (
        select o.object from vae.models m cross join vae_private.model_objects(m.model_id) o where o.is_public))
"""


@pytest.fixture
def catalogue(connection: psycopg.Connection) -> dict[str, str]:
    """What the reference must say of each public object, by its name."""
    Shop().make(connection)
    connection.execute("create table users (user_id bigint)")
    connection.execute("alter table events add exposed boolean")
    Shop().create_model(connection, "shop", users="users", exposure_column="exposed")
    described = {}
    for name, is_procedure, short, arguments, result, comment, roles in connection.execute(_ROUTINES).fetchall():
        described[name] = (
            f"```text\n{signature(name, is_procedure, arguments, result)}\n```\n\n{comment}\n\nRole: `{roles}`.\n"
        )
        assert short
    for name, comment, roles, columns in connection.execute(_RELATIONS).fetchall():
        rows = "".join(f"| `{column}` | `{kind}` | {escaped(meaning)} |\n" for column, kind, meaning in columns)
        # A prediction view may have the name of the function that answers for one subject.
        before = f"{described[name]}\n" if name in described else ""
        described[name] = f"{before}{comment}\n\nRole: `{roles}`.\n\n| Column | Type | Meaning |\n|---|---|---|\n{rows}"
    return described


def signature(name: str, is_procedure: bool, arguments: str, result: str | None) -> str:
    """Gives how a routine is declared, as people write SQL: lower case, no casts of nulls."""
    plain = (
        re.sub(r"::[a-z]+( [a-z]+)*(\[\])?", "", arguments)
        .replace("DEFAULT NULL", "default null")
        .replace("DEFAULT", "default")
    )
    if is_procedure:
        plain = re.sub(r"\bIN ", "", plain)
    opening = f"call {name}(" if is_procedure else f"{name}("
    if len(opening + plain) > 100:
        plain = "\n    " + plain.replace(", ", ",\n    ") + "\n"
    returns = "" if is_procedure else "\nreturns " + (result or "").replace("TABLE(", "table (")
    return f"{opening}{plain}){returns}"


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


_GENERATED = re.compile(r"<!-- generated: (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def test_the_reference_describes_every_public_object_as_it_is(
    catalogue: dict[str, str], request: pytest.FixtureRequest
) -> None:
    page = REFERENCE.read_text(encoding="utf-8")
    assert {name for name, _ in _GENERATED.findall(page)} == set(catalogue)
    for name in catalogue:
        assert re.search(rf"^### {re.escape(name)}$", page, re.MULTILINE), f"{name} has no heading"
    current = _GENERATED.sub(lambda found: f"<!-- generated: {found[1]} -->\n{catalogue[found[1]]}<!-- end -->", page)
    if request.config.getoption("--update-golden"):
        REFERENCE.write_text(current, encoding="utf-8")
        page = current
    outdated = [name for name, text in _GENERATED.findall(page) if squeezed(text) != squeezed(catalogue[name])]
    assert outdated == [], "run: pytest tests/test_docs.py --update-golden"


def test_every_option_of_a_model_and_every_check_is_in_the_reference(connection: psycopg.Connection) -> None:
    Shop().make(connection)
    connection.execute("alter table events add exposed boolean")
    Shop().create_model(connection, "shop", exposure_column="exposed")
    names = connection.execute(
        "select jsonb_object_keys(vae_private.default_options())"
        " union select check_name from vae.check_events('shop') union select event_type from vae.event_types"
    ).fetchall()
    page = REFERENCE.read_text(encoding="utf-8")
    assert [name for (name,) in names if f"`{name}`" not in page] == []


def test_every_objects_of_the_documentation_exists(catalogue: dict[str, str]) -> None:
    known = {name for name in catalogue if name.startswith("vae.")} | SETTINGS | {"vae.alembic_version"}
    columns = {
        f"{name}.{column}" for name, text in catalogue.items() for column in re.findall(r"^\| `(\w+)`", text, re.M)
    }
    for path in PAGES:
        if path.parent.name == "decisions" or path.name == "CHANGELOG.md":
            continue
        named = set(re.findall(r"\bvae\.[a-z_]+(?:\.[a-z_]+)?\b", path.read_text(encoding="utf-8")))
        assert named <= known | columns, f"{path.name} names {named - known - columns}"


def test_every_sqlstate_of_pgvae_is_explained() -> None:
    sources = [*resources.sql_files(), *(ROOT / "plpython").rglob("*.py"), *(ROOT / "trainer").rglob("*.py")]
    raised = {state for path in sources for state in re.findall(r"\bVA\d{3}\b", path.read_text(encoding="utf-8"))}
    explained = set(re.findall(r"^## (VA\d{3})$", ERRORS.read_text(encoding="utf-8"), re.MULTILINE))
    assert raised == explained


def test_every_condition_that_the_sql_raises_is_explained() -> None:
    raised = {
        name
        for path in resources.sql_files()
        for name in re.findall(r"errcode = '([a-z_]+)'", path.read_text(encoding="utf-8"))
    }
    page = ERRORS.read_text(encoding="utf-8")
    assert raised
    assert sorted(name for name in raised if name not in page) == []


# Figures

_SPLITS = {
    "Amazon Electronics": "amazon-electronics",
    "Amazon Beauty": "amazon-beauty",
    "Online Retail": "online-retail",
    "Tmall": "tmall-events",
    "gowalla": "gowalla",
    "Amazon-CDs": "amazoncds",
    "MovieLens 1M": "ml-1m",
    "LastFM": "lastfm",
    "CiteULike": "citeulike",
    "MovieLens 100k": "ml-100k",
}


_METHODS = {
    "ease": "EASE",
    "graph_filter": "graph filter",
    "item_knn": "item kNN",
    "sequential_rules": "sequential rules",
}


def test_the_figures_of_accuracy_are_those_of_the_results() -> None:
    """Of pgvae, of the best other run, and of its lead, in README.md and docs/accuracy.md."""
    seen = set()
    for page in (ROOT / "README.md", DOCS / "accuracy.md"):
        for part in re.findall(r"<!-- accuracy on .*?(?=<!-- )", page.read_text(encoding="utf-8"), re.DOTALL):
            for row in re.findall(r"^\| [A-Zg].*$", part, re.MULTILINE):
                name, own, other, _, *lead = (cell.strip() for cell in row.strip("|").split("|"))
                split = next(file for start, file in _SPLITS.items() if name.startswith(start))
                path = ROOT / "benchmarks" / "results" / f"accuracy-{split}.json"
                result = json.loads(path.read_text(encoding="utf-8"))
                length = 10 if split == "amazon-beauty" else 20
                first = "hit_rate" if split == "amazon-beauty" else "recall"
                measured = {
                    (row["method"], row["metric"]): row["value"]
                    for row in result["rows"]
                    if row["k"] == length and row["source"] == "measured"
                }
                best = max(
                    (m for m, metric in measured if metric == "ndcg" and m != "pgvae"),
                    key=lambda m: measured[m, "ndcg"],
                )
                assert other.replace("*", "").startswith(_METHODS[best]), row
                for method, cell in (("pgvae", own), (best, other)):
                    shown = [float(number) for number in re.findall(r"\.\d{3}", cell)]
                    assert shown == [
                        pytest.approx(measured[method, metric], abs=0.00051) for metric in (first, "ndcg")
                    ], row
                if lead:
                    found = next(lead for lead in result["ndcg_leads"] if lead["method"] == best)
                    shown = [float(number) for number in re.findall(r"\.\d{4}", lead[0])]
                    assert shown == [pytest.approx(found[end], abs=0.000051) for end in ("value", "lower", "upper")], (
                        row
                    )
                seen.add(split)
    assert seen == set(_SPLITS.values())


# The command line


def commands() -> Iterator[tuple[str, Any]]:
    """Gives each command with its full name: "pgvae load events"."""
    register_commands()

    def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        yield name, command
        for short, child in getattr(command, "commands", {}).items():
            yield from walk(f"{name} {short}", child)

    yield from walk("pgvae", typer.main.get_command(app))


COMMANDS = dict(commands())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    command = COMMANDS[name]
    done = CliRunner().invoke(app, [*name.split()[1:], "--help"])
    assert done.exit_code == 0, done.output
    assert command.help
    silent = [parameter.name for parameter in command.params if not getattr(parameter, "help", None)]
    assert silent == []


def test_help_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    shown = CliRunner().invoke(app, ["train", "--help"]).output
    text = [line.strip() for line in shown.splitlines() if re.match(r" \w", line)]
    # A line ends where the next word would not fit, or with its paragraph.
    short = [line for line, after in itertools.pairwise(text) if len(f"{line} {after.split()[0]}") <= 78]
    assert [line for line in short if not line.endswith((".", "{model}", "MODEL"))] == []
    assert re.search(r"--activate +Activate the version", shown)


def test_help_lists_every_command_from_the_first_day_on() -> None:
    from pgvae.cli import _ORDER

    listed = re.findall(r"^\W*(\w+)  ", CliRunner().invoke(app, ["--help"]).output, re.MULTILINE)
    assert [name for name in listed if name in _ORDER] == list(_ORDER)
    assert set(typer.main.get_command(app).commands) == set(_ORDER)  # type: ignore[attr-defined]


def test_every_command_is_in_the_documentation() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md"))
    leaves = [name for name, command in COMMANDS.items() if not getattr(command, "commands", None)]
    assert [name for name in leaves if f"`{name}" not in text and f"\n{name}" not in text] == []
    main = (DOCS / "README.md").read_text(encoding="utf-8")
    assert [name for name in leaves if f"`{name}`" not in main] == []


def test_every_command_line_of_the_documentation_is_understood() -> None:
    lines = []
    for path in PAGES:
        lines += re.findall(r"`(pgvae [^`\n]+)`", prose(path))
        for block in blocks(path):
            if block.language == "sh":
                lines += re.findall(r"^pgvae .*", block.text.replace("\\\n", " "), re.MULTILINE)
    assert len(lines) > 20
    for line in lines:
        words = re.split(r"\s[#|>]|…", line)[0].split()
        name = next((" ".join(words[:count]) for count in (3, 2, 1) if " ".join(words[:count]) in COMMANDS), "")
        assert name != "pgvae" or len(words) == 1 or words[1].startswith("-"), f"{line!r} is no command"
        parameters = COMMANDS[name].params
        known = {option for each in parameters for option in (*each.opts, *each.secondary_opts)} | {"--help"}
        options = {word.split("=")[0] for word in words[len(name.split()) :] if re.match(r"--?[a-z]", word)}
        assert name == "pgvae psql" or options <= known, f"{line!r} has unknown options {options - known}"


# All pages


def anchors(path: Path) -> set[str]:
    """Gives the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "") for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def test_links_within_the_documentation_lead_somewhere() -> None:
    broken = []
    for path in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            found = (path.parent / file).resolve() if file else path
            if not found.exists() or (anchor and found.suffix == ".md" and anchor not in anchors(found)):
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert broken == []


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    pages = [path.relative_to(DOCS) for path in DOCS.glob("*.md") if path.name != "README.md"]
    assert pages
    assert [str(page) for page in pages if f"({page})" not in index] == []


def test_no_page_names_a_folder_of_one_machine() -> None:
    private = re.compile(r"(?<![\w.])/(root|home|work|Users|tmp|mnt|private)/\S*")
    assert [f"{path.name}: {found[0]}" for path in PAGES for found in private.finditer(path.read_text("utf-8"))] == []
