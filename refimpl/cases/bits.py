"""Cases of kind `bits`: rows of a table, and what is built of them.  SPEC CASE-12, CASE-18, CASE-19.

Inputs and outputs are codes: unsigned integers of the width of their type in the file, or integers.  Nothing
is rounded to judge them: the bits are the answer, but for the payload of a NaN where the case allows any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

import numpy as np

from refimpl.cases import exact, fingerprints, format, instruments, orders
from refimpl.cases.claims import BITS
from refimpl.cases.definition import SEED, Flag
from refimpl.cases.folder import KEPT_BITS, KEPT_SCHEDULE, as_codes, generated_codes, sample_positions
from refimpl.cases.format import INPUT, PROBE, REQUIRED, Case, Tensor
from refimpl.errors import Invalid
from refimpl.numerics import generator
from refimpl.numerics.arithmetic import Array

_TEXT: Final = "The bits are demanded."
_SCHEDULE_TEXT: Final = "All integers are demanded, in any integer type."
_KEPT: Final = {"bits": KEPT_BITS, "schedule": KEPT_SCHEDULE}  # elements up to which an output is kept whole
_NAN_TEXT: Final = "The bits are demanded; where ours is a NaN, any NaN is as good."


@dataclass(frozen=True)
class Drawn:
    """offset + scale * fields of the generator, rounded to nearest in `dtype`."""

    shape: tuple[int, ...]
    dtype: str = "F8_E4M3"
    scale: float = 1.0
    fields: int = 1
    offset: float = 0.0

    def made(self, stream: str) -> tuple[Array, dict[str, Any]]:
        how: dict[str, Any] = _stream(stream) | {"scale": self.scale}
        how |= {"fields": self.fields} if self.fields != 1 else {}
        how |= {"offset": self.offset} if self.offset else {}
        how |= {"round": self.dtype}
        return generated_codes(self.shape, how, self.dtype), how


@dataclass(frozen=True)
class Whole:
    """Integers in [low, high) from the generator: codes of `dtype`, or with a scale its values."""

    shape: tuple[int, ...]
    dtype: str
    low: int
    high: int
    scale: float | None = None

    def made(self, stream: str) -> tuple[Array, dict[str, Any]]:
        how: dict[str, Any] = _stream(stream) | {"low": self.low, "high": self.high}
        how |= {} if self.scale is None else {"scale": self.scale}
        return generated_codes(self.shape, how, self.dtype), how


@dataclass(frozen=True)
class Every:
    """All codes of a type of `bits` bits, in order."""

    bits: int
    dtype: str

    def made(self, stream: str) -> tuple[Array, dict[str, Any]]:
        how: dict[str, Any] = {"first": 0}
        return generated_codes((1 << self.bits,), how, self.dtype), how


@dataclass(frozen=True)
class Classes:
    """float32 codes of both signs, with every one of these exponent fields and of these fractions."""

    exponents: tuple[int, ...]
    fractions: tuple[int, ...]
    dtype: str = "F32"

    def made(self, stream: str) -> tuple[Array, dict[str, Any]]:
        how: dict[str, Any] = {"exponents": list(self.exponents), "fractions": list(self.fractions)}
        return generated_codes((2 * len(self.exponents) * len(self.fractions),), how, "F32"), how


@dataclass(frozen=True)
class Codes:
    """Codes written out."""

    codes: Array
    dtype: str

    def made(self, stream: str) -> tuple[Array, None]:
        return as_codes(np.ascontiguousarray(self.codes)), None


Source = Drawn | Whole | Every | Classes | Codes


@dataclass(frozen=True)
class Bits:
    """One case."""

    id: str  # suite/name
    title: str
    clauses: tuple[str, ...]
    component: str  # of `instruments`
    inputs: Mapping[str, Source]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    any_nan: bool = True  # of outputs of more than 8 bits; the NaN of codes is always exact
    streams: str | None = None  # the case whose inputs these are, if not its own
    flags: tuple[Flag, ...] = ()
    fingerprint: str | None = None  # of `fingerprints`

    kind: str = "bits"

    backward: ClassVar[bool] = False
    rejects: ClassVar[str | None] = None
    twin: ClassVar[str | None] = None

    @property
    def suite(self) -> str:
        return self.id.partition("/")[0]


def made(d: Bits) -> tuple[Case, dict[str, Array], dict[str, Array]]:
    """(case, inputs, outputs).  Raises Invalid for a definition that makes no good case."""
    given: dict[str, Array] = {}
    tensors: list[Tensor] = []
    for name, source in d.inputs.items():
        given[name], how = source.made(f"{d.streams or d.id} {name}")
        sha = format.digest(given[name], source.dtype)
        tensors.append(Tensor(name, INPUT, source.dtype, tuple(given[name].shape), sha, generator=how))
    data = instruments.Data(given, {name: source.dtype for name, source in d.inputs.items()}, d.arguments)
    table: Mapping[str, Any] | None = None
    if d.fingerprint:
        outputs, table = fingerprints.made(d.fingerprint, data, d.any_nan)
    else:
        outputs = instruments.run(d.component, data)
    expected = {name: exact.stored(out.array, out.dtype, d.any_nan) for name, out in outputs.items()}
    judged = [_output(d, name, out, expected[name]) for name, out in outputs.items()]
    allows = any(t.any_nan is not None for t in judged)
    text = _SCHEDULE_TEXT if d.kind == "schedule" else _NAN_TEXT if allows else _TEXT
    case = Case(
        id=d.id,
        kind=d.kind,
        outcome="values",
        title=d.title,
        clauses=d.clauses,
        component=d.component,
        backward=False,
        config={},
        choices={},
        flags=tuple(flag.to_json() for flag in d.flags),
        claims=(BITS,),
        tensors=(*tensors, *judged),
        certificate={"rejects": {}, "not_applicable": {}},
        arguments=d.arguments,
        tolerance={"derivation": "bits", "text": text},
        fingerprint=table,
    )
    return _certified(case, expected), given, expected


def _output(d: Bits, name: str, out: instruments.Out, codes: Array) -> Tensor:
    nan = exact.NAN_CODES.get(out.dtype) if d.any_nan else None
    return Tensor(
        name,
        PROBE if out.instead_of or out.probe else REQUIRED,
        out.dtype,
        tuple(codes.shape),
        format.digest(codes, out.dtype),
        samples=None if codes.size <= _KEPT[d.kind] else len(sample_positions(name, codes.size)),
        any_nan=nan,
        instead_of=out.instead_of,
        one_of=out.one_of,
    )


def _certified(case: Case, expected: Mapping[str, Array]) -> Case:
    """The case with the proof that it can fail: every wrong output is rejected.  SPEC CASE-10."""
    unfit: dict[str, dict[str, str]] = {}
    seen: set[str] = set()
    for t in case.outputs:
        right = expected[t.name]
        positions = None if t.samples is None else sample_positions(t.name, t.size)
        kept = right.reshape(-1) if positions is None else right.reshape(-1)[positions]
        spoiling = orders.spoiled if case.kind == "schedule" else exact.spoiled
        for wrong, spoiled in spoiling(right, t).items():
            if np.array_equal(spoiled, right):
                unfit.setdefault(t.name, {})[wrong] = "gives the right values"
                continue
            held = exact.compare(t, kept, positions, spoiled).holds
            if case.fingerprint is not None:
                held = fingerprints.fits(case.fingerprint, t, spoiled)
            if held and t.one_of:
                unfit.setdefault(t.name, {})[wrong] = "is as right"
                continue
            if held:
                raise Invalid(f"case {case.id}: the verdict would accept {t.name} when it is wrong: {wrong}.")
            seen.add(wrong)
    if not seen:
        raise Invalid(f"case {case.id} has no output that can be wrong.")
    rejects = {BITS: {wrong: "exact" for wrong in (*exact.WRONG, *orders.WRONG) if wrong in seen}}
    return replace(case, certificate={"rejects": rejects, "not_applicable": unfit})


def _stream(stream: str) -> dict[str, Any]:
    return {"seed": SEED, "stream": stream, "key": generator.tensor_key(SEED, stream).hex()}
