"""Cases of the gradients that each rank of a pipeline makes: a small V3 with an MTP module, routing given.

SPEC CASE-20.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from refimpl.cases.definition import SEED, Definition, Given, Source, shaped
from refimpl.cases.suites.warm import LEAST, gains, tokens
from refimpl.config.model import ModelConfig
from refimpl.numerics import generator
from refimpl.pipeline.rules import RULES, plan

_CONFIG: Final = shaped(LEAST, num_hidden_layers=2, first_k_dense_replace=1)
_CLAUSES: Final = ("PIPE-51", "PIPE-52", "PIPE-58", "PIPE-59", "LOSS-1", "MTP-5", "BALANCE-4")
_TRAINING: Final = {"mtp_loss_weight": 0.3, "balance_loss_weight": 0.01}
_SHAPE: Final = (1, 8)  # sequences and tokens of a microbatch
_OMITS: Final = (  # tensors of one kind are added up alike
    "*.experts.*",
    "*.shared_experts.*",
    "*.mlp.*_proj.*",
    "*.self_attn.[!o]*",
    "*norm.weight",
    "*.layers.2.[!e]*",
)


def _experts(name: str, rows: int, config: ModelConfig) -> Source:
    """Two different ones for every token."""
    first = generator.integers(SEED, f"{name} first", (rows,), 0, config.n_routed_experts)
    further = generator.integers(SEED, f"{name} further", (rows,), 1, config.n_routed_experts)
    return Given(np.stack([first, (first + further) % config.n_routed_experts], -1), "I64")


def _gradients(name: str, ranks: int, microbatches: int, split: list[int]) -> Definition:
    id = f"schedule/gradients-{name}-{ranks}x{microbatches}"
    schedule = plan(name, ranks, microbatches)
    batch, length = _SHAPE
    rows = microbatches * batch
    return Definition(
        id,
        f"{RULES[name].title} on {ranks} ranks with {microbatches} microbatches: loss, and gradients by rank",
        _CLAUSES,
        "pipelined",
        _CONFIG,
        {
            **tokens(id, (microbatches, *_SHAPE), _CONFIG),
            "model.layers.1.mlp.gate.topk_idx": _experts(f"{id} 1", rows * length, _CONFIG),
            "model.layers.2.mlp.gate.topk_idx": _experts(f"{id} 2", rows * (length - 1), _CONFIG),
        },
        weights=gains(_CONFIG),
        arguments={
            "schedule": name,
            "ranks": ranks,
            "microbatches": microbatches,
            "chunks": RULES[name].chunks,
            "stages": schedule.stages,
            "split": split,
            "training": _TRAINING,
        },
        backward=True,
        forced=True,
        omits=_OMITS,
    )


GRADIENTS: Final = (_gradients("1f1b", 2, 3, [1, 1]), _gradients("dualpipe", 2, 4, [1, 1]))
