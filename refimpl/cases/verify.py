"""Whether committed cases are what this package computes here and now, bit for bit.  SPEC CASE-11."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refimpl.cases import folder, format
from refimpl.cases.build import Built, build
from refimpl.cases.format import Case
from refimpl.cases.generate import definitions, over
from refimpl.cases.suites import SUITES, definition
from refimpl.checkpoint import safetensors
from refimpl.checkpoint.dtypes import Array, Stored
from refimpl.errors import Error, Unreadable


@dataclass(frozen=True)
class Difference:
    """What is not the same in one case."""

    case: str
    what: str


def verify(
    root: Path, suites: Iterable[str] = (), *, jobs: int = 1, done: Callable[[str], None] = lambda id: None
) -> tuple[int, list[Difference]]:
    """(cases compared, differences): every case below root is computed anew.  Raises Unreadable, Invalid."""
    wanted = tuple(suites)
    found = {f"{path.parent.name}/{path.name}": path for path in format.cases(root, wanted)}
    if not found:
        raise Unreadable(f"{root} has no golden cases, but at least one is required.")
    present = {id.partition("/")[0] for id in found} & set(SUITES)
    known = {case.id for case in definitions(sorted(present, key=SUITES.index))} if present else set()
    differences = [Difference(id, "is not there") for id in sorted(known - found.keys())]
    differences += [Difference(id, "is no case of this version") for id in sorted(found.keys() - known)]
    work: list[tuple[object, ...]] = [(id, path) for id, path in found.items() if id in known]
    for own, id in over(_compare, work, jobs):
        differences += own
        done(id)
    return len(work), sorted(differences, key=lambda d: (d.case, d.what))


def _compare(id: str, path: Path) -> list[Difference]:
    built = build(definition(id))
    try:
        text = (path / format.CASE).read_bytes()
        there = format.read(path)
        found = [Difference(id, what) for what in _described(there, built.case)]
        if not found and text != built.case.to_json().encode():
            found.append(Difference(id, "case.json says the same in other bytes"))
        return found + [Difference(id, what) for what in _stored(path, built)]
    except Error as error:
        return [Difference(id, f"cannot be read: {error}")]
    except OSError as error:
        return [Difference(id, f"cannot be read: {error.strerror}")]


def _described(there: Case, here: Case) -> list[str]:
    """Tensors whose digest differs, else other fields of case.json."""
    old, new = ({t.name: t for t in case.tensors} for case in (there, here))
    changed = [
        f"tensor {name} differs" for name in new if name in old and old[name].sha256 != new[name].sha256
    ]
    changed += [f"tensor {name} is not listed" for name in new if name not in old]
    changed += [f"tensor {name} is listed, but not computed" for name in old if name not in new]
    if not changed:
        changed = [f"what judges tensor {name} differs" for name in new if old[name] != new[name]]
    if not changed and there != here:
        changed = ["case.json differs"]
    return changed


def _stored(path: Path, built: Built) -> list[str]:
    """Tensors of the files that differ, are absent or are surplus; the folder may hold all or samples."""
    numbers = built.case, built.given, built.expected, built.extras
    compact, whole = (folder.contents(*numbers, complete) for complete in (False, True))
    present = {name: _entries(path / name) for name in whole}
    complete = any(present[name].keys() & (whole[name].keys() - compact[name].keys()) for name in whole)
    found: list[str] = []
    for name, tensors in (whole if complete else compact).items():
        file = safetensors.open_file(path / name)
        found += [f"{name} lacks {n}" for n in tensors if n not in file]
        found += [f"{name} has {n}, which is not computed" for n in file if n not in tensors]
        found += [
            f"{name} has other bits in {n}" for n in tensors if n in file and not _same(file, n, tensors[n])
        ]
    return found


def _entries(path: Path) -> Mapping[str, object]:
    return safetensors.open_file(path).entries if path.exists() else {}


def _same(file: safetensors.TensorFile, name: str, given: Array | Stored) -> bool:
    stored = given if isinstance(given, Stored) else Stored.of(given)
    same_type = file.dtype(name) == stored.dtype and file.shape(name) == stored.shape
    return same_type and np.array_equal(
        file.codes(name).reshape(-1).view(np.uint8), stored.get(name).reshape(-1).view(np.uint8)
    )
