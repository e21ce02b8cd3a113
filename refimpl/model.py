"""The network: its units in order, forward and backward.  SPEC MODEL-1 to MODEL-6.

A unit is the embedding, one decoder layer, or the final norm with the head.  The model knows nothing smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from refimpl.checkpoint import names
from refimpl.checkpoint.folder import open_folder
from refimpl.checkpoint.virtual import VirtualWeights
from refimpl.checkpoint.weights import DictWeights, Weights, check
from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.config.presets import PRESETS, preset
from refimpl.config.training import TrainingConfig
from refimpl.errors import Invalid, Unreadable, Unsupported
from refimpl.inputs import Inputs, read_inputs, read_numbers, read_routing
from refimpl.layers import gate, loss
from refimpl.layers.batch import Batch, allowed
from refimpl.layers.context import Context, Cotangents, Ops, tensors
from refimpl.layers.ops import DEEPSEEK_V3
from refimpl.numerics.arithmetic import Arithmetic, Array
from refimpl.numerics.gradients import Gradients
from refimpl.numerics.precision import arithmetic
from refimpl.numerics.recipe import Recipe
from refimpl.parameters import CachedParameters

Source = str | PathLike[str] | tuple[ModelConfig | Mapping[str, Any], Mapping[str, Any]]
Sink = Callable[[str, Array], None]


def load(
    source: Source,
    precision: str | Recipe | Arithmetic = "exact",
    choices: str | Choices = "hf",
    training: TrainingConfig | None = None,
) -> Model:
    """A model from a checkpoint folder in the published layout, a preset's name (virtual weights), or a pair
    of config and weights by checkpoint name.

    precision: exact, float64, float32, a recipe's name, a Recipe, or an Arithmetic.
    Raises: Invalid, Missing, Unsupported, Unreadable, each naming the field, tensor or file.  SPEC MODEL-1.
    """
    config, weights = _open(source)
    if config.has_indexer:
        raise Unsupported(
            f"model_type is {config.model_type!r}, whose sparse attention is not computed here."
        )
    if training is not None and not isinstance(training, TrainingConfig):
        raise Invalid(f"training is a {type(training).__name__}, but it has to be a TrainingConfig.")
    if training is not None and (training.balance_loss_weight or training.mtp_loss_weight):
        raise Unsupported(
            "training has balance_loss_weight or mtp_loss_weight; only the main loss is computed here."
        )
    chosen = choices if isinstance(choices, Choices) else Choices.named(choices)
    if config.has_selection_bias:
        chosen.group_score_count(config)  # refuses groups that are too small
    weights = weights.with_fp8_rounding(chosen.fp8_weights)
    return Model(config, weights, arithmetic(precision), chosen)


def _open(source: Source) -> tuple[ModelConfig, Weights]:
    if isinstance(source, tuple):
        if len(source) != 2:
            raise Invalid(f"source is a tuple of {len(source)}, but it has to be (config, weights).")
        config = source[0] if isinstance(source[0], ModelConfig) else ModelConfig.from_dict(source[0])
        given = source[1]
        return config, given if isinstance(given, Weights) else DictWeights(config, given)
    if isinstance(source, str) and source in PRESETS:
        config = preset(source)
        return config, VirtualWeights(config)
    if not isinstance(source, str | PathLike):
        raise Invalid(f"source is a {type(source).__name__}, but it has to be a folder, a preset, or a pair.")
    if not Path(source).is_dir():
        raise Unreadable(f"source {source} is neither a checkpoint folder nor one of {', '.join(PRESETS)}.")
    return open_folder(source)


@dataclass(frozen=True)
class Unit:
    """A piece of the network that is computed, saved and freed as one."""

    kind: str  # "embedding", "layer" or "head"
    layer: int = -1

    @property
    def path(self) -> str:
        return {"embedding": "model.embed_tokens", "layer": f"model.layers.{self.layer}", "head": ""}[
            self.kind
        ]


def units(config: ModelConfig) -> list[Unit]:
    """The units in the order of the forward pass."""
    layers = [Unit("layer", i) for i in range(config.num_hidden_layers)]
    return [Unit("embedding"), *layers, Unit("head")]


def unit_forward(c: Context, unit: Unit, x: Array, batch: Batch) -> tuple[Array, Any]:
    """x: ids (T,) for the embedding, else (T, D)  ->  (T, D), or logits (T, V) of the head."""
    at = c.at(unit.path) if unit.path else c
    if unit.kind == "embedding":
        out: tuple[Array, Any] = c.ops.embedding.forward(at, x)
    elif unit.kind == "head":
        out = c.ops.head.forward(at, x)
    else:
        out = c.ops.block.forward(at, x, batch, not c.config.is_moe_layer(unit.layer))
    return out


def unit_backward(c: Context, unit: Unit, dy: Array, saved: Any, batch: Batch, grads: Gradients) -> Array:
    """dy as the unit's output  ->  dx as its input; None from the embedding."""
    at = c.at(unit.path) if unit.path else c
    if unit.kind == "embedding":
        dx: Array = c.ops.embedding.backward(at, dy, saved, grads)
    elif unit.kind == "head":
        dx = c.ops.head.backward(at, dy, saved, grads)
    else:
        dx = c.ops.block.backward(at, dy, saved, batch, not c.config.is_moe_layer(unit.layer), grads)
    return dx


@dataclass(frozen=True)
class Result:
    """What a forward pass gives.

    logits (B, S, V); loss and its unweighted parts where there are targets; `tensors` the named intermediates
    that the trace selects, (B, S, ...) where tokens are the first axis.
    """

    logits: Array
    loss: float | None
    losses: Mapping[str, float]
    tensors: Mapping[str, Array]
    _run: _Run


@dataclass(frozen=True)
class _Run:
    context: Context
    batch: Batch
    saved: list[Any]  # one for each unit
    loss: loss.Saved | None


class Model:
    """DeepSeek-V3 as the weights, an arithmetic, the choices and a record of operations define it."""

    def __init__(
        self, config: ModelConfig, weights: Weights, ar: Arithmetic, choices: Choices, ops: Ops = DEEPSEEK_V3
    ) -> None:
        check(weights)
        self.config, self.weights, self.ar, self.choices, self.ops = config, weights, ar, choices, ops
        self._parameters = CachedParameters(weights, ar)
        self._values_checked = False

    def forward(
        self,
        input_ids: npt.ArrayLike,
        labels: npt.ArrayLike | None = None,
        targets: npt.ArrayLike | None = None,
        mask: npt.ArrayLike | None = None,
        segment_ids: npt.ArrayLike | None = None,
        position_ids: npt.ArrayLike | None = None,
        routing: Mapping[int, Any] | None = None,
        trace: str | Sequence[str] = "*",
        *,
        target_count: int | None = None,
        microbatch: int = 0,
    ) -> Result:
        """input_ids (B, S) int  ->  Result.

        targets (B, S): the token that each position shall predict, -100 for none; or labels (B, S): the
        same ids, shifted here.  mask (B, S): which positions exist.  segment_ids (B, S): packed documents,
        -1 for padding.
        position_ids (B, S): by default counted from 0 in each segment.
        routing: {layer: topk_idx (B, S, K)} or {layer: (topk_idx, topk_weight)} forces the experts.
        trace: patterns of the tensors that `Result.tensors` shall have; () for none.
        target_count: the divisor of the loss, when the batch is one microbatch of several.
        Raises: Invalid, naming the argument.  SPEC MODEL-2.
        """
        if not self._values_checked:  # once, and before anything is computed
            check(self.weights, values=True)
            self._values_checked = True
        given = read_inputs(self.config, input_ids, labels, targets, mask, segment_ids, position_ids)
        patterns = (trace,) if isinstance(trace, str) else tuple(trace)
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise Invalid(f"trace is {trace!r}, but it has to be patterns of tensors' names.")
        c = Context(
            self.ar, self.ops, self._parameters, self.config, self.choices, "", microbatch, bool(patterns)
        )
        if routing:
            c = replace(c, ops=gate.forced(self.ops, read_routing(self.config, routing, given.ids.shape)))
        count = self._target_count(given, target_count)
        batch = _batch(c, given)
        x, saved = given.ids.reshape(-1), []
        for unit in units(self.config):
            x, kept = unit_forward(c, unit, x, batch)
            saved.append(kept)
        value, loss_saved = self._loss(c, x, given, count)
        run = _Run(c, batch, saved, loss_saved)
        shape = given.ids.shape
        named = dict(_named(run, self.config, patterns, shape))
        losses = {} if value is None else {"main": value}
        return Result(x.reshape(*shape, -1), value, losses, named, run)

    def backward(
        self,
        result: Result,
        cotangents: Mapping[str, npt.ArrayLike] | None = None,
        into: Gradients | Sink | None = None,
    ) -> Any:
        """The gradients of the loss with respect to every weight: a mapping from checkpoint name to array.

        cotangents: {tensor name: array of its shape}, added where that tensor's gradient is formed;
        without targets they stand in for the loss.  into: a `Gradients` that goes on collecting (as over
        microbatches), or a function that receives (name, gradient) one by one; it is handed back.
        Raises: Invalid when there is neither loss nor cotangent, or a cotangent fits no tensor.
        SPEC MODEL-4.
        """
        run, given = result._run, self._cotangents(result, cotangents or {})
        if run.context.parameters is not self._parameters:
            raise Invalid("result is of another model, but backward needs one of this model's own forward.")
        if run.loss is None and not cotangents:
            raise Invalid(
                "backward has neither a loss nor cotangents, but it needs targets, labels or cotangents."
            )
        c = replace(run.context, cotangents=given)
        grads = into if isinstance(into, Gradients) else self.gradients()
        if run.loss is None:
            dx = np.zeros_like(result.logits).reshape(-1, self.config.vocab_size)
        else:
            dx = self.ops.loss.backward(c, 1.0, run.loss)
        for unit, saved in reversed(list(zip(units(self.config), run.saved, strict=True))):
            dx = unit_backward(c, unit, dx, saved, run.batch, grads)
        given.check_taken()
        if isinstance(into, Gradients):
            return into
        if into is None:
            return GradientMap(self.weights, self.ar, grads.reduce())
        self.hand_over(grads, into)
        return into

    def gradients(self, deferred: bool = False) -> Gradients:
        """An empty collector for this model: shared parameters add up under one name."""
        return Gradients(self.ar, deferred, names.aliases(self.config))

    def hand_over(self, grads: Gradients, sink: Sink) -> None:
        """Give every parameter's gradient to the sink, one by one, exact zeros included."""
        touched = set()
        for name, gradient in grads.drain():
            touched.add(name)
            sink(name, gradient)
        for name, gradient in GradientMap(self.weights, self.ar, {}).items():
            if name not in touched:
                sink(name, gradient)

    def _target_count(self, given: Inputs, target_count: int | None) -> int | None:
        """The divisor of the loss, checked; None without targets."""
        if given.targets is None:
            return None
        if target_count is None:
            counted = (
                given.exists if self.choices.loss_divisor == "positions" else given.targets != loss.IGNORED
            )
            count = int(counted.sum())
            if count == 0:
                raise Invalid("the number of targets is 0, but a loss needs one that is not -100 or padding.")
            return count
        if not isinstance(target_count, int | np.integer) or target_count < 1:
            raise Invalid(f"target_count is {target_count!r}, but it has to be an integer of at least 1.")
        return int(target_count)

    def _loss(
        self, c: Context, logits: Array, given: Inputs, count: int | None
    ) -> tuple[float | None, loss.Saved | None]:
        if count is None:
            return None, None
        assert given.targets is not None  # there is a count only with targets
        value, saved = self.ops.loss.forward(c, logits, given.targets.reshape(-1), count)
        return float(value), saved

    def _cotangents(self, result: Result, given: Mapping[str, npt.ArrayLike]) -> Cotangents:
        ready = {}
        if not isinstance(given, Mapping):
            raise Invalid(f"cotangents are a {type(given).__name__}, but they have to map names to arrays.")
        for name, value in given.items():
            array = self.ar.array(read_numbers(f"cotangent {name}", value))
            if name in result.tensors and result.tensors[name].shape != array.shape:
                found, required = array.shape, result.tensors[name].shape
                raise Invalid(f"cotangent {name} has shape {found}, but its tensor has {required}.")
            ready[name] = array
        return Cotangents(ready)


def _batch(c: Context, given: Inputs) -> Batch:
    tables = c.ops.tables(c, given.positions.reshape(-1))
    size, length = given.ids.shape
    return Batch(size, length, tables, allowed(given.segments))


class GradientMap(Mapping[str, Array]):
    """Every parameter's gradient by checkpoint name; what nothing reached is exact zeros, made when read."""

    def __init__(self, weights: Weights, ar: Arithmetic, touched: Mapping[str, Array]) -> None:
        self._shapes = {name: weights.shape(name) for name in weights if weights.kind(name) == "param"}
        self._touched, self._ar = touched, ar

    def __getitem__(self, name: str) -> Array:
        if name in self._touched:
            return self._touched[name]
        return self._ar.array(np.zeros(self._shapes[name], np.float32))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _named(
    run: _Run, config: ModelConfig, patterns: Sequence[str], shape: tuple[int, ...]
) -> Iterator[tuple[str, Array]]:
    parts = [(saved, unit.path) for unit, saved in zip(units(config), run.saved, strict=True)]
    if run.loss is not None:
        parts.append((run.loss, ""))
    for saved, path in parts if patterns else []:
        for name, array, per_token in tensors(saved, path):
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                yield name, array.reshape(*shape, *array.shape[1:]) if per_token else array
