"""What is planted in the two ports, as one table: how each change is run, and what may be named for it."""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import c_port
import planted_all
import planted_c
from planted import ALL, BOTH, FP32, Planted

KNOWN, PAIR, UNKNOWN, RIGHT = "known", "pair", "unknown", "right"
KINDS: Final = {
    KNOWN: "mistakes of the catalogue",
    PAIR: "pairs of them",
    UNKNOWN: "mistakes that are not in the catalogue",
    RIGHT: "right ports and rewrites",
}
Run = Callable[[Path, Path, str], bool]  # case folder, output, dtype -> whether the case is for it


@dataclass(frozen=True)
class Subject:
    """A port with a change in its source."""

    name: str
    kind: str
    answers: tuple[tuple[str, ...], ...]  # for each planted mistake the ids that may be named, any of them
    components: tuple[str, ...]  # where it can show
    dtypes: tuple[str, ...]  # in which it is a mistake
    claimed: tuple[str, ...]  # dtypes that the port computes in
    stage: tuple[str, ...]  # patterns of the stage that is wrong, of a mistake that is not in the catalogue
    open: Callable[[], Run]


def _torch(planted: Planted) -> Subject:
    def open() -> Run:
        from safetensors.torch import save_file

        port = planted.port()

        def run(case: Path, output: Path, dtype: str) -> bool:
            save_file(port.run(case, dtype), output)
            return True

        return run

    known = {p.name: p for p in planted_all.KNOWN}
    answers = [known[part].answer for part in planted.parts] or [planted.answer] * bool(planted.answer)
    kind = RIGHT if planted.right else PAIR if planted.parts else KNOWN if answers else UNKNOWN
    return Subject(
        planted.name, kind, tuple(answers), planted.components, planted.dtypes, BOTH, planted.stage, open
    )


@cache
def _build() -> c_port.Build:
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return c_port.Build(Path(folder.name))


def _c(name: str, planted: Any) -> Subject:
    def open() -> Run:
        build = _build()
        if planted is None:
            program = build.port()
        else:
            program = build.changed(name.replace(" ", "-"), planted.file, planted.source)

        def run(case: Path, output: Path, dtype: str) -> bool:
            done = c_port.run(program, case, output)
            if done.returncode not in (0, c_port.NOT_FOR_ME):
                raise RuntimeError(done.stderr)
            return done.returncode == 0

        return run

    if planted is None:
        return Subject(name, RIGHT, (), ("norm", "rope", "rope_tables", "gate", "mlp"), FP32, FP32, (), open)
    kind = RIGHT if planted.right else KNOWN if planted.answer else UNKNOWN
    answers = (planted.answer,) if kind == KNOWN else ()
    return Subject(name, kind, answers, planted.components, FP32, FP32, planted.stage, open)


def _subjects() -> dict[str, Subject]:
    torch = [
        _torch(p) for p in (*planted_all.PLANTED.values(), Planted("unchanged", (), (), ALL, right=True))
    ]
    own = [_c(f"C {name}", p) for name, p in {**planted_c.PLANTED, "unchanged": None}.items()]
    ranked = sorted((*torch, *own), key=lambda s: tuple(KINDS).index(s.kind))
    return {s.name: s for s in ranked}


SUBJECTS: Final = _subjects()
