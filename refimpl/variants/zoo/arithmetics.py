"""The arithmetics of the zoo: emulated float32, and what is stored or read in fewer bits.  SPEC EXACT-8."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Final

import numpy as np

from refimpl.numerics.arithmetic import Arithmetic, Array, Operand
from refimpl.numerics.emulated import Emulated, Rounding, to_bf16, to_fp16
from refimpl.programs import Outputs
from refimpl.variants.variation import Change, both, computed, finished

Table = tuple[tuple[str, Rounding | None], ...]  # patterns of sites and what happens there; the first counts


def emulated(order: str = "one by one", read: Rounding | None = None, table: Table = ()) -> Change:
    """float32 with an order of sums, a rounding of operands, and roundings at sites."""
    return computed(lambda ar: Emulated(order, read, _at(table)))


def half(to: Rounding, table: Table, order: str = "chunks", read: Rounding | None = None) -> Change:
    """Values are stored in 16 bits where the table says so, and outputs everywhere."""
    return both(emulated(order, read, table), finished(lambda outputs: _stored(outputs, to)))


def _stored(outputs: Outputs, to: Rounding) -> Outputs:
    floats = {name: np.asarray(x) for name, x in outputs.items() if np.asarray(x).dtype.kind == "f"}
    return outputs | {name: to(x.astype(np.float32)) for name, x in floats.items()}


def _at(table: Table) -> Callable[[str], Rounding | None]:
    @cache
    def rounding(site: str) -> Rounding | None:
        return next((to for pattern, to in table if fnmatchcase(site, pattern)), None)

    return rounding


_ROUTER: Final[Table] = (("gate.*", None), ("d.gate.*", None))


def eager(to: Rounding) -> Table:
    """Every kernel stores its result, as transformers does; the router is in float32."""
    return (*_ROUTER, ("absorbed.*", to), ("*", to))


def demo(to: Rounding) -> Table:
    """DeepSeek's code: the gate too, up to the biased scores; a norm stores once."""
    return (("gate.choice", None), ("norm.normed", None), ("*", to))


_INSIDE: Final = """
norm.normed attention.scores attention.probs d.attention.scores d.attention.probs
swiglu.silu d.swiglu.*
rope.table rope.product residual d.residual lm_head.out
experts.slot experts.sum d.experts.sum experts.out moe.out
"""


def fused(to: Rounding) -> Table:
    """Fused kernels: what stays inside of one is not stored, and the residual stream is float32."""
    inside = _INSIDE.split()
    return (*_ROUTER, *((pattern, None) for pattern in inside), ("*", to))


EAGER_BF16, DEMO_BF16, FUSED_BF16 = eager(to_bf16), demo(to_bf16), fused(to_bf16)
EAGER_FP16, FUSED_FP16 = eager(to_fp16), fused(to_fp16)


def except_at(table: Table, *patterns: str) -> Table:
    """The same table without storing at these sites."""
    return (*((pattern, None) for pattern in patterns), *table)


class _Tokens:
    """An arithmetic whose weight gradients add tokens in groups, or from the last to the first."""

    def __init__(self, ar: Arithmetic, size: int | None) -> None:
        self._ar, self._size = ar, size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ar, name)

    def wgrad(self, dy: Operand, x: Operand) -> Array:
        if self._size is None:
            return self._ar.wgrad(Operand(dy.value[::-1]), Operand(x.value[::-1]))
        total = None
        for at in range(0, len(dy.value), self._size):
            rows = slice(at, at + self._size)
            own = self._ar.wgrad(Operand(dy.value[rows]), Operand(x.value[rows]))
            total = own if total is None else total + own
        assert total is not None
        return total


def tokens(size: int | None) -> Change:
    """Weight gradients over groups of that many tokens, or over all from the last to the first."""
    return computed(lambda ar: _Tokens(ar, size))
