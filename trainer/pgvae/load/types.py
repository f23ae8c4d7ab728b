"""SQL types: which one a column's texts have, and each text as COPY takes it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, tzinfo
from typing import Literal

from pgvae.errors import PgvaeError

DateOrder = Literal["dmy", "mdy"]

_INTEGER = re.compile(r"[+-]?\d+(\.0*)?")
_LEADING_ZERO = re.compile(r"[+-]?0\d")
# Digits of other scripts, which int() reads, too, PostgreSQL does not.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
# 1234,50 and 1.234,50. Three digits alone after a comma may be thousands: such a column is not taken for numbers.
_COMMA_NUMBER = re.compile(r"[+-]?(\d+|\d{1,3}(\.\d{3})+)(,\d+)?", re.ASCII)
_DECIMALS = re.compile(r",(?!\d{3}$)\d+$")
_SLASHED = re.compile(
    r"(\d{1,2})[/.](\d{1,2})[/.](\d{4})(?:[ T](\d{1,2}):(\d{2})(?::(\d{2}))?(?: ?([AaPp])\.?[Mm]\.?)?)?"
)
_BOOLEANS = {"true": "t", "false": "f", "t": "t", "f": "f", "yes": "t", "no": "f", "1": "t", "0": "f"}
_BOOLEAN_WORDS = {"true", "false", "t", "f", "yes", "no"}
_RANGES = {"smallint": 2**15, "integer": 2**31, "bigint": 2**63}
# A time as a number since 1970. From 1973 on seconds have 9 digits or more, until the year 5138; each finer unit has
# three more.
_EPOCH = re.compile(r"(\d{9,19})(?:\.(\d*))?")
_EPOCH_DIGITS = 9
_EPOCH_UNITS = ("seconds", "milliseconds", "microseconds", "nanoseconds")
_ORDERS: dict[DateOrder, str] = {"dmy": "day before month", "mdy": "month before day"}
# What is said of dates whose order nothing proves.
GUESS = f"{_ORDERS['dmy']} is a guess: --date-order mdy for the other"
# The share of a column's values that must be times where a few are none.
_MOSTLY = 0.9
_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
NULL = "\\N"


class Bad(str):
    """Why a text is no value of its type."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How texts are read: which mean null, which order short dates have, which zone a time without one is in."""

    nulls: frozenset[str] = frozenset({""})
    date_order: DateOrder | None = None
    timezone: tzinfo = UTC


def infer(values: Sequence[str], dialect: Dialect) -> tuple[str, str | None]:
    """Gives the narrowest type that all values have, and a remark where a choice was made."""
    filled = [value.strip() for value in values if value not in dialect.nulls and value.strip()]
    if not filled:
        return "text", "no values in the sample"
    if all(_INTEGER.fullmatch(value) and not _LEADING_ZERO.match(value) for value in filled):
        if all(-(2**63) <= int(value.split(".")[0]) < 2**63 for value in filled):
            return "bigint", "whole numbers written with a point" if any("." in value for value in filled) else None
        return "text", None
    if all(value.lower() in _BOOLEAN_WORDS for value in filled):
        return "boolean", None
    if all(_NUMBER.fullmatch(value) and not _LEADING_ZERO.match(value) for value in filled):
        return "numeric", None
    if has_decimal_commas(filled):
        return "numeric", "decimal commas"
    if all(_is_uuid(value) for value in filled):
        return "uuid", None
    if all(_SLASHED.fullmatch(value) for value in filled):
        order, remark = date_order_of(filled, dialect)
        name = "timestamptz" if any(":" in value for value in filled) else "date"
        if all(_slashed(value, order) for value in filled):
            return name, remark
    if all(len(value) <= 10 and _is_date(value) for value in filled):
        return "date", None
    if all(len(value) >= 8 and _is_timestamp(value) for value in filled):
        # ZoneInfo("UTC") and datetime's own are two.
        is_told = str(dialect.timezone) == "UTC" and any(
            datetime.fromisoformat(value).tzinfo is None for value in filled
        )
        return "timestamptz", "times without a zone are read as UTC" if is_told else None
    return "text", None


def infer_time(values: Sequence[str], dialect: Dialect) -> tuple[str, str | None]:
    """Gives the type of a column that must hold times: also where some values are none, or count from 1970."""
    guessed, remark = infer(values, dialect)
    filled = [value.strip() for value in values if value not in dialect.nulls and value.strip()]
    if guessed in ("bigint", "numeric") and all(_EPOCH.fullmatch(value) for value in filled):
        return "timestamptz", f"{_EPOCH_UNITS[_epoch_unit(filled[0].partition('.')[0])]} since 1970"
    if guessed not in ("text", "date", "timestamptz"):
        return guessed, f"no times, but {guessed}: make a view that computes them"
    if guessed != "text" or not filled:
        return guessed, remark
    times = [value for value in filled if _SLASHED.fullmatch(value) or _is_date(value) or _is_timestamp(value)]
    wrong = len(filled) - len(times)
    if len(times) >= _MOSTLY * len(filled):
        guessed, _ = infer(times, dialect)
    if guessed == "text":
        return "text", "not read as times: --type occurred_at=timestamptz rejects what is none"
    return guessed, f"{wrong} of {len(filled)} are no times, and will be rejected"


def date_order_of(values: Sequence[str], dialect: Dialect) -> tuple[DateOrder, str | None]:
    """Gives the order of day and month in dates such as 01/12/2010: the caller's, or what the values tell."""
    if dialect.date_order:
        return dialect.date_order, None
    order = proved_order(values)
    return (order, _ORDERS[order]) if order else ("dmy", GUESS)


def proved_order(values: Sequence[str]) -> DateOrder | None:
    """Gives the order of day and month of which the values leave no doubt; None where each could be of both."""
    matches = [match for value in values if (match := _SLASHED.fullmatch(value.strip()))]
    if any(int(match[1]) > 12 for match in matches):
        return "dmy"
    return "mdy" if any(int(match[2]) > 12 for match in matches) else None


def as_proved_by(order: DateOrder, column: str) -> str:
    """Says whence an order is known that the values of a column do not tell."""
    return f"{_ORDERS[order]}, as in {column}"


def has_decimal_commas(values: Sequence[str]) -> bool:
    """Whether these are numbers whose decimals stand behind a comma, such as 1.234,50."""
    filled = [value.strip() for value in values if value.strip()]
    return all(_COMMA_NUMBER.fullmatch(value) and not _LEADING_ZERO.match(value) for value in filled) and any(
        _DECIMALS.search(value) for value in filled
    )


def converter(sql_type: str, dialect: Dialect, *, decimal_commas: bool = False) -> Callable[[str], str]:
    """Gives the function that turns a text into COPY's text format, or into Bad; PgvaeError for an unknown type."""
    base = {"double precision": "numeric", "real": "numeric", "varchar": "text"}
    convert = {
        "smallint": lambda text: _integer(text, "smallint"),
        "integer": lambda text: _integer(text, "integer"),
        "bigint": lambda text: _integer(text, "bigint"),
        "numeric": _comma_number if decimal_commas else _number,
        "boolean": _boolean,
        "uuid": _uuid,
        "date": lambda text: _date(text, dialect),
        "timestamptz": lambda text: _timestamp(text, dialect),
        "timestamp": lambda text: _timestamp(text, dialect, has_zone=False),
        "text": None,
    }
    name = base.get(sql_type, sql_type)
    if name not in convert:
        raise PgvaeError(f"type {sql_type} cannot be loaded", hint=f"use one of {', '.join(convert)}")
    chosen = convert[name]
    nulls = dialect.nulls

    def convert_text(text: str) -> str:
        return NULL if text in nulls else _text(text)

    def convert_value(text: str) -> str:
        stripped = text.strip()
        return NULL if text in nulls or not stripped else chosen(stripped)  # type: ignore[misc]

    return convert_text if chosen is None else convert_value


def _text(text: str) -> str:
    if "\0" in text:
        return Bad("it holds a NUL character, which PostgreSQL cannot store")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Bad("its bytes are not of the file's encoding")
    return text.translate(_ESCAPES)


def _shown(text: str) -> str:
    cleaned = text.encode("utf-8", "replace").decode().replace("\0", "�")
    return repr(cleaned if len(cleaned) <= 60 else cleaned[:57] + "…")


def _integer(text: str, name: str) -> str:
    if not _INTEGER.fullmatch(text):
        return Bad(f"{_shown(text)} is no {name}")
    number = int(text.split(".")[0])
    if not -_RANGES[name] <= number < _RANGES[name]:
        return Bad(f"{_shown(text)} is out of the range of {name}")
    return str(number)


def _number(text: str) -> str:
    return text if _NUMBER.fullmatch(text) else Bad(f"{_shown(text)} is no number")


def _comma_number(text: str) -> str:
    if not _COMMA_NUMBER.fullmatch(text):
        return Bad(f"{_shown(text)} is no number with a decimal comma")
    return text.replace(".", "").replace(",", ".")


def _boolean(text: str) -> str:
    return _BOOLEANS.get(text.lower()) or Bad(f"{_shown(text)} is no boolean")


def _is_uuid(text: str) -> bool:
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True


def _uuid(text: str) -> str:
    return str(uuid.UUID(text)) if _is_uuid(text) else Bad(f"{_shown(text)} is no uuid")


def _slashed(text: str, order: DateOrder) -> datetime | None:
    match = _SLASHED.fullmatch(text)
    if not match:
        return None
    first, second, year = int(match[1]), int(match[2]), int(match[3])
    day, month = (first, second) if order == "dmy" else (second, first)
    hour = int(match[4] or 0)
    if half := match[7]:
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + (12 if half in "pP" else 0)
    try:
        return datetime(year, month, day, hour, int(match[5] or 0), int(match[6] or 0))
    except ValueError:
        return None


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return len(text) == 10


def _is_timestamp(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return "-" in text


def _date(text: str, dialect: Dialect) -> str:
    if _is_date(text):
        # 2024-W01-1 is one, too, and PostgreSQL does not read it.
        return date.fromisoformat(text).isoformat()
    if found := _slashed(text, dialect.date_order or "dmy"):
        return found.date().isoformat()
    return Bad(f"{_shown(text)} is no date")


def _timestamp(text: str, dialect: Dialect, *, has_zone: bool = True) -> str:
    """Gives the time; for a type without a zone that of UTC, as pgvae reads it: PostgreSQL would drop the zone."""
    try:
        if epoch := _EPOCH.fullmatch(text):
            found = _since_1970(epoch[1], epoch[2] or "")
        else:
            found = _slashed(text, dialect.date_order or "dmy") or datetime.fromisoformat(text)
            found = found if found.tzinfo else found.replace(tzinfo=dialect.timezone)
        return (found if has_zone else found.astimezone(UTC)).isoformat()
    except (ValueError, OverflowError, OSError):
        return Bad(f"{_shown(text)} is no time")


def _epoch_unit(digits: str) -> int:
    """Gives the place among the units, of which each is a thousandth of the one before, of a number since 1970."""
    return (len(digits) - _EPOCH_DIGITS) // 3


def _since_1970(digits: str, decimals: str) -> datetime:
    """Gives the time; what is finer than a microsecond is left out, as PostgreSQL has nothing finer."""
    # A float would lose the last digits.
    whole = len(digits) - 3 * _epoch_unit(digits)
    fraction = (digits[whole:] + decimals)[:6].ljust(6, "0")
    return datetime.fromtimestamp(int(digits[:whole]), UTC).replace(microsecond=int(fraction))
