"""The routed experts over ranks compute what they compute in one place, forward and backward, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    EXACT,
    FLOAT64,
    TOLERANCE,
    bits,
    config,
    context,
    one_sentence,
    random_ids,
    random_weights,
    relative_error,
    same_bits,
    worst_gradient_error,
)

import refimpl
from refimpl.checkpoint.weights import DictWeights
from refimpl.config.choices import Choices
from refimpl.config.training import TrainingConfig
from refimpl.errors import Invalid
from refimpl.layers import experts
from refimpl.layers.context import Op, tensors
from refimpl.layers.ops import DEEPSEEK_V3
from refimpl.model import Model
from refimpl.numerics.arithmetic import Operand
from refimpl.numerics.emulated import Emulated
from refimpl.numerics.gradients import Gradients
from refimpl.numerics.precision import arithmetic
from refimpl.numerics.recipes import RECIPES
from refimpl.pipeline.expert_parallel.combine import BY_SLOTS, IN_STAGES
from refimpl.pipeline.expert_parallel.dispatch import dispatch
from refimpl.pipeline.expert_parallel.placement import Placement, by_rank, evenly
from refimpl.pipeline.expert_parallel.sharded import sharded

ARITHMETICS = ("exact", "float64", "float32", *RECIPES)
HIDDEN, WIDTH = 6, 4


def draw(count, tokens, chosen, seed=0, whole=False):
    """Experts' weights, tokens, routing weights, cotangent and choice; whole numbers where asked for."""
    rng = np.random.default_rng(seed)
    number = (lambda shape: rng.integers(-4, 5, shape) / 4) if whole else rng.standard_normal
    at = {"x": number((tokens, HIDDEN)), "weight": number((tokens, chosen)), "dy": number((tokens, HIDDEN))}
    for e in range(count):
        for name, shape in (("gate", (WIDTH, HIDDEN)), ("up", (WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH))):
            at[f"{e}.{name}_proj.weight"] = number(shape)
    idx = np.array([rng.permutation(count)[:chosen] for _ in range(tokens)], np.int64)
    return at, idx.reshape(tokens, chosen)


def layer(op, ar, at, idx, ops=DEEPSEEK_V3, deferred=False):
    """All that one run gives: the named tensors, the gradients of inputs and of every weight."""
    count = sum(name.endswith("up_proj.weight") for name in at)
    cfg = config(n_routed_experts=count, n_group=1, topk_group=1, num_experts_per_tok=1)
    weights = {name: w for name, w in at.items() if name.endswith("proj.weight")}
    c = replace(context(weights, ar=ar, cfg=cfg), ops=ops)
    y, saved = op.forward(c, ar.operand("experts.in", ar.array(at["x"])), idx, ar.array(at["weight"]))
    grads = Gradients(ar, deferred)
    dx, dweight = op.backward(c, ar.array(at["dy"]), saved, grads)
    out = {name: array for name, array, _ in tensors(saved, "m")}
    out |= {f"grad.{name}": g for name, g in grads.reduce().items()}
    return out | {"y": y, "grad.x": dx, "grad.weight": dweight}


WHOLE = Op(experts.forward, experts.backward)


def over(placement, **more):
    return sharded(DEEPSEEK_V3, placement, **more).experts


@st.composite
def cases(draw_):
    """A placement of any kind, ranks without experts included, and a routing of any size."""
    nodes, width = draw_(st.integers(1, 3)), draw_(st.integers(1, 3))
    count, tokens = draw_(st.integers(1, 6)), draw_(st.integers(1, 7))
    where = draw_(st.lists(st.integers(0, nodes * width - 1), min_size=count, max_size=count))
    placement = by_rank(where, nodes * width, nodes)
    return placement, count, tokens, draw_(st.integers(1, min(count, 3))), draw_(st.integers(0, 1000))


@pytest.mark.parametrize("name", ARITHMETICS)
@settings(max_examples=25)
@given(case=cases())
def test_every_tensor_and_gradient_has_the_bits_of_the_unsharded_layer(name, case) -> None:
    placement, count, tokens, chosen, seed = case
    at, idx = draw(count, tokens, chosen, seed)
    ar = arithmetic(name)
    same_bits(layer(over(placement), ar, at, idx), layer(WHOLE, ar, at, idx))


@pytest.mark.parametrize("order", ["one by one", "reversed", "tree", "split-K 8", "chunks", "fused", "cut"])
def test_every_order_of_sums_in_float32_is_that_of_the_unsharded_layer(order) -> None:
    at, idx = draw(6, 9, 3)
    ar, placement = Emulated(order), Placement(((5, 0), (), (4, 1, 2), (3,)), 2)
    same_bits(layer(over(placement), ar, at, idx), layer(WHOLE, ar, at, idx))


@settings(max_examples=25)
@given(case=cases(), deferred=st.booleans())
def test_tokens_may_live_anywhere_where_order_does_not_matter(case, deferred) -> None:
    placement, count, tokens, chosen, seed = case
    at, idx = draw(count, tokens, chosen, seed)
    source = np.random.default_rng(seed).integers(0, placement.ranks, tokens)
    op = over(placement, source=lambda n: source[:n])
    for ar in (EXACT, arithmetic("bf16")):
        same_bits(layer(op, ar, at, idx, deferred=deferred), layer(WHOLE, ar, at, idx))


def test_where_order_matters_tokens_that_live_anywhere_differ_by_roundings_only() -> None:
    at, idx = draw(4, 40, 2)
    op = over(evenly(4, 4, 2), source=lambda n: np.random.default_rng(2).integers(0, 4, n))
    one, other = layer(WHOLE, FLOAT64, at, idx), layer(op, FLOAT64, at, idx)
    assert max(relative_error(other[name], one[name]) for name in one) < 1e-14
    assert any(bits(other[name]) != bits(one[name]) for name in one)


@pytest.mark.parametrize("name", ARITHMETICS)
def test_more_ranks_than_tokens_and_experts_without_a_token(name) -> None:
    at, idx = draw(6, 2, 2)
    idx[:] = [[4, 0], [4, 1]]
    ar = arithmetic(name)
    found = layer(over(evenly(6, 6, 3)), ar, at, idx)
    same_bits(found, layer(WHOLE, ar, at, idx))
    reached = {key.split(".")[2] for key in found if key.endswith("proj.weight")}
    assert reached == {"0", "1", "4"}


def test_an_expert_sees_the_rows_of_its_tokens_and_a_rank_no_other_weight() -> None:
    """What each rank is given, watched at its door."""
    at, idx = draw(4, 5, 2)
    seen: dict[str, np.ndarray] = {}

    def watch(c, x):
        seen[c.path] = x.value
        expert = int(c.leaf)
        for other in range(4):
            same = placement.rank[other] == placement.rank[expert]
            name = f"m.{other}.up_proj.weight"
            for read in (c.parameters.array, c.parameters.weight):
                if same:
                    read(name)
                else:
                    with pytest.raises(AssertionError):
                        read(name)
        return DEEPSEEK_V3.mlp.forward(c, x)

    placement = Placement(((2, 0), (3, 1)), 2)
    ops = replace(DEEPSEEK_V3, mlp=Op(watch, DEEPSEEK_V3.mlp.backward))
    layer(over(placement), FLOAT64, at, idx, ops)
    assert set(seen) == {f"m.{e}" for e in np.unique(idx)}
    for e in np.unique(idx):
        assert (seen[f"m.{e}"] == at["x"][(idx == e).any(1)]).all()


def test_a_token_of_more_nodes_than_allowed_is_refused() -> None:
    at, idx = draw(4, 3, 2)
    idx[:] = [[0, 1], [2, 3], [1, 2]]
    layer(over(evenly(4, 2, 2), most_nodes=2), FLOAT64, at, idx)
    with pytest.raises(Invalid) as caught:
        layer(over(evenly(4, 2, 2), most_nodes=1), FLOAT64, at, idx)
    one_sentence(caught, "token 2", "2 nodes", "at most 1")


def test_a_placement_of_another_model_is_refused() -> None:
    at, idx = draw(4, 3, 2)
    with pytest.raises(Invalid) as caught:
        layer(over(evenly(6, 2, 2)), FLOAT64, at, idx)
    one_sentence(caught, "6 experts", "4")


# Combine in stages.


def test_stages_add_up_ranks_then_nodes_then_the_token() -> None:
    """In bf16, against loops that store every partial sum."""
    at, idx = draw(6, 5, 4, seed=3)
    placement, ar = Placement(((5, 0), (1,), (2, 3), (4,)), 2), arithmetic("bf16")
    found = layer(over(placement, combine=IN_STAGES), ar, at, idx)
    slots, weight = found["m.slots"], at["weight"]
    plan = dispatch(idx, placement)
    for t in range(5):
        total = []
        for node in range(2):
            ranks = []
            for rank in (2 * node, 2 * node + 1):
                own = np.flatnonzero(plan.target[t] == rank)
                if len(own):
                    ranks.append(ar.at("", EXACT.sum((slots[t] * weight[t][:, None])[own], 0)))
            if ranks:
                total.append(ar.at("", EXACT.sum(np.array(ranks), 0)))
        assert bits(found["y"][t]) == bits(ar.at("", EXACT.sum(np.array(total), 0)))


@settings(max_examples=25)
@given(case=cases())
def test_stages_and_slots_agree_exactly_where_sums_are_exact(case) -> None:
    placement, count, tokens, chosen, seed = case
    rng = np.random.default_rng(seed)
    slots = rng.integers(-8, 9, (tokens, chosen, HIDDEN)) / 4
    weight = rng.integers(-8, 9, (tokens, chosen)) / 4
    idx = np.array([rng.permutation(count)[:chosen] for _ in range(tokens)], np.int64).reshape(tokens, chosen)
    plan = dispatch(idx, placement)
    for ar in (EXACT, FLOAT64):
        one, other = BY_SLOTS.forward(ar, plan, slots, weight), IN_STAGES.forward(ar, plan, slots, weight)
        assert (one == other).all()
        assert (BY_SLOTS.backward(ar, plan, slots) == IN_STAGES.backward(ar, plan, slots)).all()


def test_in_float64_stages_differ_by_roundings_only() -> None:
    at, idx = draw(6, 7, 4)
    one = layer(WHOLE, FLOAT64, at, idx)
    other = layer(over(evenly(6, 3, 3), combine=IN_STAGES), FLOAT64, at, idx)
    assert set(one) == set(other)
    assert max(relative_error(other[name], one[name]) for name in one) < 1e-14
    assert bits(one["y"]) != bits(other["y"])


@pytest.mark.parametrize("combine", [BY_SLOTS, IN_STAGES])
def test_gradients_are_those_of_the_complex_step(combine) -> None:
    at, idx = draw(5, 6, 3)
    idx[idx == 3] = 4  # expert 3 has no token, and some tokens have expert 4 twice
    op = over(evenly(5, 5, 5), combine=combine)
    found = layer(op, FLOAT64, at, idx)
    dy = at.pop("dy")
    gradients = {name: found.get(f"grad.m.{name}", np.zeros_like(w)) for name, w in at.items()}
    gradients |= {"x": found["grad.x"], "weight": found["grad.weight"]}

    def forward(ar, values):
        return layer_forward(op, ar, values, idx)

    assert worst_gradient_error(forward, at, gradients, dy) <= TOLERANCE


def layer_forward(op, ar, at, idx):
    cfg = config(n_routed_experts=5, n_group=1, topk_group=1)
    weights = {name: w for name, w in at.items() if name.endswith("proj.weight")}
    return op.forward(context(weights, ar=ar, cfg=cfg), Operand(ar.array(at["x"])), idx, at["weight"])[0]


# A whole model.


@cache
def whole_model(precision, *placement):
    """Loss, tensors and gradients of a model with two layers of experts, MTP and balance losses."""
    cfg = config(num_hidden_layers=3, num_nextn_predict_layers=1)
    ops = DEEPSEEK_V3 if not placement else sharded(DEEPSEEK_V3, placement[0], most_nodes=2)
    weights = DictWeights(cfg, random_weights(cfg, 1))
    training = TrainingConfig(mtp_loss_weight=0.3, balance_loss_weight=0.01)
    model = Model(cfg, weights, arithmetic(precision), Choices(), ops, training)
    ids = random_ids(cfg, (2, 7), 0)
    mask = np.ones((2, 7), bool)
    mask[1, 5:] = False
    result = model.forward(ids, labels=ids, mask=mask)
    cotangents = {"model.layers.2.mlp.experts": np.ones((2, 7, cfg.hidden_size))}
    return {"loss": np.array(result.loss)} | dict(result.tensors), dict(model.backward(result, cotangents))


@pytest.mark.parametrize("precision", ARITHMETICS)
@pytest.mark.parametrize(
    "placement", [evenly(8, 8, 4), evenly(8, 4, 4), Placement(((7, 3, 6, 2), (), (1, 0), (5, 4)), 2)]
)
def test_a_whole_model_has_the_same_loss_tensors_and_gradients(precision, placement) -> None:
    """Groups are nodes in the first two, so that the gate's two groups are at most two nodes."""
    for found, expected in zip(whole_model(precision, placement), whole_model(precision), strict=True):
        same_bits(found, expected)


def test_a_model_of_256_experts_sends_no_token_to_more_than_four_nodes() -> None:
    cfg = config(
        n_routed_experts=256,
        n_group=8,
        topk_group=4,
        num_experts_per_tok=8,
        first_k_dense_replace=0,
        hidden_size=8,
    )
    weights = DictWeights(cfg, random_weights(cfg, 5))
    ids = random_ids(cfg, (1, 64), 5)
    plain = refimpl.load((cfg, weights), "float64").forward(ids)
    ops = sharded(DEEPSEEK_V3, evenly(256, 64, 8), most_nodes=4)
    spread = Model(cfg, weights, arithmetic("float64"), Choices(), ops).forward(ids)
    same_bits(dict(spread.tensors), dict(plain.tensors))
    for layer_index in range(2):
        idx = plain.tensors[f"model.layers.{layer_index}.mlp.gate.topk_idx"].reshape(-1, 8)
        assert dispatch(idx, evenly(256, 64, 8)).nodes_per_token.max() == 4
