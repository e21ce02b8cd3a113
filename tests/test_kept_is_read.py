"""Nothing is kept for backward that backward does not read: what is spoilt changes some gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from support import config, random_ids, random_weights

import refimpl
from refimpl.accounting.measured import _leaves
from refimpl.numerics.recipe import Recipe
from refimpl.numerics.recipes import RECIPES
from refimpl.numerics.scaled import Coded, Scaled

TRAINING = refimpl.TrainingConfig(warmup_steps=0, balance_loss_weight=0.1)
V3, BF16 = RECIPES["v3-fp8"], RECIPES["bf16"]


def arrays(saved: Any, path: str) -> Iterator[tuple[str, Any, np.ndarray]]:
    """Site, what is kept there, and its array; of codes their scales."""
    for site, value in _leaves(saved, path):
        if isinstance(value, Scaled):
            yield site, value, value.stored.scales if value.source is None else value.source
        elif isinstance(value, Coded):
            yield site, value, value.quantised.scales
        elif isinstance(value, np.ndarray):
            yield site, value, value
        else:
            array = getattr(value, "array", None)
            yield site, value, value.value if array is None else array


@contextmanager
def spoilt(value: Any, array: np.ndarray) -> Iterator[bool]:
    """Other values of the same kind, for a while; whether they are others."""
    held, base = array.copy(), array
    while isinstance(base.base, np.ndarray):
        base = base.base
    base.flags.writeable = array.flags.writeable = True
    integers = array.dtype.kind in "iu"
    array[...] = (array + 1) % (array.max() + 1) if integers else array * 1.5 + 1.0
    _forget(value)
    try:
        yield not np.array_equal(array, held)
    finally:
        array[...] = held
        _forget(value)


def _forget(value: Any) -> None:
    """What an earlier backward pass made of codes."""
    if isinstance(value, Scaled):
        vars(value).pop("along", None)


@pytest.mark.parametrize(
    ("recipe", "latent"),
    [
        (BF16, 7),
        (RECIPES["hf-bf16"], None),
        (V3, None),
        (V3.set(["attention.key.keep=plain", "q_b_proj.in.keep=codes", "mlp.in.keep=codes"]), 7),
    ],
    ids=lambda given: given.name if hasattr(given, "name") else str(given),
)
def test_every_kept_value_is_read(recipe: Recipe, latent: int | None) -> None:
    four = {"n_routed_experts": 4, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1}
    cfg = config(num_nextn_predict_layers=1, q_lora_rank=latent, **four)
    model = refimpl.load((cfg, random_weights(cfg, 1)), recipe.set(["carrier=float32"]), training=TRAINING)
    ids = random_ids(cfg, (2, 6), 3)
    chosen = (np.arange(12)[:, None] + np.arange(3)) % 4  # so no expert has padding alone
    routing = {layer: chosen.reshape(2, 6, 3) for layer in (1, 2)}
    result = model.forward(ids, labels=ids, routing=routing, trace=())
    passed = result._run
    right = dict(model.backward(result))
    for_their_own_sake = [saved.nll for saved in passed.losses]  # losses are what the forward pass is for
    for unit, one in zip(passed.units, passed.passed, strict=True):
        if unit.layer >= 0 and hasattr(one.block.mlp, "balanced"):
            for_their_own_sake += one.block.mlp.balanced.losses.values()
    kept = [(unit.path, one.saved) for unit, one in zip(passed.units, passed.passed, strict=True)]
    kept += [("", saved) for saved in passed.losses]
    tried, unread = 0, []
    for path, saved in kept:
        for site, value, array in arrays(saved, path):
            if any(array is loss for loss in for_their_own_sake):
                continue
            with spoilt(value, array) as others, np.errstate(all="ignore"):
                if not others:
                    continue
                tried += 1
                try:
                    wrong = dict(model.backward(result))
                except (IndexError, ValueError, AssertionError):
                    continue  # it was read, and made no sense
            if all(np.array_equal(right[name], wrong[name]) for name in right):
                unread.append((path, site, array.shape))
    assert tried > 60
    assert not unread
    again = dict(model.backward(result))
    assert all(np.array_equal(right[name], again[name]) for name in right), "all was put back"
