-- Weights are read through these views. Within a view current_user is the role that really asks (also after SET
-- ROLE, inside a SECURITY DEFINER function, or in a refresh), and the tables beneath are read with the owner's
-- rights: so each statement is checked, and nobody needs a right on the tables. A SECURITY DEFINER function could
-- not tell who called it.

create or replace view vae_private.scoring_versions with (security_barrier) as
select
    v.model_id,
    v.version_id,
    v.version,
    v.format,
    v.trainer_version,
    v.config,
    v.user_count,
    m.name,
    m.user_id_type,
    (m.options ->> 'max_history')::integer as max_history,
    v.features,
    v.demand,
    -- Of an imported version when it was trained, elsewhere: what it foretells begins there.
    coalesce((v.origin ->> 'trained_at')::timestamptz, v.created_at) as created_at,
    v.window_end,
    m.item_id_type,
    v.has_uplift,
    v.no_uplift
from vae.versions v
join vae.models m on m.model_id = v.model_id
join pg_catalog.pg_namespace n on n.nspname = m.name
where v.state = 'active'
    and pg_catalog.has_schema_privilege(current_user, n.oid, 'usage');

create or replace view vae_private.scoring_tensors with (security_barrier) as
select t.*
from vae_private.tensors t
where t.version_id in (select v.version_id from vae_private.scoring_versions v);

create or replace view vae_private.scoring_items with (security_barrier) as
select i.*
from vae_private.items i
where exists (select from vae_private.scoring_versions v where v.version_id = i.version_id);

comment on view vae_private.scoring_versions is
    'Active versions of the models that the current user may score with, that is, whose schema it may use.';
comment on view vae_private.scoring_tensors is
    'Weights of the active versions that the current user may score with.';
comment on view vae_private.scoring_items is
    'Catalogues of the active versions that the current user may score with.';

-- Of versions that do not score (yet, or any more): whoever activates or carries them elsewhere can check them first.
create or replace view vae_private.published_versions with (security_barrier) as
select
    v.model_id,
    v.version_id,
    v.version,
    v.state,
    v.format,
    v.trainer_version,
    v.config,
    v.user_count,
    m.name,
    m.user_id_type,
    (m.options ->> 'max_history')::integer as max_history,
    v.features,
    coalesce((v.origin ->> 'trained_at')::timestamptz, v.created_at) as created_at,
    v.window_end
from vae.versions v
join vae.models m on m.model_id = v.model_id
join pg_catalog.pg_namespace n on n.nspname = m.name
where v.state <> 'loading'
    and pg_catalog.has_schema_privilege(current_user, n.oid, 'usage');

create or replace view vae_private.published_tensors with (security_barrier) as
select t.*
from vae_private.tensors t
where t.version_id in (select v.version_id from vae_private.published_versions v);

create or replace view vae_private.published_items with (security_barrier) as
select i.*
from vae_private.items i
where i.version_id in (select v.version_id from vae_private.published_versions v);

create or replace view vae_private.published_golden_users with (security_barrier) as
select g.*
from vae_private.golden_users g
where g.version_id in (select v.version_id from vae_private.published_versions v);

comment on view vae_private.published_versions is
    'Versions of the models whose schema the current user may use, active or not.';
comment on view vae_private.published_tensors is 'Weights of the versions in vae_private.published_versions.';
comment on view vae_private.published_items is 'Catalogues of the versions in vae_private.published_versions.';
comment on view vae_private.published_golden_users is 'Golden users of the versions in vae_private.published_versions.';


-- Versions are immutable: their weights and catalogue are written while they load, and never again.

create or replace function vae_private.refuse_change()
returns trigger
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    if tg_op = 'INSERT' then
        if not exists (
            select from written w
            left join vae.versions v on v.version_id = w.version_id
            where v.state is distinct from 'loading'
        ) then
            return null;
        end if;
    end if;
    raise exception '% of a published version cannot be changed', case tg_table_name when 'versions' then 'state' else tg_table_name end
        using errcode = 'VA006', hint = 'versions are immutable: publish a new one with pgvae train';
end;
$$;

comment on function vae_private.refuse_change() is 'Trigger that keeps published versions immutable.';

do $$
declare
    name text;
begin
    foreach name in array array['tensors', 'items', 'golden_users'] loop
        execute format('drop trigger if exists immutable_insert on vae_private.%I', name);
        execute format('drop trigger if exists immutable_update on vae_private.%I', name);
        execute format(
            'create trigger immutable_insert after insert on vae_private.%I'
            ' referencing new table as written for each statement execute function vae_private.refuse_change()', name);
        execute format(
            'create trigger immutable_update before update or truncate on vae_private.%I'
            ' for each statement execute function vae_private.refuse_change()', name);
    end loop;
end;
$$;

-- A version that loads again could be written again.
drop trigger if exists immutable_update on vae.versions;
create trigger immutable_update
before update of state on vae.versions
for each row
when (old.state <> 'loading' and new.state = 'loading')
execute function vae_private.refuse_change();
