"""One case of a validation: what it is judged as, the verdict, and what it says about choices.  SPEC
VERDICT-13, VERDICT-15, VERDICT-16."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from refimpl.cases.claims import Claim, claim
from refimpl.cases.folder import Folder
from refimpl.cases.format import PROBE, REQUIRED, Case, Tensor
from refimpl.cases.judging import Reference
from refimpl.errors import Error
from refimpl.validate import inference
from refimpl.validate.inference import Explanation, Trial
from refimpl.validate.output import Output, largest, open_output
from refimpl.validate.portfile import PortFile
from refimpl.validate.recomputed import Remembered
from refimpl.validate.results import FAILED, HELD, NOT_FOR_ME, NOT_HELD, CaseResult
from refimpl.validate.running import CRASHED, DONE, KILLED, Ran
from refimpl.validate.running import FAILED as EXITED
from refimpl.validate.settling import Alternatives, Evidence
from refimpl.validate.tensor import MISSING, OPEN, TensorVerdict
from refimpl.validate.verdict import Verdict, not_offered, of_bits, of_numbers, refusal


@dataclass
class Judging:
    """How a case is judged: the claim (None for bits and for what must be refused), and against what."""

    folder: Folder
    claim: Claim | None
    declared: Alternatives
    reference: Reference

    @classmethod
    def of(cls, folder: Folder, declared: PortFile, demanded: str | None) -> Judging | str:
        """Or why the case is not offered."""
        case = folder.case
        if case.outcome == "reject":
            return cls(folder, None, {}, folder)
        if case.by_bits:
            folder = Folder(folder.path, _roles(case, declared))
            return cls(folder, None, {}, folder)
        name = demanded or declared.claim_for(case) or (case.claims[0] if case.claims else None)
        if name is None:
            return "it is offered for no precision"
        claimed = claim(name)
        why = not_offered(case, claimed)
        if why is not None:
            return why.removeprefix(f"{case.id} is ")
        folder = Folder(folder.path, _roles(case, declared))
        reference: Reference = folder
        try:
            if declared.choices:
                reference = inference.declared_reference(folder, declared.choices) or folder
        except Error as error:
            return f"it cannot be computed under the port's choices: {error}"
        return cls(folder, claimed, declared.choices, Remembered(reference))

    @property
    def limit(self) -> int:
        return largest(self.folder.case)

    def explainable(self, result: CaseResult) -> bool:
        """Whether alternatives of choices may be tried on it once more."""
        return result.status == NOT_HELD and result.evidence is not None and bool(result.evidence.own)


def _roles(case: Case, declared: PortFile) -> Case:
    """A required tensor that the port says it does not give becomes a probe."""

    def role(t: Tensor) -> Tensor:
        return replace(t, role=PROBE) if t.role == REQUIRED and not declared.gives(t.name) else t

    return replace(case, tensors=tuple(role(t) for t in case.tensors))


def judged(result: CaseResult, judging: Judging, output: Path) -> CaseResult:
    """result: with how the port ran."""
    ran, case = result.ran, judging.folder.case
    assert ran is not None
    if case.outcome == "reject":
        return _refused(result, ran, case, output)
    if ran.outcome != DONE:
        return replace(result, status=FAILED, why=_failure(ran))
    if not output.exists():
        return replace(result, status=FAILED, why="no output was written")
    try:
        given = open_output(case, output)
        if judging.claim is None:
            return _with(result, of_bits(judging.folder, given))
        theirs = Output(case, given)
        verdict = of_numbers(judging.reference, theirs, judging.claim)
        claims = inference.by_claim(judging.reference, theirs, verdict)
    except Error as error:
        why = str(error).replace(str(output), "the output")
        return replace(result, status=FAILED, why=f"{why[:300]}")
    return _evidence(_with(replace(result, claims=claims), verdict), judging, theirs)


def _refused(result: CaseResult, ran: Ran, case: Case, output: Path) -> CaseResult:
    """An invalid input: the port has to fail on purpose, or to write nothing."""
    aborted = ran.signal == signal.SIGABRT  # how programs in C refuse
    if ran.outcome in (CRASHED, KILLED) and not aborted:
        return replace(result, status=FAILED, why=f"{_failure(ran)}; it must refuse the input: {case.reason}")
    made = ran.outcome == DONE and output.exists()
    verdict = refusal(case, made)
    why = f"an output was written, but the input must be refused: {case.reason}" if made else ""
    return replace(result, status=NOT_HELD if made else HELD, why=why, verdict=verdict)


def _failure(ran: Ran) -> str:
    """One line: what happened, and the last thing that was said."""
    said = ran.last_line
    return f"{ran.why}: {said}" if said and said not in ran.why and ran.outcome == EXITED else ran.why


def _with(result: CaseResult, verdict: Verdict) -> CaseResult:
    result = replace(result, claim=verdict.claim, verdict=verdict)
    if not verdict.holds:
        return replace(result, status=NOT_HELD, why=_first(verdict))
    if all(t.verdict == MISSING for t in verdict.tensors):
        return replace(result, status=NOT_FOR_ME, why="none of its tensors was given")
    if all(t.verdict in (MISSING, OPEN) for t in verdict.tensors):
        return replace(result, status=NOT_FOR_ME, why="nothing that was given can be judged under this claim")
    surplus = f"surplus, not judged: {', '.join(verdict.surplus)[:120]}" if verdict.surplus else ""
    return replace(result, status=HELD, why=surplus)


def _first(verdict: Verdict) -> str:
    """The first tensor that is off, in a line."""
    first = verdict.first_off
    if first is None:
        return ""
    others = sum(t.bad for t in verdict.tensors) - 1
    more = f" (and {others} more)" if others else ""
    return f"{first.name}: {_what(first)}{more}"


def _what(t: TensorVerdict) -> str:
    if t.verdict == MISSING:
        return "missing, it is required"
    return t.note or t.verdict


def _evidence(result: CaseResult, judging: Judging, theirs: Output) -> CaseResult:
    """What the case says about choices, where it can be computed again."""
    if result.verdict is None or judging.claim is None or result.status not in (HELD, NOT_HELD):
        return result
    try:
        trial = Trial(judging.folder, judging.declared)
        own = {name: getattr(trial.setting.choices, name) for name in trial.reads}
        if result.status == HELD:
            refuted = inference.refuted(
                trial, judging.declared, judging.reference, result.verdict, judging.claim
            )
            return replace(result, evidence=Evidence(result.id, own, refuted=refuted))
        return _explained(result, judging, trial, theirs, trial.singles(judging.declared))
    except Error:  # a case that programs cannot run again says nothing about choices
        return result


def _explained(
    result: CaseResult,
    judging: Judging,
    trial: Trial,
    theirs: Output,
    candidates: list[Alternatives],
    *,
    first: bool = False,
) -> CaseResult:
    assert result.verdict is not None
    assert judging.claim is not None
    found = inference.explain(
        trial, candidates, judging.reference, result.verdict, theirs, judging.claim, first=first
    )
    own = {name: getattr(trial.setting.choices, name) for name in trial.reads}
    evidence = Evidence(result.id, own, tuple(e.changes for e in found))
    return replace(result, evidence=evidence, explanations=tuple(found))


def again(result: CaseResult, judging: Judging, output: Path, known: Alternatives) -> CaseResult:
    """Under several alternatives at once, once some are known from other cases."""
    try:
        trial = Trial(judging.folder, judging.declared)
        theirs = Output(judging.folder.case, open_output(judging.folder.case, output))
        candidates = trial.combined(known, judging.declared)
        return _explained(result, judging, trial, theirs, candidates, first=True)
    except Error:
        return result


def settled(result: CaseResult, assigned: Mapping[str, Alternatives]) -> CaseResult:
    """The result under the alternatives that explain it, if any do."""
    if result.id not in assigned:
        return result
    changes = assigned[result.id]
    found: Explanation = next(e for e in result.explanations if e.changes == changes)
    shown = ", ".join(f"{name} = {value}" for name, value in changes.items())
    under = _with(replace(result, under=changes), found.verdict)
    return replace(under, claims=found.claims, why=f"under {shown}" + (f"; {under.why}" if under.why else ""))
