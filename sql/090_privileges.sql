-- Who may do what. Roles say which kind of act, usage of a model's schema says with which model.
-- tests/golden/privileges.txt holds the result, and a test compares.

-- From the roles, too: an earlier release may have given them more.
revoke all on schema vae, vae_private from public, vae_reader, vae_scorer, vae_operator, vae_trainer;
revoke all on all routines in schema vae, vae_private from public, vae_reader, vae_scorer, vae_operator, vae_trainer;
revoke all on all tables in schema vae, vae_private from public, vae_reader, vae_scorer, vae_operator, vae_trainer;

-- Readers see the catalogue and, where they may use its schema, a model's prediction views.
grant usage on schema vae to vae_reader;
grant select on
    vae.models, vae.event_types, vae.versions, vae.metrics, vae.curves, vae.epochs, vae.activations, vae.refreshes,
    vae.freshness
to vae_reader;
-- vae.health_checks calls them.
grant execute on function
    vae_private.model_objects(integer),
    vae_private.moved_table(vae.models),
    vae_private.lost_columns(vae.models),
    vae_private.stale_after()
to vae_reader;

-- Scorers call a model's live functions, which call these.
grant usage on schema vae_private to vae_scorer;
grant select on vae_private.scoring_versions, vae_private.scoring_tensors, vae_private.scoring_items to vae_scorer;
grant execute on function
    vae.release_gpu(),
    vae_private.load_runtime(text),
    vae_private.activation_hint(integer, text),
    vae_private.missing_grants(integer),
    vae_private.check_stored(vae.models, text),
    vae_private.shop_table(text, text),
    vae_private.base_type(oid),
    vae_private.named_key(regclass, text, text, text),
    vae_private.column_type(regclass, text, text),
    vae_private.looks_personal(text),
    vae_private.table_features(regclass, text, text),
    vae_private.check_tables(vae.models),
    vae_private.recommend(integer, text, integer, jsonb),
    vae_private.recommend_for_users(integer, text[], integer, jsonb),
    vae_private.score(integer, text, text),
    vae_private.score_pairs(integer, text[], text[]),
    vae_private.embedding(integer, text),
    vae_private.recommend_all(integer, integer),
    vae_private.recommend_users(integer, integer, text[]),
    vae_private.record_run(integer, text, bigint, integer, bigint, text),
    vae_private.last_run(integer, text),
    vae_private.segment(integer, text),
    vae_private.segment_all(integer),
    vae_private.demand(integer, text),
    vae_private.demand_all(integer),
    vae_private.looks_ahead_from(timestamptz, timestamptz, integer),
    vae_private.item_column(integer, text),
    vae_private.items_of_category(integer, text, text, text[]),
    vae_private.churn(integer, text),
    vae_private.churn_all(integer),
    vae_private.explain_churn(integer, text),
    vae_private.response(integer, text, text[]),
    vae_private.audience(integer, text[], integer, jsonb),
    vae_private.offer_audiences(integer),
    vae_private.uplift(integer, text, text)
to vae_scorer;

grant execute on function
    vae_private.explain(integer, text, text, jsonb),
    vae_private.because(integer, text, text),
    vae_private.explain_all(integer),
    vae_private.recommend_for(integer, jsonb, integer, jsonb),
    vae_private.recommend_for_items(integer, text[], text[], float8[], integer, jsonb),
    vae_private.related(integer, text, integer, jsonb),
    vae_private.basket(integer, text[], integer, jsonb),
    vae_private.related_all(integer, integer)
to vae_scorer;

-- What is stored of rows that were scored outside is read by the owner of a model.
grant execute on function
    vae_private.refuse_scoring(integer),
    vae_private.staged(integer, text),
    vae_private.staged_rows_of(integer, text),
    vae_private.staged_run(integer, text)
to vae_scorer;

-- Operators refresh, activate and roll back.
grant select on vae_private.installation to vae_operator;
grant update (state, activated_at, retired_at) on vae.versions to vae_operator;
-- Not the columns that say who, and when it began: their defaults do.
grant insert (model_id, view, phase, events_until) on vae.refreshes to vae_operator;
grant update (state, phase, mode, version, finished_at, seconds, row_count, scored_count, left_out, error) on vae.refreshes to vae_operator;
grant execute on function
    vae.check_events(text),
    vae_private.count_events(vae.models),
    vae_private.unknown_event_types(vae.models),
    vae_private.check_assignments(vae.models),
    vae_private.assignment_select(vae.models),
    vae.check_freshness(text),
    vae.feature_columns(text),
    vae.activate(text, integer, boolean, text),
    vae.rollback(text, text),
    vae.create_offer(text, text, anyarray, numeric, numeric, numeric, integer, boolean, timestamptz, timestamptz, text, regclass, text),
    vae.drop_offer(text, text),
    vae_private.model_id(text),
    vae_private.check_owner(text),
    vae_private.check_readable(regclass[]),
    vae_private.check_owner_reads(vae.models, regclass[]),
    vae_private.key_type(regclass, text, text),
    vae_private.may_use(integer),
    vae_private.time_literal(text, text),
    vae_private.key_collation(vae.models, text),
    vae_private.admission_rules(vae.models, text),
    vae_private.event_time(vae.models),
    vae_private.clean_select(integer, text),
    vae_private.key_condition(text, text, text, text),
    vae_private.earliest(vae.models),
    vae_private.check_schema(vae.models),
    vae_private.check_views(vae.models),
    vae_private.check_grants(vae.models, text),
    vae_private.keep_versions(integer),
    vae_private.lock_activation(integer),
    vae_private.switch_version(integer, integer, text, boolean, text, text),
    vae_private.prediction_views(integer, text[]),
    vae_private.check_ownership(oid),
    vae_private.lock_refresh(integer, text),
    vae_private.may_be_between_views(integer),
    vae_private.check_refresh(integer),
    vae_private.start_refresh(integer, text, text),
    vae_private.continue_refresh(bigint, text),
    vae_private.first_mode(integer, text, boolean),
    vae_private.active_version_id(integer),
    vae_private.refresh_view(integer, text, text),
    vae_private.finish_refresh(bigint, bigint, integer, bigint, text, text, text),
    vae_private.scoring_context(integer),
    vae_private.raise_work_mem(),
    vae_private.holds_changes(text),
    vae_private.refreshed_recommendations(integer, text)
to vae_operator;
grant execute on procedure vae.refresh(text, text[], boolean), vae_private.commit_refresh() to vae_operator;
-- Not the column that says which server process: its default does.
grant insert (token, model_id, view, version_id, row_count, events_until, left_out, error, hint, error_state) on vae_private.staged_runs to vae_operator;
grant insert (token, model_id, view, cells) on vae_private.staged_rows to vae_operator;
grant execute on function vae_private.clear_staged(text), vae_private.staged_verification(integer, bigint) to vae_operator;
grant execute on procedure vae_private.refresh_staged(text, text, text) to vae_operator;

-- Trainers define models and publish versions.
grant insert, delete on vae.models to vae_trainer;
grant update (
    options, user_features, item_features, exposure_column, rebuild_error, users_schema, users_table, users_key_column, items_schema,
    items_table, items_key_column
) on vae.models to vae_trainer;
grant insert, update (event_type, weight), delete on vae.event_types to vae_trainer;
grant insert (
    model_id, version, window_start, window_end, event_count, user_count, item_count, seed, format, code_digest,
    trainer_version, config, durations, quality, features, demand, has_uplift, no_uplift, origin
) on vae.versions to vae_trainer;
grant insert on vae.metrics, vae.curves, vae.epochs, vae_private.tensors, vae_private.items to vae_trainer;
-- A version that is evaluated again gets its metrics and curves anew.
grant delete on vae.metrics, vae.curves to vae_trainer;
grant execute on function
    vae.create_model(text, regclass, text, text, text, text, text, regclass, text, regclass, text, jsonb, jsonb, text[], text[], text),
    vae.drop_model(text),
    vae.rebuild_model(text),
    vae.set_event_type(text, text, text, real),
    vae.set_features(text, text[], text[]),
    vae.set_exposure(text, text),
    vae.set_tables(text, regclass, text, regclass, text, text[], text[]),
    vae_private.with_tables(vae.models, regclass, regclass, text, regclass, text, text[], text[]),
    vae.set_options(text, jsonb),
    vae_private.check_exposure(regclass, text),
    vae.set_candidates(text, text, regclass, text, boolean),
    vae.drop_candidates(text, text),
    vae_private.standard_event_types(),
    vae_private.default_options(),
    vae_private.checked_options(jsonb),
    vae_private.chosen_features(regclass, text, text, text[]),
    vae_private.locked_model(text),
    vae_private.feature_select(integer, text, text),
    vae_private.refresh_select(integer, boolean),
    vae_private.build_recommendations(vae.models),
    vae_private.check_model_name(text),
    vae_private.named_or_taken(regclass, text, text),
    vae_private.tell_unnamed(regclass, text, text[]),
    vae_private.map_event_types(integer, jsonb),
    vae_private.map_event_type(integer, text, text, jsonb),
    vae_private.next_version(integer),
    vae_private.finish_version(bigint),
    vae_private.build_model(integer),
    vae_private.check_owner_role(text, name, name),
    vae_private.retired_functions(vae.models),
    vae_private.drop_retired(vae.models),
    vae_private.build_event_views(vae.models),
    vae_private.make_function(text, text, text, text),
    vae_private.make_planned_function(text, text, text, text),
    vae_private.build_live_functions(vae.models),
    vae_private.build_explain(vae.models),
    vae_private.build_related(vae.models),
    vae_private.comment_column(text, text, text, text),
    vae_private.build_segments(vae.models),
    vae_private.comment_model(vae.models),
    vae_private.object_comment(text, text),
    vae_private.grant_model(vae.models),
    vae_private.item_days_select(vae.models, text, text, text, text),
    vae_private.build_demand(vae.models),
    vae_private.build_churn(vae.models),
    vae_private.build_audiences(vae.models),
    vae_private.build_offers(vae.models),
    vae_private.build_uplift(vae.models)
to vae_trainer;

-- Lifecycle: parity, gates, retention.
grant select on vae.verifications to vae_reader;
grant select on
    vae_private.published_versions, vae_private.published_tensors, vae_private.published_items,
    vae_private.published_golden_users
to vae_operator;
grant insert (
    version_id, device, passed, golden_users, max_difference, top_k_agreement, runtime_digest, numpy_version, blas, detail
) on vae.verifications to vae_operator;
grant execute on function
    vae.verify(text, integer),
    vae.check_activation(text, integer),
    vae_private.verify(integer, bigint),
    vae_private.version_id(integer, text, integer),
    vae_private.activation_gates(integer, text, integer),
    vae_private.rollback_target(integer)
to vae_operator;
grant insert on vae_private.golden_users to vae_trainer;
grant delete on vae.refreshes, vae.observations, vae.verifications to vae_operator;
grant execute on function vae_private.prune_logs(integer) to vae_operator;
-- Row security leaves versions to the model's owner.
grant delete on vae.versions to vae_trainer;
grant execute on function
    vae.drop_version(text, integer, boolean),
    vae.prune(text, integer),
    vae_private.lock_versions(integer),
    vae_private.version_bytes(bigint)
to vae_trainer;

-- Schedules: pg_cron asks for rights of its own.
grant select on vae.schedules to vae_reader;
grant execute on function vae_private.has_cron(), vae_private.cron_jobs(boolean) to vae_reader;
grant execute on function
    vae.schedule(text, text),
    vae.unschedule(text),
    vae_private.check_cron()
to vae_operator;
grant execute on function vae_private.unschedule_dropped(text) to vae_trainer;

-- Monitoring.
grant select on vae.observations, vae.health, vae.health_checks to vae_reader;
grant insert (
    version_id, measure, subject, value, chance, status, detail, remedy, bins, expected_count, actual_count, window_start, window_end
) on vae.observations to vae_operator;
grant execute on function
    vae.check_drift(text, integer),
    vae.hit_rate(text),
    vae_private.event_bins(vae.models, bigint, timestamptz, interval),
    vae_private.drift_subjects(vae.models, vae.versions),
    vae_private.stored_bins(vae.models, vae.versions, text),
    vae_private.chance_psi(bigint, bigint, bigint)
to vae_operator;

-- Row security: everybody may read the catalogue, only who may use a model's schema may write about it, and only who
-- owns that schema may define or drop the model: an upgrade remakes models as the owner of their schema.
do $$
declare
    name text;
    command text;
    of_version constant text := 'exists (select from vae.versions v'
        ' where v.version_id = %I.version_id and vae_private.may_use(v.model_id))';
    owned constant text := 'exists (select from pg_catalog.pg_namespace n'
        ' where n.nspname = models.name and pg_catalog.pg_has_role(n.nspowner, ''usage''))';
    of_owned constant text := 'exists (select from vae.models m join pg_catalog.pg_namespace n on n.nspname = m.name'
        ' where m.model_id = %I.model_id and pg_catalog.pg_has_role(n.nspowner, ''usage''))';
begin
    foreach name in array array['models', 'event_types', 'versions', 'metrics', 'curves', 'epochs', 'activations', 'refreshes', 'verifications',
        'observations'] loop
        execute format('alter table vae.%I enable row level security', name);
        foreach command in array array['select', 'insert', 'update', 'delete'] loop
            execute format('drop policy if exists %I on vae.%I', command || '_policy', name);
        end loop;
        execute format('create policy select_policy on vae.%I for select to vae_reader using (true)', name);
        execute format('create policy insert_policy on vae.%I for insert to vae_operator with check (%s)', name,
            case
                when name = 'models' then owned
                when name = 'event_types' then format(of_owned, name)
                when name in ('metrics', 'curves', 'epochs', 'verifications', 'observations')
                then format(of_version, name)
                else 'vae_private.may_use(model_id)' end);
        execute format('create policy update_policy on vae.%I for update to vae_operator using (%s)', name,
            case
                when name = 'models' then owned
                when name = 'event_types' then format(of_owned, name)
                when name in ('metrics', 'curves', 'epochs', 'verifications', 'observations') then 'false'
                else 'vae_private.may_use(model_id)' end);
        execute format('create policy delete_policy on vae.%I for delete to %I using (%s)', name,
            case when name in ('refreshes', 'verifications', 'observations') then 'vae_operator' else 'vae_trainer' end,
            case
                when name = 'models' then owned || ' or pg_catalog.to_regnamespace(pg_catalog.quote_ident(name)) is null'
                when name in ('metrics', 'curves', 'verifications', 'observations') then format(of_version, name)
                when name = 'epochs' then 'false'
                when name in ('versions', 'event_types') then format(of_owned, name)
                else 'vae_private.may_use(model_id)' end);
    end loop;
end;
$$;

-- Candidate sets: a refresh runs what they name with the rights of the model's owner, so nobody else defines them.
grant select on vae.candidates to vae_reader;
grant insert (model_id, name, relation_schema, relation_table, item_id_column, for_refresh) on vae.candidates to vae_trainer;
grant update (relation_schema, relation_table, item_id_column, for_refresh), delete on vae.candidates to vae_trainer;
do $$
declare
    command text;
    owned constant text := 'exists (select from vae.models m join pg_catalog.pg_namespace n on n.nspname = m.name'
        ' where m.model_id = candidates.model_id and pg_catalog.pg_has_role(n.nspowner, ''usage''))';
begin
    alter table vae.candidates enable row level security;
    foreach command in array array['select', 'insert', 'update', 'delete'] loop
        execute format('drop policy if exists %I on vae.candidates', command || '_policy');
    end loop;
    create policy select_policy on vae.candidates for select to vae_reader using (true);
    execute format('create policy insert_policy on vae.candidates for insert to vae_trainer with check (%s)', owned);
    execute format('create policy update_policy on vae.candidates for update to vae_trainer using (%s)', owned);
    execute format('create policy delete_policy on vae.candidates for delete to vae_trainer using (%s)', owned);
end;
$$;

-- Segments: as the metrics of a version, but written once.
grant select on vae.segments to vae_reader;
grant insert on vae.segments to vae_trainer;
alter table vae.segments enable row level security;
drop policy if exists select_policy on vae.segments;
drop policy if exists insert_policy on vae.segments;
create policy select_policy on vae.segments for select to vae_reader using (true);
create policy insert_policy on vae.segments for insert to vae_trainer with check (exists (
    select from vae.versions v where v.version_id = segments.version_id and vae_private.may_use(v.model_id)));

-- Offers: whoever operates a model makes them; but for the model's owner, among everybody: as with candidate sets.
grant select on vae.offers to vae_reader;
grant insert (
    model_id, name, item_keys, value, cost, budget, max_users, exclude_buyers, starts_at, ends_at, choose_by,
    among_schema, among_table, among_column
) on vae.offers to vae_operator;
grant delete on vae.offers to vae_operator;
do $$
declare
    command text;
begin
    alter table vae.offers enable row level security;
    foreach command in array array['select', 'insert', 'delete'] loop
        execute format('drop policy if exists %I on vae.offers', command || '_policy');
    end loop;
    create policy select_policy on vae.offers for select to vae_reader using (true);
    create policy insert_policy on vae.offers for insert to vae_operator with check (
        vae_private.may_use(model_id)
        and (among_table is null or exists (
            select from vae.models m join pg_catalog.pg_namespace n on n.nspname = m.name
            where m.model_id = offers.model_id and pg_catalog.pg_has_role(n.nspowner, 'usage'))));
    create policy delete_policy on vae.offers for delete to vae_operator using (vae_private.may_use(model_id));
end;
$$;
