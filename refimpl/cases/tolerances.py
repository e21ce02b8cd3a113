"""The numbers that judge a case, from its runs: bounds of elements, noise of tensors.  SPEC VERDICT-3,
VERDICT-4."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from refimpl.cases import bounded, noise
from refimpl.cases.bounds import Bounding
from refimpl.cases.claims import PARTS
from refimpl.cases.folder import KEPT_OUTPUT, sample_positions
from refimpl.cases.format import upwards
from refimpl.numerics.arithmetic import Arithmetic, Array
from refimpl.numerics.contraction import contract, mean
from refimpl.numerics.formats import BF16, round_to
from refimpl.programs import Outputs

RUNS: Mapping[str, int] = {"storage": 4, "product": 2, "accumulate": 2}  # of the noise floor, of each kind
Three = tuple[float, float, float]
Run = Callable[[Arithmetic], Outputs]


# Of a row's noise.  The largest of 10^6 normal errors is 5 of their deviations, the noise of a row is known
# to within a factor of 1.6, and a kernel that stores after each of its steps adds a factor of 1.5.
ROW_FACTOR = 12.0


@dataclass
class Judges:
    """What judges one tensor, per unit of each roundoff."""

    spread: Three = (0.0, 0.0, 0.0)
    bias: Three = (0.0, 0.0, 0.0)
    arrays: dict[str, Array] = field(default_factory=dict)  # extras: kind -> array


def judges(run: Run, expected: Mapping[str, Array], with_bounds: bool) -> dict[str, Judges]:
    """Of every tensor of numbers.  An element may be off by the smaller of its bound and ROW_FACTOR times
    the noise of its row, for each roundoff; whole networks have no useful bound, only the noise."""
    made = {name: Judges() for name, value in expected.items() if value.dtype.kind == "f" and value.size}
    noises = _measured(run, expected, made)
    bounding = run(Bounding()) if with_bounds else {}
    for name, own in made.items():
        parts: bounded.Parts = bounded.NONE
        if with_bounds:
            parts = bounded.stored(bounded.lift(bounding[name])).parts
        for kind, part in zip(PARTS, parts, strict=False):
            rows = ROW_FACTOR * noises[name][kind]
            if with_bounds:
                rows = _smaller(np.zeros(()) if part is None else part, rows)
            if rows.any():
                own.arrays[f"bound.{kind}"] = upwards(rows)
    return made


def _smaller(bound: Array, rows: Array) -> Array:
    """Element by element, or only the rows where the bound is nowhere smaller."""
    if bound.ndim and (bound >= rows).all():
        return rows
    return np.minimum(bound, rows)


def _measured(
    run: Run, plain: Mapping[str, Array], made: Mapping[str, Judges]
) -> dict[str, dict[str, Array]]:
    """Fills in spread and bias; name -> kind -> noise of the rows (..., 1)."""
    spread: dict[str, list[float]] = {name: [] for name in made}
    bias: dict[str, list[float]] = {name: [] for name in made}
    rows: dict[str, dict[str, Array]] = {name: {} for name in made}
    for kind in PARTS:
        totals = {name: np.zeros(np.shape(plain[name])) for name in made}  # of squared errors
        common = dict.fromkeys(made, 0.0)  # of squared common factors, times the power
        for seed in range(RUNS[kind]):
            disturbed = run(noise.Noisy(kind, seed))
            for name in made:
                base = np.asarray(plain[name])
                error = _difference(np.asarray(disturbed[name]), base) / noise.UNIT
                totals[name] += error * error
                common[name] += _along(error, _finite(base)) ** 2
        for name in made:
            finite = _finite(np.asarray(plain[name]))
            power = _along(finite, finite)
            few = 1.0 + 4.0 / np.sqrt(RUNS[kind] * finite.size)  # few numbers may be small by chance
            squares = totals[name] * (few * few / RUNS[kind])
            if kind == "storage":  # every output is stored once more, also where no layer says so
                squares = squares + finite * finite / 3.0
            spread[name].append(_spread(name, squares))
            # a run gives one number, however large the tensor is
            factor = (1.0 + 4.0 / np.sqrt(RUNS[kind])) * float(np.sqrt(common[name] / RUNS[kind]))
            bias[name].append(factor / power if power else 0.0)
            if kind == "product" and squares.any():  # few runs: a row is not less than read once itself
                squares = np.maximum(squares, finite * finite / 3.0)
            rows[name][kind] = _rows(squares)
    for name, own in made.items():
        own.spread = (up(spread[name][0]), up(spread[name][1]), up(spread[name][2]))
        own.bias = (up(bias[name][0]), up(bias[name][1]), up(bias[name][2]))
    return rows


def _along(a: Array, b: Array) -> float:
    """The inner product of two tensors, from 8 significant bits of each: enough for what judges."""
    x, y = (round_to(z.reshape(1, -1), BF16) for z in (a, b))
    return float(contract(x, y)[0, 0])


def up(value: float) -> float:
    """Rounded up to three digits."""
    if value == 0.0:
        return 0.0
    nearest = f"{value:.2e}"
    if float(nearest) >= value:
        return float(nearest)
    step = float(f"1e{int(nearest.split('e')[1]) - 2}")
    return float(f"{float(nearest) + step:.2e}")


def _difference(a: Array, b: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(b), 0.0, a - b)


def _finite(x: Array) -> Array:
    return np.where(np.isinf(x), 0.0, x)


def _spread(name: str, squares: Array) -> float:
    """Of the judged elements, whether these are all of them or the samples."""
    flat = squares.reshape(-1)
    whole = float(np.sqrt(mean(flat)))
    if flat.size <= KEPT_OUTPUT:
        return whole
    return max(whole, float(np.sqrt(mean(flat[sample_positions(name, flat.size)]))))


def _rows(squares: Array) -> Array:
    """(..., n)  ->  (..., 1): a row's noise, not far below its own largest element's nor below the
    tensor's."""
    row = np.sqrt(mean(squares)[..., None])
    largest = np.sqrt(squares.max(-1, keepdims=True))
    rows: Array = np.maximum(np.maximum(row, largest / 2.0), np.sqrt(mean(squares.reshape(-1))) / 4.0)
    return rows
