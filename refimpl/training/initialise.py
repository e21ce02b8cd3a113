"""The weights that a run begins with.  SPEC OPTIM-5.

Matrices, the router and the embedding are (3 fields of the generator + 3) * factor, an integer of mean 0
times one number, so that the standard deviation is initializer_std.  Gains are 1, selection biases 0.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from refimpl.checkpoint import names
from refimpl.config.model import ModelConfig
from refimpl.config.training import TrainingConfig
from refimpl.numerics import generator
from refimpl.numerics.arithmetic import Array

FIELDS: Final = 3  # summed for one value: 1531 possible values, close to normal
_VARIANCE: Final = 2 * (256 * 256 - 1) / 12  # of one field: the sum of two uniform signed bytes


def initialise(config: ModelConfig, training: TrainingConfig, seed: int = 0) -> dict[str, Array]:
    """Checkpoint name -> float64, for every parameter and selection bias.

    The stream of a tensor is its name, so a value depends on the seed, the name and its place alone."""
    made = {}
    for name, spec in names.parameters(config).items():
        if spec.kind == "scale":
            continue
        if spec.role == "gain":
            made[name] = np.ones(spec.shape)
        elif spec.role == "bias":
            made[name] = np.zeros(spec.shape)
        else:
            made[name] = _drawn(seed, name, spec.shape, training.initializer_std)
    return made


def _drawn(seed: int, name: str, shape: tuple[int, ...], std: float) -> Array:
    """The mean of a field is -1, so that of the sum is -FIELDS: it is taken away."""
    whole = generator.tensor(seed, name, shape, 1.0, FIELDS, float(FIELDS))  # integers
    return whole * (std / math.sqrt(FIELDS * _VARIANCE))
