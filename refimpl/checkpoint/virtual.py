"""Virtual weights: a checkpoint that a counter-based generator makes when it is read.  SPEC CKPT-8.

The stream of a tensor is named by its checkpoint name, so any slice of a model of any size is made in
constant time and nobody holds it.  `rule` says how each role is made.  All values are exact in bf16 except
the selection bias, which is exact in float32, has both signs, and is never zero nor exact in bf16.

embedding  standard deviation 0.82
linear     the power of two that brings the standard deviation nearest to 1 / sqrt(inputs), so that
           activations keep their size; attention logits have a standard deviation of 1 to 4
router     twice that: scores spread well over (0, 1)
gain       uniform in [0.375, 1.625) in steps of 1 / 128
bias       standard deviation 0.10, about half of that of the scores; the offset's second term,
           2^-21, takes more bits than bf16 has
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from refimpl.checkpoint.dtypes import Array, bf16_codes
from refimpl.checkpoint.names import ParameterSpec
from refimpl.checkpoint.weights import Weights
from refimpl.config.model import ModelConfig
from refimpl.errors import Invalid
from refimpl.numerics import generator

FIELD_STD: Final = math.sqrt(10922.5)  # of one field of the generator
GAIN_LOW, GAIN_HIGH, GAIN_SCALE = 48, 208, 2.0**-7


@dataclass(frozen=True)
class Fields:
    """offset + scale * one field: `generator.tensor(seed, name, shape, scale, 1, offset)`."""

    scale: float
    offset: float = 0.0


@dataclass(frozen=True)
class Steps:
    """scale * integer: `scale * generator.integers(seed, name, shape, low, high)`."""

    low: int
    high: int
    scale: float


def rule(spec: ParameterSpec) -> Fields | Steps:
    """How the values of a tensor are made from its stream."""
    match spec.role:
        case "embedding":
            return Fields(2.0**-7)
        case "linear":
            return Fields(_nearest_scale(1.0 / math.sqrt(spec.shape[1])))
        case "router":
            return Fields(_nearest_scale(2.0 / math.sqrt(spec.shape[1])))
        case "gain":
            return Steps(GAIN_LOW, GAIN_HIGH, GAIN_SCALE)
        case "bias":
            return Fields(2.0**-10, 2.0**-11 + 2.0**-21)
        case "shift":
            return Fields(2.0**-10)
    raise AssertionError(spec.role)


def _nearest_scale(std: float) -> float:
    """The power of two that brings a field's standard deviation nearest to `std`, on a logarithmic scale."""
    fraction, exponent = math.frexp(std / FIELD_STD)  # fraction in [1/2, 1)
    return math.ldexp(1.0, exponent if fraction * fraction >= 0.5 else exponent - 1)


class VirtualWeights(Weights):
    """The checkpoint of `config` under `seed` (0 or more): every name, float32 arrays, nothing kept."""

    always_finite = True

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise Invalid(f"the seed of virtual weights is {seed!r}, but it must be an integer from 0 on.")
        self.seed = seed
        super().__init__(config)

    def stored_names(self) -> Iterator[str]:
        return (name for name, spec in self.specs.items() if spec.kind != "scale")

    def stored_dtype(self, name: str) -> str:
        return "F32" if self.specs[name].role == "bias" else "BF16"

    def stored_shape(self, name: str) -> tuple[int, ...]:
        return self.specs[name].shape

    def stored_value(self, name: str) -> Array:
        shape = self.specs[name].shape
        return self.slice(name, 0, math.prod(shape)).reshape(shape)

    def stored_codes(self, name: str) -> Array:
        value = self.stored_value(name)
        return value if self.stored_dtype(name) == "F32" else bf16_codes(value, f"tensor {name}")

    def rule(self, name: str) -> Fields | Steps:
        """How the tensor is made.  Raises Missing."""
        return rule(self.spec(name))

    def slice(self, name: str, start: int, count: int) -> Array:
        """Elements start to start + count - 1 in C order, float32.  Raises Missing, Invalid."""
        name = self.canonical(name)
        size = math.prod(self.specs[name].shape)
        if not 0 <= start <= start + count <= size:
            raise Invalid(f"slice {start}:{start + count} of tensor {name} must lie in its {size} elements.")
        how = rule(self.specs[name])
        if isinstance(how, Fields):
            values = generator.tensor_slice(self.seed, name, start, count, how.scale, 1, how.offset)
            return values.astype(np.float32)  # exact: at most 21 bits
        steps = generator.integers(self.seed, name, (start + count,), how.low, how.high)[start:]
        return (steps * how.scale).astype(np.float32)
