"""What a layer may know, and the names of what it saves.

A layer is `forward(c, x, ...) -> (y, Saved)` and `backward(c, dy, saved, grads) -> dx`.  `Context` is all
that it may ask for.  Its `Saved` is a frozen dataclass: `tensor("scores")` marks a field as a named tensor,
`child("self_attn")` one that holds the Saved of a submodule, and `tensors` walks both, which is how results,
golden cases and reports read intermediate values.  There are no hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Protocol

from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.errors import Invalid
from refimpl.numerics import sites
from refimpl.numerics.arithmetic import Arithmetic, Array, Dropped, Kept, Weight


@dataclass(frozen=True)
class Op:
    """A replaceable operation: forward, backward, and how what was not kept is computed again."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    again: Callable[..., Any] = lambda c, saved, *given: saved


@dataclass(frozen=True)
class Ops:
    """The operations that a model is built from.  A variant of the model is `replace(ops, gate=...)`.

    The last six have no gradient: they give constants, the choice of experts, or what is read.
    """

    embedding: Op
    linear: Op
    norm: Op
    rope: Op
    attention: Op
    mla: Op
    mlp: Op
    gate: Op
    balance: Op
    experts: Op
    moe: Op
    block: Op
    head: Op
    mtp: Op
    loss: Op
    frequencies: Callable[[ModelConfig, Choices], Array]  # (R/2,) of the rotary pairs
    cos_sin_factor: Callable[[ModelConfig, Choices], float]
    softmax_scale: Callable[[ModelConfig, Choices], float]
    tables: Callable[[Context, Array], Any]  # positions (T,)  ->  rope.Tables
    choose: Callable[[Context, Array], Array]  # scores (T, N)  ->  topk_idx (T, K)
    shifted: Callable[[Any, Choices], Any]  # Inputs of one depth  ->  those of the next MTP module


class Parameters(Protocol):
    """The model's weights, ready for its arithmetic."""

    def array(self, name: str) -> Array: ...
    def weight(self, name: str) -> Weight: ...


class Cotangents:
    """Gradients given by the caller for named tensors; each is added where that tensor's gradient forms."""

    def __init__(self, given: Mapping[str, Array]) -> None:
        self._given = dict(given)
        self.taken: set[str] = set()

    def join(self, name: str, dy: Array) -> Array:
        """dy plus the given gradient of the tensor, if there is one."""
        if name not in self._given:
            return dy
        self.taken.add(name)
        given = self._given[name]
        if given.size != dy.size or given.shape[given.ndim - dy.ndim + 1 :] != dy.shape[1:]:
            raise Invalid(
                f"cotangent {name} has shape {given.shape}, but its tensor has (tokens, ...) = {dy.shape}."
            )
        return dy + given.reshape(dy.shape)

    def plus(self, name: str, dy: Array) -> Cotangents:
        """These, and a gradient that a loss inside of the network has for a named tensor."""
        more = Cotangents({name: dy if name not in self._given else self._given[name] + dy})
        more._given = self._given | more._given
        more.taken = self.taken
        return more

    def check_taken(self) -> None:
        """Raises Invalid if a given gradient met no tensor that takes one."""
        for name in self._given:
            if name not in self.taken:
                raise Invalid(
                    f"cotangent {name} fits no tensor that takes one; modules' outputs and logits do."
                )


@dataclass(frozen=True)
class Context:
    """All that a layer may ask for."""

    ar: Arithmetic
    ops: Ops
    parameters: Parameters
    config: ModelConfig
    choices: Choices
    path: str = ""  # checkpoint path of the module, "model.layers.3.self_attn"
    microbatch: int = 0
    probing: bool = True  # whether tensors that only a trace reads are saved
    cotangents: Cotangents = field(default_factory=lambda: Cotangents({}))
    balancing: Any = None  # balance.Balancing, when the loss has balance losses

    def at(self, *names: str) -> Context:
        """The context of a submodule."""
        return replace(self, path=".".join([self.path, *names] if self.path else names))

    @property
    def leaf(self) -> str:
        """The last component of the path: the projection's or module's own name."""
        return self.path.rpartition(".")[2]

    def site(self, name: str) -> str:
        """The site `name` of this module: inside of experts their name comes before it."""
        return sites.within(self.path, name)

    @property
    def linear(self) -> str:
        """The name that the sites of this linear begin with."""
        return sites.linear(self.path)

    def name(self, leaf: str) -> str:
        """The checkpoint name of a tensor of this module."""
        return f"{self.path}.{leaf}" if self.path else leaf

    def array(self, leaf: str) -> Array:
        """A weight as a plain array."""
        return self.parameters.array(self.name(leaf))

    def weight(self, leaf: str) -> Weight:
        """A weight prepared for linears."""
        return self.parameters.weight(self.name(leaf))

    def probe(self, x: Array) -> Array | None:
        """x, if somebody wants to see it."""
        return x if self.probing else None

    def keep(self, site: str, x: Array) -> Kept:
        """x for the backward pass, in the form that the arithmetic keeps it; a trace sees it in any case."""
        kept = self.ar.keep(site, x)
        return Dropped(x) if self.probing and isinstance(kept, Dropped) else kept

    def joined(self, dy: Array, leaf: str = "") -> Array:
        """dy plus the caller's gradient of this module's output, or of the tensor `leaf` inside of it."""
        return self.cotangents.join(self.name(leaf) if leaf else self.path, dy)


def tensor(name: str, per_token: bool = True) -> Any:
    """A field that holds a named tensor ("" is the module's output), tokens T as its first axis or not."""
    return field(metadata={"tensor": name, "per_token": per_token})


def child(path: str) -> Any:
    """A field that holds the Saved of a submodule."""
    return field(metadata={"child": path})


def tensors(saved: Any, path: str) -> Iterator[tuple[str, Array, bool]]:
    """(name, array, whether tokens are its first axis) for all that is named in a Saved, in fields' order."""
    for entry in fields(saved):
        value = getattr(saved, entry.name)
        if value is None:
            continue
        if "child" in entry.metadata:
            yield from tensors(value, _join(path, entry.metadata["child"]))
        elif "tensor" in entry.metadata:
            array = (
                value.value() if callable(getattr(value, "value", None)) else getattr(value, "value", value)
            )
            yield _join(path, entry.metadata["tensor"]), array, _per_token(entry)


def _join(path: str, name: str) -> str:
    return ".".join(part for part in (path, name) if part)


def _per_token(entry: Field[Any]) -> bool:
    return bool(entry.metadata["per_token"])
