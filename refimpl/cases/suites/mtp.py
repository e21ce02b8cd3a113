"""Suite mtp: the modules of multi-token prediction, and whole models with them.  SPEC MTP-1 to MTP-5."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from refimpl.cases.definition import Definition, Draw, Given, Integers, Source, shaped
from refimpl.cases.suites.common import V3, pair
from refimpl.cases.suites.warm import SMALL, gains, tokens
from refimpl.config.choices import Choices

# The attention's widths are the model's: 512 + 64 of the latent, 128 and 128 of a head.
_WIDE = shaped(
    V3, hidden_size=64, moe_intermediate_size=16, n_routed_experts=6, n_group=3, topk_group=2,
    num_experts_per_tok=2, q_lora_rank=32, num_nextn_predict_layers=2,
)  # fmt: skip
_CLAUSES = ("MTP-1", "MTP-2", "MTP-3", "MTP-4")
_PACKED = np.array([[0, 0, 0, 0, 1, 1, 1, -1], [0, 0, 0, 0, 0, 0, 0, 0]])
_DETAILS = ("*.self_attn.*", "*.experts.*", "*.shared_experts*", "*.gate.logits", "*.mlp", "*layernorm")
_MANY = ("grad.*.mlp.experts.[3-9].*", "grad.*.mlp.experts.??.*")  # every one of them is made alike


def _module(
    id: str, title: str, depth: int, segments: Any = None, choices: Choices | None = None
) -> tuple[Definition, ...]:
    """Module `depth` by itself, forward and backward."""
    shape = (2, 6) if segments is None else np.shape(segments)
    wide, path = _WIDE.hidden_size, f"model.layers.{_WIDE.num_hidden_layers + depth - 1}"
    inputs: dict[str, Source] = {"x": Draw((*shape, wide)), "input_ids": Integers(shape, 0, _WIDE.vocab_size)}
    if segments is not None:
        inputs["segment_ids"] = Given(segments, "I64")
    forward, backward = pair(
        f"mtp/{id}",
        title,
        _CLAUSES,
        "mtp",
        _WIDE,
        inputs,
        dy={"dy": Draw((*shape, _WIDE.vocab_size)), "dnext": Draw((*shape, wide))},
        forced=True,
        path=path,
        weights=gains(_WIDE, f"{path}."),
        arguments={"depth": depth},
        choices=choices or Choices(),
        required=("*.following", "*.shared_head.head", "*.eh_proj"),
        omits=_DETAILS,
    )
    return forward, replace(backward, omits=_MANY)


_TWO = shaped(SMALL, num_nextn_predict_layers=2)


def _models() -> tuple[Definition, ...]:
    """Two modules, MTP and balance losses, packed documents and padding: free and forced."""
    free = Definition(
        "mtp/model-vjp",
        "A small V3 with two modules and balance losses: logits, losses and gradients of their sum",
        ("MTP-1", "MTP-2", "MTP-4", "MTP-5", "BALANCE-1", "BALANCE-2", "LOSS-1", "MODEL-4"),
        "model",
        _TWO,
        tokens("mtp/model", _PACKED.shape, _TWO, segment_ids=_PACKED),
        weights=gains(_TWO),
        arguments={"training": {"mtp_loss_weight": 0.3, "balance_loss_weight": 0.01}},
        required=("*.topk_idx", "*.shared_head.head", "loss.*"),
        omits=(*_MANY, "grad.*.layers.2.self_attn.*", "grad.*.experts.[1-9].*"),
        backward=True,
        shared=True,
    )
    forced = replace(
        free,
        id="mtp/model-forced-vjp",
        title="A small V3 with two modules and balance losses, with the routing given",
        clauses=(*free.clauses, "ROUTE-8"),
        forced=True,
        twin=free.id,
        omits=(*_MANY, "grad.*.self_attn.*", "grad.*_proj.*"),  # as in the free case
    )
    forward = replace(
        forced,
        id="mtp/model-forced",
        title="A small V3 with two modules and balance losses: logits and losses with the routing given",
        backward=False,
        omits=(*_DETAILS, "model.layers.?", "*.gate.scores"),
    )
    return free, forward, forced


CASES: tuple[Definition, ...] = (
    _module("first", "The first module on two sequences", 1)[0],
    *_module(
        "packed",
        "The first module on packed documents and padding, with what the second gives back",
        1,
        _PACKED,
    ),
    _module("second", "The second module, two tokens ahead", 2, _PACKED)[0],
    _module(
        "report",
        "The first module as the report prints it: hidden state first, the block's output handed on",
        1,
        choices=Choices(mtp_concat="hidden_first", mtp_passes="before_norm", mtp_positions="hidden"),
    )[0],
    *_models(),
)
