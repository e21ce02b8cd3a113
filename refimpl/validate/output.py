"""What a port wrote, which is not trusted.  SPEC VERDICT-1, VERDICT-14.

A file is opened only if it is a regular file of a size that the case could need; tensors are read one by one,
and only those that the case knows, in the shape and the class of type that it demands.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from refimpl.cases.format import Case, Tensor
from refimpl.checkpoint import safetensors
from refimpl.checkpoint.safetensors import TensorFile
from refimpl.errors import Unreadable
from refimpl.numerics.arithmetic import Array

FLOATS: Final = frozenset({"F64", "F32", "BF16", "F16"})
INTEGERS: Final = frozenset({"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8"})
SPARE: Final = 64 << 20  # bytes that a file may have beyond what the case asks for: names, surplus tensors


class Output:
    """A port's tensors by the names of a case."""

    def __init__(self, case: Case, given: TensorFile) -> None:
        self._tensors: Mapping[str, Tensor] = {t.name: t for t in case.outputs}
        self._known = {t.name for t in case.tensors}
        self._file = given
        self._arrays: dict[str, Array] = {}
        self._sets: dict[str, Array | None] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._file

    @property
    def surplus(self) -> tuple[str, ...]:
        """Names that the case does not know."""
        return tuple(sorted(name for name in self._file if name not in self._known))

    def fault(self, t: Tensor) -> str | None:
        """What keeps a tensor from being compared."""
        dtype, shape = self._file.dtype(t.name), self._file.shape(t.name)
        wanted = INTEGERS if t.dtype == "I64" else FLOATS
        if dtype not in wanted:
            return f"dtype {dtype} instead of one of {', '.join(sorted(wanted))}"
        if shape != t.shape:
            return f"shape {shape} instead of {t.shape}"
        return None

    def array(self, t: Tensor) -> Array:
        """float64 or int64, of a tensor without a fault.  Raises Unreadable."""
        if t.name not in self._arrays:
            self._arrays[t.name] = self._file[t.name].astype(np.int64 if t.dtype == "I64" else np.float64)
        return self._arrays[t.name]

    def sets(self, name: str) -> Array | None:
        """The port's own sets, when they are there and are sets."""
        if name not in self._sets:
            t = self._tensors[name]
            usable = name in self._file and self.fault(t) is None
            value = self.array(t) if usable else None
            self._sets[name] = None if value is None or not_sets(t, value) else value
        return self._sets[name]


def not_sets(t: Tensor, value: Array) -> str | None:
    """Why rows are no sets of ids; None if they are."""
    if t.below is not None and value.size and (value.min() < 0 or value.max() >= t.below):
        return f"ids from {value.min()} to {value.max()} instead of 0 to {t.below - 1}"
    ordered = np.sort(value, -1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        return "an id is twice in a row"
    return None


def largest(case: Case) -> int:
    """Bytes that an output of the case may have: every tensor in float64, twice, and SPARE."""
    return SPARE + 16 * sum(t.size for t in case.outputs)


def open_output(case: Case, path: Path) -> TensorFile:
    """The file, its header checked.  Raises Unreadable, and Unsupported for a dtype that is not read here."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise Unreadable(
            f"{path} cannot be read ({error.strerror}), but it must be a safetensors file."
        ) from None
    if not stat.S_ISREG(found.st_mode):
        raise Unreadable(f"{path} is not a regular file, but it must be a safetensors file.")
    if found.st_size > largest(case):
        raise Unreadable(
            f"{path} has {found.st_size} bytes, but an output of {case.id} has at most {largest(case)}."
        )
    return safetensors.open_file(path)
