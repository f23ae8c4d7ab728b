"""The documentation: what it shows is run, what it names exists, and what exists is named.

A fenced block of a tutorial is run unless a comment stands before it: `<!-- not run: reason -->`. A block that shall
fail says with which SQLSTATE: `<!-- fails: VA002 -->`. `<!-- run: PROGRAM … -->` lets a block of shell run these
programs of PostgreSQL beside pgvae. Of the output that follows a block, the columns and the numbers of rows are
compared, not the values; a line `…` says that rows are left out. Of docs/tutorial/*.sql all that does not depend on how
a training turns out is compared, too.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import psycopg
import pytest
import typer
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from typer.testing import CliRunner

from conftest import create_database, drop_database
from pgvae import resources
from pgvae.cli import app, register_commands
from pgvae.server import Server
from pgvae.simulate import SimulationConfig, simulate
from shop import Shop

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
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
# The tutorials show trainings as people run them. Here they are cut short: what they reach is measured elsewhere.
SHORT = ("--epochs=5",)
SHORT_ON_MANY_EVENTS = ("--epochs=3", "--hidden=32", "--latent=32")
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


# Reading a page


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block: its text, the comment before it, and the text block that follows it directly."""

    path: Path
    line: int
    language: str
    text: str
    mark: str
    output: str | None = None
    # Whether the output is the same on every machine.
    is_exact: bool = False

    @property
    def place(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"

    def marked(self, kind: str) -> str | None:
        """Gives what a comment `<!-- kind: … -->` before the block says."""
        return self.mark.removeprefix(f"{kind}:").strip() if self.mark.startswith(f"{kind}:") else None


_FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$"
    r"(?:\n\n```text\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)


def blocks(path: Path) -> list[Block]:
    page = path.read_text(encoding="utf-8")
    return [
        Block(
            path=path,
            line=page.count("\n", 0, found.start("text")) + 1,
            language=found["language"],
            text=found["text"],
            mark=found["mark"] or "",
            output=found["output"],
        )
        for found in _FENCE.finditer(page)
    ]


def statements(path: Path) -> list[Block]:
    """Gives the statements of a file of SQL, each with the output that stands in comments directly under it.

    The mark of each is the number of the question, `-- 4. What …`, that it answers.
    """
    script = path.read_text(encoding="utf-8")
    found, question = [], 0
    for paragraph in re.finditer(r"^\S.*(?:\n.+)*", script, re.MULTILINE):
        if paragraph[0].startswith("--"):
            heading = re.match(r"-- (\d+)\. ", paragraph[0])
            question = int(heading[1]) if heading else question
            continue
        text, _, output = paragraph[0].partition(";\n--")
        found.append(
            Block(
                path=path,
                line=script.count("\n", 0, paragraph.start()) + 1,
                language="sql",
                text=text.rstrip(";") + ";\n",
                mark=f"question: {question}",
                output=re.sub(r"^-- ?", "", f"--{output}", flags=re.MULTILINE) if output else None,
                is_exact=not re.search(r"\b(shop|vae)\.", text),
            )
        )
    return found


def squeezed(text: str) -> str:
    return " ".join(text.split())


def prose(path: Path) -> str:
    """Gives a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


# Running a page


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Runs blocks against a database, as a reader would."""

    dsn: str
    bindir: Path
    folder: Path
    training: tuple[str, ...] = SHORT
    ignored: tuple[str, ...] = ()

    def run(self, block: Block) -> str:
        """Runs a block and gives what psql printed."""
        if block.marked("not run") is not None:
            assert block.marked("not run"), f"{block.place}: says no reason for not being run"
        elif block.language == "sql":
            return self._sql(block)
        elif block.language == "sh":
            self._shell(block)
        return ""

    def answer(self, path: Path) -> dict[str, list[dict[str, str]]]:
        """Runs a file of SQL from top to bottom, and gives the rows by question and number of the answer: "4.1"."""
        found: dict[str, list[dict[str, str]]] = {}
        for block in statements(path):
            printed = self.run(block)
            if block.output is not None:
                shown, real = rows(block.output), rows(printed)
                assert [kinds(row) for row in shown] == [kinds(row) for row in real], f"{block.place}: {printed}"
                question = block.marked("question")
                number = 1 + sum(name.startswith(f"{question}.") for name in found)
                found[f"{question}.{number}"] = real
        return found

    def _sql(self, block: Block) -> str:
        fails = block.marked("fails")
        script = "\\set VERBOSITY verbose\n" + block.text if fails else block.text
        command = [self.bindir / "psql", "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", f"--dbname={self.dsn}"]
        done = subprocess.run(
            command, input=script, capture_output=True, text=True, env=self._environment(), cwd=self.folder
        )
        if fails:
            assert f"ERROR:  {fails}:" in done.stderr, f"{block.place}: {done.stderr or 'did not fail'}"
            for line in (block.output or "").splitlines():
                message = line.partition(":")[2].strip()
                assert message in done.stderr, f"{block.place}: {message!r} is not in {done.stderr!r}"
            return done.stdout
        assert done.returncode == 0, f"{block.place}: {done.stderr}"
        if block.output is not None:
            assert tables(block.output, tables(done.stdout)) == tables(done.stdout), f"{block.place}: {done.stdout}"
            if block.is_exact:
                assert squeezed(block.output) == squeezed(done.stdout), f"{block.place}: {done.stdout}"
        return done.stdout

    def _shell(self, block: Block) -> None:
        programs = (block.marked("run") or "").split()
        for line in block.text.replace("\\\n", " ").splitlines():
            arguments = shlex.split(line, comments=True)
            if not arguments or arguments[0] in self.ignored:
                continue
            if arguments[0] == "pgvae":
                command: list[str | Path] = [sys.executable, "-m", "pgvae.cli", *arguments[1:]]
                if arguments[1] == "train":
                    command += self.training
            else:
                assert arguments[0] in programs, f"{block.place}: {arguments[0]} is neither run nor marked"
                command = [self.bindir / arguments[0], *arguments[1:]]
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                env=self._environment(),
                cwd=self.folder,
            )
            assert done.returncode == 0, f"{block.place}: {line}: {done.stdout}{done.stderr}"
            if block.output and len(block.text.splitlines()) == 1:
                shown = [
                    part for part in map(squeezed, block.output.splitlines()) if part and not re.search(r"[\d…]", part)
                ]
                real = {squeezed(part) for part in (done.stdout + done.stderr).splitlines()}
                assert not shown or shown[0] in real, f"{block.place}: {shown[0]!r} is not in {sorted(real)}"

    def _environment(self) -> dict[str, str]:
        target = conninfo_to_dict(self.dsn)
        libpq = {f"PG{name.upper()}": str(target[name]) for name in ("host", "port", "user")}
        settings = {"PGVAE_DSN": self.dsn, "PGVAE_HOME": str(self.folder / "no-server"), "PGTZ": "UTC"}
        # A wide terminal, so that no message is wrapped; no colours. On busy cores one thread is faster than two.
        terminal = {"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb", "OMP_NUM_THREADS": "1"}
        return {**os.environ, **terminal, **libpq, **settings}


def tables(text: str, like: Sequence[tuple[list[str], str]] = ()) -> list[tuple[list[str], str]]:
    """Gives the column names and the row count of each table that psql printed.

    Where a page leaves out rows with a line `…`, the count is that of the table in the same place of `like`.
    """
    found = []
    for part in re.split(r"^\((?=\d+ rows?\)$)|\n\n", text + "\n\n", flags=re.MULTILINE):
        lines = part.strip("\n").splitlines()
        rule = next((number for number, line in enumerate(lines) if re.fullmatch(r"-+(\+-+)*", line)), None)
        if rule:
            names = [name.strip() for name in lines[rule - 1].split("|")]
            found.append((names, "…" if any(line.strip() == "…" for line in lines) else ""))
        elif (count := re.fullmatch(r"(\d+ rows?)\)", part.strip())) and found and not found[-1][1]:
            found[-1] = (found[-1][0], count[1])
    return [
        (names, like[number][1] if count == "…" and number < len(like) else count)
        for number, (names, count) in enumerate(found)
    ]


def rows(printed: str) -> list[dict[str, str]]:
    """Gives the rows of a table that psql printed, by column."""
    lines = printed.strip("\n").splitlines()
    rule = next(number for number, line in enumerate(lines) if re.fullmatch(r"-+(\+-+)*", line))
    names = [name.strip() for name in lines[rule - 1].split("|")]
    found = [[cell.strip() for cell in line.split("|")] for line in lines[rule + 1 :] if not line.startswith("(")]
    return [dict(zip(names, cells, strict=True)) for cells in found]


def kinds(row: dict[str, str]) -> dict[str, str]:
    """Gives what is the same however a training turns out: whether a cell is empty, a number or text; what is true."""
    return {
        name: cell if cell in ("", "t", "f") else "number" if re.fullmatch(r"-?\d[\d.e-]*", cell) else "text"
        for name, cell in row.items()
    }


@pytest.fixture(scope="module")
def folder(scratch: Path) -> Path:
    """The folder in which the commands of a page run."""
    made = scratch / "docs"
    made.mkdir()
    return made


@pytest.fixture(scope="module")
def psql_folder(server: Server) -> Path:
    if not (server.bindir / "psql").exists():
        found = shutil.which("psql")
        assert found, "psql is missing"
        return Path(found).parent
    return server.bindir


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


def test_the_tutorial_for_the_analyst_runs_on_the_real_shop(
    server: Server, folder: Path, psql_folder: Path, shared_data: Path
) -> None:
    file = "online_retail.csv.xz"
    create_database(server, "tutorial")
    runner = Runner(dsn=server.dsn("tutorial"), bindir=psql_folder, folder=folder, training=SHORT_ON_MANY_EVENTS)
    (folder / file).symlink_to(shared_data / "online-retail" / file)
    try:
        for block in blocks(ANALYST):
            runner.run(block)
        answers = runner.answer(DOCS / "tutorial" / "online-retail.sql")
    finally:
        drop_database(server, "tutorial")
    # How well the answers fit the questions, not how well a training of three epochs ranks.
    assert {name.partition(".")[0] for name in answers} == {str(number) for number in range(1, 11)}
    assert all(row["because"].startswith("because you bought") for row in answers["1.1"])
    assert column(answers["1.2"], "share_of_the_score") == sorted(column(answers["1.2"], "share_of_the_score"))[::-1]
    assert all("CHRISTMAS" in row["description"] for row in answers["2.3"])
    assert all(float(row["low"]) <= float(row["units"]) <= float(row["high"]) for row in answers["3.1"])
    other_teacups = {"PINK REGENCY TEACUP AND SAUCER", "ROSES REGENCY TEACUP AND SAUCER"}
    assert {row["description"] for row in answers["4.1"][:2]} == other_teacups
    assert {row["description"] for row in answers["5.1"]} > other_teacups
    assert {row["country"] for row in answers["6.2"]} == {"Germany", "France"}
    probabilities = column(answers["7.1"], "response_probability")
    assert 1 >= probabilities[0] > probabilities[-1] > 0
    assert probabilities == sorted(probabilities)[::-1]
    assert 4 * probabilities[-1] < column(answers["7.2"], "expected_buyers")[0] < 500 * probabilities[0]
    assert [row["risk_band"] for row in answers["8.1"]] == ["high", "medium", "low"]
    assert any("LUNCH" in row["description"] for row in answers["9.2"])
    assert answers["10.1"][0]["method"] == "pgvae"
    assert answers["10.1"][-1]["method"] == "popularity"


def column(answer: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in answer]


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
        known = {option for parameter in COMMANDS[name].params for option in parameter.opts} | {"--help"}
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
