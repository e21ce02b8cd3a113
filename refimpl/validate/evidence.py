"""An output of a port as evidence: its numbers beside those of the right program.  SPEC VERDICT-19.

A case is computed again in float64, without a change and with every candidate's.  All its tensors are one
long vector: of a large tensor the elements in which the port is off most, and others evenly spread.  A
distance is counted in deviations sigma of the program that is compared with, measured by runs with random
roundings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from refimpl import programs
from refimpl.cases.claims import Claim
from refimpl.cases.folder import Folder
from refimpl.cases.format import PROBE, Tensor
from refimpl.cases.setting import setting_of
from refimpl.errors import Error
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.floating import Floating
from refimpl.programs import Outputs, Setting
from refimpl.validate.jitter import Jittered
from refimpl.validate.output import Output, open_output
from refimpl.variants.variation import Change, unchanged

WORST, SPREAD = 768, 2048  # elements of a tensor that are compared: those that are off most, and others
SEEDS = (1, 2)  # of the runs with random roundings
FLOAT64 = Floating(np.float64)
IMPOSSIBLE = (Error, ValueError, IndexError, KeyError, ZeroDivisionError, TypeError, AttributeError)


@dataclass(frozen=True)
class Evidence:
    """A case, what a port wrote for it, and the choices that the port was seen to take."""

    folder: Folder
    output: Path
    change: Change = unchanged


@dataclass(frozen=True)
class Noise:
    """What the claim's roundings do to a program: sigma of every element, and rows of sets that they flip."""

    sigma: Array  # (n,)
    unstable: Mapping[str, Array]  # name of a set -> (T,) bool


class Exhibit:
    """Evidence that is ready to be compared.  Raises Unreadable."""

    def __init__(self, evidence: Evidence, claim: Claim) -> None:
        case = self.case = evidence.folder.case
        self.evidence = evidence
        self.claim = claim
        self.base = evidence.change(setting_of(evidence.folder, FLOAT64))
        right = self.outputs()
        assert right is not None
        self.right_outputs = right
        given = Output(case, open_output(case, evidence.output))
        usable = {t.name: t for t in case.outputs if t.name in given and given.fault(t) is None}
        self.sets = {n: t for n, t in usable.items() if t.set and given.sets(n) is not None}
        self.their_sets = {n: _rows(given.array(t)) for n, t in self.sets.items()}
        self.tensors = {n: t for n, t in usable.items() if t.dtype != "I64" and t.size}
        self.theirs = {n: given.array(t) for n, t in self.tensors.items()}
        self._flat = {n: self._dense(t, self.theirs[n], self.their_sets) for n, t in self.tensors.items()}
        self.places = {n: np.arange(value.size) for n, value in self._flat.items()}
        noise = self.noise(unchanged, right)
        assert noise is not None
        chosen = self._chosen(noise.sigma)
        starts = np.cumsum([0, *(len(at) for at in self.places.values())])
        kept = [start + at for start, at in zip(starts, chosen.values(), strict=False)]
        self.places = chosen
        self.right_noise = Noise(noise.sigma[np.concatenate(kept)] if kept else noise.sigma, noise.unstable)
        self.of = np.repeat(np.arange(len(self.tensors)), [len(at) for at in chosen.values()])
        self.port = self._layouts()
        self.right = self.vector(right)
        self._behind = self._gates()
        self.passed = self._right_probes()

    @property
    def size(self) -> int:
        """Compared elements."""
        return len(self.of)

    def outputs(self, change: Change = unchanged, ar: Floating = FLOAT64) -> Outputs | None:
        """The case with a change; None where the change makes it impossible."""
        try:
            with np.errstate(all="ignore"):
                setting: Setting = change(replace(self.base, ar=ar))
                found = programs.run(self.case.component, setting)
        except IMPOSSIBLE:
            return None
        for t in self.case.outputs:
            if t.name not in found or np.size(found[t.name]) != t.size:
                return None
        return found

    def vector(self, outputs: Outputs) -> Array:
        """(n,) the compared elements."""
        sets = {name: _rows(np.asarray(outputs[name])) for name in self._ordering(outputs)}
        parts = []
        for name, t in self.tensors.items():
            flat = self._dense(t, np.asarray(outputs[name], np.float64).reshape(t.shape), sets)
            parts.append(flat[self.places[name]])
        return np.concatenate(parts) if parts else np.zeros(0)

    def noise(self, change: Change, plain: Outputs) -> Noise | None:
        """Of the program with a change, whose outputs are given; None where it cannot be run so."""
        runs = [self.outputs(change, Jittered(self.claim, seed)) for seed in SEEDS]
        if any(run is None for run in runs):
            return None
        known = [run for run in runs if run is not None]
        unstable = {}
        for name in self._ordering(plain):
            own = np.sort(_rows(np.asarray(plain[name])), -1)
            others = [np.sort(_rows(np.asarray(run[name])), -1) for run in known]
            unstable[name] = np.any([np.any(own != other, -1) for other in others], 0)
        parts = [self._sigma(t, plain, known)[self.places[name]] for name, t in self.tensors.items()]
        return Noise(np.concatenate(parts) if parts else np.zeros(0), unstable)

    def agreeing(self, outputs: Outputs, noise: Noise) -> tuple[Array, dict[str, Array]]:
        """(elements (n,) that both sides can be expected to have computed from the same experts, set -> rows
        that differ although roundings do not flip them)."""
        keep, wrong = np.ones(self.size, bool), {}
        rows: dict[str, Array] = {}
        for name in self._ordering(outputs):
            unstable = noise.unstable[name]
            if name in self.their_sets:
                own = np.sort(_rows(np.asarray(outputs[name])), -1)
                differs = np.any(own != np.sort(self.their_sets[name], -1), -1)
                wrong[name] = differs & ~unstable
                rows[name] = ~(differs & unstable)
            else:
                rows[name] = ~unstable
        for name, at in self._behind.items():
            if name in rows:
                keep &= np.where(at >= 0, rows[name][at], True)
        return keep, wrong

    def _ordering(self, outputs: Outputs) -> list[str]:
        """The sets of experts that are decided in this case."""
        return [t.name for t in self.case.outputs if t.set and t.name in outputs]

    def _dense(self, t: Tensor, value: Array, sets: Mapping[str, Array]) -> Array:
        """Flat; weights of experts go to their expert's place, so that their order does not matter."""
        if t.ordered_by is None or t.ordered_by not in sets:
            return value.reshape(-1)
        ids = sets[t.ordered_by]
        dense = np.zeros((len(ids), self.case.tensor(t.ordered_by).below or int(ids.max()) + 1))
        np.put_along_axis(dense, ids, value.reshape(ids.shape), -1)
        return dense.reshape(-1)

    def _sigma(self, t: Tensor, plain: Outputs, runs: list[Outputs]) -> Array:
        """Flat, of the tensor as it is compared: of the row, for the rows' noise is known from two runs."""

        def dense(outputs: Outputs) -> Array:
            sets = {name: _rows(np.asarray(outputs[name])) for name in self._ordering(outputs)}
            flat = self._dense(t, np.asarray(outputs[t.name], np.float64), sets)
            return flat.reshape(-1, len(flat) // max(1, int(np.prod(t.shape[:-1]))))

        return sigma(dense(plain), [dense(run) for run in runs], self.claim, bool(t.ordered_by))

    def _chosen(self, sigma: Array) -> dict[str, Array]:
        """name -> flat places: all of a small tensor, of a large one the worst elements and others."""
        right, places, start = self.vector(self.right_outputs), {}, 0
        for name, value in self._flat.items():
            own = slice(start, start + value.size)
            start += value.size
            if value.size <= WORST + SPREAD:
                places[name] = np.arange(value.size)
                continue
            with np.errstate(all="ignore"):
                off = np.abs(np.nan_to_num(value - right[own], nan=0.0)) / sigma[own]
            worst = np.argpartition(off, -WORST)[-WORST:]
            even = np.arange(SPREAD) * value.size // SPREAD + np.arange(SPREAD) % max(1, value.size // SPREAD)
            places[name] = np.unique(np.concatenate([worst, even]))
        return places

    def _layouts(self) -> list[Array]:
        """The port's vector, in its own layout and in those that the case permits."""
        found = [np.concatenate([v[self.places[n]] for n, v in self._flat.items()])] if self._flat else []
        if any("halves" in t.layouts for t in self.tensors.values()):
            parts = []
            for name, t in self.tensors.items():
                value = self._flat[name].reshape(t.shape) if "halves" in t.layouts else self._flat[name]
                if "halves" in t.layouts:
                    order = np.arange(t.shape[-1]).reshape(2, -1).T.reshape(-1)
                    value = value[..., order].reshape(-1)
                parts.append(value[self.places[name]])
            found.append(np.concatenate(parts))
        return found or [np.zeros(0)]

    def _right_probes(self) -> Array:
        """(tensors,) the probes in which the port is right, as far as roundings can tell."""
        with np.errstate(all="ignore"):
            z = np.abs(self.port[0] - self.right) / self.right_noise.sigma
        z = np.where(np.isfinite(self.right), np.where(np.isnan(z), np.inf, z), 0.0)
        off = np.bincount(self.of, z > 6.0, len(self.tensors))
        probes = np.array([t.role == PROBE for t in self.tensors.values()], bool)
        return np.asarray(probes & (off == 0))

    def _gates(self) -> dict[str, Array]:
        """set -> (n,) the row of it that an element hangs on, or -1."""
        found: dict[str, Array] = {}
        start = 0
        for name, t in self.tensors.items():
            at = self.places[name]
            for gate in t.decided_by:
                rows = int(np.prod(self.case.tensor(gate).shape[:-1]))
                column = found.setdefault(gate, np.full(self.size, -1))
                column[start : start + len(at)] = at // max(1, self._flat[name].size // rows)
            start += len(at)
        return found


def sigma(own: Array, runs: list[Array], claim: Claim, sparse: bool = False) -> Array:
    """own (rows, n) and the same with random roundings  ->  (rows n,): of the row, as far as it is known,
    and not below the rounding of the value itself.  sparse: zeros are experts that are not chosen."""
    with np.errstate(all="ignore"):
        errors = [np.where(np.isfinite(own), run - own, 0.0) for run in runs]
        squares = np.minimum(np.mean([e * e for e in errors], 0), np.finfo(float).max)
        squares = np.where(np.isfinite(squares), squares, np.finfo(float).max)
    if sparse:
        squares = np.where(own == 0.0, np.nan, squares)  # they say nothing
    known = squares[~np.isnan(squares)]
    whole = float(np.mean(known)) if known.size else 0.0
    row = np.mean(np.where(np.isnan(squares), whole, squares), -1, keepdims=True)
    wide = own.shape[-1]
    weight = wide / (wide + 16.0)  # of a short row's own noise, which is known badly
    limit = 16.0 * float(row.max(initial=0.0)) + 1e-300
    pooled = np.sqrt(weight * row + (1.0 - weight) * min(whole, limit))
    stored = 0.3 * claim.storage * np.abs(np.where(np.isfinite(own), own, 0.0))
    tiny = 8.0 * 2.0 ** (claim.lowest - claim.bits)
    return np.asarray((np.maximum(pooled, stored) + tiny).reshape(-1))


def _rows(ids: Array) -> Array:
    return np.asarray(ids).reshape(-1, np.shape(ids)[-1]).astype(np.int64)
