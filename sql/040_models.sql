-- Defining a model: which tables it reads, and what the shop's words mean.

create or replace function vae_private.standard_event_types()
returns table (name text, event_type text, weight real)
language sql
immutable
called on null input
parallel safe
security invoker
set search_path = pg_catalog, pg_temp
as $$
values
    ('register', 'register', 0::real), ('sign_up', 'register', 0), ('signup', 'register', 0),
    ('search', 'search', 0), ('view_search_results', 'search', 0),
    ('view', 'view', 1), ('view_item', 'view', 1), ('click', 'view', 1), ('pv', 'view', 1), ('browse', 'view', 1),
    ('select_item', 'view', 1), ('detail_page_view', 'view', 1),
    ('add_to_cart', 'add_to_cart', 2), ('cart', 'add_to_cart', 2), ('addtocart', 'add_to_cart', 2),
    ('add_to_wishlist', 'add_to_cart', 2), ('fav', 'add_to_cart', 2), ('favorite', 'add_to_cart', 2),
    ('begin_checkout', 'add_to_cart', 2),
    ('purchase', 'purchase', 4), ('buy', 'purchase', 4), ('order', 'purchase', 4), ('transaction', 'purchase', 4),
    ('review', 'review', 2), ('rate', 'review', 2), ('rating', 'review', 2),
    ('share', 'share', 2)
$$;

comment on function vae_private.standard_event_types() is
    'Spellings of event types that are understood without a mapping (GA4 names and common ones), with their weights.';


create or replace function vae_private.default_options()
returns jsonb
language sql
immutable
called on null input
parallel safe
security invoker
set search_path = pg_catalog, pg_temp
as $$
select jsonb_build_object(
    'recommendations', 20,
    'max_history', 500,
    'horizon_days', 28,
    'max_cold_items', 100000,
    'earliest', '1995-01-01',
    'min_events', 1000,
    'min_users', 50,
    'min_items', 10,
    'outlier_events_per_day', 100,
    'max_share', jsonb_build_object(
        'null_user_ids', 0.5, 'null_item_ids', 0.2, 'null_timestamps', 0.05, 'overlong_ids', 0.05,
        'unknown_event_types', 0.2, 'future_timestamps', 0.05, 'absurd_timestamps', 0.05,
        'orphan_users', 0.2, 'orphan_items', 0.2, 'returns', 0.3, 'duplicates', 0.5, 'outlier_users', 0.5,
        'items_seen_once', 0.9, 'unusable_assignments', 0.2, 'conflicting_assignments', 0.05
    )
)
$$;

comment on function vae_private.default_options() is 'Options of a model that vae.create_model was not given.';


create or replace function vae_private.checked_options(given jsonb)
returns jsonb
language plpgsql
stable
called on null input
parallel safe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    defaults constant jsonb := vae_private.default_options();
    name text;
    value jsonb;
    most numeric;
begin
    if given is null then
        return defaults;
    end if;
    if jsonb_typeof(given) <> 'object' then
        raise exception 'options is %', given
            using errcode = 'invalid_parameter_value', hint = $h$give an object: '{"min_events": 500}'$h$;
    end if;
    for name, value in select * from jsonb_each(given) loop
        if not defaults ? name then
            raise exception 'option "%" is unknown', name
                using errcode = 'invalid_parameter_value',
                    hint = format('known options: %s', (select string_agg(k, ', ' order by k) from jsonb_object_keys(defaults) k));
        end if;
        most := case name when 'recommendations' then 10000 when 'horizon_days' then 365 else 1000000 end;
        if jsonb_typeof(value) <> jsonb_typeof(defaults -> name)
            or (jsonb_typeof(value) = 'number' and ((value)::numeric not between 1 and most or (value)::numeric % 1 <> 0))
        then
            raise exception 'option "%" is %', name, value
                using errcode = 'invalid_parameter_value',
                    hint = case when jsonb_typeof(defaults -> name) = 'number' then format('give a whole number from 1 to %s; ', most) else '' end
                        || format('its default is %s', defaults -> name);
        end if;
        if jsonb_typeof(value) = 'number' then
            -- 20.0 is whole, but no text of an integer.
            given := given || jsonb_build_object(name, (value)::integer);
        end if;
    end loop;
    if given ? 'earliest' then
        begin
            -- Only a date: a time would depend on a zone, a word such as "now" on the day.
            if given ->> 'earliest' !~ '^[0-9]{4}-[0-9]{2}-[0-9]{2}$' then
                raise datetime_field_overflow;
            end if;
            perform (given ->> 'earliest')::date;
        exception when datetime_field_overflow or invalid_datetime_format then
            raise exception 'option "earliest" is %', given -> 'earliest'
                using errcode = 'invalid_parameter_value', hint = 'give a date, as in 2015-01-01';
        end;
    end if;
    for name, value in select * from jsonb_each(given -> 'max_share') loop
        if not (defaults -> 'max_share') ? name then
            raise exception 'option "max_share" names the unknown check "%"', name
                using errcode = 'invalid_parameter_value',
                    hint = format('known checks: %s',
                        (select string_agg(k, ', ' order by k) from jsonb_object_keys(defaults -> 'max_share') k));
        end if;
        if jsonb_typeof(value) <> 'number' or (value)::numeric not between 0 and 1 then
            raise exception 'option "max_share" of "%" is %', name, value
                using errcode = 'invalid_parameter_value', hint = 'give a share between 0 and 1';
        end if;
    end loop;
    return defaults || given || jsonb_build_object(
        'max_share', (defaults -> 'max_share') || coalesce(given -> 'max_share', '{}'));
end;
$$;

comment on function vae_private.checked_options(jsonb) is
    'Completes the options of a model with the defaults, whole numbers as integers; refuses unknown names and wrong values.';


create or replace function vae_private.base_type(type oid)
returns oid
language sql
stable
called on null input
parallel safe
security invoker
set search_path = pg_catalog, pg_temp
as $$
with recursive beneath as (
    select t.oid, t.typbasetype from pg_type t where t.oid = base_type.type
    union all
    select t.oid, t.typbasetype from beneath b join pg_type t on t.oid = b.typbasetype
)
select b.oid from beneath b where b.typbasetype = 0
$$;

comment on function vae_private.base_type(oid) is
    'Gives the type beneath a domain, also one over a domain; of any other type itself.';


create or replace function vae_private.column_type(relation regclass, column_name text, what text)
returns text
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
-- Where it is on, a type has a name in quotes.
set quote_all_identifiers = off
as $$
declare
    found regtype;
begin
    select vae_private.base_type(a.atttypid)::regtype into found
    from pg_attribute a
    where a.attrelid = relation and a.attname = column_name and a.attnum > 0 and not a.attisdropped;
    if found is null then
        raise exception '% has no column "%"', relation, column_name
            using errcode = 'undefined_column',
                hint = format('name the column with %s => ''...''; there are: %s', what, (
                    select string_agg(a.attname, ', ' order by a.attnum)
                    from pg_attribute a
                    where a.attrelid = relation and a.attnum > 0 and not a.attisdropped));
    end if;
    return case found
        when 'character varying'::regtype then 'text'
        when 'character'::regtype then 'text'
        when 'timestamp with time zone'::regtype then 'timestamptz'
        when 'timestamp without time zone'::regtype then 'timestamp'
        else found::text
    end;
end;
$$;

comment on function vae_private.column_type(regclass, text, text) is
    'Gives the SQL type of a column; an error names the columns there are.';


create or replace function vae_private.key_type(relation regclass, column_name text, what text)
returns text
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    found constant text := vae_private.column_type(relation, column_name, what);
begin
    if found not in ('bigint', 'integer', 'uuid', 'text') then
        raise exception 'column "%" of % has the type %', column_name, relation, found
            using errcode = 'datatype_mismatch',
                hint = 'keys are bigint, integer, uuid or text: give a view that casts the column';
    end if;
    -- Two spellings would be one key to PostgreSQL, and two to the runtime, which compares bytes.
    if exists (
        select from pg_attribute a
        join pg_collation c on c.oid = a.attcollation
        where a.attrelid = relation and a.attname = column_name and not c.collisdeterministic)
    then
        raise exception 'column "%" of % has a nondeterministic collation', column_name, relation
            using errcode = 'datatype_mismatch',
                hint = format('a key has one spelling: give a view with one, as in select lower(%1$I) collate "default" as %1$I, ...', column_name);
    end if;
    return found;
end;
$$;

comment on function vae_private.key_type(regclass, text, text) is
    'Gives the type of a key column; an error where it is not bigint, integer, uuid or text, or where two spellings are equal.';


create or replace function vae_private.named_key(relation regclass, given text, own text, usual text)
returns text
language sql
stable
called on null input
parallel safe
security invoker
set search_path = pg_catalog, pg_temp
as $$
select coalesce(
    given,
    (select a.attname from pg_attribute a where a.attrelid = relation and a.attname = own and a.attnum > 0 and not a.attisdropped),
    usual)
$$;

comment on function vae_private.named_key(regclass, text, text, text) is
    'Gives the key column of another table than the events: the one that is named, else the one that is called as in the events, '
    'else the usual one.';


create or replace function vae_private.looks_personal(column_name text)
returns boolean
language sql
immutable
called on null input
parallel safe
security invoker
set search_path = pg_catalog, pg_temp
as $$
select snake ~ ('(e_?mail|phone|mobile|address|birth|passw|passport|iban|(sur|first|last|middle|full|nick|user)_?name)'
    '|(^|_)(mail|name|tel|fax|cell|ip|street|zip|zipcode|postcode|dob|born|ssn|tax|login|gps|lat|latitude|lon|lng|longitude)(_|$)')
from (select regexp_replace(
    lower(regexp_replace(column_name, '([a-z0-9])([A-Z])', E'\\1_\\2', 'g')), '[^[:alnum:]]+', '_', 'g') as snake) s
$$;

comment on function vae_private.looks_personal(text) is
    'Says whether a column of the users'' table looks by its name as if it told who or where a person is.';


create or replace function vae_private.table_features(relation regclass, key_column text, argument text)
returns table (column_name text, kind text, expression text, reason text)
language sql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off
as $$
with columns as (
    select
        a.attnum,
        a.attname::text as name,
        format('k.%I', a.attname) as value,
        t.oid::regtype::text as type,
        t.typtype,
        t.typcategory as category,
        e.typcategory as element_category,
        e.oid::regtype::text as element_type
    from pg_attribute a
    join pg_type t on t.oid = vae_private.base_type(a.atttypid)
    left join pg_type e on e.oid = t.typelem
    where a.attrelid = relation and a.attnum > 0 and not a.attisdropped
), kinds as (
    select
        c.*,
        case
            when c.name = key_column then null
            -- A number that names something is no quantity.
            when c.type in ('boolean', 'uuid') or c.typtype = 'e'
                or (c.type in ('smallint', 'integer', 'bigint') and lower(c.name) ~ '(^|[^a-z])(id|code|key)$') then 'category'
            when c.type in ('smallint', 'integer', 'bigint', 'numeric', 'real', 'double precision', 'interval') then 'number'
            when c.type in ('date', 'timestamp without time zone', 'timestamp with time zone') then 'time'
            when c.category = 'S' then 'text'
            when c.type = 'jsonb' or (c.category = 'A' and (c.element_category in ('S', 'E')
                or c.element_type in ('smallint', 'integer', 'bigint', 'uuid', 'boolean'))) then 'tags'
        end as kind,
        argument = 'user_features' and vae_private.looks_personal(c.name) as is_personal
    from columns c
)
select
    k.name,
    k.kind,
    -- Written so that no setting of the session changes what comes out.
    case
        when k.kind = 'category' then format('%s::text', k.value)
        when k.kind = 'text' then format('left(%s::text, 2000)', k.value)
        when k.type = 'jsonb' then format(
            '(select jsonb_agg(j.tag) from jsonb_array_elements_text('
            'case jsonb_typeof(%1$s) when ''array'' then %1$s when ''string'' then jsonb_build_array(%1$s) end) j (tag))', k.value)
        when k.kind = 'tags' then format('%s::text[]', k.value)
        when k.kind = 'time' then format('extract(epoch from nullif(nullif(%1$s, ''infinity''), ''-infinity''))::numeric', k.value)
        when k.type = 'interval' then format('extract(epoch from %s)::numeric', k.value)
        when k.type in ('real', 'double precision') then format('nullif(nullif(%1$s, ''infinity''), ''-infinity'')::numeric', k.value)
        when k.kind = 'number' then format('%s::numeric', k.value)
    end,
    case
        when k.name = key_column then 'is the key'
        when k.kind is null then format('has the type %s', k.type)
        when k.is_personal then 'looks personal by its name'
        when row_number() over (partition by k.kind is null or k.is_personal order by k.attnum) > 64 then 'stands behind 64 others'
    end
from kinds k
order by k.attnum
$$;

comment on function vae_private.table_features(regclass, text, text) is
    'Lists the columns of a table of users or items: how each is read as a feature (kind and SQL; null: it cannot be), '
    'and the reason why it is none unless it is asked for (null: it is one).';


create or replace function vae_private.chosen_features(relation regclass, key_column text, argument text, chosen text[])
returns text[]
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
    name text;
    found record;
begin
    if relation is null then
        if cardinality(chosen) > 0 then
            raise exception '% is given, but no table', argument
                using errcode = 'invalid_parameter_value',
                    hint = format('name the table beside it: %1$s => ''public.%1$s'', of a model that exists with vae.set_tables; '
                        'of a table that the model has, vae.set_features chooses columns', split_part(argument, '_', 1) || 's');
        end if;
        return '{}';
    end if;
    if chosen is null then
        return array(select f.column_name from vae_private.table_features(relation, key_column, argument) f where f.reason is null);
    end if;
    foreach name in array chosen loop
        select * into found from vae_private.table_features(relation, key_column, argument) f where f.column_name = name;
        if found.column_name is null then
            raise exception '% has no column "%"', relation, name
                using errcode = 'undefined_column', hint = format('%s can hold: %s', argument, coalesce((
                    select string_agg(f.column_name, ', ')
                    from vae_private.table_features(relation, key_column, argument) f where f.kind is not null), 'nothing'));
        end if;
        if found.kind is null then
            raise exception 'column "%" of % cannot be a feature: it %', name, relation, found.reason
                using errcode = 'datatype_mismatch',
                    hint = 'features are numbers, booleans, texts, enums, uuid, dates and times, arrays of texts, and jsonb arrays:'
                        ' give a view that casts the column';
        end if;
    end loop;
    return array(select c.name from unnest(chosen) with ordinality as c (name, place) group by c.name order by min(c.place));
end;
$$;

comment on function vae_private.chosen_features(regclass, text, text, text[]) is
    'Checks the columns that are named as features; of null it makes the columns that are features by themselves.';


create or replace function vae_private.check_exposure(events regclass, exposure_column text)
returns void
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    if exposure_column is not null and vae_private.column_type(events, exposure_column, 'exposure_column') <> 'boolean' then
        raise exception 'column "%" of % has the type %',
            exposure_column, events, vae_private.column_type(events, exposure_column, 'exposure_column')
            using errcode = 'datatype_mismatch',
                hint = 'exposure is a boolean: true where the offer was made, false where chance withheld it, null in all other events';
    end if;
end;
$$;

comment on function vae_private.check_exposure(regclass, text) is 'Refuses a column of exposure that is none, or not a boolean; null is fine.';


create or replace function vae_private.check_model_name(model text)
returns void
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off
as $$
begin
    if model is null or model !~ '^[a-z_][a-z0-9_]*$' or quote_ident(model) <> model or octet_length(model) > 48
        or model ~ '^(pg_|vae$|vae_|information_schema$)'
    then
        raise exception 'model name "%" cannot be a schema''s name', model
            using errcode = 'invalid_name',
                hint = 'use up to 48 lower-case letters, digits and underscores, and no reserved word, as in: shop';
    end if;
    -- The model first: its schema may be gone.
    if exists (select from vae.models m where m.name = model) then
        raise exception 'model "%" exists already', model
            using errcode = 'duplicate_object',
                hint = format('drop it with: select vae.drop_model(%L); or choose another name', model);
    end if;
    if exists (select from pg_namespace where nspname = model) then
        raise exception 'schema "%" exists already', model
            using errcode = 'duplicate_schema', hint = 'a model makes a schema of its own: choose another name';
    end if;
end;
$$;

comment on function vae_private.check_model_name(text) is 'Refuses a name that no model can have, or that is taken; part of vae.create_model.';


create or replace function vae_private.check_readable(relations regclass[])
returns void
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    relation regclass;
begin
    foreach relation in array array_remove(relations, null) loop
        if not exists (select from pg_class c where c.oid = relation and c.relkind in ('r', 'p', 'v', 'm', 'f')) then
            raise exception '% is not a table or view', relation
                using errcode = 'wrong_object_type', hint = 'name a table or a view';
        end if;
        if (select c.relpersistence = 't' from pg_class c where c.oid = relation) then
            raise exception '% is temporary', relation
                using errcode = 'wrong_object_type', hint = 'no other session could read it: name a table or a view that stays';
        end if;
        if not has_table_privilege(relation, 'select') then
            raise exception 'permission denied for %', relation
                using errcode = 'insufficient_privilege',
                    hint = format('its owner can allow it: grant select on %s to %I', relation, current_user);
        end if;
    end loop;
end;
$$;

comment on function vae_private.check_readable(regclass[]) is
    'Refuses what is no table or view, or not the caller''s to read; null is fine. Part of vae.create_model, vae.set_tables, '
    'vae.set_candidates and vae.create_offer.';


create or replace function vae_private.with_tables(
    m vae.models, events regclass, users regclass, users_key text, items regclass, items_key text, user_features text[],
    item_features text[]
)
returns vae.models
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    unused record;
begin
    perform vae_private.check_readable(array[users, items]);
    -- Of a model that exists they would say what is read of the table that stays, which set_features does.
    select f.* into unused
    from (values ('users', users, 'user_features', user_features), ('items', items, 'item_features', item_features)) f (argument, relation, name, chosen)
    where m.model_id is not null and f.relation is null and f.chosen is not null
    limit 1;
    if found then
        raise exception '% is given, but no table', unused.name
            using errcode = 'invalid_parameter_value',
                hint = format('name the table beside it: %1$s => ''public.%1$s''; of a table that the model has, vae.set_features chooses columns',
                    unused.argument);
    end if;
    users_key := vae_private.named_key(users, users_key, m.user_id_column, 'user_id');
    items_key := vae_private.named_key(items, items_key, m.item_id_column, 'item_id');
    if users is not null and vae_private.key_type(users, users_key, 'users_key') <> m.user_id_type then
        raise exception 'keys of users differ: % in %, % in %',
            m.user_id_type, events, vae_private.key_type(users, users_key, 'users_key'), users
            using errcode = 'datatype_mismatch',
                hint = format('name the column with users_key => ''...'', if it is not %I; or give views that cast both to one type', users_key);
    end if;
    if items is not null and vae_private.key_type(items, items_key, 'items_key') <> m.item_id_type then
        raise exception 'keys of items differ: % in %, % in %',
            m.item_id_type, events, vae_private.key_type(items, items_key, 'items_key'), items
            using errcode = 'datatype_mismatch',
                hint = format('name the column with items_key => ''...'', if it is not %I; or give views that cast both to one type', items_key);
    end if;
    if users is not null or m.users_table is null then
        m.user_features := vae_private.chosen_features(users, users_key, 'user_features', user_features);
    end if;
    if items is not null or m.items_table is null then
        m.item_features := vae_private.chosen_features(items, items_key, 'item_features', item_features);
    end if;
    if users is not null then
        select n.nspname, c.relname, users_key into m.users_schema, m.users_table, m.users_key_column
        from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = users;
    end if;
    if items is not null then
        select n.nspname, c.relname, items_key into m.items_schema, m.items_table, m.items_key_column
        from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = items;
    end if;
    return m;
end;
$$;

comment on function vae_private.with_tables(vae.models, regclass, regclass, text, regclass, text, text[], text[]) is
    'Gives a model with these tables of users and items, where they are given, and the columns that it reads of them; refuses those '
    'that do not fit. Part of vae.create_model and vae.set_tables.';


create or replace function vae_private.map_event_types(model_id integer, event_types jsonb)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
    entry record;
    event_types_hint constant text := $h$give an object: '{"look": "view", "buy": {"event_type": "purchase", "weight": 4}}'$h$;
begin
    if jsonb_typeof(event_types) <> 'object' then
        raise exception 'event_types is %', event_types
            using errcode = 'invalid_parameter_value', hint = event_types_hint;
    end if;
    insert into vae.event_types (model_id, name, event_type, weight)
    select model_id, s.name, s.event_type, s.weight from vae_private.standard_event_types() s;
    for entry in select * from jsonb_each(coalesce(event_types, '{}')) loop
        if jsonb_typeof(entry.value) not in ('string', 'number', 'object') or jsonb_typeof(entry.value -> 'event_type') <> 'string' then
            raise exception 'event type "%" is mapped to %', entry.key, entry.value
                using errcode = 'invalid_parameter_value', hint = event_types_hint;
        end if;
        if jsonb_typeof(entry.value) = 'object' and entry.value - array['event_type', 'weight'] <> '{}' then
            raise exception 'event type "%" has the unknown key "%"',
                entry.key, (select min(k) from jsonb_object_keys(entry.value - array['event_type', 'weight']) k)
                using errcode = 'invalid_parameter_value', hint = event_types_hint;
        end if;
        perform vae_private.map_event_type(
            model_id,
            entry.key,
            case jsonb_typeof(entry.value) when 'object' then entry.value ->> 'event_type' when 'string' then entry.value #>> '{}' end,
            case jsonb_typeof(entry.value) when 'object' then entry.value -> 'weight' when 'number' then entry.value end
        );
    end loop;
end;
$$;

comment on function vae_private.map_event_types(integer, jsonb) is
    'Gives a new model the standard event types, and the mapping of the shop''s words; part of vae.create_model.';


create or replace function vae_private.named_or_taken(events regclass, argument text, given text)
returns text
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    if given is not null then
        return nullif(given, '');
    end if;
    if not exists (
        select from pg_attribute a where a.attrelid = events and a.attname = argument and a.attnum > 0 and not a.attisdropped
    ) then
        return null;
    end if;
    raise notice 'column "%" of % is taken as %', argument, events,
        case argument when 'quantity' then 'the quantity: rows of 0 or less are returns, and left out' else 'the type of the event' end
        using hint = format('if it is something else: %s => '''', or the name of another column', argument);
    return argument;
end;
$$;

comment on function vae_private.named_or_taken(regclass, text, text) is
    'Gives the column that an argument of vae.create_model names, null for an empty text; where it is not given, the column of the '
    'argument''s name, if there is one, with a notice.';


create or replace function vae_private.tell_unnamed(events regclass, argument text, named text[])
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    columns text;
begin
    select string_agg(a.attname, ', ' order by a.attnum) into columns
    from pg_attribute a
    join pg_type t on t.oid = a.atttypid
    where a.attrelid = events and a.attnum > 0 and not a.attisdropped
        and a.attname <> all (array_remove(named, null))
        and case argument when 'quantity' then t.typcategory = 'N' else t.typcategory in ('S', 'E') end;
    if columns is not null then
        raise notice '%', case argument
                when 'quantity' then format('each row of %s counts as one piece, a return too: no column is a quantity', events)
                else format('each row of %s counts as a purchase: no column says what happened', events)
            end
            using hint = format('name it if one of these is it, %s => ''...'': %s; else say %s => ''''', argument, columns, argument);
    end if;
end;
$$;

comment on function vae_private.tell_unnamed(regclass, text, text[]) is
    'Tells what it means that a new model has no event_type or quantity, where columns that are not named could be it; part of '
    'vae.create_model.';


create or replace function vae_private.check_ownership(model_owner oid)
returns void
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    pgvae_owner constant oid := (select n.nspowner from pg_namespace n where n.nspname = 'vae_private');
begin
    -- Always so where a superuser installed pgvae.
    if not pg_has_role(pgvae_owner, model_owner, 'usage') then
        raise exception 'role %, which installed pgvae, cannot refresh and upgrade the views of a model of %',
            pg_get_userbyid(pgvae_owner), pg_get_userbyid(model_owner)
            using errcode = 'insufficient_privilege',
                hint = format('make it a member: grant %I to %I; or let %2$I own the model', pg_get_userbyid(model_owner), pg_get_userbyid(pgvae_owner));
    end if;
end;
$$;

comment on function vae_private.check_ownership(oid) is
    'Refuses an owner of models whose rights the owner of pgvae lacks: only the owner of a materialized view refreshes it.';


create or replace function vae.create_model(
    model text,
    events regclass,
    user_id text default 'user_id',
    item_id text default 'item_id',
    occurred_at text default 'occurred_at',
    event_type text default null,
    quantity text default null,
    users regclass default null,
    users_key text default null,
    items regclass default null,
    items_key text default null,
    event_types jsonb default null,
    options jsonb default null,
    user_features text[] default null,
    item_features text[] default null,
    exposure_column text default null
)
returns table (object text, purpose text)
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
    user_type text;
    item_type text;
    time_type text;
    new_id integer;
    checked jsonb;
    names_none boolean[];
    m vae.models;
begin
    perform vae_private.check_model_name(model);
    perform vae_private.check_ownership((select r.oid from pg_roles r where r.rolname = current_user));
    if events is null then
        raise exception 'events is null'
            using errcode = 'null_value_not_allowed', hint = 'name the table of events: events => ''public.events''';
    end if;
    perform vae_private.check_readable(array[events]);
    user_type := vae_private.key_type(events, user_id, 'user_id');
    item_type := vae_private.key_type(events, item_id, 'item_id');
    time_type := vae_private.column_type(events, occurred_at, 'occurred_at');
    if time_type not in ('timestamptz', 'timestamp', 'date') then
        raise exception 'column "%" of % has the type %', occurred_at, events, time_type
            using errcode = 'datatype_mismatch',
                hint = 'the time is timestamptz, timestamp or date: give a view that casts the column';
    end if;
    names_none := array[event_type = '', quantity = ''];
    event_type := vae_private.named_or_taken(events, 'event_type', event_type);
    quantity := vae_private.named_or_taken(events, 'quantity', quantity);
    -- A model that takes views or returns for purchases passes every check.
    if event_type is null and names_none[1] is null then
        perform vae_private.tell_unnamed(events, 'event_type', array[user_id, item_id, occurred_at, quantity, exposure_column]);
    end if;
    if quantity is null and names_none[2] is null then
        perform vae_private.tell_unnamed(events, 'quantity', array[user_id, item_id, occurred_at, event_type, exposure_column]);
    end if;
    if event_type is not null then
        -- Of any type: event types are compared by their text.
        perform vae_private.column_type(events, event_type, 'event_type');
    end if;
    if quantity is not null
        and vae_private.column_type(events, quantity, 'quantity')
            not in ('smallint', 'integer', 'bigint', 'numeric', 'real', 'double precision')
    then
        raise exception 'column "%" of % has the type %',
            quantity, events, vae_private.column_type(events, quantity, 'quantity')
            using errcode = 'datatype_mismatch',
                hint = 'the quantity is a number: give a view that casts the column; or take none: quantity => ''''';
    end if;
    perform vae_private.check_exposure(events, exposure_column);
    m.user_id_column := user_id;
    m.item_id_column := item_id;
    m.user_id_type := user_type;
    m.item_id_type := item_type;
    m := vae_private.with_tables(m, events, users, users_key, items, items_key, user_features, item_features);
    checked := vae_private.checked_options(options);

    if not has_database_privilege(current_database(), 'create') then
        raise exception 'permission denied for database %: a model makes a schema of its own', current_database()
            using errcode = 'insufficient_privilege',
                hint = format('its owner can allow it: grant create on database %I to %I', current_database(), current_user);
    end if;
    begin
        execute format('create schema %I', model);
    exception when duplicate_schema or unique_violation then
        -- Another session made it since the look at its name; now that session has committed.
        perform vae_private.check_model_name(model);
        raise;
    end;
    insert into vae.models (
        name, events_schema, events_table, user_id_column, item_id_column, occurred_at_column, event_type_column,
        quantity_column, user_id_type, item_id_type, occurred_at_type, users_schema, users_table, users_key_column,
        items_schema, items_table, items_key_column, options, user_features, item_features, exposure_column
    )
    select
        model, en.nspname, e.relname, user_id, item_id, occurred_at, event_type,
        quantity, user_type, item_type, time_type, m.users_schema, m.users_table, m.users_key_column,
        m.items_schema, m.items_table, m.items_key_column, checked,
        m.user_features, m.item_features, exposure_column
    from pg_class e
    join pg_namespace en on en.oid = e.relnamespace
    where e.oid = events
    returning model_id into new_id;

    perform vae_private.map_event_types(new_id, event_types);
    perform vae_private.build_model(new_id);
    return query
        select format('%I.%s', model, o.object), o.purpose from vae_private.model_objects(new_id) o where o.is_public;
end;
$$;

comment on function vae.create_model(text, regclass, text, text, text, text, text, regclass, text, regclass, text, jsonb, jsonb, text[], text[], text) is
    'Defines a model over a table of events and makes the schema with its functions and views; gives what it made. '
    'Columns are named by the arguments; event_type and quantity are used where columns of these names exist, as a notice says, unless '
    'they are given as '''', which takes none; without an event type every row is a purchase. users_key and items_key are called as in '
    'the events unless they are given, else user_id and item_id. event_types maps the shop''s '
    'words, as in {"buy": {"event_type": "purchase", "weight": 4}, "scroll": "ignore"}. user_features '
    'and item_features name the columns of users and items that the model reads, an empty array none; without them it '
    'reads all that it can, but for columns of users that look personal. exposure_column, a boolean, marks the rows of a '
    'randomised experiment: true, the offer of the item was made, false, it was withheld by chance; they are no behaviour, '
    'and uplift is learned from them. Next: select * from vae.check_events(model), '
    'then in a terminal: pgvae train MODEL.';


create or replace function vae_private.map_event_type(model_id integer, name text, event_type text, weight jsonb)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
    standard text := event_type;
    default_weight real;
    meanings constant text := 'map it to one of: register, search, view, add_to_cart, purchase, review, share; or to ignore, which leaves it out';
begin
    if name is null then
        raise exception 'name of an event type is null'
            using errcode = 'null_value_not_allowed',
                hint = $h$name the word that the events hold: vae.set_event_type('shop', 'look', 'view')$h$;
    end if;
    if standard is null then
        select s.event_type into standard from vae_private.standard_event_types() s where s.name = map_event_type.name;
        if standard is null then
            raise exception 'event type "%" has no meaning of its own', name
                using errcode = 'invalid_parameter_value', hint = meanings;
        end if;
    end if;
    select s.weight into default_weight from vae_private.standard_event_types() s where s.name = standard and s.event_type = standard;
    default_weight := case standard when 'ignore' then 0 else default_weight end;
    if default_weight is null then
        raise exception 'event type "%" is mapped to "%"', name, event_type
            using errcode = 'invalid_parameter_value', hint = meanings;
    end if;
    if weight is not null and (jsonb_typeof(weight) <> 'number' or (weight)::numeric not between 0 and 1000) then
        raise exception 'weight of event type "%" is %', name, weight
            using errcode = 'invalid_parameter_value', hint = 'give a number between 0 and 1000';
    end if;
    if standard = 'ignore' and (weight)::numeric <> 0 then
        raise exception 'event type "%" is ignored, and its weight is %', name, weight
            using errcode = 'invalid_parameter_value', hint = 'what is left out weighs nothing: give no weight, or map it to a standard type';
    end if;
    insert into vae.event_types as t (model_id, name, event_type, weight)
    values (model_id, name, standard, coalesce((weight)::real, default_weight))
    on conflict on constraint pk_event_types do update set event_type = excluded.event_type, weight = excluded.weight;
end;
$$;

comment on function vae_private.map_event_type(integer, text, text, jsonb) is
    'Maps one spelling of an event type to a standard one, with a weight; used by vae.create_model and vae.set_event_type.';


create or replace function vae.set_event_type(model text, name text, event_type text, weight real default null)
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
    perform vae_private.check_owner(model);
    perform vae_private.map_event_type(id, name, event_type, to_jsonb(weight));
end;
$$;

comment on function vae.set_event_type(text, text, text, real) is
    'Says what an event type of the shop means and how much it weighs in training: a standard type, ignore, which leaves such events '
    'out everywhere, or null, which is what the word means by itself. The meaning counts at once, in histories, in what '
    'counts as bought, in churn and demand; the weight with the next training, with which the model learns the meaning too.';


create or replace function vae_private.model_id(model text)
returns integer
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    found integer;
    schema_id oid;
begin
    select m.model_id, n.oid into found, schema_id
    from vae.models m
    left join pg_namespace n on n.nspname = m.name
    where m.name = model;
    if found is null then
        raise exception 'model "%" does not exist', model
            using errcode = 'VA001',
                hint = coalesce(
                    'there are: ' || (select string_agg(m.name, ', ' order by m.name) from vae.models m),
                    'create one with: select * from vae.create_model(...)');
    end if;
    if not coalesce(has_schema_privilege(schema_id, 'usage'), true) then
        raise exception 'permission denied for model %', model
            using errcode = 'insufficient_privilege',
                hint = format('its owner can allow it: grant usage on schema %I to %I', model, current_user);
    end if;
    return found;
end;
$$;

comment on function vae_private.model_id(text) is
    'Gives the number of a model; an error where it does not exist or the caller may not use its schema.';


create or replace function vae_private.may_use(model_id integer)
returns boolean
language sql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
select coalesce(bool_and(has_schema_privilege(n.oid, 'usage')), true)
from vae.models m
join pg_namespace n on n.nspname = m.name
where m.model_id = may_use.model_id
$$;

comment on function vae_private.may_use(integer) is
    'Says whether the current user may use a model, that is, its schema. Row security of the tables of vae asks this.';


create or replace function vae_private.locked_model(model text)
returns vae.models
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    id constant integer := vae_private.model_id(model);
    m vae.models;
begin
    perform vae_private.check_owner(model);
    -- The lock of vae.refresh, and before any other: whoever remade views while one of them is refreshed would lock its readers out
    -- until the refresh is done, and stop it with a deadlock. Of two changes the second one begins with what the first one left.
    perform pg_advisory_xact_lock(hashtext('pgvae refresh'), id);
    select * into m from vae.models where models.model_id = id;
    if not found then
        raise exception 'model "%" does not exist', model
            using errcode = 'VA001', hint = 'another session dropped it at this moment';
    end if;
    return m;
end;
$$;

comment on function vae_private.locked_model(text) is
    'Gives a model to its owner, for a change of its settings or views: waits for a refresh of one view, and for other changes; until '
    'the end of the transaction none begins.';


create or replace function vae_private.check_owner_reads(m vae.models, relations regclass[])
returns void
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    owner constant name := (select r.rolname from pg_namespace n join pg_roles r on r.oid = n.nspowner where n.nspname = m.name);
    relation regclass;
    schema_name name;
begin
    foreach relation in array array_remove(relations, null) loop
        select n.nspname into schema_name from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = relation;
        if not has_schema_privilege(owner, schema_name, 'usage') then
            raise exception 'the owner of model % may not use schema %', m.name, schema_name
                using errcode = 'insufficient_privilege',
                    hint = format('a refresh reads %s with the owner''s rights: grant usage on schema %I to %I', relation, schema_name, owner);
        end if;
        if not has_table_privilege(owner, relation, 'select') then
            raise exception 'the owner of model % may not read %', m.name, relation
                using errcode = 'insufficient_privilege',
                    hint = format('a refresh reads it with the owner''s rights: grant select on %s to %I', relation, owner);
        end if;
    end loop;
end;
$$;

comment on function vae_private.check_owner_reads(vae.models, regclass[]) is
    'Refuses a relation that the owner of a model may not read, or whose schema the owner may not use, whoever else may; null is fine.';


create or replace function vae.set_tables(
    model text,
    users regclass default null,
    users_key text default null,
    items regclass default null,
    items_key text default null,
    user_features text[] default null,
    item_features text[] default null
)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    m vae.models := vae_private.locked_model(model);
begin
    if users is null and items is null then
        raise exception 'neither users nor items is given'
            using errcode = 'null_value_not_allowed', hint = 'name one table or both: items => ''public.items''';
    end if;
    perform vae_private.check_schema(m);
    m := vae_private.with_tables(
        m, vae_private.shop_table(m.events_schema, m.events_table), users, users_key, items, items_key, user_features, item_features);
    perform vae_private.check_owner_reads(m, array[users, items]);
    update vae.models set
        users_schema = m.users_schema, users_table = m.users_table, users_key_column = m.users_key_column,
        items_schema = m.items_schema, items_table = m.items_table, items_key_column = m.items_key_column,
        user_features = m.user_features, item_features = m.item_features
    where models.model_id = m.model_id;
    perform vae_private.build_model(m.model_id);
end;
$$;

comment on function vae.set_tables(text, regclass, text, regclass, text, text[], text[]) is
    'Gives a model that exists a table of users, of items, or both, or others in their place; the arguments are those of '
    'vae.create_model, and a table that is not given stays as it is. The versions stay and go on scoring. Which events count, who gets '
    'recommendations, and what names and categories of items answer follows at once or with the next vae.refresh; the columns '
    'become features with the next training.';


create or replace function vae.set_features(model text, user_features text[] default null, item_features text[] default null)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    m vae.models := vae_private.locked_model(model);
begin
    if set_features.user_features is not null then
        m.user_features := vae_private.chosen_features(
            to_regclass(quote_ident(m.users_schema) || '.' || quote_ident(m.users_table)),
            m.users_key_column, 'user_features', set_features.user_features);
    end if;
    if set_features.item_features is not null then
        m.item_features := vae_private.chosen_features(
            to_regclass(quote_ident(m.items_schema) || '.' || quote_ident(m.items_table)),
            m.items_key_column, 'item_features', set_features.item_features);
    end if;
    update vae.models set user_features = m.user_features, item_features = m.item_features where models.model_id = m.model_id;
    perform vae_private.build_model(m.model_id);
end;
$$;

comment on function vae.set_features(text, text[], text[]) is
    'Chooses the columns of users and items that the model reads as features; null leaves the choice as it is, an empty '
    'array takes none. The next version learns from a new column; one that is no longer read counts as missing at once. '
    'To choose from: select * from vae.feature_columns(model).';


create or replace function vae.set_options(model text, options jsonb)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    given constant jsonb := set_options.options;
    m vae.models := vae_private.locked_model(model);
    max_history jsonb;
begin
    if given is null then
        raise exception 'options is null'
            using errcode = 'null_value_not_allowed', hint = $h$give an object: '{"min_events": 500}'$h$;
    end if;
    perform vae_private.checked_options(given);
    max_history := m.options -> 'max_history';
    m.options := vae_private.checked_options(
        m.options || given || jsonb_build_object('max_share', (m.options -> 'max_share') || coalesce(given -> 'max_share', '{}')));
    if m.options -> 'max_history' <> max_history then
        raise exception 'max_history of model % is % and stays so', model, max_history
            using errcode = 'invalid_parameter_value',
                hint = 'its versions were trained on so many events of a user: another one is for vae.create_model, of a model beside it';
    end if;
    update vae.models set options = m.options where models.model_id = m.model_id;
    perform vae_private.build_model(m.model_id);
end;
$$;

comment on function vae.set_options(text, jsonb) is
    'Changes options of a model, those of vae.create_model; the others stay. What events count and the quality gate follow at once, '
    'recommendations with the next vae.refresh, which scores everybody, horizon_days and max_cold_items with the next version. max_history cannot '
    'change.';


create or replace function vae.feature_columns(model text)
returns table (source text, column_name text, is_used boolean, kind text, reason text)
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    -- Here, and not in the query: where there is no model a plan may never come to ask for this one.
    id constant integer := vae_private.model_id(model);
begin
    return query
    select s.source, f.column_name, u.is_used, f.kind, case when not u.is_used then coalesce(f.reason, 'is not chosen') end
    from vae.models m
    cross join lateral (values
        ('users', m.users_schema, m.users_table, m.users_key_column, 'user_features', m.user_features),
        ('items', m.items_schema, m.items_table, m.items_key_column, 'item_features', m.item_features)
    ) as s (source, table_schema, table_name, key_column, argument, chosen)
    cross join lateral vae_private.table_features(
        to_regclass(format('%I.%I', s.table_schema, s.table_name)), s.key_column, s.argument) f
    cross join lateral (select f.column_name = any (s.chosen) as is_used) u
    where m.model_id = id and s.table_name is not null;
end;
$$;

comment on function vae.feature_columns(text) is
    'Lists the columns of a model''s users and items: whether the model reads them as features, how (category, number, '
    'time, text or tags), and if not, why. What a training made of them stands in features of vae.versions.';


create or replace function vae.drop_model(model text)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    id constant integer := (vae_private.locked_model(model)).model_id;
    dropped record;
begin
    perform vae_private.lock_versions(id);
    -- Without CASCADE: a view that somebody built on a prediction stops the drop and is named in the error. In the order in which
    -- they are read, as in vae_private.build_model, where another one would end in deadlocks.
    for dropped in
        select * from vae_private.model_objects(id) o
        where case o.kind when 'function' then to_regnamespace(quote_ident(model)) is not null
            else to_regclass(format('%I.%I', model, o.object)) is not null end
        order by o.step > 6, o.step desc, o.object
    loop
        execute format('drop %s if exists %I.%s', dropped.kind, model, dropped.object);
    end loop;
    -- Of a model whose last upgrade failed.
    for dropped in
        select f.object from vae.models m cross join lateral vae_private.retired_functions(m) f
        where m.model_id = id
    loop
        execute format('drop function %I.%s', model, dropped.object);
    end loop;
    delete from vae.models m where m.model_id = id;
    if exists (select from pg_namespace where nspname = model) then
        execute format('drop schema %I', model);
    end if;
    perform vae_private.unschedule_dropped(model);
end;
$$;

comment on function vae.drop_model(text) is
    'Drops a model: its schema, its versions with their weights, metrics and logs, and those jobs of pg_cron that refresh it and are '
    'the caller''s. Refuses where other objects depend on it.';
