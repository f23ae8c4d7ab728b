-- What is no longer needed: versions, and rows of the logs.

create or replace function vae.drop_version(model text, version integer, force boolean default false)
returns table (model_version integer, state text, bytes bigint)
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
    dropped record;
begin
    perform vae_private.check_owner(model);
    -- No activation between the look at the state and the removal.
    perform vae_private.lock_versions(id);
    select v.version_id, v.version, v.state, vae_private.version_bytes(v.version_id) as bytes into dropped
    from vae.versions v
    where v.version_id = vae_private.version_id(id, model, drop_version.version);
    if dropped.state = 'active' and not coalesce(force, false) then
        raise exception 'version % of model % is active', dropped.version, model
            using errcode = 'object_in_use',
                hint = format('activate another one first, or leave the model without any: select * from vae.drop_version(%L, %s, force => true)',
                    model, dropped.version);
    end if;
    delete from vae.versions v where v.version_id = dropped.version_id;
    return query select dropped.version, dropped.state, dropped.bytes;
end;
$$;

comment on function vae.drop_version(text, integer, boolean) is
    'Drops a version: weights, catalogue, metrics, lineage; the logs of activations and refreshes keep its number. Refuses '
    'the active one unless forced; the model then scores nothing until another is activated. What is computed from its predictions '
    'when it is asked, segments and demand_by_category, is empty until the next refresh. Only the model''s owner can.';


create or replace function vae.prune(model text, keep integer default 3)
returns table (model_version integer, state text, created_at timestamptz, bytes bigint)
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
begin
    perform vae_private.check_owner(model);
    if keep is null or keep < 0 then
        raise exception 'keep is %', coalesce(keep::text, 'null')
            using errcode = 'invalid_parameter_value', hint = 'say how many of the newest versions stay, as in: keep => 3';
    end if;
    perform vae_private.lock_versions(id);
    return query
        with kept as (
            select n.version
            from (select v.version from vae.versions v where v.model_id = id and v.state <> 'loading' order by v.version desc limit keep) n
            union all
            select vae_private.rollback_target(id)
        ), old as (
            -- Measured before the weights are gone.
            select v.version_id, vae_private.version_bytes(v.version_id) as bytes
            from vae.versions v
            where v.model_id = id and v.state in ('ready', 'retired')
                and v.version not in (select k.version from kept k where k.version is not null)
        ), removed as (
            delete from vae.versions v using old where v.version_id = old.version_id
            returning v.version, v.state, v.created_at, old.bytes
        )
        select r.version, r.state, r.created_at, r.bytes from removed r order by r.version;
end;
$$;

comment on function vae.prune(text, integer) is
    'Drops the versions that nobody needs any more and says which, and how many bytes of weights went with them. Kept are the '
    'active one, the one that vae.rollback would go back to, and the newest ones, as many as keep says. Only the model''s '
    'owner can.';


create or replace function vae_private.prune_logs(id integer)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    setting constant text := coalesce(nullif(current_setting('vae.log_retention', true), ''), '90 days');
    oldest timestamptz;
begin
    begin
        oldest := now() - setting::interval;
    exception when data_exception then
        null;
    end;
    if oldest is null or oldest > now() then
        raise exception 'vae.log_retention is ''%''', setting
            using errcode = 'invalid_parameter_value', hint = 'say for how long the logs are kept, as in: set vae.log_retention = ''1 year''';
    end if;
    -- What vae.freshness and vae.health read stays, however old: of each view the last refresh, the last good one, and the last that
    -- found something new or scored all users.
    -- Negated, as the index on refreshes has its numbers: it gives a view's newest first.
    delete from vae.refreshes r
    where r.model_id = id and r.started_at < oldest and r.state <> 'running'
        and exists (
            select
            from vae.refreshes l
            where l.model_id = r.model_id and l.view = r.view and -l.refresh_id < -r.refresh_id
                and (l.state = 'succeeded' or r.state = 'failed')
                and (r.state = 'failed' or not coalesce(r.mode = 'full' or r.scored_count > 0, false) or l.mode = 'full' or l.scored_count > 0));
    -- The last measurement stays, and the first one, with which vae.check_drift compares later ones.
    delete from vae.observations o
    using (
        select l.version_id, l.measure, l.subject, max(l.observation_id) as last,
            min(l.observation_id) filter (where l.bins is not null) as first
        from vae.observations l
        join vae.versions v on v.version_id = l.version_id
        where v.model_id = id
        group by l.version_id, l.measure, l.subject
    ) kept
    where o.version_id = kept.version_id and o.measure = kept.measure and o.subject = kept.subject
        and o.observed_at < oldest and o.observation_id <> kept.last and o.observation_id is distinct from kept.first;
    delete from vae.verifications f
    using vae.versions v
    where v.model_id = id and f.version_id = v.version_id and f.verified_at < oldest
        and exists (
            select
            from vae.verifications l
            where l.version_id = f.version_id and l.device = f.device and l.verification_id > f.verification_id);
end;
$$;

comment on function vae_private.prune_logs(integer) is
    'Deletes what is older than vae.log_retention from the logs of a model''s refreshes, observations and verifications, except what '
    'still says how the model stands; part of vae.refresh.';


create or replace function vae_private.version_bytes(id bigint)
returns bigint
language sql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
select coalesce(sum(octet_length(t.data)), 0)::bigint from vae_private.published_tensors t where t.version_id = id
$$;

comment on function vae_private.version_bytes(bigint) is 'Gives the bytes of a version''s weights.';


create or replace function vae_private.check_owner(model text)
returns void
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    owner constant name := (select r.rolname from pg_namespace n join pg_roles r on r.oid = n.nspowner where n.nspname = model);
begin
    -- Where the schema is gone, row security decides.
    if owner is not null and not pg_has_role(owner, 'usage') then
        raise exception 'model % belongs to %', model, owner
            using errcode = 'insufficient_privilege', hint = format('act as its owner: set role %I', owner);
    end if;
end;
$$;

comment on function vae_private.check_owner(text) is 'Refuses a caller who neither owns a model''s schema nor is a member of the role that does.';


create or replace function vae_private.log_drop()
returns trigger
language plpgsql
volatile
called on null input
parallel unsafe
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    -- With the model itself its log goes too.
    if exists (select from vae.models m where m.model_id = old.model_id) then
        -- Not current_user, which is the owner of this function.
        insert into vae.activations (activated_by, model_id, version, action, forced)
        values (coalesce(nullif(current_setting('role'), 'none'), session_user), old.model_id, old.version, 'drop', old.state = 'active');
    end if;
    return null;
end;
$$;

comment on function vae_private.log_drop() is
    'Trigger that logs each dropped version in vae.activations. SECURITY DEFINER, since nobody writes that log otherwise.';

drop trigger if exists log_drop on vae.versions;
create trigger log_drop
after delete on vae.versions
for each row
execute function vae_private.log_drop();
