"""Changes to what a program computes: the parts that correct variants and mistakes are made of.

A change takes the setting of a program and gives another one, so changes can be made one after the other, and
a pair of mistakes is one change.  Nothing is patched: operations, configuration, choices, weights and the
arithmetic are all parts of the setting.  The backward of a changed forward is its derivative, so whoever
changes an operation gives both, and a change of a weight comes with the adjoint for its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from refimpl.layers.context import Ops
from refimpl.numerics.arithmetic import Arithmetic, Array, Operand
from refimpl.numerics.formats import Format, round_to
from refimpl.programs import Outputs, Setting

Change = Callable[[Setting], Setting]


def unchanged(setting: Setting) -> Setting:
    """The identity."""
    return setting


def both(*changes: Change) -> Change:
    """One change after the other."""

    def all_of_them(setting: Setting) -> Setting:
        for change in changes:
            setting = change(setting)
        return setting

    return all_of_them


def operations(**made: Callable[[Ops], Any]) -> Change:
    """Operations replaced, each made from the operations as they were: operations(norm=lambda ops: ...)."""
    return lambda s: replace(s, ops=replace(s.ops, **{name: make(s.ops) for name, make in made.items()}))


def configured(**fields: Any) -> Change:
    """Fields of the configuration; a function is given the old configuration."""

    def change(s: Setting) -> Setting:
        new = {name: value(s.config) if callable(value) else value for name, value in fields.items()}
        return replace(s, config=replace(s.config, **new))

    return change


def chosen(**alternatives: Any) -> Change:
    """Other alternatives of choices."""
    return lambda s: replace(s, choices=replace(s.choices, **alternatives))


def computed(wrap: Callable[[Arithmetic], Arithmetic]) -> Change:
    """Another arithmetic, made from the one that was there."""
    return lambda s: replace(s, ar=wrap(s.ar))


def rounded(fmt: Format, *sites: str) -> Change:
    """Values that cross the boundaries of these names (patterns) are rounded to a format."""
    return computed(lambda ar: _Rounding(ar, fmt, sites))


def stored(pattern: str, change: Callable[[Array], Array], adjoint: Callable[[Array], Array]) -> Change:
    """Weights whose names fit the pattern are read as change(weight); their gradients are adjoint(those of
    what was read).  For a permutation that is the inverse, for a rounding the identity."""

    def reading(s: Setting) -> Setting:
        names = [name for name in s.weights if fnmatchcase(name, pattern)]
        return replace(
            s,
            weights={**s.weights, **{name: change(s.weights[name]) for name in names}},
            after=(*s.after, lambda outputs: _adjoint(outputs, names, adjoint)),
        )

    return reading


def given(change: Callable[[Mapping[str, Array]], Mapping[str, Array]]) -> Change:
    """Other inputs."""
    return lambda s: replace(s, inputs=change(s.inputs))


def finished(change: Callable[[Outputs], Outputs]) -> Change:
    """The outputs, as they are handed out."""
    return lambda s: replace(s, after=(*s.after, change))


def _adjoint(outputs: Outputs, names: list[str], adjoint: Callable[[Array], Array]) -> Outputs:
    own = {f"grad.{name}": outputs[f"grad.{name}"] for name in names if f"grad.{name}" in outputs}
    return outputs | {name: adjoint(gradient) for name, gradient in own.items()}


class _Rounding:
    """An arithmetic with roundings at some sites more."""

    def __init__(self, ar: Arithmetic, fmt: Format, sites: tuple[str, ...]) -> None:
        self._ar, self._format, self._sites = ar, fmt, sites

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ar, name)

    def at(self, site: str, x: Array) -> Array:
        return self._stored(site, self._ar.at(site, x))

    def operand(self, site: str, x: Array) -> Operand:
        return self._ar.operand(site, self._stored(site, x))

    def _stored(self, site: str, x: Array) -> Array:
        if not any(fnmatchcase(site, pattern) for pattern in self._sites):
            return x
        return self._ar.array(round_to(x, self._format))
