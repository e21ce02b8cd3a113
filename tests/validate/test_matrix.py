"""The kill matrix: factors, what they come to, the command, and golden/matrix.json."""

from __future__ import annotations

import json
import math
import shutil
from functools import cache
from pathlib import Path

import pytest

from refimpl.cases import format
from refimpl.cli import main
from refimpl.errors import Invalid
from refimpl.validate import matrix, matrix_report
from refimpl.variants.mutants import EVERY
from refimpl.variants.mutants.bits import BitsMutant
from refimpl.variants.mutants.mutant import Mutant
from refimpl.variants.variation import unchanged

GOLDEN = Path(__file__).parent.parent.parent / "golden"
STORED = json.loads((GOLDEN / "matrix.json").read_text())["mutants"]
SAMPLE = (  # cases that are computed again, a few seconds in all
    "norm/epsilon",
    "rope/yarn",
    "attention/causal-vjp",
    "mlp/narrow-vjp",
    "gate/bias-12",
    "gate/v2-groups-vjp",
    "moe/v2",
    "quantise/dequantise-weights",
    "schedule/dualpipe-8x20",
    "schedule/illegal-deadlock-1f1b",
)


def wrong(id: str = "G12", claims: tuple[str, ...] = ("fp32", "bf16"), **more) -> Mutant:
    return Mutant(id, unchanged, claims, **more)


@cache
def column(case: str) -> matrix.Exceeded:
    return matrix.of_case(str(GOLDEN / case), tuple(EVERY))[1]


def stored(mutant: Mutant | BitsMutant) -> matrix.Outcome:
    """What golden/matrix.json says about a mutant."""
    row = STORED[mutant.id]
    cases = {
        case: {c: f for c, f in zip(row["claims"], factors, strict=True) if f is not None}
        for case, factors in row["cases"].items()
    }
    return matrix.outcome(mutant, cases)


class TestOutcome:
    def test_the_worst_case_is_that_of_the_strictest_claim(self) -> None:
        cases = {
            "a/1": {"fp32": 20.0, "bf16": 0.5},
            "a/2": {"fp32": 0.5, "bf16": 30.0},
            "a/3": {"bf16": 50.0},
        }
        found = matrix.outcome(wrong(), cases)
        assert (found.applies, found.killed, found.case, found.factor) == (3, 1, "a/1", 20.0)
        assert (found.survives, found.fault) == ((), "")

    def test_a_claim_at_which_no_case_rejects_it_is_listed_and_no_fault(self) -> None:
        found = matrix.outcome(wrong(), {"a/1": {"fp32": 20.0, "bf16": 1.0}})
        assert (found.survives, found.fault) == (("bf16",), "")

    @pytest.mark.parametrize("cases", [{}, {"a/1": {"bf16": 20.0}}, {"a/1": {"fp32": 1.0}}])
    def test_a_survivor_at_the_strictest_claim_is_a_fault(self, cases) -> None:
        assert matrix.outcome(wrong(), cases).fault == "survives at fp32"

    def test_a_small_factor_needs_a_reason(self) -> None:
        cases = {"a/1": {"fp32": 9.9}}
        assert matrix.outcome(wrong(), cases).fault == "is rejected by a factor of 9.9 only"
        assert matrix.outcome(wrong(small="a matter of an ulp"), cases).fault == ""

    def test_a_benign_one_may_be_rejected_at_no_claim(self) -> None:
        assert matrix.outcome(wrong(benign=True), {"a/1": {"fp32": 0.9, "bf16": 0.1}}).fault == ""
        found = matrix.outcome(wrong(benign=True), {"a/1": {"fp32": 0.9, "tf32": 1.1}})
        assert found.fault == "is benign and is rejected by a/1"

    def test_bits_have_no_factor(self) -> None:
        found = matrix.outcome(BitsMutant("F02", {}), {"a/1": {"bits": math.inf}})
        assert (found.killed, found.fault) == (1, "")
        assert matrix_report.shown(found.factor, found.strictest) == ""


class TestRunning:
    def test_twice_the_factor_is_twice_the_weights_where_the_tolerance_is_relative(self) -> None:
        """G13 leaves out 2.5, so weights are off by 0.6 of themselves; G12 by 1.5 of themselves."""
        found = column("gate/v2-groups-vjp")
        right = 16.0
        for claim in ("fp32", "bf16"):
            ratio = found["G12"][claim] / found["G13"][claim]
            assert ratio == pytest.approx((right - 1.0) / (1.0 - 1.0 / right), rel=0.05)

    def test_what_is_coarser_allows_more(self) -> None:
        found = column("gate/bias-12")["G01"]
        assert found["fp32"] > found["fp16"] > 1.0

    def test_a_mutant_that_changes_nothing_does_not_apply(self) -> None:
        assert "G08" not in column("gate/bias-12")  # it is about V2
        assert "Y07" not in column("gate/bias-12")
        assert "Y07" in column("attention/causal-vjp")

    def test_what_cannot_be_touched_is_not_run_and_what_can_be_is(self) -> None:
        """Without the short cut every mutant is run: the same ones apply."""
        for case in ("norm/epsilon", "rope/yarn"):
            short = column(case)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(matrix, "touched", lambda *arguments: True)
                assert matrix.of_case(str(GOLDEN / case), tuple(EVERY))[1] == short

    def test_an_id_names_an_entry_with_all_its_readings_or_one(self) -> None:
        assert matrix.known(["G10", "G12", "G10a"]) == ("G10a", "G10b", "G12")
        with pytest.raises(Invalid, match="mutant 'Q1' is unknown, but it must be one of A01,"):
            matrix.known(["Q1"])

    def test_a_suite_without_cases_is_refused(self) -> None:
        assert {path.parent.name for path in matrix.chosen(GOLDEN, ["gate", "mlp"])} == {"gate", "mlp"}
        with pytest.raises(Invalid, match="suite 'gates' has no case"):
            matrix.chosen(GOLDEN, ["gates"])


class TestCommand:
    def copied(self, root: Path, *cases: str) -> str:
        for case in cases:
            shutil.copytree(GOLDEN / case, root / case)
        return str(root)

    def test_it_prints_a_table_and_the_figures(self, tmp_path: Path, capsys) -> None:
        cases = self.copied(tmp_path, "mlp/narrow")
        assert main(["mutants", "mlp", "--cases", cases, "--id", "G21", "--id", "G01"]) == 0
        printed = capsys.readouterr().out
        assert "swiglu-halves-swapped" in printed
        assert "1 of 1 mutants are killed; of 0 benign ones none is rejected." in printed
        assert printed.splitlines()[-1].startswith("The smallest factor is ")

    def test_a_survivor_is_exit_status_1(self, tmp_path: Path, capsys) -> None:
        cases = self.copied(tmp_path, "gate/v3")
        assert main(["mutants", "--cases", cases, "--id", "G10b"]) == 1
        assert capsys.readouterr().out.splitlines()[-1] == "G10b survives at fp32."

    def test_an_unknown_id_is_exit_status_2(self, capsys) -> None:
        assert main(["mutants", "--cases", str(GOLDEN), "--id", "G99"]) == 2
        assert "mutant 'G99' is unknown" in capsys.readouterr().err

    def test_json_has_everything(self, tmp_path: Path, capsys) -> None:
        cases = self.copied(tmp_path, "quantise/dequantise-weights", "mlp/narrow")
        assert main(["mutants", "--cases", cases, "--id", "F02", "--id", "G21", "--json", "-"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["mutants"]["F02"]["cases"] == {"quantise/dequantise-weights": [1e6]}
        assert found["mutants"]["G21"]["killed"] == 1
        assert found["mutants"]["G21"]["disposition"] == "mutant"

    def test_what_else_is_in_the_file_stays(self, tmp_path: Path) -> None:
        path = tmp_path / "matrix.json"
        path.write_text('{"zoo": {"split-k": [0.5]}, "mutants": {"old": 1, "G12": 2}}')
        cases = self.copied(tmp_path / "cases", "mlp/narrow")
        assert main(["mutants", "--cases", cases, "--id", "G21", "--out", str(path)]) == 0
        found = json.loads(path.read_text())
        assert found["zoo"] == {"split-k": [0.5]}
        assert list(found["mutants"]) == ["G12", "G21"]  # there is no mutant `old`
        assert found["mutants"]["G12"] == 2
        assert main(["mutants", "mlp", "--cases", cases, "--out", str(path)]) == 2


class TestStored:
    """golden/matrix.json: every mutant on every committed case."""

    def test_it_has_every_mutant_and_cases_that_exist(self) -> None:
        assert list(STORED) == sorted(EVERY)
        known = {f"{path.parent.name}/{path.name}" for path in format.cases(GOLDEN)}
        assert {case for row in STORED.values() for case in row["cases"]} <= known

    @pytest.mark.parametrize("mutant", EVERY.values(), ids=lambda mutant: mutant.id)
    def test_every_mutant_is_killed_by_enough_and_no_benign_one(self, mutant: Mutant | BitsMutant) -> None:
        assert stored(mutant).fault == ""

    @pytest.mark.parametrize("case", SAMPLE)
    def test_a_sample_is_computed_again(self, case: str) -> None:
        found = column(case)
        assert {id for id, row in STORED.items() if case in row["cases"]} == found.keys()
        for id, factors in found.items():
            row = STORED[id]
            for claim, stored in zip(row["claims"], row["cases"][case], strict=True):
                assert (stored is None) == (claim not in factors)
                if stored is not None and max(stored, factors[claim]) > 1e-6:
                    assert min(factors[claim], matrix_report.CAP) == pytest.approx(stored, rel=0.06), (
                        id,
                        claim,
                    )

    def test_the_readme_has_its_figures(self) -> None:
        found = [stored(EVERY[id]) for id in STORED]
        words = " ".join((GOLDEN.parent / "README.md").read_text().split())
        assert " ".join(matrix_report.summary(found)) in words
