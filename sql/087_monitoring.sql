-- What changed since a version was trained, and what its recommendations were good for. Both are logged in vae.observations, which
-- vae.health reads: a monitor needs no right on the shop's events.

create or replace function vae_private.chance_psi(bin_count bigint, expected_count bigint, actual_count bigint)
returns double precision
language sql
immutable
strict
parallel safe
security invoker
set search_path = pg_catalog, pg_temp
as $$
-- Without any change PSI is about (1/n + 1/m) chi²(bins - 1) (Yurdakul 2018); its 95 % quantile after Wilson and Hilferty.
select case when bin_count < 2 or expected_count < 1 or actual_count < 1 then 0
    else (1.0 / expected_count + 1.0 / actual_count) * f.k * (1 - 2 / (9 * f.k) + 1.6449 * sqrt(2 / (9 * f.k))) ^ 3 end
from (select greatest(bin_count - 1, 1)::float8 as k) f
$$;

comment on function vae_private.chance_psi(bigint, bigint, bigint) is
    'Gives the population stability index that chance alone exceeds once in twenty times, for so many bins and two samples of such sizes.';


create or replace function vae_private.event_bins(m vae.models, version_id bigint, window_end timestamptz, days interval)
returns table (
    subject text, bin text, expected bigint, actual bigint, expected_count bigint, actual_count bigint, window_start timestamptz,
    newest timestamptz)
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
set jit = off
as $$
begin
    -- Both windows in one pass; where the version is young they overlap, and what is in both counts in both.
    return query execute format(
        'with bounds as materialized (select max(e.occurred_at) as newest from %1$I.refresh_events e where e.item_id is not null),'
        ' counts as materialized ('
        '    select e.user_id, e.item_id, e.event_type,'
        '        count(*) filter (where e.occurred_at > $1 - $2 and e.occurred_at <= $1) as expected,'
        '        count(*) filter (where e.occurred_at > b.newest - $2) as actual'
        '    from %1$I.refresh_events e'
        '    cross join bounds b'
        '    where e.item_id is not null and e.occurred_at > least(b.newest, $1) - $2'
        '    group by e.user_id, e.item_id, e.event_type),'
        ' per_user as materialized (select sum(c.expected) as expected, sum(c.actual) as actual from counts c group by c.user_id),'
        ' active as (select count(*) filter (where u.expected > 0) as expected, count(*) filter (where u.actual > 0) as actual from per_user u),'
        ' per_item as ('
        '    select i.item_key is not null as is_known, c.expected, c.actual,'
        '        sum(c.expected) over (partition by i.item_key is not null order by c.expected desc, c.item_id) - c.expected / 2 as before,'
        '        sum(c.expected) over (partition by i.item_key is not null) as total'
        '    from (select c.item_id, sum(c.expected) as expected, sum(c.actual) as actual from counts c group by c.item_id) c'
        '    left join vae_private.published_items i on i.version_id = $3 and i.item_key = c.item_id::text),'
        ' binned as ('
        '    select ''event types'' as subject, c.event_type as bin, sum(c.expected) as expected, sum(c.actual) as actual'
        '    from counts c'
        '    group by c.event_type'
        '    union all'
        -- Items that had no event then stand with the rarest: of a long tail some always come and go.
        '    select ''items'', case when not p.is_known then ''new items'''
        '        else format(''tenth %%s by popularity'', case when p.total > 0 then least(floor(10 * p.before / p.total), 9) + 1 else 1 end) end,'
        '        sum(p.expected), sum(p.actual)'
        '    from per_item p'
        '    group by 2'
        '    union all'
        '    select ''activity'', a.bin, sum(a.expected), sum(a.actual)'
        '    from per_user u'
        '    cross join lateral (values (u.expected, 1, 0), (u.actual, 0, 1)) w (events, expected, actual)'
        '    cross join lateral (select case when w.events = 1 then ''1 event'' when w.events = 2 then ''2 events'' when w.events <= 5 then ''3 to 5 events'''
        '        when w.events <= 10 then ''6 to 10 events'' when w.events <= 20 then ''11 to 20 events'' when w.events <= 50 then ''21 to 50 events'''
        '        else ''over 50 events'' end as bin, w.expected, w.actual) a'
        '    where w.events > 0'
        '    group by a.bin)'
        ' select b.subject, b.bin, b.expected::bigint, b.actual::bigint, a.expected, a.actual, n.newest - $2, n.newest'
        ' from binned b'
        ' cross join active a'
        ' cross join bounds n'
        ' where b.expected + b.actual > 0', m.name)
    using window_end, days, version_id;
end;
$$;

comment on function vae_private.event_bins(vae.models, bigint, timestamptz, interval) is
    'Counts events by type, events by popularity of their item, and users by activity: in the last days that a version was trained on '
    '(expected) and in the newest days (actual); the counts of all users beside them. For vae.check_drift.';


create or replace function vae_private.drift_subjects(m vae.models, active vae.versions)
returns text[]
language sql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
select array['churn', 'recommendations'] || array(
    select format('%s.%s', s.source, c.entry ->> 'name')
    from (values (1, 'users'), (2, 'items')) s (place, source)
    cross join lateral jsonb_array_elements(active.features -> s.source -> 'columns') with ordinality c (entry, place)
    -- Of words and tags a row has many.
    where c.entry ->> 'kind' in ('category', 'number', 'time')
        and c.entry ->> 'name' = any (case s.source when 'users' then m.user_features else m.item_features end)
    order by s.place, c.place)
$$;

comment on function vae_private.drift_subjects(vae.models, vae.versions) is
    'Lists the predictions and the feature columns of a version whose distribution vae.check_drift follows.';


create or replace function vae_private.stored_bins(m vae.models, active vae.versions, subject text)
returns table (
    bin text, expected bigint, actual bigint, expected_count bigint, actual_count bigint, window_start timestamptz, newest timestamptz)
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
set jit = off
-- Bins are compared by their names, which hold numbers.
set extra_float_digits = 1
as $$
#variable_conflict use_column
declare
    source constant text := split_part(stored_bins.subject, '.', 1);
    column_name constant text := substr(stored_bins.subject, length(source) + 2);
    learnt constant jsonb := (
        select c from jsonb_array_elements(active.features -> source -> 'columns') c where c ->> 'name' = column_name);
    -- As many bins as others have, out of those that the version reads a number by.
    edges constant float8[] := array(
        select e.value::float8
        from jsonb_array_elements_text(learnt -> 'edges') with ordinality e (value, place)
        where e.place % ceil(jsonb_array_length(learnt -> 'edges') / 9.0)::integer = 0
        order by e.place);
    -- Times are seconds since 1970.
    edge_names constant text[] := array(
        select case when learnt ->> 'kind' = 'time' then to_char(to_timestamp(e.value) at time zone 'UTC', 'YYYY-MM-DD HH24:MI')
            else e.value::text end
        from unnest(edges) with ordinality as e (value, place)
        order by e.place);
    present text;
begin
    present := case
        when stored_bins.subject = 'churn' then format(
            'select format(''from %%s to %%s'', trim_scale(b.tenth / 10.0), trim_scale((b.tenth + 1) / 10.0)) as bin from %I.churn c'
            ' cross join lateral (select least(floor(c.churn_probability * 10), 9)::numeric(2, 0) as tenth) b'
            ' where c.churn_probability is not null and c.model_version = $2', m.name)
        when stored_bins.subject = 'recommendations' then format(
            'select coalesce(''from '' || l.limits[width_bucket(r.probability::float8, l.limits)], ''under 0.001'') as bin from %I.recommendations r'
            ' cross join (values (''{0.001,0.002,0.005,0.01,0.02,0.05,0.1,0.2,0.5}''::float8[])) l (limits)'
            ' where r.rank = 1 and r.probability is not null and r.model_version = $2', m.name)
        when learnt ->> 'kind' = 'category' then format(
            -- Of a long list of values only whether the version knows them.
            'select case when f.features ->> $3 is null then ''missing'' when not $4 ? (f.features ->> $3) then ''unknown value'''
            ' when jsonb_array_length($4) > 50 then ''known value'' else f.features ->> $3 end as bin from %I.%I f',
            m.name, case source when 'users' then 'user_features' else 'item_features' end)
        else format(
            -- As where it scores, what is no number that a float8 holds is missing; below 1e-307 it holds not all.
            'select case when b.place is null then ''missing'''
            ' else coalesce(''from '' || $7[b.place], ''under '' || $7[1], ''any value'') end as bin from %I.%I f'
            ' cross join lateral (select case jsonb_typeof(f.features -> $3) when ''number'' then (f.features -> $3)::numeric end as value) n'
            ' cross join lateral (select width_bucket(case when abs(n.value) < 1e-307 then 0'
            '     when abs(n.value) <= 1.7976931348623157e308 then n.value::float8 end, $5) as place) b',
            m.name, case source when 'users' then 'user_features' else 'item_features' end) end;
    -- What they were when the version was trained nobody counted: its first measurement stands for that.
    return query execute format(
        'with present as materialized (select p.bin, count(*) as n from (%s) p group by p.bin),'
        ' total as (select sum(p.n)::bigint as n from present p),'
        ' first as ('
        '    select o.bins, o.actual_count, o.observed_at'
        '    from vae.observations o'
        '    where o.version_id = $1 and o.measure = ''drift'' and o.subject = $6 and o.bins is not null'
        '    order by o.observation_id'
        '    limit 1),'
        ' before as ('
        '    select b ->> ''bin'' as bin, round((b ->> ''actual'')::float8 * f.actual_count)::bigint as n'
        '    from first f'
        '    cross join jsonb_array_elements(f.bins) b)'
        ' select coalesce(p.bin, b.bin), case when f.bins is null then p.n else coalesce(b.n, 0) end, coalesce(p.n, 0),'
        '    coalesce(f.actual_count, t.n), t.n, coalesce(f.observed_at, statement_timestamp()), statement_timestamp()'
        ' from present p'
        ' full join before b on b.bin = p.bin'
        ' cross join total t'
        ' left join first f on true', present)
    using active.version_id, active.version, column_name, learnt -> 'vocabulary', edges, stored_bins.subject, edge_names;
end;
$$;

comment on function vae_private.stored_bins(vae.models, vae.versions, text) is
    'Counts users by stored probability of leaving, by probability of their best recommendation, or users and items by a feature: now '
    '(actual), and when that was first measured for the version (expected). For vae.check_drift.';


create or replace function vae.check_drift(model text, days integer default null)
returns table (
    subject text, status text, psi double precision, chance double precision, detail text, remedy text, model_version integer,
    expected_count bigint, actual_count bigint, window_start timestamptz, window_end timestamptz)
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    id constant integer := vae_private.model_id(model);
    m vae.models;
    active vae.versions;
    span interval;
    counted jsonb;
    more jsonb;
    stored text;
    failures jsonb := '{}';
    found record;
begin
    select * into m from vae.models where models.model_id = id;
    perform vae_private.check_views(m);
    perform vae_private.check_grants(m, through => 'refresh_events');
    select * into active from vae.versions v where v.model_id = id and v.state = 'active';
    if active.version_id is null then
        raise exception 'model % has no active version', model
            using errcode = 'VA002', hint = vae_private.activation_hint(id, model);
    end if;
    if check_drift.days < 1 or check_drift.days > 3650 then
        raise exception 'days is %', check_drift.days
            using errcode = 'invalid_parameter_value', hint = 'give a number of days between 1 and 3650, or null for the horizon of the model';
    end if;
    -- Not more than the version was trained on: activity in windows of different lengths cannot be compared.
    span := least(
        make_interval(days => coalesce(check_drift.days, (m.options ->> 'horizon_days')::integer)),
        active.window_end - active.window_start);
    select coalesce(jsonb_agg(to_jsonb(b)), '[]') into counted
    from vae_private.event_bins(m, active.version_id, active.window_end, span) b;
    foreach stored in array vae_private.drift_subjects(m, active) loop
        begin
            select coalesce(jsonb_agg(to_jsonb(b) || jsonb_build_object('subject', stored)), '[]') into more
            from vae_private.stored_bins(m, active, stored) b;
            counted := counted || more;
        exception
            when object_not_in_prerequisite_state then
                -- Before its first refresh a view has nothing to compare.
                null;
            when insufficient_privilege or undefined_column or undefined_table or data_exception then
                -- One that cannot be read takes nothing from the others.
                failures := failures || jsonb_build_object(stored, sqlerrm);
        end;
    end loop;
    for found in
        with bins as (
            select b.*, b.expected::float8 / nullif(sum(b.expected) over s, 0) as share_then,
                b.actual::float8 / nullif(sum(b.actual) over s, 0) as share_now
            from jsonb_to_recordset(counted) b (
                subject text, bin text, expected bigint, actual bigint, expected_count bigint, actual_count bigint,
                window_start timestamptz, newest timestamptz)
            window s as (partition by b.subject)
        ), parts as (
            -- A share under 1 % counts as 1 %: what is rare anyway comes and goes.
            select b.*, (l.now - l.before) * ln(l.now / l.before) as part
            from bins b
            cross join lateral (select greatest(b.share_now, 0.01) as now, greatest(b.share_then, 0.01) as before) l
            where b.share_then is not null and b.share_now is not null
        ), judged as (
            -- Further digits say nothing.
            select b.subject, round(sum(b.part)::numeric, 6)::float8 as psi,
                round(vae_private.chance_psi(count(*), max(b.expected_count), max(b.actual_count))::numeric, 6)::float8 as chance,
                (array_agg(format('%s %s %% before, %s %% now', b.bin, round(100 * b.share_then::numeric, 1), round(100 * b.share_now::numeric, 1))
                    order by b.part desc, b.bin))[1] as largest,
                min(b.bin) filter (where b.subject = 'event types' and b.expected >= 20 and b.actual = 0) as gone,
                jsonb_agg(jsonb_build_object('bin', b.bin, 'expected', b.share_then, 'actual', b.share_now) order by b.bin) as bins,
                max(b.expected_count) as expected_count, max(b.actual_count) as actual_count,
                min(b.window_start) as window_start, max(b.newest) as window_end
            from parts b
            group by b.subject
        )
        select s.subject, j.bins, j.psi, j.chance, j.expected_count, j.actual_count, j.window_start, j.window_end,
            case when j.psi is null and not f.failed and not exists (select from bins b where b.subject = 'activity') then 'critical'
                when j.psi is null then 'unknown'
                when j.gone is not null then 'critical'
                when j.psi < 0.1 or j.psi <= j.chance then 'ok'
                when j.psi < 0.25 then 'warning'
                else 'critical' end as status,
            case when f.failed then failures ->> s.subject
                when j.psi is null and not exists (select from bins b where b.subject = 'activity') then 'there are no events'
                when j.psi is null then 'one of the windows holds no events'
                when j.gone is not null then format('no events of type %s since %s', j.gone, j.window_start)
                else j.largest end as detail,
            case when f.failed then 'it is compared where the caller can read it'
                when j.psi is null or j.gone is not null then 'check what loads the events'
                when j.psi >= 0.1 and j.psi > j.chance then format('train again with: pgvae retrain %s --activate', model) end as remedy
        from unnest(array['event types', 'items', 'activity'] || vae_private.drift_subjects(m, active)) with ordinality as s (subject, place)
        left join judged j using (subject)
        cross join lateral (select failures ? s.subject as failed) f
        -- A version without probabilities has none to compare.
        where s.place <= 3 or j.psi is not null or f.failed
        order by s.place
    loop
        -- A standby answers too; it cannot log.
        if current_setting('transaction_read_only') = 'off' then
            perform vae_private.keep_versions(id);
            insert into vae.observations (
                version_id, measure, subject, value, chance, status, detail, remedy, bins, expected_count, actual_count, window_start, window_end)
            values (
                active.version_id, 'drift', found.subject, found.psi, found.chance, found.status, found.detail, found.remedy, found.bins,
                found.expected_count, found.actual_count, found.window_start, found.window_end);
        end if;
        return query select
            found.subject, found.status, found.psi, found.chance, found.detail, found.remedy, active.version,
            found.expected_count, found.actual_count, found.window_start, found.window_end;
    end loop;
end;
$$;

comment on function vae.check_drift(text, integer) is
    'Compares the newest days of events (by default as many as the horizon) with the last ones that the active version was trained on, '
    'by the population stability index: events by type, events by popularity of their item then, users by activity. Stored '
    'probabilities and feature columns are compared with their first measurement for that version. Under 0.1 is ok, as is '
    'what chance reaches once in twenty times, under 0.25 a warning, from 0.25 on critical. Reads the events with the rights of the '
    'caller; logged in vae.observations, where vae.health finds it.';


create or replace function vae.hit_rate(model text)
returns table (
    model_version integer, hit_rate double precision, bought_share double precision, users bigint, buyers bigint, hit_buyers bigint,
    recommended bigint, bought bigint, scored_from timestamptz, scored_to timestamptz)
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
set jit = off
as $$
#variable_conflict use_column
declare
    id constant integer := vae_private.model_id(model);
    m vae.models;
    found record;
begin
    select * into m from vae.models where models.model_id = id;
    perform vae_private.check_views(m);
    perform vae_private.check_grants(m, through => 'refresh_events');
    perform vae_private.check_stored(m, 'recommendations');
    for found in execute format(
        'with scored as materialized (select r.user_id, r.item_id, r.model_version, r.scored_at from %1$I.recommendations r),'
        ' per_user as materialized (select s.user_id, max(s.model_version) as version, min(s.scored_at) as scored_at from scored s group by s.user_id),'
        ' purchases as materialized ('
        '    select distinct e.user_id, e.item_id, u.version'
        '    from %1$I.refresh_events e'
        '    join per_user u on u.user_id = e.user_id and e.occurred_at > u.scored_at'
        '    where e.event_type = ''purchase'' and e.occurred_at > (select min(u.scored_at) from per_user u)),'
        ' hits as materialized (select p.user_id, p.version from purchases p join scored s on s.user_id = p.user_id and s.item_id = p.item_id)'
        ' select u.version, count(*) as users, min(u.scored_at) as scored_from, max(u.scored_at) as scored_to,'
        '    (select count(*) from scored s where s.model_version = u.version) as recommended,'
        '    (select count(distinct p.user_id) from purchases p where p.version = u.version) as buyers,'
        '    (select count(distinct h.user_id) from hits h where h.version = u.version) as hit_buyers,'
        '    (select count(*) from hits h where h.version = u.version) as bought'
        ' from per_user u'
        ' group by u.version'
        ' order by u.version', m.name)
    loop
        -- Through real to six digits: more say nothing.
        hit_rate := (found.hit_buyers / nullif(found.buyers, 0)::float8)::real::numeric;
        if current_setting('transaction_read_only') = 'off' then
            perform vae_private.keep_versions(id);
            insert into vae.observations (version_id, measure, subject, value, status, detail, expected_count, actual_count, window_start, window_end)
            select v.version_id, 'hit rate', 'recommendations', hit_rate, 'ok',
                format('%s of %s buyers bought what was recommended to them', found.hit_buyers, found.buyers),
                found.recommended, found.bought, found.scored_from, statement_timestamp()
            from vae.versions v
            where v.model_id = id and v.version = found.version;
        end if;
        return query select
            found.version::integer, hit_rate, (found.bought / nullif(found.recommended, 0)::float8)::real::numeric::float8,
            found.users::bigint, found.buyers::bigint, found.hit_buyers::bigint, found.recommended::bigint, found.bought::bigint,
            found.scored_from::timestamptz, found.scored_to::timestamptz;
    end loop;
end;
$$;

comment on function vae.hit_rate(text) is
    'Says what the stored recommendations were good for: of the users who bought something since theirs were scored, the share who bought '
    'something that was recommended (hit_rate), and the share of all recommendations that were bought (bought_share). A row per version '
    'that scored. A refresh replaces the lists of those who bought: ask before it. Reads the events with the rights of the caller; '
    'logged in vae.observations.';
