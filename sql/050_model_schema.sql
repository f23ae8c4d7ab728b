-- What a model's schema holds. Everything in it is typed with the shop's own keys and belongs to the model's owner.

create or replace function vae_private.model_objects(model_id integer)
returns table (step integer, kind text, object text, is_public boolean, purpose text)
language sql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
select o.*
from vae.models m
cross join lateral (values
    -- Up to step 6, what reads the shop's tables; read in the order of falling steps, in which they are locked too.
    (1, 'view', 'outlier_users', true, 'users with too many events on one day to be people; left out of training'),
    (5, 'view', 'clean_events', true, 'the events that the model learns from, cleaned by rules that its definition shows'),
    (2, 'view', 'clean_assignments', true, 'who was offered what by chance and from whom it was withheld, cleaned by rules that its definition shows'),
    (4, 'view', 'user_features', false, 'the columns of all users that the model reads as features'),
    (3, 'view', 'item_features', false, 'the columns of all items that the model reads as features'),
    (5, 'view', 'refresh_events', false, 'what a refresh reads: the cleaned events of all users, and users without any'),
    (5, 'view', 'digested_events', false, 'refresh_events with a digest of each row'),
    (6, 'view', 'refresh_digests', false, 'a digest of all that a refresh reads of a user: it differs once something changed'),
    (6, 'function', format('history(%s)', m.user_id_type), true, 'the events of one user that the model sees, up to this moment'),
    (7, 'function', format('features(%s)', m.user_id_type), true, 'the columns of one user that the model reads as features'),
    (8, 'function', format('recommend(%s, integer, jsonb)', m.user_id_type), true, 'the best items for one user, now'),
    (9, 'function', format('score(%s, %s)', m.user_id_type, m.item_id_type), true, 'the score of one item for one user, now'),
    (9, 'function', format('score_pairs(%s[], %s[])', m.user_id_type, m.item_id_type), true, 'the scores of many pairs of user and item, now'),
    (10, 'function', format('embedding(%s)', m.user_id_type), true, 'the latent position of one user, now'),
    -- Before recommendations, which reads it.
    (10, 'materialized view', 'churn_materialized', false, 'what churn reads: a row per user'),
    (11, 'materialized view', 'recommendations_materialized', false, 'the best items as of the last refresh that stored all users, a row per user'),
    (12, 'materialized view', 'recommendations_changed', false, 'users scored since, who take the place of their row in recommendations_materialized'),
    (13, 'view', 'stored_recommendations', false, 'the stored row of every user: of recommendations_changed, else of recommendations_materialized'),
    (14, 'view', 'stored_digests', false, 'the digests that the stored recommendations were scored with, without users who are gone'),
    (14, 'view', 'recommendations', true, 'the best items for every user, as of the last vae.refresh'),
    (29, 'materialized view', 'offer_responses_materialized', false, 'what offer_responses reads: a row per offer and user'),
    (30, 'view', 'churn', true, 'who is leaving and who will buy: every user, as of the last vae.refresh'),
    (31, 'function', format('churn(%s)', m.user_id_type), true, 'whether one user will buy anything within the horizon, from now on'),
    (32, 'function', format('explain_churn(%s)', m.user_id_type), true, 'what speaks for and against one user''s leaving'),
    (33, 'function', format('response(%s, %s)', m.user_id_type, m.item_id_type), true, 'the probability that a user buys an item within the horizon'),
    (34, 'function', format('response_to_items(%s, %s[])', m.user_id_type, m.item_id_type), true, 'the probability that a user buys one of some items within the horizon'),
    (34, 'function', format('uplift(%s, %s)', m.user_id_type, m.item_id_type), true, 'by how much an offer of an item raises the probability that a user buys it within the horizon'),
    (35, 'function', format('audience(%s, integer, jsonb)', m.item_id_type), true, 'whom to send an offer of an item: the users who are likeliest to buy it'),
    (36, 'function', format('audience_of_items(%s[], integer, jsonb)', m.item_id_type), true, 'whom to send an offer of some items: the users who are likeliest to buy one of them'),
    (37, 'function', 'audience_of_category(text, integer, jsonb, text)', true, 'whom to send an offer of a category: the users who are likeliest to buy one of its items'),
    (38, 'view', 'offer_responses', true, 'whom to send each offer: the users who are likeliest to answer, as of the last vae.refresh'),
    (39, 'view', 'offers', true, 'each offer in sums: whom it goes to, how many will buy and what it brings'),
    (40, 'function', format('explain(%s, %s, jsonb)', m.user_id_type, m.item_id_type), true, 'the past events that the score of one item for one user comes from'),
    (40, 'function', format('because(%s, %s)', m.user_id_type, m.item_id_type), true, 'why an item is recommended to a user, as a sentence for people'),
    (40, 'function', format('item_titles(%s[])', m.item_id_type), true, 'the titles of some items, as because says them'),
    (41, 'function', 'recommend_for(jsonb, integer, jsonb)', true, 'the best items for a session that no table holds: events of somebody anonymous or made up'),
    (42, 'function', format('recommend_for_items(%s[], text[], timestamptz[], integer, jsonb)', m.item_id_type), true, 'recommend_for with arrays, as array_agg makes them'),
    (42, 'function', format('recommend_for_users(%s[], integer, jsonb)', m.user_id_type), true, 'the best items for each of some users, now'),
    (43, 'function', format('support(%1$s[], %1$s[], text[])', m.item_id_type), true, 'how many users have events of these types both on an item and on one of item_ids'),
    (44, 'function', format('related(%s, integer, jsonb)', m.item_id_type), true, 'what goes with an item, now'),
    (45, 'function', format('basket(%s[], integer, jsonb)', m.item_id_type), true, 'what goes with the items of a cart, now'),
    (46, 'materialized view', 'related_items_materialized', false, 'what related_items reads: a row per item'),
    (47, 'view', 'related_items', true, 'what goes with every item, as of the last vae.refresh'),
    (48, 'materialized view', 'explanations_materialized', false, 'what explanations reads: a row per user'),
    (49, 'view', 'explanations', true, 'why the first recommendation of every user is recommended, as of the last vae.refresh'),
    (50, 'function', format('item_days(%s, timestamptz, timestamptz, text[])', m.item_id_type), true, 'what happened to one item on each day'),
    (51, 'function', 'all_item_days(timestamptz, timestamptz, text[])', true, 'what happened to every item on each day'),
    (52, 'function', format('demand(%s)', m.item_id_type), true, 'the units of one item that will be sold, and to how many buyers, from now on'),
    (53, 'materialized view', 'demand_materialized', false, 'what demand reads: a row per item'),
    (54, 'view', 'demand_deviations', false, 'what demand_by_category reads beside demand: how far each item may be off'),
    (55, 'view', 'demand', true, 'the units of every item that will be sold, and to how many buyers, as of the last vae.refresh'),
    (55, 'function', 'demand_by_category(text)', true, 'the units of every category of items that will be sold, and to how many buyers'),
    (21, 'function', format('segment(%s)', m.user_id_type), true, 'the segment of one user, now'),
    (22, 'materialized view', 'user_segments_materialized', false, 'what user_segments and segments read: a row per user'),
    (23, 'view', 'user_segments', true, 'the segment of every user, as of the last vae.refresh'),
    (24, 'view', 'segments', true, 'groups of users with similar tastes: name, size and what sets them apart')
) as o (step, kind, object, is_public, purpose)
where m.model_id = model_objects.model_id
    and (m.exposure_column is not null or o.object <> 'clean_assignments')
    and (m.users_table is not null or o.object not in ('user_features', format('features(%s)', m.user_id_type)))
    and (m.items_table is not null or o.object not in ('item_features', 'demand_deviations', 'demand_by_category(text)', 'audience_of_category(text, integer, jsonb, text)'))
$$;

comment on function vae_private.model_objects(integer) is
    'Lists what a model''s schema holds, in the order in which it is made.';


create or replace function vae_private.retired_functions(m vae.models)
returns table (object text)
language sql
stable
called on null input
parallel safe
security invoker
set search_path = pg_catalog, pg_temp
as $$
select f.object
from (values
    -- A literal without a type, '550e8400-…', could have been an item or a list of items.
    (format('audience(%s[], integer, jsonb)', m.item_id_type), 'vae_private.audience('),
    (format('response(%s, %s[])', m.user_id_type, m.item_id_type), 'vae_private.response(')
) as f (object, call)
join pg_proc p on p.oid = to_regprocedure(format('%I.%s', m.name, f.object))
-- One that somebody made for calls of the old form does not call what is private.
where position(f.call in p.prosrc) > 0
$$;

comment on function vae_private.retired_functions(vae.models) is
    'Lists the functions of a model''s schema that an earlier release made there, and this one does not.';


create or replace function vae_private.drop_retired(m vae.models)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    retired text;
begin
    for retired in select f.object from vae_private.retired_functions(m) f loop
        begin
            execute format('drop function %I.%s', m.name, retired);
            raise notice '%.% is of an earlier release, and was dropped', m.name, retired;
        exception when dependent_objects_still_exist then
            -- What somebody built on it goes on working.
            raise warning '%.% is of an earlier release, and stays since others use it', m.name, retired
                using hint = format('see who does with: drop function %I.%s; change them, then: select vae.rebuild_model(%L)',
                    m.name, retired, m.name);
        end;
    end loop;
end;
$$;

comment on function vae_private.drop_retired(vae.models) is
    'Drops what an earlier release made in a model''s schema, and this one does not; part of vae_private.build_model.';


create or replace function vae_private.time_literal(time_type text, expression text)
returns text
language sql
immutable
called on null input
parallel safe
security invoker
set search_path = pg_catalog, pg_temp
as $$
-- Compared in the column's own type, so that an index on it can be used.
select case time_type
    when 'timestamptz' then format('%s::timestamptz', expression)
    when 'timestamp' then format('(%s::timestamptz at time zone ''UTC'')', expression)
    else format('(%s::timestamptz at time zone ''UTC'')::date', expression)
end
$$;

comment on function vae_private.time_literal(text, text) is 'Writes a point in time in the type of the event table''s column.';


create or replace function vae_private.earliest(m vae.models)
returns text
language sql
immutable
called on null input
parallel safe
security invoker
set search_path = pg_catalog, pg_temp
as $$
-- Midnight in UTC, whatever the zone of the session that makes or asks a view.
select vae_private.time_literal(m.occurred_at_type, format('%L', (m.options ->> 'earliest') || ' 00:00+00'))
$$;

comment on function vae_private.earliest(vae.models) is 'Writes the moment before which a model takes an event''s time for absurd.';


create or replace function vae_private.shop_table(table_schema text, table_name text)
returns regclass
language sql
stable
called on null input
parallel safe
security invoker
set search_path = pg_catalog, pg_temp
as $$
-- Not to_regclass, which asks for a right on the schema.
select c.oid::regclass
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
where n.nspname = shop_table.table_schema and c.relname = shop_table.table_name
$$;

comment on function vae_private.shop_table(text, text) is 'Gives a table by its names, to whoever asks; null where there is none.';


create or replace function vae_private.key_collation(m vae.models, source text)
returns text
language sql
stable
called on null input
parallel safe
security invoker
set search_path = pg_catalog, pg_temp
as $$
-- Two columns can be compared where both have one collation, or one of them the default.
select coalesce(max(format(' collate %I.%I', n.nspname, k.collname)), '')
from (values
    ('users', m.user_id_column, m.users_schema, m.users_table, m.users_key_column),
    ('items', m.item_id_column, m.items_schema, m.items_table, m.items_key_column)
) as s (name, event_column, table_schema, table_name, key_column)
join pg_attribute e on e.attrelid = vae_private.shop_table(m.events_schema, m.events_table) and e.attname = s.event_column
join pg_attribute a on a.attrelid = vae_private.shop_table(s.table_schema, s.table_name) and a.attname = s.key_column
join pg_collation k on k.oid = a.attcollation and k.collname <> 'default'
join pg_namespace n on n.oid = k.collnamespace
where s.name = source and a.attcollation <> e.attcollation and e.attcollation <> '"default"'::regcollation
$$;

comment on function vae_private.key_collation(vae.models, text) is
    'Writes the collation of the key of a model''s users or items where it conflicts with that of the events'' column; else nothing.';


create or replace function vae_private.admission_rules(m vae.models, scope text)
returns text[]
language sql
stable
called on null input
parallel safe
security invoker
set search_path = pg_catalog, pg_temp
as $$
select array_remove(array[
    format('e.%I is %s', m.user_id_column, case when scope = 'anonymous sales' then 'null' else 'not null' end),
    format('e.%I is not null', m.item_id_column),
    format('e.%I >= %s', m.occurred_at_column, vae_private.earliest(m)),
    -- Not now(): in a long transaction that would hide what others wrote since it began.
    format('e.%I <= %s', m.occurred_at_column, vae_private.time_literal(m.occurred_at_type, 'statement_timestamp()')),
    case when m.user_id_type = 'text' and scope <> 'anonymous sales' then
        format('octet_length(e.%I) <= 512', m.user_id_column) end,
    case when m.item_id_type = 'text' then
        format('octet_length(e.%I) <= 512', m.item_id_column) end,
    -- A sale counts whoever bought, and whether anybody knows who.
    case when m.users_table is not null and scope not in ('sales to users', 'anonymous sales') then
        format('exists (select from %I.%I u where u.%I = e.%I%s)',
            m.users_schema, m.users_table, m.users_key_column, m.user_id_column, vae_private.key_collation(m, 'users')) end,
    case when m.items_table is not null then
        format('exists (select from %I.%I i where i.%I = e.%I%s)',
            m.items_schema, m.items_table, m.items_key_column, m.item_id_column, vae_private.key_collation(m, 'items')) end
], null)
$$;

comment on function vae_private.admission_rules(vae.models, text) is
    'Writes the conditions that a row of a model''s events, e, must meet to count at all: keys, time, and the tables of users and '
    'items; scope as of clean_select, or assignments.';


create or replace function vae_private.event_time(m vae.models)
returns text
language sql
immutable
called on null input
parallel safe
security invoker
set search_path = pg_catalog, pg_temp
as $$
select case m.occurred_at_type
    when 'timestamptz' then format('e.%I', m.occurred_at_column)
    else format('(e.%I::timestamp at time zone ''UTC'')', m.occurred_at_column)
end
$$;

comment on function vae_private.event_time(vae.models) is
    'Writes the time of a row of a model''s events, e, as timestamptz: a time without a zone is in UTC.';


create or replace function vae_private.key_condition(alias text, table_schema text, table_name text, column_name text)
returns text
language sql
stable
called on null input
parallel safe
security invoker
set search_path = pg_catalog, pg_temp
as $$
-- A key of char(n) is a text in all that pgvae gives; compared with a text, its column would use no index.
select format('%s.%I = $1%s', alias, column_name, case when exists (
    select
    from pg_attribute a
    where a.attrelid = vae_private.shop_table(table_schema, table_name) and a.attname = column_name
        and vae_private.base_type(a.atttypid) = 'bpchar'::regtype) then '::bpchar' end);
$$;

comment on function vae_private.key_condition(text, text, text, text) is
    'Writes the condition that a column holds the key $1, so that an index on it is used; part of the queries of live calls.';


create or replace function vae_private.clean_select(model_id integer, scope text)
returns text
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
    m vae.models;
    rules text[];
    is_sales boolean;
    is_grouped boolean;
begin
    select * into m from vae.models where models.model_id = clean_select.model_id;
    is_sales := scope in ('sales to users', 'anonymous sales');
    -- Two names of one event type may weigh differently: at one moment they are one event still, of the greater weight.
    is_grouped := m.event_type_column is not null and scope not in ('admitted rows', 'anonymous sales');
    rules := vae_private.admission_rules(m, scope);
    if m.exposure_column is not null then
        -- An assignment of an experiment is nothing that the user did.
        rules := rules || format('e.%I is null', m.exposure_column);
    end if;
    if m.quantity_column is not null then
        rules := rules || format('(e.%1$I > 0 or e.%1$I is null)', m.quantity_column);
    end if;
    if is_sales and m.quantity_column is not null then
        -- Not a number is above all numbers, and what some systems write in its place, as the largest float8, is far above
        -- what anybody sells.
        rules := rules || format('(e.%1$I < 1e15 or e.%1$I is null)', m.quantity_column);
    end if;
    if scope = 'training' then
        rules := rules || format('e.%I not in (select o.user_id from %I.outlier_users o)', m.user_id_column, m.name);
    elsif scope = 'one user' then
        rules := rules || vae_private.key_condition('e', m.events_schema, m.events_table, m.user_id_column);
    end if;
    return format(
        E'select%12$s'
        '\n    e.%1$I%2$s as user_id,'
        '\n    e.%3$I%4$s as item_id,'
        '\n    %5$s as event_type,'
        '\n    %6$s as occurred_at,'
        '\n    %7$s as weight%13$s'
        '\nfrom %8$I.%9$I e%10$s'
        '\nwhere %11$s%14$s',
        m.user_id_column, case m.user_id_type when 'text' then '::text' else '' end,
        m.item_id_column, case m.item_id_type when 'text' then '::text' else '' end,
        case when m.event_type_column is null then '''purchase''::text' else 't.event_type' end,
        vae_private.event_time(m),
        case when m.event_type_column is null then '4::real' when is_grouped then 'max(t.weight)' else 't.weight' end,
        m.events_schema, m.events_table,
        case when m.event_type_column is null then ''
            else format(E'\njoin vae.event_types t on t.model_id = %s and t.name = e.%I::text and t.event_type <> ''ignore''',
                m.model_id, m.event_type_column) end,
        array_to_string(rules, E'\n    and '),
        case when m.event_type_column is null and scope not in ('admitted rows', 'anonymous sales') then ' distinct' else '' end,
        case when is_sales then format(E',\n    %s as quantity',
            case when m.quantity_column is null then '1::float8' else format('coalesce(e.%I::float8, 1)', m.quantity_column) end) end,
        case when is_grouped then E'\ngroup by 1, 2, 3, 4' || case when is_sales then ', 6' else '' end else '' end
    );
end;
$$;

comment on function vae_private.clean_select(integer, text) is
    'Writes the query that cleans a model''s events; scope is training (without outliers), all users, '
    'one user ($1), admitted rows (all users, with the duplicates), or, with the quantity, sales to users or anonymous sales.';


create or replace function vae_private.feature_select(model_id integer, source text, scope text)
returns text
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
    m vae.models;
    t record;
begin
    select * into m from vae.models where models.model_id = feature_select.model_id;
    select * into t from (values
        ('users', 'user_id', 'user_features', m.users_schema, m.users_table, m.users_key_column, m.user_id_type, m.user_features),
        ('items', 'item_id', 'item_features', m.items_schema, m.items_table, m.items_key_column, m.item_id_type, m.item_features)
    ) as s (name, key_name, argument, table_schema, table_name, key_column, key_type, chosen)
    where s.name = source;
    return format(
        -- A plain f could be a column of the shop's.
        E'select k.%1$I%2$s as %3$I, to_jsonb(f.*) as features'
        '\nfrom %4$I.%5$I k'
        '\ncross join lateral (select%6$s) f'
        '\nwhere %7$s',
        t.key_column,
        case
            when vae_private.key_collation(m, source) <> '' then '::text collate "default"'
            when t.key_type = 'text' then '::text'
            else ''
        end,
        t.key_name,
        t.table_schema, t.table_name,
        (
            select string_agg(format(E'\n    %s as %I', f.expression, f.column_name), ',' order by c.place)
            from unnest(t.chosen) with ordinality as c (name, place)
            join vae_private.table_features(format('%I.%I', t.table_schema, t.table_name)::regclass, t.key_column, t.argument) f
                on f.column_name = c.name
        ),
        case
            when scope = 'one key' then vae_private.key_condition('k', t.table_schema, t.table_name, t.key_column)
            when t.key_type = 'text' then format('octet_length(k.%I) <= 512', t.key_column)
            else format('k.%I is not null', t.key_column)
        end
    );
end;
$$;

comment on function vae_private.feature_select(integer, text, text) is
    'Writes the query that gives the features of a model''s users or items, a jsonb object per row; scope is all keys, '
    'or one key ($1).';


create or replace function vae_private.check_tables(m vae.models)
returns void
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    wanted record;
    relation regclass;
    found text;
    gone text;
    remedy text;
begin
    for wanted in
        select * from (values
            (null, m.events_schema, m.events_table, m.user_id_column, m.user_id_type),
            (null, m.events_schema, m.events_table, m.item_id_column, m.item_id_type),
            (null, m.events_schema, m.events_table, m.occurred_at_column, m.occurred_at_type),
            (null, m.events_schema, m.events_table, m.event_type_column, null),
            (null, m.events_schema, m.events_table, m.quantity_column, null),
            (null, m.events_schema, m.events_table, m.exposure_column, 'boolean'),
            ('users', m.users_schema, m.users_table, m.users_key_column, m.user_id_type),
            ('items', m.items_schema, m.items_table, m.items_key_column, m.item_id_type)
        ) as c (argument, table_schema, table_name, column_name, column_type)
        where c.column_name is not null
    loop
        remedy := format('restore it, or make a view of the same name and columns and then: select vae.rebuild_model(%L); else %s',
            m.name, case
                when wanted.argument is null then 'drop the model with vae.drop_model and create it anew'
                else format('name another table: select vae.set_tables(%L, %s => ...)', m.name, wanted.argument) end);
        relation := vae_private.shop_table(wanted.table_schema, wanted.table_name);
        if relation is null then
            raise exception 'table %.% of model % does not exist', wanted.table_schema, wanted.table_name, m.name
                using errcode = 'undefined_table', hint = remedy;
        end if;
        if not exists (
            select from pg_attribute a
            where a.attrelid = relation and a.attname = wanted.column_name and a.attnum > 0 and not a.attisdropped
        ) then
            raise exception '% has no column "%" any more, which model % reads', relation, wanted.column_name, m.name
                using errcode = 'undefined_column', hint = remedy;
        end if;
        found := vae_private.column_type(relation, wanted.column_name, wanted.column_name);
        if found <> wanted.column_type then
            raise exception 'column "%" of % has the type %, model % was made for %',
                wanted.column_name, relation, found, m.name, wanted.column_type
                using errcode = 'datatype_mismatch', hint = remedy;
        end if;
    end loop;
    for wanted in
        select * from (values
            (m.users_schema, m.users_table, m.users_key_column, 'user_features', m.user_features),
            (m.items_schema, m.items_table, m.items_key_column, 'item_features', m.item_features)
        ) as c (table_schema, table_name, key_column, argument, chosen)
        where c.table_name is not null
    loop
        relation := vae_private.shop_table(wanted.table_schema, wanted.table_name);
        select n.name into gone
        from unnest(wanted.chosen) with ordinality as n (name, place)
        where not exists (
            select from vae_private.table_features(relation, wanted.key_column, wanted.argument) f
            where f.column_name = n.name and f.kind is not null)
        order by n.place
        limit 1;
        if gone is not null then
            raise exception '% has no column "%" any more that model % can read as a feature', relation, gone, m.name
                using errcode = 'undefined_column',
                    hint = format('restore it, or choose others: select vae.set_features(%L, %s => array[...]); there are: '
                        'select * from vae.feature_columns(%1$L)', m.name, wanted.argument);
        end if;
    end loop;
end;
$$;

comment on function vae_private.check_tables(vae.models) is
    'Refuses where a table of a model is gone or has other columns than when the model was made.';


create or replace function vae_private.missing_grants(model_id integer)
returns text
language sql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
-- What a table is read for: the mapped columns of the events, the key and the features of users and items.
with read as (
    select 1 as place, m.events_schema as schema_name, m.events_table as table_name, array[
        m.user_id_column, m.item_id_column, m.event_type_column, m.occurred_at_column, m.quantity_column, m.exposure_column]::text[] as columns
    from vae.models m
    where m.model_id = missing_grants.model_id
    union all
    select 2, m.users_schema, m.users_table, m.users_key_column || m.user_features
    from vae.models m
    where m.model_id = missing_grants.model_id and m.users_table is not null
    union all
    select 3, m.items_schema, m.items_table, m.items_key_column || m.item_features
    from vae.models m
    where m.model_id = missing_grants.model_id and m.items_table is not null
), found as (
    select r.*, n.oid as schema_id, c.oid as table_id
    from read r
    join pg_namespace n on n.nspname = r.schema_name
    join pg_class c on c.relnamespace = n.oid and c.relname = r.table_name
), missing as (
    select distinct 0 as place, format('grant usage on schema %I', f.schema_name) as statement
    from found f
    where not has_schema_privilege(f.schema_id, 'usage')
    union all
    -- Of the events all, the shorter statement; but not where the columns that are read are granted one by one.
    select f.place, format('grant select%s on %I.%I', case when f.place > 1 then c.list end, f.schema_name, f.table_name)
    from found f
    cross join lateral (
        select ' (' || string_agg(quote_ident(a.name), ', ' order by a.place) || ')' as list,
            bool_and(has_column_privilege(f.table_id, a.name, 'select')) as may_read
        from unnest(f.columns) with ordinality as a (name, place)
        join pg_attribute t on t.attrelid = f.table_id and t.attname = a.name and not t.attisdropped
    ) c
    where not has_table_privilege(f.table_id, 'select') and c.may_read is not true
)
select string_agg(
    m.statement || ' to ' || quote_ident(current_user), '; ' order by m.place, m.statement) as statements
from missing m
$$;

comment on function vae_private.missing_grants(integer) is
    'Gives the statements that grant what the caller lacks to read a model''s tables; null where nothing is missing.';


create or replace function vae_private.check_grants(m vae.models, through text default null)
returns void
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    relation text;
begin
    foreach relation in array case
        -- A view asks for no right on the schemas of the tables.
        when through is not null then array[format('%I.%I', m.name, through)]
        else array_remove(array[
            format('%I.%I', m.events_schema, m.events_table),
            case when m.users_table is not null then format('%I.%I', m.users_schema, m.users_table) end,
            case when m.items_table is not null then format('%I.%I', m.items_schema, m.items_table) end
        ], null)
    end loop
        begin
            -- Of a table it asks for one column, whichever: whoever may read some may read those that the model reads.
            execute format('select from %s limit 0', relation);
        exception
            when insufficient_privilege then
                raise exception '%', sqlerrm
                    using errcode = 'insufficient_privilege',
                        hint = format('the shop''s tables are read with the rights of whoever asks; their owner can allow it: %s',
                            vae_private.missing_grants(m.model_id));
            when undefined_table or invalid_schema_name then
                null;  -- check_tables and check_views say what to do.
        end;
    end loop;
end;
$$;

comment on function vae_private.check_grants(vae.models, text) is
    'Refuses a caller who may not read the tables of a model, or what one of its views reads, with the grants that are missing.';


create or replace function vae_private.check_schema(m vae.models)
returns void
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    if to_regnamespace(quote_ident(m.name)) is null then
        raise exception 'schema % of model % is gone', m.name, m.name
            using errcode = 'invalid_schema_name',
                hint = format('if it was renamed: alter schema ... rename to %I; else: select vae.drop_model(%L)', m.name, m.name);
    end if;
end;
$$;

comment on function vae_private.check_schema(vae.models) is 'Refuses where the schema of a model is gone.';


create or replace function vae_private.check_owner_role(model text, owner name, needed name)
returns void
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    -- Who installed pgvae needs none: where there is no PL/Python, that is mostly who owns the models.
    if not pg_has_role(owner, needed, 'usage')
        and not pg_has_role(owner, (select n.nspowner from pg_namespace n where n.nspname = 'vae_private'), 'usage')
    then
        raise exception 'the owner of model %, %, does not hold the rights of %', model, owner, needed
            using errcode = 'insufficient_privilege', hint = format('grant vae_trainer to %I', owner);
    end if;
end;
$$;

comment on function vae_private.check_owner_role(text, name, name) is
    'Refuses where the owner of a model lacks one of pgvae''s roles, as after it was handed over with reassign owned.';


create or replace function vae_private.moved_table(m vae.models)
returns text
language sql
stable
called on null input
parallel safe
security invoker
set search_path = pg_catalog, pg_temp
as $$
-- A view follows a table that is renamed; the functions take the one that has its name.
select format('%I.%I', t.table_schema, t.table_name)
from (values
    (1, m.events_schema, m.events_table), (2, m.users_schema, m.users_table), (3, m.items_schema, m.items_table)
) as t (place, table_schema, table_name)
where t.table_name is not null and not exists (
    select from pg_depend d
    join pg_rewrite r on d.classid = 'pg_rewrite'::regclass and r.oid = d.objid
    join pg_class v on v.oid = r.ev_class and v.relname = 'clean_events'
    join pg_namespace vn on vn.oid = v.relnamespace and vn.nspname = m.name
    join pg_class c on d.refclassid = 'pg_class'::regclass and c.oid = d.refobjid and c.relname = t.table_name
    join pg_namespace n on n.oid = c.relnamespace and n.nspname = t.table_schema)
order by t.place
limit 1
$$;

comment on function vae_private.moved_table(vae.models) is
    'Gives the first table of a model that the views of its schema do not read, since it is gone or they read another one; else null.';


create or replace function vae_private.lost_columns(m vae.models)
returns text
language sql
stable
called on null input
parallel safe
security invoker
set search_path = pg_catalog, pg_temp
as $$
-- A view follows a column that is renamed; the functions take the one that has its name.
select string_agg(format('%I.%I.%I', t.table_schema, t.table_name, k.name), ', ' order by t.place, k.position)
from (values
    (1, m.events_schema, m.events_table, array[
        m.user_id_column, m.item_id_column, m.event_type_column, m.occurred_at_column, m.quantity_column, m.exposure_column]::text[]),
    (2, m.users_schema, m.users_table, m.users_key_column || m.user_features),
    (3, m.items_schema, m.items_table, m.items_key_column || m.item_features)
) as t (place, table_schema, table_name, columns)
join pg_namespace n on n.nspname = t.table_schema
join pg_class c on c.relnamespace = n.oid and c.relname = t.table_name
cross join unnest(t.columns) with ordinality as k (name, position)
where k.name is not null
    and not exists (select from pg_attribute a where a.attrelid = c.oid and a.attname = k.name and not a.attisdropped)
$$;

comment on function vae_private.lost_columns(vae.models) is
    'Gives the columns that a model reads and that its tables do not have any more, after a rename for example; else null.';


create or replace function vae_private.check_views(m vae.models)
returns void
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    moved constant text := vae_private.moved_table(m);
begin
    perform vae_private.check_schema(m);
    if exists (
        select from vae_private.model_objects(m.model_id) o
        where o.kind = 'view' and to_regclass(format('%I.%I', m.name, o.object)) is null
            -- What reads a materialized view hangs on no table of the shop.
            and o.object not in ('stored_recommendations', 'stored_digests', 'demand_deviations')
            and o.object || '_materialized' not in (select p.object from vae_private.model_objects(m.model_id) p)
    ) then
        raise exception 'the views of model % are gone', m.name
            using errcode = 'undefined_table',
                hint = format('dropping one of its tables with cascade took them along; its owner remakes them:'
                    ' select vae.rebuild_model(%L)', m.name);
    end if;
    if moved is not null then
        raise exception 'the views of model % read another table than %', m.name, moved
            using errcode = 'undefined_table',
                hint = format('the table was renamed: rename it back; or, once there is a new one of that name, the model''s owner'
                    ' remakes the views: select vae.rebuild_model(%L)', m.name);
    end if;
end;
$$;

comment on function vae_private.check_views(vae.models) is
    'Refuses where the schema of a model is gone, or a view in it that reads the shop''s tables, or where it reads others.';


create or replace function vae_private.build_event_views(m vae.models)
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
    -- From 15 on a view can read with the rights of whoever asks; before, the views read with the owner's.
    invoker constant text := case
        when current_setting('server_version_num')::integer >= 150000 then ' with (security_invoker = true)' else '' end;
begin
    -- The 90th percentile says what a busy day is in this shop: wholesalers order hundreds of lines at once. A higher
    -- one would be the bot itself where users are few.
    execute format(
        E'create or replace view %I.outlier_users%s as'
        '\nwith days as ('
        '\n    select e.%I%s as user_id, count(*) as events'
        '\n    from %I.%I e'
        '\n    where e.%I is not null and e.%I >= %s and e.%I <= %s%s'
        '\n    group by e.%I, %s'
        '\n),'
        '\nbusiest as ('
        '\n    select d.user_id, max(d.events) as busiest_day_events, sum(d.events)::bigint as events from days d group by d.user_id'
        '\n)'
        '\nselect b.user_id, b.busiest_day_events, l.threshold, b.events'
        '\nfrom busiest b'
        '\ncross join ('
        '\n    select greatest(%s, 10 * percentile_cont(0.9) within group (order by busiest_day_events)) as threshold from busiest'
        '\n) l'
        '\nwhere b.busiest_day_events > l.threshold',
        m.name, invoker, m.user_id_column, case u when 'text' then '::text' else '' end,
        m.events_schema, m.events_table, m.user_id_column,
        m.occurred_at_column, vae_private.earliest(m),
        m.occurred_at_column, vae_private.time_literal(m.occurred_at_type, 'statement_timestamp()'),
        concat(
            case when m.exposure_column is not null then format(' and e.%I is null', m.exposure_column) end,
            -- What is ignored is nothing that the user did, a robot's heartbeat for example.
            case when m.event_type_column is not null then format(
                ' and coalesce(e.%I::text <> all (array(select t.name from vae.event_types t'
                ' where t.model_id = %s and t.event_type = ''ignore'')), true)', m.event_type_column, m.model_id) end),
        m.user_id_column,
        case m.occurred_at_type
            when 'timestamptz' then format('(e.%I at time zone ''UTC'')::date', m.occurred_at_column)
            else format('e.%I::date', m.occurred_at_column) end,
        (m.options -> 'outlier_events_per_day')::text::float8);
    execute format('create or replace view %I.clean_events%s as %s', m.name, invoker, vae_private.clean_select(m.model_id, 'training'));
    if m.users_table is not null then
        execute format('create or replace view %I.user_features%s as %s', m.name, invoker, vae_private.feature_select(m.model_id, 'users', 'all keys'));
    end if;
    if m.items_table is not null then
        execute format('create or replace view %I.item_features%s as %s', m.name, invoker, vae_private.feature_select(m.model_id, 'items', 'all keys'));
    end if;

    -- Two views: what reads no digest shall need no right to the columns of features.
    execute format('create or replace view %I.refresh_events%s as %s', m.name, invoker,
        vae_private.refresh_select(m.model_id, is_digested => false));
    execute format('create or replace view %I.digested_events%s as %s', m.name, invoker,
        vae_private.refresh_select(m.model_id, is_digested => true));
    -- A sum, not bit_xor: two equal events would cancel each other.
    execute format(
        E'create or replace view %1$I.refresh_digests%2$s as'
        '\nselect e.user_id, (sum(e.digest) %% 9223372036854775783)::bigint as digest from %1$I.digested_events e group by e.user_id',
        m.name, invoker);
end;
$$;

comment on function vae_private.build_event_views(vae.models) is
    'Makes or remakes the views of a model''s schema that read the shop''s tables; part of vae_private.build_model.';


create or replace function vae_private.make_function(model text, signature text, result text, body text)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    -- The body is quoted as a literal: a column's name could hold any dollar quote.
    execute format(
        'create or replace function %I.%s returns %s'
        ' language sql stable called on null input parallel unsafe security invoker set search_path = pg_catalog, pg_temp as %L',
        model, signature, result, E'\n' || body || E'\n');
end;
$$;

comment on function vae_private.make_function(text, text, text, text) is
    'Makes or remakes a function of a model''s schema, of one query in SQL; part of vae_private.build_model.';


create or replace function vae_private.make_planned_function(model text, signature text, result text, body text)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    execute format(
        'create or replace function %I.%s returns %s'
        ' language plpgsql stable called on null input parallel unsafe security invoker set search_path = pg_catalog, pg_temp as %L',
        model, signature, result, E'\n#variable_conflict use_column\nbegin\nreturn query\n' || body || E';\nend\n');
end;
$$;

comment on function vae_private.make_planned_function(text, text, text, text) is
    'Makes or remakes a set-returning function of one query whose plan a session keeps, for live calls: before PostgreSQL 18 a function in SQL '
    'is planned anew in each call. PL/pgSQL wants arguments and columns of different names; part of vae_private.build_model.';


create or replace function vae_private.build_live_functions(m vae.models)
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
begin
    perform vae_private.make_planned_function(
        m.name, format('history(user_id %s)', u), format('table (item_id %s, event_type text, occurred_at timestamptz)', i),
        format(E'select c.item_id::%s, c.event_type, c.occurred_at from (\n%s\n) c order by c.occurred_at',
            i, vae_private.clean_select(m.model_id, 'one user')));
    if m.users_table is not null then
        perform vae_private.make_planned_function(
            m.name, format('features(user_id %s)', u), 'table (features jsonb)',
            format(E'select s.features from (\n%s\n) s', vae_private.feature_select(m.model_id, 'users', 'one key')));
    end if;
    perform vae_private.make_planned_function(
        m.name, format('recommend(user_id %s, k integer default 10, options jsonb default null)', u),
        format('table (rank integer, item_id %s, score real, is_cold_start boolean, model_version integer, probability real)', i),
        format(
            E'select r.rank, r.item_key::%s, r.score, r.is_cold_start, r.model_version, r.probability'
            '\nfrom vae_private.recommend(%s, $1::text, $2, $3) r'
            '\norder by r.rank',
            i, m.model_id));
    perform vae_private.make_planned_function(
        m.name, format('recommend_for_users(user_ids %s[], k integer default 10, options jsonb default null)', u),
        format('table (user_id %s, rank integer, item_id %s, score real, is_cold_start boolean, model_version integer, probability real)',
            u, i),
        format(
            E'select r.user_key::%s, r.rank, r.item_key::%s, r.score, r.is_cold_start, r.model_version, r.probability'
            '\nfrom vae_private.recommend_for_users(%s, $1::text[], $2, $3) r',
            u, i, m.model_id));
    perform vae_private.make_function(
        m.name, format('score(user_id %s, item_id %s)', u, i), 'real',
        format('select vae_private.score(%s, $1::text, $2::text)', m.model_id));
    perform vae_private.make_function(
        m.name, format('score_pairs(user_ids %s[], item_ids %s[])', u, i),
        format('table (user_id %s, item_id %s, score real)', u, i),
        format(
            E'select p.user_key::%s, p.item_key::%s, p.score'
            '\nfrom vae_private.score_pairs(%s, $1::text[], $2::text[]) p',
            u, i, m.model_id));
    perform vae_private.make_function(
        m.name, format('embedding(user_id %s)', u), 'real[]',
        format('select vae_private.embedding(%s, $1::text)', m.model_id));
end;
$$;

comment on function vae_private.build_live_functions(vae.models) is
    'Makes or remakes the functions of a model''s schema that read and score one user; part of vae_private.build_model.';


create or replace function vae_private.build_model(model_id integer)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    m vae.models;
    owner name;
    locked text;
    patience constant text := current_setting('lock_timeout');
    caller constant name := current_user;
    role_before constant text := current_setting('role');
begin
    -- Locked: a session whose default is serializable sees the model as it was before it waited for another change, and would make the
    -- views of that without a word. Like this PostgreSQL refuses it.
    select * into m from vae.models where models.model_id = build_model.model_id for no key update;
    perform vae_private.check_schema(m);
    select r.rolname into owner from pg_namespace n join pg_roles r on r.oid = n.nspowner where n.nspname = m.name;
    perform vae_private.check_owner_role(m.name, owner, 'vae_trainer');
    if owner <> caller then
        -- What a superuser, or a member of the owner, made would not be the owner's, who could not remake it.
        begin
            perform set_config('role', owner, true);
        exception when insufficient_privilege then
            raise exception 'model % belongs to %', m.name, owner
                using errcode = 'insufficient_privilege', hint = format('act as its owner: set role %I', owner);
        end;
    end if;
    perform vae_private.check_tables(m);
    perform vae_private.drop_retired(m);
    -- Whoever reads a view locks it before the views beneath it, and the shop's events (up to step 6) before what is stored: locked in
    -- another order, they would end in deadlocks.
    -- While this waits for a transaction that stays open, as that of pg_dump, whoever wants to read waits behind it.
    if patience = '0' then
        perform set_config('lock_timeout', '10s', true);
    end if;
    begin
        for locked in
            select o.object
            from vae_private.model_objects(m.model_id) o
            where o.kind = 'view' and to_regclass(format('%I.%I', m.name, o.object)) is not null
            order by o.step > 6, o.step desc, o.object
        loop
            execute format('alter view %I.%I reset (check_option)', m.name, locked);
        end loop;
    exception when lock_not_available then
        raise exception 'the views of model % are in use by a transaction that stays open', m.name
            using errcode = 'lock_not_available',
                hint = 'find it: select pid, usename, state, query from pg_stat_activity where xact_start is not null order by xact_start;'
                    ' nothing was changed, try again once it is over';
    end;
    perform vae_private.build_event_views(m);
    perform vae_private.build_live_functions(m);
    -- Before recommendations, whose view reads churn_materialized.
    perform vae_private.build_churn(m);
    perform vae_private.build_audiences(m);
    perform vae_private.build_offers(m);
    perform vae_private.build_uplift(m);
    perform vae_private.build_recommendations(m);
    perform vae_private.build_explain(m);
    perform vae_private.build_related(m);
    perform vae_private.build_demand(m);
    perform vae_private.build_segments(m);
    perform vae_private.comment_model(m);
    perform vae_private.grant_model(m);
    update vae.models set rebuild_error = null where models.model_id = m.model_id and models.rebuild_error is not null;
    perform set_config('lock_timeout', patience, true);
    if owner <> caller then
        perform set_config('role', role_before, true);
    end if;
end;
$$;

comment on function vae_private.build_model(integer) is
    'Makes or remakes the functions and views of a model''s schema, except materialized content, as the model''s owner.';


create or replace function vae_private.grant_model(m vae.models)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    made record;
begin
    -- Roles say what may be done, usage of the schema says with which model: that grant is the owner's to give.
    for made in
        select * from vae_private.model_objects(m.model_id) o
        where o.kind = 'function' or to_regclass(format('%I.%I', m.name, o.object)) is not null
    loop
        if made.kind = 'function' then
            execute format('revoke all on function %I.%s from public', m.name, made.object);
            execute format('grant execute on function %I.%s to vae_scorer', m.name, made.object);
        elsif made.kind = 'materialized view' or made.object = 'stored_recommendations' then
            -- The owner's alone, whatever default privileges say: the views above hide digests, who is gone, and what is
            -- revoked on them.
            execute format('revoke all on %I.%s from vae_reader, vae_scorer, vae_operator, vae_trainer', m.name, made.object);
        elsif made.object in ('segments', 'offers')
            or made.object || '_materialized' in (select o.object from vae_private.model_objects(m.model_id) o)
        then
            execute format('grant select on %I.%s to vae_reader', m.name, made.object);
        elsif made.object in ('stored_digests', 'demand_deviations') then
            execute format('grant select on %I.%s to %s', m.name, made.object,
                case made.object when 'demand_deviations' then 'vae_scorer' else 'vae_operator' end);
        elsif current_setting('server_version_num')::integer >= 150000 then
            -- They run with the rights of whoever reads them; an audience is found among all users.
            execute format('grant select on %I.%s to %s', m.name, made.object,
                case when made.object in ('refresh_events', 'user_features', 'item_features') then 'vae_scorer' else 'vae_operator' end);
        end if;
    end loop;
end;
$$;

comment on function vae_private.grant_model(vae.models) is 'Gives the roles their rights on the objects of a model''s schema.';


create or replace function vae_private.build_all_models()
returns integer
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    each record;
    built integer := 0;
begin
    -- A release may know options that a model of an earlier one was not given.
    update vae.models m
    set options = vae_private.default_options() || m.options || jsonb_build_object(
        'max_share', (vae_private.default_options() -> 'max_share') || (m.options -> 'max_share'));
    -- A schema that is renamed meanwhile may come back, with what the last release made of it.
    update vae.models m
    set rebuild_error = 'its schema was gone'
    where not exists (select from pg_namespace n where n.nspname = m.name);
    for each in
        select m.model_id, m.name
        from vae.models m
        join pg_namespace n on n.nspname = m.name
        order by m.model_id
    loop
        begin
            perform vae_private.build_model(each.model_id);
            built := built + 1;
        exception when others then
            -- A model whose tables were dropped or changed keeps no other model from the upgrade. vae.health goes on telling of it.
            update vae.models m set rebuild_error = sqlerrm where m.model_id = each.model_id;
            raise warning 'model % is not rebuilt: %', each.name, sqlerrm
                using hint = format('mend that, then: select vae.rebuild_model(%L)', each.name);
        end;
    end loop;
    return built;
end;
$$;

comment on function vae_private.build_all_models() is 'Remakes the schemas of all models, each as its owner; part of pgvae install.';


create or replace function vae.rebuild_model(model text)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    perform vae_private.build_model((vae_private.locked_model(model)).model_id);
end;
$$;

comment on function vae.rebuild_model(text) is
    'Remakes the functions and views of a model, for example after its event table was dropped with cascade and made anew.';
