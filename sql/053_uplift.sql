-- Randomised experiments among the events: who was offered what by chance, and what an offer changes.

create or replace function vae_private.uplift(model_id integer, user_key text, item_key text)
returns real
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].uplift(plpy, model_id, user_key, item_key)
$pgvae$;

comment on function vae_private.uplift(integer, text, text) is
    'Gives by how much an offer raises the probability that a user of a model buys an item, by keys, for <model>.uplift.';


create or replace function vae_private.assignment_select(m vae.models)
returns text
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    return format(
        E'select a.user_id, a.item_id, a.occurred_at, a.is_exposed,'
        '\n    bool_or(a.is_exposed) over near <> bool_and(a.is_exposed) over near as is_conflicting'
        '\nfrom ('
        '\n    select'
        '\n        e.%1$I%2$s as user_id,'
        '\n        e.%3$I%4$s as item_id,'
        '\n        %5$s as occurred_at,'
        '\n        e.%6$I as is_exposed'
        '\n    from %7$I.%8$I e'
        '\n    where %9$s'
        '\n) a'
        '\nwindow near as ('
        '\n    partition by a.user_id, a.item_id order by a.occurred_at'
        '\n    range between ''%10$s hours''::interval preceding and ''%10$s hours''::interval following)',
        m.user_id_column, case m.user_id_type when 'text' then '::text' else '' end,
        m.item_id_column, case m.item_id_type when 'text' then '::text' else '' end,
        vae_private.event_time(m),
        m.exposure_column::text, m.events_schema, m.events_table,
        array_to_string(
            vae_private.admission_rules(m, 'assignments') || format('e.%I is not null', m.exposure_column), E'\n        and '),
        24 * (m.options ->> 'horizon_days')::integer
    );
end;
$$;

comment on function vae_private.assignment_select(vae.models) is
    'Writes the query that gives the usable assignments of a model''s experiments, and whether the user was both within a horizon.';


create or replace function vae.set_exposure(model text, exposure_column text)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    m vae.models := vae_private.locked_model(model);
begin
    perform vae_private.check_tables(m);
    perform vae_private.check_exposure(format('%I.%I', m.events_schema, m.events_table)::regclass, set_exposure.exposure_column);
    update vae.models set exposure_column = set_exposure.exposure_column where models.model_id = m.model_id;
    perform vae_private.build_model(m.model_id);
    if set_exposure.exposure_column is null then
        execute format('drop view if exists %I.clean_assignments', m.name);
    end if;
end;
$$;

comment on function vae.set_exposure(text, text) is
    'Names the column of a model''s events that marks the rows of a randomised experiment, a boolean: true, the offer of the item was '
    'made, false, it was withheld by chance, null in all other events. Marked rows are no behaviour from then on; the next training '
    'learns uplift from them. Null: there is no experiment any more.';


create or replace function vae_private.check_assignments(m vae.models)
returns table (check_name text, status text, row_count bigint, share double precision, threshold double precision, remedy text)
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    -- What training asks of the older half and of the newer one, see docs/outcomes.md.
    enough constant bigint := 200;
    counts record;
    usable record;
begin
    execute format(
        'select count(*) as total,'
        ' count(*) filter (where e.%1$I is null) as no_user,'
        ' count(*) filter (where e.%2$I is null) as no_item,'
        ' count(*) filter (where e.%3$I is null) as no_time,'
        ' count(*) filter (where e.%3$I > %5$s or e.%3$I < %4$s) as wrong_time'
        ' from %6$I.%7$I e where e.%8$I is not null',
        m.user_id_column, m.item_id_column, m.occurred_at_column, vae_private.earliest(m),
        vae_private.time_literal(m.occurred_at_type, 'statement_timestamp()'),
        m.events_schema, m.events_table, m.exposure_column
    ) into counts;
    execute format(
        'select count(*) as admitted, count(*) filter (where a.is_conflicting) as conflicting,'
        ' count(*) filter (where a.is_exposed and not a.is_conflicting) as exposed,'
        ' count(*) filter (where not a.is_exposed and not a.is_conflicting) as withheld from (%s) a',
        vae_private.assignment_select(m)
    ) into usable;
    return query
    select c.check_name,
        case when not c.bad then 'pass' when c.fails then 'fail' else 'warn' end,
        c.row_count, c.share, c.threshold, case when c.bad then c.remedy end
    from (
        select v.place, v.check_name, v.row_count > 0 as bad,
            v.row_count > (m.options -> 'max_share' ->> v.check_name)::float8 * counts.total as fails,
            v.row_count, v.row_count / greatest(counts.total, 1)::float8 as share,
            (m.options -> 'max_share' ->> v.check_name)::float8 as threshold, v.remedy
        from (values
            (1, 'unusable_assignments', counts.total - usable.admitted,
                format('assignments (rows whose %I is true or false) are left out without a user (%s), an item (%s) or a time (%s), with a time in '
                    'the future or before %s (%s), and where the key is too long or missing from the table of users or items',
                    m.exposure_column, counts.no_user, counts.no_item, counts.no_time, m.options ->> 'earliest', counts.wrong_time)),
            (2, 'conflicting_assignments', usable.conflicting,
                format('an offer of the same item was both made to the user and withheld within %s days, so that no outcome is of either: '
                    'such assignments are left out; keep one a horizon', m.options ->> 'horizon_days'))
        ) as v (place, check_name, row_count, remedy)
        union all
        select 3, 'enough_assignments', least(usable.exposed, usable.withheld) < enough, false,
            least(usable.exposed, usable.withheld), null, enough::float8,
            format('%s exposed and %s withheld: with so few no uplift is claimed; go on with the experiment', usable.exposed, usable.withheld)
    ) c
    order by c.place;
end;
$$;

comment on function vae_private.check_assignments(vae.models) is
    'Checks the assignments of a model''s experiments; part of vae.check_events.';


create or replace function vae_private.build_uplift(m vae.models)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    if m.exposure_column is not null then
        execute format(
            E'create or replace view %I.clean_assignments%s as'
            '\nselect c.user_id, c.item_id, c.occurred_at, c.is_exposed from (\n%s\n) c where not c.is_conflicting',
            m.name, case when current_setting('server_version_num')::integer >= 150000 then ' with (security_invoker = true)' end,
            vae_private.assignment_select(m));
    end if;
    perform vae_private.make_function(
        m.name, format('uplift(user_id %s, item_id %s)', m.user_id_type, m.item_id_type), 'real',
        format('select vae_private.uplift(%s, $1::text, $2::text)', m.model_id));
    perform vae_private.comment_column(m.name, c.relation, c.column_name, c.comment)
    from (
        values
            ('clean_assignments', 'user_id', 'Key of the user.'),
            ('clean_assignments', 'item_id', 'Key of the item that was offered, or would have been.'),
            ('clean_assignments', 'occurred_at', 'When chance decided.'),
            ('clean_assignments', 'is_exposed', 'True: the offer was made; false: it was withheld.'),
            ('offer_responses_materialized', 'uplift', 'By how much the offer raises the probability of buying; null where the version claims none.'),
            ('offer_responses', 'uplift', 'By how much the offer raises the probability of buying: P(buys if offered) less P(buys if not). Null where the version '
                'claims none (no_uplift of vae.versions says why) and for an offer of several items.'),
            ('offer_responses', 'incremental_profit', 'uplift times what a buyer brings, less the cost of asking: what the offer itself brings; null where uplift is.'),
            ('offers', 'choose_by', 'What ranks and chooses the users: response or uplift.'),
            ('offers', 'incremental_buyers', 'How many buy because of the offer; more than expected_buyers where such users had few offers so far, for these are counted '
                'from what they bought then. Null where the version claims no uplift (no_uplift of vae.versions says why) and for an offer of several items.'),
            ('offers', 'incremental_profit', 'incremental_buyers times what a buyer brings, less total_cost: what the offer itself brings; null as incremental_buyers.')
    ) as c (relation, column_name, comment);
end;
$$;

comment on function vae_private.build_uplift(vae.models) is
    'Makes or remakes what a model''s schema holds about uplift; part of vae_private.build_model.';
