"""Cases of the suites with inputs and weights of another seed, for what has to hold on more than seed 1."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Final

FLOATS: Final = (
    *(
        "norm",
        "rope",
        "attention",
        "mla",
        "gate",
        "moe",
        "mlp",
        "block",
        "model",
        "head",
        "embedding",
        "linear",
    ),
)


def build(root: Path, seed: int, suites: str | None, jobs: int) -> None:
    """Write whole cases below root, and say which definitions make none."""
    names = suites.split(",") if suites else FLOATS
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_suite, root, seed, name) for name in names]
        for name, future in zip(names, futures, strict=True):
            print(f"{name}: {future.result()}", flush=True)


def _suite(root: Path, seed: int, name: str) -> str:
    from refimpl.cases import definition

    definition.SEED = seed  # before a suite is read, so that every stream is of this seed
    from refimpl.cases import build as built
    from refimpl.cases import generate, suites
    from refimpl.cases.folder import write

    made, lost = 0, []
    for case in suites.suite(name):
        if isinstance(case, definition.Definition) and case.rejects is None:
            try:
                whole = built.build(case)
            except Exception as error:  # numbers of another seed may make no good case
                lost.append(f"\n  no case: {case.id} ({error})")
                continue
            generate._assets(whole, root)
            write(root, whole.case, whole.given, whole.expected, whole.extras, True)
            made += 1
    return f"{made} cases{''.join(lost)}"
