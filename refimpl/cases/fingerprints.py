"""Fingerprints: which bits mean which arithmetic.  SPEC CASE-13, VERDICT-12.

A fingerprint is a case of kind `bits` with more than one right or nameable answer.  Every alternative is
computed on the inputs of the case; no two may have the same bits.  case.json has, for each, the digests of
its outputs and its bits at a few positions that together tell all alternatives apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from refimpl.cases import exact, format
from refimpl.cases.arithmetics import FINGERPRINTS
from refimpl.cases.format import Tensor
from refimpl.cases.instruments import Data, Outputs
from refimpl.errors import Invalid
from refimpl.numerics.arithmetic import Array

APART = 3  # positions at which two alternatives differ, if so many do


@dataclass(frozen=True)
class Found:
    """What a port's output is.  names: the alternatives that have its bits; more than one only where it gave
    less than the required tensors."""

    names: tuple[str, ...]
    texts: tuple[str, ...]
    allowed: bool
    nearest: str  # which alternatives agree at most of the positions, in words


def made(name: str, data: Data, any_nan: bool) -> tuple[Outputs, Mapping[str, Any]]:
    """(outputs of the first alternative, `fingerprint` of case.json).  Raises Invalid if two are alike."""
    question = FINGERPRINTS[name](data)
    outputs = [row.compute(data) for row in question.alternatives]
    codes = [{n: exact.stored(out.array, out.dtype, any_nan) for n, out in each.items()} for each in outputs]
    required = [n for n, out in outputs[0].items() if out.instead_of is None]
    sizes = [codes[0][n].size for n in required]
    table = np.stack(
        [np.concatenate([own[n].reshape(-1).astype(np.uint32) for n in required]) for own in codes]
    )
    chosen = telling(table)
    if isinstance(chosen, tuple):
        first, second = (question.alternatives[i].name for i in chosen)
        raise Invalid(f"fingerprint {name}: {first} and {second} give the same bits, but all must differ.")
    positions = {}
    for n, size, end in zip(required, sizes, np.cumsum(sizes), strict=True):
        positions[n] = [int(at - (end - size)) for at in chosen if end - size <= at < end]
    rows = [
        {
            "name": row.name,
            "text": row.text,
            "allowed": row.allowed,
            "sha256": {n: format.digest(own[n], out.dtype) for n, out in each.items()},
            "bits": {n: _hex(own[n].reshape(-1)[positions[n]]) for n in required},
        }
        for row, each, own in zip(question.alternatives, outputs, codes, strict=True)
    ]
    return outputs[0], {"note": question.note, "positions": positions, "alternatives": rows}


def telling(table: Array) -> list[int] | tuple[int, int]:
    """table (A, n): rows of codes  ->  columns, ascending, that tell all rows apart, or two equal rows."""
    pairs = list(combinations(range(len(table)), 2))
    differ = np.stack([table[i] != table[j] for i, j in pairs])
    alike = np.flatnonzero(~differ.any(1))
    if alike.size:
        return pairs[int(alike[0])]
    chosen: list[int] = []
    left = np.minimum(np.count_nonzero(differ, axis=1), APART)  # of each pair
    while left.any():
        best = int(np.argmax(np.count_nonzero(differ[left > 0], axis=0)))
        chosen.append(best)
        left -= (left > 0) & differ[:, best]
        differ[:, best] = False
    return sorted(chosen)


def identify(table: Mapping[str, Any], given: Mapping[str, tuple[Tensor, Array]]) -> Found:
    """given: output -> (tensor, the port's codes)  ->  which alternatives have all of these bits."""
    digests = {name: format.digest(_canonical(t, codes), t.dtype) for name, (t, codes) in given.items()}
    rows = table["alternatives"]
    found = [row for row in rows if all(row["sha256"][name] == own for name, own in digests.items())]
    texts = tuple(row["text"] for row in found)
    allowed = bool(given) and any(row["allowed"] for row in found)
    nearest = "" if found else _nearest(table, given)
    return Found(tuple(row["name"] for row in found), texts, allowed, nearest)


def fits(table: Mapping[str, Any], t: Tensor, codes: Array) -> bool:
    """Whether one output alone would pass."""
    return identify(table, {t.name: (t, codes)}).allowed


def _nearest(table: Mapping[str, Any], given: Mapping[str, tuple[Tensor, Array]]) -> str:
    scores: dict[str, int] = {row["name"]: 0 for row in table["alternatives"]}
    total = 0
    for name, (t, codes) in given.items():
        if name not in table["positions"]:
            continue
        at = table["positions"][name]
        own = _hex(_canonical(t, codes).reshape(-1)[at])
        total += len(at)
        for row in table["alternatives"]:
            scores[row["name"]] += [x == y for x, y in zip(own, row["bits"][name], strict=True)].count(True)
    best = max(scores.values())
    if not best:
        return f"agrees with none at {total} telling positions"
    names = [name for name, score in scores.items() if score == best]
    return f"agrees most with {', '.join(names[:4])}: at {best} of {total} telling positions"


def _canonical(t: Tensor, codes: Array) -> Array:
    return codes if t.any_nan is None else exact.canonical(codes, t.dtype, t.any_nan)


def _hex(codes: Array) -> list[str]:
    width = 2 * codes.dtype.itemsize
    return [f"{int(code):0{width}x}" for code in codes]
