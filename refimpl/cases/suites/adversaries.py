"""Operands on which matrix units differ: what is cut, cancels, is subnormal, or zero among large ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.cases.definition import SEED
from refimpl.numerics import generator
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.formats import Format

KINDS = (
    "finite",
    "one exponent",
    "sparse",
    "zero",
    "subnormal",
    "edges",
    "pairs",
    "opposites",
    "near",
    "special",
)


def codes(stream: str, fmt: Format, rows: int, k: int, kinds: tuple[str, ...] = KINDS) -> Array:
    """(rows, k) codes, row i of kind i modulo their number."""
    made = [_row(f"{stream} {i}", fmt, kinds[i % len(kinds)], k) for i in range(rows)]
    return np.stack(made).astype(fmt.code_type)


def accumulators(stream: str, m: int, n: int, special: bool = True) -> Array:
    """(m, n) codes of float32, of all sizes; some zero, tiny or huge, and special ones."""
    sign = _draw(f"{stream} sign", m * n, 2) << 31
    fraction = _draw(f"{stream} fraction", m * n, 1 << 23)
    kind = np.arange(m * n) % (8 if special else 5)
    exponent = np.select(
        [kind == 0, kind == 1, kind == 2, kind == 3, kind == 4, kind == 5],
        [
            0 * fraction,
            127 + _draw(f"{stream} near", m * n, 8),
            110 + _draw(f"{stream} small", m * n, 17),
            _draw(f"{stream} tiny", m * n, 3),
            100 + _draw(f"{stream} all", m * n, 50),
            250 + _draw(f"{stream} huge", m * n, 5),
        ],
        255,
    )
    fraction = np.where((kind == 0) | (kind == 7), 0, fraction)
    codes: Array = (sign | exponent << 23 | fraction).astype(np.uint32).reshape(m, n)
    return codes


def _row(stream: str, fmt: Format, kind: str, k: int) -> Any:
    step, top = 1 << fmt.fraction_bits, fmt.top
    sign = _draw(f"{stream} sign", k, 2) * fmt.sign
    size = _draw(f"{stream} size", k, top + 1)
    some = _draw(f"{stream} some", k, 100)
    match kind:
        case "one exponent":
            first = int(_draw(f"{stream} exponent", 1, top // step)[0]) * step
            size = first + size % step
        case "sparse":
            size = np.where(some < 90, 0, size)
        case "zero":  # beside large ones: the exponent of a product with it must not count
            size = 0 * size
        case "subnormal":
            size = size % step
        case "edges":
            size = np.array([0, 1, step - 1, step, step + 1, top - 1, top])[some % 7]
        case "pairs" | "opposites":  # together they cancel, up to what is changed
            size[1::2] = size[::2]
            sign[1::2] = fmt.sign - sign[::2] if kind == "opposites" else sign[::2]
            size = np.where(some < 10, _draw(f"{stream} changed", k, top + 1), size)
        case "near":
            middle = (1 << fmt.exponent_bits - 1) * step
            size = middle + size % (4 * step) - 2 * step
        case "special":
            size = np.where(some < 2, _draw(f"{stream} any", k, fmt.sign), size)
    return sign + size


def _draw(stream: str, count: int, below: int) -> Any:
    return generator.integers(SEED, f"bits {stream}", (count,), 0, below)
