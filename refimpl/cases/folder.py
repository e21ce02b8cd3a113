"""Reading and writing case folders.  SPEC CASE-3, CASE-4.

A folder is written under a temporary name and renamed when it is complete.  What is read is checked: file
sizes by the safetensors codec before anything is allocated, shapes and digests against case.json.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Mapping
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
from refimpl.checkpoint.dtypes import DTYPES, Stored
from refimpl.errors import Unreadable
from refimpl.numerics import generator
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.formats import BF16, E4M3, E4M3FNUZ, E5M2, E5M2FNUZ, FP16, FP32, UE8M0, encode

WHOLE = 1 << 14  # elements of all generated inputs, or all generated weights, up to which they are committed
SAMPLES = 128  # elements that are kept of an output
KEPT_OUTPUT = 256  # elements of an output up to which it is kept whole
KEPT_BITS = 512  # the same where bits are compared
KEPT_SCHEDULE = 1024  # and of the orders of schedules

FORMAT_OF = {  # the number formats that a safetensors file names
    "F32": FP32,
    "BF16": BF16,
    "F16": FP16,
    "F8_E4M3": E4M3,
    "F8_E5M2": E5M2,
    "F8_E4M3FNUZ": E4M3FNUZ,
    "F8_E5M2FNUZ": E5M2FNUZ,
    "F8_E8M0": UE8M0,
}


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

    def given_codes(self, t: Tensor) -> Array:
        """An input of a case of kind bits as codes.  Raises Unreadable."""
        if t.name in self.inputs:
            codes = codes_in(self.inputs, t.name)
        elif t.generator is not None:
            codes = generated_codes(t.shape, t.generator, t.dtype)
        else:
            raise Unreadable(
                f"{self.path}: input {t.name} is in no file and has no generator; one is required."
            )
        if codes.shape != t.shape or format.digest(codes, t.dtype) != t.sha256:
            raise Unreadable(f"{self.path}: input {t.name} is not the tensor that case.json describes.")
        return codes

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
        return self._judged(t, lambda name: self.expected[name])

    def judged_codes(self, t: Tensor) -> tuple[Array, Array | None]:
        """The same as codes: unsigned integers, or integers of an integer type.  Raises Unreadable."""
        return self._judged(t, lambda name: codes_in(self.expected, name))

    def _judged(self, t: Tensor, read: Callable[[str], Array]) -> tuple[Array, Array | None]:
        if t.name in self.expected:
            whole = read(t.name)
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
        values, at = read(some), self.expected[index]
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
    lacking = {"seed", "stream", "key", "high" if "low" in how else "scale"} - how.keys()
    if lacking:
        raise Unreadable(f"a generator has no {min(lacking)}, but it must have it.")
    seed, stream = how["seed"], how["stream"]
    if generator.tensor_key(seed, stream).hex() != how["key"]:
        raise Unreadable(
            f"the key of stream {stream} is {how['key']}, but it must be that of its seed and name."
        )
    if "low" in how:
        drawn = generator.integers(seed, stream, shape, how["low"], how["high"])
        return drawn * float(how["scale"]) if "scale" in how else drawn
    values = generator.tensor(seed, stream, shape, how["scale"], how.get("fields", 1), how.get("offset", 0.0))
    if "blocks" in how:
        values = values * _of_blocks(seed, stream, shape, how["blocks"])
    return values.astype(np.float32).astype(np.float64) if how.get("round") == "F32" else values


def _of_blocks(seed: int, stream: str, shape: tuple[int, ...], count: int) -> Array:
    """2^-k of each element (..., C): one k for each block of 128x128 of the matrix (rows, C)."""
    rows, columns = int(np.prod(shape[:-1], dtype=np.int64)), shape[-1]
    grid = (-(-rows // 128), -(-columns // 128))
    k = generator.integers(seed, f"{stream} blocks", grid, 0, count)
    spread = np.repeat(np.repeat(k, 128, axis=0)[:rows], 128, axis=1)[:, :columns]
    return np.ldexp(1.0, -spread).reshape(shape)


def codes_in(file: Mapping[str, Array], name: str) -> Array:
    """A stored tensor as codes: floating-point types as unsigned integers of their width."""
    assert isinstance(file, safetensors.TensorFile)
    return as_codes(file.codes(name))


def as_codes(array: Array) -> Array:
    """The bits of floating-point numbers; integers as they are."""
    return array.view(f"<u{array.dtype.itemsize}") if array.dtype.kind == "f" else array


def generated_codes(shape: tuple[int, ...], how: Mapping[str, Any], dtype: str) -> Array:
    """The codes that a `generator` of case.json describes: integers without a scale are codes themselves,
    values are rounded to nearest."""
    kind = DTYPES[dtype].codes
    unsigned = np.dtype(f"<u{kind.itemsize}")
    if ("exponents" in how) != ("fractions" in how):
        raise Unreadable("a generator has exponents or fractions, but it must have both or neither.")
    if "first" in how:
        return np.arange(how["first"], how["first"] + int(np.prod(shape)), dtype=unsigned).reshape(shape)
    if "exponents" in how:
        signs = np.array([0, 1 << 31], np.uint32)[:, None, None]
        exponents = np.array(how["exponents"], np.uint32)[:, None] << np.uint32(23)
        classes = (signs | exponents | np.array(how["fractions"], np.uint32)).reshape(-1)
        if shape != classes.shape:
            raise Unreadable(f"a generator makes {classes.size} codes, but the shape {shape} is required.")
        return classes
    if "low" in how and "scale" not in how:
        drawn = generated(shape, how)
        return drawn.astype(kind if kind.kind == "i" else unsigned)
    return encode(generated(shape, how), FORMAT_OF[dtype])


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
            index = sample_positions(t.name, t.size)[: t.samples]
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
