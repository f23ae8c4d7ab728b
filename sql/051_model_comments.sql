-- What the comments of a model's schema say, to whoever browses it with psql or a BI tool.

create or replace function vae_private.object_comment(object text, purpose text)
returns text
language sql
immutable
called on null input
parallel safe
security invoker
set search_path = pg_catalog, pg_temp
as $$
select upper(left(purpose, 1)) || substr(purpose, 2) ||
    case
        when object like 'recommend(%' then
            '. The score is the item''s share of the model''s probability over the catalogue: relative. probability is the'
            ' calibrated one that the user buys the item within the horizon, in the same order; null for a user without events and where'
            ' the version has none (see docs/outcomes.md). Items already bought are left out unless options is {"exclude_seen": false}.'
            ' A user without known events, marked is_cold_start, is scored by the features that the version knows of them, else gets'
            ' the popular items.'
        when object like 'explain(%' then
            ': a row per event, best first, then the user''s features, the item''s popularity and a remainder. contribution is by'
            ' deletion: the logit less that of the history without the event. relevance is the event''s part of the logit, exactly'
            ' additive. Each of the two columns adds up to the logit: the exponential of the difference between two items is the'
            ' quotient of their scores. share is the part of all that events speak for the item. The option by is event or item.'
        when object like 'because(%' then
            ', of the two items of the history that contribute most to the score. Items have the title that the shop''s table of'
            ' items holds (title, name, product_name, item_name or description), else their key.'
        when object = 'explanations' then
            '. A row per user and item of the history that speaks for it, five at most; where none does, one row for the'
            ' features or the popularity. Join on user_id; for the sentence alone take rank = 1. It shows what users did.'
        when object like 'recommend_for(%' then
            '. events is an array of objects: item_id, and if you like event_type (the shop''s word or the standard one, else'
            ' view) and occurred_at (else now, in the order of the array). The option features gives columns of the user, the'
            ' others and the columns that come back are those of recommend.'
        when object like 'recommend_for_items(%' then
            '. The arrays are of one length; without event_types all are views, without occurred_ats they happen now, one after the other.'
        when object like 'recommend_for_users(%' then
            ', in one pass: the rows of recommend, with its options, a user once. For users who came since the last vae.refresh, say; for everybody'
            ' read recommendations.'
        when object like 'related(%' then
            ': the model asked for somebody who bought this item and nothing else. score is an item''s share of the probability over'
            ' the catalogue, lift that share over the mean one beside any item of the shop, support the users who bought'
            ' both. Ranked by score times lift, unless the option rank_by is score or lift; the option min_support leaves out'
            ' what fewer users bought with it.'
        when object like 'basket(%' then
            ': as related, for somebody who just put these items into the cart. support counts the users who bought an item'
            ' and one of the cart''s. Items outside the catalogue are left out with a notice.'
        when object = 'related_items' then
            '. One row per item and rank, twenty of them. Join on item_id or related_item_id; model_version joins vae.versions.'
        when object like 'score(%' then
            ', as recommend gives it. Null for an item that the active version does not know.'
        when object like 'score_pairs(%' then
            ', in one pass: each user is encoded once. The arrays are of one length; a row per pair, a user''s pairs one after'
            ' the other. The score is that of score.'
        when object like 'embedding(%' then
            ': the mean of q(z | history), the features of the user included. Null for a user without known events.'
            ' Positions of different versions cannot be compared.'
        when object like 'features(%' then
            ', as one object. Times are seconds since 1970. No row for a user who is not in the table of users.'
        when object ~ '^(all_)?item_days[(]' then
            ': units, buyers, viewers and users who put it into a cart, a user once a day. Days count back from as_of, day 0 is'
            ' the 24 hours before it. Sales to anonymous buyers and to outliers count, returns do not. event_types'
            ' are the standard types whose events are sales, whatever the shop calls them.'
        when object like 'demand(%' then
            '. units_low to units_high holds what is sold in 80 % of the cases, likewise for buyers. Expected numbers are null'
            ' for an item that nothing happened to. "Now" is the end of the training window where a version was made of old events.'
        when object like 'demand_by_category(%' then
            ', as of the last vae.refresh. The column is one of the items'' features (vae.feature_columns). The bounds are those of'
            ' the sum, which strays less than its items do, but all of them may be off together.'
        when object = 'demand' then
            '. A row per item that something happened to. Join on item_id; model_version joins vae.versions.'
        when object like 'churn(%' then
            ', and how much. "Now" is the end of the training window, or the user''s last event, where a version was made of old'
            ' events. For a user without events probabilities, band, reasons and last_event_at are null.'
        when object = 'churn' then
            '. A row per user. Join on user_id; model_version joins vae.versions. Probabilities are null for a user without'
            ' events. Empty before the first vae.refresh, and where the version has none (see docs/outcomes.md).'
        when object like 'explain_churn(%' then
            ': a row per group of what the user did, strongest first. contribution is what it adds to the logarithm of the odds of'
            ' leaving, compared to the average user.'
        when object like 'response%(%' then
            ', from now on. Null for a user without events. With or without an offer: what an offer changes says uplift.'
        when object like 'uplift(%' then
            ': P(buys if it is offered) less P(buys if not). Null where the active version claims no uplift (no_uplift of'
            ' vae.versions says why) and for a user without events.'
        when object = 'clean_assignments' then
            '. A row per user, item and moment. Left out: who was both within the horizon.'
        when object like 'audience%' then
            ' within the horizon. Their response_probability may be added up to the expected number of buyers, their'
            ' uplift to the number of those who buy because of the offer: both right over many items, and possibly far off for one. uplift is'
            ' null for several items and where the version claims none.'
            ' Options: exclude_buyers leaves out who bought one of the items before, min_probability who is less likely to buy; rank_by'
            ' is response or uplift; among names a relation, public.subscribers say, that lists who may be chosen, in the column among_key, else called as in the events or user_id.'
        when object = 'offer_responses' then
            '. A row per offer and user, of offers that have not ended at the moment of the query; those of one that has not begun are'
            ' a plan. Join on user_id; write to users where is_chosen and is_running; sum response_probability where is_chosen for the'
            ' expected number of buyers.'
        when object = 'offers' then
            '. A row per offer of vae.create_offer.'
        when object = 'recommendations' then
            '. One row per user and rank. Join on user_id and item_id; model_version joins vae.versions.'
        when object = 'recommendations_materialized' then
            '. Its owner alone may read it; it misses what recommendations_changed holds: read recommendations.'
        when object like 'segment(%' then
            ': its number and name, and how typical of it the user is. Null for a user of whom nothing is known.'
        when object = 'user_segments' then
            '. One row per user. Join on user_id; segment joins segments.'
        else '.'
    end
$$;

comment on function vae_private.object_comment(text, text) is
    'Gives the comment of an object of a model''s schema: its purpose, and what who uses it has to know.';


create or replace function vae_private.comment_column(model text, relation text, column_name text, comment text)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
    if to_regclass(format('%I.%I', model, relation)) is not null then
        execute format('comment on column %I.%I.%I is %L', model, relation, column_name, comment);
    end if;
end;
$$;

comment on function vae_private.comment_column(text, text, text, text) is
    'Comments one column of a model''s view, where the model has that view; part of vae_private.build_model.';


create or replace function vae_private.comment_model(m vae.models)
returns void
language plpgsql
volatile
called on null input
parallel unsafe
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
    made record;
begin
    execute format('comment on schema %I is %L', m.name,
        format('pgvae model over %I.%I: live functions, cleaned events, prediction views.', m.events_schema, m.events_table));
    for made in
        select * from vae_private.model_objects(m.model_id) o
        where o.kind = 'function' or to_regclass(format('%I.%I', m.name, o.object)) is not null
    loop
        execute format('comment on %s %I.%s is %L', made.kind, m.name, made.object, vae_private.object_comment(
            made.object, case when made.is_public then '' else 'internal: ' end || made.purpose));
    end loop;
    perform vae_private.comment_column(m.name, c.relation, c.column_name, c.comment)
    from (
        values
            ('outlier_users', 'user_id', 'Key of the user.'),
            ('outlier_users', 'busiest_day_events', 'Events on the user''s busiest day, in UTC.'),
            ('outlier_users', 'threshold', 'Events on one day above which a user counts as an outlier: ten times the 90th percentile of this shop''s users.'),
            ('outlier_users', 'events', 'Events of the user in all.'),
            ('clean_events', 'user_id', 'Key of the user.'),
            ('clean_events', 'item_id', 'Key of the item.'),
            ('clean_events', 'event_type', 'Standard event type: view, add_to_cart, purchase, review, share.'),
            ('clean_events', 'occurred_at', 'When it happened.'),
            ('clean_events', 'weight', 'How much the event counts as a training target.'),
            ('refresh_events', 'user_id', 'Key of the user.'),
            ('refresh_events', 'item_id', 'Key of the item; null in the row that stands for a user of the users'' table.'),
            ('refresh_events', 'event_type', 'Standard event type.'),
            ('refresh_events', 'occurred_at', 'When it happened.'),
            ('digested_events', 'user_id', 'Key of the user.'),
            ('digested_events', 'item_id', 'Key of the item; null in the row that stands for a user of the users'' table.'),
            ('digested_events', 'event_type', 'Standard event type.'),
            ('digested_events', 'occurred_at', 'When it happened.'),
            ('digested_events', 'digest', 'Hash of the row; in the row that stands for a user, of the features.'),
            ('refresh_digests', 'user_id', 'Key of the user.'),
            ('refresh_digests', 'digest', 'Sum of a hash of each event and of the features. Equal digests: nothing to score again.'),
            ('user_features', 'user_id', 'Key of the user.'),
            ('user_features', 'features', 'The columns that the model reads, by name; times are seconds since 1970.'),
            ('item_features', 'item_id', 'Key of the item.'),
            ('item_features', 'features', 'The columns that the model reads, by name; times are seconds since 1970.'),
            ('stored_digests', 'user_id', 'Key of the user.'),
            ('stored_digests', 'digest', 'What refresh_digests gave for the user when the recommendations were scored.'),
            ('recommendations', 'user_id', 'Key of the user.'),
            ('recommendations', 'rank', 'Position in the user''s list, from 1.'),
            ('recommendations', 'item_id', 'Key of the item.'),
            ('recommendations', 'score', 'Share of the model''s probability over the catalogue: relative, see probability.'),
            ('recommendations', 'is_cold_start', 'True where the user had no known events: scored by features where the version knows some, else the popular items.'),
            ('recommendations', 'model_version', 'Version that scored the row, see vae.versions.'),
            ('recommendations', 'scored_at', 'When the row was scored.'),
            ('recommendations', 'probability', 'Calibrated probability that the user buys the item within the horizon of the model; null for a user without events, where the version has no probabilities, and where refreshes rank candidates only.')
        union all
        select r.relation, c.column_name, c.comment
        from (values ('recommendations_materialized'), ('recommendations_changed'), ('stored_recommendations')) as r (relation)
        cross join (values
            ('user_id', 'Key of the user.'),
            ('item_ids', 'Keys of the items, best first; empty for a user who is gone.'),
            ('scores', 'Scores of the items, in the same order.'),
            ('is_cold_start', 'True where the user had no known events: scored by features where the version knows some, else the popular items.'),
            ('model_version', 'Version that scored the row, see vae.versions.'),
            ('scored_at', 'When the row was scored.'),
            ('digest', 'What refresh_digests gave for the user when the row was scored; null for a user who is gone.'),
            ('context', 'Hash of version, code and options that the row was scored with.')
        ) as c (column_name, comment)
        union all
        values ('stored_recommendations', 'is_changed', 'Whether the row is one of recommendations_changed.')
    ) as c (relation, column_name, comment);
end;
$$;

comment on function vae_private.comment_model(vae.models) is 'Writes the comments of a model''s schema.';
