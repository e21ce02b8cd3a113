"""Operands of matrix instructions that are hard on an emulation."""

from __future__ import annotations

import numpy as np

from refimpl.numerics.formats import Format

OPERANDS = (
    "uniform",
    "finite",
    "one exponent",
    "sparse",
    "zero",
    "subnormal",
    "edges",
    "pairs",
    "opposites",
    "special",
)
ACCUMULATORS = ("zero", "bits", "long", "near", "tiny", "huge", "special")


def codes(rng: np.random.Generator, fmt: Format, rows: int, k: int) -> np.ndarray:
    """(rows, k) codes, every row of another kind."""
    return np.stack([_row(rng, fmt, OPERANDS[i % len(OPERANDS)], k) for i in rng.permutation(rows)])


def accumulators(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    """(m, n) float32, every column of another kind."""
    kinds = [ACCUMULATORS[i % len(ACCUMULATORS)] for i in rng.permutation(n)]
    bits = np.stack([_column(rng, kind, m) for kind in kinds], axis=1)
    return bits.astype(np.uint32).view(np.float32)


def _row(rng: np.random.Generator, fmt: Format, kind: str, k: int) -> np.ndarray:
    high = 1 << fmt.bits - 1  # the sign bit
    step = 1 << fmt.fraction_bits
    top = high - 1 - (1 if fmt.kind == "fn" else step)  # the code of the largest value
    sign = rng.integers(0, 2, k) * high
    size = rng.integers(0, top + 1, k)
    match kind:
        case "uniform" | "special":
            any_code = rng.integers(0, 2 * high, k)
            size = np.where(rng.random(k) < 0.02, any_code % high, size) if kind == "special" else size
        case "one exponent":
            size = rng.integers(0, top // step) * step + rng.integers(0, step, k)
        case "sparse":
            size = np.where(rng.random(k) < 0.9, 0, size)
        case "zero":
            size = 0 * size  # with the other operand large: the exponent of a zero must not count
        case "subnormal":
            size = rng.integers(0, step, k)
        case "edges":
            size = rng.choice([0, 1, step - 1, step, step + 1, top - 1, top], k)
        case "pairs" | "opposites":  # together they cancel, up to what is changed
            size[1::2] = size[::2]
            sign[1::2] = high - sign[::2] if kind == "opposites" else sign[::2]
            changed = rng.random(k) < 0.1
            size[changed] = rng.integers(0, top + 1, k)[changed]
    return (sign + size).astype(fmt.code_type)


def _column(rng: np.random.Generator, kind: str, m: int) -> np.ndarray:
    sign = rng.integers(0, 2, m) << 31
    fraction = rng.integers(0, 1 << 23, m)
    match kind:
        case "zero":
            return sign
        case "bits":
            return sign | rng.integers(0, 255, m) << 23 | fraction
        case "long":
            return sign | rng.integers(127, 140, m) << 23 | fraction | 0x3FF
        case "near":
            return sign | rng.integers(110, 127, m) << 23 | fraction
        case "tiny":
            return sign | rng.choice([0, 0, 1, 2, 20], m) << 23 | fraction >> rng.integers(0, 24, m)
        case "huge":
            return sign | rng.integers(250, 255, m) << 23 | fraction
        case _:
            return np.where(rng.random(m) < 0.5, 0x7F800000 | fraction, 0x7F800000) | sign
