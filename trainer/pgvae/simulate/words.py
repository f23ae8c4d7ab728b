"""The words of the simulated shop: categories, brands, adjectives, countries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Category:
    """A category: its name, what it sells, median price, season and whether its items are used up.

    `peak` is the day of the year of the highest demand, `amplitude` the height of the season in log units,
    `lasts` the days that a consumable lasts (0 for what is kept), `goes_with` the category of its complements.
    """

    name: str
    nouns: tuple[str, ...]
    median_price: float
    peak: int
    amplitude: float
    lasts: int
    goes_with: str


CATEGORIES = (
    Category("Coffee & Tea", ("coffee beans", "green tea", "espresso capsules"), 11, 20, 0.3, 28, "Kitchenware"),
    Category("Kitchenware", ("frying pan", "teapot", "mug", "kettle"), 26, 345, 0.4, 0, "Coffee & Tea"),
    Category("Garden", ("watering can", "rake", "planter", "lawn seed", "pruner"), 24, 120, 1.1, 0, "Tools"),
    Category("Tools", ("drill", "screwdriver set", "hammer", "tape measure"), 42, 130, 0.4, 0, "Garden"),
    Category("Skin Care", ("day cream", "sunscreen", "face wash", "hand balm"), 17, 190, 0.3, 45, "Hair Care"),
    Category("Hair Care", ("shampoo", "conditioner", "hair mask", "styling gel"), 12, 170, 0.1, 50, "Skin Care"),
    Category("Pet Supplies", ("cat food", "dog treats", "litter", "chew toy"), 19, 10, 0.1, 30, "Home Decor"),
    Category("Toys", ("puzzle", "building blocks", "plush bear", "board game"), 23, 345, 1.2, 0, "Children's Books"),
    Category("Children's Books", ("picture book", "bedtime stories", "alphabet book"), 13, 340, 0.7, 0, "Toys"),
    Category("Novels", ("thriller", "love story", "family saga", "space opera"), 14, 200, 0.3, 0, "Coffee & Tea"),
    Category("Stationery", ("notebook", "fountain pen", "planner", "wrapping paper"), 9, 240, 0.6, 60, "Novels"),
    Category("Home Decor", ("candle", "cushion", "picture frame", "lantern", "vase"), 21, 335, 0.6, 0, "Bedding"),
    Category("Bedding", ("duvet", "pillow", "bed sheet", "blanket"), 55, 320, 0.5, 0, "Home Decor"),
    Category("Sportswear", ("running shirt", "leggings", "rain jacket", "socks"), 38, 100, 0.4, 0, "Fitness"),
    Category("Fitness", ("yoga mat", "dumbbell", "resistance band", "skipping rope"), 33, 12, 0.8, 0, "Nutrition"),
    Category("Nutrition", ("protein powder", "vitamin tablets", "energy bars"), 25, 15, 0.5, 35, "Fitness"),
    Category("Camping", ("tent", "sleeping bag", "camp stove", "head lamp"), 64, 175, 1.2, 0, "Sportswear"),
    Category("Audio", ("headphones", "speaker", "record player", "earbuds"), 89, 345, 0.6, 0, "Phone Accessories"),
    Category("Phone Accessories", ("phone case", "charger", "cable", "power bank"), 18, 330, 0.2, 0, "Audio"),
    Category("Wine", ("riesling", "merlot", "sparkling wine", "rosé"), 13, 350, 0.5, 40, "Kitchenware"),
)

BRANDS = (
    *("Alder", "Birk", "Corvo", "Dalen", "Elvet", "Fjora", "Garnet", "Holm", "Isla", "Juno", "Kestrel", "Lumo"),
    *("Marlow", "Nordby", "Oriel", "Pavo", "Quill", "Rowan", "Solveig", "Tamsin", "Umbra", "Velden", "Wren", "Zephyr"),
)
BRANDS_PER_CATEGORY = 6

ADJECTIVES = (
    *("classic", "organic", "compact", "soft", "premium", "travel", "family", "handmade", "recycled", "light"),
    *("mild", "robust", "vintage", "modern", "quiet", "bright"),
)
QUERY_ADJECTIVES = ADJECTIVES[:3]

COUNTRIES = ("GB", "DE", "FR", "NL", "PL", "US")
COUNTRY_SHARES = (0.34, 0.22, 0.15, 0.1, 0.09, 0.1)
CHANNELS = ("organic", "search_ad", "social", "referral", "email")
CHANNEL_SHARES = (0.38, 0.24, 0.18, 0.12, 0.08)
# How much readier to pay the users of each channel are than the average.
CHANNEL_PAYS = (1.0, 0.9, 0.75, 1.25, 1.2)
AGE_GROUPS = ("18-24", "25-34", "35-44", "45-54", "55-64", "65+")
