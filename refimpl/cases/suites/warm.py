"""What the suites of training share: a small V3 with MTP modules, its warm moments, its token ids.

From zero moments AdamW's step is the sign of the gradient, which says nothing near zero; so moments are warm:
first of both signs, second positive, of the size of a clipped gradient and its square.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Final

import numpy as np

from refimpl.cases.definition import SEED, Draw, Given, Integers, Source, shaped
from refimpl.checkpoint import names
from refimpl.config.model import ModelConfig
from refimpl.config.presets import preset
from refimpl.numerics import generator

SMALL: Final = shaped(  # one layer and one module, both with experts
    preset("tiny-v3-mtp"),
    num_hidden_layers=1,
    first_k_dense_replace=0,
    hidden_size=32,
    intermediate_size=32,
    moe_intermediate_size=16,
    n_routed_experts=4,
    n_group=2,
    topk_group=1,
    num_experts_per_tok=2,
    num_attention_heads=2,
    qk_rope_head_dim=16,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    v_head_dim=24,
    vocab_size=48,
)
LEAST: Final = shaped(  # fewer tensors
    SMALL,
    n_group=1,
    topk_group=1,
    q_lora_rank=None,
    qk_rope_head_dim=16,
)


def gains(config: ModelConfig, prefix: str = "", *but: str) -> dict[str, Source]:
    """Gains from 0.1 to 2 for every norm: far from 1, where norms before or after one another are alike."""
    return {
        name.removeprefix(prefix): Integers(spec.shape, 13, 256, 2.0**-7)
        for name, spec in learned(config, *but).items()
        if spec.role == "gain" and name.startswith(prefix)
    }


def learned(config: ModelConfig, *but: str) -> dict[str, names.ParameterSpec]:
    """Parameters without those whose names fit a pattern."""
    every = names.parameters(config).items()
    return {n: s for n, s in every if s.kind == "param" and not any(fnmatchcase(n, p) for p in but)}


def moments(specs: Mapping[str, names.ParameterSpec]) -> dict[str, Source]:
    """Inputs first.NAME and second.NAME."""
    made: dict[str, Source] = {}
    for name, spec in specs.items():
        made |= {f"first.{name}": first(spec.shape), f"second.{name}": second(spec.shape)}
    return made


def first(shape: tuple[int, ...]) -> Source:
    """Standard deviation 0.003, in float32."""
    return Draw(shape, 2.0**-15 / 2.0**4, 1, 2.0**-24, "F32")


def second(shape: tuple[int, ...]) -> Source:
    """From 8e-6 to 1.2e-4."""
    return Integers(shape, 16, 256, 2.0**-21)


def gradients(specs: Mapping[str, names.ParameterSpec]) -> dict[str, Source]:
    """Inputs grad.NAME, of standard deviation 0.05."""
    return {f"grad.{name}": Draw(spec.shape, 2.0**-11) for name, spec in specs.items()}


def tokens(name: str, shape: tuple[int, ...], config: ModelConfig, **more: Any) -> dict[str, Source]:
    """input_ids and targets of a shape (..., S): the next ids, none at the ends; more: segment_ids."""
    drawn = generator.integers(SEED, f"{name} ids", (*shape[:-1], shape[-1] + 1), 0, config.vocab_size)
    ids, targets = drawn[..., :-1], drawn[..., 1:].copy()
    if "segment_ids" in more:
        segments = np.broadcast_to(more["segment_ids"], shape)
        ends = np.ones(shape, bool)
        ends[..., :-1] = segments[..., 1:] != segments[..., :-1]
        targets[ends | (segments < 0)] = -100
    return {
        "input_ids": Given(ids, "I64"),
        "targets": Given(targets, "I64"),
        **{name: Given(np.broadcast_to(value, shape), "I64") for name, value in more.items()},
    }
