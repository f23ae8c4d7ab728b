"""Options of a call: a JSON object whose members are known by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import INVALID_PARAMETER, ScoringError


@dataclass(frozen=True, kw_only=True)
class Option:
    """What a member may be: a test of its value, and what a wrong one's hint says."""

    accepts: Callable[[Any], bool]
    hint: str


TRUE_OR_FALSE = Option(accepts=lambda value: isinstance(value, bool), hint="give true or false")


def one_of(*words: str) -> Option:
    """Gives an option that is one of these words."""
    return Option(accepts=lambda value: value in words, hint=f"give one of {', '.join(words)}")


def named(hint: str) -> Option:
    """Gives an option that is the name of something, which the hint says how to give."""
    return Option(accepts=lambda value: isinstance(value, str), hint=hint)


def whole_number(least: int) -> Option:
    """Gives an option that is a whole number from `least` on."""
    return Option(
        accepts=lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least,
        hint=f"give a whole number from {least} on",
    )


def from_0_to_1(what: str) -> Option:
    """Gives an option that is a number from 0 to 1, such as a score."""
    return Option(
        accepts=lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1,
        hint=f"give a {what} from 0 to 1",
    )


def read_options(options: str | None, known: Mapping[str, Option], example: str) -> dict[str, Any]:
    """Gives the options as a dictionary; ScoringError names the first that is unknown or has a wrong value."""
    given = json.loads(options, parse_float=_number) if options else {}
    if not isinstance(given, dict):
        raise ScoringError(f"options is {options}", sqlstate=INVALID_PARAMETER, hint=f"give an object: '{example}'")
    for name, value in given.items():
        if name not in known:
            raise ScoringError(
                f"option {name!r} is unknown", sqlstate=INVALID_PARAMETER, hint=f"known options: {', '.join(known)}"
            )
        if not known[name].accepts(value):
            raise ScoringError(
                f"option {name!r} is {json.dumps(value)}", sqlstate=INVALID_PARAMETER, hint=known[name].hint
            )
    return given


def _number(text: str) -> int | float:
    """Gives a number with a point or an exponent, 20.0 as the whole number that it is."""
    number = float(text)
    return int(number) if number.is_integer() else number
