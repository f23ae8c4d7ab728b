-- Of a database without PL/Python (pgvae install --external): `pgvae refresh` scores outside, puts the rows here, and then calls
-- vae.refresh, which stores them like any others. Who brings rows makes up a token, by which alone they are found: not by the session,
-- which a pooler may change between two transactions, and whose number comes again.

create or replace function vae_private.refuse_scoring(model_id integer)
returns setof text[]
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    model constant text := (select m.name from vae.models m where m.model_id = refuse_scoring.model_id);
begin
    raise exception 'this database has no PL/Python, and cannot score by itself'
        using errcode = 'feature_not_supported',
            hint = format('read what was stored, as in: select * from %I.recommendations; refresh it from a terminal or a scheduler: pgvae refresh %s',
                coalesce(model, 'shop'), coalesce(model, 'shop'));
end;
$$;

comment on function vae_private.refuse_scoring(integer) is
    'Says that a database without PL/Python cannot score, and what can be done instead.';


create or replace function vae_private.staged_rows_of(model_id integer, view_name text)
returns setof text[]
language sql
stable
called on null input
parallel unsafe
security definer
set search_path = pg_catalog, pg_temp
as $$
select r.cells
from vae_private.staged_rows r
where r.token = current_setting('vae.staged', true) and r.model_id = staged_rows_of.model_id and r.view = staged_rows_of.view_name
$$;

comment on function vae_private.staged_rows_of(integer, text) is
    'Gives the rows that were brought for a prediction view under the token that vae.staged holds.';


create or replace function vae_private.staged_run(model_id integer, view_name text)
returns table (row_count bigint, version integer, left_out text, events_until timestamptz, error text, hint text, error_state text)
language sql
stable
called on null input
parallel unsafe
security definer
set search_path = pg_catalog, pg_temp
as $$
select r.row_count, v.version, r.left_out, r.events_until, r.error, r.hint, r.error_state
from vae_private.staged_runs r
join vae.versions v using (version_id)
where r.token = current_setting('vae.staged', true) and r.model_id = staged_run.model_id and r.view = staged_run.view_name
$$;

comment on function vae_private.staged_run(integer, text) is
    'Gives what the log of refreshes is to say of a prediction view whose rows were scored outside; no row where none were brought.';


create or replace function vae_private.staged(model_id integer, view_name text)
returns setof text[]
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    run record;
begin
    select * into run from vae_private.staged_run(staged.model_id, staged.view_name);
    if not found then
        perform vae_private.refuse_scoring(staged.model_id);
    elsif run.error is not null then
        raise exception '%', run.error using errcode = coalesce(run.error_state, 'external_routine_exception'), hint = coalesce(run.hint, '');
    elsif not exists (
        select from vae.versions v where v.model_id = staged.model_id and v.version = run.version and v.state = 'active')
    then
        raise exception 'another version became active while this one scored'
            using errcode = 'object_not_in_prerequisite_state', hint = 'refresh again';
    end if;
    return query select * from vae_private.staged_rows_of(staged.model_id, staged.view_name);
end;
$$;

comment on function vae_private.staged(integer, text) is
    'Gives the rows of a prediction view that were scored outside by the version that is active.';


create or replace function vae_private.staged_verification(model_id integer, version_id bigint)
returns table (
    device text, passed boolean, golden_users integer, max_difference double precision, top_k_agreement double precision,
    numpy_version text, blas text, detail text
)
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    wanted vae.versions;
begin
    select * into wanted from vae.versions v where v.version_id = staged_verification.version_id;
    if exists (select from vae_private.staged_run(wanted.model_id, 'verify') s where s.version = wanted.version) then
        return query
        select s[1], s[2]::boolean, s[3]::integer, s[4]::float8, s[5]::float8, s[6], s[7], s[8]
        from vae_private.staged_rows_of(wanted.model_id, 'verify') s;
        return;
    end if;
    -- SQL cannot run it: what was found with the same code stands.
    return query
    select l.device, l.passed, l.golden_users, l.max_difference, l.top_k_agreement, l.numpy_version, l.blas, l.detail
    from vae.verifications l
    where l.verification_id in (
        select max(n.verification_id)
        from vae.verifications n
        where n.version_id = wanted.version_id and n.runtime_digest = (select i.runtime_digest from vae_private.installation i)
        group by n.device);
    if not found then
        return query
        select 'cpu', false, 0, null::float8, null::float8, null, null,
            format('not verified with the code that scores; in a terminal: pgvae verify %s --version %s', m.name, wanted.version)
        from vae.models m
        where m.model_id = wanted.model_id;
    end if;
end;
$$;

comment on function vae_private.staged_verification(integer, bigint) is
    'Gives what `pgvae verify` found out about a version: at this moment, or as logged with the present code.';


-- No SET search_path: a procedure with one cannot commit, and vae.refresh does. One call, so that it stays in one session.
create or replace procedure vae_private.refresh_staged(model text, view_name text, token text)
language plpgsql
security invoker
as $$
begin
    perform pg_catalog.set_config('vae.staged', token, false);
    call vae.refresh(model, array[view_name], true);
    perform pg_catalog.set_config('vae.staged', '', false);
end;
$$;

comment on procedure vae_private.refresh_staged(text, text, text) is
    'Refreshes a prediction view from the rows that were brought under a token.';


create or replace function vae_private.clear_staged(token text)
returns void
language sql
volatile
called on null input
parallel unsafe
security definer
set search_path = pg_catalog, pg_temp
as $$
delete from vae_private.staged_rows r
where r.token = clear_staged.token or r.backend_pid <> all (array(select a.pid from pg_stat_activity a));
delete from vae_private.staged_runs r
where r.token = clear_staged.token or r.backend_pid <> all (array(select a.pid from pg_stat_activity a));
$$;

comment on function vae_private.clear_staged(text) is
    'Deletes the rows that were brought under a token, and those of sessions that are gone.';
