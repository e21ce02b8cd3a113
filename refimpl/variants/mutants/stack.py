"""Mistakes around the layers: the ids, and which layers have experts.  SPEC MODEL-2, BLOCK-1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from refimpl.layers.context import Context
from refimpl.numerics.arithmetic import Array
from refimpl.variants.mutants.mutant import Mutant
from refimpl.variants.stages import Step, behind, inside
from refimpl.variants.variation import Change, given


def _moved(by: int) -> Change:
    """The ids of every sequence, `by` places later; token 0 stands where there is none."""

    def change(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        made = dict(inputs)
        for name in ("ids", "input_ids"):
            if name in made:
                made[name] = np.roll(made[name], by, -1)
                made[name][..., 0 if by > 0 else -1] = 0
        return made

    return given(change)


def _layer(c: Context) -> int:
    return int(c.path.split(".")[2])


def _first_with_experts(c: Context) -> bool:
    layer = _layer(c)
    return layer == next((i for i in range(layer + 1) if c.config.is_moe_layer(i)), -1)


def _dense_between(c: Context) -> bool:
    """A dense layer behind the first with experts, where not every layer has them."""
    return c.leaf == "mlp" and not c.config.is_moe_layer(_layer(c)) and _layer(c) >= _first(c)


def _first(c: Context) -> int:
    return c.config.first_k_dense_replace


_NOTHING: Final = Step(lambda c, y: (c.ar.zeros(y.shape), None), lambda c, dy, kept: c.ar.zeros(dy.shape))

MUTANTS: Final = (
    Mutant("X01a", _moved(1)),  # one more mark of the beginning
    Mutant("X01b", _moved(-1)),  # none
    # a layer of the wrong kind finds no weights of its own; what is not found adds nothing
    Mutant("X02a", inside("block", **behind("experts", _NOTHING, _first_with_experts))),
    Mutant("X02b", inside("block", **behind("moe", _NOTHING, _first_with_experts))),
    Mutant("X02c", inside("block", **behind("mlp", _NOTHING, _dense_between))),
)
