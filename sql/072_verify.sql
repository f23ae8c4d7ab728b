-- Parity: the golden users of a version, replayed by the code that scores.

create or replace function vae_private.verify(model_id integer, version_id bigint)
returns table (
    device text, passed boolean, golden_users integer, max_difference double precision, top_k_agreement double precision,
    numpy_version text, blas text, detail text
)
language plpython3u
volatile
strict
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].verify(plpy, model_id, version_id)
$pgvae$;

comment on function vae_private.verify(integer, bigint) is
    'Scores the golden users of a version and compares, a row per device; for vae.verify.';


create or replace function vae_private.activation_hint(id integer, model text)
returns text
language sql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
select coalesce(
    (select format('put a version into service: select * from vae.activate(%L, %s)', model, max(v.version))
    from vae.versions v
    where v.model_id = id and v.state <> 'loading'
    having count(*) > 0),
    format('train one, in a terminal: pgvae train %s --activate', model))
$$;

comment on function vae_private.activation_hint(integer, text) is
    'Says what to do about a model without an active version: activate the newest, or train the first.';


create or replace function vae_private.version_id(id integer, model text, version integer)
returns bigint
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
    found bigint;
begin
    select v.version_id into found from vae.versions v where v.model_id = id and v.version = version_id.version;
    if found is null then
        raise exception 'model % has no version %', model, coalesce(version::text, 'null')
            using errcode = 'VA007',
                hint = coalesce(
                    'there are: ' || (select string_agg(v.version::text, ', ' order by v.version) from vae.versions v where v.model_id = id),
                    format('train one, in a terminal: pgvae train %s', model));
    end if;
    return found;
end;
$$;

comment on function vae_private.version_id(integer, text, integer) is
    'Gives the number in this database of a model''s version; an error names those that there are.';


create or replace function vae.verify(model text, version integer default null)
returns table (
    model_version integer, device text, passed boolean, golden_users integer, max_difference double precision,
    top_k_agreement double precision, runtime_digest text, numpy_version text, blas text, detail text
)
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
    number integer;
    wanted bigint;
    digest constant text := (select i.runtime_digest from vae_private.installation i);
    is_external constant boolean := (select i.is_external from vae_private.installation i);
    result record;
begin
    perform vae_private.keep_versions(id);
    number := coalesce(verify.version, (select v.version from vae.versions v where v.model_id = id and v.state = 'active'));
    if number is null then
        raise exception 'model % has no active version', model
            using errcode = 'VA002', hint = vae_private.activation_hint(id, model);
    end if;
    wanted := vae_private.version_id(id, model, number);
    for result in select * from vae_private.verify(id, wanted) loop
        -- A standby answers too; it cannot log. Nor is it a verification where the log itself answers.
        if current_setting('transaction_read_only') = 'off'
            and (not is_external or exists (select from vae_private.staged_run(id, 'verify') s where s.version = number))
        then
            insert into vae.verifications (
                version_id, device, passed, golden_users, max_difference, top_k_agreement, runtime_digest, numpy_version, blas, detail)
            values (
                wanted, result.device, result.passed, result.golden_users, result.max_difference, result.top_k_agreement,
                digest, result.numpy_version, result.blas, result.detail);
        end if;
        return query select
            number, result.device, result.passed, result.golden_users, result.max_difference, result.top_k_agreement,
            digest, result.numpy_version, result.blas, result.detail;
    end loop;
end;
$$;

comment on function vae.verify(text, integer) is
    'Scores the golden users that were stored with a version, by default the active one, and compares with the scores that '
    'the trainer''s network gave them: passed says whether all scores are within 1e-5 and all lists the same but for ties. '
    'A row for the CPU, and one for a GPU where one would score. Logged in vae.verifications, which answers in a database without PL/Python: there pgvae verify does it.';
