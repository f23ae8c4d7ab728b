-- The refresh on a schedule, by pg_cron where it is.

create or replace function vae_private.has_cron()
returns boolean
language sql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
-- Where it is on, a type has a name in quotes.
set quote_all_identifiers = off
as $$
-- Not by name: whoever may create a schema could make one called cron, and what lies in it would run with the rights of
-- whoever asks. All that pgvae calls there must be pg_cron's own.
select count(*) = 4
from pg_extension e
join pg_depend d on d.refclassid = 'pg_extension'::regclass and d.refobjid = e.oid and d.deptype = 'e'
left join pg_class c on d.classid = 'pg_class'::regclass and c.oid = d.objid
left join pg_proc p on d.classid = 'pg_proc'::regclass and p.oid = d.objid
join pg_namespace n on n.oid = coalesce(c.relnamespace, p.pronamespace)
where e.extname = 'pg_cron' and n.nspname = 'cron'
    and (c.relname in ('job', 'job_run_details')
        or (p.proname, oidvectortypes(p.proargtypes)) in (('schedule', 'text, text, text'), ('unschedule', 'bigint')))
$$;

comment on function vae_private.has_cron() is
    'Says whether the extension pg_cron is in this database and owns what pgvae reads and calls in the schema cron.';


create or replace function vae_private.check_cron()
returns void
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    home text;
    other constant text := 'without pg_cron, let cron, systemd or Airflow run: pgvae refresh; see docs/scheduling.md';
begin
    if (select i.is_external from vae_private.installation i) then
        raise exception 'this database has no PL/Python, and pg_cron cannot refresh'
            using errcode = 'feature_not_supported', hint = 'let cron, systemd or Airflow run: pgvae refresh; see docs/external.md';
    end if;
    if vae_private.has_cron() then
        if not has_schema_privilege('cron', 'usage') then
            raise exception 'permission denied for pg_cron'
                using errcode = 'insufficient_privilege',
                    hint = format('its owner can allow it: grant usage on schema cron to %I', current_user);
        end if;
        -- pg_cron connects as the role that scheduled the job.
        if not (select r.rolcanlogin from pg_roles r where r.rolname = current_user) then
            raise exception 'role % cannot log in, so pg_cron cannot run a job as it', current_user
                using errcode = 'invalid_authorization_specification',
                    hint = 'schedule as the login role that shall refresh';
        end if;
        return;
    elsif exists (select from pg_extension where extname = 'pg_cron') then
        raise exception 'this pg_cron lacks what pgvae calls'
            using errcode = 'undefined_object', hint = 'a superuser can: alter extension pg_cron update';
    end if;
    begin
        home := current_setting('cron.database_name', true);
    exception when insufficient_privilege then
        raise exception 'pg_cron is not installed in this database'
            using errcode = 'undefined_object', hint = 'a superuser can: create extension pg_cron, and sees in an error what is missing; ' || other;
    end;
    if home = current_database() then
        raise exception 'pg_cron is not installed in this database'
            using errcode = 'undefined_object', hint = 'a superuser can: create extension pg_cron';
    elsif home is not null then
        -- It has one home in a server, from which jobs of other databases are made. A second job of one name replaces the first.
        raise exception 'pg_cron is in the database %, not in this one', home
            using errcode = 'undefined_object',
                hint = format('in the database %s: select cron.schedule_in_database(%L, ''15 3 * * *'','
                    ' ''call vae.refresh(...)'', %L); or else, %s',
                    home, format('pgvae refresh ... in %s', current_database()), current_database(), other);
    else
        raise exception 'this server does not run pg_cron'
            using errcode = 'undefined_object',
                hint = format('add pg_cron to shared_preload_libraries, set cron.database_name = %L, restart, then: create extension'
                    ' pg_cron; %s', current_database(), other);
    end if;
end;
$$;

comment on function vae_private.check_cron() is
    'Refuses where the caller cannot schedule a job with pg_cron in this database, with the way out.';


create or replace function vae.schedule(model text, schedule text default '15 3 * * *')
returns bigint
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    job bigint;
begin
    perform vae_private.model_id(model);
    perform vae_private.check_cron();
    if schedule is null then
        raise exception 'schedule is null'
            using errcode = 'null_value_not_allowed', hint = 'give minute, hour, day, month and weekday, as in: 15 3 * * *';
    end if;
    -- Alone in its job: beside another statement the call would run in a transaction block, where it cannot commit.
    execute 'select cron.schedule($1, $2, $3)' into job
        using format('pgvae refresh %s', model), schedule, format('call vae.refresh(%L)', model);
    return job;
end;
$$;

comment on function vae.schedule(text, text) is
    'Has pg_cron refresh a model''s predictions at the times that a cron expression names (in UTC unless cron.timezone says '
    'otherwise), as the role that calls this; gives the number of the job. Calling it again changes the times. A run that comes '
    'while another refresh of the model is at work ends at once. Without pg_cron the error says what to do.';


create or replace function vae.unschedule(model text)
returns boolean
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    removed boolean := false;
    job record;
begin
    perform vae_private.check_cron();
    -- Also of a model that is gone, where somebody else dropped it: the job is what is left.
    for job in select s.job_id from vae.schedules s where s.job_name = format('pgvae refresh %s', unschedule.model) loop
        execute 'select cron.unschedule($1)' using job.job_id;
        removed := true;
    end loop;
    return removed;
end;
$$;

comment on function vae.unschedule(text) is
    'Removes the job that vae.schedule made for a model; says whether there was one. Only whoever scheduled it, or a superuser, can.';


create or replace function vae_private.cron_jobs(has_cron boolean)
returns table (
    model text, job_id bigint, job_name text, schedule text, command text, runs_as text, is_active boolean,
    last_started_at timestamptz, last_finished_at timestamptz, last_status text, last_message text
)
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    if not has_cron or not has_schema_privilege('cron', 'usage') then
        return;
    end if;
    return query execute $query$
        select
            coalesce(substring(j.jobname from '^pgvae refresh (.*)$'), substring(j.command from E'vae\\.refresh\\s*\\(\\s*''([^'']+)''')),
            j.jobid, j.jobname::text, j.schedule, j.command, j.username, j.active,
            d.start_time, d.end_time, d.status, d.return_message
        from cron.job j
        left join lateral (
            select r.* from cron.job_run_details r where r.jobid = j.jobid order by r.runid desc limit 1
        ) d on true
        where j.database = current_database() and j.command ~ 'vae[.]refresh'
        order by j.jobid
    $query$;
end;
$$;

comment on function vae_private.cron_jobs(boolean) is
    'Reads the jobs of pg_cron that refresh models; none where it is not there, as vae_private.has_cron says: a reader could not ask that '
    'in here, without usage of the schema.';


create or replace function vae_private.unschedule_dropped(model text)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    job record;
begin
    for job in select s.job_id from vae.schedules s where s.model = unschedule_dropped.model loop
        begin
            execute 'select cron.unschedule($1)' using job.job_id;
        exception when insufficient_privilege then
            -- Who bypasses row security sees the jobs of other roles, and may not remove them.
            null;
        end;
    end loop;
end;
$$;

comment on function vae_private.unschedule_dropped(text) is
    'Removes the jobs of pg_cron that refresh a model, as far as the caller may; part of vae.drop_model.';


create or replace view vae.schedules as
select s.*
from vae_private.cron_jobs(vae_private.has_cron()) s;

comment on view vae.schedules is
    'Jobs of pg_cron that refresh models of this database, with their last run. Whoever is no superuser sees those of its own role. '
    'Empty where there is no pg_cron.';
comment on column vae.schedules.model is 'Name of the model that the job refreshes.';
comment on column vae.schedules.job_id is 'Number of the job, see cron.job.';
comment on column vae.schedules.job_name is 'Name of the job; those of vae.schedule begin with pgvae refresh.';
comment on column vae.schedules.schedule is 'When it runs, as a cron expression.';
comment on column vae.schedules.command is 'What it runs.';
comment on column vae.schedules.runs_as is 'Role that it runs as: the one that scheduled it.';
comment on column vae.schedules.is_active is 'False where the job was paused with cron.alter_job.';
comment on column vae.schedules.last_started_at is 'When its last run started; null: it has not run yet.';
comment on column vae.schedules.last_finished_at is 'When its last run ended; null: it is running.';
comment on column vae.schedules.last_status is 'What became of the last run: starting, running, succeeded, failed.';
comment on column vae.schedules.last_message is 'What the last run said: its error, or CALL.';

-- That of an earlier release, which took any schema called cron for pg_cron's. The view used it.
drop function if exists vae_private.scheduled_jobs();
