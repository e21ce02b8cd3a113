"""Score the diagnosis on ports that are not built from refimpl: torch_v3.py with mistakes in its source.

    python bench/diagnosis.py                                    everything; writes bench/diagnosis.md
    python bench/diagnosis.py --only 'G0*,A07' --dtype float32   some of it
    python bench/diagnosis.py --verdicts                         verdicts alone: what fails which cases
    python bench/diagnosis.py --build DIR --seed 7               the suites' cases under a seed, into DIR
    python bench/diagnosis.py --cases DIR                        scored on those

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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "ports")]
CLAIMS = {"float32": "fp32", "bfloat16": "bf16"}
SUITES = (
    "embedding",
    "linear",
    "norm",
    "rope",
    "attention",
    "mla",
    "mlp",
    "gate",
    "moe",
    "block",
    "head",
    "model",
)


@dataclass(frozen=True)
class Row:
    """What became of one planted change in one dtype."""

    name: str
    dtype: str
    ran: int  # cases
    failed: tuple[str, ...]  # cases that did not hold
    crashed: tuple[str, ...]
    first: str = ""  # the tensor that is off first, in the first failed case
    named: tuple[str, ...] = ()  # the ids of the classes that are named, best first, joined by spaces
    said: str = ""
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
) -> tuple[list[tuple[Path, Path]], list[str]]:
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
    return made, crashed


def row(name: str, dtype: str, root: Path, verdicts_only: bool) -> Row:
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
        failed, first = [], ""
        for case, path in made:
            verdict = check(case, path, claim)
            if not verdict.holds:
                failed.append(verdict.case)
                first = first or f"{verdict.case}: {verdict.first_off.name}"
        counted = (len(chosen), tuple(failed), tuple(crashed), first)
        if verdicts_only or not failed:
            return Row(name, dtype, *counted, score=_without(planted, dtype, failed))
        start = time.perf_counter()
        named, said = diagnosed(made, claim)
        seconds = time.perf_counter() - start
    return Row(name, dtype, *counted, named, said, scored(planted, named, first), seconds)


def _without(planted: Any, dtype: str, failed: list[str]) -> str:
    if planted.right:
        return "passes" if not failed else "FAILS"
    return "caught" if failed else "not a mistake" if dtype not in planted.dtypes else "uncaught"


def diagnosed(made: list[tuple[Path, Path]], claim: str) -> tuple[tuple[str, ...], str]:
    """(ids of the named classes, best first; what it says where it names none)."""
    raise NotImplementedError


def scored(planted: Any, named: tuple[str, ...], first: str) -> str:
    raise NotImplementedError


def work(only: str, dtypes: list[str]) -> Iterator[tuple[str, str]]:
    import planted_all

    for name in planted_all.PLANTED:
        if any(fnmatchcase(name, pattern) for pattern in only.split(",")):
            yield from ((name, dtype) for dtype in dtypes)


def _quiet() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def build(root: Path, seed: int, suites: tuple[str, ...], jobs: int) -> None:
    """Write the float cases of the suites with inputs and weights of another seed."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        done = [pool.submit(_build, root, seed, suite) for suite in suites]
        for suite, future in zip(suites, done, strict=True):
            print(f"{suite}: {future.result()}", flush=True)


def _build(root: Path, seed: int, suite: str) -> str:
    from refimpl.cases import definition

    definition.SEED = seed  # before a suite is read: every stream is of this seed
    from refimpl.cases import build as built
    from refimpl.cases import folder, generate, suites
    from refimpl.cases.definition import Definition

    made, lost = 0, []
    for case in suites.suite(suite):
        if isinstance(case, Definition) and case.rejects is None:
            try:
                whole = built.build(case)
            except Exception as error:
                lost.append(f"{case.id} ({error})")
                continue
            generate._assets(whole, root)
            folder.write(root, whole.case, whole.given, whole.expected, whole.extras, True)
            made += 1
    return f"{made} cases" + "".join(f"\n  no case: {text}" for text in lost)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=Path, default=ROOT / "build" / "golden")
    parser.add_argument("--only", default="*", help="patterns of names, separated by commas")
    parser.add_argument("--dtype", choices=tuple(CLAIMS), action="append")
    parser.add_argument("--verdicts", action="store_true", help="judge only")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--rows", type=Path, help="where to write the rows as JSON")
    parser.add_argument("--build", type=Path, help="write cases of another seed there, and stop")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--suites", default=",".join(SUITES))
    given = parser.parse_args()
    if given.build:
        build(given.build, given.seed, tuple(given.suites.split(",")), given.jobs)
        return 0
    todo = list(work(given.only, given.dtype or list(CLAIMS)))
    rows = []
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn"), initializer=_quiet) as pool:
        futures = [pool.submit(row, *item, given.cases, given.verdicts) for item in todo]
        for future in futures:
            found = future.result()
            rows.append(found)
            print(
                f"{found.name:24}{found.dtype:10}{found.score:14}{len(found.failed)}/{found.ran}"
                f" crashed {len(found.crashed)}  {found.first} {' '.join(found.named)}",
                flush=True,
            )
    if given.rows:
        given.rows.write_text(json.dumps([vars(r) for r in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
