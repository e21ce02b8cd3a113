"""Score the diagnosis on ports that are not built from refimpl: torch_v3.py with mistakes in its source.

    python bench/diagnosis.py                                    everything; writes bench/diagnosis.md
    python bench/diagnosis.py --only 'G0*,A07' --dtype float32   some of it; the page keeps the other rows
    python bench/diagnosis.py --verdicts                         verdicts alone: what fails which cases
    python bench/diagnosis.py --build DIR --seed 7               the suites' cases under a seed, into DIR
    python bench/diagnosis.py --cases DIR --set "seed 7"         scored on those

The cases are whole ones (`refimpl golden generate`).  A planted mistake is run over the cases of the
components in which it can show, and the outputs are handed to the diagnosis together.  It is named first when
the class that is named first contains its id; a pair when both are named; a mistake that is not in the
catalogue when nothing is named and the first stage is right; a correct rewrite when nothing is named.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "ports"), str(ROOT / "bench")]
CLAIMS = {"float32": "fp32", "bfloat16": "bf16"}

Named = tuple[tuple[tuple[str, ...], ...], ...]  # findings, each of alternatives, each of ids

# Scores.
FIRST, LATER, HALF, WRONG, NONE = "first", "later", "one of two", "wrong claim", "none named"
RIGHT_STAGE, OTHER_STAGE = "right stage", "other stage"
PASSES, FAILS, FALSE = "passes", "FAILS", "FALSE CLAIM"
CAUGHT, UNCAUGHT, NOT_A_MISTAKE, CRASHED = "caught", "no case fails", "not a mistake", "crashes"


@dataclass(frozen=True)
class Row:
    """What became of one planted change in one dtype."""

    name: str
    dtype: str
    cases: str  # which set of cases
    ran: int
    failed: tuple[str, ...] = ()  # cases that did not hold
    crashed: tuple[str, ...] = ()
    first: tuple[tuple[str, str], ...] = ()  # failed case, and the tensor that is off first
    named: Named = ()
    explained: int = 0  # failed cases
    unexplained: int = 0
    score: str = ""
    seconds: float = 0.0


def cases(root: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """id -> folder and case.json, of the cases that a float port computes."""
    found = {}
    for path in sorted(root.glob("*/*/case.json")):
        case = json.loads(path.read_text())
        if case["kind"] in ("forward", "vjp"):
            found[case["id"]] = (path.parent, case)
    return found


def outputs(
    port: Any, chosen: dict[str, tuple[Path, dict[str, Any]]], dtype: str, out: Path
) -> tuple[list[tuple[Path, Path]], tuple[str, ...]]:
    """(folder, output) of every case that the port computed, and the ids of those in which it crashed."""
    from safetensors.torch import save_file

    made, crashed = [], []
    for id, (folder, _) in chosen.items():
        path = out / f"{id.replace('/', '.')}.safetensors"
        try:
            save_file(port.run(folder, dtype), path)
        except Exception:
            crashed.append(id)
        else:
            made.append((folder, path))
    return made, tuple(crashed)


def row(name: str, dtype: str, root: Path, label: str, verdicts_only: bool) -> Row:
    """Run one planted change over its cases, and judge or diagnose the outputs."""
    import planted_all

    from refimpl.validate.verdict import check

    planted, claim = planted_all.PLANTED[name], CLAIMS[dtype]
    chosen = {
        id: (folder, case)
        for id, (folder, case) in cases(root).items()
        if case["component"] in planted.components and claim in case["claims"]
    }
    with tempfile.TemporaryDirectory() as folder:
        made, crashed = outputs(planted.port(), chosen, dtype, Path(folder))
        failing, passing, first = [], [], []
        for case, path in made:
            verdict = check(case, path, claim)
            (passing if verdict.holds else failing).append((case, path))
            if not verdict.holds:
                assert verdict.first_off is not None
                first.append((verdict.case, verdict.first_off.name))
        ran = Row(name, dtype, label, len(chosen), tuple(id for id, _ in first), crashed, tuple(first))
        if verdicts_only or not failing:
            return replace(ran, score=undiagnosed(planted, dtype, bool(failing), bool(crashed)))
        return diagnosed(ran, planted, failing, passing)


def undiagnosed(planted: Any, dtype: str, fails: bool, crashes: bool) -> str:
    """The score where no diagnosis was asked for, or there was nothing to diagnose."""
    if planted.right:
        return FAILS if fails or crashes else PASSES
    if fails:
        return CAUGHT
    return CRASHED if crashes else NOT_A_MISTAKE if dtype not in planted.dtypes else UNCAUGHT


def diagnosed(ran: Row, planted: Any, failing: list[Any], passing: list[Any]) -> Row:
    """The row with what the diagnosis names."""
    from refimpl.cases.claims import claim
    from refimpl.cases.folder import Folder
    from refimpl.validate.diagnosis import diagnose
    from refimpl.validate.evidence import Evidence

    def read(rows: list[Any]) -> list[Evidence]:
        return [Evidence(Folder.open(folder), output) for folder, output in rows]

    start = time.perf_counter()
    found = diagnose(read(failing), claim(CLAIMS[ran.dtype]), read(passing))
    seconds = time.perf_counter() - start
    named = tuple(tuple(finding.names) for finding in found.findings)
    return replace(
        ran,
        named=named,
        explained=len(found.explained),
        unexplained=len(found.unexplained),
        score=scored(planted, named, ran.first),
        seconds=round(seconds, 1),
    )


def scored(planted: Any, named: Named, first: tuple[tuple[str, str], ...]) -> str:
    """An id counts as its entry in the catalogue, without the letter of a reading."""
    classes = [{tuple(sorted({id[:3] for id in one})) for one in finding} for finding in named]
    if planted.right:
        return FALSE if classes else FAILS
    if planted.parts:
        both = set(planted.answer)
        own = [set().union(*(one for one in c if set(one) <= both)) for c in classes]
        if classes and all(own) and set().union(*own) == both:
            return FIRST
        return NONE if not classes else HALF if any(own) else WRONG
    if not planted.answer:
        if classes:
            return WRONG
        right = [any(fnmatchcase(name, pattern) for pattern in planted.stage) for _, name in first]
        return RIGHT_STAGE if 2 * sum(right) >= len(right) else OTHER_STAGE
    hits = [any((id,) in c for id in planted.answer) for c in classes]
    return NONE if not hits else FIRST if hits[0] else LATER if any(hits) else WRONG


def line(r: Row) -> str:
    """A row as it is printed while the others run."""
    from diagnosis_page import classes

    failed = f"{len(r.failed)}/{r.ran}" + (f" crashed {len(r.crashed)}" if r.crashed else "")
    what = ": ".join(r.first[0]) if r.first else ""
    if r.seconds:
        what = f"{classes(r.named)} ({r.explained} explained, {r.unexplained} not)"
    return f"{r.name:26}{r.dtype:10}{r.score:14}{failed:8}{r.seconds:6.1f} s  {what}"


def work(only: str, dtypes: list[str]) -> Iterator[tuple[str, str]]:
    import planted_all

    for name in planted_all.PLANTED:
        if any(fnmatchcase(name, pattern) for pattern in only.split(",")):
            yield from ((name, dtype) for dtype in dtypes)


def _quiet() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def merged(file: Path, rows: list[Row]) -> list[Row]:
    """The rows of the file, with those that are new in the place of the old ones."""
    stored = json.loads(file.read_text()) if file.exists() else []
    found = {(r["name"], r["dtype"], r["cases"]): r for r in stored}
    found |= {(r.name, r.dtype, r.cases): json.loads(json.dumps(asdict(r))) for r in rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(list(found.values()), indent=0))
    return [Row(**r) for r in found.values()]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=Path, default=ROOT / "build" / "golden")
    parser.add_argument("--set", default="seed 1", help="what the page calls these cases")
    parser.add_argument("--only", default="*", help="patterns of names, separated by commas")
    parser.add_argument("--dtype", choices=tuple(CLAIMS), action="append")
    parser.add_argument("--verdicts", action="store_true", help="judge only, and write nothing")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--rows", type=Path, default=ROOT / "build" / "diagnosis.json")
    parser.add_argument("--page", type=Path, default=ROOT / "bench" / "diagnosis.md")
    parser.add_argument("--build", type=Path, help="write cases of another seed there, and stop")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--suites", help="of --build, separated by commas; by default all of numbers")
    given = parser.parse_args()
    if given.build:
        from reseeded import build

        build(given.build, given.seed, given.suites, given.jobs)
        return 0
    from diagnosis_page import page

    todo, rows = list(work(given.only, given.dtype or list(CLAIMS))), []
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn"), initializer=_quiet) as pool:
        futures = [pool.submit(row, *item, given.cases, given.set, given.verdicts) for item in todo]
        for future in as_completed(futures):
            rows.append(future.result())
            print(line(rows[-1]), flush=True)
            if not given.verdicts:
                given.page.write_text(page(merged(given.rows, rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
