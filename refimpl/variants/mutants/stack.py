"""Mistakes around the layers: the ids, and which layers have experts.  SPEC MODEL-2, BLOCK-1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from refimpl.layers.context import Context
from refimpl.numerics.arithmetic import Array
from refimpl.variants.mutants.mutant import Mutant
from refimpl.variants.stages import Step, behind, inside
from refimpl.variants.variation import given


def _one_more(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    """Token 0 stands in front, as a second mark of the beginning; the last id has no place any more."""
    made = dict(inputs)
    for name in ("ids", "input_ids"):
        if name in made:
            made[name] = np.concatenate([np.zeros_like(made[name][..., :1]), made[name][..., :-1]], -1)
    return made


def _first_with_experts(c: Context) -> bool:
    layer = int(c.path.split(".")[2])
    return layer == next(i for i in range(layer + 1) if c.config.is_moe_layer(i))


_NOTHING: Final = Step(lambda c, y: (c.ar.zeros(y.shape), None), lambda c, dy, kept: c.ar.zeros(dy.shape))

MUTANTS: Final = (
    Mutant("X01", given(_one_more)),
    Mutant("X02", inside("block", **behind("experts", _NOTHING, _first_with_experts))),
)
