-- The runtime's source lies in this function's body: only a superuser can change a function of an untrusted
-- language, while a table could be written by whoever owns it. `pgvae install` fills in @RUNTIME@ and @SOURCES@.

create or replace function vae_private.load_runtime(wanted text)
returns void
language plpython3u
volatile
strict
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
import importlib
import importlib.abc
import importlib.machinery
import sys

digest = "@RUNTIME@"
if wanted != digest:
    plpy.error(
        f"this function is of runtime {wanted[:12]}, the database holds {digest[:12]}",
        hint="an upgrade was under way: run the statement again; if it stays, run: pgvae install",
        sqlstate="VA005",
    )

# A package name of its own for each digest, so that an upgrade in an open session never mixes two versions.
package = "pgvae_runtime_" + digest[:12]
sources = @SOURCES@


class Runtime(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    def find_spec(self, fullname, path=None, target=None):
        name, _, module = fullname.partition(".")
        if name != package or (module or "__init__") not in sources:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=fullname, is_package=not module)

    # Python's tracebacks ask the loader for the source, so an error shows the line.
    def get_source(self, fullname):
        return sources[fullname.partition(".")[2] or "__init__"]

    def is_package(self, fullname):
        return fullname == package


class Api:
    # Imported when the first call asks for it, where a cancel meanwhile is told as any other error; in here, as
    # "spiexceptions.QueryCanceled: …". What live calls need comes first, and alone: the rest takes as long again.
    def __getattr__(self, name):
        for module in (".live", ".api"):
            found = getattr(importlib.import_module(package + module), name, None)
            if found is not None:
                setattr(self, name, found)
                return found
        raise AttributeError(name)


if package not in sys.modules:
    sys.meta_path.append(Runtime())
GD[digest] = Api()
$pgvae$;

comment on function vae_private.load_runtime(text) is
    'Makes pgvae''s code, which is the text of this function, importable in the session. Called by the scoring functions.';


-- The scoring functions: one import, one call. They run with the rights of the caller.

create or replace function vae_private.recommend(model_id integer, user_key text, k integer, options jsonb)
returns table (rank integer, item_key text, score real, is_cold_start boolean, model_version integer, probability real)
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].recommend(plpy, model_id, user_key, k, options)
$pgvae$;

create or replace function vae_private.recommend_for_users(model_id integer, user_keys text[], k integer, options jsonb)
returns table (
    user_key text, rank integer, item_key text, score real, is_cold_start boolean, model_version integer, probability real)
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].recommend_for_users(plpy, model_id, user_keys, k, options)
$pgvae$;

create or replace function vae_private.score(model_id integer, user_key text, item_key text)
returns real
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].score(plpy, model_id, user_key, item_key)
$pgvae$;

create or replace function vae_private.score_pairs(model_id integer, user_keys text[], item_keys text[])
returns table (user_key text, item_key text, score real)
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].score_pairs(plpy, model_id, user_keys, item_keys)
$pgvae$;

create or replace function vae_private.last_run(model_id integer, view_name text)
returns table (row_count bigint, version integer, scored_count bigint, mode text, left_out text)
language plpython3u
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].last_run(plpy, model_id, view_name)
$pgvae$;

create or replace function vae_private.embedding(model_id integer, user_key text)
returns real[]
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].embedding(plpy, model_id, user_key)
$pgvae$;

-- row_security: a restored dump fills the materialized view with it off, and would then fail wherever a policy stands.
-- enable_nestloop, jit: of tables that nobody has analysed yet, as those of a restored dump, the planner expects one event
-- and joins the others one by one: 1.9 s of 63 000 events for 0.2 s.
create or replace function vae_private.recommend_all(model_id integer, k integer)
returns table (user_key text, item_keys text, scores text, is_cold_start boolean, model_version integer, digest bigint)
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
return GD["@RUNTIME@"].recommend_all(plpy, model_id, k)
$pgvae$;

create or replace function vae_private.demand(model_id integer, item_key text)
returns table (
    item_key text, expected_units float8, units_low float8, units_high float8, expected_buyers float8, buyers_low float8,
    buyers_high float8, last_period_units float8, horizon_days integer, model_version integer, scored_at timestamptz,
    units_deviation float8, buyers_deviation float8)
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].demand(plpy, model_id, item_key)
$pgvae$;

create or replace function vae_private.demand_all(model_id integer)
returns table (
    item_key text, expected_units float8, units_low float8, units_high float8, expected_buyers float8, buyers_low float8,
    buyers_high float8, last_period_units float8, horizon_days integer, model_version integer, scored_at timestamptz,
    units_deviation float8, buyers_deviation float8)
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
return GD["@RUNTIME@"].demand_all(plpy, model_id)
$pgvae$;

comment on function vae_private.recommend(integer, text, integer, jsonb) is
    'Scores one user of a model by key, for <model>.recommend, which gives typed keys.';
comment on function vae_private.recommend_for_users(integer, text[], integer, jsonb) is
    'Scores users of a model by their keys, for <model>.recommend_for_users, which gives typed keys.';
comment on function vae_private.score_pairs(integer, text[], text[]) is
    'Scores pairs of user and item of a model by key, for <model>.score_pairs.';
comment on function vae_private.score(integer, text, text) is
    'Scores one user and item of a model by key, for <model>.score.';
comment on function vae_private.embedding(integer, text) is
    'Gives the latent position of one user of a model by key, for <model>.embedding.';
comment on function vae_private.last_run(integer, text) is
    'Gives what the last complete run of this session for a prediction view gave (rows, version, how many of them were scored anew, '
    'in which mode, and what was left out), once.';
comment on function vae_private.recommend_all(integer, integer) is
    'Scores all users of a model, a row per user with array literals, for vae_private.refreshed_recommendations.';
comment on function vae_private.demand(integer, text) is
    'Forecasts the demand of one item of a model by key, for <model>.demand.';
comment on function vae_private.demand_all(integer) is
    'Forecasts the demand of all items of a model that something happened to, for <model>.demand_materialized.';
