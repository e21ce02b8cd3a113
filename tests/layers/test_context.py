"""Names: of weights, of what is saved, and of the cotangents that a caller gives."""

from dataclasses import dataclass

import numpy as np
import pytest
from support import context, one_sentence

from refimpl.errors import Invalid
from refimpl.layers.context import Cotangents, child, tensor, tensors
from refimpl.numerics.arithmetic import Plain


@dataclass(frozen=True)
class Inner:
    hidden: int
    kept: Plain = tensor("kept")
    out: np.ndarray | None = tensor("")


@dataclass(frozen=True)
class Outer:
    first: Inner = child("a")
    flat: Inner | None = child("")
    scores: np.ndarray | None = tensor("scores", per_token=False)


def inner(value: float) -> Inner:
    return Inner(1, Plain(np.full(2, value)), np.full(3, value))


def test_everything_named_is_found_by_path_in_the_order_of_fields() -> None:
    found = list(tensors(Outer(inner(1.0), inner(2.0), np.zeros(4)), "m"))
    assert [(name, array.shape, per_token) for name, array, per_token in found] == [
        ("m.a.kept", (2,), True),
        ("m.a", (3,), True),
        ("m.kept", (2,), True),
        ("m", (3,), True),
        ("m.scores", (4,), False),
    ]


def test_what_was_not_saved_has_no_name() -> None:
    saved = Outer(Inner(1, Plain(np.zeros(2)), None), None, None)
    assert [name for name, _, _ in tensors(saved, "")] == ["a.kept"]


def test_a_submodule_s_path_and_names() -> None:
    c = context(path="").at("model", "layers", "3").at("mlp")
    assert (c.path, c.leaf, c.name("gate.weight")) == (
        "model.layers.3.mlp",
        "mlp",
        "model.layers.3.mlp.gate.weight",
    )
    assert context(path="").name("logits") == "logits"


def test_a_cotangent_is_added_where_its_tensor_s_gradient_is_formed_and_nowhere_else() -> None:
    given = Cotangents({"m": np.ones((1, 2, 3))})
    dy = np.full((2, 3), 5.0)
    assert given.join("n", dy) is dy
    assert given.join("m", dy).tolist() == [[6.0] * 3] * 2
    given.check_taken()


def test_a_cotangent_that_nothing_took_is_named() -> None:
    with pytest.raises(Invalid) as caught:
        Cotangents({"m": np.ones(1)}).check_taken()
    one_sentence(caught, "cotangent m fits no tensor", "modules' outputs and logits do")


@pytest.mark.parametrize("shape", [(3, 2), (6,), (1, 3, 2), (2, 3, 1)])
def test_a_cotangent_of_another_shape_is_not_reshaped(shape: tuple[int, ...]) -> None:
    with pytest.raises(Invalid) as caught:
        Cotangents({"m": np.ones(shape)}).join("m", np.ones((2, 3)))
    one_sentence(caught, f"cotangent m has shape {shape}", "(2, 3)")
