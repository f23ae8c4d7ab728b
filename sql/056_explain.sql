-- Why an item is recommended: the events that its score comes from.

create or replace function vae_private.explain(model_id integer, user_key text, item_key text, options jsonb)
returns table (
    rank integer, part text, item_index integer, event_type text, at float8,
    contribution real, relevance real, gate real, share real, model_version integer, version_id bigint
)
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].explain(plpy, model_id, user_key, item_key, options)
$pgvae$;

comment on function vae_private.explain(integer, text, text, jsonb) is
    'Explains the score of one user and item by key, for <model>.explain.';


create or replace function vae_private.build_explain(m vae.models)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    title text;
    named text := 'null';
begin
    execute format(
        'create or replace function %I.explain(user_id %s, item_id %s, options jsonb default null)'
        ' returns table (rank integer, part text, event_item_id %s, event_type text, occurred_at timestamptz,'
        ' contribution real, relevance real, gate real, share real, model_version integer)'
        ' language sql stable called on null input parallel unsafe security invoker set search_path = pg_catalog, pg_temp as %L',
        m.name, m.user_id_type, m.item_id_type, m.item_id_type,
        format(
            E'\nselect r.rank, r.part, i.item_key::%s, r.event_type, to_timestamp(r.at), r.contribution, r.relevance, r.gate, r.share,'
            '\n    r.model_version'
            '\nfrom vae_private.explain(%s, $1::text, $2::text, $3) r'
            '\nleft join vae_private.scoring_items i on i.version_id = r.version_id and i.item_index = r.item_index'
            '\norder by r.rank\n',
            m.item_id_type, m.model_id));

    if m.items_table is not null then
        select a.attname into title
        from pg_attribute a
        join unnest(array['title', 'name', 'product_name', 'item_name', 'description']) with ordinality as w (word, place)
            on w.word = lower(a.attname)
        where a.attrelid = to_regclass(format('%I.%I', m.items_schema, m.items_table)) and a.attnum > 0 and not a.attisdropped
            and a.atttypid in ('text'::regtype, 'varchar'::regtype)
        order by w.place
        limit 1;
    end if;
    if title is not null then
        named := format('(select left(k.%I::text, 80) from %I.%I k where k.%I = e.event_item_id limit 1)',
            title, m.items_schema, m.items_table, m.items_key_column);
    end if;
    execute format(
        'create or replace function %I.because(user_id %s, item_id %s) returns text'
        ' language sql stable called on null input parallel unsafe security invoker set search_path = pg_catalog, pg_temp as %L',
        m.name, m.user_id_type, m.item_id_type,
        format(
            E'\nwith e as (select * from %I.explain($1, $2, ''{"by": "item"}'')),'
            '\nbest as ('
            '\n    select e.rank, case e.event_type when ''purchase'' then ''you bought '' when ''view'' then ''you viewed '' '
            '\n        when ''add_to_cart'' then ''you put into the cart '' when ''review'' then ''you reviewed '''
            '\n        when ''share'' then ''you shared '' else ''of '' end || coalesce(%s, e.event_item_id::text) as phrase'
            '\n    from e where e.part = ''item'' and e.contribution > 0 order by e.rank limit 2'
            '\n)'
            '\nselect ''because '' || coalesce('
            '\n    (select string_agg(b.phrase, '' and '' order by b.rank) from best b),'
            '\n    (select ''of what is known about you'' from e where e.part = ''features'' and e.contribution > 0),'
            '\n    ''it is popular'')'
            '\nwhere exists (select from e)\n',
            m.name, named));
end;
$$;

comment on function vae_private.build_explain(vae.models) is
    'Makes or remakes the functions of a model that explain its scores; part of vae_private.build_model.';
