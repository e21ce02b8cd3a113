"""What the suites share: configurations at the model's real geometry, and pairs of forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from refimpl.cases.definition import Definition, Draw, Source, shaped
from refimpl.config.model import ModelConfig
from refimpl.config.presets import preset

# Only layers, heads and the vocabulary shrink.
V3: Final = shaped(
    preset("deepseek-v3"),
    num_hidden_layers=4,
    num_attention_heads=2,
    vocab_size=64,
    num_nextn_predict_layers=0,
)
LAYER: Final = "model.layers.3"  # the first with experts


def pair(
    id: str,
    title: str,
    clauses: tuple[str, ...],
    component: str,
    config: ModelConfig,
    inputs: Mapping[str, Source],
    *,
    dy: Mapping[str, Source] | tuple[int, ...],
    backward_clauses: tuple[str, ...] = (),
    forced: bool = False,
    **more: Any,
) -> tuple[Definition, Definition]:
    """The forward case and its backward twin, with the same inputs and a cotangent that is not uniform.

    forced: the backward case has the routing as an input, so that it is about arithmetic only.
    """
    forward = Definition(id, title, clauses, component, config, inputs, **more)
    cotangents = {"dy": Draw(dy)} if isinstance(dy, tuple) else dy
    backward = replace(
        forward,
        id=f"{id}-vjp",
        title=f"{title}: backward{', with the routing given' if forced else ''}",
        clauses=(*clauses, *backward_clauses),
        inputs={**inputs, **cotangents},
        backward=True,
        forced=forced,
        twin=id,
    )
    return forward, backward
