-- Prediction views: computed by the scheduled refresh, read by everybody else.

-- No SET search_path: a procedure with one cannot commit, and the log must be visible while the refresh runs. Every
-- name in it is qualified instead.
create or replace procedure vae.refresh(model text, views text[] default null, "full" boolean default false)
language plpgsql
security invoker
as $$
declare
    id integer;
    wanted text[];
    place integer := 1;
    -- The version that scores, and how often it may change meanwhile.
    scoring bigint;
    restarts_left integer := 3;
    run bigint;
    mode text;
    result record;
    failure text;
    failure_state text;
    failure_detail text;
    failure_hint text;
    failures text[] := '{}';
    failed text[] := '{}';
    first_failure text;
    first_state text;
    first_hint text;
begin
    -- Fails at once inside a transaction block, before anything is locked or logged.
    call vae_private.commit_refresh();
    -- In each transaction: where a role's default is serializable, whoever writes events meanwhile would fail the refresh. A view is
    -- filled by one statement, from one moment, all the same.
    set transaction isolation level read committed;
    id := vae_private.model_id(model);
    wanted := vae_private.prediction_views(id, views);
    -- A lock for the transaction that logs the start, and again for each one that refreshes: no cancel, at whatever
    -- moment, leaves a lock behind that the session would keep.
    if pg_catalog.pg_try_advisory_xact_lock(pg_catalog.hashtext('pgvae refresh'), id)
        and vae_private.may_be_between_views(id)
    then
        -- The lock is free, yet another session is at it: it died, or it is on its way from one view to the next.
        commit;
        set transaction isolation level read committed;
        perform pg_catalog.pg_sleep(0.2);
    end if;
    perform vae_private.lock_refresh(id, model);
    perform vae_private.check_refresh(id);
    if (select i.is_external from vae_private.installation i)
        and not exists (select from vae_private.staged_run(id, wanted[1]))
    then
        perform vae_private.refuse_scoring(id);
    end if;
    perform vae_private.prune_logs(id);
    scoring := vae_private.active_version_id(id);
    mode := vae_private.first_mode(id, wanted[1], refresh."full");
    run := vae_private.start_refresh(id, wanted[1], mode);
    commit;
    set transaction isolation level read committed;
    while place <= pg_catalog.cardinality(wanted) loop
        loop
            perform pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtext('pgvae refresh'), id);
            if not exists (select from vae.refreshes r where r.refresh_id = run and r.state = 'running') then
                -- The log goes with a model that somebody dropped meanwhile.
                perform vae_private.model_id(model);
                raise exception 'another session began to refresh model % at the same moment', model
                    using errcode = 'lock_not_available', hint = 'see: select * from vae.refreshes order by refresh_id desc';
            end if;
            failure := null;
            begin
                perform vae_private.refresh_view(id, wanted[place], mode);
                select * into result from vae_private.last_run(id, wanted[place]);
            exception when others or query_canceled then
                get stacked diagnostics
                    failure = message_text, failure_state = returned_sqlstate,
                    failure_detail = pg_exception_detail, failure_hint = pg_exception_hint;
                -- Of an error between two rows PL/Python's message says only that; what happened stands in the detail.
                failure := pg_catalog.regexp_replace(
                    case when failure_detail like 'pgvae: %' then failure_detail
                        when failure_detail <> '' then failure || ': ' || failure_detail
                        else failure
                    end, '^(pgvae|spiexceptions[.][A-Za-z]+): ', '');
            end;
            exit when failure is not null;
            exit when result.mode is null or result.mode not like 'needs %';
            mode := pg_catalog.substr(result.mode, 7);
            perform vae_private.continue_refresh(run, mode);
            commit;
            set transaction isolation level read committed;
        end loop;
        if failure is null then
            -- What fills no row remembers that, too; what somebody put in the view's place remembers no run.
            perform vae_private.finish_refresh(
                run, coalesce(result.row_count, 0), result.version, coalesce(result.scored_count, 0), result.mode, result.left_out, null);
        else
            perform vae_private.finish_refresh(run, null, null, null, null, null, failure);
            -- Not by ||, of which a schema of the caller's path could have one that fits better.
            failed := pg_catalog.array_append(failed, wanted[place]);
            failures := pg_catalog.array_append(failures, pg_catalog.format('%s: %s', wanted[place], failure));
            first_failure := coalesce(first_failure, failure);
            first_state := coalesce(first_state, failure_state);
            first_hint := coalesce(first_hint, failure_hint);
            -- Who cancels means all of it.
            exit when failure_state = '57014';
        end if;
        if restarts_left > 0 and vae_private.active_version_id(id) <> scoring then
            -- Another version was activated meanwhile: all views shall be of one.
            raise notice 'another version of model % became active meanwhile: its views are refreshed again', model;
            scoring := vae_private.active_version_id(id);
            restarts_left := restarts_left - 1;
            failed := '{}';
            failures := '{}';
            first_failure := null;
            first_state := null;
            first_hint := null;
            place := 0;
        end if;
        place := place + 1;
        if place <= pg_catalog.cardinality(wanted) then
            mode := vae_private.first_mode(id, wanted[place], refresh."full");
            run := vae_private.start_refresh(id, wanted[place], mode);
        end if;
        commit;
        set transaction isolation level read committed;
    end loop;
    commit;
    if pg_catalog.cardinality(failed) > 0 then
        -- Dropped meanwhile, it has no view that could keep anything.
        perform vae_private.model_id(model);
    end if;
    if pg_catalog.cardinality(failed) = 1 then
        raise exception 'refresh of %.% failed: %', model, failed[1], first_failure
            using errcode = first_state,
                hint = coalesce(nullif(first_hint, '') || '; ', '') || 'the view keeps its last good content';
    elsif pg_catalog.cardinality(failed) > 1 then
        raise exception 'refresh of % of the % views of model % failed: %',
            pg_catalog.cardinality(failed), pg_catalog.cardinality(wanted), model, pg_catalog.array_to_string(failures, '; ')
            using errcode = first_state,
                hint = coalesce(nullif(first_hint, '') || '; ', '') || 'these views keep their last good content';
    end if;
end;
$$;

comment on procedure vae.refresh(text, text[], boolean) is
    'Scores with the active version and refreshes the prediction views of a model, or those named, one after the other, without '
    'locking readers out; all again where another version is activated meanwhile. Recommendations are scored again for those users for whom something changed, or for all with full => true. '
    'Logged in vae.refreshes while it runs, where older entries than vae.log_retention go; a view whose refresh fails keeps its last good content, the others '
    'are refreshed, and the call ends with an error that names it. Call it outside a transaction block.';


-- No SET search_path, as of vae.refresh. In Python, since PL/pgSQL cannot catch what a commit raises, and PostgreSQL's own words
-- name no remedy.
create or replace procedure vae_private.commit_refresh()
language plpython3u
security invoker
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
GD["@RUNTIME@"].commit_refresh(plpy)
$pgvae$;

comment on procedure vae_private.commit_refresh() is
    'Commits, or says with a hint that a refresh cannot run inside a transaction block; part of vae.refresh.';


create or replace function vae_private.prediction_views(id integer, chosen text[])
returns text[]
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    known constant text[] := array(
        select regexp_replace(o.object, '_materialized$', '')
        from vae_private.model_objects(id) o
        where o.kind = 'materialized view' and o.object like E'%\\_materialized'
        order by o.step);
    unknown text;
begin
    if chosen is null then
        return known;
    end if;
    select coalesce(c.name, 'null') into unknown
    from unnest(chosen) with ordinality as c (name, place)
    where c.name is null or c.name <> all (known)
    order by c.place
    limit 1;
    if unknown is not null or cardinality(chosen) = 0 then
        raise exception 'views is %', case when unknown is null then 'empty' else unknown end
            using errcode = 'invalid_parameter_value',
                hint = format('prediction views of this model: %s', array_to_string(known, ', '));
    end if;
    return array(select k.name from unnest(known) with ordinality as k (name, place) where k.name = any (chosen) order by k.place);
end;
$$;

comment on function vae_private.prediction_views(integer, text[]) is
    'Gives the prediction views of a model that were chosen (null: all) in the order of their refresh; refuses unknown ones.';


create or replace function vae_private.lock_refresh(id integer, model text)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    if not pg_try_advisory_xact_lock(hashtext('pgvae refresh'), id) then
        raise exception 'model % is being refreshed or changed by another session', model
            using errcode = 'lock_not_available', hint = 'see: select * from vae.refreshes where state = ''running''';
    end if;
end;
$$;

comment on function vae_private.lock_refresh(integer, text) is
    'Takes the refresh lock of a model until the transaction ends, or refuses where another session holds it.';


create or replace function vae_private.may_be_between_views(id integer)
returns boolean
language sql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
select exists (
    select
    from vae.refreshes r
    join pg_stat_activity a on a.pid = r.backend_pid
    where r.model_id = id and r.state = 'running' and r.backend_pid <> pg_backend_pid())
$$;

comment on function vae_private.may_be_between_views(integer) is
    'Says whether another living session has logged a refresh of a model as running; part of vae.refresh.';


create or replace function vae_private.check_refresh(id integer)
returns void
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    m vae.models;
begin
    if current_setting('transaction_read_only')::boolean then
        raise exception 'a refresh writes, and this %', case when pg_is_in_recovery() then 'server is a standby' else 'session is read-only' end
            using errcode = 'read_only_sql_transaction',
                hint = case when pg_is_in_recovery() then 'refresh on its primary' else 'set default_transaction_read_only = off' end;
    end if;
    select * into m from vae.models where models.model_id = id;
    perform vae_private.check_views(m);
    perform vae_private.check_ownership((select n.nspowner from pg_namespace n where n.nspname = m.name));
    if not exists (select from vae.versions v where v.model_id = id and v.state = 'active') then
        raise exception 'model % has no active version', m.name
            using errcode = 'VA002', hint = vae_private.activation_hint(id, m.name);
    end if;
end;
$$;

comment on function vae_private.check_refresh(integer) is
    'Refuses a refresh where nothing can be written, of a model without an active version, or whose views are gone or read another table; '
    'part of vae.refresh.';


create or replace function vae_private.check_stored(m vae.models, view_name text)
returns void
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    if not coalesce((
        select c.relispopulated
        from pg_class c
        join pg_namespace n on n.oid = c.relnamespace
        where n.nspname = m.name and c.relname = view_name || '_materialized'), false)
    then
        raise exception 'model % has no stored %', m.name, view_name
            using errcode = 'object_not_in_prerequisite_state', hint = format('refresh first: call vae.refresh(%L)', m.name);
    end if;
end;
$$;

comment on function vae_private.check_stored(vae.models, text) is
    'Refuses where a prediction view of a model was never refreshed; PostgreSQL''s own refusal would speak of another command.';


create or replace function vae_private.active_version_id(id integer)
returns bigint
language sql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
select v.version_id from vae.versions v where v.model_id = id and v.state = 'active'
$$;

comment on function vae_private.active_version_id(integer) is
    'Gives the version of a model that scores; part of vae.refresh.';


create or replace function vae_private.first_mode(id integer, view_name text, "full" boolean)
returns text
language sql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
select case
    when not coalesce(first_mode."full", false)
        and view_name || '_changed' in (select o.object from vae_private.model_objects(id) o) then 'incremental'
    else 'full' end
$$;

comment on function vae_private.first_mode(integer, text, boolean) is
    'Says how a refresh of a prediction view begins: incremental where it can be and nobody asks for a full one.';


create or replace function vae_private.start_refresh(id integer, view_name text, mode text)
returns bigint
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    run bigint;
begin
    -- The caller holds the model's refresh lock, so whoever left a row running is gone, or waits for the lock and will
    -- see that it came too late.
    update vae.refreshes r
    set state = 'failed', phase = null, finished_at = clock_timestamp(), error = 'the session ended before the refresh did'
    where r.model_id = id and r.state = 'running';
    begin
        insert into vae.refreshes (model_id, view, phase, events_until)
        values (
            id, view_name, case mode when 'incremental' then 'comparing' else 'scoring' end,
            -- Rows that were scored outside are older than the call that stores them.
            coalesce((select s.events_until from vae_private.staged_run(id, view_name) s), statement_timestamp()))
        returning refresh_id into run;
    exception when foreign_key_violation then
        -- Somebody dropped the model meanwhile.
        null;
    end;
    return run;
end;
$$;

comment on function vae_private.start_refresh(integer, text, text) is
    'Logs the start of a refresh; null where the model is gone. Part of vae.refresh.';


create or replace function vae_private.continue_refresh(run bigint, mode text)
returns void
language sql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
update vae.refreshes r
set phase = case continue_refresh.mode when 'merge' then 'storing' else 'scoring' end
where r.refresh_id = run
$$;

comment on function vae_private.continue_refresh(bigint, text) is
    'Logs that a refresh goes on in another way than it began; part of vae.refresh.';


create or replace function vae_private.refresh_view(id integer, view_name text, mode text)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security definer
set search_path = pg_catalog, pg_temp
-- PostgreSQL itself writes a wrong name for its temporary table where it is on.
set quote_all_identifiers = off
-- What holds nothing stands as NULL in the runtime's array literals.
set array_nulls = on
as $$
declare
    model_name text;
    owner name;
    sources text[];
    source text;
    populated boolean;
begin
    select m.name, array_agg(o.object order by o.step) into model_name, sources
    from vae.models m
    cross join lateral vae_private.model_objects(m.model_id) o
    where m.model_id = id and o.kind = 'materialized view'
        and o.object = any (array[
            case when mode <> 'incremental' then view_name || '_materialized' end,
            view_name || '_changed'])
    group by m.name;
    if sources is null then
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
    perform set_config('vae.refresh_mode', mode, true);
    -- In one transaction: readers see what both held before, or what both hold after.
    foreach source in array sources loop
        select c.relispopulated and exists (
            select from pg_index i
            where i.indrelid = c.oid and i.indisunique and i.indisvalid and i.indpred is null and i.indexprs is null),
            pg_get_userbyid(c.relowner)
        into populated, owner
        from pg_class c
        join pg_namespace n on n.oid = c.relnamespace
        where n.nspname = model_name and c.relname = source;
        perform vae_private.check_owner_role(model_name, owner, 'vae_operator');
        if populated and not has_database_privilege(owner, current_database(), 'temporary') then
            raise exception 'the owner of model %, %, may not create temporary tables, as PostgreSQL does in a refresh', model_name, owner
                using errcode = 'insufficient_privilege', hint = format('grant temporary on database %I to %I', current_database(), owner);
        end if;
        -- A view that holds something is refreshed concurrently: its readers go on reading. The refresh runs as the view's
        -- owner; nothing else may touch the view here, since reading it would run its owner's code with this function's rights.
        execute format('refresh materialized view %s %I.%I', case when populated then 'concurrently' else '' end, model_name, source);
    end loop;
    perform set_config('vae.refresh_mode', '', true);
end;
$$;

comment on function vae_private.refresh_view(integer, text, text) is
    'Refreshes what one prediction view reads, for a refresh that was logged in this session: all of it, or in the mode incremental '
    'only what changed. SECURITY DEFINER, since only its owner may; the scoring itself runs with the rights of the model''s owner.';


create or replace function vae_private.finish_refresh(
    run bigint, rows_stored bigint, version_scored integer, rows_scored bigint, mode text, left_out text, failure text)
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
    -- What was scored outside took its time before this began.
    seconds = extract(epoch from clock_timestamp()
        - coalesce((select s.events_until from vae_private.staged_run(r.model_id, r.view) s), r.started_at)),
    phase = null,
    mode = finish_refresh.mode,
    row_count = rows_stored,
    scored_count = rows_scored,
    version = version_scored,
    left_out = finish_refresh.left_out,
    error = failure
where r.refresh_id = run
$$;

comment on function vae_private.finish_refresh(bigint, bigint, integer, bigint, text, text, text) is
    'Logs the end of a refresh; part of vae.refresh.';
