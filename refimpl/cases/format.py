"""Golden cases on disk: what case.json says, as dataclasses.  SPEC CASE-1 to CASE-6.

    <suite>/<case>/case.json              everything about the case but numbers
    <suite>/<case>/inputs.safetensors     inputs, and weights that are the case's own
    <suite>/<case>/expected.safetensors   the exact outputs, and what bounds their errors
    assets/<sha256>.safetensors           weights that several cases share

A tensor that the generator makes need not be in a file: its key and parameters are in case.json.  A large
output may be kept as samples: `samples/NAME` are its elements at the flat positions `index/NAME`.  What
judges a tensor is beside it as `KIND/NAME`; what is absent is zero:

    bound.storage, bound.product, bound.accumulate     what an element may be off per unit of each roundoff:
    of the
                                                       tensor's shape, or with a last axis of 1 for whole rows
    margin                                             of a set: how far the decision of a row is from
    another one doubt.storage, doubt.product, doubt.accumulate     of a set: the bound of what decides, per
    row

Tensors are hashed, never files.  Nothing in a case names a path.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import numpy as np

from refimpl.cases import schema
from refimpl.cases.claims import BITS
from refimpl.checkpoint.dtypes import DTYPES, bf16_codes
from refimpl.config.jsonfile import read_object
from refimpl.errors import Invalid, Unreadable
from refimpl.numerics.arithmetic import Array

FORMAT: Final = 1
LIMIT: Final = 4 << 20  # bytes of a case.json
CASE, INPUTS, EXPECTED = "case.json", "inputs.safetensors", "expected.safetensors"
INPUT, WEIGHT, REQUIRED, PROBE = "input", "weight", "required", "probe"
UNCAPPED: Final = (1.0, 1.0, 1.0)  # of element, spread and bias
NAN_TYPES: Final = ("F32", "BF16", "F16")  # of which a case may allow any NaN
_KINDS = {"F64": "<f8", "F32": "<f4", "I64": "<i8", "I32": "<i4", "BOOL": "?"}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a case; the fields are those of the schema."""

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    asset: str | None = None
    generator: Mapping[str, Any] | None = None
    samples: int | None = None
    layouts: tuple[str, ...] = ()
    set: bool = False
    ordered_by: str | None = None
    decided_by: tuple[str, ...] = ()
    below: int | None = None
    spread: tuple[float, float, float] | None = None
    bias: tuple[float, float, float] | None = None
    unjudged: tuple[str, ...] = ()
    largest: Mapping[str, float] = field(default_factory=dict)
    cap: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    within: tuple[float, float, float] | None = None
    margins: tuple[float, float] | None = None
    any_nan: int | None = None
    instead_of: str | None = None
    one_of: tuple[int, ...] = ()
    extras: Mapping[str, str] = field(default_factory=dict)

    @property
    def given(self) -> bool:
        return self.role in (INPUT, WEIGHT)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Case:
    """A case.json."""

    id: str
    kind: str
    outcome: str
    title: str
    clauses: tuple[str, ...]
    component: str
    backward: bool
    config: Mapping[str, Any]
    choices: Mapping[str, Any]
    flags: tuple[Mapping[str, str], ...]
    claims: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    certificate: Mapping[str, Any]
    path: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    twin: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    tolerance: Mapping[str, Any] | None = None
    fingerprint: Mapping[str, Any] | None = None

    @property
    def by_bits(self) -> bool:
        """Whether its outputs are compared exactly, and not within tolerances."""
        return self.claims == (BITS,)

    def tensor(self, name: str) -> Tensor:
        return next(t for t in self.tensors if t.name == name)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """What a port computes, in the order of computation."""
        return tuple(t for t in self.tensors if not t.given)

    def to_json(self) -> str:
        """Canonical text: the same case always gives the same bytes."""
        head = (
            "id",
            "kind",
            "outcome",
            "title",
            "reason",
            "clauses",
            "component",
            "path",
            "backward",
            "config",
        )
        order = (
            *head,
            "choices",
            "arguments",
            "twin",
            "flags",
            "claims",
            "refused",
            "tolerance",
            "fingerprint",
        )
        value: dict[str, Any] = {"format": FORMAT}
        for name in (*order, "tensors", "certificate"):
            given = getattr(self, name)
            if given is None or (name in ("path", "arguments", "refused") and not given):
                continue
            value[name] = [_tensor_json(t) for t in given] if name == "tensors" else given
        return pretty(value) + "\n"

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], what: str) -> Case:
        """Raises Unreadable for what breaks the schema or the rules between fields."""
        fault = schema.first_fault(given, schema.shipped("schema.json"))
        if fault is not None:
            raise Unreadable(f"{what}: {fault}.")
        values = {key: value for key, value in given.items() if key != "format"}
        for key in ("clauses", "claims", "flags"):
            values[key] = tuple(values[key])
        values["tensors"] = tuple(_tensor(item) for item in given["tensors"])
        case = cls(**values)
        _check(case, what)
        return case


def read(folder: str | Path) -> Case:
    """The case of a folder.  Raises Unreadable."""
    path = Path(folder) / CASE
    return Case.from_dict(read_object(path, LIMIT), str(path))


def cases(root: str | Path, suites: Iterable[str] = ()) -> list[Path]:
    """The case folders below a root, sorted; only those of the named suites, if any.  Raises Unreadable."""
    base = Path(root)
    wanted = set(suites)
    try:
        found = sorted(p.parent for p in base.glob(f"*/*/{CASE}") if not p.parent.name.startswith("."))
    except OSError as error:
        raise Unreadable(
            f"{base} cannot be read ({error.strerror}), but it must be a folder of cases."
        ) from None
    if not base.is_dir():
        raise Unreadable(f"{base} is not a folder, but it must be one of golden cases.")
    return [p for p in found if not wanted or p.parent.name in wanted]


def digest(array: Array, dtype: str) -> str:
    """SHA-256 of the tensor's little-endian bytes in C order.  Raises Invalid for values that dtype has
    not."""
    return hashlib.sha256(np.ascontiguousarray(encode(array, dtype)).tobytes()).hexdigest()


def encode(array: Array, dtype: str) -> Array:
    """The array as it is stored: values, or unsigned integers, which are codes of dtype as they are.

    Raises Invalid for values that dtype has not.
    """
    codes = DTYPES[dtype].codes
    if array.dtype.kind == "u" and dtype != "I64":
        if array.dtype.itemsize != codes.itemsize:
            raise Invalid(f"codes of {dtype} are {array.dtype}, but they must have {codes.itemsize} bytes.")
        return array.astype(array.dtype.newbyteorder("<"), copy=False).view(codes)
    if dtype == "BF16":
        return bf16_codes(np.asarray(array)).astype("<u2", copy=False)
    coded = np.asarray(array).astype(_KINDS[dtype])
    if not np.array_equal(coded, array, equal_nan=dtype in ("F64", "F32")):
        raise Invalid(f"an array has values that are not exact in {dtype}.")
    return coded


def upwards(array: Array) -> Array:
    """The smallest bf16 values that are not below those of a float64 array >= 0, as float64."""
    single = np.asarray(array, np.float64).astype(np.float32)
    single = np.where(single < array, np.nextafter(single, np.float32(np.inf)), single)
    codes = ((single.view(np.uint32).astype(np.uint64) + 0xFFFF) >> np.uint64(16)).astype(np.uint32)
    return (codes << np.uint32(16)).view(np.float32).astype(np.float64)


def asset_name(weights: Iterable[Tensor]) -> str:
    """The SHA-256 of the lines `name sha256`, sorted, which names the file of shared weights."""
    lines = sorted(f"{t.name} {t.sha256}\n" for t in weights)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def pretty(value: Any, indent: int = 0) -> str:
    """JSON in reading order: what fits is on one line, the rest is indented by one space."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if len(line) + indent <= 140 or not isinstance(value, dict | list | tuple) or not value:
        return line
    pad = " " * (indent + 1)
    if isinstance(value, dict):
        inner = [
            f"{pad}{json.dumps(k, ensure_ascii=False)}: {pretty(v, indent + 1)}" for k, v in value.items()
        ]
        return "{\n" + ",\n".join(inner) + "\n" + " " * indent + "}"
    inner = [pad + pretty(item, indent + 1) for item in value]
    return "[\n" + ",\n".join(inner) + "\n" + " " * indent + "]"


def _tensor_json(t: Tensor) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for entry in fields(t):
        given = getattr(t, entry.name)
        required = entry.name in ("name", "role", "dtype", "shape", "sha256")
        if required or (given is not None and given is not False and given != () and given != {}):
            value[entry.name] = given
    return value


def _tensor(given: Mapping[str, Any]) -> Tensor:
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    values["cap"] = {claim: tuple(factors) for claim, factors in given.get("cap", {}).items()}
    return Tensor(**values)


def _check(case: Case, what: str) -> None:
    names = [t.name for t in case.tensors]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise Unreadable(f"{what}: tensor {twice} is listed twice, but each must be listed once.")
    known = {t.name: t for t in case.tensors}
    for t in case.tensors:
        for other in (*t.decided_by, *([t.ordered_by] if t.ordered_by else [])):
            if other not in known or not known[other].set:
                raise Unreadable(
                    f"{what}: tensor {t.name} refers to {other}, which must be a set of the case."
                )
        if t.any_nan is not None and t.dtype not in NAN_TYPES:
            raise Unreadable(f"{what}: tensor {t.name} is {t.dtype}, but any_nan must be of a float type.")
    if (case.outcome == "reject") != (case.kind == "reject"):
        raise Unreadable(
            f"{what}: kind {case.kind} has outcome {case.outcome}, but reject must go with reject."
        )
    if case.fingerprint is not None:
        _check_fingerprint(case, what)
    if case.outcome == "reject" and case.outputs:
        raise Unreadable(f"{what}: a reject case has outputs, but it must have inputs only.")


def _check_fingerprint(case: Case, what: str) -> None:
    assert case.fingerprint is not None
    names, positions = {t.name for t in case.outputs}, case.fingerprint["positions"]
    for alternative in case.fingerprint["alternatives"]:
        counts = {name: len(bits) for name, bits in alternative["bits"].items()}
        if alternative["sha256"].keys() != names or counts != {n: len(at) for n, at in positions.items()}:
            raise Unreadable(
                f"{what}: alternative {alternative['name']} must have a digest of every output, and bits at "
                f"every position."
            )
    for t in case.outputs:
        at = positions.get(t.name)
        if (at is None and t.instead_of is None) or any(i >= t.size for i in at or ()):
            raise Unreadable(
                f"{what}: positions must be given for {t.name}, and lie in its {t.size} elements."
            )
