-- What goes with what, and what to recommend to a session that no table holds.

create or replace function vae_private.recommend_for(model_id integer, events jsonb, k integer, options jsonb)
returns table (rank integer, item_key text, score real, is_cold_start boolean, model_version integer)
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].recommend_for(plpy, model_id, events, k, options)
$pgvae$;

create or replace function vae_private.recommend_for_items(
    model_id integer, item_keys text[], event_types text[], times float8[], k integer, options jsonb
)
returns table (rank integer, item_key text, score real, is_cold_start boolean, model_version integer)
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].recommend_for_items(plpy, model_id, item_keys, event_types, times, k, options)
$pgvae$;

create or replace function vae_private.related(model_id integer, given_key text, k integer, options jsonb)
returns table (rank integer, item_key text, score real, lift real, support bigint, model_version integer)
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].related(plpy, model_id, given_key, k, options)
$pgvae$;

create or replace function vae_private.basket(model_id integer, item_keys text[], k integer, options jsonb)
returns table (rank integer, item_key text, score real, lift real, support bigint, model_version integer)
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].basket(plpy, model_id, item_keys, k, options)
$pgvae$;

-- The settings: as in vae_private.recommend_all.
create or replace function vae_private.related_all(model_id integer, k integer)
returns table (item_key text, item_keys text, scores text, lifts text, supports text, model_version integer)
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
set row_security = on
set enable_nestloop = off
set jit = off
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].related_all(plpy, model_id, k)
$pgvae$;

comment on function vae_private.recommend_for(integer, jsonb, integer, jsonb) is
    'Scores a session of a JSON array of events, for <model>.recommend_for, which gives typed keys.';
comment on function vae_private.recommend_for_items(integer, text[], text[], float8[], integer, jsonb) is
    'Scores a session of parallel arrays, for <model>.recommend_for_items.';
comment on function vae_private.related(integer, text, integer, jsonb) is
    'Finds what goes with an item by key, for <model>.related.';
comment on function vae_private.basket(integer, text[], integer, jsonb) is
    'Finds what goes with the items of a cart by key, for <model>.basket.';
comment on function vae_private.related_all(integer, integer) is
    'Finds what goes with each item, a row per item with array literals, for <model>.related_items_materialized.';


create or replace function vae_private.build_related(m vae.models)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    i constant text := m.item_id_type;
    typed record;
begin
    for typed in
        select * from (values
            ('recommend_for(events jsonb, k integer default 10, options jsonb default null)',
                'score real, is_cold_start boolean',
                'recommend_for(%s, $1, $2, $3)', 'r.score, r.is_cold_start'),
            (format('recommend_for_items(item_ids %s[], event_types text[] default null,'
                    ' occurred_ats timestamptz[] default null, k integer default 10, options jsonb default null)', i),
                'score real, is_cold_start boolean',
                'recommend_for_items(%s, $1::text[], $2, (select array_agg(extract(epoch from t.at)::float8 order by t.place)'
                    ' from unnest($3) with ordinality as t (at, place)), $4, $5)', 'r.score, r.is_cold_start'),
            (format('related(item_id %s, k integer default 10, options jsonb default null)', i),
                'score real, lift real, support bigint',
                'related(%s, $1::text, $2, $3)', 'r.score, r.lift, r.support'),
            (format('basket(items %s[], k integer default 10, options jsonb default null)', i),
                'score real, lift real, support bigint',
                'basket(%s, $1::text[], $2, $3)', 'r.score, r.lift, r.support')
        ) as f (signature, columns, call, selected)
    loop
        perform vae_private.make_function(
            m.name, typed.signature, format('table (rank integer, item_id %s, %s, model_version integer)', i, typed.columns),
            format(
                E'select r.rank, r.item_key::%s, %s, r.model_version'
                '\nfrom vae_private.%s r'
                '\norder by r.rank',
                i, typed.selected, format(typed.call, m.model_id)));
    end loop;
    perform vae_private.make_function(
        m.name, format('support(item_ids %1$s[], with_item_ids %1$s[], event_types text[])', i),
        format('table (item_id %s, support bigint)', i),
        format(
            E'select c.item_id, count(distinct c.user_id)'
            '\nfrom (\n%1$s\n) c'
            '\nwhere c.item_id = any ($2) and c.event_type = any ($3) and c.user_id in ('
            '\n    select o.user_id'
            '\n    from (\n%1$s\n) o'
            '\n    where o.item_id = any ($1) and o.event_type = any ($3)'
            '\n)'
            '\ngroup by c.item_id',
            vae_private.clean_select(m.model_id, 'all users')));

    if to_regclass(format('%I.related_items_materialized', m.name)) is null then
        execute format(
            E'create materialized view %I.related_items_materialized as'
            '\nselect r.item_key::%s as item_id, r.item_keys::%s[] as related_item_ids, r.scores::real[] as scores,'
            '\n    r.lifts::real[] as lifts, r.supports::bigint[] as supports, r.model_version, now() as scored_at'
            '\nfrom vae_private.related_all(%s, 20) r\nwith no data',
            m.name, i, i, m.model_id);
    end if;
    if to_regclass(format('%I.related_items_item_id', m.name)) is null then
        execute format('create unique index related_items_item_id on %I.related_items_materialized (item_id)', m.name);
    end if;
    execute format(
        E'create or replace view %1$I.related_items as'
        '\nselect r.item_id, l.rank::integer as rank, l.related_item_id, l.score, l.lift, l.support, r.model_version, r.scored_at'
        '\nfrom %1$I.related_items_materialized r'
        '\ncross join lateral unnest(r.related_item_ids, r.scores, r.lifts, r.supports)'
        '\n    with ordinality as l (related_item_id, score, lift, support, rank)',
        m.name);
    perform vae_private.comment_column(m.name, c.relation, c.column_name, c.comment)
    from (values
        ('related_items_materialized', 'item_id', 'Key of the item.'),
        ('related_items_materialized', 'related_item_ids', 'Keys of the items that go with it, best first.'),
        ('related_items_materialized', 'scores', 'Their scores, in the same order.'),
        ('related_items_materialized', 'lifts', 'Their lifts, in the same order.'),
        ('related_items_materialized', 'supports', 'Users who bought both, in the same order.'),
        ('related_items_materialized', 'model_version', 'Version that scored the row, see vae.versions.'),
        ('related_items_materialized', 'scored_at', 'When the row was scored.'),
        ('related_items', 'item_id', 'Key of the item.'),
        ('related_items', 'rank', 'Position in the item''s list, from 1, by score times lift.'),
        ('related_items', 'related_item_id', 'Key of the item that goes with it.'),
        ('related_items', 'score', 'Share of the model''s probability over the catalogue for somebody who bought item_id and nothing else: relative, not a calibrated probability of purchase.'),
        ('related_items', 'lift', 'The score over the mean score that the related item has beside any item of the shop; above 1 they go together.'),
        ('related_items', 'support', 'Users who bought both, whenever.'),
        ('related_items', 'model_version', 'Version that scored the row, see vae.versions.'),
        ('related_items', 'scored_at', 'When the row was scored.')
    ) as c (relation, column_name, comment);
end;
$$;

comment on function vae_private.build_related(vae.models) is
    'Makes or remakes the functions and views of a model that say what goes with what; part of vae_private.build_model.';
