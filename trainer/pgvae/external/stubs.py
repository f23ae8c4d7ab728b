"""What stands for the functions in PL/Python where a database has none.

Those that fill prediction views read the rows that a refresh brought from outside (vae_private.staged); all others
refuse.
"""

from __future__ import annotations

import re

# The prediction views, and the entry points of the runtime that fill them.
VIEWS = {
    "churn": "churn_all",
    "recommendations": "recommend_all",
    "offer_responses": "offer_audiences",
    "related_items": "related_all",
    "explanations": "explain_all",
    "demand": "demand_all",
    "user_segments": "segment_all",
}
_STAGED = {function: view for view, function in VIEWS.items()}

_ROUTINE = re.compile(
    r"(?P<head>create or replace (?P<kind>function|procedure) \w+\.(?P<name>\w+)\([^;]*?\)\n"
    r"(?:returns (?P<returns>[^;]*?)\n)?)language plpython3u(?P<rest>\n[^$]*?)as \$pgvae\$\n.*?\$pgvae\$;",
    re.DOTALL,
)
# In PL/pgSQL, since no procedure in SQL can commit; all others in SQL, where an argument and a column may share a name.
_COMMIT = "begin\n    commit;\nend;"
_BODIES = {
    "last_run": "select s.row_count, s.version, s.row_count, 'full', s.left_out from vae_private.staged_run($1, $2) s",
    "release_gpu": "select false",
    "load_runtime": "select vae_private.refuse_scoring(null)",
    "verify": "select * from vae_private.staged_verification($1, $2)",
}


def without_python(script: str) -> str:
    """Gives a script of `sql/` whose functions in PL/Python do without, with the same arguments, results and rights."""
    return _ROUTINE.sub(_stub, script)


def _stub(found: re.Match[str]) -> str:
    is_commit = found["kind"] == "procedure"
    body = _COMMIT if is_commit else _BODIES.get(found["name"]) or _body(found["name"], found["returns"])
    language = "plpgsql" if is_commit else "sql"
    return f"{found['head']}language {language}{found['rest']}as $pgvae$\n{body}\n$pgvae$;"


def _body(name: str, returns: str) -> str:
    """Gives the query that reads staged rows, or refuses, with the columns or the value of the function."""
    columns = re.fullmatch(r"table \((.*)\)", returns, re.DOTALL)
    types = [column.split(maxsplit=1)[1].strip() for column in columns[1].split(",")] if columns else [returns]
    cells = ", ".join(f"s[{place}]::{kind}" for place, kind in enumerate(types, start=1) if kind != "void") or "s"
    source = f"staged($1, '{_STAGED[name]}')" if name in _STAGED else "refuse_scoring($1)"
    return f"select {cells} from vae_private.{source} s"  # noqa: S608  # of the files of sql/ alone
