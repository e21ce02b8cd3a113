"""Suite model: whole small models, forward and backward.  SPEC MODEL-1 to MODEL-6."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from refimpl.cases.definition import SEED, Definition, Given, Source, shaped
from refimpl.cases.suites import flags
from refimpl.config.presets import preset
from refimpl.numerics import generator

_SHAPE = (2, 12)
_CLAUSES = ("MODEL-1", "MODEL-2", "MODEL-5", "BLOCK-1", "HEAD-1", "LOSS-2")
_SEGMENTS = np.array([[0] * 5 + [1] * 4 + [-1] * 3, [0] * 12])


def _tokens() -> dict[str, Source]:
    """Ids, and as targets the next ids, none at the end."""
    ids = generator.integers(SEED, "model ids", _SHAPE, 0, 160)
    targets = np.full(_SHAPE, -100)
    targets[:, :-1] = ids[:, 1:]
    return {"input_ids": Given(ids, "I64"), "targets": Given(targets, "I64")}


def _model(name: str, title: str) -> tuple[Definition, ...]:
    """Forward and backward, each with free routing and with the routing given."""
    free = Definition(
        f"model/{name}",
        f"{title}: logits, loss and routing of two sequences",
        _CLAUSES,
        "model",
        shaped(preset(name)),
        _tokens(),
        required=("*.topk_idx",),
        shared=True,
        flags=(flags.TARGETS_SHIFTED, flags.SOFTMAX_SCALE, flags.NORM_TOPK, flags.SCALING),
    )
    gradients = (*_CLAUSES, "LOSS-3", "MODEL-4", "MODEL-6")
    backward = replace(
        free,
        id=f"model/{name}-vjp",
        title=f"{title}: gradients of the loss for every weight",
        clauses=gradients,
        backward=True,
        twin=free.id,
    )
    forced = replace(
        free,
        id=f"model/{name}-forced",
        title=f"{title}: logits and loss with the routing given",
        clauses=(*_CLAUSES, "ROUTE-8"),
        forced=True,
        twin=free.id,
    )
    both = replace(
        backward,
        id=f"model/{name}-forced-vjp",
        title=f"{title}: gradients of the loss with the routing given",
        clauses=(*gradients, "ROUTE-8"),
        forced=True,
    )
    return free, backward, forced, both


CASES: tuple[Definition, ...] = (
    *_model("tiny-v3", "A small V3"),
    *(d for d in _model("tiny-v3-noq", "A small V3 without the query latent") if d.forced or not d.backward),
    *(d for d in _model("tiny-v2", "A small V2") if d.forced or not d.backward),
    Definition(
        "model/layers",
        "Experts in layer 4 only: first_k_dense_replace is 3 and moe_layer_freq 2",
        (*_CLAUSES, "CONF-4"),
        "model",
        shaped(preset("tiny-v3"), num_hidden_layers=5, first_k_dense_replace=3, moe_layer_freq=2),
        _tokens(),
        forced=True,
        required=("*.topk_idx",),
        flags=(flags.LAYER_KINDS,),
    ),
    Definition(
        "model/packed",
        "A small V3 on packed documents and padding",
        (*_CLAUSES, "MASK-1", "MASK-2", "MASK-3", "MASK-4"),
        "model",
        shaped(preset("tiny-v3")),
        {**_tokens(), "segment_ids": Given(_SEGMENTS, "I64")},
        forced=True,
        required=("*.topk_idx",),
        shared=True,
        flags=(flags.MASK_SEGMENTS,),
    ),
)
