-- GPUs: what a session holds of one, and how it is given back.

create or replace function vae.release_gpu()
returns boolean
language plpython3u
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].release_gpu(plpy)
$pgvae$;

comment on function vae.release_gpu() is
    'Gives back all that this session holds of a GPU, CUDA''s own context included, and tells whether it held anything; from then on '
    'the session scores on the CPU. What a refresh took for itself is given back at its end without this; closing the connection gives back everything.';
