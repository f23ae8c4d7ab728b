"""What the columns of events, users and items are called, here and elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of table: its standard columns with the names that shops give them, and which it cannot do without."""

    name: str
    synonyms: Mapping[str, tuple[str, ...]]
    required: tuple[str, ...]
    comments: Mapping[str, str]


_USER = ("userid", "customerid", "user", "customer", "clientid", "visitorid", "memberid", "accountid")
_ITEM = ("itemid", "stockcode", "productid", "item", "product", "sku", "asin", "articleid")

KINDS: Mapping[str, Kind] = {
    "events": Kind(
        name="events",
        synonyms={
            "user_id": _USER,
            "item_id": _ITEM,
            "event_type": ("eventtype", "event", "eventname", "action", "behavior", "behaviour"),
            "occurred_at": (
                *("occurredat", "invoicedate", "timestamp", "ts", "eventtime", "datetime", "time", "createdat"),
                *("orderdate", "date"),
            ),
            "quantity": ("quantity", "qty", "amount", "units"),
            "price": ("price", "unitprice"),
            "rating": ("rating", "stars", "overall"),
        },
        required=("user_id", "item_id", "occurred_at"),
        comments={
            "user_id": "Key of the user.",
            "item_id": "Key of the item.",
            "event_type": "What happened, in the shop's words.",
            "occurred_at": "When it happened.",
            "quantity": "Number of units; zero or less: a return.",
            "price": "Price of one unit, in the shop's currency.",
            "rating": "Rating that the user gave.",
        },
    ),
    "users": Kind(
        name="users",
        synonyms={
            "user_id": (*_USER, "id"),
            "registered_at": ("registeredat", "createdat", "signupdate", "signedupat", "registrationdate", "joinedat"),
            "country": ("country", "countrycode"),
        },
        required=("user_id",),
        comments={
            "user_id": "Key of the user.",
            "registered_at": "When the user registered.",
            "country": "Country of the user.",
        },
    ),
    "items": Kind(
        name="items",
        synonyms={
            "item_id": (*_ITEM, "id"),
            "title": ("title", "name", "productname", "itemname", "description"),
            "category": ("category", "categoryid", "categoryname", "department"),
            "brand": ("brand", "brandid", "manufacturer"),
            "price": ("price", "unitprice", "listprice"),
        },
        required=("item_id",),
        comments={
            "item_id": "Key of the item.",
            "title": "Name that people read.",
            "category": "Category of the item.",
            "brand": "Brand of the item.",
            "price": "Price of one unit, in the shop's currency.",
        },
    ),
}


def squashed(header: str) -> str:
    """Gives a header without case and punctuation, for comparing with synonyms."""
    return re.sub(r"[^a-z0-9]", "", header.lower())


def snake_case(header: str) -> str:
    """Gives a header as a column's name: CustomerID becomes customer_id."""
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", header.strip())
    name = re.sub(r"\W+", "_", words).strip("_").lower()
    return name or "column"
