"""Reading and writing case folders.  SPEC CASE-3, CASE-4.

A folder is written under a temporary name and renamed when it is complete.  What is read is checked: file
sizes by the safetensors codec before anything is allocated, shapes and digests against case.json.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.cases import format
from refimpl.cases.format import EXPECTED, INPUTS, Case, Tensor
from refimpl.checkpoint import safetensors
from refimpl.checkpoint.atomic import write_bytes
from refimpl.checkpoint.dtypes import Stored
from refimpl.errors import Unreadable
from refimpl.numerics import generator
from refimpl.numerics.arithmetic import Array

WHOLE = 1 << 14  # elements of all generated inputs, or all generated weights, up to which they are committed
SAMPLES = 128  # elements that are kept of an output
KEPT_OUTPUT = 256  # elements of an output up to which it is kept whole


@dataclass(frozen=True)
class Folder:
    """A case folder that is read lazily."""

    path: Path
    case: Case

    @classmethod
    def open(cls, path: str | Path) -> Folder:
        """Raises Unreadable."""
        folder = Path(path)
        return cls(folder, format.read(folder))

    @cached_property
    def inputs(self) -> Mapping[str, Array]:
        return _file(self.path / INPUTS)

    @cached_property
    def expected(self) -> Mapping[str, Array]:
        return _file(self.path / EXPECTED)

    def given(self, t: Tensor) -> Array:
        """An input or weight, from whichever of its places has it, float64, int64 or bool.  Raises
        Unreadable."""
        array = self._find(t)
        if array.shape != t.shape:
            raise Unreadable(
                f"{self.path}: tensor {t.name} has shape {array.shape}, but {t.shape} is required."
            )
        if format.digest(array, t.dtype) != t.sha256:
            raise Unreadable(f"{self.path}: tensor {t.name} has another SHA-256 than case.json says.")
        return array.astype(np.float64) if t.dtype in ("BF16", "F32") else array

    def _find(self, t: Tensor) -> Array:
        if t.name in self.inputs:
            return self.inputs[t.name]
        if t.asset:
            shared = self.path.parent.parent / "assets" / f"{t.asset}.safetensors"
            if shared.is_file():
                return _file(shared)[t.name]
        if t.generator is None:
            raise Unreadable(
                f"{self.path}: tensor {t.name} is in no file and has no generator; one is required."
            )
        return generated(t.shape, t.generator)

    def judged(self, t: Tensor) -> tuple[Array, Array | None]:
        """(elements, their flat positions or None for all of them) of an expected output, flat.  Raises
        Unreadable."""
        if t.name in self.expected:
            whole = self.expected[t.name]
            if whole.shape != t.shape or format.digest(whole, t.dtype) != t.sha256:
                raise Unreadable(
                    f"{self.path}: expected {t.name} is not the tensor that case.json describes."
                )
            return whole.reshape(-1), None
        some, index = f"samples/{t.name}", f"index/{t.name}"
        if some not in self.expected or index not in self.expected:
            raise Unreadable(
                f"{self.path / EXPECTED} has no tensor {t.name}, but it must have it or its samples."
            )
        values, at = self.expected[some], self.expected[index]
        fits = values.ndim == 1 and values.shape == at.shape and at.dtype.kind == "i" and at.size > 0
        if not fits or at.min() < 0 or at.max() >= t.size:
            raise Unreadable(f"{self.path / EXPECTED}: samples of {t.name} do not fit its shape {t.shape}.")
        return values, at

    def extra(self, t: Tensor, kind: str) -> Array | None:
        """What judges a tensor, float64, for the judged elements or per row; None when it is all zeros."""
        name = f"{kind}/{t.name}"
        if kind not in t.extras:
            return None
        if name not in self.expected:
            raise Unreadable(f"{self.path / EXPECTED} has no tensor {name}, but case.json lists it.")
        return self.expected[name].astype(np.float64)


def generated(shape: tuple[int, ...], how: Mapping[str, Any]) -> Array:
    """The tensor that a `generator` of case.json describes."""
    seed, stream = how["seed"], how["stream"]
    if generator.tensor_key(seed, stream).hex() != how["key"]:
        raise Unreadable(
            f"the key of stream {stream} is {how['key']}, but it must be that of its seed and name."
        )
    if "low" in how:
        drawn = generator.integers(seed, stream, shape, how["low"], how["high"])
        return drawn * float(how["scale"]) if "scale" in how else drawn
    values = generator.tensor(seed, stream, shape, how["scale"], how.get("fields", 1), how.get("offset", 0.0))
    return values.astype(np.float32).astype(np.float64) if how.get("round") == "F32" else values


def sample_positions(name: str, size: int) -> Array:
    """Which elements are kept of a large output, ascending; at most SAMPLES."""
    drawn = generator.integers(0, f"samples {name}", (SAMPLES,), 0, size)
    return np.unique(drawn)


def write(
    root: Path,
    case: Case,
    given: Mapping[str, Array],
    expected: Mapping[str, Array],
    extras: Mapping[str, Array],
    whole: bool,
) -> None:
    """Write a case below root, complete or not at all.  Raises Unreadable."""
    target = root / case.id
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise Unreadable(
                f"{temporary.parent} cannot be written ({error.strerror}), but it must be a writable folder."
            ) from None
        files = contents(case, given, expected, extras, whole)
        for name, tensors in files.items():
            safetensors.write(temporary / name, tensors)
        write_bytes(temporary / format.CASE, case.to_json().encode())
        _swap(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_asset(root: Path, name: str, weights: Mapping[str, Stored]) -> None:
    """Write shared weights, unless they are there.  Raises Unreadable."""
    path = root / "assets" / f"{name}.safetensors"
    if path.is_file():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unreadable(
            f"{path.parent} cannot be made ({error.strerror}), but it must be a writable folder."
        ) from None
    safetensors.write(path, weights)


def contents(
    case: Case,
    given: Mapping[str, Array],
    expected: Mapping[str, Array],
    extras: Mapping[str, Array],
    whole: bool,
) -> dict[str, dict[str, Array | Stored]]:
    """File name -> tensors, as they are written."""
    inputs: dict[str, Array | Stored] = {}
    outputs: dict[str, Array | Stored] = {}
    for t in case.tensors:
        if t.given:
            if t.asset is None and (whole or t.generator is None or _few(case, t.role)):
                inputs[t.name] = stored(given[t.name], t.dtype)
            continue
        if t.samples is None or whole:
            outputs[t.name] = stored(expected[t.name], t.dtype)
        else:
            index = sample_positions(t.name, t.size)
            outputs[f"samples/{t.name}"] = stored(expected[t.name].reshape(-1)[index], t.dtype)
            outputs[f"index/{t.name}"] = index.astype(np.int32 if t.size < 1 << 31 else np.int64)
        for kind in t.extras:
            array = extras[f"{kind}/{t.name}"]
            if t.samples is not None and not whole and array.shape == t.shape:
                array = array.reshape(-1)[index]
            outputs[f"{kind}/{t.name}"] = stored(array, "F64" if kind == "margin" else "BF16")
    return {INPUTS: inputs, EXPECTED: outputs} if case.outputs else {INPUTS: inputs}


def _few(case: Case, role: str) -> bool:
    return sum(t.size for t in case.tensors if t.role == role and t.generator is not None) <= WHOLE


def stored(array: Array, dtype: str) -> Stored:
    """A tensor as it goes to a file."""
    return Stored(dtype, array.shape, format.encode(array, dtype))


def _file(path: Path) -> Mapping[str, Array]:
    return safetensors.open_file(path) if path.exists() else {}


def _swap(new: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
    except OSError as error:
        if old.exists() and not target.exists():
            with suppress(OSError):
                os.rename(old, target)
        raise Unreadable(
            f"{target} cannot be replaced ({error.strerror}), but it must be in a writable folder."
        ) from None
    shutil.rmtree(old, ignore_errors=True)
