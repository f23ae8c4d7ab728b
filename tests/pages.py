"""Pages of the documentation as readers meet them: their blocks, run against a database, and what came out.

A fenced block of a tutorial is run unless a comment stands before it: `<!-- not run: reason -->`. A block that shall
fail says with which SQLSTATE: `<!-- fails: VA002 -->`. `<!-- run: PROGRAM … -->` lets a block of shell run these
programs of PostgreSQL beside pgvae. Of the output that follows a block, the columns and the numbers of rows are
compared, not the values; a line `…` says that rows are left out. Of docs/tutorial/*.sql all that does not depend on how
a training turns out is compared, too.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# The tutorials show trainings as people run them. Here they are cut short: what they reach is measured elsewhere.
SHORT = ("--epochs=3", "--future-share=0.5", "--hidden=64", "--latent=64")


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
        # A wide terminal, so that no message is wrapped; no colours.
        terminal = {"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}
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


def column(answer: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in answer]
