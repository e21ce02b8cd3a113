"""Suite balance: balance losses, and the selection bias after a step.  SPEC BALANCE-1 to BALANCE-4, BIAS-1 to
BIAS-3.

Scores and chosen experts are inputs.  The sequences prefer different experts, so that a loss over the batch
is another one; the routing is by groups, so that the K best are others than the chosen.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.cases.definition import SEED, Definition, Draw, Given, Source, shaped
from refimpl.cases.suites.common import pair
from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.config.presets import preset
from refimpl.layers import gate
from refimpl.numerics import generator
from refimpl.numerics.arithmetic import Array

_V3 = shaped(preset("tiny-v3"), n_routed_experts=32, n_group=8, topk_group=2, num_experts_per_tok=4)
_V2 = shaped(preset("tiny-v2"), n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=3)
_CLAUSES = ("BALANCE-1", "BALANCE-2", "BALANCE-4")
_PADDED = np.array([[0] * 5 + [1] * 3 + [-1] * 2, [0] * 10, [0] * 4 + [-1] * 6])
_FINE = ("fp32", "tf32")  # scores, losses and biases are float32 in every port
_FAINT = 2.0**-72  # about the sigmoid of -50


def _scores(name: str, shape: tuple[int, ...], config: ModelConfig) -> Array:
    """(B, S, N) multiples of 1 / 256 in (0, 1), no two of a token equal, each sequence with experts of its
    own that it prefers."""
    size, length = shape
    wide = config.n_routed_experts
    keys = generator.tensor(SEED, f"balance/{name} scores", (size, length, wide), 1.0, 4)
    liked = (np.arange(wide) // (wide // size)) == np.arange(size)[:, None]  # (B, N)
    order = np.argsort(np.argsort(keys + 400.0 * liked[:, None], axis=-1), axis=-1)  # (B, S, N) ranks
    step = 256 // wide
    return (
        order * step + 1 + generator.integers(SEED, f"balance/{name} steps", order.shape, 0, step - 1)
    ) / 256.0


def _balance(
    id: str,
    title: str,
    config: ModelConfig,
    training: dict[str, Any],
    shape: tuple[int, int] = (2, 10),
    segments: Array | None = None,
    faint: bool = False,
    **more: Any,
) -> tuple[Definition, ...]:
    scores = _scores(id, shape, config)
    flat = scores.reshape(-1, config.n_routed_experts)
    idx = gate.select(flat, config, Choices()).reshape(*shape, -1)
    if faint:
        scores[0, 3] = scores[0, 3] * _FAINT
    inputs: dict[str, Source] = {"scores": Given(scores), "topk_idx": Given(idx, "I64")}
    if segments is not None:
        inputs["segment_ids"] = Given(segments, "I64")
    return pair(
        f"balance/{id}",
        title,
        more.pop("clauses", _CLAUSES),
        "balance",
        config,
        inputs,
        dy={},
        required=("loss.*",),
        arguments={"training": training},
        claims=_FINE,
        **more,
    )


# Two ranks of two microbatches.  Experts 0 and 1: the ranks differ, and the first is wrong about the whole;
# 2 and 3: the microbatches differ; 4 and 5: too many and none; 6 and 7: exactly the mean of the whole, 12.
_COUNTS = np.array(
    [
        [7, 0, 7, 0, 8, 0, 3, 3],
        [4, 0, 0, 8, 6, 0, 3, 3],
        [0, 7, 4, 0, 6, 0, 3, 3],
        [0, 6, 0, 3, 6, 0, 3, 3],
    ]
)
_BIASES = Draw((8,), 2.0**-10, 1, 2.0**-18, "F32")


def _bias(id: str, title: str, counts: Array, **more: Any) -> Definition:
    return Definition(
        f"balance/{id}",
        title,
        ("BIAS-1", "BIAS-2", "BIAS-3"),
        "bias_update",
        shaped(_V3, n_routed_experts=8, n_group=4),
        {"bias": _BIASES, "counts": Given(counts, "I64")},
        required=("load", "max_violation", "after.*"),
        claims=_FINE,
        **more,
    )


CASES: tuple[Definition, ...] = (
    *_balance(
        "sequences",
        "The sequence-wise loss on two sequences that prefer different experts",
        _V3,
        {"balance_loss_weight": 1e-4},
    ),
    *_balance(
        "padded",
        "The sequence-wise loss with packed documents and padding, a row of the batch being a sequence",
        _V3,
        {"balance_loss_weight": 0.01},
        (3, 10),
        _PADDED,
    ),
    *_balance(
        "faint",
        "A token whose logits are near -50: its normalised scores count as all others",
        _V3,
        {"balance_loss_weight": 0.01},
        faint=True,
    ),
    *_balance(
        "selected",
        "The loss over the experts that were chosen, where a document is a sequence",
        _V3,
        {"balance_loss_weight": 0.01},
        (3, 10),
        _PADDED,
        choices=Choices(balance_counts="selected", balance_sequence="segment"),
    ),
    *_balance(
        "v2",
        "V2: losses over experts, over devices and of communication, on four devices",
        _V2,
        {
            "balance_loss_weight": 0.0,
            "expert_balance_weight": 0.003,
            "device_balance_weight": 0.05,
            "communication_balance_weight": 0.02,
            "balance_devices": 4,
        },
        clauses=("BALANCE-3", "BALANCE-4", "BALANCE-4"),
    ),
    _bias(
        "bias",
        "The bias after two ranks of two microbatches that disagree; two have the mean",
        _COUNTS,
    ),
    _bias(
        "bias-late",
        "The bias after 14.3T tokens, when its speed is 0",
        _COUNTS,
        arguments={"tokens": 14_300_000_000_000},
    ),
)
