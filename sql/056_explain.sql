-- Why an item is recommended: the events that its score comes from.

create or replace function vae_private.explain(model_id integer, user_key text, explained_key text, options jsonb)
returns table (
    rank integer, part text, item_key text, event_type text, at float8,
    contribution real, relevance real, gate real, share real, model_version integer
)
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].explain(plpy, model_id, user_key, explained_key, options)
$pgvae$;

create or replace function vae_private.because(model_id integer, user_key text, item_key text)
returns text
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].because(plpy, model_id, user_key, item_key)
$pgvae$;

-- The settings: as in vae_private.recommend_all.
create or replace function vae_private.explain_all(model_id integer)
returns table (
    user_key text, item_key text, because text, parts text, event_item_keys text, event_types text, times text,
    event_counts text, contributions text, shares text, model_version integer)
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
return GD["@RUNTIME@"].explain_all(plpy, model_id)
$pgvae$;

comment on function vae_private.explain(integer, text, text, jsonb) is
    'Explains the score of one user and item by key, for <model>.explain.';
comment on function vae_private.because(integer, text, text) is
    'Says in words why an item is recommended to a user, by key, for <model>.because.';
comment on function vae_private.explain_all(integer) is
    'Explains the first recommendation of each user of a model, a row per user with array literals, for '
    '<model>.explanations_materialized.';


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
    u constant text := m.user_id_type;
    i constant text := m.item_id_type;
    title text;
begin
    perform vae_private.make_function(
        m.name, format('explain(user_id %s, item_id %s, options jsonb default null)', u, i),
        format('table (rank integer, part text, event_item_id %s, event_type text, occurred_at timestamptz,'
            ' contribution real, relevance real, gate real, share real, model_version integer)', i),
        format(
            E'select r.rank, r.part, r.item_key::%s, r.event_type, to_timestamp(r.at), r.contribution, r.relevance, r.gate, r.share,'
            '\n    r.model_version'
            '\nfrom vae_private.explain(%s, $1::text, $2::text, $3) r'
            '\norder by r.rank',
            i, m.model_id));

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
    -- Of several rows of an item whose key is not unique, any title will do.
    perform vae_private.make_function(
        m.name, format('item_titles(item_ids %s[])', i), format('table (item_id %s, title text)', i),
        case when title is null then format(E'select null::%s, null::text\nwhere false', i)
            else format(
                -- On one line, since it becomes part of a sentence; a text of pages is not looked at whole.
                E'select k.%1$I%2$s, case when length(t.title) > 80 then left(t.title, 77) || ''...'' else t.title end'
                '\nfrom %4$I.%5$I k'
                '\ncross join lateral (select btrim(regexp_replace(left(k.%3$I::text, 1000), ''[[:space:]]+'', '' '', ''g'')) as title) t'
                '\nwhere k.%1$I = any ($1) and t.title <> ''''',
                m.items_key_column, case i when 'text' then '::text' else '' end, title, m.items_schema, m.items_table) end);
    perform vae_private.make_function(
        m.name, format('because(user_id %s, item_id %s)', u, i), 'text',
        format('select vae_private.because(%s, $1::text, $2::text)', m.model_id));

    if to_regclass(format('%I.explanations_materialized', m.name)) is null then
        -- The function reads the recommendations. They are named here only so that a restored dump fills them first.
        execute format(
            E'create materialized view %1$I.explanations_materialized as'
            '\nselect e.user_key::%2$s as user_id, e.item_key::%3$s as item_id, e.because, e.parts::text[] as parts,'
            '\n    e.event_item_keys::%3$s[] as event_item_ids, e.event_types::text[] as event_types, e.times::float8[] as times,'
            '\n    e.event_counts::integer[] as event_counts, e.contributions::real[] as contributions, e.shares::real[] as shares,'
            '\n    e.model_version, now() as scored_at'
            '\nfrom vae_private.explain_all(%4$s) e'
            '\nwhere true or exists (select from %1$I.stored_recommendations)'
            '\nwith no data',
            m.name, u, i, m.model_id);
    end if;
    if to_regclass(format('%I.explanations_user_id', m.name)) is null then
        execute format('create unique index explanations_user_id on %I.explanations_materialized (user_id)', m.name);
    end if;
    execute format(
        E'create or replace view %1$I.explanations as'
        '\nselect e.user_id, e.item_id, e.because, l.rank::integer as rank, l.part, l.event_item_id, l.event_type,'
        '\n    to_timestamp(l.at) as occurred_at, l.event_count, l.contribution, l.share, e.model_version, e.scored_at'
        '\nfrom %1$I.explanations_materialized e'
        '\ncross join lateral unnest(e.parts, e.event_item_ids, e.event_types, e.times, e.event_counts, e.contributions, e.shares)'
        '\n    with ordinality as l (part, event_item_id, event_type, at, event_count, contribution, share, rank)',
        m.name);
    perform vae_private.comment_column(m.name, c.relation, c.column_name, c.comment)
    from (values
        ('explanations_materialized', 'user_id', 'Key of the user.'),
        ('explanations_materialized', 'item_id', 'Key of the item that is recommended first.'),
        ('explanations_materialized', 'because', 'Why, as a sentence for people.'),
        ('explanations_materialized', 'parts', 'What the parts are: item, features or popularity; strongest first.'),
        ('explanations_materialized', 'event_item_ids', 'Keys of the items of the history, in the same order.'),
        ('explanations_materialized', 'event_types', 'Types of their last events, in the same order.'),
        ('explanations_materialized', 'times', 'When these happened, in seconds since 1970, in the same order.'),
        ('explanations_materialized', 'event_counts', 'How many events each has in the history, in the same order.'),
        ('explanations_materialized', 'contributions', 'What they contribute, in the same order.'),
        ('explanations_materialized', 'shares', 'Their shares of all that speaks for the item, in the same order.'),
        ('explanations_materialized', 'model_version', 'Version that scored and explained, see vae.versions.'),
        ('explanations_materialized', 'scored_at', 'When the row was made.'),
        ('explanations', 'user_id', 'Key of the user.'),
        ('explanations', 'item_id', 'Key of the item that is recommended first, as in recommendations.'),
        ('explanations', 'because', 'Why, as a sentence for people; the same in each row of the user.'),
        ('explanations', 'rank', 'Position among what speaks for the item, from 1 to 5 at most, strongest first.'),
        ('explanations', 'part', 'item: the events on an item of the history; features or popularity: where no event speaks for it.'),
        ('explanations', 'event_item_id', 'Key of an item of the user''s history; null for features and popularity.'),
        ('explanations', 'event_type', 'Type of the user''s last event on it.'),
        ('explanations', 'occurred_at', 'When that happened.'),
        ('explanations', 'event_count', 'How many events on it the history has.'),
        ('explanations', 'contribution', 'By how much the item''s logit would fall without these events, as in explain with by => item.'),
        ('explanations', 'share', 'Part of all that the history says for the item; null for features and popularity.'),
        ('explanations', 'model_version', 'Version that scored and explained, see vae.versions.'),
        ('explanations', 'scored_at', 'When the row was made.')
    ) as c (relation, column_name, comment);
end;
$$;

comment on function vae_private.build_explain(vae.models) is
    'Makes or remakes the functions and views of a model that explain its scores; part of vae_private.build_model.';
