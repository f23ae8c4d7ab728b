-- Versions: which one scores.

create or replace function vae.activate(model text, version integer, force boolean default false, reason text default null)
returns table (model_version integer, previous_version integer)
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
    id constant integer := vae_private.model_id(model);
    wanted vae.versions;
    digest constant text := (select i.runtime_digest from vae_private.installation i);
begin
    -- One activation at a time for a model; a second one waits and then sees the first one's result.
    perform pg_advisory_xact_lock(hashtext('pgvae activate'), id);
    select * into wanted from vae.versions v where v.model_id = id and v.version = activate.version;
    if wanted.version is null then
        raise exception 'model % has no version %', model, coalesce(version::text, 'null')
            using errcode = 'VA007',
                hint = coalesce(
                    'there are: ' || (select string_agg(v.version::text, ', ' order by v.version) from vae.versions v where v.model_id = id),
                    format('train one, in a terminal: pgvae train %s', model));
    end if;
    if wanted.code_digest <> digest and not force then
        raise exception 'version % of model % was trained and evaluated with the code %, this database holds %',
            version, model, left(wanted.code_digest, 12), left(digest, 12)
            using errcode = 'VA003',
                hint = format('train again with: pgvae train %s; or, if its metrics may be trusted all the same:'
                    ' select * from vae.activate(%L, %s, force => true)', model, model, version);
    end if;
    if not force and exists (
        select
        from vae.metrics own
        join vae.metrics base using (version_id, split, slice, metric, k)
        where own.version_id = wanted.version_id and own.method = 'pgvae' and base.method = 'popularity'
            and own.slice = 'all' and own.metric = 'ndcg' and own.value < base.value
    ) then
        raise exception 'version % of model % ranks worse than popularity on held-out events', version, model
            using errcode = 'VA008',
                hint = format('see vae.metrics; train on more data, or: select * from vae.activate(%L, %s, force => true)', model, version);
    end if;
    return query select * from vae_private.switch_version(id, version, 'activate', force, reason);
end;
$$;

comment on function vae.activate(text, integer, boolean, text) is
    'Makes a version the one that scores, from the next statement on; the prediction views follow with the next vae.refresh. '
    'Refuses a version of other code, or one that ranks worse than popularity, unless forced.';


create or replace function vae.rollback(model text, reason text default null)
returns table (model_version integer, previous_version integer)
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    id constant integer := vae_private.model_id(model);
    target integer;
begin
    perform pg_advisory_xact_lock(hashtext('pgvae activate'), id);
    -- The version that stood before the active one was put there, if it still exists.
    select a.previous_version into target
    from vae.activations a
    join vae.versions current on current.model_id = id and current.version = a.version and current.state = 'active'
    join vae.versions before on before.model_id = id and before.version = a.previous_version
    where a.model_id = id and a.action = 'activate'
    order by a.activation_id desc
    limit 1;
    if target is null then
        raise exception 'model % has no earlier version to roll back to', model
            using errcode = 'VA007', hint = format('see: select version, state from vae.versions join vae.models using (model_id) where name = %L', model);
    end if;
    return query select * from vae_private.switch_version(id, target, 'rollback', false, reason);
end;
$$;

comment on function vae.rollback(text, text) is
    'Makes the version active that was active before the present one. The prediction views follow with the next vae.refresh.';


create or replace function vae_private.switch_version(id integer, version integer, action text, force boolean, reason text)
returns table (model_version integer, previous_version integer)
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
    previous integer;
begin
    select v.version into previous from vae.versions v where v.model_id = id and v.state = 'active';
    if previous is distinct from version then
        update vae.versions v set state = 'retired', retired_at = now() where v.model_id = id and v.state = 'active';
        perform set_config('vae.activation', jsonb_build_object(
            'previous', previous, 'action', action, 'forced', force, 'reason', reason)::text, true);
        update vae.versions v set state = 'active', activated_at = now() where v.model_id = id and v.version = switch_version.version;
        perform set_config('vae.activation', '', true);
    end if;
    return query select version, previous;
end;
$$;

comment on function vae_private.switch_version(integer, integer, text, boolean, text) is
    'Retires the active version and activates another one; part of vae.activate and vae.rollback.';


-- A trigger writes the log: an operator who sets the state directly is in it too.
create or replace function vae_private.log_activation()
returns trigger
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    told constant jsonb := nullif(current_setting('vae.activation', true), '')::jsonb;
begin
    insert into vae.activations (model_id, version, previous_version, action, forced, reason)
    values (
        new.model_id,
        new.version,
        (told ->> 'previous')::integer,
        coalesce(told ->> 'action', 'activate'),
        coalesce((told ->> 'forced')::boolean, true),
        case when told is null then 'set without vae.activate' else told ->> 'reason' end
    );
    return null;
end;
$$;

comment on function vae_private.log_activation() is 'Trigger that logs each activation in vae.activations.';

drop trigger if exists log_activation on vae.versions;
create trigger log_activation
after update of state on vae.versions
for each row
when (new.state = 'active' and old.state <> 'active')
execute function vae_private.log_activation();


create or replace function vae_private.next_version(id integer)
returns integer
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    -- Two trainings that publish at once get two numbers: the second one waits for the first one's commit.
    perform pg_advisory_xact_lock(hashtext('pgvae publish'), id);
    return (select coalesce(max(v.version), 0) + 1 from vae.versions v where v.model_id = id);
end;
$$;

comment on function vae_private.next_version(integer) is 'Gives the number of a model''s next version; part of publishing.';


create or replace function vae_private.finish_version(id bigint)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    update vae.versions v set state = 'ready' where v.version_id = id and v.state = 'loading';
    if not found then
        raise exception 'version number % is not loading', id
            using errcode = 'VA006', hint = 'versions are immutable: publish a new one with pgvae train';
    end if;
end;
$$;

comment on function vae_private.finish_version(bigint) is 'Closes a version for good, once its weights are written; part of publishing.';
