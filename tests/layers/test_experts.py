"""The routed experts: gather, compute, combine."""

import numpy as np
import pytest
from support import EXACT, FLOAT64, TOLERANCE, bits, config, context, worst_gradient_error

from refimpl.layers import experts, mlp
from refimpl.numerics.arithmetic import Operand
from refimpl.numerics.gradients import Gradients

EXPERTS, HIDDEN, WIDTH, TOKENS, CHOSEN = 5, 4, 3, 6, 2


def draw(seed: int = 0):
    rng = np.random.default_rng(seed)
    at = {"x": rng.standard_normal((TOKENS, HIDDEN)), "weight": rng.standard_normal((TOKENS, CHOSEN))}
    for e in range(EXPERTS):
        at |= {
            f"{e}.{name}_proj.weight": rng.standard_normal(shape)
            for name, shape in (("gate", (WIDTH, HIDDEN)), ("up", (WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH)))
        }
    # expert 3 has no token, expert 4 has one
    idx = np.array([[0, 1], [2, 0], [1, 2], [0, 2], [1, 0], [4, 1]])
    return at, idx


def context_of(at, ar, **more):
    weights = {name: w for name, w in at.items() if name.endswith("proj.weight")}
    return context(weights, ar=ar, cfg=config(n_routed_experts=EXPERTS, n_group=1, topk_group=1), **more)


def run(ar, at, idx):
    return experts.forward(context_of(at, ar), Operand(ar.array(at["x"])), idx, ar.array(at["weight"]))


def gradients(at, idx, cotangent, ar=FLOAT64, **more):
    grads = Gradients(ar)
    dx, dweight = experts.backward(context_of(at, ar, **more), cotangent, run(ar, at, idx)[1], grads)
    return {name.removeprefix("m."): g for name, g in grads.reduce().items()} | {"x": dx, "weight": dweight}


def expert(ar, at, e, x):
    own = {k.removeprefix(f"{e}."): w for k, w in at.items() if k.startswith(f"{e}.")}
    return mlp.forward(context(own, ar=ar), Operand(x))[0]


def test_a_token_is_the_weighted_sum_of_its_experts() -> None:
    at, idx = draw()
    y, _ = run(FLOAT64, at, idx)
    for t in range(TOKENS):
        parts = [
            at["weight"][t, k] * expert(FLOAT64, at, idx[t, k], at["x"][t : t + 1])[0] for k in range(CHOSEN)
        ]
        assert y[t] == pytest.approx(sum(parts), rel=1e-13, abs=1e-14)


def test_two_tokens_of_three_dimensions_by_hand() -> None:
    """Experts that multiply by silu(1) and by silu(2), so that the numbers can be read."""
    eye = np.eye(3)
    at = {"x": np.array([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]), "weight": np.array([[2.0, 10.0], [1.0, -1.0]])}
    for e, factor in ((0, 1.0), (1, 5.0)):
        at |= {
            f"{e}.gate_proj.weight": eye,
            f"{e}.up_proj.weight": eye,
            f"{e}.down_proj.weight": factor * eye,
        }
    y, _ = run(FLOAT64, at, np.array([[0, 1], [1, 0]]))
    one, two = 1 / (1 + np.exp(-1.0)), 4 / (1 + np.exp(-2.0))
    assert y == pytest.approx(np.array([[2 * one + 10 * 5 * one] * 3, [5 * two - two] * 3]))


def test_groups_list_each_expert_s_tokens_in_order() -> None:
    _, idx = draw()
    groups = experts.group_tokens(idx)
    assert [g.expert for g in groups] == [0, 1, 2, 4]
    assert [g.tokens.tolist() for g in groups] == [[0, 1, 3, 4], [0, 2, 4, 5], [1, 2, 3], [5]]
    assert [g.slots.tolist() for g in groups] == [[0, 3, 6, 9], [1, 4, 8, 11], [2, 5, 7], [10]]


def test_the_order_of_a_token_s_experts_changes_no_bit_in_exact() -> None:
    at, idx = draw()
    flipped = at | {"weight": at["weight"][:, ::-1]}
    assert bits(run(EXACT, flipped, idx[:, ::-1])[0]) == bits(run(EXACT, at, idx)[0])


def test_the_order_in_which_experts_run_changes_no_bit() -> None:
    class Backwards(type(EXACT)):
        def each(self, call, items):
            return [call(item) for item in list(items)[::-1]][::-1]

    at, idx = draw()
    cotangent = np.random.default_rng(4).standard_normal((TOKENS, HIDDEN))
    assert bits(run(Backwards(), at, idx)[0]) == bits(run(EXACT, at, idx)[0])
    one, other = gradients(at, idx, cotangent, EXACT), gradients(at, idx, cotangent, Backwards())
    assert {k: bits(v) for k, v in one.items()} == {k: bits(v) for k, v in other.items()}


def test_renaming_experts_changes_no_bit() -> None:
    at, idx = draw()
    order = np.array([3, 0, 4, 1, 2])  # new name of each expert
    renamed = {k: v for k, v in at.items() if not k[0].isdigit()}
    for e in range(EXPERTS):
        renamed |= {f"{order[e]}.{k[2:]}": v for k, v in at.items() if k.startswith(f"{e}.")}
    assert bits(run(EXACT, renamed, order[idx])[0]) == bits(run(EXACT, at, idx)[0])


def test_tokens_are_independent_bit_for_bit_in_exact() -> None:
    at, idx = draw()
    order = np.array([4, 2, 0, 5, 1, 3])
    moved = at | {name: at[name][order] for name in ("x", "weight")}
    assert bits(run(EXACT, moved, idx[order])[0]) == bits(run(EXACT, at, idx)[0][order])
    one = at | {name: at[name][3:4] for name in ("x", "weight")}
    assert bits(run(EXACT, one, idx[3:4])[0]) == bits(run(EXACT, at, idx)[0][3:4])


def test_experts_without_tokens_receive_nothing() -> None:
    at, idx = draw()
    names = gradients(at, idx, np.ones((TOKENS, HIDDEN)))
    assert not [name for name in names if name.startswith("3.")]


def test_the_gradient_of_a_weight_is_the_product_with_the_expert_s_output() -> None:
    at, idx = draw()
    dy = np.random.default_rng(4).standard_normal((TOKENS, HIDDEN))
    dweight = gradients(at, idx, dy)["weight"]
    for t in range(TOKENS):
        for k in range(CHOSEN):
            out = expert(FLOAT64, at, idx[t, k], at["x"][t : t + 1])[0]
            assert dweight[t, k] == pytest.approx(dy[t] @ out, rel=1e-12)


def test_a_weight_of_zero_still_has_its_gradient() -> None:
    """It is <dy, E(x)>, formed before scaling and not by division."""
    at, idx = draw()
    dy = np.random.default_rng(4).standard_normal((TOKENS, HIDDEN))
    usual = gradients(at, idx, dy)["weight"]
    assert bits(gradients(at | {"weight": at["weight"] * 0.0}, idx, dy)["weight"]) == bits(usual)


def test_gradients_are_those_of_the_complex_step() -> None:
    at, idx = draw()
    cotangent = np.random.default_rng(1).standard_normal((TOKENS, HIDDEN))
    found = gradients(at, idx, cotangent)
    unreached = {name: np.zeros_like(w) for name, w in at.items() if name.startswith("3.")}

    def forward(ar, values):
        return run(ar, values, idx)[0]

    assert worst_gradient_error(forward, at, found | unreached, cotangent) <= TOLERANCE


def test_a_cotangent_of_the_routed_output_joins() -> None:
    at, idx = draw()
    dy, more = np.random.default_rng(1).integers(-4, 5, (2, TOKENS, HIDDEN)) * 1.0
    one, other = gradients(at, idx, dy, cotangents={"m": more}), gradients(at, idx, dy + more)
    assert {k: bits(v) for k, v in one.items()} == {k: bits(v) for k, v in other.items()}


def test_a_single_expert_per_token_works() -> None:
    at, idx = draw()
    single = at | {"weight": at["weight"][:, :1]}
    y, _ = run(FLOAT64, single, idx[:, :1])
    assert y[5] == pytest.approx(single["weight"][5, 0] * expert(FLOAT64, at, 4, at["x"][5:6])[0])
