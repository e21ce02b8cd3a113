"""An output of a port against a case of kind `schedule`, in words.  SPEC VERDICT-23.

Integers have to be equal, in any integer type; -1 behind the last entry of a rank may be there or not.  The
case is computed again, so that the first difference can be named where its folder has only samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from refimpl.cases import exact, format, instruments
from refimpl.cases.folder import Folder
from refimpl.cases.format import INPUT, Tensor
from refimpl.cases.instruments import Data
from refimpl.checkpoint.safetensors import TensorFile
from refimpl.errors import Unreadable
from refimpl.numerics.arithmetic import Array
from refimpl.pipeline import arrays
from refimpl.validate.output import INTEGERS
from refimpl.validate.tensor import HOLDS, MALFORMED, OFF, TensorVerdict

_POSITIONS = {"order": 1, "start": 2}  # the axis of positions, which may be longer than is needed


class Expected:
    """What a case of the components `plan` and `legality` asks for, whole."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    @cached_property
    def data(self) -> Data:
        tensors = [t for t in self._folder.case.tensors if t.role == INPUT]
        codes = {t.name: self._folder.given_codes(t) for t in tensors}
        return Data(codes, {t.name: t.dtype for t in tensors}, self._folder.case.arguments)

    @cached_property
    def outputs(self) -> Mapping[str, Array]:
        case = self._folder.case
        try:
            found = instruments.run(case.component, self.data)
        except (KeyError, TypeError, ValueError) as error:
            raise Unreadable(
                f"{self._folder.path}: component {case.component} cannot be computed from its arguments "
                f"({type(error).__name__}: {error}), but it must be plan or legality with all of theirs."
            ) from None
        return {name: out.array for name, out in found.items()}

    def of(self, t: Tensor) -> Array:
        """Raises Unreadable where this version computes something else than the case has."""
        ours = self.outputs.get(t.name)
        if ours is None or format.digest(ours, t.dtype) != t.sha256:
            raise Unreadable(
                f"{self._folder.path}: {t.name} is not what is computed here, but it must be the same bits."
            )
        return ours.astype(np.int64)


def judge(expected: Expected, t: Tensor, given: TensorFile) -> TensorVerdict:
    """given: the port's file, which has the tensor.  Raises Unreadable."""
    dtype, shape = given.dtype(t.name), given.shape(t.name)
    if dtype not in INTEGERS:
        return TensorVerdict(t.name, t.role, MALFORMED, f"dtype {dtype} instead of an integer type")
    axis = _POSITIONS.get(t.name)
    if len(shape) != len(t.shape) or any(
        a != b for i, (a, b) in enumerate(zip(shape, t.shape, strict=True)) if i != axis
    ):
        return TensorVerdict(t.name, t.role, MALFORMED, f"shape {shape} instead of {t.shape}")
    ours, theirs = expected.of(t), given[t.name].astype(np.int64)
    if t.one_of:
        found = exact.compare(t, ours, None, theirs)
        right = " or ".join(map(str, t.one_of))
        note = "" if found.holds else f"rank {found.theirs} is named instead of {right}"
        return TensorVerdict(t.name, t.role, HOLDS if found.holds else OFF, note)
    if axis is not None:
        length = max(shape[axis], t.shape[axis])
        ours, theirs = (_lengthened(x, axis, length) for x in (ours, theirs))
    differ = ours != theirs
    if t.name == "order":
        differ = differ.any(-1)
    if not differ.any():
        return TensorVerdict(t.name, t.role, HOLDS)
    at = tuple(int(i) for i in np.unravel_index(int(np.argmax(differ)), differ.shape))
    count = f"; {np.count_nonzero(differ)} of {differ.size} differ" if differ.size > 1 else ""
    note = f"{_words(expected, t.name, at, ours[at], theirs[at])}{count}"
    return TensorVerdict(t.name, t.role, OFF, note, at)


def _lengthened(x: Array, axis: int, length: int) -> Array:
    missing = [(0, length - n if i == axis else 0) for i, n in enumerate(x.shape)]
    return np.pad(x, missing, constant_values=arrays.NONE)


def _words(expected: Expected, name: str, at: tuple[int, ...], ours: Array, theirs: Array) -> str:
    """The first difference: where, what is there, and what has to be."""
    if name == "order":
        there, right = arrays.words(theirs.tolist()), arrays.words(ours.tolist())
        return f"rank {at[0]}, position {at[1]}: {there} instead of {right}"
    values = f"{theirs} instead of {ours}"
    if name == "illegal":
        found = arrays.findings(expected.data.codes, expected.data.arguments)
        return f"{values}: {found[0].text.removesuffix('.') if found else 'no rule is broken'}"
    if name == "copies":
        return f"stage {at[0]}: {values}"
    where = []
    if name in arrays.PER_DURATIONS:
        where, at = [f"durations {at[0]}"], at[1:]
    if at:
        where.append(f"rank {at[0]}")
    if name == "start":
        rows = expected.outputs["order"][at[0]]
        done = arrays.words(rows[at[1]].tolist()) if at[1] < len(rows) else "nothing"
        where.append(f"position {at[1]} ({done})")
    return f"{', '.join(where)}: {values}"
