-- The quality gate: what the cleaned view leaves out and why, and whether the rest is enough to train on.

create or replace function vae_private.count_events(m vae.models)
returns table (
    total bigint, null_user_ids bigint, null_item_ids bigint, null_timestamps bigint, future_timestamps bigint, absurd_timestamps bigint,
    returns bigint, unknown_event_types bigint, overlong_ids bigint, orphan_users bigint, orphan_items bigint,
    null_event_types bigint)
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    return query execute format(
        'select count(*) as total,'
        '    count(*) filter (where e.%1$I is null) as null_user_ids,'
        '    count(*) filter (where e.%2$I is null and %3$s) as null_item_ids,'
        '    count(*) filter (where e.%4$I is null) as null_timestamps,'
        '    count(*) filter (where e.%4$I > %6$s) as future_timestamps,'
        '    count(*) filter (where e.%4$I < %5$s) as absurd_timestamps,'
        '    count(*) filter (where %7$s) as returns,'
        '    count(*) filter (where %8$s) as unknown_event_types,'
        '    count(*) filter (where %9$s) as overlong_ids,'
        '    count(*) filter (where %10$s) as orphan_users,'
        '    count(*) filter (where %11$s) as orphan_items,'
        '    count(*) filter (where %16$s) as null_event_types'
        ' from %12$I.%13$I e%14$s%15$s',
        m.user_id_column, m.item_id_column,
        -- Searches and registrations have no item.
        case when m.event_type_column is null then 'true' else 't.event_type is distinct from ''register'' and t.event_type is distinct from ''search''' end,
        m.occurred_at_column, vae_private.earliest(m), vae_private.time_literal(m.occurred_at_type, 'statement_timestamp()'),
        case when m.quantity_column is null then 'false' else format('e.%I <= 0', m.quantity_column) end,
        case when m.event_type_column is null then 'false' else 't.name is null' end,
        concat_ws(' or ',
            case when m.user_id_type = 'text' then format('octet_length(e.%I) > 512', m.user_id_column) end,
            case when m.item_id_type = 'text' then format('octet_length(e.%I) > 512', m.item_id_column) end,
            'false'),
        case when m.users_table is null then 'false' else format('e.%I is not null and u.key is null', m.user_id_column) end,
        case when m.items_table is null then 'false' else format('e.%I is not null and i.key is null', m.item_id_column) end,
        m.events_schema, m.events_table,
        concat(
            case when m.event_type_column is not null then format(
                ' left join vae.event_types t on t.model_id = %s and t.name = e.%I::text', m.model_id, m.event_type_column) end,
            case when m.users_table is not null then format(
                ' left join (select distinct k.%1$I as key from %2$I.%3$I k) u on u.key = e.%4$I%5$s',
                m.users_key_column, m.users_schema, m.users_table, m.user_id_column, vae_private.key_collation(m, 'users')) end,
            case when m.items_table is not null then format(
                ' left join (select distinct k.%1$I as key from %2$I.%3$I k) i on i.key = e.%4$I%5$s',
                m.items_key_column, m.items_schema, m.items_table, m.item_id_column, vae_private.key_collation(m, 'items')) end),
        ' where ' || concat_ws(' and ',
            'true',
            case when m.exposure_column is not null then format('e.%I is null', m.exposure_column) end,
            case when m.event_type_column is not null then 't.event_type is distinct from ''ignore''' end),
        case when m.event_type_column is null then 'false' else format('e.%I is null', m.event_type_column) end
    );
end;
$$;

comment on function vae_private.count_events(vae.models) is
    'Counts the rows of a model''s events, and those that the cleaned events leave out, by reason; part of vae.check_events.';


create or replace function vae_private.unknown_event_types(m vae.models)
returns text[]
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    found text[];
begin
    execute format(
        'select array_agg(u.name) from ('
        ' select e.%1$I::text as name'
        ' from %2$I.%3$I e'
        ' left join vae.event_types t on t.model_id = %4$s and t.name = e.%1$I::text'
        ' where t.name is null and e.%1$I is not null%5$s'
        ' group by 1'
        ' order by count(*) desc, 1'
        ' limit 5) u',
        m.event_type_column, m.events_schema, m.events_table, m.model_id,
        case when m.exposure_column is not null then format(' and e.%I is null', m.exposure_column) end)
    into found;
    return found;
end;
$$;

comment on function vae_private.unknown_event_types(vae.models) is
    'Gives the most frequent event types of a model''s events that have no meaning, five at most; part of vae.check_events.';


create or replace function vae.check_events(model text)
returns table (check_name text, status text, row_count bigint, share double precision, threshold double precision, remedy text)
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    -- Here, and not in the query below: where there is no model a plan may never come to ask for this one.
    id constant integer := vae_private.model_id(model);
    m vae.models;
    counts record;
    duplicates bigint;
    clean record;
    outliers record;
    unknown_types text[];
begin
    select * into m from vae.models where models.model_id = id;
    perform vae_private.check_grants(m);
    perform vae_private.check_tables(m);
    perform vae_private.check_views(m);
    select * into counts from vae_private.count_events(m);
    if counts.unknown_event_types > 0 then
        unknown_types := vae_private.unknown_event_types(m);
    end if;

    -- Of the rows that all other rules admit, those that the distinct of the cleaned events takes away.
    execute format('select (select count(*) from (%s) a) - (select count(*) from (%s) d)',
        vae_private.clean_select(m.model_id, 'admitted rows'), vae_private.clean_select(m.model_id, 'all users'))
    into duplicates;

    return query
    select c.check_name,
        case when c.row_count = 0 then 'pass' when c.row_count > c.threshold * counts.total then 'fail' else 'warn' end,
        c.row_count,
        case when counts.total = 0 then 0 else c.row_count / counts.total::float8 end,
        c.threshold,
        case when c.row_count > 0 then c.remedy end
    from (
        select v.position, v.check_name, v.row_count, (m.options -> 'max_share' ->> v.check_name)::float8 as threshold, v.remedy
        from (values
            (1, 'null_user_ids', counts.null_user_ids,
                format('rows without a user are left out; find them: select * from %I.%I where %I is null', m.events_schema, m.events_table, m.user_id_column)),
            (2, 'null_item_ids', counts.null_item_ids,
                format('rows without an item are left out; find them: select * from %I.%I where %I is null', m.events_schema, m.events_table, m.item_id_column)),
            (3, 'null_timestamps', counts.null_timestamps, 'rows without a time are left out: fill the column'),
            (4, 'overlong_ids', counts.overlong_ids, 'ids of more than 512 bytes are left out: is the right column mapped?'),
            (5, 'unknown_event_types', counts.unknown_event_types,
                case when m.event_type_column is not null then 'rows of event types without a meaning are left out'
                    || case when unknown_types is not null then format(': %s; say what they mean: select vae.set_event_type(%L, %L, ''view''); or that they mean nothing here: ''ignore''',
                    (select string_agg(quote_literal(left(u.name, 60)), ', ' order by u.place) from unnest(unknown_types) with ordinality as u (name, place)),
                    model, unknown_types[1]) else '' end
                    -- A null can be given no meaning.
                    || case when counts.null_event_types > 0 then format(
                        '; rows with no event type at all: %s; fill the column %I, or give a view that does',
                        counts.null_event_types, m.event_type_column) else '' end end),
            (6, 'future_timestamps', counts.future_timestamps, 'rows later than now are left out: check the clocks'
                || case m.occurred_at_type
                    when 'timestamptz' then ' and the time zone of the load'
                    else format('; local times, which are read as UTC, need a view with %1$I%2$s at time zone ''Europe/Berlin'' as %1$I, say',
                        m.occurred_at_column, case m.occurred_at_type when 'date' then '::timestamp' else '' end) end),
            (7, 'absurd_timestamps', counts.absurd_timestamps,
                format('rows before %s are left out; move the limit: select vae.set_options(%L, ''{"earliest": "..."}'')', m.options ->> 'earliest', m.name)),
            (8, 'orphan_users', counts.orphan_users, 'rows whose user is missing from the table of users are left out: load the users'),
            (9, 'orphan_items', counts.orphan_items, 'rows whose item is missing from the table of items are left out: load the items'),
            (10, 'returns', counts.returns, 'rows with a quantity of zero or less (returns, cancellations) are left out'),
            (11, 'duplicates', duplicates, 'rows with the same user, item, event type and time count once')
        ) as v (position, check_name, row_count, remedy)
    ) c
    order by c.position;

    -- The cleaned events are computed once.
    execute format(
        'with clean as materialized (select c.user_id, c.item_id, c.occurred_at from %1$I.clean_events c),'
        ' per_item as (select count(*) as events, min(occurred_at) as first, max(occurred_at) as last from clean group by item_id)'
        ' select coalesce(sum(p.events), 0)::bigint as events, count(*) as items,'
        ' (select count(*) from (select distinct c.user_id from clean c) u) as users,'
        ' count(*) filter (where p.events = 1) as items_once,'
        ' coalesce(max(p.last) - min(p.first), ''0'') as span'
        ' from per_item p', m.name
    ) into clean;

    execute format('select count(*) as users, coalesce(sum(o.events), 0)::bigint as events from %I.outlier_users o', m.name)
    into outliers;

    return query
    select c.check_name,
        case when not c.bad then 'pass' when c.fails then 'fail' else 'warn' end,
        c.row_count, c.share, c.threshold, case when c.bad then c.remedy end
    from (values
        (1, 'outlier_users', outliers.users > 0,
            outliers.events > (m.options -> 'max_share' ->> 'outlier_users')::float8 * counts.total,
            outliers.events, outliers.events / greatest(counts.total, 1)::float8, (m.options -> 'max_share' ->> 'outlier_users')::float8,
            format('outliers (%s) with more events on a day than people have are left out; see: select * from %I.outlier_users', outliers.users, m.name)),
        (2, 'items_seen_once', clean.items_once > 0.5 * clean.items,
            clean.items_once > (m.options -> 'max_share' ->> 'items_seen_once')::float8 * clean.items,
            clean.items_once, clean.items_once / greatest(clean.items, 1)::float8, (m.options -> 'max_share' ->> 'items_seen_once')::float8,
            'little can be learned of items with one event: map variants to one item, or load a longer history'),
        (3, 'enough_events', clean.events < (m.options ->> 'min_events')::bigint, true,
            clean.events, null::float8, (m.options ->> 'min_events')::float8,
            'too few clean events to learn from: load more history, or mend the rows that the checks above leave out'),
        (4, 'enough_users', clean.users < (m.options ->> 'min_users')::bigint, true,
            clean.users, null, (m.options ->> 'min_users')::float8, 'too few users to learn from: load more history'),
        (5, 'enough_items', clean.items < (m.options ->> 'min_items')::bigint, true,
            clean.items, null, (m.options ->> 'min_items')::float8, 'too few items to learn from: load more history'),
        (6, 'enough_days', clean.span < interval '7 days', false,
            extract(day from clean.span)::bigint, null, 7,
            'a split by time needs days of history: metrics on so short a window say little')
    ) as c (position, check_name, bad, fails, row_count, share, threshold, remedy)
    order by c.position;

    if m.exposure_column is not null then
        return query select * from vae_private.check_assignments(m);
    end if;
end;
$$;

comment on function vae.check_events(text) is
    'Checks a model''s events before training: a row per check with its status (pass, warn, fail), the rows concerned, '
    'their share, the threshold above which (for enough_...: below which) the check fails, and what to do. '
    'Training refuses when a check fails.';
