"""Mistakes around the layers."""

import numpy as np
from changed import differing, gradient_error, outputs
from support import TOLERANCE

from refimpl.variants.mutants.stack import MUTANTS

BY_ID = {mutant.id: mutant for mutant in MUTANTS}


def test_another_id_in_front_moves_all_the_others() -> None:
    right, found = (outputs("model/tiny-v3-noq-forced", m) for m in (lambda s: s, BY_ID["X01a"].change))
    name = "model.embed_tokens"
    assert np.array_equal(found[name][:, 1:], right[name][:, :-1])
    assert not np.array_equal(found[name][:, 0], right[name][:, 0])


def test_the_first_id_may_be_missing() -> None:
    right, found = (outputs("model/tiny-v3-noq-forced", m) for m in (lambda s: s, BY_ID["X01b"].change))
    name = "model.embed_tokens"
    assert np.array_equal(found[name][:, :-1], right[name][:, 1:])


def test_gradients_are_those_of_the_moved_ids() -> None:
    right, found = (outputs("embedding/vjp", m) for m in (lambda s: s, BY_ID["X01a"].change))
    name = "grad.model.embed_tokens.weight"
    assert np.allclose(found[name].sum(0), right[name].sum(0))  # every token's gradient arrives somewhere
    assert not np.allclose(found[name], right[name])


def test_the_first_layer_with_experts_has_only_the_shared_ones() -> None:
    right, found = (outputs("block/experts-vjp", m) for m in (lambda s: s, BY_ID["X02a"].change))
    layer = "model.layers.3"
    assert np.array_equal(found[f"{layer}.mlp"], right[f"{layer}.mlp.shared_experts"])
    assert differing("block/dense-vjp", BY_ID["X02a"].change) == []
    assert differing("moe/experts-vjp", BY_ID["X02a"].change) == []
    assert not found[f"grad.{layer}.mlp.gate.weight"].any()
    assert gradient_error("block/experts-vjp", BY_ID["X02a"].change) < TOLERANCE


def test_a_layer_of_the_wrong_kind_adds_nothing() -> None:
    layer = "model.layers.3"
    found = outputs("block/experts-vjp", BY_ID["X02b"].change)
    assert not found[f"grad.{layer}.mlp.shared_experts.down_proj.weight"].any()
    assert gradient_error("block/experts-vjp", BY_ID["X02b"].change) < TOLERANCE
    assert differing("block/experts-vjp", BY_ID["X02c"].change) == []
    assert differing("model/layers", BY_ID["X02c"].change) != []
