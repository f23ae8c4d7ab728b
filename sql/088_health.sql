-- What is wrong with a model, from the logs and the catalogue alone: a monitor needs vae_reader, and no right on the shop's tables.

create or replace function vae_private.stale_after()
returns interval
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    setting constant text := coalesce(nullif(current_setting('vae.stale_after', true), ''), '26 hours');
    oldest timestamptz;
begin
    begin
        -- Three times as old is critical.
        oldest := now() - 3 * setting::interval;
    exception when data_exception then
        null;
    end;
    if oldest is null or oldest >= now() then
        raise exception 'vae.stale_after is ''%''', setting
            using errcode = 'invalid_parameter_value',
                hint = 'say for how long predictions are fresh, as in: set vae.stale_after = ''26 hours''; it may stand in a role or in the'
                    ' database: alter role ... set, alter database ... set';
    end if;
    return setting;
end;
$$;

comment on function vae_private.stale_after() is
    'Gives the setting vae.stale_after, 26 hours unless set; refuses what is no span of time. For vae.health_checks.';


create or replace view vae.health_checks as
with facts as (
    select
        m.model_id,
        m.name as model,
        exists (select from pg_catalog.pg_namespace n where n.nspname = m.name) as has_schema,
        active.version_id,
        active.version,
        active.activated_at,
        m.rebuild_error,
        newest.version as newest_version,
        vae_private.stale_after() as stale_after
    from vae.models m
    left join vae.versions active on active.model_id = m.model_id and active.state = 'active'
    left join lateral (
        select v.version
        from vae.versions v
        where v.model_id = m.model_id and v.state = 'ready' and (active.version is null or v.created_at > active.activated_at)
        order by v.version desc
        limit 1
    ) newest on true
), predictions as (
    select f.model, count(*) as views,
        count(*) filter (where f.refreshed_at is null) as empty_views,
        bool_or(f.prediction = 'recommendations' and f.row_count = 0) as knows_nobody,
        min(f.refreshed_at) as oldest,
        string_agg(f.prediction, ', ' order by f.prediction) filter (where f.model_version <> f.active_version) as other_version,
        string_agg(format('%s: %s', f.prediction, f.last_error), '; ' order by f.prediction) filter (where f.last_state = 'failed') as failures
    from vae.freshness f
    group by f.model
), checks as (
    select f.model, 1 as place, 'views' as check_name,
        case when coalesce(g.gone[1], g.moved, g.lost, f.rebuild_error) is null then 'ok' else 'critical' end as status,
        case when not f.has_schema then 'the schema of the model is gone'
            when 'clean_events' = any (g.gone) then 'the views of the model are gone, for example with a table that was dropped with cascade'
            when g.moved is not null then format('they read another table than %s, which was renamed or replaced', g.moved)
            when g.lost is not null then format('live calls read columns that are gone or renamed: %s', g.lost)
            -- Before what is missing: an upgrade that fails leaves out what is new in it.
            when f.rebuild_error is not null
                then format('they are those of an earlier release, the upgrade could not remake them: %s', f.rebuild_error)
            else format('missing: %s', array_to_string(g.gone, ', ')) end as problem,
        case when f.has_schema and g.lost is not null and g.moved is null and not coalesce('clean_events' = any (g.gone), false)
                then format('rename them back; other features: select vae.set_features(%L, ...)', f.model)
            when f.has_schema then format('select vae.rebuild_model(%L)', f.model)
            else format('if it was renamed: alter schema ... rename to %I; else: select vae.drop_model(%L)', f.model, f.model) end as remedy,
        null as fact
    from facts f
    -- By the catalogue: to_regclass and to_regprocedure ask for a right on the schema.
    cross join lateral (
        select array(
            select c.relname::text
            from pg_catalog.pg_class c
            join pg_catalog.pg_namespace n on n.oid = c.relnamespace
            where n.nspname = f.model
            union all
            -- Without the quotes that a type's name has where quote_all_identifiers is on.
            select format('%s(%s)', p.proname,
                translate(replace(pg_catalog.oidvectortypes(p.proargtypes), 'timestamp with time zone', 'timestamptz'), '"', ''))
            from pg_catalog.pg_proc p
            join pg_catalog.pg_namespace n on n.oid = p.pronamespace
            where n.nspname = f.model) as objects
    ) h
    cross join lateral (
        select array_agg(o.object order by o.object) as gone,
            (select vae_private.moved_table(m) from vae.models m where m.model_id = f.model_id) as moved,
            (select vae_private.lost_columns(m) from vae.models m where m.model_id = f.model_id) as lost
        from vae_private.model_objects(f.model_id) o
        where o.object <> all (h.objects)
    ) g
    union all
    select f.model, 2, 'active version',
        case when f.version is null then 'critical' else 'ok' end,
        'no version is active: nothing scores',
        case when f.newest_version is null then format('in a terminal: pgvae train %s --activate', f.model)
            else format('select * from vae.activate(%L, %s)', f.model, f.newest_version) end,
        format('version %s is active', f.version)
    from facts f
    union all
    select f.model, 3, 'refreshed',
        case when f.version is null then 'unknown' when e.views is not null or p.oldest is null or p.empty_views > 0 or p.knows_nobody then 'critical' else 'ok' end,
        case when f.version is null then 'no version is active'
            when e.views is not null then format('never refreshed: %s', e.views)
            when p.oldest is null or p.empty_views > 0 then 'a prediction view was never refreshed well'
            else 'the last refresh found no user' end,
        case when f.version is null then null
            when e.views is null and p.empty_views = 0 and p.knows_nobody
                then format('see what became of the events: select * from vae.check_events(%L); then: call vae.refresh(%1$L)', f.model)
            else format('call vae.refresh(%L)', f.model) end,
        format('%s prediction views hold content', p.views)
    from facts f
    left join predictions p using (model)
    left join lateral (
        select string_agg(regexp_replace(c.relname, '_materialized$', ''), ', ' order by c.relname) as views
        from pg_catalog.pg_namespace n
        join pg_catalog.pg_class c on c.relnamespace = n.oid
        where n.nspname = f.model and c.relkind = 'm' and c.relname like E'%\\_materialized'
            -- What churn reads is made with content, though with none.
            and (not c.relispopulated or c.relname = 'churn_materialized' and not exists (
                select from vae.refreshes r where r.model_id = f.model_id and r.view = 'churn'))
    ) e on true
    union all
    select f.model, 4, 'last refresh',
        case when p.model is null then 'unknown' when p.failures is not null then 'critical' when o.left_out is not null then 'warning' else 'ok' end,
        case when p.model is null then 'there was no refresh'
            when p.failures is not null then format('failed, the last good content is still there: %s', p.failures)
            else format('offers were left out: %s', o.left_out) end,
        case when p.failures is not null then
                format('mend the cause, then: call vae.refresh(%L); errors are explained in docs/errors.md', f.model)
            when p.model is not null then
                format('mend the cause, or drop the offer with: select vae.drop_offer(%L, ...); then: call vae.refresh(%1$L)', f.model) end,
        'succeeded'
    from facts f
    left join predictions p using (model)
    left join lateral (
        select r.left_out
        from vae.refreshes r
        where r.model_id = f.model_id and r.view = 'offer_responses' and r.state = 'succeeded'
        order by -r.refresh_id
        limit 1
    ) o on true
    union all
    select f.model, 5, 'age',
        case when p.oldest is null then 'unknown'
            when now() - p.oldest > 3 * f.stale_after then 'critical'
            when now() - p.oldest > f.stale_after then 'warning'
            else 'ok' end,
        case when p.oldest is null then 'there was no refresh'
            else format('the oldest predictions are of %s, longer ago than vae.stale_after (%s)', date_trunc('second', p.oldest), f.stale_after) end,
        case when p.oldest is not null then
            format('see whether the scheduler runs: select * from vae.schedules; then: call vae.refresh(%L)', f.model) end,
        format('the oldest predictions are of %s', date_trunc('second', p.oldest))
    from facts f
    left join predictions p using (model)
    union all
    select f.model, 6, 'version of predictions',
        case when p.oldest is null or f.version is null then 'unknown' when p.other_version is not null then 'warning' else 'ok' end,
        case when p.oldest is null or f.version is null then 'there is nothing to compare'
            else format('another version than the active one (%s) computed %s', f.version, p.other_version) end,
        case when p.other_version is not null then format('call vae.refresh(%L)', f.model) end,
        format('all predictions are of version %s', f.version)
    from facts f
    left join predictions p using (model)
    union all
    select f.model, 7, 'interrupted refresh',
        case when lost.view is null then 'ok' else 'warning' end,
        format('the session that refreshed %s since %s is gone', lost.view, date_trunc('second', lost.started_at)),
        format('call vae.refresh(%L) marks it failed and does it again', f.model),
        null
    from facts f
    left join lateral (
        select r.view, r.started_at
        from vae.refreshes r
        where r.model_id = f.model_id and r.state = 'running'
            -- A standby does not see the primary's sessions.
            and not pg_catalog.pg_is_in_recovery()
            and not exists (select from pg_catalog.pg_stat_activity a where a.pid = r.backend_pid)
        order by r.refresh_id desc
        limit 1
    ) lost on true
    union all
    select f.model, 8, 'parity',
        case when v.verified_at is null then 'unknown'
            when not v.passed then 'critical'
            when not v.is_present_code then 'warning'
            else 'ok' end,
        case when v.verified_at is null then 'the active version was not verified here'
            when not v.passed then format('the active version does not give the scores of its training: %s', v.failures)
            else 'the active version was not verified since the last upgrade of pgvae' end,
        format('select * from vae.verify(%L)', f.model)
            || case when not v.passed then '; if it fails again: pgvae doctor, and vae.rollback to an older version' else '' end,
        format('verified at %s, the largest difference was %s', date_trunc('second', v.verified_at), trim(to_char(v.max_difference, '9.9EEEE')))
    from facts f
    left join lateral (
        select min(l.verified_at) as verified_at, bool_and(l.passed) as passed, max(l.max_difference) as max_difference,
            bool_and(l.runtime_digest = (select i.runtime_digest from vae_private.installation i)) as is_present_code,
            string_agg(format('%s: %s', l.device, l.detail), '; ') filter (where not l.passed) as failures
        from (
            select distinct on (l.device) l.*
            from vae.verifications l
            where l.version_id = f.version_id
            order by l.device, l.verification_id desc
        ) l
    ) v on true
    union all
    select f.model, 9, 'gates',
        case when f.version is null then 'unknown'
            when a.overridden is not null or f.newest_version is not null then 'warning' else 'ok' end,
        case when f.version is null then 'no version is active'
            when a.overridden is not null then format('%s forced past a gate: %s', a.activated_by, a.overridden)
            else format('version %s is newer than the active one and was not activated', f.newest_version) end,
        case when f.version is null then null
            when a.overridden is not null then format('in a terminal: pgvae retrain %s --activate', f.model)
            else format('select * from vae.check_activation(%L, %s)', f.model, f.newest_version) end,
        'the active version passed them'
    from facts f
    left join lateral (
        select a.overridden, a.activated_by
        from vae.activations a
        where a.model_id = f.model_id and a.version = f.version and a.action in ('activate', 'rollback')
        order by a.activation_id desc
        limit 1
    ) a on true
    union all
    select f.model, 10, 'drift',
        coalesce(d.status, 'unknown'),
        case when d.status is null then 'was not measured for the active version' else coalesce(d.problem, 'could not be measured') end,
        coalesce(d.remedy, format('select * from vae.check_drift(%L)', f.model)),
        format('measured at %s, the largest index is %s', date_trunc('second', d.observed_at), round(d.largest::numeric, 3))
    from facts f
    left join lateral (
        select
            case when bool_or(o.status = 'critical') then 'critical' when bool_or(o.status = 'warning') then 'warning'
                when bool_or(o.status = 'ok') then 'ok' when count(*) > 0 then 'unknown' end as status,
            string_agg(concat(o.subject, ': ', o.detail, ' (index ' || round(o.value::numeric, 3) || ')'), '; ' order by o.value desc nulls last)
                filter (where o.status in ('critical', 'warning')) as problem,
            (array_agg(o.remedy order by array_position(array['critical', 'warning', 'unknown'], o.status), o.value desc)
                filter (where o.status in ('critical', 'warning')))[1] as remedy,
            max(o.value) as largest, min(o.observed_at) as observed_at
        from (
            select distinct on (o.subject) o.*
            from vae.observations o
            where o.version_id = f.version_id and o.measure = 'drift'
            order by o.subject, o.observation_id desc
        ) o
    ) d on true
    union all
    select f.model, 11, 'indexes',
        case when t.oid is null then 'unknown' when i.missing is null or t.bytes < 8 * 1024 * 1024 then 'ok' else 'warning' end,
        case when t.oid is null then 'the events are not those of a table of this database'
            else format('no index of %I.%I begins with %s: live calls read the whole table',
                t.events_schema, t.events_table, array_to_string(i.missing, ', nor with ')) end,
        case when t.oid is not null then array_to_string(i.remedies, '; ') end,
        case when i.missing is null then 'live calls find their events by an index' else 'the table of events is small' end
    from facts f
    join lateral (
        select m.events_schema, m.events_table, array[m.user_id_column, m.item_id_column] as key_columns, m.occurred_at_column,
            c.oid, coalesce(
                (select sum(pg_catalog.pg_relation_size(p.relid)) from pg_catalog.pg_partition_tree(c.oid) p where p.isleaf),
                pg_catalog.pg_relation_size(c.oid)) as bytes
        from vae.models m
        left join pg_catalog.pg_namespace n on n.nspname = m.events_schema
        left join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = m.events_table and c.relkind in ('r', 'p')
        where m.model_id = f.model_id
    ) t on true
    left join lateral (
        select array_agg(k.key_column order by k.place) as missing,
            array_agg(format('create index on %I.%I (%I, %I)', t.events_schema, t.events_table, k.key_column, t.occurred_at_column)
                order by k.place) as remedies
        from unnest(t.key_columns) with ordinality k (key_column, place)
        where not exists (
            select
            from pg_catalog.pg_index x
            join pg_catalog.pg_attribute a on a.attrelid = x.indrelid and a.attnum = x.indkey[0]
            join pg_catalog.pg_class ic on ic.oid = x.indexrelid
            join pg_catalog.pg_am am on am.oid = ic.relam and am.amname in ('btree', 'hash')
            where x.indrelid = t.oid and x.indisvalid and x.indpred is null and a.attname = k.key_column)
    ) i on true
    union all
    select f.model, 12, 'new events',
        case when last.events_until is null then 'unknown'
            when last.events_until - change.events_until > 3 * f.stale_after then 'warning'
            else 'ok' end,
        case when last.events_until is null then 'there was no refresh'
            else format('nothing was new of any user between the refreshes of %s and %s',
                date_trunc('second', change.events_until), date_trunc('second', last.events_until)) end,
        case when last.events_until is not null then 'see whether what loads the events still runs' end,
        format('the last refresh scored %s users, of %s', last.scored_count, last.row_count)
    from facts f
    left join lateral (
        select r.events_until, r.scored_count, r.row_count
        from vae.refreshes r
        where r.model_id = f.model_id and r.view = 'recommendations' and r.state = 'succeeded'
        order by -r.refresh_id
        limit 1
    ) last on true
    -- The last one that found a change, or did not ask for any since it scored all users.
    left join lateral (
        select r.events_until
        from vae.refreshes r
        where r.model_id = f.model_id and r.view = 'recommendations' and r.state = 'succeeded'
            and (r.mode = 'full' or r.scored_count > 0)
        order by -r.refresh_id
        limit 1
    ) change on true
    union all
    select f.model, 13, 'candidates and offers',
        case when l.stops_refresh then 'critical' when l.lost is not null then 'warning' else 'ok' end,
        l.lost,
        format('make them again, or: %s', l.remedies),
        'what they name is there'
    from facts f
    cross join lateral (
        select bool_or(r.for_refresh) as stops_refresh,
            string_agg(format('%s reads %I.%I, which is gone or has no column %I', r.reader, r.schema_name, r.relation_name, r.column_name),
                '; ' order by r.for_refresh desc, r.reader) as lost,
            string_agg(r.remedy, '; ' order by r.for_refresh desc, r.reader) as remedies
        from (
            select format('candidates %L', s.name) as reader, s.relation_schema as schema_name, s.relation_table as relation_name,
                s.item_id_column as column_name, s.for_refresh, format('select vae.drop_candidates(%L, %L)', f.model, s.name) as remedy
            from vae.candidates s
            where s.model_id = f.model_id
            union all
            select format('offer %L', o.name), o.among_schema, o.among_table, o.among_column, false,
                format('select vae.drop_offer(%L, %L)', f.model, o.name)
            from vae.offers o
            where o.model_id = f.model_id and o.among_table is not null and coalesce(o.ends_at > now(), true)
        ) r
        where not exists (
            select
            from pg_catalog.pg_namespace n
            join pg_catalog.pg_class c on c.relnamespace = n.oid
            join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
            where n.nspname = r.schema_name and c.relname = r.relation_name and a.attname = r.column_name)
    ) l
)
select
    c.model,
    c.check_name,
    c.status,
    case c.status when 'critical' then 2 when 'warning' then 1 else 0 end as severity,
    case when c.status = 'ok' then c.fact else c.problem end as detail,
    case when c.status <> 'ok' then c.remedy end as remedy
from checks c
order by c.model, c.place;

comment on view vae.health_checks is
    'A row per model and thing that can be wrong with it, with the remedy. Cheap: it reads logs and the catalogue alone. Drift is what vae.check_drift '
    'last found; vae.health has a row per model.';
comment on column vae.health_checks.model is 'Name of the model.';
comment on column vae.health_checks.check_name is
    'views, active version, refreshed, last refresh, age, version of predictions, interrupted refresh, parity, gates, drift, indexes, new events, '
    'candidates and offers.';
comment on column vae.health_checks.status is 'ok, warning, critical; unknown: nothing was measured yet, or something before it is missing.';
comment on column vae.health_checks.severity is 'The same as a number: 2 critical, 1 warning, 0 ok or unknown.';
comment on column vae.health_checks.detail is 'What was found.';
comment on column vae.health_checks.remedy is 'What to do; null where all is well.';


create or replace view vae.health as
select
    c.model,
    case max(c.severity) when 2 then 'critical' when 1 then 'warning' else 'ok' end as status,
    max(c.severity) as severity,
    count(*) filter (where c.severity > 0) as problems,
    string_agg(format('%s: %s', c.check_name, c.detail), '; ' order by c.severity desc, c.check_name) filter (where c.severity > 0) as detail,
    (array_agg(c.remedy order by c.severity desc, array_position(array['views', 'active version', 'last refresh', 'refreshed'], c.check_name))
        filter (where c.severity > 0))[1] as remedy,
    max(v.version) as active_version,
    max(now() - v.window_end) as events_age,
    max(p.refreshed_at) as refreshed_at,
    max(now() - p.refreshed_at) as refresh_age
from vae.health_checks c
join vae.models m on m.name = c.model
left join vae.versions v on v.model_id = m.model_id and v.state = 'active'
left join lateral (select min(f.refreshed_at) as refreshed_at from vae.freshness f where f.model = m.name) p on true
group by c.model;

comment on view vae.health is
    'A row per model for a monitor: is anything wrong with it, what, and what to do first. Cheap: it reads logs and the catalogue alone. '
    'vae.health_checks has a row per check.';
comment on column vae.health.model is 'Name of the model.';
comment on column vae.health.status is 'The worst of its checks: ok, warning or critical.';
comment on column vae.health.severity is 'The same as a number: 2 critical, 1 warning, 0 ok.';
comment on column vae.health.problems is 'Checks that are not well.';
comment on column vae.health.detail is 'What they found, the worst first; null where all is well.';
comment on column vae.health.remedy is 'What to do about the worst of them; null where all is well.';
comment on column vae.health.active_version is 'Version that scores; null: none.';
comment on column vae.health.events_age is 'Time since the newest event that it was trained on.';
comment on column vae.health.refreshed_at is 'Call of the last good refresh of the prediction view that was refreshed longest ago.';
comment on column vae.health.refresh_age is 'Time since then.';
