"""Bad input to load, forward and backward: one sentence with the thing, what was found, what is required."""

from typing import Any

import numpy as np
import pytest
from support import config, model, one_sentence, random_weights

import refimpl
from refimpl.losses import Divisors

CFG = config()
ONE = model(CFG)
IDS = [[1, 2, 3]]
FREE = ONE.forward(IDS)
CHOSEN = np.tile([0, 1, 2], (1, 3, 1))
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def refused(call: Any, *fragments: str, kind: type = refimpl.Invalid, builtin: type = ValueError) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert isinstance(caught.value, builtin)
    one_sentence(caught, *fragments)


INPUTS = [
    ([[1, 29]], "input_ids has 29 at (0, 1)", "[0, 29)", "vocabulary"),
    ([[1, -1]], "input_ids has -1 at (0, 1)", "[0, 29)", "vocabulary"),
    ([1, 2], "input_ids has shape (2,)", "(batch, sequence)"),
    ([[[1]]], "input_ids has shape (1, 1, 1)", "(batch, sequence)"),
    (np.zeros((0, 3), int), "input_ids has shape (0, 3)", "(batch, sequence)"),
    (np.zeros((2, 0), int), "input_ids has shape (2, 0)", "(batch, sequence)"),
    ([[1, 2], [3]], "input_ids is ragged", "same length"),
    ([[1.0, 2.0]], "input_ids has dtype float64", "integer"),
    ([["a", "b"]], "input_ids has dtype <U1", "integer"),
    ([[1, None]], "input_ids has dtype object", "integer"),
    ([[2**70]], "input_ids has dtype object", "integer"),
    (None, "input_ids has dtype object", "integer"),
    (np.zeros((1, 65), int), "position_ids has 64 at (0, 64)", "[0, 64)", "max_position_embeddings"),
]


@pytest.mark.parametrize("given", INPUTS, ids=[case[1] for case in INPUTS])
def test_ids(given: Any) -> None:
    ids, *fragments = given
    refused(lambda: ONE.forward(ids), *fragments)


ARGUMENTS = [
    ({"labels": IDS, "targets": IDS}, "labels and targets are both given", "only one"),
    ({"labels": [[1, 2]]}, "labels has shape (1, 2)", "(1, 3)"),
    ({"labels": [[1, 2, 99]]}, "labels has 99 at (0, 2)", "[0, 29)"),
    ({"labels": [[99, 2, 3]]}, "labels has 99 at (0, 0)", "[0, 29)"),
    ({"targets": [[1, -100, 29]]}, "targets has 29 at (0, 2)", "[0, 29)", "-100"),
    ({"targets": [[1, 2, -1]]}, "targets has -1 at (0, 2)", "[0, 29)"),
    ({"targets": [[-100] * 3]}, "number of targets is 0", "-100"),
    ({"labels": IDS, "mask": [[0, 0, 0]]}, "number of targets is 0", "padding"),
    ({"mask": [[1, 2, 1]]}, "mask has 2 at (0, 1)", "0 and 1"),
    ({"mask": [[1.0, 1.0, 1.0]]}, "mask has dtype float64", "integer"),
    ({"mask": [1, 1, 1]}, "mask has shape (3,)", "(1, 3)"),
    ({"segment_ids": [[0, -2, 0]]}, "segment_ids has -2", "-1 for padding"),
    ({"segment_ids": [[0]]}, "segment_ids has shape (1, 1)", "(1, 3)"),
    ({"position_ids": [[0, 1, 64]]}, "position_ids has 64 at (0, 2)", "max_position_embeddings"),
    ({"position_ids": [[0, 1, -1]]}, "position_ids has -1 at (0, 2)", "[0, 64)"),
    ({"labels": IDS, "divisors": Divisors((0,))}, "divisors.targets begins with 0", "at least 1"),
    ({"labels": IDS, "divisors": 3}, "divisors are 3", "Divisors"),
    ({"labels": IDS, "divisors": Divisors((3, 3))}, "divisors are Divisors(targets=(3, 3)", "1 depths"),
    ({"trace": [1]}, "trace is [1]", "patterns"),
    ({"routing": [CHOSEN]}, "routing is a list", "map layers"),
    ({"routing": {0: CHOSEN}}, "routing names layer 0", "no layer with experts"),
    ({"routing": {2: CHOSEN}}, "routing names layer 2", "no layer with experts"),
    ({"routing": {"1": CHOSEN}}, "routing names layer '1'", "no layer with experts"),
    ({"routing": {1: CHOSEN[..., :2]}}, "routing of layer 1 has shape (1, 3, 2)", "(1, 3, 3)"),
    ({"routing": {1: CHOSEN + 6}}, "routing of layer 1 has 8 at (0, 0, 2)", "[0, 8)"),
    ({"routing": {1: CHOSEN * 1.0}}, "routing of layer 1 has dtype float64", "integer"),
    ({"routing": {1: CHOSEN * 0}}, "routing of layer 1 names an expert twice", "once"),
    ({"routing": {1: (CHOSEN, [[1.0]])}}, "routing weights of layer 1 have shape (1, 1)", "(1, 3, 3)"),
    (
        {"routing": {1: (CHOSEN, CHOSEN + np.nan)}},
        "routing weights of layer 1 has nan at (0, 0, 0)",
        "finite",
    ),
    ({"routing": {1: (CHOSEN, [[[1], [1, 2]]])}}, "routing weights of layer 1 is ragged", "same length"),
]


@pytest.mark.parametrize("given", ARGUMENTS, ids=[case[1] for case in ARGUMENTS])
def test_other_arguments_of_forward(given: Any) -> None:
    arguments, *fragments = given
    refused(lambda: ONE.forward(IDS, **arguments), *fragments)


COTANGENTS = [
    (None, "neither a loss nor cotangents", "needs targets, labels or cotangents"),
    ({}, "neither a loss nor cotangents", "needs targets, labels or cotangents"),
    ([1], "cotangents are a list", "map names"),
    ({"nope": np.ones(3)}, "cotangent nope fits no tensor", "modules' outputs and logits do"),
    ({"model.layers.1.mlp.gate.topk_idx": np.ones((1, 3, 3))}, "topk_idx fits no tensor", "do."),
    ({"logits": np.ones((1, 3))}, "cotangent logits has shape (1, 3)", "(1, 3, 29)"),
    ({"logits": np.full((1, 3, 29), np.nan)}, "cotangent logits has nan at (0, 0, 0)", "finite"),
    ({"logits": "x"}, "cotangent logits has dtype <U1", "real numbers"),
    ({"logits": 1j * np.ones((1, 3, 29))}, "cotangent logits has dtype complex128", "real numbers"),
    ({"logits": [[1], [1, 2]]}, "cotangent logits is ragged", "same length"),
]


@pytest.mark.parametrize("given", COTANGENTS, ids=[case[1] for case in COTANGENTS])
def test_cotangents(given: Any) -> None:
    cotangents, *fragments = given
    refused(lambda: ONE.backward(FREE, cotangents), *fragments)


@pytest.mark.parametrize("shape", [(7, 7), (12, 3), (1, 12, 3), (36,)])
def test_a_cotangent_s_shape_is_checked_without_a_trace_too(shape: tuple[int, ...]) -> None:
    result = ONE.forward(IDS, trace=())
    found, required = f"cotangent model.norm has shape {shape}", "(3, 12)"
    refused(lambda: ONE.backward(result, {"model.norm": np.ones(shape)}), found, required)


def test_a_result_of_another_model() -> None:
    refused(
        lambda: model(config()).backward(FREE, {"logits": np.ones((1, 3, 29))}),
        "another model",
        "own forward",
    )


def weights(**changes: Any) -> dict[str, Any]:
    """The base weights with others; None takes one away."""
    mixed = random_weights(CFG, 1) | {name.replace("__", "."): w for name, w in changes.items()}
    return {name: w for name, w in mixed.items() if w is not None}


def spoiled(name: str, index: Any, value: float) -> np.ndarray:
    array = random_weights(CFG, 1)[name]
    array[index] = value
    return array


TENSORS = [
    ({"lm_head__weight": None}, refimpl.Missing, "tensor lm_head.weight", "missing", "must have"),
    ({BIAS: None}, refimpl.Missing, f"tensor {BIAS}", "missing"),
    ({"lm_head__weight": None, BIAS: None}, refimpl.Missing, "1 more", "missing"),
    (
        {"lm_head__weight": np.ones((12, 29))},
        refimpl.Invalid,
        "lm_head.weight has shape (12, 29)",
        "(29, 12)",
    ),
    ({BIAS: spoiled(BIAS, 3, np.nan)}, refimpl.Invalid, f"tensor {BIAS} has nan at 3", "finite"),
    ({BIAS: spoiled(BIAS, 0, np.inf)}, refimpl.Invalid, f"tensor {BIAS} has inf at 0", "finite"),
    (
        {"lm_head.weight": spoiled("lm_head.weight", (2, 1), -np.inf)},
        refimpl.Invalid,
        "tensor lm_head.weight has -inf at (2, 1)",
        "finite",
    ),
    ({"lm_head__weight": np.ones((29, 12), int)}, refimpl.Invalid, "stored as I64", "F32"),
    ({"lm_head__weight": np.ones((29, 12), bool)}, refimpl.Invalid, "stored as BOOL", "F32"),
]


@pytest.mark.parametrize("given", TENSORS, ids=[" ".join(case[2:4]) for case in TENSORS])
def test_tensors_are_refused_before_anything_is_computed(given: Any) -> None:
    changes, kind, *fragments = given
    builtin = KeyError if kind is refimpl.Missing else ValueError
    refused(lambda: refimpl.load((CFG, weights(**changes))), *fragments, kind=kind, builtin=builtin)


LOADS = [
    ({"precision": "bf17"}, refimpl.Invalid, "precision is 'bf17'", "exact, float64, float32"),
    ({"precision": None}, refimpl.Invalid, "precision is None", "a name, a recipe or an arithmetic"),
    ({"choices": "hff"}, refimpl.Invalid, 'choices are "hff"', "hf, official, report, megatron"),
    ({"choices": None}, refimpl.Invalid, "choices are null", "hf, official, report, megatron"),
    ({"training": {}}, refimpl.Invalid, "training is a dict", "TrainingConfig"),
]


@pytest.mark.parametrize("given", LOADS, ids=[case[2] for case in LOADS])
def test_arguments_of_load(given: Any) -> None:
    arguments, kind, *fragments = given
    refused(lambda: refimpl.load((CFG, weights()), **arguments), *fragments, kind=kind)


SOURCES = [
    ((CFG, {}, 1), refimpl.Invalid, "source is a tuple of 3", "(config, weights)"),
    (3, refimpl.Invalid, "source is a int", "a folder, a preset, or a pair"),
    ((3, {}), refimpl.Invalid, "the config is a int", "an object of named fields"),
    ("deepseek-v3.2", refimpl.Unsupported, "deepseek_v32", "not computed"),
]


@pytest.mark.parametrize("given", SOURCES, ids=[case[2] for case in SOURCES])
def test_sources(given: Any) -> None:
    source, kind, *fragments = given
    refused(lambda: refimpl.load(source), *fragments, kind=kind)


def test_a_folder_that_is_not_there(tmp_path: Any) -> None:
    path = tmp_path / "none"
    refused(lambda: refimpl.load(path), str(path), "folder", kind=refimpl.Unreadable, builtin=OSError)


def test_groups_too_small_for_the_chosen_group_score() -> None:
    cfg = config(num_experts_per_tok=1)  # megatron counts 1 // 2 = 0 of them
    refused(
        lambda: refimpl.load((cfg, random_weights(cfg, 1)), choices="megatron"),
        "group_score_size",
        "from 1 to",
    )


def test_nothing_is_computed_before_all_inputs_are_checked() -> None:
    """The weights of this model would overflow, and warnings are errors."""
    huge = {name: w * 1e300 for name, w in random_weights(CFG, 1).items()}
    one = refimpl.load((CFG, huge), "float64")
    refused(lambda: one.forward(IDS, labels=IDS, routing={1: CHOSEN * 0}), "names an expert twice")
    refused(lambda: one.forward(IDS, labels=[[1, 2, 29]]), "labels has 29")
    refused(lambda: one.forward(IDS, labels=IDS, divisors=Divisors((0,))), "divisors.targets begins with 0")
    refused(lambda: one.forward(IDS, targets=[[-100] * 3]), "number of targets is 0")
