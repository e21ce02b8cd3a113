"""Mistakes of MTP, balancing and the step: derivatives of what is wrong by complex step, formulas by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from support import STEP, Complex

from refimpl import programs
from refimpl.cases.definition import Definition
from refimpl.cases.suites import suite
from refimpl.config.training import TrainingConfig
from refimpl.losses import balance_weights
from refimpl.numerics.floating import Floating
from refimpl.programs import IDX, Outputs, Setting
from refimpl.variants.mutants import balance, mtp, training
from refimpl.variants.mutants.mutant import Mutant
from refimpl.variants.variation import unchanged

TOLERANCE = 1e-9
MUTANTS: dict[str, Mutant] = {m.id: m for m in (*mtp.MUTANTS, *balance.MUTANTS, *training.MUTANTS)}
DEFINITIONS = {d.id: d for name in ("mtp", "balance", "training") for d in suite(name)}
IN_LOSS = ("L01a", "L01b", "L02", "L06", "L12", "L14")
IN_MODULE = ("T01", "T03", "T04", "T06", "T07", "T08", "T10")
IN_MODEL = ("L05", "T02", "T05", "T09a", "T09b")


@cache
def setting(id: str) -> Setting:
    """The data of a case, with the routing of float64 given where it is forced."""
    d = DEFINITIONS[id]
    assert isinstance(d, Definition)
    inputs = {name: source.made(f"{d.stream} {name}")[0] for name, source in d.inputs.items()}
    weights = {name: source.made(name)[0] for name, source in d.weight_sources().items()}
    s = Setting(
        Floating(np.float64), d.config, d.choices, d.path, d.backward, d.arguments, inputs, weights, {}
    )
    if not d.forced:
        return s
    found = programs.run(d.component, replace(s, backward=False))
    routing = {name.removesuffix(IDX): value for name, value in found.items() if name.endswith(IDX)}
    return replace(s, routing=routing)


def run(id: str, change=unchanged) -> Outputs:
    return programs.run(DEFINITIONS[id].component, change(setting(id)))


def value(id: str, s: Setting, out: Outputs) -> complex:
    """What the gradients are of."""
    if DEFINITIONS[id].component == "model":
        return complex(out["loss"][0])
    if DEFINITIONS[id].component == "mtp":
        exists = s.inputs["segment_ids"].reshape(-1) >= 0
        exists &= np.append(s.inputs["segment_ids"].reshape(-1)[1:], -1) == s.inputs["segment_ids"].reshape(
            -1
        )
        exists.reshape(s.inputs["segment_ids"].shape)[:, -1] = False
        pairs = (("dy", f"{s.path}.shared_head.head"), ("dnext", f"{s.path}.following"))
        flat = {name: s.inputs[name].reshape(len(exists), -1)[exists] for name, _ in pairs}
        return complex(sum((flat[name] * out[output]).sum() for name, output in pairs))
    weights = balance_weights(TrainingConfig(**s.arguments["training"]))
    return complex(sum(weights[n.removeprefix("loss.")] * x.mean() for n, x in out.items() if "loss." in n))


def error(id: str, change, found: Outputs, seed: int) -> float:
    """How far the derivative along a direction is from the complex step, relative to its terms."""
    rng, s = np.random.default_rng(seed), setting(id)
    known = {**s.inputs, **s.weights}
    names = [n for n in known if f"grad.{n}" in found and known[n].dtype.kind == "f"]
    along = {n: rng.standard_normal(known[n].shape) * np.abs(known[n]).mean() for n in names}
    terms = np.array([(found[f"grad.{n}"].reshape(-1) * along[n].reshape(-1)).sum() for n in names])
    moved = [
        {n: a + 1j * STEP * along[n] if n in along else a for n, a in arrays.items()}
        for arrays in (s.inputs, s.weights)
    ]
    there = change(replace(s, ar=Complex(), inputs=moved[0], weights=moved[1], backward=False))
    numeric = value(id, s, programs.run(DEFINITIONS[id].component, there)).imag / STEP
    return float(abs(numeric - terms.sum()) / np.abs(terms).max())


@pytest.mark.parametrize(
    ("case", "id"),
    [
        *[
            (case, id)
            for case in ("balance/padded-vjp", "balance/selected-vjp", "balance/faint-vjp")
            for id in IN_LOSS
        ],
        *[("mtp/packed-vjp", id) for id in (*IN_MODULE, "T05")],
        *[("mtp/model-forced-vjp", id) for id in (*IN_MODEL, "L01b", "L02")],
    ],
)
def test_the_backward_is_the_derivative_of_the_wrong_forward(case: str, id: str) -> None:
    assert error(case, MUTANTS[id].change, run(case, MUTANTS[id].change), 3) < TOLERANCE


@pytest.mark.parametrize(
    "case", ["balance/padded-vjp", "balance/v2-vjp", "mtp/packed-vjp", "mtp/model-forced-vjp"]
)
def test_the_right_backward_passes_and_a_wrong_one_does_not(case: str) -> None:
    right = run(case)
    assert error(case, unchanged, right, 5) < TOLERANCE
    name = max((n for n in right if n.startswith("grad.")), key=lambda n: float(np.abs(right[n]).max()))
    assert error(case, unchanged, right | {name: 1.0001 * right[name]}, 5) > TOLERANCE


@pytest.mark.parametrize("id", [id for id, mutant in MUTANTS.items() if not mutant.benign])
def test_every_mistake_changes_a_required_output_of_a_case(id: str) -> None:
    cases = (
        "balance/faint-vjp",
        "balance/padded-vjp",
        "balance/bias",
        "mtp/packed-vjp",
        "mtp/model-forced-vjp",
    )
    for case in (*cases, "training/adamw", "training/step-forced"):
        right, wrong = run(case), run(case, MUTANTS[id].change)
        required = [name for name in right if DEFINITIONS[case].is_required(name)]
        if any(name not in wrong or not _near(right[name], wrong[name]) for name in required):
            return
    pytest.fail("no case shows it")


@pytest.mark.parametrize("id", ["L11", "T07"])
def test_a_benign_one_changes_no_required_output(id: str) -> None:
    for case in ("balance/bias", "mtp/packed-vjp", "training/adamw", "training/step-forced"):
        right, wrong = run(case), run(case, MUTANTS[id].change)
        assert all(_near(right[n], wrong[n]) for n in right if DEFINITIONS[case].is_required(n)), case


def _near(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max() <= 1e-11 * np.abs(a).max())


def test_l03_has_the_gradient_divided_by_the_sequences_once_more() -> None:
    right, wrong = run("balance/padded-vjp"), run("balance/padded-vjp", MUTANTS["L03"].change)
    assert np.array_equal(wrong["loss.sequence"], right["loss.sequence"])
    assert wrong["grad.scores"] == pytest.approx(right["grad.scores"] / 3, rel=1e-12, abs=1e-20)


def test_l02_gives_every_sequence_the_loss_of_the_batch() -> None:
    """Both by hand: sequences that prefer different experts look balanced together."""
    s, right = setting("balance/sequences"), run("balance/sequences")
    wrong = run("balance/sequences", MUTANTS["L02"].change)["loss.sequence"]
    scores = s.inputs["scores"].reshape(-1, 32)
    shares = scores / scores.sum(-1, keepdims=True)
    best = np.argsort(-scores, -1)[:, :4]
    f = 32 / (4 * len(scores)) * np.bincount(best.reshape(-1), minlength=32)
    assert wrong == pytest.approx(np.full(2, (f * shares.mean(0)).sum()), rel=1e-12)
    assert right["loss.sequence"].min() > 1.1 * wrong[0]


def test_the_bias_by_hand() -> None:
    """Signs of 12 - load: of the whole batch, after each microbatch, and of the first rank."""
    s = setting("balance/bias")
    counts, old = s.inputs["counts"], s.inputs["bias"]

    def moved(id: str | None) -> np.ndarray:
        change = MUTANTS[id].change if id else unchanged
        return np.rint((run("balance/bias", change)["after.bias"] - old) / 0.001)

    def sign(rows: np.ndarray) -> np.ndarray:
        return np.sign(rows.sum() - 8 * rows.sum(0))

    assert counts.sum(0).tolist() == [11, 13, 11, 11, 26, 0, 12, 12]
    assert moved(None).tolist() == [1, -1, 1, 1, -1, 1, 0, 0]
    assert np.array_equal(moved("L07"), sum(sign(row[None]) for row in counts))
    assert np.array_equal(moved("L09"), sign(counts[:2]))
    assert not moved("L10").any()
    assert run("balance/bias", MUTANTS["L08"].change)["load"].tolist() == [22, 26, 22, 22, 52, 0, 24, 24]


def test_l13_decays_the_bias_and_t11_leaves_that_of_the_module() -> None:
    s, right = setting("training/adamw"), run("training/adamw")
    gates = [name for name in s.weights if name.endswith("bias")]
    wrong = run("training/adamw", MUTANTS["L13"].change)
    for name in gates:  # the rate is 13 / 20 of 0.01, the decay 0.1
        lost = right[f"after.{name}"] - wrong[f"after.{name}"]
        assert lost == pytest.approx(0.01 * 13 / 20 * 0.1 * s.weights[name], rel=1e-9)
    wrong = run("training/adamw", MUTANTS["T11"].change)
    trunk, module = (f"after.{name}.centred" for name in gates)
    assert np.array_equal(wrong[trunk], right[trunk])
    old = s.weights[gates[1]]
    assert wrong[module] == pytest.approx(old - old.mean(), rel=1e-12)
    assert np.abs(wrong[module] - right[module]).max() > 5e-4


def test_t09_weighs_the_modules_otherwise() -> None:
    """Two modules: twice their part; and their sums over the count of the main model's targets."""
    case = "mtp/model-forced-vjp"
    right, double, main = run(case), *(run(case, MUTANTS[id].change) for id in ("T09a", "T09b"))
    assert double["loss"] - right["loss"] == pytest.approx(0.3 * right["loss.mtp"], rel=1e-12)
    assert main["loss.mtp"] < 0.9 * right["loss.mtp"]
    assert main["loss.main"] == right["loss.main"]
