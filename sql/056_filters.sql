-- Candidate sets: named relations that say which items may be recommended.

create or replace function vae.set_candidates(
    model text,
    name text,
    relation regclass,
    item_id text default null,
    for_refresh boolean default null
)
returns table (item_count bigint, known_item_count bigint, is_for_refresh boolean)
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
    m vae.models;
    found text;
    before vae.candidates;
    after vae.candidates;
begin
    select * into m from vae.models where models.model_id = id;
    perform vae_private.check_owner(model);
    if name is null or name = '' or octet_length(name) > 63 then
        raise exception 'candidates cannot be called "%"', coalesce(name, 'null')
            using errcode = 'invalid_name', hint = 'give a name of up to 63 bytes, as in: in_stock';
    end if;
    if relation is null then
        raise exception 'relation is null'
            using errcode = 'null_value_not_allowed', hint = 'name the table or view that lists the items: relation => ''public.stock''';
    end if;
    perform vae_private.check_readable(array[relation]);
    item_id := vae_private.named_key(relation, item_id, m.item_id_column, 'item_id');
    select c.* into before from vae.candidates c where c.model_id = m.model_id and c.for_refresh;
    -- Not given, it stays as it is.
    for_refresh := coalesce(for_refresh, before.name = name, false);
    if for_refresh then
        perform vae_private.check_owner_reads(m, array[relation]);
    end if;
    found := vae_private.key_type(relation, item_id, 'item_id');
    if found <> m.item_id_type and not array[found, m.item_id_type] <@ array['integer', 'bigint'] then
        raise exception 'keys of items differ: % in model %, % in %', m.item_id_type, model, found, relation
            using errcode = 'datatype_mismatch', hint = 'give a view that casts the column';
    end if;
    insert into vae.candidates as c (model_id, name, relation_schema, relation_table, item_id_column, for_refresh)
    select m.model_id, name, n.nspname, r.relname, item_id, false
    from pg_class r
    join pg_namespace n on n.oid = r.relnamespace
    where r.oid = relation
    on conflict on constraint pk_candidates do update
    set relation_schema = excluded.relation_schema, relation_table = excluded.relation_table,
        item_id_column = excluded.item_id_column, for_refresh = false;
    if for_refresh then
        update vae.candidates c set for_refresh = false where c.model_id = m.model_id and c.for_refresh;
        update vae.candidates c set for_refresh = true where c.model_id = m.model_id and c.name = set_candidates.name;
    end if;
    select c.* into after from vae.candidates c where c.model_id = m.model_id and c.for_refresh;
    if before.name is not null and after is distinct from before then
        raise notice 'refreshes of model % recommend %, and no longer the items of %', model,
            case when after.name is null then 'the whole catalogue'
                else format('only the items of %s (%I.%I)', after.name, after.relation_schema, after.relation_table) end,
            format('%s (%I.%I)', before.name, before.relation_schema, before.relation_table);
    end if;
    -- A relation that fails does so here, and nothing is kept.
    begin
        return query execute format(
            'select count(*), count(i.item_index), $1'
            ' from (select distinct c.%1$I as item_id from %2$s c where c.%1$I is not null) c'
            ' left join vae_private.scoring_versions v on v.model_id = %3$s'
            ' left join vae_private.scoring_items i on i.version_id = v.version_id and i.item_key = c.item_id::text',
            item_id, relation, m.model_id) using for_refresh;
    exception when others then
        raise exception 'candidates "%" cannot be read from %: %', name, relation, sqlerrm
            using errcode = sqlstate, hint = format('mend %s until this gives rows: select %I from %1$s', relation, item_id);
    end;
end;
$$;

comment on function vae.set_candidates(text, text, regclass, text, boolean) is
    'Names a table or view that lists the items that may be recommended, in the column that item_id names, else called as in the events or item_id, for recommend''s option '
    '{"candidates": name}; gives how many items it lists now, and how many of them the active version knows. It is read whenever '
    'it is used, with the rights of whoever asks. With for_refresh => true, vae.refresh recommends only these items. A name that '
    'exists is defined anew; unless for_refresh is given, it stays the set of the refreshes, or stays none.';


create or replace function vae.drop_candidates(model text, name text)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    id constant integer := vae_private.model_id(model);
begin
    delete from vae.candidates c where c.model_id = id and c.name = drop_candidates.name;
    if not found then
        raise exception 'model % has no candidates "%"', model, coalesce(name, 'null')
            using errcode = 'undefined_object',
                hint = format('there are: %s; only the model''s owner can drop them',
                    coalesce((select string_agg(c.name, ', ' order by c.name) from vae.candidates c where c.model_id = id), 'none'));
    end if;
end;
$$;

comment on function vae.drop_candidates(text, text) is
    'Forgets a candidate set of a model. If it was the one of the refreshes, they rank the whole catalogue again.';
