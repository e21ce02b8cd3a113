"""The suites' cases under another seed, for a score that has to hold on more than seed 1."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Final

FLOATS: Final = (
    *("norm", "rope", "attention", "mla", "gate", "moe", "mlp", "block", "model", "head", "embedding"),
    "linear",
)


def build(root: Path, seed: int, jobs: int) -> None:
    """Write the cases below root as they are committed, and say which definitions make none."""
    from refimpl.cases.definition import Definition
    from refimpl.cases.suites import suite

    every = [case for name in FLOATS for case in suite(name)]
    ids = [case.id for case in every if isinstance(case, Definition) and case.rejects is None]
    with ProcessPoolExecutor(jobs, get_context("spawn"), _seeded, (seed,)) as pool:
        lost = [line for line in pool.map(_case, ids, [root] * len(ids)) if line]
    print(f"seed {seed}: {len(ids) - len(lost)} cases", *lost, sep="\n  ", flush=True)


def _seeded(seed: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    from refimpl.cases import definition

    definition.SEED = seed  # type: ignore[misc]  # before a suite is read, so that every stream is of this seed


def _case(id: str, root: Path) -> str:
    """What went wrong, "" if nothing did."""
    from refimpl.cases import build as built
    from refimpl.cases.folder import write
    from refimpl.cases.suites import definition

    try:
        whole = built.build(definition(id))
    except Exception as error:  # numbers of another seed may make no good case
        return f"no case: {id} ({error})"
    write(root, whole.case, whole.given, whole.expected, whole.extras, False)
    return ""
