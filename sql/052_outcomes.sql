-- Who will buy, who is leaving, and whom to send an offer.

create or replace function vae_private.churn(model_id integer, user_key text)
returns table (
    user_key text, churn_probability float8, purchase_probability float8, expected_purchases float8, risk_band text,
    reasons text, last_event_at float8, is_cold_start boolean, model_version integer, item_offset float8,
    item_slope float8, horizon_days integer)
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].churn_of_user(plpy, model_id, user_key)
$pgvae$;

-- The settings: as in vae_private.recommend_all.
create or replace function vae_private.churn_all(model_id integer)
returns table (
    user_key text, churn_probability float8, purchase_probability float8, expected_purchases float8, risk_band text,
    reasons text, last_event_at float8, is_cold_start boolean, model_version integer, item_offset float8,
    item_slope float8, horizon_days integer)
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
set row_security = on
set enable_nestloop = off
set jit = off
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].churn_all(plpy, model_id)
$pgvae$;

create or replace function vae_private.explain_churn(model_id integer, user_key text)
returns table (rank integer, reason text, contribution real, model_version integer)
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].explain_churn(plpy, model_id, user_key)
$pgvae$;

create or replace function vae_private.response(model_id integer, user_key text, item_keys text[])
returns real
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].response(plpy, model_id, user_key, item_keys)
$pgvae$;

create or replace function vae_private.audience(model_id integer, item_keys text[], k integer, options jsonb)
returns table (rank integer, user_key text, response_probability real, has_bought boolean, model_version integer, uplift real)
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].audience(plpy, model_id, item_keys, k, options)
$pgvae$;

-- The settings: as in vae_private.recommend_all.
create or replace function vae_private.offer_audiences(model_id integer)
returns table (
    offer_id bigint, rank integer, user_key text, response_probability real, has_bought boolean, model_version integer, uplift real)
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
set row_security = on
set enable_nestloop = off
set jit = off
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].offer_audiences(plpy, model_id)
$pgvae$;

comment on function vae_private.offer_audiences(integer) is
    'Gives the users who are likeliest to answer each offer of a model, or whom it wins, for <model>.offer_responses_materialized.';
comment on function vae_private.churn(integer, text) is
    'Gives what one user of a model will do within the horizon, by key, for <model>.churn.';
comment on function vae_private.churn_all(integer) is
    'Gives what every user of a model will do within the horizon, for <model>.churn_materialized.';
comment on function vae_private.explain_churn(integer, text) is
    'Gives what speaks for and against the leaving of one user of a model, by key, for <model>.explain_churn.';
comment on function vae_private.response(integer, text, text[]) is
    'Gives the probability that a user of a model buys one of some items, by keys, for <model>.response and response_to_items.';
comment on function vae_private.audience(integer, text[], integer, jsonb) is
    'Gives the users of a model who are likeliest to buy one of some items, by keys, for <model>.audience and its like.';


create or replace function vae_private.items_of_category(id integer, category text, column_name text, item_keys text[])
returns text[]
language plpgsql
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    -- Without an active version there are none at all, which whoever scores says better.
    if cardinality(item_keys) = 0 and exists (select from vae_private.scoring_versions v where v.model_id = id) then
        raise exception 'no item that the active version knows has the % "%"', column_name, category
            using errcode = 'invalid_parameter_value',
                hint = (
                    select format('there are those of: select distinct %I from %I.%I', column_name, m.items_schema, m.items_table)
                    from vae.models m where m.model_id = id);
    end if;
    return item_keys;
end;
$$;

comment on function vae_private.items_of_category(integer, text, text, text[]) is
    'Gives the items of a category as they are; refuses a category without any.';


create or replace function vae_private.build_churn(m vae.models)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    u constant text := m.user_id_type;
begin
    perform vae_private.make_function(
        m.name, format('churn(user_id %s)', u),
        format('table (user_id %s, churn_probability real, purchase_probability real, expected_purchases real, risk_band text,'
            ' reasons text, last_event_at timestamptz, horizon_days integer, is_cold_start boolean, model_version integer)', u),
        format(
            E'select c.user_key::%s, c.churn_probability::real, c.purchase_probability::real, c.expected_purchases::real, c.risk_band,'
            '\n    c.reasons, to_timestamp(c.last_event_at), c.horizon_days, c.is_cold_start, c.model_version'
            '\nfrom vae_private.churn(%s, $1::text) c', u, m.model_id));
    perform vae_private.make_function(
        m.name, format('explain_churn(user_id %s)', u),
        'table (rank integer, reason text, contribution real, model_version integer)',
        format(E'select e.rank, e.reason, e.contribution, e.model_version\nfrom vae_private.explain_churn(%s, $1::text) e'
            '\norder by e.rank', m.model_id));
    if to_regclass(format('%I.churn_materialized', m.name)) is null then
        -- Filled at once, though with nothing: recommendations reads it, and would fail until the first refresh of churn.
        execute format(
            E'create materialized view %I.churn_materialized as'
            '\nselect c.user_key::%s as user_id, c.churn_probability::real as churn_probability,'
            '\n    c.purchase_probability::real as purchase_probability, c.expected_purchases::real as expected_purchases,'
            '\n    c.risk_band, c.reasons, to_timestamp(c.last_event_at) as last_event_at, c.horizon_days, c.is_cold_start,'
            '\n    c.model_version, c.item_offset, c.item_slope, now() as scored_at'
            '\nfrom vae_private.churn_all(%3$s) c'
            '\nwhere exists (select from vae_private.scoring_versions v where v.model_id = %3$s)',
            m.name, m.user_id_type, m.model_id);
    end if;
    if to_regclass(format('%I.churn_user_id', m.name)) is null then
        execute format('create unique index churn_user_id on %I.churn_materialized (user_id)', m.name);
    end if;
    execute format(
        E'create or replace view %1$I.churn as'
        '\nselect c.user_id, c.churn_probability, c.purchase_probability, c.expected_purchases, c.risk_band, c.reasons,'
        '\n    c.last_event_at, c.horizon_days, c.is_cold_start, c.model_version, c.scored_at'
        '\nfrom %1$I.churn_materialized c', m.name);
    perform vae_private.comment_column(m.name, c.relation, c.column_name, c.comment)
    from (
        select r.relation, c.column_name, c.comment
        from (values ('churn'), ('churn_materialized')) as r (relation)
        cross join (values
            ('user_id', 'Key of the user.'),
            ('churn_probability', 'Calibrated probability that the user buys nothing within the horizon; null for a user without events.'),
            ('purchase_probability', 'Calibrated probability that the user buys anything within the horizon.'),
            ('expected_purchases', 'Number of purchases within the horizon, on average; each item of an order counts.'),
            ('risk_band', 'low: churn_probability under 0.5, medium: under 0.8, high: from 0.8 on.'),
            ('reasons', 'What raises the probability of leaving most above that of the average user, up to three things, strongest first.'),
            ('last_event_at', 'When the user''s last event happened.'),
            ('horizon_days', 'Days ahead that the row speaks of.'),
            ('is_cold_start', 'True where the user had no events: nobody can leave who never came.'),
            ('model_version', 'Version that scored the row, see vae.versions.'),
            ('scored_at', 'When the row was scored.')
        ) as c (column_name, comment)
        union all
        values
            ('churn_materialized', 'item_offset', 'The user''s part of the probability of an item: see docs/outcomes.md.'),
            ('churn_materialized', 'item_slope', 'Weight of the logarithm of an item''s score in its probability.')
    ) as c (relation, column_name, comment);
end;
$$;

comment on function vae_private.build_churn(vae.models) is
    'Makes or remakes the functions and views about churn in a model''s schema; part of vae_private.build_model.';


create or replace function vae_private.build_audiences(m vae.models)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    u constant text := m.user_id_type;
    i constant text := m.item_id_type;
    audience constant text := format(
        'table (rank integer, user_id %s, response_probability real, has_bought boolean, model_version integer, uplift real)', u);
    found constant text := format(
        E'select a.rank, a.user_key::%s, a.response_probability, a.has_bought, a.model_version, a.uplift'
        '\nfrom vae_private.audience(%s, %%s, $2, $3) a\norder by a.rank', u, m.model_id);
begin
    perform vae_private.make_function(
        m.name, format('response(user_id %s, item_id %s)', u, i), 'real',
        format('select vae_private.response(%s, $1::text, array[$2::text])', m.model_id));
    perform vae_private.make_function(
        m.name, format('response_to_items(user_id %s, item_ids %s[])', u, i), 'real',
        format('select vae_private.response(%s, $1::text, $2::text[])', m.model_id));
    perform vae_private.make_function(
        m.name, format('audience(item_id %s, k integer default 1000, options jsonb default null)', i), audience,
        format(found, 'array[$1::text]'));
    perform vae_private.make_function(
        m.name, format('audience_of_items(item_ids %s[], k integer default 1000, options jsonb default null)', i), audience,
        format(found, '$1::text[]'));
    if m.items_table is not null then
        perform vae_private.make_function(
            m.name,
            'audience_of_category(category text, k integer default 1000, options jsonb default null,'
                ' column_name text default ''category'')',
            audience,
            -- Named for its lock, which comes before that of item_features: see vae_private.build_model.
            format(E'with events as (select from %I.refresh_events)\n', m.name) || format(found, format(
                E'case when $1 is not null then vae_private.items_of_category(%1$s, $1, $4, array('
                '\n    select i.item_key'
                -- The table may have several rows of an item.
                '\n    from ('
                '\n        select distinct f.item_id::text as item_key'
                '\n        from vae_private.item_column(%1$s, $4) c'
                '\n        join %2$I.item_features f on f.features ->> c.name = $1'
                '\n    ) f'
                '\n    join vae_private.scoring_versions v on v.model_id = %1$s'
                '\n    join vae_private.scoring_items i on i.version_id = v.version_id and i.item_key = f.item_key'
                '\n    order by i.item_index)) end',
                m.model_id, m.name)));
    end if;
end;
$$;

comment on function vae_private.build_audiences(vae.models) is
    'Makes or remakes the functions of a model''s schema that say who answers an offer; part of vae_private.build_model.';


create or replace function vae_private.build_offers(m vae.models)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    if to_regclass(format('%I.offer_responses_materialized', m.name)) is null then
        execute format(
            E'create materialized view %I.offer_responses_materialized as'
            '\nselect o.offer_id, o.rank, o.user_key::%s as user_id, o.response_probability, o.has_bought, o.model_version,'
            '\n    now() as scored_at, o.uplift'
            '\nfrom vae_private.offer_audiences(%s) o\nwith no data',
            m.name, m.user_id_type, m.model_id);
    end if;
    if to_regclass(format('%I.offer_responses_offer_id_user_id', m.name)) is null then
        execute format(
            'create unique index offer_responses_offer_id_user_id on %I.offer_responses_materialized (offer_id, user_id)', m.name);
    end if;
    execute format(
        E'create or replace view %1$I.offer_responses as'
        '\nselect o.name as offer, r.rank, r.user_id, r.response_probability, r.has_bought,'
        '\n    (r.response_probability::float8 * o.value::float8 - coalesce(o.cost, 0)::float8) as expected_profit,'
        '\n    r.rank <= coalesce(o.budget / nullif(o.cost, 0), r.rank)'
        '\n        and case o.choose_by'
        '\n            when ''uplift'' then r.uplift > 0 and coalesce(r.uplift::float8 * o.value::float8 >= coalesce(o.cost, 0)::float8, true)'
        '\n            else coalesce(r.response_probability::float8 * o.value::float8 >= coalesce(o.cost, 0)::float8, true)'
        '\n        end as is_chosen,'
        '\n    r.model_version, r.scored_at, r.uplift,'
        '\n    (r.uplift::float8 * o.value::float8 - coalesce(o.cost, 0)::float8) as incremental_profit,'
        '\n    o.starts_at, o.ends_at, coalesce(o.starts_at <= statement_timestamp(), true) as is_running'
        '\nfrom %1$I.offer_responses_materialized r'
        '\njoin vae.offers o on o.offer_id = r.offer_id'
        -- An offer ends by itself, refreshed or not.
        '\nwhere o.ends_at is null or o.ends_at > statement_timestamp()', m.name);
    execute format(
        E'create or replace view %1$I.offers as'
        '\nselect o.name as offer, cardinality(o.item_keys) as items, r.users,'
        '\n    r.buyers as expected_buyers,'
        '\n    r.buyers * o.value::float8 as expected_revenue,'
        '\n    r.users * coalesce(o.cost, 0)::float8 as total_cost,'
        '\n    r.buyers * o.value::float8 - r.users * coalesce(o.cost, 0)::float8 as expected_profit,'
        '\n    o.starts_at, o.ends_at, r.model_version, r.scored_at, o.choose_by,'
        '\n    r.incremental_buyers,'
        '\n    r.incremental_buyers * o.value::float8 - r.users * coalesce(o.cost, 0)::float8 as incremental_profit,'
        '\n    coalesce(o.starts_at <= statement_timestamp(), true) and coalesce(o.ends_at > statement_timestamp(), true) as is_running'
        '\nfrom ('
        -- With the users that are not chosen: of an offer that pays with nobody they say when it was scored, and that its sums
        -- are 0. An offer without any was not scored.
        '\n    select q.offer_id, case when count(s.user_id) > 0 then count(*) filter (where s.is_chosen) end as users,'
        '\n        case when count(s.user_id) > 0 then coalesce(sum(s.response_probability::float8) filter (where s.is_chosen), 0) end as buyers,'
        '\n        sum(s.uplift::float8) filter (where s.is_chosen) as incremental_buyers,'
        '\n        max(s.model_version) as model_version, max(s.scored_at) as scored_at'
        '\n    from vae.offers q'
        '\n    left join %1$I.offer_responses s on s.offer = q.name'
        '\n    where q.model_id = %2$s'
        '\n    group by q.offer_id'
        '\n) r'
        '\njoin vae.offers o on o.offer_id = r.offer_id', m.name, m.model_id);
    perform vae_private.comment_column(m.name, c.relation, c.column_name, c.comment)
    from (
        values
            ('offer_responses_materialized', 'offer_id', 'Number of the offer, see vae.offers.'),
            ('offer_responses_materialized', 'rank', 'Position in the offer''s list, from 1.'),
            ('offer_responses_materialized', 'user_id', 'Key of the user.'),
            ('offer_responses_materialized', 'response_probability', 'Calibrated probability that the user buys one of the offer''s items within the horizon.'),
            ('offer_responses_materialized', 'has_bought', 'Whether the user bought one of the items before.'),
            ('offer_responses_materialized', 'model_version', 'Version that scored the row, see vae.versions.'),
            ('offer_responses_materialized', 'scored_at', 'When the row was scored.'),
            ('offer_responses', 'offer', 'Name of the offer.'),
            ('offer_responses', 'rank', 'Position in the offer''s list, from 1.'),
            ('offer_responses', 'user_id', 'Key of the user.'),
            ('offer_responses', 'response_probability', 'Calibrated probability that the user buys one of the offer''s items within the horizon, because of the offer or not.'),
            ('offer_responses', 'has_bought', 'Whether the user bought one of the items before.'),
            ('offer_responses', 'expected_profit', 'response_probability times what a buyer brings, less the cost of asking; null where the offer has no value.'),
            ('offer_responses', 'is_chosen', 'Whether the budget reaches this far, and the user is worth the cost.'),
            ('offer_responses', 'model_version', 'Version that scored the row, see vae.versions.'),
            ('offer_responses', 'scored_at', 'When the row was scored.'),
            ('offer_responses', 'starts_at', 'When the offer begins; null: it has begun.'),
            ('offer_responses', 'ends_at', 'When it ends, and its rows are gone; null: never.'),
            ('offer_responses', 'is_running', 'Whether the offer has begun, at the moment of the query; false: it is planned.'),
            ('offers', 'offer', 'Name of the offer.'),
            ('offers', 'items', 'How many items are offered.'),
            ('offers', 'users', 'Users that are chosen: within the budget, and worth the cost; null as scored_at.'),
            ('offers', 'expected_buyers', 'How many of them buy one of the items within the horizon, on average, because of the offer or not; null as scored_at.'),
            ('offers', 'expected_revenue', 'expected_buyers times what a buyer brings; null where the offer has no value.'),
            ('offers', 'total_cost', 'What it costs to make the offer to them; null as scored_at.'),
            ('offers', 'expected_profit', 'expected_revenue less total_cost.'),
            ('offers', 'starts_at', 'When the offer begins; null: it has begun.'),
            ('offers', 'ends_at', 'When it ends; null: never.'),
            ('offers', 'model_version', 'Version that scored its users, see vae.versions.'),
            ('offers', 'scored_at', 'When its users were scored; null: not since it was defined, as before the next vae.refresh, or it lists nobody, as one that has ended.'),
            ('offers', 'is_running', 'Whether the offer has begun and has not ended, at the moment of the query.')
    ) as c (relation, column_name, comment);
end;
$$;

comment on function vae_private.build_offers(vae.models) is
    'Makes or remakes the views about offers in a model''s schema; part of vae_private.build_model.';


create or replace function vae.create_offer(
    model text,
    name text,
    items anyarray,
    value numeric default null,
    cost numeric default null,
    budget numeric default null,
    max_users integer default 1000,
    exclude_buyers boolean default false,
    starts_at timestamptz default null,
    ends_at timestamptz default null,
    choose_by text default 'response',
    among regclass default null,
    among_key text default null
)
returns bigint
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
    keys constant text[] := items::text[];
    wrong record;
    unknown record;
    new_id bigint;
    m vae.models;
    key_type text;
begin
    if name is null or name = '' or octet_length(name) > 200 then
        raise exception 'an offer cannot be called "%"', coalesce(name, 'null')
            using errcode = 'invalid_name', hint = 'give a name of up to 200 bytes, as in: spring sale';
    end if;
    if exists (select from vae.offers o where o.model_id = id and o.name = create_offer.name) then
        raise exception 'model % has an offer "%" already', model, name
            using errcode = 'duplicate_object', hint = format('drop it first: select vae.drop_offer(%L, %L)', model, name);
    end if;
    if array_ndims(keys) is distinct from 1 or exists (select from unnest(keys) k (key) where k.key is null) then
        raise exception 'offer "%" has the items %', name, coalesce(keys::text, 'null')
            using errcode = 'invalid_parameter_value', hint = 'name one or more items: items => array[...]';
    end if;
    select k.key into wrong from unnest(keys) k (key) group by k.key having count(*) > 1 order by k.key limit 1;
    if found then
        raise exception 'offer "%" names item % twice', name, wrong.key
            using errcode = 'invalid_parameter_value', hint = 'name each item once';
    end if;
    select * into wrong
    from (values ('value', value, 0, 1e12), ('cost', cost, 0, 1e12), ('budget', budget, 0, 1e12), ('max_users', max_users::numeric, 1, 1e7)) n (name, given, least, most)
    -- Not a number is above all numbers.
    where n.given not between n.least and n.most or (n.name = 'max_users' and n.given is null)
    limit 1;
    if found then
        raise exception '% of offer "%" is %', wrong.name, name, coalesce(wrong.given::text, 'null')
            using errcode = 'invalid_parameter_value', hint = format('give a number from %s to %s', wrong.least, wrong.most);
    end if;
    if budget is not null and coalesce(cost, 0) = 0 then
        raise exception 'offer "%" has a budget of % and no cost', name, budget
            using errcode = 'invalid_parameter_value', hint = 'say what it costs to make the offer to one user: cost => 0.5';
    end if;
    if exclude_buyers is null or ends_at <= starts_at then
        raise exception '% of offer "%" is %', case when exclude_buyers is null then 'exclude_buyers' else 'ends_at' end,
            name, case when exclude_buyers is null then 'null' else ends_at::text end
            using errcode = 'invalid_parameter_value',
                hint = case when exclude_buyers is null then 'give true or false' else 'an offer ends after it starts' end;
    end if;
    if choose_by is null or choose_by not in ('response', 'uplift') then
        raise exception 'choose_by of offer "%" is %', name, coalesce(choose_by, 'null')
            using errcode = 'invalid_parameter_value', hint = 'give response or uplift';
    end if;
    if choose_by = 'uplift' and cardinality(keys) > 1 then
        raise exception 'offer "%" is of % items and chooses by uplift', name, cardinality(keys)
            using errcode = 'invalid_parameter_value',
                hint = 'an experiment offers one item at a time, so that uplift is known of one item: make an offer of each';
    end if;
    if among is null and among_key is not null then
        raise exception 'among_key of offer "%" is "%", and among is not given', name, among_key
            using errcode = 'invalid_parameter_value', hint = 'name the table or view whose column it is: among => ''public.subscribers''';
    end if;
    if among is not null then
        -- A refresh runs what it names with the rights of the model's owner, so nobody else does.
        perform vae_private.check_owner(model);
        perform vae_private.check_readable(array[among]);
        select * into m from vae.models where models.model_id = id;
        perform vae_private.check_owner_reads(m, array[among]);
        among_key := vae_private.named_key(among, among_key, m.user_id_column, 'user_id');
        key_type := vae_private.key_type(among, among_key, 'among_key');
        if key_type <> m.user_id_type and not array[key_type, m.user_id_type] <@ array['integer', 'bigint'] then
            raise exception 'keys of users differ: % in model %, % in %', m.user_id_type, model, key_type, among
                using errcode = 'datatype_mismatch', hint = 'give a view that casts the column';
        end if;
    end if;
    select v.version, v.no_uplift into unknown
    from vae_private.scoring_versions v
    where v.model_id = id and choose_by = 'uplift' and not v.has_uplift;
    if found then
        raise exception 'version % of model % claims no uplift: %', unknown.version, model, unknown.no_uplift
            using errcode = 'VA053', hint = 'choose by the response, or see docs/outcomes.md for the experiment that it takes';
    end if;
    -- Where a version is active it says which items there are.
    select k.key, v.version into unknown
    from vae_private.scoring_versions v
    cross join unnest(keys) with ordinality as k (key, place)
    where v.model_id = id
        and not exists (select from vae_private.scoring_items i where i.version_id = v.version_id and i.item_key = k.key)
    order by k.place
    limit 1;
    if found then
        raise exception 'item % is not in the catalogue of version % of model %', unknown.key, unknown.version, model
            using errcode = 'VA051', hint = format('is the key right? The next version knows a new item: pgvae train %s', model);
    end if;
    insert into vae.offers (
        model_id, name, item_keys, value, cost, budget, max_users, exclude_buyers, starts_at, ends_at, choose_by,
        among_schema, among_table, among_column
    )
    select
        id, name, keys, value, cost, budget, max_users, exclude_buyers, starts_at, ends_at, choose_by,
        n.nspname, c.relname, among_key
    from (select) one
    left join (pg_class c join pg_namespace n on n.oid = c.relnamespace) on c.oid = among
    returning offer_id into new_id;
    if ends_at <= now() then
        raise notice 'offer "%" ended at %: it lists nobody', name, ends_at
            using hint = format('if that is a slip, vae.drop_offer(%L, %L) and define it anew', model, name);
    end if;
    return new_id;
end;
$$;

comment on function vae.create_offer(text, text, anyarray, numeric, numeric, numeric, integer, boolean, timestamptz, timestamptz, text, regclass, text) is
    'Defines an offer of some items: the next vae.refresh lists the max_users users who are likeliest to buy one of them in '
    '<model>.offer_responses, and sums them up in <model>.offers. value is what a buyer brings, cost what it costs to ask one user, '
    'budget what may be spent in all: they choose the users who are worth it. choose_by '
    'uplift ranks and chooses by whom the offer makes buy, where the active version claims that. among names a table or view that '
    'lists the users who may be asked, subscribers for example, in the column among_key, else called as in the events or user_id: the others take no rank and no budget; only the model''s owner can. '
    'Gives the number of the offer.';


create or replace function vae.drop_offer(model text, name text)
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
    delete from vae.offers o where o.model_id = id and o.name = drop_offer.name;
    if not found then
        raise exception 'model % has no offer "%"', model, coalesce(name, 'null')
            using errcode = 'undefined_object',
                hint = 'there are: ' || coalesce((select string_agg(o.name, ', ' order by o.name) from vae.offers o where o.model_id = id), 'none');
    end if;
end;
$$;

comment on function vae.drop_offer(text, text) is
    'Forgets an offer of a model; its users are gone from <model>.offer_responses at once.';
