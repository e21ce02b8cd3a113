"""Agreement with recorded models and gates of other people's code: see recordings/models/README.md.

Agreement to 1e-9 is max|a - b| <= 1e-9 max|b| per tensor, with exact zeros where the recording has them.
"""

from functools import cache

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import RECORDINGS, Given, config, read_json, relative_error

import refimpl
from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.layers import gate, rope
from refimpl.layers.context import Context
from refimpl.layers.ops import DEEPSEEK_V3
from refimpl.numerics.gradients import Gradients
from refimpl.numerics.precision import arithmetic

AGREEMENT = 1e-9
MODELS = sorted(p.parent.name for p in RECORDINGS.glob("[AC]*/config.json"))
GATES = [(p.parent.name, tag) for p in sorted(RECORDINGS.glob("*/sets.json")) for tag in read_json(p)]
OFFICIAL = [name for name in MODELS if not name.startswith("A03")]  # A03 is beyond DeepSeek's code
PRECISIONS = ("exact", "float64")


@cache
def recording(name: str) -> dict[str, np.ndarray]:
    return load_file(RECORDINGS / name / "io.safetensors")


@cache
def computed(name: str, precision: str, choices: str = "hf") -> tuple[refimpl.Result, dict[str, np.ndarray]]:
    model = refimpl.load(RECORDINGS / name, precision, choices)
    ids = recording(name)["input_ids"]
    result = model.forward(ids, labels=ids)
    return result, dict(model.backward(result))


def agrees(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    assert relative_error(found, expected) <= AGREEMENT, name
    assert not np.asarray(found)[expected == 0].any(), name


def by_expert(idx: np.ndarray, *values: np.ndarray) -> list[np.ndarray]:
    """Sorted by expert, since the order of the chosen is a convention: ids, then each of the values."""
    order = np.argsort(idx, -1)
    return [np.take_along_axis(x, order, -1) for x in (idx, *values)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
class TestModel:
    def test_logits_and_loss_agree(self, name: str, precision: str) -> None:
        result, _ = computed(name, precision)
        agrees("logits", result.logits, recording(name)["logits"])
        agrees("loss", np.array([result.loss]), recording(name)["loss"])

    def test_hidden_states_agree(self, name: str, precision: str) -> None:
        result, _ = computed(name, precision)
        agrees("final_norm", result.tensors["model.norm"], recording(name)["final_norm"])
        hidden = [key for key in recording(name) if key.startswith("hidden.") and key != "hidden.0"]
        assert len(hidden) > 1
        for key in hidden:
            layer = int(key.split(".")[1]) - 1
            agrees(key, result.tensors[f"model.layers.{layer}"], recording(name)[key])

    def test_routing_is_the_same_and_its_weights_agree(self, name: str, precision: str) -> None:
        result, _ = computed(name, precision)
        layers = [key.split(".")[1] for key in recording(name) if key.endswith("topk_indices")]
        assert layers
        for layer in layers:
            own = {
                leaf: result.tensors[f"model.layers.{layer}.mlp.gate.{leaf}"]
                for leaf in ("topk_idx", "topk_weight", "logits")
            }
            expected = {
                leaf: recording(name)[f"router.{layer}.{leaf}"]
                for leaf in ("topk_indices", "topk_weights", "logits")
            }
            ids, weights = by_expert(own["topk_idx"], own["topk_weight"])
            expected_ids, expected_weights = by_expert(expected["topk_indices"], expected["topk_weights"])
            assert (ids == expected_ids).all()
            agrees(f"weights of layer {layer}", weights, expected_weights)
            agrees(
                f"logits of layer {layer}",
                own["logits"].reshape(expected["logits"].shape),
                expected["logits"],
            )

    def test_all_gradients_agree(self, name: str, precision: str) -> None:
        _, gradients = computed(name, precision)
        recorded = {key[len("grad.") :]: g for key, g in recording(name).items() if key.startswith("grad.")}
        assert set(gradients) == set(recorded)
        for parameter, expected in recorded.items():
            agrees(parameter, gradients[parameter], expected)


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_choices_of_deepseeks_code_give_what_its_code_gave(name: str) -> None:
    result, _ = computed(name, "float64", "official")
    agrees("logits", result.logits, recording(name)["logits"])


@pytest.mark.parametrize("name", MODELS)
def test_rotary_frequencies_agree(name: str) -> None:
    cfg = ModelConfig.from_json(RECORDINGS / name / "config.json")
    agrees("inv_freq", rope.inverse_frequencies(cfg, Choices()), recording(name)["rope.inv_freq"])


@pytest.mark.parametrize("name", MODELS)
def test_the_config_of_transformers_5_is_the_same_config(name: str) -> None:
    here, there = (
        ModelConfig.from_json(RECORDINGS / name / file)
        for file in ("config.json", "config.transformers5.json")
    )
    assert here == there


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("name", "tag"), GATES)
def test_a_gate_agrees_forward_and_backward(name: str, tag: str, precision: str) -> None:
    given = {
        key.removeprefix(f"{tag}."): value
        for key, value in load_file(RECORDINGS / name / "io.safetensors").items()
        if key.startswith(f"{tag}.")
    }
    v2 = {"model_type": "deepseek_v2", "scoring_func": "softmax"} if "bias" not in given else {}
    width = given["x"].shape[-1]
    cfg = config(hidden_size=width, **v2, **read_json(RECORDINGS / name / "sets.json")[tag])
    ar = arithmetic(precision)
    weights = {"g.weight": given["weight"], "g.e_score_correction_bias": given.get("bias")}
    c = Context(ar, DEEPSEEK_V3, Given(weights, ar), cfg, Choices(), "g")

    idx, weight, saved = gate.forward(c, given["x"].reshape(-1, width))
    ids, ordered_weight = by_expert(idx, weight)
    expected_ids, expected_weights = by_expert(given["topk_indices"], given["topk_weights"])
    assert (ids == expected_ids).all()
    agrees("topk_weights", ordered_weight, expected_weights)
    if "logits" in given:
        agrees("logits", saved.logits, given["logits"])

    grads = Gradients(ar)
    dx = gate.backward(c, np.take_along_axis(given["upstream_dense"], idx, -1), saved, grads)
    if (
        tag == "k1_norm"
    ):  # a single normalised weight is the scale, whatever the score: its gradient is rounding
        assert np.abs(dx).max() < 1e-14
        assert np.abs(grads.reduce()["g.weight"]).max() < 1e-14
        return
    agrees("grad_x", dx.reshape(given["grad_x"].shape), given["grad_x"])
    agrees("grad_weight", grads.reduce()["g.weight"], given["grad_weight"])
