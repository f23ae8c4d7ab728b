-- Prediction views: computed by the scheduled refresh, read by everybody else.

-- No SET search_path: a procedure with one cannot commit, and the log must be visible while the refresh runs. Every
-- name in it is qualified instead.
create or replace procedure vae.refresh(model text)
language plpgsql
security invoker
as $$
declare
    id integer;
    run bigint;
    result record;
    failure text;
    failure_state text;
    failure_detail text;
    failure_hint text;
begin
    -- Fails at once inside a transaction block, before anything is locked or logged.
    commit;
    id := vae_private.model_id(model);
    -- A lock for the transaction that logs the start, and again for the one that refreshes: no cancel, at whatever
    -- moment, leaves a lock behind that the session would keep.
    if not pg_catalog.pg_try_advisory_xact_lock(pg_catalog.hashtext('pgvae refresh'), id) then
        raise exception 'model % is being refreshed by another session', model
            using errcode = 'lock_not_available', hint = 'see: select * from vae.refreshes where state = ''running''';
    end if;
    run := vae_private.start_refresh(id, 'recommendations');
    commit;
    perform pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtext('pgvae refresh'), id);
    if not exists (select from vae.refreshes r where r.refresh_id = run and r.state = 'running') then
        raise exception 'another session began to refresh model % at the same moment', model
            using errcode = 'lock_not_available', hint = 'see: select * from vae.refreshes order by refresh_id desc';
    end if;
    begin
        perform vae_private.refresh_view(id, 'recommendations');
        select * into result from vae_private.last_scored(id);
    exception when others or query_canceled then
        get stacked diagnostics
            failure = message_text, failure_state = returned_sqlstate,
            failure_detail = pg_exception_detail, failure_hint = pg_exception_hint;
        -- Of an error between two rows PL/Python's message says only that; what happened stands in the detail.
        failure := pg_catalog.regexp_replace(
            case when failure_detail like 'pgvae: %' then failure_detail
                when failure_detail <> '' then failure || ': ' || failure_detail
                else failure
            end, '^pgvae: ', '');
    end;
    if failure is null then
        perform vae_private.finish_refresh(run, result.users_scored, result.version_scored, null);
    else
        perform vae_private.finish_refresh(run, null, null, failure);
    end if;
    commit;
    if failure is not null then
        raise exception 'refresh of %.recommendations failed: %', model, failure
            using errcode = failure_state,
                hint = coalesce(nullif(failure_hint, '') || '; ', '') || 'the view keeps its last good content';
    end if;
end;
$$;

comment on procedure vae.refresh(text) is
    'Scores all users with the active version and refreshes the prediction views, without locking readers out. '
    'Logged in vae.refreshes while it runs; after a failure the views hold their last good content. '
    'Call it outside a transaction block.';


create or replace function vae_private.start_refresh(id integer, view_name text)
returns bigint
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    m vae.models;
    run bigint;
begin
    select * into m from vae.models where models.model_id = id;
    perform vae_private.check_views(m);
    if not exists (select from vae.versions v where v.model_id = id and v.state = 'active') then
        raise exception 'model % has no active version', m.name
            using errcode = 'VA002', hint = 'train one with pgvae train, then: select * from vae.activate(…)';
    end if;
    -- The caller holds the model's refresh lock, so whoever left a row running is gone, or waits for the lock and will
    -- see that it came too late.
    update vae.refreshes r
    set state = 'failed', finished_at = now(), error = 'the session ended before the refresh did'
    where r.model_id = id and r.state = 'running';
    insert into vae.refreshes (model_id, view) values (id, view_name) returning refresh_id into run;
    return run;
end;
$$;

comment on function vae_private.start_refresh(integer, text) is 'Logs the start of a refresh; part of vae.refresh.';


create or replace function vae_private.refresh_view(id integer, view_name text)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    model_name text;
    source text;
    populated boolean;
begin
    select m.name, o.object into model_name, source
    from vae.models m
    cross join lateral vae_private.model_objects(m.model_id) o
    where m.model_id = id and o.kind = 'materialized view' and o.object = view_name || '_materialized';
    if source is null then
        raise exception 'model % has no prediction view %', id, view_name
            using errcode = 'undefined_table', hint = 'see: select * from vae.models';
    end if;
    -- Within SECURITY DEFINER nobody can tell who called. But only who may use the model can have logged the start.
    if not exists (
        select from vae.refreshes r
        where r.model_id = id and r.view = view_name and r.state = 'running' and r.backend_pid = pg_backend_pid()
    ) then
        raise exception 'no refresh of %.% was started in this session', model_name, view_name
            using errcode = 'insufficient_privilege', hint = format('refresh with: call vae.refresh(%L)', model_name);
    end if;
    select c.relispopulated into populated
    from pg_class c
    join pg_namespace n on n.oid = c.relnamespace
    where n.nspname = model_name and c.relname = source;
    -- A view that holds something is refreshed concurrently: its readers go on reading. The refresh runs as the view's
    -- owner; nothing else may touch the view here, since reading it would run its owner's code with this function's rights.
    execute format('refresh materialized view %s %I.%I', case when populated then 'concurrently' else '' end, model_name, source);
end;
$$;

comment on function vae_private.refresh_view(integer, text) is
    'Refreshes one prediction view, for a refresh that was logged in this session. SECURITY DEFINER, since only its owner '
    'may; the scoring itself runs with the rights of the model''s owner.';


create or replace function vae_private.finish_refresh(run bigint, users_scored bigint, version_scored integer, failure text)
returns void
language sql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
update vae.refreshes r
set state = case when failure is null then 'succeeded' else 'failed' end,
    finished_at = clock_timestamp(),
    seconds = extract(epoch from clock_timestamp() - r.started_at),
    row_count = users_scored,
    version = version_scored,
    error = failure
where r.refresh_id = run
$$;

comment on function vae_private.finish_refresh(bigint, bigint, integer, text) is 'Logs the end of a refresh; part of vae.refresh.';
