"""Mistakes of multi-token prediction.  SPEC MTP-1 to MTP-5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from refimpl.config.choices import Choices
from refimpl.config.training import TrainingConfig
from refimpl.layers import norm
from refimpl.layers.batch import PADDING, Inputs
from refimpl.layers.context import Context, Op, Ops
from refimpl.layers.loss import IGNORED
from refimpl.losses import Divisors
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.gradients import Gradients
from refimpl.programs import Outputs, Setting
from refimpl.variants.mutants.mutant import Mutant
from refimpl.variants.variation import Change, operations

_BIAS: Final = ".mlp.gate.e_score_correction_bias.centred"


def _other(name: str, one: str, two: str) -> Change:
    """The alternative of a choice that was not chosen."""

    def change(s: Setting) -> Setting:
        other = two if getattr(s.choices, name) == one else one
        changes: dict[str, Any] = {name: other}
        return replace(s, choices=replace(s.choices, **changes))

    return change


def _ruled(**made: Any) -> Change:
    """Rules of the step replaced, each made from the setting."""
    return lambda s: replace(s, rules=replace(s.rules, **{name: make(s) for name, make in made.items()}))


def _without_head_norm(ops: Ops) -> Op:
    """The norm before the shared head gives back what it was given; its gain has a gradient of zeros."""

    def here(c: Context) -> bool:
        return c.path.endswith("shared_head.norm")

    def forward(c: Context, x: Array, eps: float) -> tuple[Array, norm.Saved]:
        y, saved = ops.norm.forward(c, x, eps)
        return (x, replace(saved, out=x)) if here(c) else (y, saved)

    def backward(c: Context, dy: Array, saved: norm.Saved, grads: Gradients) -> Array:
        if not here(c):
            dx: Array = ops.norm.backward(c, dy, saved, grads)
            return dx
        ops.norm.backward(c, np.zeros_like(dy), saved, grads)
        return dy

    return Op(forward, backward)


def _another_embedding(ops: Ops) -> Op:
    """Modules read a table of their own; here it is the main model's, upside down."""

    def forward(c: Context, ids: Array) -> tuple[Array, Any]:
        return ops.embedding.forward(c, _turned(c, ids))  # type: ignore[no-any-return]

    return Op(forward, ops.embedding.backward)


def _turned(c: Context, ids: Array) -> Array:
    return c.config.vocab_size - 1 - ids if c.path.startswith("model.layers.") else ids


def _unshifted(ops: Ops) -> Any:
    def shifted(given: Inputs, choices: Choices) -> Inputs:
        right: Inputs = ops.shifted(given, choices)
        return replace(right, ids=given.ids)

    return shifted


def _across(ops: Ops) -> Any:
    """The shift ends at the end of the row, not at that of each document."""

    def shifted(given: Inputs, choices: Choices) -> Inputs:
        follows = np.zeros(given.ids.shape, bool)
        follows[:, :-1] = given.exists[:, 1:] & given.exists[:, :-1]

        def left(x: Array, fill: int) -> Array:
            moved = np.full(x.shape, fill, x.dtype)
            moved[:, :-1] = x[:, 1:]
            return np.where(follows, moved, fill)

        segments = np.where(follows, given.segments, PADDING)
        places = left(given.positions, 0) if choices.mtp_positions == "token" else given.positions
        targets = None if given.targets is None else left(given.targets, IGNORED)
        return Inputs(left(given.ids, 0), segments, places, targets)

    return shifted


def _summed(s: Setting) -> Any:
    """lambda for each module, not for their mean."""
    modules = s.config.num_nextn_predict_layers

    def at(training: TrainingConfig, tokens: int) -> TrainingConfig:
        now = s.rules.at(training, tokens)
        return replace(now, mtp_loss_weight=now.mtp_loss_weight * max(modules, 1))

    return at


def _by_main_count(s: Setting) -> Any:
    def divisors(own: Sequence[Divisors]) -> list[Divisors]:
        right = s.rules.divisors(own)
        return [replace(one, targets=(one.targets[0],) * len(one.targets)) for one in right]

    return divisors


def _bias_left(s: Setting) -> Setting:
    """The selection biases of modules are as they were."""
    inside = range(s.config.num_hidden_layers, s.config.num_hidden_layers + s.config.num_nextn_predict_layers)
    names = [f"model.layers.{layer}{_BIAS}" for layer in inside]

    def after(outputs: Outputs) -> Outputs:
        ar = s.ar
        old = {n: ar.array(s.weights[n.removesuffix(".centred")]) for n in names if f"after.{n}" in outputs}
        return outputs | {f"after.{name}": bias - ar.mean(bias) for name, bias in old.items()}

    return replace(s, after=(*s.after, after))


MUTANTS: Final = (
    Mutant("T01", _other("mtp_concat", "embedding_first", "hidden_first")),
    Mutant("T02", _other("mtp_hidden", "after_norm", "before_norm")),
    Mutant("T03", _other("mtp_first_embedding", "keep", "zero")),
    Mutant("T04", operations(norm=_without_head_norm)),
    Mutant("T05", _other("mtp_passes", "after_norm", "before_norm")),
    Mutant("T06", operations(shifted=_unshifted)),
    Mutant("T07", _other("mtp_positions", "token", "hidden"), benign=True),
    Mutant("T08", operations(embedding=_another_embedding)),
    Mutant("T09a", _ruled(at=_summed)),
    Mutant("T09b", _ruled(divisors=_by_main_count)),
    Mutant("T10", operations(shifted=_across), ("fp32", "tf32", "fp16")),  # a target more moves a mean little
    Mutant("T11", _bias_left, ("fp32", "tf32")),  # biases are float32 in every port
)
