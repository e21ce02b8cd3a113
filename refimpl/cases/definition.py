"""A case as its author writes it: a row of a suite's table.  SPEC CASE-8.

Whatever can be derived is left out: shapes and distributions of weights come from the configuration and the
module's path, expected values from the program, tolerances and certificate from the verdict's rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final

import numpy as np

from refimpl.cases.claims import CLAIMS
from refimpl.cases.folder import generated
from refimpl.checkpoint import names, virtual
from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.numerics import generator
from refimpl.numerics.arithmetic import Array

SEED: Final = 1  # of every stream of the suites
STEPS: Final = ("bias_update", "adamw", "step", "chain")  # components of training steps


@dataclass(frozen=True)
class Draw:
    """Values from the generator: offset + scale * fields.  With `blocks`, each block of 128x128 is times 2^-k
    with its own k below that, so that tiles and blocks have different scales."""

    shape: tuple[int, ...]
    scale: float = 2.0**-7  # standard deviation 0.82
    fields: int = 1
    offset: float = 0.0
    dtype: str = "BF16"
    blocks: int = 0

    def made(self, stream: str) -> tuple[Array, dict[str, Any]]:
        """(values, `generator` of case.json)."""
        how: dict[str, Any] = _stream(stream) | {"scale": self.scale}
        how |= {"fields": self.fields} if self.fields != 1 else {}
        how |= {"offset": self.offset} if self.offset else {}
        how |= {"round": "F32"} if self.dtype == "F32" else {}
        how |= {"blocks": self.blocks} if self.blocks else {}
        return generated(self.shape, how), how


@dataclass(frozen=True)
class Integers:
    """scale * integers in [low, high) from the generator; without a scale they stay integers."""

    shape: tuple[int, ...]
    low: int
    high: int
    scale: float | None = None

    @property
    def dtype(self) -> str:
        return "I64" if self.scale is None else "BF16"

    def made(self, stream: str) -> tuple[Array, dict[str, Any]]:
        how: dict[str, Any] = _stream(stream) | {"low": self.low, "high": self.high}
        how |= {} if self.scale is None else {"scale": self.scale}
        return generated(self.shape, how), how


@dataclass(frozen=True)
class Given:
    """Values written out."""

    values: Any
    dtype: str = "BF16"

    def made(self, stream: str) -> tuple[Array, None]:
        return np.asarray(self.values, np.int64 if self.dtype == "I64" else np.float64), None


Source = Draw | Integers | Given


@dataclass(frozen=True)
class Flag:
    """A mistake that ports really made, and what it does to results."""

    name: str
    type: str
    description: str
    effect: str

    def to_json(self) -> dict[str, str]:
        return {"name": self.name, "type": self.type, "description": self.description, "effect": self.effect}


@dataclass(frozen=True)
class Definition:
    """One case."""

    id: str  # suite/name
    title: str
    clauses: tuple[str, ...]
    component: str
    config: ModelConfig
    inputs: Mapping[str, Source]
    path: str = ""
    weights: Mapping[str, Source] = field(
        default_factory=dict
    )  # by name below the path, where not the usual ones
    choices: Choices = field(default_factory=Choices)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[
        str, ...
    ] = ()  # patterns of the outputs that a port must give, besides the results and gradients
    omits: tuple[str, ...] = ()  # patterns of the outputs that are left out, to keep the case small
    backward: bool = False
    exact: bool = False  # any order of float32 accumulation gives the same bits, and these are demanded
    forced: bool = False  # the routing is an input
    twin: str | None = None
    flags: tuple[Flag, ...] = ()
    claims: tuple[str, ...] = tuple(CLAIMS)
    rejects: str | None = None  # why the input must be refused
    published: Mapping[str, Any] = field(default_factory=dict)  # invalid fields that config.json has instead
    shared: bool = False  # weights are an asset, shared with other cases

    @property
    def suite(self) -> str:
        return self.id.partition("/")[0]

    @property
    def kind(self) -> str:
        if self.component in STEPS:
            return "step"
        if self.component == "pipelined":
            return "schedule"
        return "reject" if self.rejects else "vjp" if self.backward else "forward"

    def is_required(self, name: str) -> bool:
        """Whether a port must give the output; the others are probes."""
        results = (self.path, f"{self.path}.topk_idx", f"{self.path}.topk_weight", "logits", "loss", "grad.*")
        if self.component in STEPS and name.endswith(("e_score_correction_bias", "after.bias")):
            return False  # a constant that all biases have more or less changes nothing: see `.centred`
        return any(fnmatchcase(name, pattern) for pattern in (*results, *self.required))

    @property
    def stream(self) -> str:
        """Twins have the same inputs, so the streams of inputs are named by the first of them."""
        return self.twin or self.id

    def weight_sources(self) -> dict[str, Source]:
        """Checkpoint name -> how its values are made, for every weight of the module."""
        prefix = f"{self.path}." if self.path else ""
        specs = {
            name: spec for name, spec in names.parameters(self.config).items() if name.startswith(prefix)
        }
        if self.component == "mtp":  # what it shares with the main model
            every = names.parameters(self.config)
            specs |= {name: every[name] for name in (names.EMBEDDING, names.HEAD)}
        if self.component in _LEAVES:
            specs = {name: spec for name, spec in specs.items() if name in _LEAVES[self.component](self.path)}
        made: dict[str, Source] = {}
        for name, spec in specs.items():
            leaf = name.removeprefix(prefix)
            made[name] = self.weights.get(leaf) or usual(spec)
        for leaf, source in self.weights.items():  # those that are no parameters of the configuration
            made.setdefault(prefix + leaf, source)
        return made


def usual(spec: names.ParameterSpec) -> Source:
    how = virtual.rule(spec)
    if isinstance(how, virtual.Steps):
        return Integers(spec.shape, how.low, how.high, how.scale)
    return Draw(spec.shape, how.scale, 1, how.offset, "F32" if spec.role == "bias" else "BF16")


def _stream(stream: str) -> dict[str, Any]:
    return {"seed": SEED, "stream": stream, "key": generator.tensor_key(SEED, stream).hex()}


# Components that have no weights below their path, or not all that the checkpoint has there.
_LEAVES: Final[dict[str, Any]] = {
    "rope": lambda path: (),
    "rope_tables": lambda path: (),
    "attention": lambda path: (),
    "balance": lambda path: (),
    "bias_update": lambda path: (),
    "adamw": lambda path: (),
    "head_loss": lambda path: (names.NORM, names.HEAD),
}


def power(std: float) -> float:
    """The power of two that gives one field of the generator about that standard deviation."""
    return 2.0 ** round(math.log2(std / virtual.FIELD_STD))


def shaped(base: ModelConfig, **changes: Any) -> ModelConfig:
    """A configuration with other values, without what says nothing about the function (FP8 blocks among
    it)."""
    fields = base.to_dict() | changes
    if "num_attention_heads" in changes:
        fields["num_key_value_heads"] = changes["num_attention_heads"]
    dropped = (
        "quantization_config",
        "architectures",
        "torch_dtype",
        "transformers_version",
        "auto_map",
        *_LEFTOVERS,
    )
    return ModelConfig.from_dict({name: value for name, value in fields.items() if name not in dropped})


_LEFTOVERS: Final = (
    "aux_loss_alpha",
    "seq_aux",
    "pretraining_tp",
    "ep_size",
    "initializer_range",
    "use_cache",
)
