"""A case as PyTorch modules see it: leaves, weights, what they compute inside, gradients.  SPEC CASE-7.

`load` puts the case's weights into a module, `watch` notes what its submodules compute by our names, `finish`
runs autograd from the case's cotangent.  Routing that a case gives is replayed: inside of a gate, top-k
answers with the given experts, and all other arithmetic is the module's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np

from refimpl.config.model import ModelConfig
from refimpl.errors import Invalid, Missing
from refimpl.inputs import read_inputs
from refimpl.layers.batch import allowed, positions
from refimpl.numerics.arithmetic import Array
from refimpl.validate.given import NotForMe, PortCase

BIAS: Final = "e_score_correction_bias"  # float32 in every implementation
DTYPES: Final = ("float32", "bfloat16")

# The name of a tensor of ours, or rows of names: a stack over the rows of what is concatenated in each.
Names = str | Sequence[Sequence[str]]
# What a module's call shows: (path, its arguments, its output) -> our names and tensors.
Shown = Callable[[str, Sequence[Any], Any], Iterable[tuple[str, Any]]]


def library(name: str) -> Any:
    """A module of the extra `crosscheck`.  Raises Missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(
            f"the library {name.partition('.')[0]} cannot be imported ({error}), but this port runs it; "
            "the extra refimpl[crosscheck] has it."
        ) from None


class Trial:
    """One run of one case."""

    def __init__(self, case: PortCase, dtype: str) -> None:
        if dtype not in DTYPES:
            raise Invalid(f"the number type is {dtype}, but it must be one of {', '.join(DTYPES)}.")
        self.torch: Any = library("torch")
        self.case, self.inputs, self.weights = case, case.inputs, case.weights
        self.dtype = getattr(self.torch, dtype)
        self.config = ModelConfig.from_dict(case.config)
        self.path: str = case.path
        self.backward: bool = case.backward
        self.shapes = case.outputs
        self.found: dict[str, Any] = {}  # what the case asks for
        self.seen: dict[str, Any] = {}  # everything that has a name
        self._leaves: dict[str, Any] = {}
        self._loaded: list[tuple[Any, Callable[[str], Names]]] = []
        self._row, self._tokens = 0, slice(None)  # of sequences that run one by one
        self._inside: list[str] = []  # paths of the modules that are running
        self.score_axes = (0, 1, 2, 3)  # where B, H, S, S are in the scores that the softmax gets

    # What goes in.

    def number(self, name: str, dtype: Any = None) -> Any:
        """An input as a leaf of the graph."""
        leaf = self.torch.from_numpy(self.inputs[name]).to(dtype or self.dtype)
        self._leaves[name] = leaf.requires_grad_(self.backward)
        return leaf

    def cotangent(self, name: str, like: Any) -> Any:
        """An input with the shape and type of a tensor of the graph."""
        return self.torch.from_numpy(self.inputs[name]).to(like.dtype).reshape(like.shape)

    def integer(self, name: str) -> Any:
        return self.torch.from_numpy(np.array(self.inputs[name], np.int64))

    def weight(self, name: str) -> Any:
        dtype = self.torch.float32 if name.endswith(BIAS) else self.dtype
        return self.torch.from_numpy(self.weights[name]).to(dtype)

    def load(self, module: Any, names: Callable[[str], Names]) -> Any:
        """The module with the case's weights; `names` maps its own names of them to ours."""
        state = {key: self._assembled(names(key)) for key in module.state_dict()}
        module.load_state_dict(state, assign=True)
        self._loaded.append((module, names))
        return module.requires_grad_(self.backward).eval()

    def _assembled(self, names: Names) -> Any:
        if isinstance(names, str):
            return self.weight(names)
        rows = [self.torch.cat([self.weight(name) for name in row]) for row in names]
        return self.torch.stack(rows)

    # Positions and masks.

    @property
    def segments(self) -> Array | None:
        """segment_ids (B, S) with -1 where `mask` is 0; None where a row is one segment.  SPEC MASK-1."""
        ids, mask = self.inputs.get("segment_ids"), self.inputs.get("mask")
        if ids is None and mask is None:
            return None
        known = ids if ids is not None else np.zeros_like(mask, np.int64)
        segments = known if mask is None else np.where(np.equal(mask, 1), known, -1)
        return None if np.equal(segments, segments[:, :1]).all() else segments

    def positions(self, size: int, length: int) -> Any:
        """(B, S), as given or counted from the beginning of every segment."""
        if "position_ids" in self.inputs:
            return self.integer("position_ids").reshape(size, length)
        segments = self.segments
        counted = positions(np.zeros((size, length), np.int64) if segments is None else segments)
        return self.torch.from_numpy(counted)

    @property
    def longest(self) -> int:
        """One more than the largest position of the case."""
        if "position_ids" in self.inputs:
            return int(self.inputs["position_ids"].max()) + 1
        return self.extent[1]

    @property
    def extent(self) -> tuple[int, int]:
        """(B, S) of the case's sequences; (1, 1) where it has none."""
        name = "input_ids" if "input_ids" in self.inputs else "x"
        shape = self.inputs[name].shape if name in self.inputs else ()
        return (shape[0], shape[1]) if len(shape) == (2 if name == "input_ids" else 3) else (1, 1)

    def allowed(self, size: int, length: int) -> Any:
        """(B, 1, S, S) bool: may query i see key j."""
        segments = self.segments
        return self.torch.from_numpy(
            allowed(np.zeros((size, length), np.int64) if segments is None else segments)
        )

    # What comes out.

    def record(self, name: str, value: Any) -> None:
        """A tensor by our name; what the case does not ask for is left out.  Sequences that run one by one
        are put together."""
        if self._row > 0 and name in self.seen:
            value = self.torch.cat([self.seen[name], value])
        self.seen[name] = value
        if name in self.shapes:
            self.found[name] = value

    def watch(self, module: Any, path: Callable[[str], str], shown: Shown) -> None:
        """Note what the module and its submodules compute; `path` maps their names to ours."""
        for name, part in module.named_modules():
            own = path(name)
            part.register_forward_pre_hook(self._enter(own))
            part.register_forward_hook(self._leave(own, shown))

    def _enter(self, path: str) -> Callable[..., None]:
        return lambda module, arguments: self._inside.append(path)

    def _leave(self, path: str, shown: Shown) -> Callable[..., None]:
        def leave(module: Any, arguments: Sequence[Any], output: Any) -> None:
            self._inside.pop()
            for name, value in shown(path, arguments, output):
                self.record(name, value)

        return leave

    @contextmanager
    def entered(self, path: str) -> Iterator[None]:
        """For what is a function of the library and no module."""
        self._inside.append(path)
        try:
            yield
        finally:
            self._inside.pop()

    @contextmanager
    def row(self, row: int, length: int) -> Iterator[None]:
        """For one sequence of several that run one by one, in their order."""
        self._row, self._tokens = row, slice(row * length, (row + 1) * length)
        try:
            yield
        finally:
            self._row, self._tokens = 0, slice(None)

    def inside(self, leaf: str) -> str | None:
        """The path of the module of that name that is running, innermost."""
        return next((path for path in reversed(self._inside) if path.endswith(f".{leaf}")), None)

    @property
    def targets(self) -> Any:
        """targets (B, S), from `labels` where these are given (SPEC MODEL-3), or None."""
        given = self.inputs.get
        read = read_inputs(
            self.config,
            self.inputs["input_ids"],
            given("labels"),
            given("targets"),
            given("mask"),
            given("segment_ids"),
            given("position_ids"),
        )
        return None if read.targets is None else self.torch.from_numpy(read.targets)

    def starts(self, loss: Any) -> tuple[list[Any], list[Any]]:
        """Where the backward of a whole model starts: its loss, and the tensors with a cotangent `d.NAME`."""
        names = [name.removeprefix("d.") for name in self.inputs if name.startswith("d.")]
        missing = [name for name in names if name not in self.seen]
        if missing:
            raise NotForMe(f"a cotangent of {missing[0]} is given, which is computed inside of a module")
        tensors = [self.seen[name] for name in names]
        cotangents = [self.cotangent(f"d.{name}", self.seen[name]) for name in names]
        if loss is not None:
            tensors, cotangents = [*tensors, loss], [*cotangents, None]
        return tensors, cotangents

    def finish(self, outputs: Sequence[Any], cotangents: Sequence[Any]) -> None:
        """Run autograd and record the gradients of inputs and weights."""
        if not self.backward:
            return
        self.torch.autograd.backward(list(outputs), list(cotangents))
        for name, leaf in self._leaves.items():
            self.record(f"grad.{name}", self._gradient(leaf))
        for module, names in self._loaded:
            for key, parameter in module.named_parameters():
                self._record_gradient(names(key), self._gradient(parameter))

    def _gradient(self, leaf: Any) -> Any:
        return self.torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

    def _record_gradient(self, names: Names, gradient: Any) -> None:
        if isinstance(names, str):
            self.record(f"grad.{names}", gradient)
            return
        for row, stacked in zip(names, gradient, strict=True):
            for name, part in zip(row, stacked.chunk(len(row)), strict=True):
                self.record(f"grad.{name}", part)

    def arrays(self) -> dict[str, Array]:
        """The recorded tensors in the shapes of the case, bfloat16 as float32 of the same values."""
        return {name: self._array(value).reshape(self.shapes[name]) for name, value in self.found.items()}

    def _array(self, value: Any) -> Array:
        plain = value.detach()
        array: Array = (plain.float() if plain.dtype == self.torch.bfloat16 else plain).contiguous().numpy()
        return array

    # What is changed about the functions that a module calls.

    @contextmanager
    def intercepted(self, answer: Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]) -> Iterator[None]:
        """Every torch function that is called is offered to `answer(function, args, kwargs)`, which returns
        its result, or NotImplemented to leave it to torch."""

        def handle(mode: Any, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = answer(function, args, kwargs or {})
            return function(*args, **(kwargs or {})) if result is NotImplemented else result

        base = library("torch.overrides").TorchFunctionMode
        with type("Intercepted", (base,), {"__torch_function__": handle})():
            yield

    def functions(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Replays given routing, and notes the scores and probabilities of attention."""
        torch = self.torch
        if function in (torch.topk, torch.Tensor.topk):
            return self._topk(args[0], args[1] if len(args) > 1 else kwargs["k"])
        if function in (torch.nn.functional.softmax, torch.Tensor.softmax, torch.softmax):
            return self._softmax(function, args, kwargs)
        return NotImplemented

    def _topk(self, values: Any, count: int) -> Any:
        """Inside of a gate whose experts are given: these, and their groups.  SPEC ROUTE-8."""
        gate, config = self.inside("gate"), self.config
        given = self.inputs.get(f"{gate}.topk_idx")
        if given is None or values.ndim != 2:
            return NotImplemented
        idx = self.torch.from_numpy(np.array(given.reshape(-1, given.shape[-1])[self._tokens], np.int64))
        if values.shape[-1] == config.n_routed_experts and count == config.num_experts_per_tok:
            return values.gather(-1, idx), idx
        if values.shape[-1] == config.groups:
            groups = idx // config.experts_per_group
            return values.gather(-1, groups), groups
        return NotImplemented

    def _softmax(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        path = self.inside("self_attn")
        if path is None or self.inside("gate") is not None:
            return NotImplemented
        probs = function(*args, **kwargs)
        self.record(f"{path}.scores", args[0].permute(self.score_axes))
        self.record(f"{path}.probs", probs.permute(self.score_axes))
        return probs
