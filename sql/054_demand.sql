-- What to stock: the units of an item that will be sold within the horizon, and to how many buyers.

create or replace function vae_private.item_days_select(m vae.models, item_id text, as_of text, since text, event_types text)
returns text
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    -- By user first: a user counts once a day, whatever a robot does.
    return format(
        E'select s.item_id, s.day, sum(s.units) as units,'
        '\n    count(*) filter (where s.sales > 0 and s.user_id is not null)::integer as buyers,'
        '\n    sum(s.views)::integer as views, sum(s.carts)::integer as carts'
        '\nfrom ('
        '\n    select d.item_id, d.user_id, floor(extract(epoch from %3$s - d.occurred_at) / 86400)::integer as day,'
        '\n        coalesce(sum(d.quantity) filter (where d.event_type = any (%5$s)), 0) as units,'
        '\n        count(*) filter (where d.event_type = any (%5$s)) as sales,'
        '\n        least(count(*) filter (where d.event_type = ''view''), case when d.user_id is not null then 1 end) as views,'
        '\n        least(count(*) filter (where d.event_type = ''add_to_cart''), case when d.user_id is not null then 1 end) as carts'
        '\n    from ('
        '\n%1$s'
        '\nunion all'
        '\n%2$s'
        '\n    ) d'
        '\n    where d.occurred_at <= %3$s and d.occurred_at > %4$s%6$s'
        '\n    group by d.item_id, d.user_id, 3'
        '\n) s'
        '\ngroup by s.item_id, s.day',
        vae_private.clean_select(m.model_id, 'sales to users'), vae_private.clean_select(m.model_id, 'anonymous sales'),
        as_of, since, event_types, case when item_id is not null then format(' and d.item_id = %s', item_id) end);
end;
$$;

comment on function vae_private.item_days_select(vae.models, text, text, text, text) is
    'Writes the query that gives what happened to a model''s items by day: of one item, or of all where item_id is null.';


create or replace function vae_private.build_demand(m vae.models)
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
    numbers constant text := E'd.expected_units, d.units_low, d.units_high, d.expected_buyers, d.buyers_low, d.buyers_high,'
        '\n    d.last_period_units, d.horizon_days, d.model_version, d.scored_at';
    numbers_type constant text := 'expected_units float8, units_low float8, units_high float8,'
        ' expected_buyers float8, buyers_low float8, buyers_high float8,'
        ' last_period_units float8, horizon_days integer, model_version integer, scored_at timestamptz';
    span constant text := 'as_of timestamptz default now(), since timestamptz default ''-infinity'','
        ' event_types text[] default array[''purchase'']';
    item_days constant text := format('table (item_id %s, day integer, units float8, buyers integer, views integer, carts integer)', i);
begin
    perform vae_private.make_function(
        m.name, format('item_days(item_id %s, %s)', i, span), item_days, vae_private.item_days_select(m, '$1', '$2', '$3', '$4'));
    perform vae_private.make_function(
        m.name, format('all_item_days(%s)', span), item_days, vae_private.item_days_select(m, null, '$1', '$2', '$3'));
    perform vae_private.make_function(
        m.name, format('demand(item_id %s)', i), format('table (item_id %s, %s)', i, numbers_type),
        format(E'select d.item_key::%s, %s\nfrom vae_private.demand(%s, $1::text) d', i, numbers, m.model_id));
    if to_regclass(format('%I.demand_materialized', m.name)) is null then
        execute format(
            E'create materialized view %I.demand_materialized as'
            '\nselect d.item_key::%s as item_id, %s, d.units_deviation, d.buyers_deviation'
            '\nfrom vae_private.demand_all(%s) d\nwith no data',
            m.name, i, numbers, m.model_id);
    end if;
    if to_regclass(format('%I.demand_item_id', m.name)) is null then
        execute format('create unique index demand_item_id on %I.demand_materialized (item_id)', m.name);
    end if;
    execute format(E'create or replace view %1$I.demand as\nselect d.item_id, %2$s\nfrom %1$I.demand_materialized d', m.name, numbers);
    if m.items_table is not null then
        execute format(
            E'create or replace view %1$I.demand_deviations as'
            '\nselect d.item_id, d.units_deviation, d.buyers_deviation from %1$I.demand_materialized d', m.name);
        perform vae_private.make_function(
            m.name, 'demand_by_category(column_name text default ''category'')',
            format('table (category text, items bigint, %s)', numbers_type),
            format(
                -- 1.2816: the 90 percent quantile of the normal distribution, which a sum of many is close to.
                -- Six decimals, as of an item: more say nothing.
                -- Categories first, for their lock: see vae_private.build_model. The table may have several rows of an item.
                E'select vae_private.check_stored(m, ''demand'') from vae.models m where m.model_id = %1$s;'
                '\nwith categories as ('
                '\n    select distinct f.item_id, f.features ->> $1 as category from %2$I.item_features f where f.features ->> $1 is not null'
                '\n)'
                '\nselect s.category, s.items, round(s.units::numeric, 6)::float8,'
                '\n    round(greatest(s.units - 1.2816 * s.units_deviation, 0)::numeric, 6)::float8,'
                '\n    round((s.units + 1.2816 * s.units_deviation)::numeric, 6)::float8,'
                '\n    round(s.buyers::numeric, 6)::float8,'
                '\n    round(greatest(s.buyers - 1.2816 * s.buyers_deviation, 0)::numeric, 6)::float8,'
                '\n    round((s.buyers + 1.2816 * s.buyers_deviation)::numeric, 6)::float8,'
                '\n    round(s.last_period_units::numeric, 6)::float8, s.horizon_days, s.model_version, s.scored_at'
                '\nfrom ('
                '\n    select f.category, count(*) as items, sum(d.expected_units) as units,'
                '\n        sum(d.expected_buyers) as buyers, sum(d.last_period_units) as last_period_units,'
                '\n        max(d.horizon_days) as horizon_days, max(d.model_version) as model_version, max(d.scored_at) as scored_at,'
                '\n        sqrt(sum(o.units_deviation ^ 2) + (max((v.demand -> ''units'' ->> ''shock'')::float8) * sum(d.expected_units)) ^ 2) as units_deviation,'
                '\n        sqrt(sum(o.buyers_deviation ^ 2) + (max((v.demand -> ''buyers'' ->> ''shock'')::float8) * sum(d.expected_buyers)) ^ 2) as buyers_deviation'
                '\n    from vae_private.item_column(%1$s, $1) c'
                '\n    cross join %2$I.demand d'
                '\n    join %2$I.demand_deviations o on o.item_id = d.item_id'
                '\n    join vae.versions v on v.model_id = %1$s and v.version = d.model_version'
                '\n    left join categories f on f.item_id = d.item_id'
                '\n    group by 1'
                '\n) s'
                '\norder by s.units desc, s.category',
                m.model_id, m.name));
    end if;
    perform vae_private.comment_column(m.name, c.relation, c.column_name, c.comment)
    from (
        select r.relation, c.column_name, c.comment
        from (values ('demand'), ('demand_materialized')) as r (relation)
        cross join (values
            ('item_id', 'Key of the item.'),
            ('expected_units', 'Units that will be sold within the horizon, on average.'),
            ('units_low', 'In nine of ten cases at least as many units are sold.'),
            ('units_high', 'In nine of ten cases at most as many units are sold; between the two bounds in 80 %.'),
            ('expected_buyers', 'Users who will buy the item within the horizon, on average; anonymous buyers are not counted.'),
            ('buyers_low', 'In nine of ten cases at least as many buyers.'),
            ('buyers_high', 'In nine of ten cases at most as many buyers.'),
            ('last_period_units', 'Units that were sold in as many days before.'),
            ('horizon_days', 'Days ahead that the row speaks of.'),
            ('model_version', 'Version that scored the row, see vae.versions.'),
            ('scored_at', 'When the row was scored.')
        ) as c (column_name, comment)
        union all
        select r.relation, c.column_name, c.comment
        from (values ('demand_deviations'), ('demand_materialized')) as r (relation)
        cross join (values
            ('units_deviation', 'Standard deviation of the units around what is expected.'),
            ('buyers_deviation', 'Standard deviation of the buyers around what is expected.')
        ) as c (column_name, comment)
        union all
        values ('demand_deviations', 'item_id', 'Key of the item.')
    ) as c (relation, column_name, comment);
end;
$$;

comment on function vae_private.build_demand(vae.models) is
    'Makes or remakes the functions and views about demand in a model''s schema; part of vae_private.build_model.';


create or replace function vae_private.item_column(id integer, column_name text)
returns table (name text)
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
begin
    select * into m from vae.models where models.model_id = id;
    if column_name is null or column_name <> all (m.item_features) then
        raise exception 'model % reads no column "%" of its items', m.name, coalesce(column_name, 'null')
            using errcode = 'undefined_column',
                hint = format('it reads: %s; choose others with vae.set_features, and refresh',
                    coalesce(nullif(array_to_string(m.item_features, ', '), ''), 'none'));
    end if;
    return query select column_name;
end;
$$;

comment on function vae_private.item_column(integer, text) is
    'Gives a column of a model''s items by name; refuses one that the model does not read as a feature.';


create or replace function vae_private.looks_ahead_from(created_at timestamptz, window_end timestamptz, horizon_days integer)
returns timestamptz
language sql
stable
called on null input
parallel safe
security invoker
set search_path = pg_catalog, pg_temp
as $$
-- A shop that trades was heard of lately: after a quarter of a horizon of silence nothing would be sold but for the
-- silence, and what is silent is an archive.
select case
    when created_at - window_end > greatest(horizon_days / 4.0, 2) * interval '1 day' then window_end
    else statement_timestamp()
end
$$;

comment on function vae_private.looks_ahead_from(timestamptz, timestamptz, integer) is
    'Gives the moment from which a version looks ahead: now, or the end of its training window where it was made of old events.';
