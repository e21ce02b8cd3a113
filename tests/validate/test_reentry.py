"""Every stage judged from the port's own earlier tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import BASE
from validate.diagnosed import port

from refimpl.cases.claims import CLAIMS
from refimpl.config.model import ModelConfig
from refimpl.layers.context import Op
from refimpl.validate.accounts import account
from refimpl.validate.findings import component, said
from refimpl.validate.output import Output, open_output
from refimpl.validate.reentry import OFF, RIGHT, Stage, stages
from refimpl.variants.mutants import MUTANTS
from refimpl.variants.variation import both, operations, unchanged


def judged(case: str, folder: Path, change=unchanged, claim: str = "fp32", without=()) -> dict[str, str]:
    """tensor -> right or off, without the path of the layer."""
    evidence = port(case, folder, change, claim, without)
    output = Output(evidence.folder.case, open_output(evidence.folder.case, evidence.output))
    found = stages(evidence.folder, output, CLAIMS[claim])
    return {stage.name.removeprefix("model.layers.3."): stage.verdict for stage in found}


def off(verdicts: dict[str, str]) -> set[str]:
    return {name for name, verdict in verdicts.items() if verdict == OFF}


@pytest.mark.parametrize("claim", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "case",
    [
        *(
            "attention/packed",
            "block/experts",
            "gate/v3",
            "head/loss",
            "mla/no-query-latent",
            "moe/v3-few-vjp",
        ),
        *("model/tiny-v3-forced", "norm/ranges", "rope/halves", "rope/tables-yarn"),
    ],
)
def test_every_stage_of_a_right_port_is_right(case: str, claim: str, tmp_path: Path) -> None:
    verdicts = judged(case, tmp_path, unchanged, claim)
    assert verdicts
    assert off(verdicts) == set()


def _norm(ops, leaf: str, factor: float):
    def forward(c, x, eps):
        y, saved = ops.norm.forward(c, x, eps)
        return (factor * y, saved) if c.leaf == leaf else (y, saved)

    return Op(forward, ops.norm.backward)


def _named(leaf: str, factor: float):
    """The norm of that name gives a multiple; its probe is what it gives."""

    def finished(s):
        return operations(norm=lambda ops: _norm(ops, leaf, factor))(s)

    return finished


@pytest.mark.parametrize("claim", ["fp32", "bf16"])
def test_what_comes_after_a_mistake_is_right_given_its_input(claim: str, tmp_path: Path) -> None:
    verdicts = judged("mla/no-query-latent", tmp_path, MUTANTS["Y07"].change, claim)
    assert off(verdicts) == {"self_attn.scores"}
    assert verdicts["self_attn.o_proj"] == RIGHT


@pytest.mark.parametrize("claim", ["fp32", "bf16"])
def test_two_mistakes_are_two_stages(claim: str, tmp_path: Path) -> None:
    change = both(MUTANTS["Y07"].change, MUTANTS["G13"].change)
    verdicts = judged("block/experts", tmp_path, change, claim)
    assert off(verdicts) == {"self_attn.scores", "mlp.gate.topk_weight"}


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_a_stage_is_judged_at_the_size_of_its_own_values(factor: float, tmp_path: Path) -> None:
    """The probe of the norm lacks the factor, so the stage that reads it is off, and those after are not."""
    verdicts = judged("mla/no-query-latent", tmp_path, _named("kv_a_layernorm", factor))
    assert off(verdicts) == {"self_attn.kv_b_proj"}


def test_the_selection_is_judged_from_the_ports_own_scores(tmp_path: Path) -> None:
    assert off(judged("gate/v3", tmp_path, MUTANTS["G05"].change)) == {"mlp.gate.topk_idx"}


def test_a_selection_of_one_expert_is_a_set_too(tmp_path: Path) -> None:
    bias = operations(choose=lambda ops: lambda c, scores: (ops.choose(c, scores) + 1) % scores.shape[-1])
    evidence = port("gate/single", tmp_path, bias)
    found = account(evidence, CLAIMS["fp32"])
    assert found.stage == "model.layers.3.mlp.gate.topk_idx"


def test_a_stage_without_its_tensor_belongs_to_the_next(tmp_path: Path) -> None:
    without = ["model.layers.3.self_attn.scores", "model.layers.3.self_attn.probs"]
    verdicts = judged("mla/no-query-latent", tmp_path, MUTANTS["Y07"].change, "fp32", without)
    assert off(verdicts) == {"self_attn.heads"}


# What is said of a stage.

CONFIG = ModelConfig.from_dict(BASE)
OURS = np.random.default_rng(3).standard_normal((12, 8))


def sentences(theirs: np.ndarray, length: int = 0, **others: np.ndarray) -> str:
    sigma = np.full(OURS.size, 1e-7)
    z = np.abs(theirs - OURS).reshape(-1) / sigma
    stage = Stage("m.y", OURS.shape, OFF, float(z.max()), OURS.reshape(-1), theirs.reshape(-1), z, sigma)
    return " ".join(said(stage, CONFIG, others, length))


def one(at: tuple[int, ...] | int | slice, by: float = 1.0) -> np.ndarray:
    changed = OURS.copy()
    changed[at] += by
    return changed


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        (1.75 * OURS, "It is 1.75 times what it should be."),
        (OURS / 2.5, "which is 1 over the routed scaling factor"),
        (-OURS, "The sign is flipped."),
        (0.0 * OURS, "It is zero."),
        (OURS[:, ::-1], "Its elements are reversed."),
        (np.roll(OURS, 4, -1), "the first half and the second half change places"),
        (np.concatenate([OURS[:, 0::2], OURS[:, 1::2]], -1), "even places first, then odd ones"),
        (np.roll(OURS, 1, 0), "with the rows shifted by one"),
        (OURS[:, [3, 1, 0, 2, 7, 5, 4, 6]], "Every row has the right values in another order."),
        (one((5, 3)), "Only one element is off, at (5, 3)."),
        (one(7), "Only row 7 of 12 is off."),
        (one(np.s_[:, 2:4]), "Only columns 2 to 3 of 8 are off."),
        (np.where(np.arange(12)[:, None] == 4, np.nan, OURS), "8 of 96 elements are NaN or infinity"),
    ],
)
def test_what_is_wrong_is_said_in_words(theirs: np.ndarray, expected: str) -> None:
    assert expected in sentences(theirs)


def test_a_missing_and_a_doubled_summand_are_named() -> None:
    part = np.random.default_rng(4).standard_normal(OURS.shape)
    assert "The summand x is missing." in sentences(OURS - part, x=part)
    assert "The summand x is added once too often." in sentences(OURS + part, x=part)


def test_a_position_from_which_on_it_is_wrong_is_named() -> None:
    changed = OURS.reshape(2, 6, 8).copy()
    changed[:, 4:] += np.random.default_rng(5).standard_normal((2, 2, 8))
    assert "Only positions from 4 on are off." in sentences(changed.reshape(12, 8), 6)


def test_noise_is_no_factor_and_no_order() -> None:
    text = sentences(OURS + np.random.default_rng(6).standard_normal(OURS.shape))
    assert text == ""


def test_components_have_names() -> None:
    assert component("model.layers.3.mlp.gate.topk_idx") == "the selection of experts"
    assert component("grad.x") == "the backward pass"
    assert component("model.layers.3.self_attn.kv_a_layernorm") == "RMSNorm"
