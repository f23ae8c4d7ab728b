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

-- row_security: as vae_private.recommend_all.
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
returns table (rank integer, user_key text, response_probability real, has_bought boolean, model_version integer)
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

comment on function vae_private.churn(integer, text) is
    'Gives what one user of a model will do within the horizon, by key, for <model>.churn.';
comment on function vae_private.churn_all(integer) is
    'Gives what every user of a model will do within the horizon, for <model>.churn_materialized.';
comment on function vae_private.explain_churn(integer, text) is
    'Gives what speaks for and against the leaving of one user of a model, by key, for <model>.explain_churn.';
comment on function vae_private.response(integer, text, text[]) is
    'Gives the probability that a user of a model buys one of some items, by keys, for <model>.response.';
comment on function vae_private.audience(integer, text[], integer, jsonb) is
    'Gives the users of a model who are likeliest to buy one of some items, by keys, for <model>.audience.';


create or replace function vae_private.drop_changed(signature text, result_column text)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    -- A function of an earlier release that gives other columns cannot be replaced.
    if position(result_column in pg_get_function_result(to_regprocedure(signature))) = 0 then
        execute format('drop function %s', to_regprocedure(signature));
    end if;
end;
$$;

comment on function vae_private.drop_changed(text, text) is
    'Drops a function of a model''s schema whose result has no column of that name; part of vae_private.build_model.';


create or replace function vae_private.build_outcomes(m vae.models)
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
    numbers constant text := E'c.churn_probability::real, c.purchase_probability::real, c.expected_purchases::real, c.risk_band,'
        '\n    c.reasons, to_timestamp(c.last_event_at), c.horizon_days, c.is_cold_start, c.model_version';
    numbers_type constant text := 'churn_probability real, purchase_probability real, expected_purchases real, risk_band text,'
        ' reasons text, last_event_at timestamptz, horizon_days integer, is_cold_start boolean, model_version integer';
    audience_type constant text := format(
        'returns table (rank integer, user_id %s, response_probability real, has_bought boolean, model_version integer)', u);
begin
    execute format(
        'create or replace function %I.churn(user_id %s) returns table (user_id %s, %s)'
        ' language sql stable called on null input parallel unsafe security invoker set search_path = pg_catalog, pg_temp as %L',
        m.name, u, u, numbers_type,
        format(E'\nselect c.user_key::%s, %s\nfrom vae_private.churn(%s, $1::text) c\n', u, numbers, m.model_id));
    execute format(
        'create or replace function %I.explain_churn(user_id %s)'
        ' returns table (rank integer, reason text, contribution real, model_version integer)'
        ' language sql stable called on null input parallel unsafe security invoker set search_path = pg_catalog, pg_temp as %L',
        m.name, u,
        format(E'\nselect e.rank, e.reason, e.contribution, e.model_version\nfrom vae_private.explain_churn(%s, $1::text) e'
            '\norder by e.rank\n', m.model_id));
    execute format(
        'create or replace function %I.response(user_id %s, item_id %s) returns real'
        ' language sql stable called on null input parallel unsafe security invoker set search_path = pg_catalog, pg_temp as %L',
        m.name, u, i,
        format(E'\nselect vae_private.response(%s, $1::text, array[$2::text])\n', m.model_id));
    execute format(
        'create or replace function %I.response(user_id %s, item_ids %s[]) returns real'
        ' language sql stable called on null input parallel unsafe security invoker set search_path = pg_catalog, pg_temp as %L',
        m.name, u, i,
        format(E'\nselect vae_private.response(%s, $1::text, $2::text[])\n', m.model_id));
    execute format(
        'create or replace function %I.audience(item_id %s, k integer default 1000, options jsonb default null) %s'
        ' language sql stable called on null input parallel unsafe security invoker set search_path = pg_catalog, pg_temp as %L',
        m.name, i, audience_type,
        format(E'\nselect a.rank, a.user_key::%s, a.response_probability, a.has_bought, a.model_version'
            '\nfrom vae_private.audience(%s, array[$1::text], $2, $3) a\norder by a.rank\n', u, m.model_id));
    execute format(
        'create or replace function %I.audience(item_ids %s[], k integer default 1000, options jsonb default null) %s'
        ' language sql stable called on null input parallel unsafe security invoker set search_path = pg_catalog, pg_temp as %L',
        m.name, i, audience_type,
        format(E'\nselect a.rank, a.user_key::%s, a.response_probability, a.has_bought, a.model_version'
            '\nfrom vae_private.audience(%s, $1::text[], $2, $3) a\norder by a.rank\n', u, m.model_id));
    if m.items_table is not null then
        execute format(
            'create or replace function %I.audience_of_category(category text, k integer default 1000, options jsonb default null,'
            ' column_name text default ''category'') %s'
            ' language sql stable called on null input parallel unsafe security invoker set search_path = pg_catalog, pg_temp as %L',
            m.name, audience_type,
            format(E'\nselect a.rank, a.user_key::%1$s, a.response_probability, a.has_bought, a.model_version'
                '\nfrom vae_private.audience(%2$s, case when $1 is not null then array('
                '\n    select i.item_key'
                '\n    from vae_private.item_column(%2$s, $4) c'
                '\n    join %3$I.item_features f on f.features ->> c.name = $1'
                '\n    join vae_private.scoring_versions v on v.model_id = %2$s'
                '\n    join vae_private.scoring_items i on i.version_id = v.version_id and i.item_key = f.item_id::text'
                '\n    order by i.item_index) end, $2, $3) a'
                '\norder by a.rank\n', u, m.model_id, m.name));
    end if;
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
            m.name, u, m.model_id);
        execute format('create unique index churn_user_id on %I.churn_materialized (user_id)', m.name);
    end if;
    execute format(
        E'create or replace view %1$I.churn as'
        '\nselect c.user_id, c.churn_probability, c.purchase_probability, c.expected_purchases, c.risk_band, c.reasons,'
        '\n    c.last_event_at, c.horizon_days, c.is_cold_start, c.model_version, c.scored_at'
        '\nfrom %1$I.churn_materialized c', m.name);
end;
$$;

comment on function vae_private.build_outcomes(vae.models) is
    'Makes or remakes the functions and views about churn and audiences in a model''s schema; part of vae_private.build_model.';


create or replace function vae_private.outcome_comments()
returns table (relation text, column_name text, comment text)
language sql
immutable
called on null input
parallel safe
security invoker
set search_path = pg_catalog, pg_temp
as $$
select r.relation, c.column_name, c.comment
from (values ('churn'), ('churn_materialized')) as r (relation)
cross join (values
    ('user_id', 'Key of the user.'),
    ('churn_probability', 'Calibrated probability that the user buys nothing within the horizon; null for a user without known events.'),
    ('purchase_probability', 'Calibrated probability that the user buys anything within the horizon.'),
    ('expected_purchases', 'Number of purchases within the horizon, on average; each item of an order counts.'),
    ('risk_band', 'low: churn_probability under 0.5, medium: under 0.8, high: from 0.8 on.'),
    ('reasons', 'What raises the probability of leaving most above that of the average user, up to three things, strongest first.'),
    ('last_event_at', 'When the user''s last known event happened.'),
    ('horizon_days', 'Days ahead that the row speaks of.'),
    ('is_cold_start', 'True where the user had no known events: nobody can leave who never came.'),
    ('model_version', 'Version that scored the row, see vae.versions.'),
    ('scored_at', 'When the row was scored.')
) as c (column_name, comment)
union all
values
    ('churn_materialized', 'item_offset', 'The user''s part of the probability of an item: see docs/outcomes.md.'),
    ('churn_materialized', 'item_slope', 'Weight of the logarithm of an item''s score in its probability.')
$$;

comment on function vae_private.outcome_comments() is
    'Gives the comments of the columns about outcomes; part of vae_private.comment_model.';
