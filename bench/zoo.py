"""The zoo against every case: each correct variant has to hold at every claim that it makes.

    python bench/zoo.py [FOLDER] [--cases PATTERN] [--members PATTERN] [--jobs N] [--out FILE]

FOLDER has cases (golden by default).  Status 1 if a member does not hold.  The table has, for each member,
how many cases it ran, at which claims, how many verdicts held, and the largest error over what is allowed,
in each of the three tests, with the case and tensor where it is.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatchcase
from functools import partial
from multiprocessing import get_context
from pathlib import Path

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import numpy as np
from tabulate import tabulate

from refimpl.cases import format
from refimpl.cases.claims import CLAIMS
from refimpl.cases.folder import Folder
from refimpl.cases.judge import worst_excess
from refimpl.cases.judging import judge, judge_set
from refimpl.cases.setting import setting_of
from refimpl.numerics.arithmetic import Exact
from refimpl.validate.recomputed import Remembered
from refimpl.variants.zoo import ZOO, Member


def verdicts(reference: Remembered, outputs: dict[str, np.ndarray], claim: str):
    """(tensor, holds, largest error over what is allowed) of each tensor that is there and judged."""
    for t in reference.case.outputs:
        if t.name not in outputs or claim in t.unjudged:
            continue
        theirs = np.asarray(outputs[t.name])
        if t.set:
            yield t.name, judge_set(reference, t, theirs, CLAIMS[claim]).holds, 0.0
        elif t.dtype != "I64":
            given = theirs.astype(np.float64).reshape(t.shape)
            found = judge(reference, t, given, lambda name: outputs.get(name), CLAIMS[claim])
            if found.distance is not None:
                yield t.name, found.distance.holds, worst_excess(found.distance)


def empty() -> dict:
    return {"cases": 0, "verdicts": 0, "held": 0, "worst": 0.0, "where": ""}


def run_case(path: Path, cases: str, names: list[str]) -> dict[str, dict]:
    """The rows of one case: of each member that runs it and has one of its claims."""
    opened = Folder.open(path)
    case = opened.case
    if case.kind in ("bits", "reject") or not fnmatchcase(case.id, cases):
        return {}
    reference, setting, rows = Remembered(opened), setting_of(opened, Exact()), {}
    for member in (m for m in ZOO if m.name in names):
        claims = [claim for claim in member.claims if claim in case.claims]
        if not member.runs(case.component) or not claims:
            continue
        row = rows[member.name] = empty() | {"cases": 1}
        outputs = member.outputs(case.component, setting)
        for claim in claims:
            found = list(verdicts(reference, outputs, claim))
            row["verdicts"] += 1
            row["held"] += all(holds for _, holds, _ in found)
            for name, holds, excess in found:
                if excess > row["worst"]:
                    row["worst"], row["where"] = excess, f"{case.id} {name} {claim}"
                if not holds:
                    print(f"{member.name}: {case.id} {claim} {name}: {excess:.3g}", file=sys.stderr)
    return rows


def run(folder: Path, cases: str, members: list[Member], jobs: int) -> dict[str, dict]:
    """The rows of all cases together, in the order of the cases, whatever process ran them."""
    total = {m.name: empty() for m in members}
    one = partial(run_case, cases=cases, names=[m.name for m in members])
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for rows in pool.map(one, format.cases(folder)):
            for name, row in rows.items():
                into = total[name]
                for key in ("cases", "verdicts", "held"):
                    into[key] += row[key]
                if row["worst"] > into["worst"]:
                    into["worst"], into["where"] = row["worst"], row["where"]
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("golden"))
    parser.add_argument("--cases", default="*")
    parser.add_argument("--members", default="*")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    members = [m for m in ZOO if fnmatchcase(m.name, given.members)]
    rows = run(given.folder, given.cases, members, given.jobs)
    table = [
        (m.name, rows[m.name]["cases"], ", ".join(m.claims),
         f"{rows[m.name]['held']} of {rows[m.name]['verdicts']}",
         f"{rows[m.name]['worst']:.2f}", rows[m.name]["where"])
        for m in members
    ]  # fmt: skip
    heads = ("member", "cases", "claims", "held", "largest error over tolerance", "where")
    text = tabulate(table, heads, tablefmt="github", disable_numparse=True)
    print(text)
    if given.out:
        given.out.write_text(f"# The zoo against every case\n\n`python bench/zoo.py`\n\n{text}\n", "utf-8")
    return int(any(row["held"] < row["verdicts"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
