"""Options that cannot work are refused by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """`value`, if it is one of `choices`.

    Raises:
        ValueError: Naming the option, the value, the choices and the nearest one.
    """
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}{hint}")
    return value


def check_number(name: str, value: float, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    """Refuse a number outside of [low, high], or (low, high].

    Raises:
        ValueError: Naming the option, the value and the range.
    """
    if not (value > low if open_low else value >= low) or value > high or value != value:
        up_to = "" if high == float("inf") else f" and at most {high}"
        raise ValueError(f"{name} is {value}; expected a number {'above' if open_low else 'of at least'} {low}{up_to}")
