"""What a forward pass did keep, counted: a walk over what its layers saved.  SPEC RECIPE-14.

Operands and kept values count as they say (`nbytes`), other arrays with four bytes an element, and what
several fields share counts once.  A trace would be counted too: results are made with trace=().
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from refimpl.accounting.kept import LOSS, Unit
from refimpl.accounting.load import Load
from refimpl.accounting.sizes import PLAIN
from refimpl.numerics import sites
from refimpl.numerics.scaled import Coded, Scaled

_SITES = {  # the fields that a site is about: module and field -> site inside of the module
    "norm.x": "norm.in",
    "mla.rope_in": "rope.in",
    "attention.query": "attention.query",
    "attention.key": "attention.key",
    "attention.value": "attention.value",
    "attention.probs": "attention.probs",
    "mlp.gate": "swiglu.gate",
    "mlp.up": "swiglu.up",
    "gate.x": "gate.in",
    "experts.slots": "experts.slots",
    "experts.weight": "gate.topk_weight",
}
_IN_OWNERS = ("swiglu.gate", "swiglu.up")  # the name of the experts comes before


def measured(result: Any) -> list[Unit]:
    """result: what Model.forward gave with trace=()  ->  its units, in the order of the forward pass."""
    run, seen = result._run, set[Hashable]()
    found = []
    for unit, passed in zip(run.units, run.passed, strict=True):
        kept = counted(passed.saved, unit.path, seen)
        if passed.loss is not None:
            for site, count in counted(passed.loss, "", seen).items():
                kept[site] = kept.get(site, 0) + count
        found.append(Unit(unit.kind, unit.layer, kept))
    return found


def load_of(result: Any) -> Load:
    """How many tokens of which kind the pass had."""
    run = result._run
    depths = range(1 + max(unit.depth for unit in run.units))
    balanced = [run.given.tokens[k].balancing for k in depths]
    experts = {}
    for unit, passed in zip(run.units, run.passed, strict=True):
        gating = getattr(passed.block.mlp, "gating", None) if unit.layer >= 0 else None
        if gating is not None:
            chosen = gating.topk_idx.reshape(-1)
            experts[unit.layer] = np.bincount(chosen, minlength=gating.scores.shape[1]).tolist()
    targets = [len(loss.rows) for loss in run.losses] or [0 for _ in depths]
    size, length = result.logits.shape[:2]
    if balanced[0] is None:
        return Load(size, length, targets, [0] * len(targets), [0] * len(targets), (), experts)
    exist = [int(np.count_nonzero(given.sequence >= 0)) for given in balanced]
    sequences = [given.number for given in balanced]
    return Load(size, length, targets, exist, sequences, tuple(balanced[0].weights), experts)


def counted(saved: Any, path: str, seen: set[Hashable]) -> dict[str, int]:
    """Site -> bytes of one Saved at a checkpoint path; `seen` is what was counted before."""
    kept: dict[str, int] = {}
    for site, value in _leaves(saved, path):
        place = identity(value)
        count = 0 if place in seen else _bytes(value)
        seen.add(place)
        kept[site] = kept.get(site, 0) + count
    return kept


def identity(value: Any) -> Hashable:
    """Equal for values that are kept as one: the same codes, or the same elements in memory."""
    if isinstance(value, Scaled | Coded):
        return id(value)
    array = value
    if not isinstance(value, np.ndarray):
        array = getattr(value, "array", None)  # of what is kept; an operand's is its value
        if array is None:
            array = value.value
    if not isinstance(array, np.ndarray):
        return id(value)
    return array.__array_interface__["data"][0], array.shape, array.strides


def _bytes(value: Any) -> int:
    return value.size * PLAIN if isinstance(value, np.ndarray) else int(value.nbytes)


def _leaves(saved: Any, path: str) -> Iterator[tuple[str, Any]]:
    module = type(saved).__module__.rpartition(".")[2]
    for entry in fields(saved):
        value = getattr(saved, entry.name)
        if "child" in entry.metadata:
            if value is not None:
                yield from _leaves(value, ".".join(part for part in (path, entry.metadata["child"]) if part))
        elif entry.name == "experts":
            for group, own in zip(saved.groups, value, strict=True):
                yield from _leaves(own, f"{path}.{group.expert}")
        else:
            yield from ((_site(module, entry.name, path), leaf) for leaf in _arrays(value))


def _arrays(value: Any) -> Iterator[Any]:
    """The kept things in a field."""
    if isinstance(value, np.generic):
        return
    if hasattr(value, "nbytes"):
        if value.nbytes:
            yield value
    elif isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list):
        for item in value:
            yield from _arrays(item)
    elif is_dataclass(value):
        for entry in fields(value):
            yield from _arrays(getattr(value, entry.name))


def _site(module: str, field: str, path: str) -> str:
    if module == "linear":
        return sites.read_by(sites.linear(path))
    if module in ("loss", "balance"):
        return LOSS if module == "loss" else module
    name = _SITES.get(f"{module}.{field}", f"{module}.{field}")
    return sites.within(path, name) if name in _IN_OWNERS else name
