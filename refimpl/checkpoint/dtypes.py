"""The number formats of a safetensors file: how they are stored, and how they decode.  SPEC CKPT-2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from refimpl.errors import Invalid, Unsupported
from refimpl.numerics import casts, formats

Array = NDArray[Any]


def bf16_value(codes: Array) -> NDArray[np.float32]:
    """uint16 codes of bf16 -> float32, exactly: bf16 is the upper half of a float32."""
    return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bf16_codes(values: Array, what: str = "the array") -> NDArray[np.uint16]:
    """float values that bf16 has exactly -> uint16 codes.  Raises Invalid for a value that it has not."""
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(values, np.float32)
    codes = (single.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    exact = np.asarray(bf16_value(codes) == values) | np.isnan(values)
    if not exact.all():
        index = tuple(int(i) for i in np.argwhere(~exact)[0])
        raise Invalid(f"{what} has {values[index]!r} at {index}, but all values must be exact in bf16.")
    return codes | np.where(
        np.isnan(values), np.uint16(0x40), np.uint16(0)
    )  # a NaN keeps a bit of its payload


@dataclass(frozen=True)
class Dtype:
    """A number format: the array type of its codes, and its exact decoding.

    BF16 and FP8 decode to float32, what NumPy has to itself.
    """

    name: str
    codes: np.dtype[Any]
    decode: Callable[[Array], Array]


def _eight_bits(fmt: formats.Format) -> Callable[[Array], Array]:
    return lambda codes: casts.widen(codes, fmt)


def _native(codes: Array) -> Array:
    return codes.astype(codes.dtype.newbyteorder("="), copy=False)


# In the order in which the format's own writer sorts tensors (its enumeration, reversed): wide ones first.
DTYPES: Final[Mapping[str, Dtype]] = {
    name: Dtype(name, np.dtype(code), decode)
    for name, code, decode in (
        ("U64", "<u8", _native),
        ("I64", "<i8", _native),
        ("F64", "<f8", _native),
        ("F32", "<f4", _native),
        ("U32", "<u4", _native),
        ("I32", "<i4", _native),
        ("BF16", "<u2", bf16_value),
        ("F16", "<f2", _native),
        ("U16", "<u2", _native),
        ("I16", "<i2", _native),
        ("F8_E5M2FNUZ", "u1", _eight_bits(formats.E5M2FNUZ)),
        ("F8_E4M3FNUZ", "u1", _eight_bits(formats.E4M3FNUZ)),
        ("F8_E8M0", "u1", _eight_bits(formats.UE8M0)),
        ("F8_E4M3", "u1", _eight_bits(formats.E4M3)),
        ("F8_E5M2", "u1", _eight_bits(formats.E5M2)),
        ("I8", "i1", _native),
        ("U8", "u1", _native),
        ("BOOL", "?", _native),
    )
}
ORDER: Final = {name: index for index, name in enumerate(DTYPES)}
OTHERS: Final = frozenset({"F4", "F6_E2M3", "F6_E3M2", "C64"})  # in the format, not read

_PLAIN: Final = {d.codes: d for d in DTYPES.values() if d.decode is _native}


@dataclass(frozen=True)
class Stored:
    """A tensor to be written as codes of a named dtype; `codes` may be a function, called when needed."""

    dtype: str
    shape: tuple[int, ...]
    codes: Array | Callable[[], Array]

    @classmethod
    def of(cls, array: Array, what: str = "the array") -> Stored:
        """The array in its own type.  Raises Unsupported for types that the format has not."""
        dtype = _PLAIN.get(np.dtype(array.dtype).newbyteorder("<"))
        if dtype is None:
            raise Unsupported(
                f"{what} has the type {array.dtype}, but it must be one of {', '.join(DTYPES)}."
            )
        return cls(dtype.name, array.shape, array)

    @classmethod
    def bf16(cls, array: Array, what: str = "the array") -> Stored:
        """The array as BF16.  Raises Invalid for values that are not exact in it."""
        return cls("BF16", array.shape, bf16_codes(array, what))

    def get(self, what: str) -> Array:
        """The codes, little-endian and contiguous.  Raises Invalid if they are not what was declared."""
        if self.dtype not in DTYPES:
            raise Unsupported(
                f"{what} is declared as {self.dtype}, but it must be one of {', '.join(DTYPES)}."
            )
        codes = self.codes() if callable(self.codes) else self.codes
        wanted = DTYPES[self.dtype].codes
        if codes.shape != self.shape or codes.dtype.newbyteorder("<") != wanted:
            raise Invalid(
                f"{what} has codes {codes.dtype} {codes.shape}, "
                f"but {self.dtype} must have {wanted.name} {self.shape}."
            )
        return np.ascontiguousarray(codes, wanted).reshape(self.shape)
