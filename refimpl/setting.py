"""What a program is given: a component with its data, in an arithmetic.  SPEC CASE-7."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from refimpl.checkpoint import names
from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.config.training import TrainingConfig
from refimpl.layers import gate
from refimpl.layers.batch import Batch, allowed, positions
from refimpl.layers.context import Context, Ops, tensors
from refimpl.layers.ops import DEEPSEEK_V3
from refimpl.numerics.arithmetic import Arithmetic, Array, Weight
from refimpl.numerics.gradients import Gradients
from refimpl.parameters import placed
from refimpl.training.rules import DEEPSEEK_V3 as RULES
from refimpl.training.rules import Rules

Outputs = dict[str, Any]
IDX = ".topk_idx"


@dataclass(frozen=True)
class Setting:
    """A component with its data, in an arithmetic."""

    ar: Arithmetic
    config: ModelConfig
    choices: Choices
    path: str
    backward: bool
    arguments: Mapping[str, Any]
    inputs: Mapping[str, Array]
    weights: Mapping[str, Array]
    routing: Mapping[str, Array]  # path of a gate -> topk_idx (T, K) that is forced
    ops: Ops = DEEPSEEK_V3
    after: tuple[Callable[[Outputs], Outputs], ...] = ()  # what a variant does to the outputs, in this order
    rules: Rules = RULES  # of the training step

    @cached_property
    def context(self) -> Context:
        ops = self.ops
        if self.routing:
            ops = gate.forced(ops, {path: (idx, None) for path, idx in self.routing.items()})
        given = _Given(self.ar, self.weights, names.aliases(self.config))
        return Context(self.ar, ops, given, self.config, self.choices, self.path)

    @cached_property
    def training(self) -> TrainingConfig:
        """The fields of the argument `training`; the rest are at their defaults."""
        return TrainingConfig.from_dict(self.arguments.get("training", {}))

    def array(self, name: str) -> Array:
        """An input as the arithmetic's array."""
        return self.ar.array(self.inputs[name])

    @cached_property
    def batch(self) -> Batch:
        """Of x (B, S, ...): positions and segments as given, else counted, and one segment."""
        size, length = self.inputs["x"].shape[:2]
        segments = self.inputs.get("segment_ids", np.zeros((size, length), np.int64))
        places = self.inputs.get("position_ids", positions(segments))
        tables = self.ops.tables(self.context, places.reshape(-1))
        return Batch(size, length, tables, allowed(segments))


@dataclass(frozen=True)
class _Given:
    """Weights by checkpoint name, for one run."""

    ar: Arithmetic
    values: Mapping[str, Array]
    aliases: Mapping[str, str]

    def array(self, name: str) -> Array:
        return self.ar.array(self.values[self.aliases.get(name, name)])

    def weight(self, name: str) -> Weight:
        name = self.aliases.get(name, name)
        return placed(self.ar.weight(self.values[name]), name)


def finish(s: Setting, y: Any, saved: Any, backward: Callable[[Any, Gradients], Any]) -> Outputs:
    """The saved tensors with the output, and the gradients for the cotangent `dy` of the output."""
    out: Outputs = {name: array for name, array, _ in tensors(saved, s.path)}
    out.setdefault(s.path, y)
    if s.backward:
        grads = Gradients(s.ar)
        dx = backward(s.array("dy").reshape(y.shape), grads)
        out |= {f"grad.{name}": gradient for name, gradient in sorted(grads.reduce().items())}
        if dx is not None:
            out["grad.x"] = dx.reshape(s.inputs["x"].shape)
    return out
