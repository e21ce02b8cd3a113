"""Suite training: AdamW, whole steps, and a chain of steps.  SPEC STEP-2 to STEP-5, OPTIM-1 to OPTIM-4."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from refimpl.cases.definition import Definition, Draw, Given, Source, usual
from refimpl.cases.suites.warm import LEAST, SMALL, first, gains, gradients, learned, moments, second, tokens

_RATE = {"learning_rate": 0.01, "warmup_steps": 20}
_UPDATE = ("OPTIM-1", "OPTIM-2", "OPTIM-3", "OPTIM-4")
_STEP = ("STEP-2", "STEP-3", "STEP-4", *_UPDATE, "BIAS-3", "LOSS-1", "MTP-5", "BALANCE-4")
_SHAPES = {"a.weight": (12, 16), "b.weight": (16,)}
_LAYERS = ("model.layers.0", "model.layers.1")  # the trunk's layer with experts, and that of the MTP module
_LOADS = ([3, 10, 6, 5], [1, 13, 5, 5])  # of a mean of 6
_FEW = (
    "after.first.*.self_attn.*",
    "after.second.*.self_attn.*",
    "after.first.*.mlp.*",
    "after.second.*.mlp.*",
)
_REST = (
    *_FEW,
    "after.*.experts.[1-9].*",
    "after.*.shared_experts.*",
)  # tensors of one kind are updated alike
_KEPT = ("gradient_norm", "loss.*", "*.load", "*.topk_idx", "after.*")
_CLAIMS = ("fp32", "tf32")  # masters, moments and biases are float32 in every port


def _adamw(id: str, title: str, scale: float, training: dict[str, Any]) -> Definition:
    """Two tensors and the biases of two gates.  scale: of the gradients."""
    inputs: dict[str, Source] = {}
    for name, shape in _SHAPES.items():
        inputs |= {f"grad.{name}": Draw(shape, scale), f"first.{name}": first(shape)}
        inputs |= {f"second.{name}": second(shape), f"average.{name}": Draw(shape)}
    weights: dict[str, Source] = {
        name: Draw(shape, 2.0**-12, 1, 2.0**-20, "F32") for name, shape in _SHAPES.items()
    }
    for layer, load in zip(_LAYERS, _LOADS, strict=True):
        inputs[f"{layer}.mlp.gate.load"] = Given(np.array(load), "I64")
        weights[f"{layer}.mlp.gate.e_score_correction_bias"] = Draw((4,), 2.0**-10, 1, 2.0**-18, "F32")
    return Definition(
        f"training/{id}",
        title,
        (*_UPDATE, "BIAS-3"),
        "adamw",
        SMALL,
        inputs,
        weights=weights,
        arguments={"training": {**_RATE, "ema_decay": 0.99, **training}, "steps": 12},
        required=_KEPT,
        claims=("fp32", "tf32"),  # masters and moments are float32
    )


def _steps() -> tuple[Definition, ...]:
    """A step of two microbatches, one of them with padding; the same with the routing given."""
    segments = np.zeros((2, 2, 7), np.int64)
    segments[1, 0, 4:] = -1
    training = {**_RATE, "balance_loss_weight": 0.01}
    common: dict[str, Any] = {
        "weights": gains(SMALL),
        "arguments": {"training": training, "steps": 12, "tokens": 336},
        "required": _KEPT,
        "shared": True,
        "claims": _CLAIMS,
    }
    free = Definition(
        "training/step",
        "One step from warm moments: two microbatches of two sequences, MTP and balance losses",
        _STEP,
        "step",
        SMALL,
        {**tokens("training/step", segments.shape, SMALL, segment_ids=segments), **moments(learned(SMALL))},
        omits=_REST,
        **common,
    )
    forced = replace(
        free,
        id="training/step-forced",
        title="The same step with the routing given",
        clauses=(*_STEP, "ROUTE-8"),
        forced=True,
        twin=free.id,
        omits=("after.first.*", "after.second.*", "after.*.mlp.*_proj.*", "after.*.self_attn.*"),
    )
    return free, forced


def _given_gradients() -> Definition:
    specs = learned(SMALL, "*.experts.*", "*.self_attn.*")  # which are updated like the others
    return Definition(
        "training/step-gradients",
        "The parameters of a small V3 after one step from warm moments, with their gradients given",
        _UPDATE,
        "adamw",
        SMALL,
        {**gradients(specs), **moments(specs)},
        weights={**{name: usual(spec) for name, spec in specs.items()}, **gains(SMALL, "", "*.self_attn.*")},
        arguments={"training": _RATE, "steps": 12},
        required=_KEPT,
        omits=("after.first.*", "after.second.*"),
        claims=("fp32", "tf32"),
    )


_CHAIN = (20, 1, 2, 4)  # steps, microbatches, sequences, tokens


def _chains() -> tuple[Definition, ...]:
    free = Definition(
        "training/chain",
        "20 steps, each from what the one before has left",
        _STEP,
        "chain",
        LEAST,
        {**tokens("training/chain", _CHAIN, LEAST), **moments(learned(LEAST))},
        weights=gains(LEAST),
        arguments={"training": {**_RATE, "learning_rate": 0.002, "balance_loss_weight": 0.01}, "steps": 12},
        required=_KEPT,
        omits=("after.first.*", "after.second.*", "after.*.experts.[1-9].*", "after.*.layers.1.self_attn.*"),
        shared=True,
        claims=("fp32", "tf32"),
    )
    forced = replace(
        free,
        id="training/chain-forced",
        title="20 steps with the routing given",
        clauses=(*_STEP, "ROUTE-8"),
        forced=True,
        twin=free.id,
    )
    few = ("after.first.*", "after.second.*", "after.*.mlp.*_proj.*", "after.*.self_attn.*")
    return replace(free, omits=few), forced


CASES: tuple[Definition, ...] = (
    _adamw(
        "adamw",
        "AdamW from warm moments, with clipping, decay and the average; two gates' biases",
        2.0**-8,
        {},
    ),
    _adamw(
        "adamw-unclipped",
        "AdamW without clipping, decay of matrices only",
        2.0**-14,
        {"weight_decay_on": "matrices"},
    ),
    *_steps(),
    _given_gradients(),
    *_chains(),
)
