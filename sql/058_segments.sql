-- Segments: which group of users with similar tastes somebody belongs to.

create or replace function vae_private.segment(model_id integer, user_key text)
returns table (segment integer, segment_name text, similarity real, is_cold_start boolean, model_version integer)
language plpython3u
stable
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $pgvae$
if "@RUNTIME@" not in GD: plpy.execute("select vae_private.load_runtime('@RUNTIME@')")
return GD["@RUNTIME@"].segment(plpy, model_id, user_key)
$pgvae$;

-- The settings: as in vae_private.recommend_all.
create or replace function vae_private.segment_all(model_id integer)
returns table (
    user_key text, segment integer, segment_name text, similarity real, is_cold_start boolean, model_version integer
)
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
return GD["@RUNTIME@"].segment_all(plpy, model_id)
$pgvae$;

comment on function vae_private.segment(integer, text) is
    'Gives the segment of one user of a model by key, for <model>.segment.';
comment on function vae_private.segment_all(integer) is
    'Gives the segment of all users of a model, for <model>.user_segments_materialized.';


create or replace function vae_private.build_segments(m vae.models)
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
        m.name, format('segment(user_id %s)', u),
        'table (segment integer, segment_name text, similarity real, is_cold_start boolean, model_version integer)',
        format(
            E'select s.segment, s.segment_name, s.similarity, s.is_cold_start, s.model_version'
            '\nfrom vae_private.segment(%s, $1::text) s', m.model_id));
    if to_regclass(format('%I.user_segments_materialized', m.name)) is null then
        execute format(
            E'create materialized view %I.user_segments_materialized as'
            '\nselect s.user_key::%s as user_id, s.segment, s.segment_name, s.similarity, s.is_cold_start, s.model_version,'
            '\n    now() as scored_at'
            '\nfrom vae_private.segment_all(%s) s\nwith no data',
            m.name, u, m.model_id);
    end if;
    if to_regclass(format('%I.user_segments_user_id', m.name)) is null then
        execute format('create unique index user_segments_user_id on %I.user_segments_materialized (user_id)', m.name);
    end if;
    execute format(
        E'create or replace view %1$I.user_segments as'
        '\nselect s.user_id, s.segment, s.segment_name, s.similarity, s.is_cold_start, s.model_version, s.scored_at'
        '\nfrom %1$I.user_segments_materialized s',
        m.name);
    execute format(
        E'create or replace view %1$I.segments as'
        '\nselect s.segment, s.name, coalesce(c.users, 0) as users,'
        '\n    (coalesce(c.users, 0)::float8 / nullif(t.users, 0))::real as share, s.top_categories,'
        '\n    c.mean_similarity, s.mean_events, s.overlap, t.model_version, t.scored_at'
        '\nfrom ('
        '\n    select u.model_version, count(u.segment) as users, max(u.scored_at) as scored_at'
        '\n    from %1$I.user_segments_materialized u group by u.model_version'
        '\n) t'
        '\njoin vae.versions v on v.model_id = %2$s and v.version = t.model_version'
        '\njoin vae.segments s on s.version_id = v.version_id'
        '\nleft join ('
        '\n    select u.segment, u.model_version, count(*) as users, avg(u.similarity)::real as mean_similarity'
        '\n    from %1$I.user_segments_materialized u group by u.segment, u.model_version'
        '\n) c on c.segment = s.segment and c.model_version = t.model_version',
        m.name, m.model_id);
    perform vae_private.comment_column(m.name, c.relation, c.column_name, c.comment)
    from (
        select v.relation, c.column_name, c.comment
        from (values
            ('user_id', 'Key of the user.'),
            ('segment', 'Number of the segment, the same from one version to the next as long as most of its users stay; null for a user of whom nothing is known.'),
            ('segment_name', 'Name of the segment, by what its users have events on, of any type, more often than all users do.'),
            ('similarity', 'Cosine of the user''s latent position and the segment''s centre, at most 1: how typical the user is of the segment.'),
            ('is_cold_start', 'True where the user had no known events: placed by features where the version knows some, else in no segment.'),
            ('model_version', 'Version that scored the row, see vae.versions.'),
            ('scored_at', 'When the row was scored.')
        ) as c (column_name, comment)
        cross join (values ('user_segments_materialized'), ('user_segments')) as v (relation)
        union all
        select 'segments', c.column_name, c.comment
        from (values
            ('segment', 'Number of the segment, the same from one version to the next as long as most of its users stay.'),
            ('name', 'Name of the segment, by what its users have events on, of any type, more often than all users do.'),
            ('users', 'Users of the segment, as of the last vae.refresh.'),
            ('share', 'Share of the users that are in a segment.'),
            ('top_categories', 'What its users have events on, of any type, more often than all users do, and by which factor: values of a column of the items, else keys of items.'),
            ('mean_similarity', 'Mean cosine of its users and the segment''s centre: how much they resemble each other.'),
            ('mean_events', 'Mean number of events of its users when the version was trained.'),
            ('overlap', 'Users in common with the segment of this number in the version before, of those in either; null: new in this version.'),
            ('model_version', 'Version that scored the users, see vae.versions.'),
            ('scored_at', 'When the users were scored.')
        ) as c (column_name, comment)
    ) as c (relation, column_name, comment);
end;
$$;

comment on function vae_private.build_segments(vae.models) is
    'Makes or remakes what a model''s schema holds about segments; part of vae_private.build_model.';


-- Segments are written while a version loads, and never again.
drop trigger if exists immutable_insert on vae.segments;
create trigger immutable_insert
after insert on vae.segments
referencing new table as written
for each statement
execute function vae_private.refuse_change();

drop trigger if exists immutable_update on vae.segments;
create trigger immutable_update
before update or truncate on vae.segments
for each statement
execute function vae_private.refuse_change();
