"""The network: its units in order, forward and backward.  SPEC MODEL-1 to MODEL-6.

The model knows nothing smaller than a unit: see units.py.
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
from refimpl.errors import Invalid, Missing, Unreadable, Unsupported
from refimpl.inputs import read_inputs, read_numbers, read_routing
from refimpl.layers import balance, gate
from refimpl.layers.context import Context, Cotangents, Ops, tensors
from refimpl.layers.ops import DEEPSEEK_V3
from refimpl.losses import Divisors, Terms, counted, parts, total
from refimpl.numerics.arithmetic import Arithmetic, Array
from refimpl.numerics.gradients import Gradients
from refimpl.numerics.precision import arithmetic
from refimpl.numerics.recipe import Recipe
from refimpl.parameters import CachedParameters
from refimpl.prepared import Passed, Prepared, backward, depths, forward, prepare
from refimpl.prepared import terms as terms_of
from refimpl.units import Unit, units

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
    chosen = choices if isinstance(choices, Choices) else Choices.named(choices)
    if config.has_selection_bias:
        chosen.group_score_count(config)  # refuses groups that are too small
    weights = weights.with_fp8_rounding(chosen.fp8_weights)
    return Model(config, weights, arithmetic(precision), chosen, training=training)


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
class Result:
    """What a forward pass gives.

    logits (B, S, V); loss and its unweighted parts where there are targets: main, with a TrainingConfig also
    mtp (the mean over modules) and balance (the sum over layers of the mean over sequences); `tensors` the
    named intermediates that the trace selects, (B, S, ...) where tokens are the first axis.
    """

    logits: Array
    loss: float | None
    losses: Mapping[str, float]
    tensors: Mapping[str, Array]
    terms: Terms  # what the parts of the loss are sums of
    _run: _Run

    @property
    def tokens(self) -> int:
        """How many positions exist."""
        return int(np.count_nonzero(self._run.given.tokens[0].exists))

    @property
    def counts(self) -> Mapping[int, Array]:
        """Layer -> (B, N) int: the tokens of each sequence that go to each expert, padding left out."""
        size = len(self.logits)
        of = np.repeat(np.arange(size), self.logits.shape[1])
        return {
            layer: balance.counts(idx, of[exists], size, scores.shape[1])
            for layer, (exists, scores, idx) in self.gates.items()
        }

    @property
    def gates(self) -> Mapping[int, tuple[Array, Array, Array]]:
        """Layer -> which positions exist (T,), and of these n the scores (n, N) and chosen experts (n, K)."""
        found = {}
        for unit, passed in zip(self._run.units, self._run.passed, strict=True):
            gating = getattr(passed.block.mlp, "gating", None) if unit.layer >= 0 else None
            if gating is not None:
                exists = self._run.given.tokens[unit.depth].exists
                found[unit.layer] = (exists, gating.scores[exists], gating.topk_idx[exists])
        return found


@dataclass(frozen=True)
class _Run:
    given: Prepared
    units: list[Unit]
    passed: list[Passed]  # one for each unit

    @property
    def losses(self) -> list[Any]:
        """What the losses saved, one for each depth, or none."""
        return [one.loss for one in self.passed if one.loss is not None]


class Model:
    """DeepSeek-V3 as the weights, an arithmetic, the choices and a record of operations define it."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        ar: Arithmetic,
        choices: Choices,
        ops: Ops = DEEPSEEK_V3,
        training: TrainingConfig | None = None,
    ) -> None:
        check(weights)
        self.config, self.weights, self.ar, self.choices, self.ops = config, weights, ar, choices, ops
        self.training = training
        self.modules = 0 if training is None else config.num_nextn_predict_layers
        if self.modules and not weights.has_mtp:
            raise Missing(
                f"the configuration has {self.modules} MTP modules and training needs them, but the weights "
                "have none of their tensors."
            )
        self.units = units(config, self.modules)
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
        divisors: Divisors | None = None,
        microbatch: int = 0,
    ) -> Result:
        """input_ids (B, S) int  ->  Result.

        targets (B, S): the token that each position shall predict, -100 for none; or labels (B, S): the
        same ids, shifted here.  mask (B, S): which positions exist.  segment_ids (B, S): packed documents,
        -1 for padding.
        position_ids (B, S): by default counted from 0 in each segment.
        routing: {layer: topk_idx (B, S, K)} or {layer: (topk_idx, topk_weight)} forces the experts.
        trace: patterns of the tensors that `Result.tensors` shall have; () for none.
        divisors: of the losses, when the batch is one microbatch of several; see `Model.divisors`.
        Raises: Invalid, naming the argument.  SPEC MODEL-2.
        """
        patterns = (trace,) if isinstance(trace, str) else tuple(trace)
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise Invalid(f"trace is {trace!r}, but it has to be patterns of tensors' names.")
        given = self.prepare(
            input_ids,
            labels,
            targets,
            mask,
            segment_ids,
            position_ids,
            routing,
            divisors=divisors,
            microbatch=microbatch,
            probing=bool(patterns),
        )
        x, logits, passed = None, None, []
        for unit in self.units:
            x, own, one = forward(given, unit, x)
            passed.append(one)
            logits = own if logits is None else logits
        assert logits is not None  # the head is a unit
        run = _Run(given, self.units, passed)
        terms = terms_of(self.units, passed, given.has_loss)
        shares = parts(self.ar, terms, given.divided)
        named = dict(_named(run, patterns, given.shape))
        value = total(shares, self.training) if shares else None
        return Result(logits.reshape(*given.shape, -1), value, shares, named, terms, run)

    def prepare(
        self,
        input_ids: npt.ArrayLike,
        labels: npt.ArrayLike | None = None,
        targets: npt.ArrayLike | None = None,
        mask: npt.ArrayLike | None = None,
        segment_ids: npt.ArrayLike | None = None,
        position_ids: npt.ArrayLike | None = None,
        routing: Mapping[int, Any] | None = None,
        *,
        divisors: Divisors | None = None,
        microbatch: int = 0,
        probing: bool = False,
    ) -> Prepared:
        """The inputs of `forward`, checked and ready for the units.  probing: whether tensors that only a
        trace reads are saved.  Raises Invalid, naming the argument."""
        c = self.context(microbatch, probing)
        given = read_inputs(self.config, input_ids, labels, targets, mask, segment_ids, position_ids)
        if routing:
            ready = read_routing(self.config, routing, given.ids.shape, self.modules)
            c = replace(c, ops=gate.forced(self.ops, ready))
        return prepare(c, given, self.training, self.modules, divisors)

    def context(self, microbatch: int = 0, probing: bool = False) -> Context:
        """All that this model's units may ask for.  Raises Invalid for weights that are not finite."""
        if not self._values_checked:  # once, and before anything is computed
            check(self.weights, values=True)
            self._values_checked = True
        return Context(
            self.ar, self.ops, self._parameters, self.config, self.choices, "", microbatch, probing
        )

    def divisors(
        self,
        input_ids: npt.ArrayLike,
        labels: npt.ArrayLike | None = None,
        targets: npt.ArrayLike | None = None,
        mask: npt.ArrayLike | None = None,
        segment_ids: npt.ArrayLike | None = None,
    ) -> Divisors:
        """By what the losses of these inputs alone are divided; those of microbatches add up.  Raises
        Invalid."""
        given = read_inputs(self.config, input_ids, labels, targets, mask, segment_ids, None)
        return counted(depths(given, self.ops, self.choices, self.modules), self.choices)

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
        if run.given.context.parameters is not self._parameters:
            raise Invalid("result is of another model, but backward needs one of this model's own forward.")
        if not run.losses and not cotangents:
            raise Invalid(
                "backward has neither a loss nor cotangents, but it needs targets, labels or cotangents."
            )
        at = replace(run.given, context=replace(run.given.context, cotangents=given))
        grads = into if isinstance(into, Gradients) else self.gradients()
        dx: Array | None = None
        for unit, passed in reversed(list(zip(run.units, run.passed, strict=True))):
            dx = backward(at, unit, dx, passed, grads)
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


def _named(run: _Run, patterns: Sequence[str], shape: tuple[int, ...]) -> Iterator[tuple[str, Array]]:
    if not patterns:
        return
    for unit, passed in zip(run.units, run.passed, strict=True):
        yield from _selected(tensors(passed.saved, unit.path), patterns, shape)
    ends = [unit.path for unit in run.units if unit.has_logits]
    for path, kept in zip(ends, run.losses, strict=False):
        yield from _selected(tensors(kept, path), patterns, shape)


def _selected(
    found: Iterator[tuple[str, Array, bool]], patterns: Sequence[str], shape: tuple[int, ...]
) -> Iterator[tuple[str, Array]]:
    for name, array, per_token in found:
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            yield name, array.reshape(*shape, *array.shape[1:]) if per_token else array
