"""Changes to the source of torch_v3.py: mistakes of the catalogue, other mistakes, pairs, and right rewrites.

A row is text edits (old, new), each old text standing in the source exactly once.  `answer` lists what a
diagnosis may name, any of them; an empty answer means that no mistake of the catalogue does this, and `stage`
says which tensors may be named as the first that is off.  The tables are in planted_*.py.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from pathlib import Path

SOURCE = (Path(__file__).parent / "torch_v3.py").read_text()
BOTH = ("float32", "bfloat16")
FP32, BF16 = ("float32",), ("bfloat16",)

# Components by what they contain.
MODEL = ("block", "model")
ATTENTION = ("attention", "mla", *MODEL)
MLA = ("mla", *MODEL)
ROPE = ("rope", "rope_tables", *MLA)
ROTATION = ("rope", *MLA)
SCALE = ("rope_tables", *ATTENTION)
NORM = ("norm", "mla", "head_loss", *MODEL)
MLP = ("mlp", "experts", "moe", *MODEL)
EXPERTS = ("experts", "moe", *MODEL)
GATE = ("gate", "moe", *MODEL)
MOE = ("moe", *MODEL)
LOSS = ("head_loss", "model")
ALL = (
    *("linear", "embedding", "norm", "rope_tables", "rope", "attention", "mla", "mlp", "gate", "experts"),
    *("moe", "block", "head_loss", "model"),
)

Edit = tuple[str, str]


@dataclass(frozen=True)
class Planted:
    """A change to the port's source."""

    name: str
    answer: tuple[str, ...]  # ids of the catalogue, any of which is right
    edits: tuple[Edit, ...]
    components: tuple[str, ...]  # where it can show
    dtypes: tuple[str, ...] = BOTH  # in which it is a mistake
    stage: tuple[str, ...] = ()  # patterns of the first tensor that is off, where the answer is empty
    hidden: str = ""  # why no case of the suites shows it, where none does
    right: bool = False  # a correct rewrite: no diagnosis is the answer
    parts: tuple[str, ...] = ()  # of a pair: the names of both

    @property
    def source(self) -> str:
        text = SOURCE
        for old, new in self.edits:
            if text.count(old) != 1:
                raise ValueError(f"{self.name}: {old!r} is there {text.count(old)} times; once is required")
            text = text.replace(old, new)
        return text

    def port(self) -> types.ModuleType:
        """The changed port, as a module."""
        module = types.ModuleType(f"torch_v3_{self.name.replace('-', '_')}")
        exec(compile(self.source, f"torch_v3.py with {self.name}", "exec"), module.__dict__)
        return module


def pair(first: Planted, second: Planted) -> Planted:
    """Both at once; the diagnosis has to name both."""
    return Planted(
        f"{first.name}+{second.name}",
        (*first.answer, *second.answer),
        (*first.edits, *second.edits),
        tuple(dict.fromkeys((*first.components, *second.components))),
        tuple(d for d in first.dtypes if d in second.dtypes),
        parts=(first.name, second.name),
    )
