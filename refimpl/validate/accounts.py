"""What is known of a failing case beyond its verdict: which stages are wrong given their own input, and how.
SPEC VERDICT-18, VERDICT-21."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from refimpl.cases.claims import Claim
from refimpl.cases.format import Case
from refimpl.config.model import ModelConfig
from refimpl.numerics.arithmetic import Array
from refimpl.validate.evidence import Evidence
from refimpl.validate.findings import component, said
from refimpl.validate.output import Output, open_output
from refimpl.validate.reentry import Stage, stages


@dataclass(frozen=True)
class Account:
    """Of one case.  off: the stages that are wrong given their own input, in the order of computation;
    sentences are on the first of them."""

    case: str
    off: tuple[str, ...]
    right: tuple[str, ...]
    component: str
    sentences: tuple[str, ...]

    @property
    def stage(self) -> str:
        """The first stage that is wrong, "" where every stage is right given its input."""
        return self.off[0] if self.off else ""

    @property
    def text(self) -> str:
        """All in a few plain sentences."""
        if not self.off:
            return f"{self.case}: every stage that was given is right given its own input."
        lead = f"{self.case}: the first stage that is wrong given its own input is {self.stage}"
        parts = [f"{lead} ({self.component}).", *self.sentences]
        if len(self.off) > 1:
            parts.append(f"Wrong as well, given their own inputs: {_listed(self.off[1:])}.")
        return " ".join(parts)


def account(evidence: Evidence, claim: Claim) -> Account:
    """Raises Unreadable."""
    folder = evidence.folder
    case = folder.case
    output = Output(case, open_output(case, evidence.output))
    found = stages(folder, output, claim, evidence.change)
    off = [stage for stage in found if stage.off]
    right = tuple(stage.name for stage in found if not stage.off)
    if not off:
        return Account(case.id, (), right, "", ())
    first = off[0]
    config = ModelConfig.from_dict(case.config)
    sentences = said(first, config, _others(evidence, output, found), _length(case))
    if first.name.startswith("grad.") and any(not name.startswith("grad.") for name in right):
        sentences.insert(0, "Only gradients are off, the forward pass is right.")
    names = (first.name, *(stage.name for stage in off if stage is not first))
    return Account(case.id, names, right, component(first.name), tuple(sentences))


def _others(evidence: Evidence, output: Output, found: list[Stage]) -> Mapping[str, Array]:
    case = evidence.folder.case
    inputs = {
        t.name: evidence.folder.given(t) for t in case.tensors if t.role == "input" and t.dtype != "I64"
    }
    theirs = {stage.name: stage.theirs for stage in found if not stage.set}
    return {name: np.asarray(value) for name, value in {**inputs, **theirs}.items()}


def _length(case: Case) -> int:
    """Tokens of a sequence, 0 where there is none."""
    for name in ("input_ids", "x"):
        shapes = [t.shape for t in case.tensors if t.name == name and t.role == "input"]
        if shapes and (name == "input_ids" or len(shapes[0]) == 3):
            return int(shapes[0][1])
    return 0


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"
