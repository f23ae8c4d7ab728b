-- Versions: which one scores.

create or replace function vae_private.keep_versions(id integer)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    -- Before a row of a version or about one is written: whoever wrote first and asked for the lock later would wait for a prune
    -- that waits for the row. Shared: who only looks and logs, in a transaction left open perhaps, keeps nobody from activating.
    -- A standby changes no version and logs nothing.
    if current_setting('transaction_read_only') = 'off' then
        perform pg_advisory_xact_lock_shared(hashtext('pgvae versions'), id);
    end if;
end;
$$;

comment on function vae_private.keep_versions(integer) is
    'Waits for whoever drops versions of a model; until the end of the transaction nobody does. For what logs about a version or '
    'activates one.';


create or replace function vae_private.lock_versions(id integer)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    -- After the lock of vae_private.locked_model, where both are taken.
    perform pg_advisory_xact_lock(hashtext('pgvae versions'), id);
end;
$$;

comment on function vae_private.lock_versions(integer) is
    'Waits for whoever activates or drops versions of a model, or logs about them; until the end of the transaction nobody else does. '
    'For what drops versions.';


create or replace function vae_private.lock_activation(id integer)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    -- A lock of its own, not the other one made exclusive: two who had verified a version and then activated would wait for each other.
    perform vae_private.keep_versions(id);
    perform pg_advisory_xact_lock(hashtext('pgvae activate'), id);
end;
$$;

comment on function vae_private.lock_activation(integer) is
    'Waits for whoever activates or drops versions of a model; until the end of the transaction nobody else does. For what activates one.';


create or replace function vae_private.activation_gates(id integer, model text, wanted_version integer)
returns table (gate text, status text, detail text, state text, hint text)
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    wanted vae.versions;
    present vae.versions;
    digest constant text := (select i.runtime_digest from vae_private.installation i);
    found record;
    compared bigint;
    seen text;
begin
    perform vae_private.keep_versions(id);
    select * into wanted from vae.versions v where v.version_id = vae_private.version_id(id, model, wanted_version);
    select * into present from vae.versions v where v.model_id = id and v.state = 'active';

    return query select
        'code', case when same then 'pass' else 'fail' end,
        case when same then 'trained and evaluated with the code that this database holds'
            else format('version %s of model %s was trained and evaluated with the code %s, this database holds %s',
                wanted_version, model, left(wanted.code_digest, 12), left(digest, 12)) end,
        'VA003', format('train again with: pgvae train %s; or, if its metrics may be trusted all the same:'
            ' select * from vae.activate(%L, %s, force => true)', model, model, wanted_version)
    from (select wanted.code_digest = digest as same) s;

    select bool_and(r.passed) as passed, max(r.max_difference) as difference, string_agg(format('%s: %s', r.device, r.detail), '; ') as failure
    into found
    from vae.verify(model, wanted_version) r;
    return query select
        'parity', case when found.passed then 'pass' else 'fail' end,
        case when found.passed
            then format('the golden users get the scores of the training, the largest difference is %s', trim(to_char(found.difference, '9.9EEEE')))
            else format('version %s of model %s does not give its golden users the scores of its training: %s',
                wanted_version, model, found.failure) end,
        'VA009', format('see: select * from vae.verify(%L, %s); pgvae doctor checks the server; train again with: pgvae train %s',
            model, wanted_version, model);

    select count(*), string_agg(
            format('NDCG@%s %s against %s, %s split', own.k, round(own.value::numeric, 4), round(base.value::numeric, 4), own.split),
            '; ' order by own.split, own.k) filter (where own.value < base.value)
    into compared, seen
    from vae.metrics own
    join vae.metrics base using (version_id, split, slice, metric, k)
    where own.version_id = wanted.version_id and own.method = 'pgvae' and base.method = 'popularity'
        and own.slice = 'all' and own.metric = 'ndcg';
    return query select
        'popularity', case when seen is not null then 'fail' when compared > 0 then 'pass' else 'skip' end,
        case when seen is not null
            then format('version %s of model %s ranks worse than popularity on held-out events: %s', wanted_version, model, seen)
            when compared > 0 then 'ranks no worse than popularity on held-out events'
            else 'was not measured beside popularity' end,
        'VA008', format('see vae.metrics; train on more data, or: select * from vae.activate(%L, %s, force => true)', model, wanted_version);

    -- The test parts of two trainings are of different users and days, so each figure has a noise of its own: the half
    -- width of the interval of a difference is the root of the sum of both squares.
    select count(*), string_agg(
            format('NDCG@%s %s (%s to %s) against %s (%s to %s), %s split', own.k,
                round(own.value::numeric, 4), round(own.lower::numeric, 4), round(own.upper::numeric, 4),
                round(old.value::numeric, 4), round(old.lower::numeric, 4), round(old.upper::numeric, 4), own.split),
            '; ' order by own.split, own.k)
            filter (where own.value < old.value - sqrt(((own.upper - own.lower) / 2) ^ 2 + ((old.upper - old.lower) / 2) ^ 2))
    into compared, seen
    from vae.metrics own
    join vae.metrics old using (method, split, slice, metric, k)
    where own.version_id = wanted.version_id and old.version_id = present.version_id and present.version_id <> wanted.version_id
        and method = 'pgvae' and slice = 'all' and metric = 'ndcg';
    return query select
        'active version', case when seen is not null then 'fail' when compared > 0 then 'pass' else 'skip' end,
        case when seen is not null then format('version %s of model %s ranks worse than the active version %s: %s',
                wanted_version, model, present.version, seen)
            when compared > 0 then format('ranks no worse than the active version %s, but for chance', present.version)
            when present.version is null then 'no version is active'
            when present.version = wanted_version then 'is the active version'
            else format('was not measured on the same split as the active version %s', present.version) end,
        'VA010', format('see vae.metrics; vae.rollback goes back to an older version; or: select * from vae.activate(%L, %s, force => true)',
            model, wanted_version);
end;
$$;

comment on function vae_private.activation_gates(integer, text, integer) is
    'Asks all that a version must pass to become active; for vae.activate and vae.check_activation.';


create or replace function vae.check_activation(model text, version integer)
returns table (gate text, status text, detail text)
language sql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
select g.gate, g.status, g.detail
from vae_private.activation_gates(vae_private.model_id(check_activation.model), check_activation.model, check_activation.version) g
$$;

comment on function vae.check_activation(text, integer) is
    'Says of each gate whether vae.activate would let a version through, without activating it: the code it was evaluated '
    'with, parity of its scores (vae.verify), its ranking against popularity and against the active version. '
    'status is pass, fail, or skip where there is nothing to compare.';


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
    gate record;
    overridden text[] := '{}';
begin
    -- One activation at a time for a model; a second one waits and then sees the first one's result.
    perform vae_private.lock_activation(id);
    for gate in select g.* from vae_private.activation_gates(id, model, version) g where g.status = 'fail' loop
        if not coalesce(force, false) then
            raise exception '%', gate.detail using errcode = gate.state, hint = gate.hint;
        end if;
        overridden := overridden || gate.detail;
    end loop;
    return query select * from vae_private.switch_version(
        id, version, 'activate', coalesce(force, false), reason, nullif(array_to_string(overridden, '; '), ''));
end;
$$;

comment on function vae.activate(text, integer, boolean, text) is
    'Makes a version the one that scores, from the next statement on; the prediction views follow with the next vae.refresh. '
    'Refuses a version that vae.check_activation finds fault with, unless forced: other code, scores that differ from those '
    'of its training, a ranking worse than popularity, or worse than that of the active version beyond chance. What force '
    'overrode is kept in vae.activations, with who and why.';


create or replace function vae_private.rollback_target(id integer)
returns integer
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    present constant integer := (select v.version from vae.versions v where v.model_id = id and v.state = 'active');
    entry vae.activations;
    target integer;
begin
    -- What put the active version there says what stood before it. Where none is active, whatever was last.
    select * into entry
    from vae.activations a
    where a.model_id = id and a.version = present and a.action = 'activate'
    order by a.activation_id desc
    limit 1;
    select v.version into target
    from vae.versions v
    where v.model_id = id and v.version = entry.previous_version and v.state <> 'loading';
    if target is null then
        -- That one was dropped, or none was active then: the latest before it that is still there.
        select a.version into target
        from vae.activations a
        join vae.versions v on v.model_id = id and v.version = a.version and v.state in ('ready', 'retired')
        where a.model_id = id and a.action <> 'drop' and (present is null or a.activation_id < entry.activation_id)
        order by a.activation_id desc
        limit 1;
    end if;
    return target;
end;
$$;

comment on function vae_private.rollback_target(integer) is
    'Gives the version that vae.rollback would activate; null where there is none.';


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
    perform vae_private.lock_activation(id);
    target := vae_private.rollback_target(id);
    if target is null then
        raise exception 'model % has no earlier version to roll back to', model
            using errcode = 'VA007', hint = format('see: select version, state from vae.versions join vae.models using (model_id) where name = %L', model);
    end if;
    return query select * from vae_private.switch_version(id, target, 'rollback', false, reason, null);
end;
$$;

comment on function vae.rollback(text, text) is
    'Makes the version active that was active before the present one, or the latest before that where it was dropped; asks '
    'no gate. The prediction views follow with the next vae.refresh.';


create or replace function vae_private.switch_version(
    id integer, version integer, action text, force boolean, reason text, overridden text
)
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
            'previous', previous, 'action', action, 'forced', force, 'reason', reason, 'overridden', overridden)::text, true);
        update vae.versions v set state = 'active', activated_at = now() where v.model_id = id and v.version = switch_version.version;
        perform set_config('vae.activation', '', true);
    end if;
    return query select version, previous;
end;
$$;

comment on function vae_private.switch_version(integer, integer, text, boolean, text, text) is
    'Retires the active version and activates another one; part of vae.activate and vae.rollback.';


-- A trigger writes the log, and nobody else can: an operator who sets the state directly is in it too. What the setting tells of gates,
-- an operator can tell as well: whoever may force needs no pretext.
create or replace function vae_private.log_activation()
returns trigger
language plpgsql
volatile
called on null input
parallel unsafe
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    told constant jsonb := nullif(current_setting('vae.activation', true), '')::jsonb;
begin
    insert into vae.activations (activated_by, model_id, version, previous_version, action, forced, reason, overridden)
    values (
        -- Not current_user, which is the owner of this function.
        coalesce(nullif(current_setting('role'), 'none'), session_user),
        new.model_id,
        new.version,
        (told ->> 'previous')::integer,
        coalesce(told ->> 'action', 'activate'),
        coalesce((told ->> 'forced')::boolean, true),
        case when told is null then 'set without vae.activate' else told ->> 'reason' end,
        case when told is null then 'no gate was asked' else told ->> 'overridden' end
    );
    return null;
end;
$$;

comment on function vae_private.log_activation() is
    'Trigger that logs each activation in vae.activations. SECURITY DEFINER, since nobody writes that log otherwise.';

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
    -- The number of a dropped version is not given again: prediction rows and logs still speak of it.
    return (
        select coalesce(max(n.version), 0) + 1
        from (
            select v.version from vae.versions v where v.model_id = id
            union all
            select a.version from vae.activations a where a.model_id = id
        ) n
    );
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
