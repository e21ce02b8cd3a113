"""Programs of what training adds: MTP modules, balancing, the optimiser, the step.  SPEC CASE-7, STEP-2.

Arguments: `training` (fields of TrainingConfig), `steps` and `tokens` (seen before the step), `depth` (of an
MTP module).  Tensors of gates and of MTP modules have the rows of the positions that exist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from refimpl.checkpoint import names
from refimpl.checkpoint.names import BIAS
from refimpl.checkpoint.weights import DictWeights
from refimpl.layers.batch import Batch, Inputs, Tokens, allowed, positions
from refimpl.layers.context import tensors
from refimpl.layers.mtp import shifted
from refimpl.losses import balancing, counted, total
from refimpl.model import Model
from refimpl.numerics.arithmetic import Arithmetic, Array
from refimpl.numerics.gradients import Gradients
from refimpl.setting import IDX, Outputs, Setting
from refimpl.training import loads, stepping
from refimpl.training.adamw import Powers
from refimpl.training.state import State

_STACKED = ("input_ids", "targets", "labels", "mask", "segment_ids", "position_ids")
_AFTER = "after."
FIRST, SECOND, AVERAGE = (
    "first.",
    "second.",
    "average.",
)  # moments and average of a parameter, among the inputs
LOAD = ".load"  # of a gate's path
CENTRED = ".centred"
_AT_EXISTING = (".gate.scores", IDX, ".gate.topk_weight", ".shared_head.head")


def mtp(s: Setting) -> Outputs:
    """Module `depth` on hidden states x (B, S, D) and the main model's input_ids (B, S); with gradients also
    dy (B, S, V), and dnext (B, S, D) of what the next module reads."""
    main = _inputs(s, s.inputs["input_ids"])
    given = right = main
    for _ in range(s.arguments.get("depth", 1)):
        given, right = s.ops.shifted(given, s.choices), shifted(right, s.choices)
    exists = right.exists.reshape(-1)
    c = replace(s, routing={path: _spread(idx, exists) for path, idx in s.routing.items()}).context
    size, length = given.ids.shape
    batch = Batch(size, length, c.ops.tables(c, given.positions.reshape(-1)), allowed(given.segments))
    first = ((positions(main.segments) == 0) & main.exists).reshape(-1)
    tokens = Tokens(given.ids.reshape(-1), first, given.exists.reshape(-1), batch)
    x = s.array("x")
    following, _, saved = c.ops.mtp.forward(c, x.reshape(-1, x.shape[-1]), tokens, False)
    out: Outputs = {n: y[exists] if by_token else y for n, y, by_token in tensors(saved, s.path)}
    out[f"{s.path}.following"] = following[exists]
    if s.backward:
        grads = Gradients(s.ar, aliases=names.aliases(s.config))
        dy, dnext = (_cotangent(s, name, exists) for name in ("dy", "dnext"))
        dx = c.ops.mtp.backward(c, dy, dnext, saved, tokens, False, grads)
        out |= {f"grad.{name}": gradient for name, gradient in sorted(grads.reduce().items())}
        out["grad.x"] = dx.reshape(x.shape)
    return out


def balance(s: Setting) -> Outputs:
    """The balance losses of scores (B, S, N) with the chosen topk_idx (B, S, K); the gradient is that of
    their weighted mean over the sequences."""
    scores, idx = s.array("scores"), s.inputs["topk_idx"]
    given = _inputs(s, np.zeros(idx.shape[:2], np.int64))
    number = counted([given], s.choices).sequences[0]
    ready = balancing(given, s.choices, s.rules.at(s.training, _tokens(s)), number)
    c, flat = replace(s.context, balancing=ready), scores.reshape(-1, scores.shape[-1])
    losses, saved = c.ops.balance.forward(c, flat, idx.reshape(-1, idx.shape[-1]))
    out: Outputs = {f"loss.{kind}": value for kind, value in losses.items()}
    if s.backward:
        out["grad.scores"] = c.ops.balance.backward(c, saved).reshape(scores.shape)
    return out


def bias_update(s: Setting) -> Outputs:
    """A selection bias (N,) after a step whose microbatches have counts (M, N)."""
    counts = [row[None] for row in s.inputs["counts"]]
    load = s.rules.loads([{0: one} for one in counts])[0]
    speed = s.rules.at(s.training, _tokens(s)).bias_update_speed
    moved = s.rules.bias(s.ar, s.array("bias"), counts, speed)
    even = {f"{_AFTER}bias": moved, f"{_AFTER}bias{CENTRED}": _centred(s.ar, moved)}
    return {"load": load, "max_violation": np.array([loads.max_violation(load)])} | even


def adamw(s: Setting) -> Outputs:
    """Clipping, AdamW and the average of all weights, with their gradients `grad.NAME` and moments given;
    and the selection biases, where the gates' loads are given."""
    paths = [name for name in s.inputs if name.endswith(LOAD)]
    counts = [{int(path.split(".")[2]): s.inputs[path][None] for path in paths}] if paths else []
    gradients = {n.removeprefix("grad."): s.array(n) for n in s.inputs if n.startswith("grad.")}
    after, norm = _updated(s, _state(s), gradients, counts)
    return {"gradient_norm": norm} | _after(after)


def step(s: Setting) -> Outputs:
    """A whole step.  input_ids, targets or labels, mask, segment_ids, position_ids are (M, B, S): M
    microbatches."""
    state, out = _step(s, _state(s), range(len(s.inputs["input_ids"])))
    return out | _after(state)


def chain(s: Setting) -> Outputs:
    """Steps that each begin with what the one before has left.  Inputs are (steps, M, B, S).  Losses and
    norms are (steps,), loads (steps, N); the rows of a gate are those of all steps, one after the other."""
    size = s.inputs["input_ids"].shape[1]
    flat = {n: x.reshape(-1, *x.shape[2:]) if n in _STACKED else x for n, x in s.inputs.items()}
    state, every = _state(s), replace(s, inputs=flat)
    found: dict[str, list[Array]] = {}
    for first in range(0, len(flat["input_ids"]), size):
        state, own = _step(every, state, range(first, first + size))
        for name, value in own.items():
            found.setdefault(name, []).append(value[None] if name.endswith(LOAD) else value)
    return {name: np.concatenate(values) for name, values in found.items()} | _after(state)


def trained(s: Setting, given: Mapping[str, Any]) -> Outputs:
    """A whole model with MTP modules and balance losses: logits of all depths, the parts of the loss and
    their sum.  Of a module's tensors there are the logits and those of the gate, where a position exists."""
    training = s.rules.at(s.training, _tokens(s))
    one = replace(s, inputs={name: array[None] for name, array in given.items()})
    model = Model(s.config, DictWeights(s.config, s.weights), s.ar, s.choices, s.ops, training)
    counts = {n: x for n, x in given.items() if n != "position_ids"}
    divisors = s.rules.divisors([model.divisors(**counts)])[0]
    result = model.forward(**given, routing=_routing(one, 0) if s.routing else None, divisors=divisors)
    out: Outputs = {}
    for name, value in result.tensors.items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
        if name.endswith(_AT_EXISTING):
            out[name] = value[_exists(one, 0, layer)]
        elif layer < s.config.num_hidden_layers:
            out[name] = value
    out["logits"] = result.logits
    out |= {f"loss.{part}": np.array([value]) for part, value in result.losses.items()}
    out["loss"] = np.array([total(result.losses, training)])
    if s.backward:
        gradients = model.backward(result)
        out |= {f"grad.{name}": gradients[name] for name in gradients}
    return out


def _step(s: Setting, state: State, numbers: range) -> tuple[State, Outputs]:
    """The state after a step on some of the microbatches among the inputs, and what it saw."""
    seen = stepping.collect(state, microbatches(s, numbers))
    training = state.model.training
    assert training is not None  # the state gave it
    out: Outputs = {}
    for layer in seen.gates[0]:
        _, scores, chosen = zip(*(one[layer] for one in seen.gates), strict=True)
        path = f"model.layers.{layer}.mlp.gate"
        out[f"{path}.scores"], out[f"{path}{IDX}"] = np.concatenate(scores), np.concatenate(chosen)
    out |= {f"loss.{part}": np.array([value]) for part, value in seen.losses.items()}
    out["loss"] = np.array([total(seen.losses, training)])
    for layer, load in s.rules.loads(seen.counts).items():
        out[f"model.layers.{layer}.mlp.gate{LOAD}"] = load
    after, out["gradient_norm"] = _updated(s, state, seen.gradients, seen.counts)
    return replace(after, steps=state.steps + 1, tokens=state.tokens + seen.tokens), out


def _updated(
    s: Setting, state: State, gradients: Mapping[str, Array], counts: stepping.Counts
) -> tuple[State, Array]:
    """The state after the update, with the norm (1,) of the gradients."""
    training = s.rules.at(state.training, state.tokens)
    norm = s.rules.norm(s.ar, gradients.values())
    clip = s.rules.clip(s.ar, training, norm)
    rate = s.rules.rate(training, state.steps, state.tokens)
    after = stepping.updated(state, gradients, clip, rate, counts)
    weights = {n: _decayed(s.ar, w) if n in after.first else w for n, w in after.weights.items()}
    return replace(after, weights=weights), norm.reshape(1)


def _decayed(ar: Arithmetic, weight: Array) -> Array:
    """Times an exact 1 that has the error of a rounded constant: ports multiply by 1 - rate decay, and what
    that lost is a common factor of all elements, which adds up from step to step."""
    return weight * ar.exp(ar.array(np.zeros(1)))


def _after(state: State) -> Outputs:
    """Weights, moments and averages.  Of a selection bias also what is left without its mean, which is all
    that the choice of experts depends on."""
    out: Outputs = {}
    for prefix, arrays in (("", state.weights), (FIRST, state.first), (SECOND, state.second)):
        for name, array in arrays.items():
            out[f"{_AFTER}{prefix}{name}"] = array
            if name.endswith(BIAS):
                out[f"{_AFTER}{name}{CENTRED}"] = _centred(state.ar, array)
    return out | {f"{_AFTER}{AVERAGE}{name}": array for name, array in state.average.items()}


def _centred(ar: Arithmetic, bias: Array) -> Array:
    return bias - ar.mean(bias)


def _state(s: Setting) -> State:
    """From weights and inputs `first.NAME`, `second.NAME`, `average.NAME`."""
    powers = Powers()
    for _ in range(s.arguments.get("steps", 0)):
        powers = powers.next(s.training)

    def those(prefix: str) -> dict[str, Array]:
        return {n.removeprefix(prefix): s.array(n) for n in s.inputs if n.startswith(prefix)}

    return State(
        s.config,
        s.training,
        s.choices,
        s.ar,
        {name: s.ar.array(value) for name, value in s.weights.items()},
        those(FIRST),
        those(SECOND),
        those(AVERAGE),
        powers,
        s.arguments.get("steps", 0),
        _tokens(s),
        s.ops,
        s.rules,
    )


def _tokens(s: Setting) -> int:
    return int(s.arguments.get("tokens", 0))


def _inputs(s: Setting, ids: Array) -> Inputs:
    """Ids (B, S) with the segments and positions among the inputs, or one segment, counted."""
    segments = s.inputs.get("segment_ids", np.zeros(ids.shape, np.int64))
    return Inputs(ids, segments, s.inputs.get("position_ids", positions(segments)), None)


def microbatches(s: Setting, numbers: range) -> list[dict[str, Any]]:
    """Some of the microbatches among the inputs, each as arguments of `Model.forward`."""
    given = [name for name in _STACKED if name in s.inputs]
    batch = []
    for number in numbers:
        one = {name: s.inputs[name][number] for name in given}
        batch.append(one | {"routing": _routing(s, number)} if s.routing else one)
    return batch


def _routing(s: Setting, number: int) -> dict[int, Array]:
    """The given experts (rows that exist, K) of one microbatch: layer -> (B, S, K)."""
    found = {}
    for path, idx in s.routing.items():
        layer = int(path.split(".")[2])
        every = [_exists(s, m, layer) for m in range(len(s.inputs["input_ids"]))]
        start = sum(int(np.count_nonzero(e)) for e in every[:number])
        own = every[number]
        rows = _spread(idx[start : start + int(np.count_nonzero(own))], own.reshape(-1))
        found[layer] = rows.reshape(*own.shape, -1)
    return found


def _exists(s: Setting, number: int, layer: int) -> Array:
    """(B, S) bool: which positions of a microbatch exist in a layer, which may be that of an MTP module."""
    ids = s.inputs["input_ids"][number]
    segments = s.inputs["segment_ids"][number] if "segment_ids" in s.inputs else np.zeros(ids.shape, np.int64)
    if "mask" in s.inputs:
        segments = np.where(s.inputs["mask"][number] == 1, segments, -1)
    given = Inputs(ids, segments, positions(segments), None)
    for _ in range(layer - s.config.num_hidden_layers + 1):
        given = shifted(given, s.choices)  # as is right: given rows are those of the case
    return given.exists


def _spread(idx: Array, exists: Array) -> Array:
    """idx (n, K) of the positions that exist  ->  (T, K); the others get any experts."""
    full = np.tile(np.arange(idx.shape[-1]), (len(exists), 1))
    full[exists] = idx
    return full


def _cotangent(s: Setting, name: str, exists: Array) -> Array | None:
    """An input (B, S, ...) as (T, ...), zeros where no position exists."""
    if name not in s.inputs:
        return None
    given = s.array(name)
    rows = given.reshape(-1, given.shape[-1])
    return np.where(exists[:, None], rows, np.zeros_like(rows))


TRAINING_PROGRAMS: dict[str, Callable[[Setting], Outputs]] = {
    "mtp": mtp,
    "balance": balance,
    "bias_update": bias_update,
    "adamw": adamw,
    "step": step,
    "chain": chain,
}
