"""Suite reject: inputs that every implementation must refuse.  SPEC CONF-2, MODEL-2, CKPT-5."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.cases.definition import Definition, Draw, Given, Source, shaped
from refimpl.cases.suites import flags
from refimpl.config.presets import preset

_CONFIG = shaped(preset("tiny-v3"))
_IDS = np.arange(24).reshape(2, 12)
_BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def _bias(value: float) -> Given:
    bias = np.full(16, 0.1)
    bias[5] = value
    return Given(bias.astype(np.float32).astype(np.float64), "F32")


def _reject(id: str, why: str, clauses: tuple[str, ...], *, ids: Any = _IDS, **more: Any) -> Definition:
    inputs: dict[str, Source] = {"input_ids": Given(ids, "I64"), **more.pop("inputs", {})}
    return Definition(
        f"reject/{id}", f"Refused: {why}", clauses, "model", _CONFIG, inputs, rejects=why, **more
    )


def _ids(value: int) -> Any:
    changed = _IDS.copy()
    changed[1, 3] = value
    return changed


CASES: tuple[Definition, ...] = (
    _reject(
        "bias-nan",
        "a selection bias is NaN",
        ("CKPT-5",),
        weights={_BIAS: _bias(np.nan)},
        flags=(flags.BIAS_NOT_FINITE,),
    ),
    _reject(
        "bias-infinite",
        "a selection bias is infinite",
        ("CKPT-5",),
        weights={_BIAS: _bias(np.inf)},
        flags=(flags.BIAS_NOT_FINITE,),
    ),
    _reject(
        "weight-shape",
        "kv_a_proj_with_mqa has the shape of its transpose",
        ("CKPT-5",),
        weights={"model.layers.0.self_attn.kv_a_proj_with_mqa.weight": Draw((96, 96 + 1))},
    ),
    _reject(
        "router-shape",
        "the router has a row less than there are experts",
        ("CKPT-5",),
        weights={"model.layers.1.mlp.gate.weight": Draw((15, 96), 2.0**-9)},
    ),
    _reject("id-too-large", "an id is the size of the vocabulary", ("MODEL-2",), ids=_ids(160)),
    _reject("id-negative", "an id is negative", ("MODEL-2",), ids=_ids(-1)),
    _reject(
        "target-too-large",
        "a target is neither a token nor -100",
        ("MODEL-2",),
        inputs={"targets": Given(_ids(160), "I64")},
    ),
    _reject(
        "segments-shape",
        "segment_ids has another shape than input_ids",
        ("MODEL-2",),
        inputs={"segment_ids": Given(np.zeros((2, 11), np.int64), "I64")},
    ),
    _reject(
        "expert-out-of-range",
        "the given routing names an expert that does not exist",
        ("MODEL-2", "ROUTE-8"),
        inputs={"model.layers.1.mlp.gate.topk_idx": Given(np.tile([0, 1, 16], (24, 1)), "I64")},
        forced=True,
    ),
    _reject(
        "expert-twice",
        "the given routing names an expert twice for a token",
        ("MODEL-2", "ROUTE-8"),
        inputs={"model.layers.1.mlp.gate.topk_idx": Given(np.tile([0, 1, 1], (24, 1)), "I64")},
        forced=True,
    ),
    _reject(
        "topk-beyond-groups",
        "9 experts per token, but 2 kept groups of 4 hold 8",
        ("CONF-2",),
        published={"num_experts_per_tok": 9},
    ),
    _reject("groups-uneven", "16 experts do not divide into 3 groups", ("CONF-2",), published={"n_group": 3}),
    _reject("groups-kept", "more groups are kept than there are", ("CONF-2",), published={"topk_group": 5}),
    _reject("rope-width-odd", "the rotary width is odd", ("CONF-2",), published={"qk_rope_head_dim": 63}),
)
