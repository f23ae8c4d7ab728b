-- Why an item is recommended: the events that its score comes from.

create or replace function vae_private.explain(model_id integer, user_key text, item_key text, options jsonb)
returns table (
    rank integer, part text, item_index integer, event_type text, at float8,
    contribution real, relevance real, gate real, share real, model_version integer, version_id bigint
)
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].explain(plpy, model_id, user_key, item_key, options)
$pgvae$;

comment on function vae_private.explain(integer, text, text, jsonb) is
    'Explains the score of one user and item by key, for <model>.explain.';


create or replace function vae_private.build_explain(m vae.models)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    execute format(
        'create or replace function %I.explain(user_id %s, item_id %s, options jsonb default null)'
        ' returns table (rank integer, part text, event_item_id %s, event_type text, occurred_at timestamptz,'
        ' contribution real, relevance real, gate real, share real, model_version integer)'
        ' language sql stable called on null input parallel unsafe security invoker set search_path = pg_catalog, pg_temp as %L',
        m.name, m.user_id_type, m.item_id_type, m.item_id_type,
        format(
            E'\nselect r.rank, r.part, i.item_key::%s, r.event_type, to_timestamp(r.at), r.contribution, r.relevance, r.gate, r.share,'
            '\n    r.model_version'
            '\nfrom vae_private.explain(%s, $1::text, $2::text, $3) r'
            '\nleft join vae_private.scoring_items i on i.version_id = r.version_id and i.item_index = r.item_index'
            '\norder by r.rank\n',
            m.item_id_type, m.model_id));
end;
$$;

comment on function vae_private.build_explain(vae.models) is
    'Makes or remakes the functions of a model that explain its scores; part of vae_private.build_model.';
