"""The loop of `refimpl train`, without printing: batches, steps, the curve, checkpoints, resume."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.config.rules import show
from refimpl.config.training import TrainingConfig
from refimpl.errors import Invalid
from refimpl.numerics.arithmetic import Arithmetic
from refimpl.numerics.precision import arithmetic
from refimpl.numerics.recipe import Recipe
from refimpl.training import curve, files
from refimpl.training.corpus import VOCABULARY, Corpus
from refimpl.training.initialise import initialise
from refimpl.training.schedules import batch_sequences
from refimpl.training.state import State, start
from refimpl.training.stepping import Report, step

SMALL: Final[Mapping[str, Any]] = {  # a V3 that trains on one core: 16 experts in 4 groups, one MTP module
    "model_type": "deepseek_v3",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 192,
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_attention_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 1,
}
SHORT: Final[Mapping[str, Any]] = {  # V3's training with the rate and the sizes of a small model
    "learning_rate": 3e-3,
    "learning_rate_schedule": "constant",
    "warmup_steps": 20,
    "initializer_std": 0.02,
    "sequence_length": 128,
    "batch_sequences": 8,
    "final_batch_sequences": 8,
    "batch_ramp_shape": "none",
    "bias_update_speed": 0.01,
}


@dataclass(frozen=True)
class Plan:
    """What a run is, besides the state that it has reached."""

    text: Path
    config: ModelConfig
    training: TrainingConfig
    choices: Choices
    precision: str | Recipe
    seed: int
    microbatches: int

    def remembered(self, corpus: Corpus) -> dict[str, Any]:
        """What a checkpoint keeps beside the state."""
        return {"seed": self.seed, "microbatches": self.microbatches, "text_sha256": corpus.sha256}


def begin(plan: Plan, folder: Path, resume: bool) -> tuple[State, Corpus]:
    """The state to go on from.  Raises Invalid for a text that is too short, a folder that has a checkpoint
    and is not resumed, and a checkpoint of another run; and as `files.load`."""
    if plan.config.vocab_size < VOCABULARY:
        raise Invalid(f"vocab_size is {plan.config.vocab_size}, but byte-level ids need {VOCABULARY}.")
    if plan.training.sequence_length > plan.config.max_position_embeddings:
        raise Invalid(
            f"sequence_length is {plan.training.sequence_length}, but max_position_embeddings allows "
            f"{plan.config.max_position_embeddings}."
        )
    corpus = Corpus.read(plan.text, plan.training.sequence_length)
    if not resume:
        if (folder / files.STATE).exists():
            raise Invalid(f"{folder} has a checkpoint, but a new run needs a folder without (or a resume).")
        weights = initialise(plan.config, plan.training, plan.seed)
        return start(plan.config, weights, plan.training, plan.choices, plan.precision), corpus
    state, remembered = files.load(folder)
    _same(folder, "config field", state.config.to_dict(), plan.config.to_dict())
    _same(folder, "training field", state.training.to_dict(), plan.training.to_dict())
    _same(folder, "choice", state.choices.to_dict(), plan.choices.to_dict())
    _same(folder, "", remembered, plan.remembered(corpus))
    asked = arithmetic(plan.precision)
    _same(folder, "", {"precision": state.precision}, {"precision": asked.name})
    _same(folder, f"recipe {asked.name},", _meaning(state.ar), _meaning(asked))
    return state, corpus


def train(
    plan: Plan, state: State, corpus: Corpus, steps: int, every: int, folder: Path, csv: Path
) -> Iterator[tuple[State, Report, float]]:
    """Steps until `steps` are done, each handed out with its seconds; a checkpoint every so many steps and
    at the end, and a row of the curve for each.  Raises as `step`, `files.save` and `Curve`."""
    kept = curve.Curve(csv, state.steps)
    try:
        while state.steps < steps:
            begun = time.perf_counter()
            state, report = step(state, _batch(plan, corpus, state))
            seconds = time.perf_counter() - begun
            kept.add(curve.row(report, state.tokens, seconds))
            if state.steps % every == 0 or state.steps == steps:
                files.save(state, folder, plan.remembered(corpus))
            yield state, report, seconds
    finally:
        kept.close()


def _batch(plan: Plan, corpus: Corpus, state: State) -> list[dict[str, Any]]:
    """The microbatches of the next step: rows in order, as evenly as they can be divided."""
    number = batch_sequences(plan.training, state.tokens)
    if number < plan.microbatches:
        raise Invalid(f"microbatches are {plan.microbatches}, but a step has only {number} sequences.")
    ids, targets = corpus.batch(plan.seed, state.steps, number, plan.training.sequence_length)
    parts = (np.array_split(x, plan.microbatches) for x in (ids, targets))
    return [{"input_ids": a, "targets": b} for a, b in zip(*parts, strict=True)]


def _meaning(ar: Arithmetic) -> Mapping[str, Any]:
    """What a recipe decides; nothing for an arithmetic whose name says all."""
    recipe: Recipe | None = getattr(ar, "recipe", None)
    return {} if recipe is None else recipe.meaning


def _same(folder: Path, what: str, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    for name in {**found, **asked}:
        if found.get(name) != asked.get(name):
            raise Invalid(
                f"{f'{what} {name}'.strip()} is {show(found.get(name))} in the checkpoint {folder}, but the "
                f"run to be resumed must have the same and has {show(asked.get(name))}."
            )
