"""Weight gradients that wait: before W runs there is none, and W does them in their order."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
from support import bits, config, random_ids, random_weights

import refimpl
from refimpl.checkpoint.names import parameters
from refimpl.numerics.gradients import Gradients
from refimpl.numerics.precision import arithmetic

# Widths that no two tensors share, so that a size in bytes tells which tensor it is.
CFG = config(
    num_nextn_predict_layers=1,
    vocab_size=31,
    hidden_size=53,
    intermediate_size=67,
    moe_intermediate_size=43,
    q_lora_rank=37,
    kv_lora_rank=41,
    qk_nope_head_dim=12,
    v_head_dim=11,
    n_routed_experts=16,  # more than there are tokens
)
IDS = random_ids(CFG, (2, 5), 3)
TRAINING = refimpl.TrainingConfig(warmup_steps=0)
PRECISIONS = (
    "exact",
    "float32",
    "bf16",
    "hf-bf16",
    "v3-fp8",
    "v3-fp8@float32",
    "v3.1-ue8m0",
    "official-inference",
)


class Spent:
    """Counts the weight gradients that an arithmetic makes, and the products of codes for them."""

    def __init__(self, precision: str) -> None:
        self.ar, self.wgrads, self.products = arithmetic(precision), [], []
        wgrad, gemm = self.ar.wgrad, getattr(self.ar, "gemm", None)

        def counted(dy: Any, x: Any) -> Any:
            made = wgrad(dy, x)
            self.wgrads.append(made.shape)
            return made

        def product(site: str, a: Any, b: Any) -> Any:
            if site.endswith(".wgrad"):
                self.products.append(site)
            return gemm(site, a, b)

        self.ar.wgrad = counted
        if gemm is not None:
            self.ar.gemm = product


def begun(precision: str) -> tuple[Spent, Any, Any]:
    """A model that has run once, so that its weights are prepared, and a second forward pass."""
    spent = Spent(precision)
    model = refimpl.load((CFG, random_weights(CFG, 1)), spent.ar, training=TRAINING)
    model.backward(model.forward(IDS, labels=IDS, trace=()))
    spent.wgrads.clear(), spent.products.clear()
    return spent, model, model.forward(IDS, labels=IDS, trace=())


def linears() -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in parameters(CFG).items() if spec.role in ("linear", "router")}


def reachable(held: Any, seen: set[int]) -> Iterator[np.ndarray]:
    """Every array that a collector holds, in whatever form."""
    if id(held) in seen:
        return
    seen.add(id(held))
    if isinstance(held, np.ndarray):
        yield held
        yield from reachable(held.base, seen)
    elif isinstance(held, dict):
        for value in held.values():
            yield from reachable(value, seen)
    elif isinstance(held, list | tuple) or type(held).__name__ == "deque":
        for value in held:
            yield from reachable(value, seen)
    elif is_dataclass(held):
        for field in fields(held):
            yield from reachable(getattr(held, field.name), seen)
    elif type(held).__module__.startswith("refimpl.numerics") and hasattr(held, "__dict__"):
        yield from reachable(vars(held), seen)


def waiting(grads: Gradients) -> list[str]:
    """The names of what waits, oldest first."""
    names = {id(one.part): name for name, parts in grads._parts.items() for one in parts}
    return [names[id(part)] for part in grads.waiting]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_before_w_runs_no_weight_gradient_exists_and_none_was_spent(precision: str) -> None:
    spent, model, result = begun(precision)
    grads = model.gradients(deferred=True)
    shapes = set(linears().values()) | {shape[::-1] for shape in linears().values()}
    width = spent.ar.zeros((1,)).itemsize
    sizes = {shape[0] * shape[1] * width for shape in linears().values()}
    tracemalloc.start()
    try:
        model.backward(result, into=grads)
        new = {trace.size for trace in tracemalloc.take_snapshot().traces}
        assert not spent.wgrads
        assert not spent.products
        assert len(waiting(grads)) > 30
        held = list(reachable((grads.waiting, grads.held), set()))
        assert len(held) > 60
        embeddings = {(CFG.vocab_size, CFG.hidden_size)}  # done in B, as gains are
        assert not {array.shape for array in held} & (shapes - embeddings)
        assert not new & (sizes - {CFG.vocab_size * CFG.hidden_size * width})
        first = waiting(grads)[0]  # of the module's head, which is the model's: of the embedding's shape
        second = linears()[waiting(grads)[1]]
        assert first == "lm_head.weight"
        grads.run(2)
        if not spent.ar.order_free:
            assert second[0] * second[1] * width in {t.size for t in tracemalloc.take_snapshot().traces}
            assert second in {array.shape for array in reachable(grads.held, set())}
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_w_does_so_many_in_their_order_and_the_gradients_are_those_of_no_waiting(precision: str) -> None:
    spent, model, result = begun(precision)
    at_once = dict(model.backward(result))
    spent.wgrads.clear()
    grads = model.gradients(deferred=True)
    model.backward(model.forward(IDS, labels=IDS, trace=()), into=grads)
    order, done = waiting(grads), 0
    assert {grads.aliases.get(name, name) for name in order} <= set(linears())
    for number in (1, 2, 5):
        assert grads.run(number) == number
        done += number
        assert waiting(grads) == order[done:]
        if spent.ar.order_free:  # operands wait on, to be contracted once with those of other microbatches
            assert not spent.wgrads
        else:
            shapes = [linears()[grads.aliases.get(name, name)] for name in order[:done]]
            assert spent.wgrads == shapes
    assert grads.run() == len(order) - done
    assert grads.run() == grads.run(3) == 0
    later = grads.reduce()
    assert len(spent.wgrads) == (
        len(set(map(grads.aliases.get, order, order))) if spent.ar.order_free else len(order)
    )
    for name, gradient in later.items():
        assert bits(gradient) == bits(at_once[name]), name


def test_products_of_codes_are_done_where_w_runs() -> None:
    spent, model, result = begun("v3-fp8")
    grads = model.gradients(deferred=True)
    model.backward(result, into=grads)
    order = [name.removesuffix(".weight").rpartition(".")[2] for name in waiting(grads)]
    plain = ("head", "lm_head", "eh_proj", "gate")  # no codes
    for number in range(1, len(order) + 1):
        grads.run(1)
        wanted = [name for name in order[:number] if name not in plain]
        assert [site.split(".")[-2] for site in spent.products] == wanted
