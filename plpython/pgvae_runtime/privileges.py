"""Which grants the calling role lacks to read what a model scores from."""

from __future__ import annotations

from typing import Any

from .store import execute

# What a table is read for: its whole rows of the events, the key and the features of users and items.
_MISSING = """
with read as (
    select 1 as place, m.events_schema as schema_name, m.events_table as table_name, '{}'::text[] as columns
    from vae.models m
    where m.model_id = $1
    union all
    select 2, m.users_schema, m.users_table, m.users_key_column || m.user_features
    from vae.models m
    where m.model_id = $1 and m.users_table is not null
    union all
    select 3, m.items_schema, m.items_table, m.items_key_column || m.item_features
    from vae.models m
    where m.model_id = $1 and m.items_table is not null
), found as (
    select r.*, n.oid as schema_id, c.oid as table_id
    from read r
    join pg_catalog.pg_namespace n on n.nspname = r.schema_name
    join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = r.table_name
), missing as (
    select distinct 0 as place, pg_catalog.format('grant usage on schema %I', f.schema_name) as statement
    from found f
    where not pg_catalog.has_schema_privilege(f.schema_id, 'usage')
    union all
    select f.place, pg_catalog.format('grant select%s on %I.%I', c.list, f.schema_name, f.table_name)
    from found f
    cross join lateral (
        select ' (' || pg_catalog.string_agg(pg_catalog.quote_ident(a.name), ', ' order by a.place) || ')' as list,
            pg_catalog.bool_and(pg_catalog.has_column_privilege(f.table_id, a.name, 'select')) as may_read
        from pg_catalog.unnest(f.columns) with ordinality as a (name, place)
        join pg_catalog.pg_attribute t on t.attrelid = f.table_id and t.attname = a.name and not t.attisdropped
    ) c
    where not pg_catalog.has_table_privilege(f.table_id, 'select') and c.may_read is not true
)
select pg_catalog.string_agg(
    m.statement || ' to ' || pg_catalog.quote_ident(current_user), '; ' order by m.place, m.statement) as statements
from missing m
"""


def missing_grants(plpy: Any, model_id: int) -> str | None:
    """Gives the statements that grant what the caller lacks to read a model's tables; None where nothing is missing."""
    try:
        statements: str | None = execute(plpy, _MISSING, ["integer"], [model_id])[0]["statements"]
    except plpy.SPIError:
        # It is asked on behalf of another error, which must not be lost.
        return None
    return statements
