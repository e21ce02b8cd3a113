"""Agreement with recorded balance losses, MTP modules and training steps: recordings/models/README.md.

Agreement to 1e-9 is max|a - b| <= 1e-9 max|b| per tensor, as for the recorded models; counts are equal.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import RECORDINGS, config, context, read_json, relative_error

import refimpl
from refimpl import TrainingConfig
from refimpl.checkpoint.folder import open_folder
from refimpl.config.choices import Choices
from refimpl.layers import balance, gate
from refimpl.layers.balance import Balancing
from refimpl.numerics.precision import arithmetic
from refimpl.training import bias, loads

AGREEMENT = 1e-9
PRECISIONS = ("exact", "float64")
SETS = read_json(RECORDINGS / "E01_balance" / "balance.json")
ONLY_ADAMW = TrainingConfig(
    mtp_loss_weight=0.0,
    mtp_loss_weight_phases=(),
    balance_loss_weight=0.0,
    bias_update_speed=0.01,
    bias_update_speed_phases=(),
    warmup_steps=0,
    learning_rate=0.003,
    learning_rate_schedule="constant",
)


@cache
def recording(name: str, file: str = "io") -> dict[str, np.ndarray]:
    return load_file(RECORDINGS / name / f"{file}.safetensors")


def agrees(name: str, found: Any, expected: np.ndarray) -> None:
    assert relative_error(np.asarray(found).reshape(expected.shape), expected) <= AGREEMENT, name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tag", SETS)
class TestBalance:
    def context(self, tag: str, precision: str, how: str) -> tuple[Any, np.ndarray]:
        """A gate with a recorded set, and its scores (T, N)."""
        m, io = SETS[tag], recording("E01_balance")
        cfg = config(
            n_routed_experts=m["E"],
            num_experts_per_tok=m["K"],
            n_group=m["G"] or 1,
            topk_group=m["TG"] or 1,
            routed_scaling_factor=m["scale"],
        )
        ar = arithmetic(precision)
        weights = {"e_score_correction_bias": io[f"{tag}.bias"]}
        c = context(weights, cfg=cfg, ar=ar, choices=Choices(balance_counts=how))
        rows = np.repeat(np.arange(m["B"]), m["T"])
        given = Balancing(rows, m["B"], {"sequence": m["alpha"] / m["B"]})
        return replace(c, balancing=given), ar.sigmoid(ar.array(io[f"{tag}.logits"].reshape(-1, m["E"])))

    @pytest.mark.parametrize(("how", "key"), [("plain", "report"), ("selected", "selected_variant")])
    def test_the_loss_and_its_gradient_agree(self, tag: str, precision: str, how: str, key: str) -> None:
        io, alpha = recording("E01_balance"), SETS[tag]["alpha"]
        c, scores = self.context(tag, precision, how)
        losses, saved = balance.forward(c, scores, gate.choose(c, scores))
        agrees("f", saved.factors["sequence"], io[f"{tag}.{key}.f"])
        agrees("loss", alpha * losses["sequence"].mean(), io[f"{tag}.{key}.loss"])
        if key == "report":
            agrees("each", alpha * losses["sequence"], io[f"{tag}.report.loss_per_sequence"])
        dlogits = balance.backward(c, saved) * scores * (1 - scores)
        agrees("grad", dlogits, io[f"{tag}.{key}.grad"])

    def test_counts_and_the_moved_bias_are_the_same(self, tag: str, precision: str) -> None:
        io, m = recording("E01_balance"), SETS[tag]
        c, scores = self.context(tag, precision, "plain")
        idx = gate.choose(c, scores)
        expected = io[f"{tag}.routing.selected_indices_sorted_by_id"].reshape(idx.shape)
        assert (np.sort(idx, -1) == expected).all()
        counts = balance.counts(idx, np.repeat(np.arange(m["B"]), m["T"]), m["B"], m["E"])
        load = loads.add([{7: counts}])[7]
        assert (load == io[f"{tag}.tokens_per_expert"]).all()
        moved = bias.update(c.ar, c.ar.array(io[f"{tag}.bias"]), [counts], m["rate"])
        agrees("new_bias", moved, io[f"{tag}.new_bias"])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_module_agrees_in_losses_tensors_and_every_gradient(precision: str) -> None:
    io = recording("F01_mtp1")
    training = TrainingConfig(mtp_loss_weight=0.3, balance_loss_weight=0.0)
    model = refimpl.load(RECORDINGS / "F01_mtp1", precision, training=training)
    ids = io["input_ids"]
    result = model.forward(ids, labels=ids)
    agrees("total_loss", result.loss, io["total_loss"])
    agrees("main_loss", result.losses["main"], io["main_loss"])
    agrees("mtp1.loss", result.losses["mtp"], io["mtp1.loss"])
    agrees("main_logits", result.logits, io["main_logits"])
    path, last = "model.layers.2", ids.shape[1] - 1
    for theirs, ours in (
        ("eh_out", f"{path}.eh_proj"),
        ("block_out", path),
        ("normed", f"{path}.shared_head.norm"),
        ("logits", f"{path}.shared_head.head"),
    ):
        agrees(theirs, result.tensors[ours][:, :last], io[f"mtp1.{theirs}"])
    idx = result.tensors[f"{path}.mlp.gate.topk_idx"][:, :last]
    assert (np.sort(idx, -1) == np.sort(io["router.2.topk_indices"], -1)).all()
    gradients = model.backward(result)
    recorded = {key[len("grad.") :]: g for key, g in io.items() if key.startswith("grad.")}
    assert set(recorded) == set(gradients)
    for name, expected in recorded.items():
        agrees(name, gradients[name], expected)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("weights", "choices"),
    [
        ({"balance_loss_weight": 0.0, "expert_balance_weight": 0.001}, Choices()),
        ({"balance_loss_weight": 0.001}, Choices(balance_counts="selected")),
    ],
    ids=["expert", "sequence"],
)
@pytest.mark.parametrize("name", ["C01_v2_greedy", "C02_v2_group"])
def test_the_loss_of_deepseeks_gate_is_v2s_expert_loss_and_the_sequence_wise_one_of_the_chosen(
    name: str, weights: dict[str, float], choices: Choices, precision: str
) -> None:
    """Softmax scores sum to 1, so that dividing by their sum changes neither the loss nor the gradient of
    the logits."""
    io, aux = recording(name), recording(name, "aux")
    training = TrainingConfig(mtp_loss_weight=0.0, **weights)
    model = refimpl.load(RECORDINGS / name, precision, choices, training)
    result = model.forward(io["input_ids"], labels=io["input_ids"], trace=())
    part = "balance" if choices.balance_counts == "selected" else "expert_balance"
    layers = [aux[key] for key in aux if key.startswith("aux.") and key.split(".")[1].isdecimal()]
    agrees(part, 0.001 * result.losses[part], sum(layers))
    agrees("total", result.loss, aux["aux.total_loss"])
    gradients = model.backward(result)
    for parameter in gradients:
        expected = aux.get(f"aux.grad.{parameter}", io[f"grad.{parameter}"])
        agrees(parameter, gradients[parameter], expected)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_five_steps_agree(precision: str, microbatches: int) -> None:
    io = recording("I01_adamw")
    config, weights = open_folder(RECORDINGS / "I01_adamw")
    state = refimpl.training.start(config, weights, ONLY_ADAMW, precision=precision)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    for number, ids in enumerate(io["input_ids"]):
        batch = [{"input_ids": part, "labels": part} for part in np.array_split(ids, microbatches)]
        state, report = refimpl.training.step(state, batch)
        agrees("loss", report.losses["main"], io["ce_loss"][number])
        agrees("norm", report.gradient_norm, io["grad_norm_before_clip"][number])
        assert (report.loads[1] == io["tokens_per_expert"][number, 0]).all()
        agrees("bias", state.weights[name], io["bias_after_step"][number, 0])
        if number == 0:
            after(io, "after_step1.", state)
    after(io, "final.", state)


def after(io: dict[str, np.ndarray], prefix: str, state: refimpl.training.State) -> None:
    recorded = {key.removeprefix(prefix): w for key, w in io.items() if key.startswith(prefix)}
    assert set(recorded) <= set(state.weights)
    assert recorded
    if prefix == "final.":
        assert set(state.first) <= set(recorded)
    for name, expected in recorded.items():
        agrees(name, state.weights[name], expected)
