-- How old predictions are: from the log for a dashboard, from the events themselves for whoever wants to know exactly.

create or replace view vae.freshness as
select
    m.name as model,
    l.view as prediction,
    good.version as model_version,
    v.version as active_version,
    good.version is not distinct from v.version as is_active_version,
    good.events_until as refreshed_at,
    now() - good.events_until as age,
    good.row_count,
    good.scored_count,
    good.mode,
    l.state as last_state,
    l.error as last_error,
    l.started_at as last_started_at
from vae.models m
-- By the views that there are, not by those in the log: two rows of the index for each, however long the log is.
join pg_catalog.pg_namespace n on n.nspname = m.name
join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relkind = 'm' and c.relname like E'%\\_materialized'
-- A name has the collation C, with which no index of the log would be used.
cross join lateral (select regexp_replace(c.relname, '_materialized$', '') collate "default" as view) w
join lateral (
    select r.*
    from vae.refreshes r
    where r.model_id = m.model_id and r.view = w.view
    order by -r.refresh_id
    limit 1
) l on true
left join lateral (
    select r.*
    from vae.refreshes r
    where r.model_id = m.model_id and r.view = l.view and r.state = 'succeeded'
    order by -r.refresh_id
    limit 1
) good on true
left join vae.versions v on v.model_id = m.model_id and v.state = 'active';

comment on view vae.freshness is
    'A row per model and prediction view that was ever refreshed: with which version its content was computed, when, and how the last '
    'refresh ended. Cheap: it reads the log of refreshes alone. vae.check_freshness tells how many users changed since.';
comment on column vae.freshness.model is 'Name of the model.';
comment on column vae.freshness.prediction is 'Prediction view, without _materialized.';
comment on column vae.freshness.model_version is 'Version that computed the content; null where no refresh succeeded yet.';
comment on column vae.freshness.active_version is 'Version that scores now.';
comment on column vae.freshness.is_active_version is 'Whether the two are the same; if not, the next refresh computes all of it again.';
comment on column vae.freshness.refreshed_at is 'Call of the last refresh that succeeded: the content counts all events before.';
comment on column vae.freshness.age is 'Time since then.';
comment on column vae.freshness.row_count is 'Rows that the view holds; of recommendations: users.';
comment on column vae.freshness.scored_count is 'Rows among them that the last good refresh computed anew.';
comment on column vae.freshness.mode is 'full or incremental, see vae.refreshes.';
comment on column vae.freshness.last_state is 'How the last refresh ended: succeeded or failed; or running.';
comment on column vae.freshness.last_error is 'Why it failed.';
comment on column vae.freshness.last_started_at is 'When it began.';


create or replace function vae.check_freshness(model text)
returns table (
    prediction text, model_version integer, active_version integer, refreshed_at timestamptz, user_count bigint,
    stale_users bigint, stale_since timestamptz, is_exact boolean)
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
-- As in vae_private.refreshed_recommendations, which compares the same.
set jit = off
set enable_nestloop = off
as $$
#variable_conflict use_column
declare
    id constant integer := vae_private.model_id(model);
    m vae.models;
    view_name text;
    is_populated boolean;
    work_mem_before text;
begin
    select * into m from vae.models where models.model_id = id;
    perform vae_private.check_views(m);
    perform vae_private.check_grants(m, through => 'refresh_digests');
    work_mem_before := vae_private.raise_work_mem();
    foreach view_name in array vae_private.prediction_views(id, null) loop
        prediction := view_name;
        is_exact := view_name || '_changed' in (select o.object from vae_private.model_objects(id) o);
        select f.model_version, f.refreshed_at into model_version, refreshed_at
        from vae.freshness f
        where f.model = check_freshness.model and f.prediction = view_name;
        active_version := (select v.version from vae.versions v where v.model_id = id and v.state = 'active');
        is_populated := coalesce((
            select c.relispopulated from pg_class c where c.oid = to_regclass(format('%I.%I', m.name, view_name || '_materialized'))), false);
        stale_users := null;
        stale_since := null;
        user_count := null;
        if not is_populated or refreshed_at is null then
            is_exact := false;
        elsif is_exact then
            execute format(
                'with compared as ('
                ' select coalesce(d.user_id, s.user_id) as user_id, d.user_id is not null as is_there,'
                ' d.digest is distinct from s.digest as is_stale'
                ' from %1$I.refresh_digests d'
                ' full join %1$I.stored_digests s using (user_id)'
                ')'
                ' select count(*) filter (where is_there), count(*) filter (where is_stale), case when bool_or(is_stale) then coalesce(('
                ' select min(e.occurred_at) from %1$I.refresh_events e'
                ' where e.occurred_at > $1 and e.user_id in (select c.user_id from compared c where c.is_stale)), $1) end'
                ' from compared', m.name)
            into user_count, stale_users, stale_since
            using refreshed_at;
        else
            execute format(
                'select count(distinct e.user_id), min(e.occurred_at) from %I.refresh_events e where e.occurred_at > $1', m.name)
            into stale_users, stale_since
            using refreshed_at;
        end if;
        return next;
    end loop;
    perform set_config('work_mem', work_mem_before, true);
end;
$$;

comment on function vae.check_freshness(text) is
    'Says of each prediction view of a model how many users changed since it was refreshed. Of recommendations exactly (is_exact), by '
    'the digests: new, late, changed and deleted events, features, users who are gone. Of other views it counts users with events '
    'since. Reads all events, with the rights of the caller; vae.freshness is cheap.';
