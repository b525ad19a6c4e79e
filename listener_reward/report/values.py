"""What a results file holds, as numbers and texts for a page: whatever is missing or hostile becomes None."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import markupsafe

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def to_number(value: object) -> float | None:
    """`value` as a finite float, or None for what is not one or is too large to be a measurement."""
    try:
        number = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < 1e12 else None


def to_decimals(value: object, digits: int, *, percent: bool = False, sign: bool = False) -> str | None:
    """`value` with so many decimals, or None for what is no number."""
    number = to_number(value)
    if number is None:
        return None
    text = f"{100 * number if percent else number:{'+' if sign else ''}.{digits}f}"
    return text.replace("-", MINUS)


def to_fraction(value: object) -> float | None:
    """`value` as a fraction in [0, 1], or None for what is not one."""
    number = to_number(value)
    return None if number is None else min(1.0, max(0.0, number))


def to_percent(value: object) -> str | None:
    """A fraction as whole per cent."""
    fraction = to_fraction(value)
    return None if fraction is None else f"{100 * fraction:.0f} %"


def to_mapping(value: object) -> Mapping[str, Any]:
    """`value` as a mapping: empty for what is none."""
    return value if isinstance(value, Mapping) else {}


def to_list(value: object) -> list[Any]:
    """`value` as a list: empty for None, for text and for whatever cannot be listed (numpy arrays can)."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)) else []


def to_text(value: object) -> str | None:
    """A setting as text: what JSON calls a value keeps its JSON spelling, except for text and None."""
    if value is None or isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)


def to_interval(value: object) -> tuple[float | None, float | None]:
    """Both ends of an interval of fractions, or twice None."""
    ends = [to_fraction(end) for end in to_list(value)]
    return (ends[0], ends[1]) if len(ends) == 2 else (None, None)


def to_ends(found: Mapping[str, Any], digits: int, *, percent: bool = False, sign: bool = False) -> str | None:
    """An interval as text; its ends may be below zero."""
    ends = [to_decimals(end, digits, percent=percent, sign=sign) for end in to_list(found.get("interval"))]
    if len(ends) != 2 or ends[0] is None or ends[1] is None:
        return None
    return f"{ends[0]}{' to ' if sign or MINUS in ends[0] else DASH}{ends[1]}"


def to_printable(value: object) -> object:
    """What the template prints for `value`: a dash for nothing, and no character that UTF-8 or HTML refuses."""
    if value is None or value == "":
        return DASH
    if isinstance(value, markupsafe.Markup):
        return value  # from the template itself (its script), never from a result
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", value) if isinstance(value, str) else value
