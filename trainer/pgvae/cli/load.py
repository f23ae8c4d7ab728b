"""`pgvae load events`, `users` and `items`: from files into tables."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, cast, get_args
from zoneinfo import ZoneInfo

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from pgvae.cli import CommandGroup, Dsn, app
from pgvae.console import err, out
from pgvae.errors import PgvaeError

if TYPE_CHECKING:
    from pgvae.load import LoadSummary, Plan, Source

group = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    help="Load CSV or Parquet files into tables. Not needed where the events are in PostgreSQL already.",
)
app.add_typer(group, name="load")

_TIMES = ("timestamptz", "timestamp", "date")

Files = Annotated[list[str], typer.Argument(help="CSV or Parquet, plain or gz, xz, zst, bz2; - is standard input.")]
TableName = Annotated[str | None, typer.Option("--table", help="Table to load into.", show_default=False)]
Map = Annotated[
    list[str] | None,
    typer.Option("--map", help="COLUMN=HEADER, as in user_id=CustomerID; repeatable.", show_default=False),
]
Types = Annotated[
    list[str] | None, typer.Option("--type", help="COLUMN=TYPE, as in item_id=text; repeatable.", show_default=False)
]
Nulls = Annotated[
    list[str] | None, typer.Option("--null", help="A text that means null, as in NA; repeatable.", show_default=False)
]
Delimiter = Annotated[
    str | None, typer.Option(help="Delimiter of CSV; by default told from the header.", show_default=False)
]
Encoding = Annotated[str, typer.Option(help="Encoding of CSV.")]
Order = Annotated[
    str | None, typer.Option("--date-order", help="dmy or mdy, for dates such as 01/12/2010.", show_default=False)
]
Timezone = Annotated[str, typer.Option(help="Zone of times that have none.")]
Append = Annotated[bool, typer.Option("--append", help="Add to a table that exists.")]
Replace = Annotated[bool, typer.Option("--replace", help="Exchange the content of a table that exists.")]
MaxRejects = Annotated[float, typer.Option(help="Share of rows that may be rejected before the load is refused.")]
NoIndex = Annotated[
    bool, typer.Option("--no-index", help="Make no indexes on (user_id, occurred_at) and (item_id, occurred_at).")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and stop.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def _register(kind: str, description: str) -> None:
    """Adds a command for one kind of table; they differ in their standard columns alone."""

    def command(
        files: Files,
        dsn: Dsn = None,
        table: TableName = None,
        mapping: Map = None,
        types: Types = None,
        nulls: Nulls = None,
        delimiter: Delimiter = None,
        encoding: Encoding = "utf-8",
        date_order: Order = None,
        timezone: Timezone = "UTC",
        append: Append = False,
        replace: Replace = False,
        max_rejects: MaxRejects = 0.1,
        no_index: NoIndex = False,
        dry_run: DryRun = False,
        yes: Yes = False,
    ) -> None:
        from pgvae.load import KINDS, LoadOptions, load, make_plan, open_source
        from pgvae.load.types import DateOrder, Dialect

        if append and replace:
            raise PgvaeError("--append and --replace exclude each other", hint="give one of them")
        if date_order not in (None, *get_args(DateOrder)):
            raise PgvaeError(f"date order {date_order!r} is unknown", hint="give dmy or mdy")
        if not 0 <= max_rejects <= 1:
            raise PgvaeError(f"max-rejects is {max_rejects}", hint="give a share between 0 and 1")
        schema, name = _table(table or f"public.{kind}")
        options = LoadOptions(
            mapping=_pairs("--map", mapping),
            types=_pairs("--type", types),
            dialect=Dialect(
                nulls=frozenset({"", *(nulls or ())}),
                date_order=cast("DateOrder | None", date_order),
                timezone=_zone(timezone),
            ),
        )

        with open_source(files[0], delimiter=delimiter, encoding=encoding) as first:
            plan = make_plan(KINDS[kind], first, options)
            _show_plan(plan, f"{schema}.{name}")
            if dry_run:
                return
            if not yes:
                _confirm(f"load into {schema}.{name}?", stdin_taken="-" in files)

            def sources() -> Iterator[Source]:
                yield first
                for file in files[1:]:
                    with open_source(file, delimiter=delimiter, encoding=encoding) as further:
                        yield further

            with _progress() as on_progress:
                summary = load(
                    dsn,
                    plan,
                    sources(),
                    schema=schema,
                    table=name,
                    mode="append" if append else "replace" if replace else "create",
                    max_rejects=max_rejects,
                    index=not no_index,
                    on_progress=on_progress,
                )
        _show_summary(plan, summary, schema, name)

    command.__doc__ = description
    group.command(kind)(command)


_register(
    "events",
    """Load what users did: a row per event with a user, an item and a time.

    Shows which column it takes for what, and the type of each, before it acts. Columns with usual names (CustomerID,
    StockCode, InvoiceDate, user, sku, timestamp …) are known; name others with --map. All columns are loaded.
    One transaction: whatever happens, the table is as before or complete. Rows that cannot be read are kept in
    TABLE_rejects with their line and the reason.

    For example: pgvae load events online_retail.csv.xz --table public.events
    """,
)
_register("users", "Load the shop's users: a row per user, with what is known of them. Options as of load events.")
_register("items", "Load the shop's items: a row per item, with category, price, text. Options as of load events.")


def _table(text: str) -> tuple[str, str]:
    """Gives schema and name of a table; each is taken as it stands, in the double quotes of SQL or without."""
    part = r'"(?:[^"]|"")+"|[^".]+'
    found = re.fullmatch(rf"(?:({part})\.)?({part})", text)
    names = [_unquoted(name) for name in found.groups("public")] if found else []
    if not names or not all(len(name.encode()) <= 63 and "\0" not in name for name in names):
        raise PgvaeError(f"table name {text!r} is no name", hint="give it as in public.events")
    return names[0], names[1]


def _unquoted(name: str) -> str:
    return name[1:-1].replace('""', '"') if name.startswith('"') else name


def _pairs(option: str, texts: list[str] | None) -> dict[str, str]:
    pairs = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise PgvaeError(f"{option} is {text!r}", hint=f"give it as in {option} item_id=…")
        pairs[name] = value
    return pairs


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        raise PgvaeError(f"time zone {name!r} is unknown", hint="give one such as UTC or Europe/Berlin") from error


def _confirm(question: str, *, stdin_taken: bool) -> None:
    if stdin_taken or not sys.stdin.isatty():
        raise PgvaeError(
            "there is nobody to ask whether this is right", hint="say so with --yes, or look with --dry-run"
        )
    typer.confirm(question, abort=True, default=True)


def _show_plan(plan: Plan, table: str) -> None:
    shown = Table(
        box=SIMPLE_HEAD, title=f"into {escape(table)}, judged by {plan.sample_rows} rows", title_justify="left"
    )
    for header in ("in the file", "column", "type", "empty", "examples", ""):
        shown.add_column(header, overflow="fold")
    for column in plan.columns:
        examples = ", ".join(example if len(example) <= 24 else example[:23] + "…" for example in column.examples)
        shown.add_row(
            escape(column.source),
            f"[bold]{escape(column.name)}[/]" if column.standard else escape(column.name),
            column.sql_type,
            f"{column.nulls / max(plan.sample_rows, 1):.1%}" if column.nulls else "",
            escape(re.sub(r"[^ -~\u00a0-\uffff]", "�", examples)),
            column.remark or "",
        )
    out.print(shown)


@contextmanager
def _progress() -> Iterator[Callable[[Source, int], None]]:
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TextColumn("{task.fields[rows]} rows"),
        TimeElapsedColumn(),
        console=err,
        disable=not err.is_terminal,
    )
    tasks: dict[str, object] = {}
    with bar:

        def show(source: Source, rows: int) -> None:
            if source.name not in tasks:
                label = "standard input" if source.name == "-" else source.name
                tasks[source.name] = bar.add_task(escape(label), total=source.size, rows="0")
            bar.update(tasks[source.name], completed=source.read_bytes(), rows=f"{rows:,}")  # type: ignore[arg-type]

        yield show


def _show_summary(plan: Plan, summary: LoadSummary, schema: str, table: str) -> None:
    rate = summary.rows / max(summary.seconds, 1e-9)
    out.print(
        f"{summary.rows:,} rows loaded into {schema}.{table} in {summary.seconds:.1f} s ({rate:,.0f} rows/s),"
        f" {summary.rejected:,} rejected",
        highlight=False,
        markup=False,
    )
    if summary.rejected:
        for reason, count in summary.reasons.most_common(10):
            out.print(f"  {count:,} × {reason}", highlight=False, markup=False)
        out.print(f"  they are kept in {schema}.{table[:55]}_rejects", highlight=False, markup=False)
    if plan.kind.name == "events":
        name = ".".join(_quoted(part) for part in (schema, table)).replace("'", "''")
        call = f"vae.create_model('shop', events => '{name}')"
        if any(one.name == "occurred_at" and one.sql_type not in _TIMES for one in plan.columns):
            out.print(
                f"next, in psql: create a view of {schema}.{table} whose occurred_at holds times; a model needs them",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
            return
        out.print("next, in psql: select * from", call, highlight=False, markup=False, soft_wrap=True)


def _quoted(name: str) -> str:
    """Gives a name as the type regclass reads it."""
    return name if re.fullmatch("[a-z_][a-z0-9_]*", name) else '"' + name.replace('"', '""') + '"'
