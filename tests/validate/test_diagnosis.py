"""Which mistake makes a port's numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from validate.diagnosed import BF16, FP32, GOLDEN, port

from refimpl import cli
from refimpl.cases.claims import CLAIMS
from refimpl.layers.context import Op
from refimpl.validate import diagnosing, diagnosis_report
from refimpl.validate.diagnosis import diagnose
from refimpl.validate.verdict import check
from refimpl.variants.mutants import MUTANTS
from refimpl.variants.mutants.mutant import Mutant
from refimpl.variants.variation import both, configured, operations, unchanged
from refimpl.variants.zoo import ZOO

# One of every subject, in cases that show it and that are quick.
KNOWN = (
    ("R01", ("rope/plain", "mla/no-query-latent")),
    ("Y07", ("attention/causal", "rope/tables-yarn")),
    ("A05", ("norm/epsilon",)),
    ("A07", ("mla/no-query-latent",)),
    ("G01", ("gate/bias-negative",)),
    ("G12", ("gate/v3", "gate/v3-vjp")),
    ("G15", ("moe/v2",)),
    ("G21", ("moe/experts", "moe/experts-vjp")),
)


def reading(entry: str) -> Mutant:
    """The first mutant of an entry of the catalogue."""
    return next(mutant for mutant in MUTANTS.values() if mutant.entry == entry)


def first_ids(found) -> set[str]:
    return {ids[0][:3] for ids in found.findings[0].names} if found.findings else set()


@pytest.mark.parametrize("claim", ["fp32", "bf16"])
@pytest.mark.parametrize(("id", "cases"), KNOWN, ids=[id for id, _ in KNOWN])
def test_a_known_mistake_is_named_first(id: str, cases: tuple[str, ...], claim: str, tmp_path: Path) -> None:
    evidence = [port(case, tmp_path, reading(id).change, claim) for case in cases]
    found = diagnose(evidence, CLAIMS[claim], (), tuple(MUTANTS.values()))
    assert id in first_ids(found), diagnosis_report.text(found)
    assert set(found.findings[0].cases) == set(cases)
    assert found.findings[0].closer > 1.0


@pytest.mark.parametrize("claim", ["fp32", "bf16"])
@pytest.mark.parametrize("case", ["gate/v3", "moe/v2", "mla/no-query-latent", "rope/yarn-vjp", "norm/ranges"])
def test_a_right_port_gets_no_diagnosis_though_it_were_called_wrong(
    case: str, claim: str, tmp_path: Path
) -> None:
    found = diagnose([port(case, tmp_path, unchanged, claim)], CLAIMS[claim], (), tuple(MUTANTS.values()))
    assert found.findings == ()
    assert found.unexplained == (case,)


@pytest.mark.parametrize("member", ZOO[::7], ids=lambda member: member.name)
def test_a_member_of_the_zoo_gets_no_diagnosis(member, tmp_path: Path) -> None:
    """Evidence is what it computes where it claims the most; more of them are tried by bench/diagnosis.py."""
    claim = "fp32" if "fp32" in member.claims else "bf16"
    cases = [case for case in ("moe/v2", "rope/yarn") if member.runs(case.partition("/")[0])]
    evidence = [port(case, tmp_path, claim=claim, program=member.outputs) for case in cases]
    assert diagnose(evidence, CLAIMS[claim], (), tuple(MUTANTS.values())).findings == ()


def _last_weight_first(ops):
    """Not in the catalogue: every token's weights go to its experts in reverse."""

    def forward(c, x, idx, weight):
        return ops.experts.forward(c, x, idx, weight[:, ::-1])

    return Op(forward, ops.experts.backward)


def _scaled(ops):
    return lambda config, choices: 1.25 * ops.softmax_scale(config, choices)


@pytest.mark.parametrize("claim", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("change", "case", "stage"),
    [
        (operations(experts=_last_weight_first), "moe/v2", "model.layers.3.mlp.experts"),
        (operations(softmax_scale=_scaled), "mla/no-query-latent", "model.layers.3.self_attn.scores"),
        (configured(routed_scaling_factor=2.0), "gate/v3", "model.layers.3.mlp.gate.topk_weight"),
    ],
    ids=["weights-reversed", "scale", "factor"],
)
def test_an_unknown_mistake_is_not_named_but_its_stage_is(
    change, case: str, stage: str, claim: str, tmp_path: Path
) -> None:
    found = diagnose([port(case, tmp_path, change, claim)], CLAIMS[claim], (), tuple(MUTANTS.values()))
    assert found.findings == (), diagnosis_report.text(found)
    assert found.accounts[0].stage == stage
    assert "no known mistake" in diagnosis_report.text(found).splitlines()[0]


def test_a_constant_factor_is_said_with_its_value(tmp_path: Path) -> None:
    evidence = port("mla/no-query-latent", tmp_path, operations(softmax_scale=_scaled))
    (account,) = diagnose([evidence], FP32, (), tuple(MUTANTS.values())).accounts
    assert "It is 1.25 times what it should be." in account.sentences


def test_two_mistakes_at_once_are_both_named(tmp_path: Path) -> None:
    first, second, case = "A07", "Y07", "mla/no-query-latent"
    evidence = port(case, tmp_path, both(reading(first).change, reading(second).change))
    found = diagnose([evidence], FP32, (), tuple(MUTANTS.values()))
    assert {first, second} in [{id[:3] for id in ids} for ids in found.findings[0].names], (
        diagnosis_report.text(found)
    )


def test_two_mistakes_in_different_cases_are_two_findings(tmp_path: Path) -> None:
    evidence = [
        port("gate/v3", tmp_path, reading("G13").change),
        port("rope/plain", tmp_path, reading("R01").change),
    ]
    found = diagnose(evidence, FP32, (), tuple(MUTANTS.values()))
    assert {finding.names[0][0][:3] for finding in found.findings} == {"G13", "R01"}


def test_mistakes_of_the_same_numbers_are_named_together(tmp_path: Path) -> None:
    twins = (Mutant("G13", configured(routed_scaling_factor=1.0)), Mutant("G14", reading("G13").change))
    found = diagnose([port("gate/v3", tmp_path, reading("G13").change)], FP32, (), twins)
    assert set(found.findings[0].names) == {("G13",), ("G14",)}
    assert found.findings[0].certain


def test_a_passing_case_excludes_what_would_have_made_it_fail(tmp_path: Path) -> None:
    """Two mistakes with the same numbers in one case, of which one would show in another that passes."""

    def only_v3(s):
        return reading("G13").change(s) if s.config.has_selection_bias else s

    twins = (Mutant("G13", reading("G13").change), Mutant("G11", only_v3))
    failing = [port("gate/v3", tmp_path, only_v3)]
    alone = diagnose(failing, FP32, (), twins)
    assert len(alone.findings[0].names) == 2
    passing = [port("gate/v2-groups", tmp_path)]
    assert diagnose(failing, FP32, passing, twins).findings[0].names == (("G11",),)


def test_a_benign_mistake_is_never_named(tmp_path: Path) -> None:
    harmless = tuple(replace(m, benign=True) for m in MUTANTS.values() if m.entry == "G13")
    assert diagnose([port("gate/v3", tmp_path, reading("G13").change)], FP32, (), harmless).findings == ()


def test_a_mistake_that_the_roundings_of_the_claim_exceed_is_not_named(tmp_path: Path) -> None:
    finer = tuple(replace(m, claims=("fp32", "tf32")) for m in MUTANTS.values() if m.entry == "G13")
    assert diagnose([port("gate/v3", tmp_path, finer[0].change)], FP32, (), finer).findings
    assert diagnose([port("gate/v3", tmp_path, finer[0].change, "bf16")], BF16, (), finer).findings == ()


@pytest.mark.parametrize("elsewhere", [1.0, 1e4])
def test_cases_in_which_a_refuted_mistake_comes_nearer_prove_nothing(
    elsewhere: float, tmp_path: Path
) -> None:
    """Two have about the port's numbers in gate/v3; the nearer one is far off in other cases that fail."""

    def coinciding(s):
        factor = 1.001 if s.config.has_selection_bias else elsewhere
        return configured(routed_scaling_factor=factor * s.config.routed_scaling_factor)(s)

    def scaled(by):
        return configured(routed_scaling_factor=lambda c: by * c.routed_scaling_factor)

    def about(s):
        return scaled(1.0010001)(s) if s.config.has_selection_bias else s

    failing = [port("gate/v3", tmp_path, scaled(1.001))]
    failing += [port(f"gate/{case}", tmp_path, scaled(1.00003)) for case in ("v2-groups", "v2-greedy")]
    found = diagnose(failing, FP32, (), (Mutant("G13", coinciding), Mutant("G12", about)))
    assert bool(found.findings) == (elsewhere == 1.0)


def test_few_tensors_are_enough_and_others_are_not_asked_for(tmp_path: Path) -> None:
    probes = [t.name for t in port("gate/v3", tmp_path).folder.case.outputs if t.role == "probe"]
    evidence = port("gate/v3", tmp_path, reading("G13").change, without=probes)
    assert "G13" in first_ids(diagnose([evidence], FP32, (), tuple(MUTANTS.values())))


def test_a_diagnosis_is_the_same_each_time(tmp_path: Path) -> None:
    evidence = [port("gate/v3", tmp_path, reading("G01").change, "bf16")]
    one, other = (diagnose(evidence, BF16, (), tuple(MUTANTS.values())) for _ in range(2))
    assert replace(one, seconds=0.0) == replace(other, seconds=0.0)


def test_the_report_begins_with_the_name_and_how_sure_it_is(tmp_path: Path) -> None:
    found = diagnose([port("gate/v3", tmp_path, reading("G13").change)], FP32, (), tuple(MUTANTS.values()))
    lines = diagnosis_report.text(found).splitlines()
    assert lines[0].startswith("Diagnosis: G13 (")
    assert "1 case" in lines[0]
    assert any(line.strip().startswith("right ") for line in lines)
    assert any("ROUTE-" in line for line in lines)


def test_check_diagnoses_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(port("gate/v3", tmp_path, reading("G13").change).output)
    assert cli.main(["check", str(GOLDEN / "gate" / "v3"), output]) == 1
    assert "Diagnosis" not in capsys.readouterr().out
    assert cli.main(["check", str(GOLDEN / "gate" / "v3"), output, "--diagnose"]) == 1
    assert "Diagnosis: G13" in capsys.readouterr().out
    cli.main(["check", str(GOLDEN / "gate" / "v3"), output, "--diagnose", "--json", "-"])
    said = json.loads(capsys.readouterr().out)
    assert said["diagnosis"]["findings"][0]["mistakes"][0][0]["id"][:3] == "G13"
    assert said["stages"]["off"] == ["model.layers.3.mlp.gate.topk_weight"]


def test_outputs_that_hold_are_witnesses_and_not_to_be_explained(tmp_path: Path) -> None:
    judged = []
    for case, change in (("gate/v3", reading("G13").change), ("norm/hidden", unchanged)):
        evidence = port(case, tmp_path, change)
        judged.append((evidence.folder, evidence.output, check(GOLDEN / case, evidence.output, "fp32"), {}))
    (found,) = diagnosing.of_outputs(judged)
    assert found.explained == ("gate/v3",)
    assert np.isclose(found.findings[0].share, 1.0, atol=0.05)
