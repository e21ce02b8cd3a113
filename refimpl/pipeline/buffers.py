"""What a rank holds while it works through its entries, and how much that is.  SPEC PIPE-55 to PIPE-57.

Of a stage and a microbatch a rank holds, one after the other,

    activations      what F saved, from F until its release: at I, or at W (a whole backward releases at once)
    operands         of the weight gradients that wait, from I to W; many are activations as well
    contributions    the microbatch's gradients, from then on until all are reduced

A buffer that several of these keep is counted with the first of them that does, and once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any
from weakref import ref

import numpy as np

from refimpl.errors import Invalid
from refimpl.numerics.arithmetic import Operand, Plain
from refimpl.numerics.gradients import Gradients
from refimpl.pipeline.memory import RELEASING

Key = tuple[int, int]  # stage, microbatch
ACTIVATIONS, OPERANDS, CONTRIBUTIONS = range(3)


@dataclass(frozen=True)
class Peak:
    """The most that a rank held at once; each of them at its own time."""

    activations: int  # stages of one microbatch
    activation_bytes: int
    operand_bytes: int  # of what waits, without what are activations too
    contribution_bytes: int
    bytes: int  # of all together


class Buffers:
    """Of one rank.  release: when activations are let go of, "W" or "I"."""

    def __init__(self, release: str, ignored: Mapping[int, int]) -> None:
        if release not in RELEASING:
            raise Invalid(f"release is {release!r}, but activations are released at 'W' or at 'I'.")
        self._release, self._ignored = release, ignored
        self._saved: dict[Key, Any] = {}
        self._alive: dict[Key, ref[Any]] = {}
        self._waiting: dict[Key, Gradients] = {}
        self.contributions: dict[Key, Gradients] = {}
        self._tallies = (Tally(), Tally(), Tally())  # of activations; with operands; with contributions
        self._held: dict[tuple[int, Key], Mapping[int, int]] = {}
        self.peak = Peak(0, 0, 0, 0, 0)

    def keep(self, key: Key, saved: Any) -> None:
        """After F."""
        self._saved[key], self._alive[key] = saved, ref(saved)
        self._hold(ACTIVATIONS, key, saved)
        self._measure()

    def saved(self, key: Key) -> Any:
        """What F saved."""
        return self._saved[key]

    def wait(self, key: Key, grads: Gradients) -> None:
        """After I: the operands of weight gradients wait."""
        self._waiting[key] = grads
        self._hold(OPERANDS, key, grads.waiting)
        self._hold(CONTRIBUTIONS, key, grads.held)
        self._measure()
        if self._release == "I":
            self._free(key)

    def run(self, key: Key) -> None:
        """W: the weight gradients of this stage and microbatch, and of no other."""
        grads = self._waiting.pop(key)
        grads.run()
        self._drop(OPERANDS, key)
        self._drop(CONTRIBUTIONS, key)
        self.contributions[key] = grads
        self._hold(CONTRIBUTIONS, key, grads.held)
        self._measure()
        if self._release == "W":
            self._free(key)

    @property
    def alive(self) -> int:
        """How many of the objects that F saved are there: not what is booked, but what is in memory."""
        return [kept() is None for kept in self._alive.values()].count(False)

    def _free(self, key: Key) -> None:
        self._drop(ACTIVATIONS, key)
        del self._saved[key]

    def _hold(self, what: int, key: Key, held: Any) -> None:
        found = buffers(held, self._ignored)
        self._held[what, key] = found
        for tally in self._tallies[what:]:
            tally.add(found)

    def _drop(self, what: int, key: Key) -> None:
        found = self._held.pop((what, key))
        for tally in self._tallies[what:]:
            tally.drop(found)

    def _measure(self) -> None:
        activations, with_operands, everything = (tally.bytes for tally in self._tallies)
        now = (self.alive, activations, with_operands - activations, everything - with_operands, everything)
        was = self.peak
        self.peak = Peak(
            max(was.activations, now[0]),
            max(was.activation_bytes, now[1]),
            max(was.operand_bytes, now[2]),
            max(was.contribution_bytes, now[3]),
            max(was.bytes, now[4]),
        )


class Tally:
    """The bytes of buffers that several may hold, each counted once."""

    def __init__(self) -> None:
        self.bytes = 0
        self._holders: Counter[int] = Counter()

    def add(self, found: Mapping[int, int]) -> None:
        for buffer, size in found.items():
            self.bytes += size if not self._holders[buffer] else 0
            self._holders[buffer] += 1

    def drop(self, found: Mapping[int, int]) -> None:
        for buffer, size in found.items():
            self._holders[buffer] -= 1
            if not self._holders[buffer]:
                self.bytes -= size
                del self._holders[buffer]


def buffers(held: Any, ignored: Mapping[int, int] | None = None) -> dict[int, int]:
    """The memory that objects keep: a buffer's identity -> its bytes.

    Containers and dataclasses are looked into.  A view keeps the whole array that it is of.  What a recipe
    keeps in another form (as codes, say) takes what that form takes.
    """
    found: dict[int, int] = {}
    seen, left = set[int](), [held]
    while left:
        one = left.pop()
        if isinstance(one, np.ndarray):
            while isinstance(one.base, np.ndarray):
                one = one.base
            if id(one) not in (ignored or {}):
                found[id(one)] = one.nbytes
        elif id(one) not in seen:
            seen.add(id(one))
            if type(one) in (Operand, Plain):
                left.append(one.value if isinstance(one, Operand) else one.array)
            elif isinstance(getattr(one, "nbytes", None), int):
                found[id(one)] = one.nbytes
            elif isinstance(one, Mapping):
                left += one.values()
            elif isinstance(one, Sequence) and not isinstance(one, str | bytes):
                left += one
            elif is_dataclass(one) and not isinstance(one, type):
                left += [getattr(one, field.name) for field in fields(one)]
    return found
