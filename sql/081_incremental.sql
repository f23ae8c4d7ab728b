-- Recommendations again only for whom something changed. recommendations_materialized holds the last refresh that stored
-- all users, recommendations_changed what was scored since; vae_private.refreshed_recommendations fills both. It runs within
-- a refresh, as the model's owner: nothing else may touch the shop's tables and the owner's views in the owner's place.

create or replace function vae_private.recommend_users(model_id integer, k integer, users text[])
returns table (user_key text, item_keys text, scores text, is_cold_start boolean, model_version integer, digest bigint)
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
set row_security = on
-- These users are few: their events are found by an index.
set enable_nestloop = on
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].recommend_all(plpy, model_id, k, users)
$pgvae$;

create or replace function vae_private.record_run(
    model_id integer, view_name text, row_count bigint, version integer, scored_count bigint, mode text)
returns void
language plpython3u
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
GD["@RUNTIME@"].record_run(plpy, model_id, view_name, row_count, version, scored_count, mode)
$pgvae$;

comment on function vae_private.recommend_users(integer, integer, text[]) is
    'Scores the users of a model whose keys are given, as vae_private.recommend_all does all of them.';
comment on function vae_private.record_run(integer, text, bigint, integer, bigint, text) is
    'Remembers in the session what a run for a prediction view gave, for the log of refreshes.';


create or replace function vae_private.refresh_select(model_id integer, is_digested boolean)
returns text
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
    m vae.models;
    hash text;
begin
    select * into m from vae.models where models.model_id = refresh_select.model_id;
    hash := case m.item_id_type
        when 'bigint' then 'hashint8extended'
        when 'integer' then 'hashint4extended'
        when 'uuid' then 'uuid_hash_extended'
        else 'hashtextextended' end;
    -- Outliers are asked about like everybody else: leaving them out keeps them from the training alone. An event that
    -- stands twice is left to the runtime: sorting duplicates out takes four times as long as all digests (9.6 s of 4 million
    -- events).
    return format(
        E'select c.user_id, c.item_id, c.event_type, c.occurred_at%1$s\nfrom (\n%2$s\n) c%3$s',
        case when is_digested then format(
            E',\n    %s(c.item_id, timestamp_hash_extended('
            'c.occurred_at at time zone ''UTC'', hashtextextended(c.event_type, 0))) as digest', hash) end,
        vae_private.clean_select(model_id, 'admitted rows'),
        case
            when m.users_table is null then ''
            when is_digested and cardinality(m.user_features) > 0 then format(
                E'\nunion all\nselect u.user_id, null, null, null, jsonb_hash_extended(u.features, 1) from %I.user_features u', m.name)
            else format(
                E'\nunion all\nselect k.%1$I%2$s, null, null, null%6$s from %3$I.%4$I k where k.%1$I is not null%5$s',
                m.users_key_column,
                case
                    when vae_private.key_collation(m, 'users') <> '' then '::text collate "default"'
                    when m.user_id_type = 'text' then '::text'
                    else ''
                end,
                m.users_schema, m.users_table,
                case m.user_id_type when 'text' then format(' and octet_length(k.%I) <= 512', m.users_key_column) else '' end,
                case when is_digested then ', 1' end)
        end);
end;
$$;

comment on function vae_private.refresh_select(integer, boolean) is
    'Writes the query that gives what a refresh reads of the users of a model, with a digest of each row or without.';


create or replace function vae_private.scoring_context(model_id integer)
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
    relation text;
    key_column text;
    candidates text;
begin
    select format('%I.%I', c.relation_schema, c.relation_table), c.item_id_column into relation, key_column
    from vae.candidates c
    where c.model_id = model_id and c.for_refresh;
    if relation is not null then
        execute format('select concat(count(*), '' '', sum(hashtextextended(c.key, 0)))'
            ' from (select distinct r.%I::text as key from %s r) c', key_column, relation) into candidates;
    end if;
    -- All that decides the scores of every user at once.
    return (
        select hashtextextended(concat_ws(' ', v.version_id, '@RUNTIME@', m.options, m.user_features, relation, candidates), 0)
        from vae_private.scoring_versions v
        join vae.models m on m.model_id = v.model_id
        where v.model_id = model_id);
exception when others then
    -- Candidates that cannot be read: the scoring itself says why.
    return null;
end;
$$;

comment on function vae_private.scoring_context(integer) is
    'Gives a hash of what all scores of a model depend on: version, code, options, candidates. Null without an active version, or '
    'where the candidates cannot be read.';


create or replace function vae_private.raise_work_mem()
returns text
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    before constant text := current_setting('work_mem');
begin
    -- A sum for each of 200 000 users takes 22 MB; with the default of 4 MB it goes through files, and takes twice as long.
    if pg_size_bytes(before) < pg_size_bytes('64MB') then
        perform set_config('work_mem', '64MB', true);
    end if;
    return before;
end;
$$;

comment on function vae_private.raise_work_mem() is
    'Raises work_mem to 64 MB for the sums of all digests, unless it is higher, and gives what it was, to be put back.';


create or replace function vae_private.refreshed_recommendations(model_id integer, target text)
returns table (
    user_key text, item_keys text, scores text, is_cold_start boolean, model_version integer,
    scored_at timestamptz, digest bigint, context bigint)
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
-- A restored dump fills the materialized views with it off, and would then fail wherever a policy stands.
set row_security = on
-- Compiling took longer than comparing: 1.9 s of 4 million events.
set jit = off
-- As in vae_private.recommend_all.
set enable_nestloop = off
-- Scores that are carried over pass through text: fewer digits, as a role may have them, would change them.
set extra_float_digits = 1
as $$
#variable_conflict use_variable
declare
    -- Above this share of all users the changed ones are merged into recommendations_materialized: reading both costs
    -- more with each of them.
    max_changed constant float8 := 0.1;
    -- vae.refresh sets it; nothing where the owner refreshes by hand, or a dump is restored.
    mode text := coalesce(current_setting('vae.refresh_mode', true), '');
    m vae.models;
    k integer;
    present constant bigint := vae_private.scoring_context(model_id);
    is_ready boolean;
    users text[];
    gone text[];
    kept_count bigint;
    stored_count bigint;
    user_count bigint;
    columns constant text :=
        'r.user_id::text, r.item_ids::text, r.scores::text, r.is_cold_start, r.model_version, r.scored_at, r.digest, r.context';
    stored text;
begin
    select * into m from vae.models where models.model_id = refreshed_recommendations.model_id;
    k := (m.options ->> 'recommendations')::integer;
    -- The refresh puts the setting back.
    perform vae_private.raise_work_mem();
    stored := format('%I.stored_recommendations', m.name);

    if mode in ('incremental', 'merge') then
        is_ready := (
            select count(*) = 2 from pg_class c
            where c.relispopulated and c.oid in (
                to_regclass(format('%I.recommendations_materialized', m.name)), to_regclass(format('%I.recommendations_changed', m.name))));
        if is_ready then
            execute format('select count(*) > 0 and count(*) = count(*) filter (where r.context = $1) from %s r', stored)
            into is_ready using present;
        end if;
        if mode = 'merge' and not is_ready then
            mode := 'full';
        end if;
    end if;

    if target = 'recommendations_changed' and mode <> 'incremental' then
        return;
    elsif mode in ('', 'full') then
        if mode = '' and vae_private.holds_changes(m.name) then
            raise exception '%.recommendations_changed holds scores that a refresh by hand does not renew', m.name
                using errcode = 'object_not_in_prerequisite_state', hint = format('call vae.refresh(%L, full => true)', m.name);
        end if;
        return query
        select r.user_key, r.item_keys, r.scores, r.is_cold_start, r.model_version, now(), r.digest, present
        from vae_private.recommend_all(model_id, k) r;
        return;
    end if;

    if is_ready then
        perform vae_private.check_grants(m, through => 'refresh_digests');
        execute format(
            'select'
            ' coalesce(array_agg(d.user_id::text) filter (where d.digest is distinct from s.digest and d.user_id is not null), ''{}'') as users,'
            ' coalesce(array_agg(s.user_id::text) filter (where d.user_id is null and s.digest is not null), ''{}'') as gone,'
            ' count(*) filter (where s.is_changed and d.digest is not distinct from s.digest) as kept_count,'
            ' count(s.user_id) as stored_count,'
            ' count(d.user_id) as user_count'
            ' from %1$I.refresh_digests d'
            ' full join %1$I.stored_recommendations s using (user_id)', m.name)
        into users, gone, kept_count, stored_count, user_count;
    end if;
    if mode = 'incremental' and (
        not is_ready
        or cardinality(users) + cardinality(gone) + kept_count > max_changed * stored_count)
    then
        -- Nothing changes, and vae.refresh is told what to do instead.
        perform vae_private.record_run(
            model_id, 'recommendations', 0, null, 0, case when is_ready then 'needs merge' else 'needs full' end);
        if vae_private.holds_changes(m.name) then
            return query execute format('select %s from %I.recommendations_changed r', columns, m.name);
        end if;
        return;
    end if;

    if cardinality(users) > 0 then
        return query
        select r.user_key, r.item_keys, r.scores, r.is_cold_start, r.model_version, now(), r.digest, present
        from vae_private.recommend_users(model_id, k, users) r;
    end if;
    if mode = 'incremental' then
        return query
        select g.user_key, '{}', '{}', false, v.version, now(), null::bigint, present
        from unnest(gone) as g (user_key)
        join vae_private.scoring_versions v on v.model_id = refreshed_recommendations.model_id;
        stored := format('%I.recommendations_changed', m.name);
    end if;
    return query execute format(
        'select %s from %s r where not exists (select from unnest($1) as n (user_key) where n.user_key = r.user_id::text)%s',
        columns, stored, case mode when 'merge' then ' and r.digest is not null' else '' end)
    using users || gone;
    perform vae_private.record_run(
        model_id, 'recommendations', user_count,
        (select v.version from vae_private.scoring_versions v where v.model_id = refreshed_recommendations.model_id),
        cardinality(users), 'incremental');
end;
$$;

comment on function vae_private.refreshed_recommendations(integer, text) is
    'Gives the content of recommendations_materialized or recommendations_changed for a refresh: all users scored, or only those '
    'whose digest differs, the others as they are stored.';


create or replace function vae_private.holds_changes(model text)
returns boolean
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    found boolean := false;
begin
    if exists (
        select from pg_class c
        where c.oid = to_regclass(format('%I.recommendations_changed', model)) and c.relispopulated)
    then
        execute format('select exists (select from %I.recommendations_changed)', model) into found;
    end if;
    return found;
end;
$$;

comment on function vae_private.holds_changes(text) is 'Says whether recommendations_changed of a model has rows.';


create or replace function vae_private.build_recommendations(m vae.models)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    name text;
begin
    foreach name in array array['recommendations_materialized', 'recommendations_changed'] loop
        if to_regclass(format('%I.%I', m.name, name)) is null then
            execute format(
                E'create materialized view %1$I.%2$I as'
                '\nselect r.user_key::%3$s as user_id, r.item_keys::%4$s[] as item_ids, r.scores::real[] as scores,'
                '\n    r.is_cold_start, r.model_version, r.scored_at, r.digest, r.context'
                '\nfrom vae_private.refreshed_recommendations(%5$s, %2$L) r\nwith %6$s data',
                m.name, name, m.user_id_type, m.item_id_type, m.model_id,
                case name when 'recommendations_changed' then '' else 'no' end);
        end if;
        if to_regclass(format('%I.%I', m.name, replace(name, '_materialized', '') || '_user_id')) is null then
            execute format('create unique index %I on %I.%I (user_id)', replace(name, '_materialized', '') || '_user_id', m.name, name);
        end if;
    end loop;
    execute format(
        E'create or replace view %1$I.stored_recommendations as'
        '\nselect c.*, true as is_changed from %1$I.recommendations_changed c'
        '\nunion all'
        '\nselect m.*, false from %1$I.recommendations_materialized m'
        '\nwhere not exists (select from %1$I.recommendations_changed c where c.user_id = m.user_id)', m.name);
    execute format(
        E'create or replace view %1$I.stored_digests as'
        '\nselect r.user_id, r.digest from %1$I.stored_recommendations r where r.digest is not null', m.name);
    -- Unnested in the select list, which hands on row by row: as functions in "from" the same took three times as long, since
    -- each user's list was stored first. And unnested numbers, as the planner takes a series for a thousand of each user.
    execute format(
        E'create or replace view %1$I.recommendations as'
        '\nselect l.user_id, l.rank, l.item_id, l.score, l.is_cold_start, l.model_version, l.scored_at,'
        '\n    (p.purchase_probability * (1 - exp(-exp(greatest(-500, least(6,'
        -- Of a share too small for its type the logarithm is null, which "least" would leave out.
        '\n        coalesce(p.item_offset + p.item_slope * ln(nullif(l.score, 0)::float8), ''-infinity'')))))))::real as probability'
        '\nfrom ('
        '\n    select r.user_id,'
        '\n        unnest(array_positions(array_fill(true, array[cardinality(r.item_ids)]), true)) as rank,'
        '\n        unnest(r.item_ids) as item_id, unnest(r.scores) as score,'
        '\n        r.is_cold_start, r.model_version, r.scored_at'
        '\n    from %1$I.stored_recommendations r'
        '\n) l'
        -- Scores among the candidates of a refresh are no shares of the catalogue. Outside: a subquery with such a test is
        -- joined by the leader alone where the rest runs in parallel.
        '\nleft join %1$I.churn_materialized p on p.user_id = l.user_id and p.model_version = l.model_version'
        '\n    and not exists (select from vae.candidates s where s.model_id = %2$s and s.for_refresh)',
        m.name, m.model_id);
end;
$$;

comment on function vae_private.build_recommendations(vae.models) is
    'Makes the views of a model''s recommendations, except materialized content; part of vae_private.build_model.';
