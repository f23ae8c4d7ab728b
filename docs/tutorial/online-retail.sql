-- Ten questions of a shop, answered in SQL.
--
-- The shop is Online Retail, the British gift shop of docs/tutorial-analyst.md: its sales in public.sales, items and customers with
-- what they are called and where they live, and the model "shop", trained, activated and refreshed. Follow that page first,
-- then this file from top to bottom in psql. What came out once stands under each query; scores differ from one training to the next.
-- Every function and view is explained in docs/sql-reference.md.

-- Before the first question: compute what the views hold, for everybody.
call vae.refresh('shop');


-- 1. What should we show to customer 12583, and why?
--
-- Live, from the purchases that are in the table now. because names the purchases that speak most for an item; without these the
-- item would have scored less. A score is a share of the model's probability over the catalogue: it puts items in order.

select r.rank, i.description, r.score, shop.because(12583, r.item_id)
from shop.recommend(12583, k => 5) r
join public.items i using (item_id)
order by r.rank;
--  rank |          description          |    score     |              because
-- ------+-------------------------------+--------------+------------------------------------
--     1 | DOLLY GIRL LUNCH BOX          |  0.009383031 | because you bought 22629 and 22631
--     2 | BAKING SET 9 PIECE RETROSPOT  |  0.007452581 | because you bought 22617 and 20750
--     3 | RED RETROSPOT BOWL            |  0.003702241 | because you bought 21238 and 21242
--     4 | CHILDRENS CUTLERY SPACEBOY    | 0.0036121693 | because you bought 23390 and 23389
--     5 | REVOLVER WOODEN RULER         | 0.0029243182 | because you bought 22991 and 23280
-- (5 rows)

-- The same reasons as rows, to join with: how much of the score each purchased item is worth.

select e.rank, i.description as bought, round(e.share::numeric, 2) as share_of_the_score
from shop.explain(12583, '22630', options => '{"by": "item"}') e
join public.items i on i.item_id = e.event_item_id
where e.part = 'item'
order by e.rank
limit 3;
--  rank |          bought           | share_of_the_score
-- ------+---------------------------+--------------------
--     1 | SPACEBOY LUNCH BOX        |               0.32
--     2 | CIRCUS PARADE LUNCH BOX   |               0.12
--     3 | ALARM CLOCK BAKELIKE PINK |               0.07
-- (3 rows)


-- 2. Only what sells in this season, and what we have: how do we say so?
--
-- A view names the candidates; recommend ranks among them, and still gives five. docs/filters.md compares this with a join.

create or replace view public.this_season as
select item_id
from public.sales
where occurred_at between '2011-11-09' and '2011-12-10' and quantity > 0
group by item_id
having count(*) >= 20;

select item_count, known_item_count
from vae.set_candidates('shop', 'this_season', 'public.this_season');
--  item_count | known_item_count
-- ------------+------------------
--        1325 |             1325
-- (1 row)

select r.rank, i.description, r.score
from shop.recommend(12583, k => 5, options => '{"candidates": "this_season"}') r
join public.items i using (item_id)
order by r.rank;
--  rank |          description          |    score
-- ------+-------------------------------+--------------
--     1 | DOLLY GIRL LUNCH BOX          |  0.010988241
--     2 | BAKING SET 9 PIECE RETROSPOT  |  0.008727538
--     3 | RED RETROSPOT BOWL            |  0.004335605
--     4 | CHILDRENS CUTLERY SPACEBOY    | 0.0042301244
--     5 | REVOLVER WOODEN RULER         | 0.0034245986
-- (5 rows)

-- For a question that is asked once a join will do: ask for more than is needed.

select r.rank, i.description, r.score
from shop.recommend(12583, k => 1000) r
join public.items i using (item_id)
where i.description like '%CHRISTMAS%'
order by r.rank
limit 3;
--  rank |           description           |     score
-- ------+---------------------------------+---------------
--    69 | 6 GIFT TAGS VINTAGE CHRISTMAS   |  0.0010579447
--    92 | VINTAGE CHRISTMAS STOCKING      |   0.000852894
--   107 | 60 CAKE CASES VINTAGE CHRISTMAS | 0.00077224127
-- (3 rows)


-- 3. What should we stock for the next four weeks?
--
-- Expected units, with bounds between which they lie in 80 % of the cases. "Next" is after the end of the data, 9 December 2011.
-- A wide interval is a warning: the first item is one order of 80 995 pieces, which was returned the same day.

select i.description, round(d.expected_units) as units, round(d.units_low) as low, round(d.units_high) as high,
    round(d.last_period_units) as last_four_weeks
from shop.demand d
join public.items i using (item_id)
order by d.expected_units desc nulls last
limit 6;
--            description           | units |  low  |  high  | last_four_weeks
-- ---------------------------------+-------+-------+--------+-----------------
--  PAPER CRAFT , LITTLE BIRDIE     | 68640 | 27713 | 142773 |           80995
--  RABBIT NIGHT LIGHT              | 10594 |  7455 |  16281 |           14584
--  POPCORN HOLDER                  |  9213 |  6783 |  13614 |           13990
--  PAPER CHAIN KIT 50'S CHRISTMAS  |  5581 |  3911 |   8606 |            7185
--  ASSTD DESIGN 3D PAPER STICKERS  |  4493 |   257 |  12165 |           12632
--  JUMBO BAG RED RETROSPOT         |  4293 |  2902 |   6812 |            3925
-- (6 rows)


-- 4. What goes with what?
--
-- Beside the green Regency teacup on its page. lift says how much likelier the other item is than beside just any item, support
-- how many customers bought both.

select r.rank, i.description, r.lift, r.support
from shop.related('22697', k => 4) r
join public.items i using (item_id)
order by r.rank;
--  rank |           description            |    lift    | support
-- ------+----------------------------------+------------+---------
--     1 | PINK REGENCY TEACUP AND SAUCER   |  190.33405 |     297
--     2 | ROSES REGENCY TEACUP AND SAUCER  |   133.8332 |     321
--     3 | REGENCY CAKESTAND 3 TIER         | 0.73388606 |     297
--     4 | REGENCY TEA PLATE GREEN          | 0.12830748 |     164
-- (4 rows)

-- How many customers have the two teacups is a fact of the sales alone.

select count(distinct a.user_id) as customers
from public.sales a
join public.sales b using (user_id)
where a.item_id = '22697' and b.item_id = '22699' and a.quantity > 0 and b.quantity > 0;
--  customers
-- -----------
--        321
-- (1 row)


-- 5. Somebody has two things in the cart, and we do not know who it is. What now?
--
-- basket takes items; recommend_for takes any session as JSON, with event types and times where there are some.

select r.rank, i.description, r.support
from shop.basket(array['22697', '22423'], k => 4) r
join public.items i using (item_id)
order by r.rank;
--  rank |           description            | support
-- ------+----------------------------------+---------
--     1 | ROSES REGENCY TEACUP AND SAUCER  |     383
--     2 | PINK REGENCY TEACUP AND SAUCER   |     311
--     3 | REGENCY TEAPOT ROSES             |     227
--     4 | SET OF 3 REGENCY CAKE TINS       |     323
-- (4 rows)

select r.rank, i.description, r.score, r.is_cold_start
from shop.recommend_for('[{"item_id": "22630"}, {"item_id": "22629"}]', k => 3) r
join public.items i using (item_id)
order by r.rank;
--  rank |             description             |     score     | is_cold_start
-- ------+-------------------------------------+---------------+---------------
--     1 | CIRCUS PARADE LUNCH BOX             |    0.02005846 | f
--     2 | LUNCH BAG SPACEBOY DESIGN           |  0.0010147485 | f
--     3 | ROUND SNACK BOXES SET OF4 WOODLAND  | 0.00075423904 | f
-- (3 rows)


-- 6. Which groups of customers have we?
--
-- Customers with similar tastes, the same groups from one training to the next. This model reads no table of items, so a segment is
-- named by the keys of what its customers buy more often than others; the titles are one join away.
-- There are four here, the last of 59 customers whom nothing sets apart; pgvae train shop --segments 10 makes more.

select s.segment, s.users, round(s.share::numeric, 2) as share, s.name, i.description as first_of_them
from shop.segments s
left join public.items i on i.item_id = split_part(s.name, ', ', 1)
order by s.users desc
limit 3;
--  segment | users | share |     name      |        first_of_them
-- ---------+-------+-------+---------------+------------------------------
--        1 |  1819 |  0.42 | 20725, 22382  | LUNCH BAG RED RETROSPOT
--        2 |  1285 |  0.30 | 84946, 22457  | ANTIQUE SILVER T-LIGHT GLASS
--        3 |  1173 |  0.27 | 21181, 85123A | PLEASE ONE PERSON METAL SIGN
-- (3 rows)

-- A list for a campaign in Germany and France: for each customer the segment, and the one item to begin the letter with.
-- recommendations and user_segments are plain views with the shop's own keys, so any ETL tool can read this query.

select s.user_id, c.country, s.segment_name, i.description as lead_item
from shop.user_segments s
join public.customers c using (user_id)
join shop.recommendations r on r.user_id = s.user_id and r.rank = 1
join public.items i using (item_id)
where c.country in ('Germany', 'France')
order by s.similarity desc, s.user_id
limit 5;
--  user_id | country | segment_name |           lead_item
-- ---------+---------+--------------+--------------------------------
--    12518 | Germany | 22326, 22629 | PLASTERS IN TIN STRONGMAN
--    12528 | Germany | 21232, 21843 | SWEETHEART CERAMIC TRINKET BOX
--    12702 | Germany | 22112, 23355 | CHOCOLATE HOT WATER BOTTLE
--    12689 | France  | 22326, 22629 | SPACEBOY LUNCH BOX
--    12583 | France  | 22326, 22629 | DOLLY GIRL LUNCH BOX
-- (5 rows)

-- How many there are is a fact of the customers alone.

select c.country, count(*) as customers
from public.customers c
where c.country in ('Germany', 'France')
group by c.country
order by c.country;
--  country | customers
-- ---------+-----------
--  France  |        87
--  Germany |        95
-- (2 rows)


-- 7. Whom do we offer the Regency teacups?
--
-- Those who are likeliest to buy one of them within four weeks, and have none yet. The probabilities are calibrated, so their sum is the
-- number of buyers to expect; how many of these would buy without the offer, only an experiment can tell.

select a.rank, a.user_id, c.country, round(a.response_probability::numeric, 3) as response_probability
from shop.audience_of_items(array['22697', '22698', '22699'], k => 4, options => '{"exclude_buyers": true}') a
left join public.customers c using (user_id)
order by a.rank;
--  rank | user_id |    country     | response_probability
-- ------+---------+----------------+----------------------
--     1 |   17841 | United Kingdom |                0.623
--     2 |   15311 | United Kingdom |                0.340
--     3 |   14085 | United Kingdom |                0.233
--     4 |   13871 | United Kingdom |                0.229
-- (4 rows)

select count(*) as letters, round(sum(a.response_probability)::numeric, 1) as expected_buyers
from shop.audience_of_items(array['22697', '22698', '22699'], k => 500, options => '{"exclude_buyers": true}') a;
--  letters | expected_buyers
-- ---------+-----------------
--      500 |            28.5
-- (1 row)


-- 8. Who is leaving?
--
-- The probability that a customer buys nothing within four weeks, in bands, and of those who were worth most lately, the ones
-- to call first, with what speaks for their leaving.

select c.risk_band, count(*) as customers, round(avg(c.churn_probability)::numeric, 2) as churn_probability
from shop.churn c
where c.risk_band is not null
group by c.risk_band
order by churn_probability desc;
--  risk_band | customers | churn_probability
-- -----------+-----------+-------------------
--  high      |      1373 |              0.86
--  medium    |      2025 |              0.69
--  low       |       938 |              0.30
-- (3 rows)

select c.user_id, round(c.churn_probability::numeric, 2) as churn_probability, c.reasons
from shop.churn c
join (
    select user_id, sum(quantity * price) as revenue
    from public.sales
    where occurred_at between '2011-06-09' and '2011-12-10'
    group by user_id
) s using (user_id)
where c.risk_band = 'medium'
order by s.revenue desc
limit 3;
--  user_id | churn_probability |                                         reasons
-- ---------+-------------------+-----------------------------------------------------------------------------------------
--    12409 |              0.68 | bought on 2 days in all; first seen 182 days ago
--    18139 |              0.68 | only purchase 17 days ago; bought on 1 day in all
--    12753 |              0.55 | last purchase 22 days ago, with 67 days between two on average; first seen 362 days ago
-- (3 rows)


-- 9. What does a customer see of whom we know nothing?
--
-- What is popular, and the row says so. From the first purchase on it is about the customer; nothing has to be trained.

select r.rank, i.description, r.is_cold_start
from shop.recommend(11111, k => 3) r
join public.items i using (item_id)
order by r.rank;
--  rank |            description             | is_cold_start
-- ------+------------------------------------+---------------
--     1 | REGENCY CAKESTAND 3 TIER           | t
--     2 | WHITE HANGING HEART T-LIGHT HOLDER | t
--     3 | PARTY BUNTING                      | t
-- (3 rows)

insert into public.events (user_id, item_id, quantity, occurred_at)
values (11111, '22630', 1, now() - interval '1 minute');

select r.rank, i.description, r.is_cold_start
from shop.recommend(11111, k => 3) r
join public.items i using (item_id)
order by r.rank;
--  rank |         description         | is_cold_start
-- ------+-----------------------------+---------------
--     1 | SPACEBOY LUNCH BOX          | f
--     2 | CIRCUS PARADE LUNCH BOX     | f
--     3 | LUNCH BAG DOLLY GIRL DESIGN | f
-- (3 rows)


-- 10. How good is it, how old is it, and where does it come from?
--
-- Measured before it was published, on the newest tenth of the sales, which that training did not see. ndcg is 1 where the lists
-- hold, in the best order, what customers then bought for the first time.

select x.method, round(x.value::numeric, 3) as ndcg, round(x.lower::numeric, 3) as low, round(x.upper::numeric, 3) as high
from vae.metrics x
join vae.versions v using (version_id)
join vae.models m using (model_id)
where m.name = 'shop' and v.version = 1 and x.slice = 'all' and x.metric = 'ndcg' and x.k = 20
order by x.value desc;
--    method   | ndcg  |  low  | high
-- ------------+-------+-------+-------
--  pgvae      | 0.102 | 0.093 | 0.111
--  item_knn   | 0.078 | 0.070 | 0.087
--  popularity | 0.030 | 0.026 | 0.034
-- (3 rows)

select f.prediction, f.model_version, f.is_active_version, f.row_count, f.last_state
from vae.freshness f
where f.model = 'shop' and f.prediction in ('churn', 'recommendations', 'user_segments')
order by f.prediction;
--    prediction    | model_version | is_active_version | row_count | last_state
-- -----------------+---------------+-------------------+-----------+------------
--  churn           |             1 | t                 |      4336 | succeeded
--  recommendations |             1 | t                 |      4336 | succeeded
--  user_segments   |             1 | t                 |      4336 | succeeded
-- (3 rows)

select v.version, v.state, v.event_count, v.user_count, v.item_count, v.seed, v.window_end::date as data_until
from vae.versions v
join vae.models m using (model_id)
where m.name = 'shop'
order by v.version;
--  version |  state  | event_count | user_count | item_count | seed | data_until
-- ---------+---------+-------------+------------+------------+------+------------
--        1 | active  |      386278 |       4335 |       3659 |    1 | 2011-12-09
--        2 | retired |      386280 |       4336 |       3659 |    2 | 2026-11-25
-- (2 rows)

-- Of customers who were not there at the last refresh, such as 11111, the views know nothing yet: the next call counts them in.

call vae.refresh('shop', views => array['recommendations']);

select count(*) as recommendations
from shop.recommendations
where user_id = 11111;
--  recommendations
-- -----------------
--               20
-- (1 row)
