"""Programs of what training adds: MTP modules, balancing, the optimiser, the step.  SPEC CASE-7, STEP-2.

Arguments: `training` (fields of TrainingConfig), `steps` and `tokens` (seen before the step), `depth` (of an
MTP module).  Tensors of gates and of MTP modules have the rows of the positions that exist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from refimpl.checkpoint import names
from refimpl.layers.batch import Batch, Inputs, Tokens, allowed, positions
from refimpl.layers.context import tensors
from refimpl.losses import balancing, counted, total
from refimpl.numerics.arithmetic import Array
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


def mtp(s: Setting) -> Outputs:
    """Module `depth` on hidden states x (B, S, D) and the main model's input_ids (B, S); with gradients also
    dy (B, S, V), and dnext (B, S, D) of what the next module reads."""
    main = _inputs(s, s.inputs["input_ids"])
    given = main
    for _ in range(s.arguments.get("depth", 1)):
        given = s.ops.shifted(given, s.choices)
    exists = given.exists.reshape(-1)
    c = replace(s, routing={path: _spread(idx, exists) for path, idx in s.routing.items()}).context
    size, length = given.ids.shape
    batch = Batch(size, length, c.ops.tables(c, given.positions.reshape(-1)), allowed(given.segments))
    first = ((positions(main.segments) == 0) & main.exists).reshape(-1)
    tokens = Tokens(given.ids.reshape(-1), first, exists, batch)
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
    return {"load": load, "max_violation": np.array([loads.max_violation(load)]), f"{_AFTER}bias": moved}


def adamw(s: Setting) -> Outputs:
    """Clipping, AdamW and the average of all weights, with their gradients `grad.NAME` and moments given;
    and the selection biases, where the gates' loads are given."""
    paths = [name for name in s.inputs if name.endswith(LOAD)]
    counts = [{int(path.split(".")[2]): s.inputs[path][None] for path in paths}] if paths else []
    gradients = {n.removeprefix("grad."): s.array(n) for n in s.inputs if n.startswith("grad.")}
    return _finished(s, _state(s), gradients, counts)


def step(s: Setting) -> Outputs:
    """A whole step.  input_ids, targets or labels, mask, segment_ids, position_ids are (M, B, S): M
    microbatches."""
    state, names_given = _state(s), [name for name in _STACKED if name in s.inputs]
    batch = []
    for number in range(len(s.inputs["input_ids"])):
        one = {name: s.inputs[name][number] for name in names_given}
        batch.append(one | {"routing": _routing(s, number)} if s.routing else one)
    seen = stepping.collect(state, batch)
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
    return out | _finished(s, state, seen.gradients, seen.counts)


def _finished(s: Setting, state: State, gradients: Mapping[str, Array], counts: stepping.Counts) -> Outputs:
    training = s.rules.at(state.training, state.tokens)
    norm = s.rules.norm(s.ar, gradients.values())
    clip = s.rules.clip(s.ar, training, norm)
    rate = s.rules.rate(training, state.steps, state.tokens)
    after = stepping.updated(state, gradients, clip, rate, counts)
    out: Outputs = {"gradient_norm": norm.reshape(1)}
    for prefix, arrays in (("", after.weights), (FIRST, after.first), (SECOND, after.second)):
        out |= {f"{_AFTER}{prefix}{name}": array for name, array in arrays.items()}
    return out | {f"{_AFTER}{AVERAGE}{name}": array for name, array in after.average.items()}


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
        given = s.ops.shifted(given, s.choices)
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
}
