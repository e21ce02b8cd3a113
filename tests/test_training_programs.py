"""The programs of what training adds."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support import EXACT, bits, config, random_ids, random_weights, same_bits

import refimpl
from refimpl.checkpoint import names
from refimpl.config.choices import Choices
from refimpl.programs import IDX, Setting, run
from refimpl.training import State, step
from refimpl.training.adamw import Powers

CFG = config(num_nextn_predict_layers=1)
TRAINING = {"warmup_steps": 0, "learning_rate": 0.01, "ema_decay": 0.5, "bias_update_speed": 0.125}
LEARNED = [name for name, spec in names.parameters(CFG).items() if spec.kind == "param"]
WEIGHTS = random_weights(CFG, 0)
GATE = "model.layers.1.mlp.gate"
STEPS = 3


def warm() -> dict[str, np.ndarray]:
    """Moments of a run that has gone on for a while, and its average."""
    rng = np.random.default_rng(1)
    found = {}
    for name in LEARNED:
        shape = WEIGHTS[name].shape
        found[f"first.{name}"] = 0.01 * rng.standard_normal(shape)
        found[f"second.{name}"] = 1e-3 * rng.random(shape)
        found[f"average.{name}"] = WEIGHTS[name] + 0.1
    return found


def microbatches() -> dict[str, np.ndarray]:
    ids = random_ids(CFG, (2, 2, 6), 2)
    mask = np.ones(ids.shape, int)
    mask[1, 0, 4:] = 0
    return {"input_ids": ids, "labels": ids, "mask": mask}


def setting(inputs: dict[str, np.ndarray], **more: Any) -> Setting:
    arguments = {"training": TRAINING, "steps": STEPS, "tokens": 40}
    return Setting(EXACT, CFG, Choices(), "", False, arguments, inputs, WEIGHTS, **{"routing": {}} | more)


@pytest.fixture(scope="module")
def stepped() -> dict[str, Any]:
    return run("step", setting(microbatches() | warm()))


def test_a_step_is_the_step(stepped: dict[str, Any]) -> None:
    given, powers = warm(), Powers()
    training = refimpl.TrainingConfig.from_dict(TRAINING)
    for _ in range(STEPS):
        powers = powers.next(training)

    def those(prefix: str) -> dict[str, np.ndarray]:
        return {name: given[f"{prefix}.{name}"] for name in LEARNED}

    kept = (those("first"), those("second"), those("average"))
    before = State(CFG, training, Choices(), EXACT, WEIGHTS, *kept, powers, STEPS, 40)
    stacked = microbatches()
    after, report = step(before, [{n: x[m] for n, x in stacked.items()} for m in range(2)])
    assert stepped["loss"].item() == report.loss
    assert stepped["gradient_norm"].item() == report.gradient_norm
    assert {n.removeprefix("loss."): x.item() for n, x in stepped.items() if n.startswith("loss.")} == dict(
        report.losses
    )
    assert stepped[f"{GATE}.load"].tolist() == report.loads[1].tolist()
    for prefix, arrays in (
        ("", after.weights),
        ("first.", after.first),
        ("second.", after.second),
        ("average.", after.average),
    ):
        same_bits({n: stepped[f"after.{prefix}{n}"] for n in arrays}, dict(arrays))


def test_gates_have_the_rows_that_exist(stepped: dict[str, Any]) -> None:
    assert stepped[f"{GATE}{IDX}"].shape == (24 - 2, 3)
    assert stepped[f"model.layers.2.mlp.gate{IDX}"].shape == (24 - 2 - 4, 3)
    for path in (GATE, "model.layers.2.mlp.gate"):
        counts = np.bincount(stepped[f"{path}{IDX}"].reshape(-1), minlength=8)
        assert counts.tolist() == stepped[f"{path}.load"].tolist()


def test_routing_that_is_given_is_what_the_step_chose(stepped: dict[str, Any]) -> None:
    routing = {n.removesuffix(IDX): x for n, x in stepped.items() if n.endswith(IDX)}
    forced = run("step", setting(microbatches() | warm(), routing=routing))
    same_bits(forced, stepped)
    other = {path: (idx + 1) % 8 for path, idx in routing.items()}
    moved = run("step", setting(microbatches() | warm(), routing=other))
    for path, idx in other.items():
        assert (moved[f"{path}{IDX}"] == idx).all()


def test_its_twin_with_the_gradients_given_makes_the_same_state(stepped: dict[str, Any]) -> None:
    model = refimpl.load((CFG, WEIGHTS), training=refimpl.TrainingConfig.from_dict(TRAINING))
    stacked = {name: x.reshape(4, 6) for name, x in microbatches().items()}
    gradients = model.backward(model.forward(**stacked))
    loads = {n: x for n, x in stepped.items() if n.endswith(".load")}
    given = warm() | loads | {f"grad.{n}": g for n, g in gradients.items()}
    twin = run("adamw", setting(given))
    same_bits(twin, {n: stepped[n] for n in twin})
    assert f"after.{GATE}.e_score_correction_bias" in twin


def test_a_rule_of_the_setting_is_the_step_s(stepped: dict[str, Any]) -> None:
    wrong = setting(microbatches() | warm())
    rules = replace(wrong.rules, bias=lambda ar, bias, counts, speed: bias - speed)
    found = run("step", replace(wrong, rules=rules))
    changed = [name for name in stepped if bits(found[name]) != bits(stepped[name])]
    assert changed
    assert all("e_score_correction_bias" in name for name in changed)


def test_the_bias_update_by_hand() -> None:
    given = {"bias": np.zeros(4), "counts": np.array([[3, 0, 1, 2], [1, 0, 3, 2]])}
    out = run("bias_update", setting(given))
    assert out["load"].tolist() == [4, 0, 4, 4]
    assert out["max_violation"].tolist() == [1 / 3]
    assert out["after.bias"].tolist() == [-0.125, 0.125, -0.125, -0.125]


def test_the_gradient_of_balance_losses_is_that_of_their_mean() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((2, 5, 8)) + 0.1
    idx = np.argsort(rng.random((2, 5, 8)), -1)[..., :3]
    segments = np.array([[0] * 5, [0, 0, 0, -1, -1]])
    inputs = {"scores": scores, "topk_idx": idx, "segment_ids": segments}
    weights = {"balance_loss_weight": 0.3, "expert_balance_weight": 0.2}
    base = replace(setting(inputs), backward=True, arguments={"training": weights})

    def total(x: np.ndarray) -> float:
        out = run("balance", replace(base, inputs={**inputs, "scores": x}))
        return float(0.3 * out["loss.sequence"].mean() + 0.2 * out["loss.expert"].mean())

    gradient = run("balance", base)["grad.scores"]
    direction, h = rng.standard_normal(scores.shape), 1e-5
    difference = (total(scores + h * direction) - total(scores - h * direction)) / (2 * h)
    assert (gradient * direction).sum() == pytest.approx(difference, rel=1e-7)
    assert not gradient[1, 3:].any()
