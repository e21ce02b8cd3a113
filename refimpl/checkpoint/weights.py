"""Weights: a mapping from checkpoint name to array, wherever the arrays are.  SPEC CKPT-5.

Iterating gives the parameters and buffers that the configuration asks for and that are there, each once, in
the order of the computation.  An alias can be looked up and gives its parameter.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import numpy as np

from refimpl.checkpoint import fp8
from refimpl.checkpoint.dtypes import DTYPES, Array, Stored
from refimpl.checkpoint.names import ParameterSpec, aliases, known_and_ignored, parameters
from refimpl.checkpoint.safetensors import TensorFile
from refimpl.config.model import ModelConfig
from refimpl.errors import Error, Invalid, Missing, Unsupported
from refimpl.numerics import blockscale

_DECODED = ("F64", "F32", "F16", "BF16")


class Weights(Mapping[str, Array], ABC):
    """A mapping from name to decoded array that knows what each name is.

    unknown   names that are there and that nobody can explain
    ignored   names that are there, known and not needed
    stored_copies   aliases that are there too
    has_mtp   whether the MTP modules that the configuration asks for are there
    """

    in_memory: ClassVar[bool] = False  # so that looking at all values before any computation is cheap
    always_finite: ClassVar[bool] = False  # so that there is no need to look
    checked: ClassVar[bool] = False  # made of weights that were checked, so that `check` has nothing to do
    fp8_rounding: str = "float32"  # of dequantised weights: the choice fp8_weights

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.specs: Mapping[str, ParameterSpec] = parameters(config)
        self.aliases: Mapping[str, str] = aliases(config)
        self._finite: set[str] = set()
        present = set(self.stored_names())
        known = self.specs.keys() | self.aliases.keys()
        strangers = sorted(present - known)
        self.ignored = tuple(name for name in strangers if known_and_ignored(name))
        self.unknown = tuple(name for name in strangers if not known_and_ignored(name))
        self.has_mtp = any(spec.mtp and name in present for name, spec in self.specs.items())
        self._names = tuple(
            name for name, spec in self.specs.items() if spec.kind != "scale" and name in present
        )
        self.stored_copies = tuple(name for name in self.aliases if name in present)
        self._present = present

    # Where the arrays are: what a subclass says, by the names under which they are stored.

    @abstractmethod
    def stored_names(self) -> Iterator[str]:
        """Every name that is there."""

    @abstractmethod
    def stored_dtype(self, name: str) -> str:
        """The format's name of its number type."""

    @abstractmethod
    def stored_shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def stored_codes(self, name: str) -> Array: ...

    def stored_value(self, name: str) -> Array:
        if self.is_quantised(name):
            return fp8.weight(self.quantised(name), self.fp8_rounding)
        return DTYPES[self.stored_dtype(name)].decode(self.stored_codes(name))

    # What everyone asks for.

    def canonical(self, name: str) -> str:
        """The parameter that a name stands for: itself, or what it is an alias of.  Raises Missing."""
        name = self.aliases.get(name, name)
        if name not in self.specs:
            raise Missing(
                f"tensor {name} is unknown, but it must be a name of this configuration's checkpoint."
            )
        return name

    def spec(self, name: str) -> ParameterSpec:
        """Raises Missing."""
        return self.specs[self.canonical(name)]

    def kind(self, name: str) -> str:
        """param, buffer or scale.  Raises Missing."""
        return self.spec(name).kind

    def shape(self, name: str) -> tuple[int, ...]:
        """As the configuration asks for it.  Raises Missing."""
        return self.spec(name).shape

    def dtype(self, name: str) -> str:
        """The format's name of the stored number type.  Raises Missing."""
        return self.stored_dtype(self._there(name))

    def codes(self, name: str) -> Array:
        """The stored array: BF16 as uint16, FP8 as uint8.  Raises Missing."""
        return self.stored_codes(self._there(name))

    def quantised(self, name: str) -> blockscale.Quantised:
        """The codes and the scales (as float32) of an FP8 weight.  Raises Missing, Invalid."""
        stored = self._there(name)
        dtype = self.stored_dtype(stored)
        if dtype not in fp8.CODES:
            raise Invalid(
                f"tensor {stored} is stored as {dtype}, but to have scales it must be {', '.join(fp8.CODES)}."
            )
        refusal = self.refusal(stored, self.shape(stored))
        if refusal is not None:
            raise refusal
        assert self.config.fp8_block is not None  # or it would have been refused
        scales = self[f"{stored}{fp8.SUFFIX}"]
        return blockscale.Quantised(
            self.stored_codes(stored), scales, self.config.fp8_block, fp8.CODES[dtype]
        )

    def with_fp8_rounding(self, rounding: str) -> Self:
        """The same weights, with FP8 tensors dequantised to `rounding`: float32 or bf16.  SPEC CKPT-9."""
        if rounding == self.fp8_rounding:
            return self
        same = copy.copy(self)
        same.fp8_rounding = rounding
        return same

    def __getitem__(self, name: str) -> Array:
        """The decoded array: BF16 as float32, FP8 dequantised.  SPEC CKPT-9.

        Raises Missing; Invalid at its first reading if it is misshapen or not finite.
        """
        stored = self._there(name)
        refusal = self.refusal(stored, self.shape(name))
        if refusal is not None:
            raise refusal
        value = self.stored_value(stored)
        if not self.always_finite and stored not in self._finite:
            require_finite(stored, value)
            self._finite.add(stored)
        return value

    def slice(self, name: str, start: int, count: int) -> Array:
        """Elements start to start + count - 1 of the decoded array, in C order."""
        return self[name].reshape(-1)[start : start + count]

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        canonical = self.aliases.get(name, name)
        return canonical in self.specs and canonical in self._present

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _there(self, name: str) -> str:
        canonical = self.canonical(name)
        if canonical not in self._present:
            raise Missing(f"tensor {canonical} is missing, but the configuration must have it.")
        return canonical

    def refusal(self, name: str, required: tuple[int, ...]) -> Error | None:
        """What is wrong with a stored tensor that must have the shape `required`, by its header alone."""
        shape, dtype = self.stored_shape(name), self.stored_dtype(name)
        if shape != required:
            return Invalid(
                f"tensor {name} has shape {shape}, but by the configuration it must have {required}."
            )
        if self.specs[self.canonical(name)].kind == "scale":
            allowed: tuple[str, ...] = fp8.SCALES
        elif dtype in fp8.CODES:
            return self._refusal_of_scales(name, dtype)
        else:
            allowed = _DECODED
        if dtype not in allowed:
            return Invalid(f"tensor {name} is stored as {dtype}, but it must be one of {', '.join(allowed)}.")
        return None

    def _refusal_of_scales(self, name: str, dtype: str) -> Error | None:
        scale = f"{name}{fp8.SUFFIX}"
        if self.config.fp8_block is None:
            return Invalid(
                f"tensor {name} is stored as {dtype}, but then the config must have a quantization_config "
                f"with quant_method fp8."
            )
        if scale not in self.specs:
            return Invalid(
                f"tensor {name} is stored as {dtype}, but it must be one of {', '.join(_DECODED)}."
            )
        if scale not in self._present:
            return Missing(f"tensor {scale} is missing, but {name}, stored as {dtype}, must have it.")
        return self.refusal(scale, self.specs[scale].shape)

    def is_quantised(self, name: str) -> bool:
        return self.stored_dtype(name) in fp8.CODES


def require_finite(name: str, value: Array) -> None:
    """Raises Invalid, with the first index, if the tensor has an infinity or NaN."""
    finite = np.isfinite(value)
    if not finite.all():
        index = tuple(int(i) for i in np.unravel_index(int(np.argmin(finite)), value.shape))
        where = index[0] if len(index) == 1 else index
        raise Invalid(f"tensor {name} has {value[index]} at {where}, but all values must be finite.")


def check(weights: Weights, *, values: bool | None = None) -> None:
    """Names, shapes and number types of all tensors, before any computation.

    With `values` also the numbers: finite, and the same in copies of the embedding or of the head.  By
    default that is done now for weights in memory, and for others when a tensor is first read.  MTP modules
    may be left out as a whole, as converted checkpoints do.

    Raises Missing (the first, and how many), Invalid, Unsupported.
    """
    if weights.checked:
        return
    config = weights.config
    if config.has_indexer:
        raise Unsupported(
            f'config field model_type is "{config.model_type}", but to be computed it must have no indexer.'
        )
    specs = weights.specs.items()
    wanted = [name for name, spec in specs if spec.kind != "scale" and (weights.has_mtp or not spec.mtp)]
    missing = [name for name in wanted if name not in weights]
    if missing:
        others = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise Missing(
            f"tensor {missing[0]}{others} missing, but the configuration must have all its tensors."
        )
    for name in (*wanted, *weights.stored_copies):
        refusal = weights.refusal(name, weights.shape(name))
        if refusal is not None:
            raise refusal
    if not weights.always_finite and (weights.in_memory if values is None else values):
        for name in wanted:
            weights[name]
        for name in weights.stored_copies:
            if not np.array_equal(weights.stored_value(name), weights[name]):
                raise Invalid(
                    f"tensor {name} differs from {weights.aliases[name]}, but they must be the same."
                )


class DictWeights(Weights):
    """Weights in memory: arrays, or `Stored` codes."""

    in_memory = True

    def __init__(self, config: ModelConfig, arrays: Mapping[str, Array | Stored]) -> None:
        if not isinstance(arrays, Mapping):
            raise Invalid(
                f"weights are a {type(arrays).__name__}, but they must be a mapping from name to array."
            )
        self._arrays = {name: _in_memory(name, value) for name, value in arrays.items()}
        super().__init__(config)

    def stored_names(self) -> Iterator[str]:
        return iter(self._arrays)

    def stored_dtype(self, name: str) -> str:
        array = self._arrays[name]
        if isinstance(array, Stored):
            return array.dtype
        if array.dtype.kind == "c":
            return "F64"  # a test's complex step; what it perturbs is real
        return Stored.of(array, f"tensor {name}").dtype

    def stored_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._arrays[name].shape)

    def stored_codes(self, name: str) -> Array:
        array = self._arrays[name]
        return array.get(f"tensor {name}") if isinstance(array, Stored) else array

    def stored_value(self, name: str) -> Array:
        array = self._arrays[name]
        return super().stored_value(name) if isinstance(array, Stored) else array


def _in_memory(name: str, value: Any) -> Array | Stored:
    """A weight that the caller holds: what NumPy makes an array of numbers of, bfloat16 as float32."""
    if isinstance(value, Stored):
        return value
    try:
        array = np.asarray(value)
    except (ValueError, TypeError):
        raise Invalid(f"tensor {name} is ragged or unreadable, but it must be an array of numbers.") from None
    if array.dtype.name == "bfloat16":
        return array.astype(np.float32)
    if array.dtype.kind not in "fiubc" and not array.dtype.name.startswith("float8"):
        raise Invalid(f"tensor {name} has the type {array.dtype}, but it must be an array of numbers.")
    return array


class FolderWeights(Weights):
    """Weights in the safetensors files of a folder; a tensor is read when it is asked for, and not kept."""

    def __init__(self, config: ModelConfig, files: Mapping[str, TensorFile]) -> None:
        self._files = dict(files)
        super().__init__(config)

    def stored_names(self) -> Iterator[str]:
        return iter(self._files)

    def stored_dtype(self, name: str) -> str:
        return self._files[name].dtype(name)

    def stored_shape(self, name: str) -> tuple[int, ...]:
        return self._files[name].shape(name)

    def stored_codes(self, name: str) -> Array:
        return self._files[name].codes(name)

    def slice(self, name: str, start: int, count: int) -> Array:
        stored = self._there(name)
        refusal = self.refusal(stored, self.shape(name))
        if refusal is not None:
            raise refusal
        value: Array = self._files[stored].slice(stored, start, count)
        if self.is_quantised(stored):
            block, scales = self.config.fp8_block, self[f"{stored}{fp8.SUFFIX}"]
            assert block is not None  # or it would have been refused
            value = fp8.elements(value, scales, block, self.shape(stored)[1], start)
            value = fp8.rounded(value, self.fp8_rounding)
        require_finite(f"{stored} from element {start}", value)
        return value
