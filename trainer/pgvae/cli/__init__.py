"""The `pgvae` command. Each module of this package holds one subject and registers its commands on `app`."""

from __future__ import annotations

import io
import re
import sys
from importlib import import_module
from typing import Annotated, Any, NoReturn

import psycopg
import typer
from rich.markup import escape
from typer.core import TyperGroup

from pgvae import __version__
from pgvae.console import err, out
from pgvae.errors import PgvaeError

# As they are needed: a first day, then the daily work.
_ORDER = (
    *("demo", "up", "down", "psql", "status", "doctor", "install", "uninstall", "load", "simulate"),
    *("train", "evaluate", "tune", "report", "refresh", "retrain", "verify", "export", "import", "prune"),
)


class CommandGroup(TyperGroup):
    """Shows help that fits a terminal of any width, and no type beside an option that takes no value."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            # Rich would keep the line breaks of the docstring.
            command.help = re.sub(r"(?<=\S)\n(?=\S)", " ", command.help or "")
            _without_bool(command.get_params(ctx))
        return command

    def get_params(self, ctx: Any) -> list[Any]:
        """Gives the options of the group itself."""
        return _without_bool(super().get_params(ctx))


def _without_bool(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if getattr(parameter, "is_bool_flag", False):
            parameter.metavar = ""
    return parameters


class _Commands(CommandGroup):
    """Lists the commands in the order of _ORDER; a failure that the user can mend ends in a message and a hint."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(
            super().list_commands(ctx), key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER)
        )

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that the context names; exit status 1 after an error, 130 after an interrupt."""
        try:
            return super().invoke(ctx)
        except PgvaeError as error:
            _fail(error.message, error.hint)
        except psycopg.Error as error:
            _fail(*_explain(error, ctx.invoked_subcommand))
        except KeyboardInterrupt:
            err.print("interrupted; nothing half-done was kept")
            raise typer.Exit(130) from None


def _show_version(is_asked: bool) -> None:
    if is_asked:
        out.print(f"pgvae {__version__}", highlight=False)
        raise typer.Exit


app = typer.Typer(
    name="pgvae",
    cls=_Commands,
    help="Train a behaviour model on the shop events in PostgreSQL and score users from plain SQL.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show pgvae's version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None: ...


Dsn = Annotated[
    str | None,
    typer.Option(
        "--dsn", envvar="PGVAE_DSN", help="Connection string; without it, the embedded server.", show_default=False
    ),
]

# Exit status: nothing broke, and what was asked for was not done. Schedulers tell it from an error, which is 1.
NOT_DONE = 3

# The rights without which a command is refused.
_USAGE = "usage on the model's schema"
_READING = f"{_USAGE}, select on the shop's tables, and temporary on the database"
_NEEDED = {
    "load": "to own the table, or with --append the right to insert into it",
    "report": f"the role vae_reader and {_USAGE}",
    "refresh": f"the role vae_operator and {_USAGE}",
    "verify": f"the role vae_operator and {_USAGE}",
    "export": f"the role vae_operator and {_USAGE}",
    "evaluate": f"the role vae_trainer, {_READING}",
    "tune": f"the role vae_trainer, {_READING}",
    "train": f"the role vae_trainer, {_READING}",
    "retrain": f"the role vae_trainer, {_READING}",
    "import": f"the role vae_trainer and {_USAGE}",
    "prune": "the role vae_trainer, and the rights of the model's owner",
}

# One subject each.
_MODULES = (
    "database",
    "demo",
    "evaluate",
    "load",
    "refresh",
    "report",
    "retrain",
    "server",
    "simulate",
    "train",
    "tune",
    "versions",
)


def register_commands() -> None:
    """Imports the modules of the commands: each one registers itself on `app`."""
    for name in _MODULES:
        import_module(f"pgvae.cli.{name}")


def main() -> None:
    """Runs the command line."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A terminal without UTF-8 shows ? for what it lacks: it is no reason to fail, least of all behind a training.
        sys.stdout.reconfigure(errors="replace")
    register_commands()
    app()


def _explain(error: psycopg.Error, command: str) -> tuple[str, str | None]:
    """Gives what to say about an error of the database within a command, and a hint where there is one."""
    if error.sqlstate is None or isinstance(error, psycopg.errors.AdminShutdown | psycopg.errors.CrashShutdown):
        reason = (error.diag.message_primary or str(error)).splitlines()[0]
        return (
            f"the connection to the server was lost: {reason}",
            "nothing half-done was kept; once the server takes connections, run the command again",
        )
    message = error.diag.message_primary or str(error)
    detail = f" ({error.diag.message_detail})" if error.diag.message_detail else ""
    hint = error.diag.message_hint or _remedy(error, message, command)
    return f"{message}{detail} [SQLSTATE {error.sqlstate}]", hint


def _remedy(error: psycopg.Error, message: str, command: str) -> str | None:
    """Gives what to do about an error of PostgreSQL itself where pgvae is not there, or a right to it, or to write."""
    is_missing = isinstance(error, psycopg.errors.UndefinedTable | psycopg.errors.InvalidSchemaName)
    if is_missing and re.search(r"\bvae(_private)?\b", message):
        return "pgvae is not installed in this database: run pgvae install, or check --dsn and PGVAE_DSN"
    if isinstance(error, psycopg.errors.InsufficientPrivilege) and command in _NEEDED:
        return f"pgvae {command} needs {_NEEDED[command]}"
    if isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
        return "a standby is read-only: name its primary; a role or database with default_transaction_read_only is, too"
    return None


def _fail(message: str, hint: str | None) -> NoReturn:
    err.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    if hint:
        err.print(f"[bold]hint:[/] {escape(hint)}", highlight=False, soft_wrap=True)
    raise typer.Exit(1)
