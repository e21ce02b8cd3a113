"""Every member of the zoo is correct, and passes the cases; the whole is `python bench/zoo.py`."""

from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest

from refimpl import programs
from refimpl.cases.cap import CAP
from refimpl.cases.claims import CLAIMS
from refimpl.cases.folder import Folder
from refimpl.cases.judge import Tolerance, measure
from refimpl.cases.judging import judge, judge_set, tolerance
from refimpl.cases.setting import setting_of
from refimpl.numerics.arithmetic import Exact
from refimpl.numerics.floating import Floating
from refimpl.variants.zoo import ZOO

GOLDEN = Path(__file__).parent.parent.parent / "golden"
CASES = ["norm/epsilon-vjp", "attention/causal-vjp", "gate/tiny-scores-vjp", "gate/ties", "moe/experts-vjp",
         "block/experts-vjp", "head/loss-vjp", "rope/halves-vjp", "balance/sequences-vjp", "training/adamw",
         "mtp/first"]  # fmt: skip
FOLDERS = {case: Folder.open(GOLDEN / case) for case in CASES}


@pytest.mark.parametrize("member", ZOO, ids=lambda m: m.name)
def test_a_member_passes_at_every_claim(member) -> None:
    ran = 0
    for folder in FOLDERS.values():
        case = folder.case
        claims = [claim for claim in member.claims if claim in case.claims]
        if not member.runs(case.component) or not claims:
            continue
        outputs = member.outputs(case.component, setting_of(folder, Exact()))
        for t in case.outputs:
            if t.name not in outputs:
                assert any(fnmatchcase(t.name, pattern) for pattern in member.withholds), t.name
                continue
            theirs = np.asarray(outputs[t.name])
            for claim in (CLAIMS[name] for name in claims if name not in t.unjudged):
                if t.set:
                    assert judge_set(folder, t, theirs, claim).holds, (case.id, t.name)
                else:
                    found = judge(folder, t, theirs.astype(float).reshape(t.shape), outputs.get, claim)
                    assert found.distance is None or found.distance.holds, (case.id, t.name, found.distance)
        ran += 1
    assert ran


def test_there_are_many_with_names_and_reasons_of_their_own() -> None:
    assert len(ZOO) >= 30
    assert len({m.name for m in ZOO}) == len(ZOO)
    assert all(m.why and m.claims for m in ZOO)


@pytest.mark.parametrize("name", ["flash", "absorbed", "scatter-add", "last expert first", "chunks"])
def test_a_member_differs_from_plain_float32(name: str) -> None:
    member, plain = (next(m for m in ZOO if m.name == n) for n in (name, "one by one"))
    folder = FOLDERS["block/experts-vjp"]
    own, other = (m.outputs("block", setting_of(folder, Exact())) for m in (member, plain))
    assert any(not np.array_equal(own[n], other[n]) for n in own)


def test_the_members_of_the_cap_claim_what_they_cap_and_withhold_no_gradient() -> None:
    members = {m.name: m for m in ZOO}
    for claim, names in CAP.items():
        assert all(claim in members[name].claims for name in names)
        assert any(not members[name].components for name in names)  # so that every case has a cap


def test_a_tolerance_is_at_most_eight_times_the_error_of_the_zoo_where_there_are_many_numbers() -> None:
    """Of the element test, where chance and the rounding of the result add little."""
    folder = FOLDERS["gate/tiny-scores-vjp"]
    members = {m.name: m for m in ZOO}
    t = next(t for t in folder.case.outputs if t.cap and t.samples is None)
    for claim in (CLAIMS[name] for name in t.cap):
        ours, index = folder.judged(t)
        allowed = tolerance(folder, t, claim, ours, index)
        assert allowed is not None
        worst, once = 0.0, float(np.max(claim.storage * abs(ours) / allowed.element))
        for name in CAP[claim.name]:
            flat = members[name].outputs("gate", setting_of(folder, Exact()))[t.name].reshape(-1)
            theirs = (flat if index is None else flat[index]).astype(float)
            own = Tolerance(allowed.element, allowed.spread, allowed.bias)
            worst = max(worst, measure(ours, theirs, own, claim).excess)
        few = 1.0 + 4.0 / np.sqrt(len(CAP[claim.name]) * t.size // t.shape[-1])
        assert 8.0 * max(few * worst, once) * 1.1 >= 1.0  # two digits, rounded up


@pytest.mark.parametrize("case", ["norm/epsilon-vjp", "block/experts-vjp", "head/loss-vjp"])
def test_plain_float32_on_blas_passes(case: str) -> None:
    folder = FOLDERS[case]
    outputs = programs.run(folder.case.component, setting_of(folder, Floating(np.float32)))
    for t in folder.case.outputs:
        if not t.set:
            theirs = np.asarray(outputs[t.name], float).reshape(t.shape)
            found = judge(folder, t, theirs, outputs.get, CLAIMS["fp32"])
            assert found.distance is None or found.distance.holds, t.name
