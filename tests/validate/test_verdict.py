"""`check`: what a port's file may and may not be."""

import json

import numpy as np
import pytest

from refimpl.cases.generate import generate
from refimpl.checkpoint import safetensors
from refimpl.checkpoint.dtypes import Stored
from refimpl.errors import Invalid, Unreadable
from refimpl.validate import report
from refimpl.validate.verdict import check

PATH = "model.layers.3.mlp.gate"
IDX, WEIGHT, LOGITS, SCORES = (f"{PATH}.{leaf}" for leaf in ("topk_idx", "topk_weight", "logits", "scores"))


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    root = tmp_path_factory.mktemp("golden")
    for suite in ("norm", "gate", "reject"):
        generate([suite], root, whole=True, jobs=1) if suite != "gate" else _gate(root)
    return root


def _gate(root):
    from refimpl.cases import folder
    from refimpl.cases.build import build
    from refimpl.cases.suites import definition

    for name in ("bias-12", "unnormalised"):
        built = build(definition(f"gate/{name}"))
        folder.write(root, built.case, built.given, built.expected, built.extras, True)


@pytest.fixture
def right(golden):
    """The exact output of the gate case."""
    file = safetensors.open_file(golden / "gate/bias-12/expected.safetensors")
    return {name: file[name] for name in (LOGITS, SCORES, IDX, WEIGHT)}


@pytest.fixture
def judge(golden, tmp_path):
    def run(tensors, claim="fp32", case="gate/bias-12"):
        safetensors.write(tmp_path / "out.safetensors", tensors)
        return check(golden / case, tmp_path / "out.safetensors", claim)

    return run


def _verdicts(verdict):
    return {t.name: t.verdict for t in verdict.tensors}


def test_the_exact_output_holds(judge, right):
    verdict = judge(right)
    assert verdict.holds
    assert verdict.first_off is None
    assert set(_verdicts(verdict).values()) == {"holds"}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_float32_and_float64_files_are_the_same_to_it(judge, right, dtype):
    assert judge(
        {n: x.astype(dtype) if x.dtype.kind == "f" else x.astype(np.int32) for n, x in right.items()}
    ).holds


def test_probes_are_optional_and_required_tensors_are_not(judge, right):
    assert judge({name: right[name] for name in (IDX, WEIGHT)}).holds
    verdict = judge({name: right[name] for name in (LOGITS, SCORES, IDX)})
    assert not verdict.holds
    assert verdict.first_off.name == WEIGHT
    assert f"{WEIGHT}: missing, it is required" in report.text(verdict)


def test_experts_may_come_in_any_order_with_their_weights(judge, right):
    order = np.random.default_rng(0).permuted(np.tile(np.arange(8), (len(right[IDX]), 1)), axis=1)
    shuffled = {name: np.take_along_axis(right[name], order, -1) for name in (IDX, WEIGHT)}
    assert judge(right | shuffled).holds
    assert not judge(right | {IDX: shuffled[IDX]}).holds


def test_a_wrong_expert_is_named_with_its_row(judge, right):
    ids = right[IDX].copy()
    ids[7, 0] = next(i for i in range(256) if i not in ids[7])
    verdict = judge(right | {IDX: ids})
    assert verdict.first_off.name == IDX
    assert "row 7" in verdict.first_off.note


@pytest.mark.parametrize("bad", [256, -1])
def test_experts_that_do_not_exist_are_malformed(judge, right, bad):
    ids = right[IDX].copy()
    ids[0, 0] = bad
    assert _verdicts(judge(right | {IDX: ids}))[IDX] == "malformed"


def test_an_expert_twice_is_malformed(judge, right):
    ids = right[IDX].copy()
    ids[0, 0] = ids[0, 1]
    assert _verdicts(judge(right | {IDX: ids}))[IDX] == "malformed"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_do_not_hold(judge, right, bad):
    weight = right[WEIGHT].copy()
    weight[3, 2] = bad
    verdict = judge(right | {WEIGHT: weight})
    assert not verdict.holds
    assert verdict.first_off.at == (3, 2)
    json.loads(report.to_json(verdict))


def test_wrong_shapes_and_types_are_one_line_each(judge, right):
    verdict = judge(right | {WEIGHT: right[WEIGHT][:, :7], IDX: right[IDX].astype(np.float64)})
    assert _verdicts(verdict)[WEIGHT] == "malformed"
    assert _verdicts(verdict)[IDX] == "malformed"
    text = report.text(verdict)
    assert f"{WEIGHT}: malformed, shape (48, 7) instead of (48, 8)" in text
    assert f"{IDX}: malformed, dtype F64 instead of one of" in text


def test_surplus_tensors_are_listed_and_change_nothing(judge, right):
    verdict = judge(right | {"loss": np.zeros(1)})
    assert verdict.holds
    assert verdict.surplus == ("loss",)
    assert "surplus tensors, not judged: loss" in report.text(verdict)


def test_the_first_tensor_that_is_off_is_the_first_computed(judge, right):
    verdict = judge(right | {SCORES: 0.9 * right[SCORES], WEIGHT: 0.9 * right[WEIGHT]})
    assert verdict.first_off.name == SCORES
    assert f"in the order of computation: {SCORES}" in report.text(verdict)
    assert "This case is about: bias-rounded" in report.text(verdict)


def test_bf16_output_holds_as_bf16_and_not_as_fp32(golden, tmp_path):
    name = "model.layers.3.input_layernorm"
    exact = safetensors.open_file(golden / "norm/hidden/expected.safetensors")[name]
    codes = ((exact.astype(np.float32).view(np.uint32).astype(np.uint64) + 0x8000) >> 16).astype(np.uint16)
    safetensors.write(tmp_path / "out.safetensors", {name: Stored("BF16", exact.shape, codes)})
    assert check(golden / "norm/hidden", tmp_path / "out.safetensors", "bf16").holds
    assert not check(golden / "norm/hidden", tmp_path / "out.safetensors", "fp32").holds
    assert not check(golden / "norm/hidden", tmp_path / "out.safetensors").holds
    assert check(golden / "norm/hidden", tmp_path / "out.safetensors", "u=2^-8").holds
    assert not check(golden / "norm/hidden", tmp_path / "out.safetensors", "u=2^-22").holds


def test_distances_are_those_of_the_worst_element(golden, tmp_path):
    name = "model.layers.3.input_layernorm"
    exact = safetensors.open_file(golden / "norm/hidden/expected.safetensors")[name]
    theirs = exact.copy()
    theirs[5, 77] += 0.25
    safetensors.write(tmp_path / "out.safetensors", {name: theirs})
    found = check(golden / "norm/hidden", tmp_path / "out.safetensors", "fp32").tensors[0]
    assert found.at == (5, 77)
    assert found.distance.ours == exact[5, 77]
    assert found.distance.theirs == theirs[5, 77]
    assert found.distance.absolute == pytest.approx(0.25)
    assert found.distance.relative == pytest.approx(0.25 / abs(exact[5, 77]))
    assert found.distance.ulps == pytest.approx(0.25 / float(np.spacing(np.float32(abs(exact[5, 77])))))
    assert found.distance.outside == 1 / exact.size


def test_a_claim_that_the_case_does_not_offer_is_refused_with_its_reason(judge, right):
    with pytest.raises(Invalid, match="is not offered for bf16: the verdict would accept"):
        judge(right, "bf16")
    with pytest.raises(Invalid, match="but fp8 was claimed"):
        judge(right, "fp8")


@pytest.mark.parametrize("content", [b"", b"junk" * 100, (1 << 62).to_bytes(8, "little") + b"{}"])
def test_what_is_no_safetensors_file_cannot_be_tried(golden, tmp_path, content):
    (tmp_path / "out.safetensors").write_bytes(content)
    with pytest.raises(Unreadable):
        check(golden / "norm/hidden", tmp_path / "out.safetensors")


def test_a_missing_output_cannot_be_tried(golden, tmp_path):
    with pytest.raises(Unreadable, match=r"none\.safetensors"):
        check(golden / "norm/hidden", tmp_path / "none.safetensors")


def test_an_input_to_refuse_holds_when_nothing_was_written(golden, tmp_path):
    verdict = check(golden / "reject/bias-nan", tmp_path / "out.safetensors")
    assert verdict.holds
    assert "must be refused: a selection bias is NaN" in report.text(verdict)
    (tmp_path / "out.safetensors").write_bytes(b"")
    verdict = check(golden / "reject/bias-nan", tmp_path / "out.safetensors")
    assert not verdict.holds
    assert "an output was written" in report.text(verdict)


def test_the_json_has_the_numbers_of_the_table(judge, right):
    verdict = judge(right | {WEIGHT: 0.9 * right[WEIGHT]})
    value = json.loads(report.to_json(verdict))
    assert value["holds"] is False
    assert value["first_off"] == WEIGHT
    tensor = next(t for t in value["tensors"] if t["name"] == WEIGHT)
    assert tensor["bias"] == pytest.approx(-0.1)
    assert tensor["outside"] == 1.0
