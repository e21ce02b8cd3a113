"""SwiGLU."""

import mpmath
import numpy as np
import pytest
from support import EXACT, FLOAT64, TOLERANCE, bits, context, worst_gradient_error

from refimpl.layers import mlp
from refimpl.numerics.arithmetic import Operand
from refimpl.numerics.gradients import Gradients


def draw(seed: int = 0, tokens: int = 4, hidden: int = 5, width: int = 3):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((tokens, hidden)),
        "gate_proj.weight": rng.standard_normal((width, hidden)),
        "up_proj.weight": rng.standard_normal((width, hidden)),
        "down_proj.weight": rng.standard_normal((hidden, width)),
    }


def run(ar, at):
    return mlp.forward(context(at, ar=ar), Operand(ar.array(at["x"])))


def test_the_formula_by_hand() -> None:
    at = {
        "x": np.array([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]]),
        "gate_proj.weight": np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]),
        "up_proj.weight": np.array([[0.0, 2.0, 0.0], [1.0, 0.0, -1.0]]),
        "down_proj.weight": np.array([[1.0, 1.0], [0.0, -2.0], [3.0, 0.0]]),
    }
    y, saved = run(FLOAT64, at)

    def silu(g: float) -> float:
        return g / (1.0 + float(mpmath.exp(-g)))

    act = np.array([[silu(1.0) * 4, silu(1.0) * 2], [0.0, silu(3.0) * -2.5]])
    assert saved.act == pytest.approx(act, rel=1e-15)
    assert y == pytest.approx(np.array([[a + b, -2 * b, 3 * a] for a, b in act]), rel=1e-15)


def test_no_gate_no_output() -> None:
    at = draw()
    assert not run(EXACT, at | {"gate_proj.weight": at["gate_proj.weight"] * 0.0})[0].any()


def test_it_is_linear_in_up_and_down_bit_for_bit_for_powers_of_two() -> None:
    at = draw()
    y, _ = run(EXACT, at)
    for name in ("up_proj.weight", "down_proj.weight"):
        assert bits(run(EXACT, at | {name: at[name] * 4.0})[0]) == bits(y * 4.0)


def test_the_order_of_the_inner_width_changes_no_bit_in_exact() -> None:
    at, order = draw(width=6), np.random.default_rng(1).permutation(6)
    moved = at | {name: at[name][order] for name in ("gate_proj.weight", "up_proj.weight")}
    moved["down_proj.weight"] = at["down_proj.weight"][:, order]
    assert bits(run(EXACT, moved)[0]) == bits(run(EXACT, at)[0])


def test_tokens_are_independent_bit_for_bit_in_exact() -> None:
    at = draw()
    y, _ = run(EXACT, at)
    assert bits(run(EXACT, at | {"x": at["x"][2:3]})[0]) == bits(y[2:3])


@pytest.mark.parametrize("ar", [FLOAT64, EXACT])
def test_gates_far_out_neither_overflow_nor_lose_their_limits(ar) -> None:
    one = np.ones((1, 1))
    at = {f"{name}_proj.weight": one for name in ("gate", "up", "down")}
    y, saved = run(ar, at | {"x": np.array([[800.0], [-800.0], [40.0]])})
    assert y[0, 0] == 800.0 * 800.0
    assert y[1, 0] == 0.0
    assert y[2, 0] == pytest.approx(1600.0)
    grads = Gradients(ar)
    dx = mlp.backward(context(at, ar=ar), np.ones((3, 1)), saved, grads)
    assert dx[0, 0] == 1600.0  # of x^2
    assert dx[1, 0] == 0.0


def test_gradients_are_those_of_the_complex_step() -> None:
    at = draw()
    cotangent = np.random.default_rng(1).standard_normal((4, 5))
    grads = Gradients(FLOAT64)
    dx = mlp.backward(context(at), cotangent, run(FLOAT64, at)[1], grads)
    found = {name.removeprefix("m."): g for name, g in grads.reduce().items()} | {"x": dx}
    assert worst_gradient_error(lambda ar, v: run(ar, v)[0], at, found, cotangent) <= TOLERANCE


def test_a_cotangent_of_the_activation_joins() -> None:
    at, rng = draw(), np.random.default_rng(1)
    cotangent, more = rng.standard_normal((4, 5)), rng.standard_normal((4, 3))
    grads = Gradients(FLOAT64)
    c = context(at, cotangents={"m.act": more})
    dx = mlp.backward(c, cotangent, run(FLOAT64, at)[1], grads)
    found = {name.removeprefix("m."): g for name, g in grads.reduce().items()} | {"x": dx}

    def forward(ar, values):
        y, saved = run(ar, values)
        return np.concatenate([y, saved.act], -1)

    assert worst_gradient_error(forward, at, found, np.concatenate([cotangent, more], -1)) <= TOLERANCE
