"""Rules for the fields of a configuration.  SPEC CONF-1.

A field of a frozen dataclass carries its rule and its meaning; `settle` applies all rules.  A bool is not an
integer, text is not a number, an integer is a fine float, and nothing may be infinite or NaN.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from refimpl.errors import Error, Invalid, Unsupported

LARGEST = 2**31 - 1


class _BrokenError(Exception):
    pass


@dataclass(frozen=True)
class Rule:
    """What a value has to be: `required` says it in words, `convert` returns the value to keep or raises."""

    required: str
    convert: Callable[[Any], Any]
    error: type[Error] = Invalid  # Unsupported, where another value is legitimate and only not computed here

    def settle(self, what: str, value: Any) -> Any:
        """The value to keep.  Raises `Invalid` or `Unsupported`, naming `what`, the value and the rule."""
        try:
            return self.convert(value)
        except _BrokenError:
            raise self.error(f"{what} is {show(value)}, but it must be {self.required}.") from None


def show(value: Any) -> str:
    """A value as a message quotes it: JSON's spelling of the constants, long text cut."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) > 10**30:
        return "an integer of more than 30 digits"
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def integer(low: int = 1, high: int = LARGEST) -> Rule:
    def convert(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _BrokenError
        return value

    return Rule(f"an integer from {low} to {high}", convert)


def real(low: float = 0.0, high: float = math.inf, *, strict: bool = True) -> Rule:
    """A finite number above `low` (from `low` on, if not strict) and at most `high`."""

    def convert(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _BrokenError
        try:
            number = float(value)
        except OverflowError:
            raise _BrokenError from None
        if not math.isfinite(number) or number > high or number < low or (strict and number == low):
            raise _BrokenError
        return number

    words = f"{'above' if strict else 'at least'} {low:g}" + (
        f" and at most {high:g}" if high < math.inf else ""
    )
    return Rule(f"a finite number {words}", convert)


def truth() -> Rule:
    def convert(value: Any) -> bool:
        if not isinstance(value, bool):
            raise _BrokenError
        return value

    return Rule("true or false", convert)


def one_of(*allowed: str | bool | float, error: type[Error] = Invalid) -> Rule:
    def convert(value: Any) -> Any:
        for item in allowed:
            if type(value) is type(item) and value == item:
                return item
        raise _BrokenError

    return Rule(" or ".join(show(a) for a in allowed), convert, error)


def only(value: str | bool) -> Rule:
    """Other values are legitimate, but not computed by this package."""
    return one_of(value, error=Unsupported)


def kept() -> Rule:
    """Anything: the value is only passed on."""
    return Rule("anything", lambda value: value)


def optional(rule: Rule) -> Rule:
    return Rule(
        f"{rule.required}, or null", lambda value: None if value is None else rule.convert(value), rule.error
    )


def ruled(rule: Rule, doc: str, **more: Any) -> Any:
    """A dataclass field with its rule and its meaning."""
    return field(metadata={"rule": rule, "doc": doc}, **more)


def settle(owner: Any, prefix: str) -> None:
    """Check and convert every ruled field of a frozen dataclass in place (for `__post_init__`)."""
    for item in fields(owner):
        if "rule" in item.metadata:
            value = item.metadata["rule"].settle(f"{prefix} {item.name}", getattr(owner, item.name))
            object.__setattr__(owner, item.name, value)
