-- What a model found out, beside the truth.
--
-- A simulated shop (docs/simulator.md) knows what no real one does: the true tastes of its users, and which items complement each
-- other. This file goes on where docs/tutorial-dba.md ends: the shop of `pgvae simulate --schema web --users 2000 --seed 1
-- --until 2025-01-01`, and the model "shop" over web.events, web.users and web.items, trained and active. The model reads none
-- of the tables whose names begin with true_. What came out once stands under each query.

call vae.refresh('shop');


-- 1. What do we show to user 42, and why?

select r.rank, i.title, i.category, r.score, shop.because(42, r.item_id)
from shop.recommend(42, k => 3) r
join web.items i using (item_id)
order by r.rank;
--  rank |          title           |  category   |    score    |                                 because
-- ------+--------------------------+-------------+-------------+--------------------------------------------------------------------------
--     1 | Marlow quiet notebook 86 | Stationery  |  0.35973606 | because you viewed Marlow quiet notebook 86 and Marlow handmade vase 379
--     2 | Alder classic kettle 269 | Kitchenware | 0.039655373 | because you viewed Alder classic kettle 269
--     3 | Fjora robust cushion 77  | Home Decor  | 0.028690143 | because you viewed Marlow quiet notebook 86 and Marlow handmade vase 379
-- (3 rows)


-- 2. Is that what the user truly likes?
--
-- Affinity is the product of the user's true taste and the item's: 0 on average over the items, about 1 is one standard deviation.

with truth as (
    select u.user_id, i.item_id, (
        select sum(a.x * b.y)
        from unnest(u.taste) with ordinality as a (x, place)
        join unnest(i.taste) with ordinality as b (y, place) using (place)
    ) as affinity
    from web.true_users u
    cross join web.true_items i
    where u.user_id <= 200
)
select case when r.rank is not null then 'recommended' else 'all others' end as items, round(avg(t.affinity)::numeric, 2) as affinity
from truth t
left join shop.recommendations r using (user_id, item_id)
group by 1
order by 2 desc;
--     items    | affinity
-- -------------+----------
--  recommended |     0.77
--  all others  |    -0.04
-- (2 rows)


-- 3. Not three of one kind?

select r.rank, i.title, i.category
from shop.recommend(42, k => 4, options => '{"at_most": {"category": 1}}') r
join web.items i using (item_id)
order by r.rank;
--  rank |            title            |  category
-- ------+-----------------------------+-------------
--     1 | Marlow quiet notebook 86    | Stationery
--     2 | Alder classic kettle 269    | Kitchenware
--     3 | Fjora robust cushion 77     | Home Decor
--     4 | Birk premium headphones 302 | Audio
-- (4 rows)


-- 4. Only what is cheap, for everybody, from the next refresh on?

create or replace view web.cheap as
select item_id
from web.items
where price < 20;

grant select on web.cheap to vae_scorer;

select item_count, known_item_count
from vae.set_candidates('shop', 'cheap', 'web.cheap', for_refresh => true);
--  item_count | known_item_count
-- ------------+------------------
--         182 |              182
-- (1 row)

call vae.refresh('shop', views => array['recommendations']);

select count(*) filter (where i.price >= 20) as dear, max(r.rank) as longest_list
from shop.recommendations r
join web.items i using (item_id);
--  dear | longest_list
-- ------+--------------
--     0 |           20
-- (1 row)

select vae.drop_candidates('shop', 'cheap');
--  drop_candidates
-- -----------------
--
-- (1 row)

call vae.refresh('shop', views => array['recommendations']);


-- 5. What goes with what, and does it truly?
--
-- The simulator gives some items a complement, which buyers of the one need soon. How often is it among the related ones?
-- By chance, among 400 items, it would be 11 times among twenty and 3 times among five.

select count(*) as items_with_a_complement, count(r.rank) as found_among_twenty, count(r.rank) filter (where r.rank <= 5) as among_five
from web.true_items t
left join shop.related_items r on r.item_id = t.item_id and r.related_item_id = t.complement_item_id
where t.complement_item_id is not null;
--  items_with_a_complement | found_among_twenty | among_five
-- -------------------------+--------------------+------------
--                      226 |                 58 |         19
-- (1 row)


-- 6. Who is leaving, and is that true?
--
-- By band, what the model said, and what the simulator knows: the true probability that a user buys nothing in the 30 days after the
-- end of the data. The model looks 28 days ahead.

select c.risk_band, count(*) as users, round(avg(c.churn_probability)::numeric, 2) as said,
    round(avg(t.no_purchase_30)::numeric, 2) as true_probability
from shop.churn c
join web.true_users t using (user_id)
where c.risk_band is not null
group by c.risk_band
order by said desc;
--  risk_band | users | said | true_probability
-- -----------+-------+------+------------------
--  high      |  1464 | 0.96 |             0.96
--  medium    |   252 | 0.66 |             0.70
--  low       |   270 | 0.27 |             0.34
-- (3 rows)


-- 7. Which groups of users are there, and are they real?
--
-- The model reads the table of items, so the names are categories. Beside them stands how many of a segment's users share one
-- strongest true interest, of which there are two dozen.

select s.segment, s.name, s.users, round(max(c.users)::numeric / s.users, 2) as of_one_true_interest
from shop.segments s
join (
    select u.segment, t.cluster, count(*) as users
    from shop.user_segments u
    join web.true_users t using (user_id)
    group by u.segment, t.cluster
) c using (segment)
group by s.segment, s.name, s.users
order by s.users desc
limit 4;
--  segment |        name        | users | of_one_true_interest
-- ---------+--------------------+-------+----------------------
--        1 | Camping, Skin Care |   287 |                 0.49
--        2 | Nutrition, Tools   |   227 |                 0.25
--        3 | Fitness, Garden    |   221 |                 0.57
--        4 | Sportswear, Novels |   162 |                 0.25
-- (4 rows)

-- By chance it would be the share of the commonest interest.

select round(max(c.users) / sum(c.users), 2) as of_one_true_interest
from (
    select t.cluster, count(*) as users
    from web.true_users t
    group by t.cluster
) c;
--  of_one_true_interest
-- ----------------------
--                  0.10
-- (1 row)


-- 8. What to stock, by category?

select c.category, round(c.expected_units) as units, round(c.units_low) as low, round(c.units_high) as high
from shop.demand_by_category('category') c
order by c.expected_units desc
limit 4;
--   category  | units | low | high
-- ------------+-------+-----+------
--  Nutrition  |   172 | 114 |  231
--  Skin Care  |   160 | 111 |  209
--  Hair Care  |   128 |  86 |  169
--  Stationery |    96 |  64 |  128
-- (4 rows)


-- 9. A campaign: the users of one country, each with a segment and an item to begin with.

select s.user_id, u.country, s.segment_name, i.title as lead_item
from shop.user_segments s
join web.users u using (user_id)
join shop.recommendations r on r.user_id = s.user_id and r.rank = 1
join web.items i using (item_id)
where u.country = (select min(country) from web.users)
order by s.similarity desc nulls last, s.user_id
limit 4;
--  user_id | country |       segment_name       |           lead_item
-- ---------+---------+--------------------------+-------------------------------
--     1261 | DE      | Garden, Children's Books | Isla bright planter 237
--     1192 | DE      | Fitness, Garden          | Velden premium yoga mat 37
--     1387 | DE      | Toys, Phone Accessories  | Garnet premium phone case 140
--     1056 | DE      | Toys, Phone Accessories  | Garnet premium phone case 140
-- (4 rows)


-- 10. Somebody registered this minute. Whom do they resemble, what do they see, and since when does the shop know?

insert into web.users (user_id, country, channel, age_group, newsletter, registered_at)
select 1000001, country, channel, age_group, newsletter, now() from web.users where user_id = 42;

select s.segment_name, s.is_cold_start
from shop.segment(1000001) s;
--    segment_name    | is_cold_start
-- -------------------+---------------
--  Wine, Kitchenware | t
-- (1 row)

select r.rank, i.title, r.is_cold_start
from shop.recommend(1000001, k => 2) r
join web.items i using (item_id)
order by r.rank;
--  rank |             title              | is_cold_start
-- ------+--------------------------------+---------------
--     1 | Marlow soft protein powder 265 | t
--     2 | Velden premium yoga mat 37     | t
-- (2 rows)

delete from web.users
where user_id = 1000001;

select f.prediction, f.model_version, f.is_active_version, f.last_state
from vae.freshness f
where f.model = 'shop' and f.prediction in ('churn', 'recommendations', 'user_segments')
order by f.prediction;
--    prediction    | model_version | is_active_version | last_state
-- -----------------+---------------+-------------------+------------
--  churn           |             1 | t                 | succeeded
--  recommendations |             1 | t                 | succeeded
--  user_segments   |             1 | t                 | succeeded
-- (3 rows)
