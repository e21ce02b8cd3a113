"""Score the diagnosis on ports that are not built from refimpl, with mistakes in their source.

    python bench/diagnosis.py --jobs 16                          everything; writes bench/diagnosis.md
    python bench/diagnosis.py --only 'G0*,C *' --dtype float32   some of it; the page keeps the other rows
    python bench/diagnosis.py --seed 7                           the cases of one seed
    python bench/diagnosis.py --page                             the page again, from the rows that are kept

The ports are tests/ports/torch_v3.py and the C port.  Seed 1 is golden/; the cases of other seeds are built.
A planted mistake is run over the cases of the components in which it can show, and what fails is handed to
the diagnosis, with what holds.  Of a right port or rewrite all that it computed is handed to the diagnosis.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "scoring"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "ports"), str(ROOT / "bench")]

from diagnosis_ports import RIGHT, SUBJECTS, Subject  # noqa: E402  # behind the path to it
from diagnosis_score import Row, score  # noqa: E402

CLAIMS = {"float32": "fp32", "bfloat16": "bf16"}


def suites(seed: int, jobs: int) -> Path:
    """Where the cases of a seed are."""
    if seed == 1:
        return ROOT / "golden"
    root = BUILD / f"seed-{seed}"
    if not root.exists():
        from reseeded import build

        build(root, seed, jobs)
    return root


def cases(root: Path) -> dict[str, dict[str, Any]]:
    """id -> case.json, of the cases that a float port computes."""
    found = [json.loads(path.read_text()) for path in sorted(root.glob("*/*/case.json"))]
    return {case["id"]: case for case in found if case["kind"] in ("forward", "vjp")}


def whole(root: Path, target: Path, id: str) -> None:
    """The case with its inputs, which ports read, below target."""
    from refimpl.cases.folder import Folder
    from refimpl.validate.preparing import prepared

    if not (target / id / "case.json").exists():
        prepared(Folder.open(root / id), target / id)


def row(name: str, dtype: str, seed: int, root: Path, budget: float) -> Row:
    """Run one planted change over its cases, and judge and diagnose what it writes."""
    from refimpl.validate.verdict import check

    subject, claim = SUBJECTS[name], CLAIMS[dtype]
    chosen = [
        id
        for id, case in cases(root).items()
        if case["component"] in subject.components and claim in case["claims"]
    ]
    run = subject.open()
    with tempfile.TemporaryDirectory() as folder:
        made, crashed = [], []
        for id in chosen:
            output = Path(folder) / f"{id.replace('/', '.')}.safetensors"
            try:
                own = BUILD / f"whole-{seed}" / id  # where the committed case lacks its inputs
                if run(own if own.exists() else root / id, output, dtype):
                    made.append((root / id, output))
            except Exception:
                crashed.append(id)
        failing, passing, first = [], [], []
        for case, output in made:
            verdict = check(case, output, claim)
            (passing if verdict.holds else failing).append((case, output))
            if not verdict.holds:
                assert verdict.first_off is not None
                first.append((verdict.case, verdict.first_off.name))
        label, failed = f"seed {seed}", tuple(id for id, _ in first)
        ran = Row(name, dtype, label, len(made) + len(crashed), failed, tuple(crashed), tuple(first))
        return diagnosed(ran, subject, failing, passing, budget) if failing or subject.kind == RIGHT else ran


def diagnosed(ran: Row, subject: Subject, failing: list[Any], passing: list[Any], budget: float) -> Row:
    """The row with what the diagnosis names and says."""
    from refimpl.cases.claims import claim
    from refimpl.cases.folder import Folder
    from refimpl.validate.diagnosis import diagnose
    from refimpl.validate.evidence import Evidence

    def read(rows: list[Any]) -> list[Evidence]:
        return [Evidence(Folder.open(folder), output) for folder, output in rows]

    if subject.kind == RIGHT and not failing:  # it is asked of a port in which nothing is wrong
        failing, passing = passing, []
    found = diagnose(read(failing), claim(CLAIMS[ran.dtype]), read(passing), budget=budget)
    return replace(
        ran,
        named=tuple(tuple(finding.names) for finding in found.findings),
        explained=len(found.explained),
        unexplained=len(found.unexplained),
        stages=tuple((a.case, a.stage, a.component) for a in found.accounts if a.stage),
        seconds=round(found.seconds, 1),
    )


def line(r: Row) -> str:
    """A row as it is printed while the others run."""
    from diagnosis_page import classes, stages

    failed = f"{len(r.failed)}/{r.ran}" + (f" crashed {len(r.crashed)}" if r.crashed else "")
    what = f"{classes(r)} ({r.explained} explained, {r.unexplained} not) {stages(r)}" if r.seconds else ""
    return f"{r.name:26}{r.dtype:10}{r.cases:8}{score(r):14}{failed:8}{r.seconds:6.1f} s  {what}"


def work(only: str, dtypes: list[str], seeds: list[int]) -> Iterator[tuple[str, str, int]]:
    for name, subject in SUBJECTS.items():
        if any(fnmatchcase(name, pattern) for pattern in only.split(",")):
            yield from ((name, d, seed) for d in dtypes if d in subject.claimed for seed in seeds)


def kept(file: Path) -> dict[tuple[str, str, str], Row]:
    """The rows of earlier runs, of what is still planted."""
    stored = json.loads(file.read_text()) if file.exists() else []
    for r in stored:
        r["first"] = tuple((a, b) for a, b in r["first"])
    return {(r["name"], r["dtype"], r["cases"]): Row(**r) for r in stored if r["name"] in SUBJECTS}


def _quiet() -> None:
    import torch

    torch.set_num_threads(1)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="*", help="patterns of names, separated by commas")
    parser.add_argument("--dtype", choices=tuple(CLAIMS), action="append")
    parser.add_argument("--seed", type=int, action="append", help="default: 1 and 7")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--budget", type=float, default=25.0, help="seconds of processor for a diagnosis")
    parser.add_argument("--rows", type=Path, default=BUILD / "rows.json")
    parser.add_argument("--new", action="store_true", help="only what has no row yet")
    parser.add_argument("--page", action="store_true", help="write the page from the rows, and run nothing")
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # the processes are the threads
    from diagnosis_page import page

    rows, given.seed = kept(given.rows), given.seed or [1, 7]
    todo = [] if given.page else list(work(given.only, given.dtype or list(CLAIMS), given.seed))
    todo = [item for item in todo if not given.new or (item[0], item[1], f"seed {item[2]}") not in rows]
    roots = {seed: suites(seed, given.jobs) for seed in given.seed} if todo else {}
    with ProcessPoolExecutor(given.jobs, get_context("spawn"), _quiet) as pool:
        ready = [
            pool.submit(whole, root, BUILD / f"whole-{seed}", id)
            for seed, root in roots.items()
            for id in cases(root)
        ]
        for future in ready:
            future.result()
        futures = {pool.submit(row, *item, roots[item[2]], given.budget): item for item in todo}
        for future in as_completed(futures):
            try:
                one = future.result()
            except Exception as error:
                print(f"{' '.join(map(str, futures[future]))}: {type(error).__name__} {error}", flush=True)
                continue
            rows[one.name, one.dtype, one.cases] = one
            print(line(one), flush=True)
            given.rows.parent.mkdir(parents=True, exist_ok=True)
            given.rows.write_text(json.dumps([asdict(r) for r in rows.values()], indent=0))
    (ROOT / "bench" / "diagnosis.md").write_text(page(list(rows.values())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
