"""`check` on cases of kind bits and on fingerprints."""

import json

import numpy as np
import pytest

from refimpl import cli
from refimpl.cases import folder
from refimpl.cases.arithmetics import FINGERPRINTS
from refimpl.cases.build import build
from refimpl.cases.instruments import Data
from refimpl.cases.suites import definition
from refimpl.checkpoint import safetensors
from refimpl.checkpoint.dtypes import Stored
from refimpl.errors import Invalid
from refimpl.validate import report
from refimpl.validate.verdict import check

IDS = (
    "quantise/scale-layouts",
    "casts/e4m3-ptx",
    "tensorcore/wgmma-bf16-k16",
    "gemm/masked",
    "fingerprint/gemm-fp8-tensor",
    "fingerprint/cast-e4m3",
)


@pytest.fixture(scope="module", params=[True, False], ids=["whole", "compact"])
def golden(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("golden")
    for id in IDS:
        built = build(definition(id))
        folder.write(root, built.case, built.given, built.expected, built.extras, request.param)
    return root


@pytest.fixture(scope="module")
def right():
    """case -> output -> what a right port stores."""
    found = {}
    for id in IDS:
        built = build(definition(id))
        found[id] = {t.name: folder.stored(built.expected[t.name], t.dtype) for t in built.case.outputs}
    return found


@pytest.fixture
def judge(golden, tmp_path):
    def run(id, tensors, claim=None):
        safetensors.write(tmp_path / "out.safetensors", tensors)
        return check(golden / id, tmp_path / "out.safetensors", claim)

    return run


def _changed(stored, at=0):
    codes = stored.get("x").copy()
    codes.view(f"<u{codes.dtype.itemsize}").reshape(-1)[at] ^= 1
    return Stored(stored.dtype, stored.shape, codes)


@pytest.mark.parametrize("id", IDS)
def test_the_right_bits_hold(judge, right, id):
    verdict = judge(id, right[id])
    assert verdict.holds
    assert "It holds." in report.text(verdict)
    assert judge(id, right[id], "bits").holds
    json.loads(report.to_json(verdict))


@pytest.mark.parametrize("id", IDS)
def test_one_wrong_bit_anywhere_does_not(judge, right, id):
    name = next(iter(right[id]))
    size = int(np.prod(right[id][name].shape))
    for at in (0, size // 2, size - 1):
        verdict = judge(id, right[id] | {name: _changed(right[id][name], at)})
        assert not verdict.holds
        assert verdict.first_off.name == name


def test_codes_may_come_as_unsigned_integers(judge, right):
    plain = {n: s.get(n).view(f"<u{s.get(n).dtype.itemsize}") for n, s in right["casts/e4m3-ptx"].items()}
    assert judge("casts/e4m3-ptx", plain).holds
    verdict = judge("casts/e4m3-ptx", {n: x.astype(np.float32) for n, x in plain.items()})
    assert verdict.first_off.verdict == "malformed"
    assert "dtype F32 instead of F8_E4M3, or its codes as U8" in verdict.first_off.note


def test_integers_have_to_come_in_their_type(judge, right):
    own = right["quantise/scale-layouts"]
    packed = own["packed"].get("packed")
    verdict = judge("quantise/scale-layouts", own | {"packed": packed.view(np.uint32)})
    assert verdict.first_off.note == "dtype U32 instead of I32"
    assert judge("quantise/scale-layouts", own | {"packed": packed}).holds


def test_wrong_shapes_are_malformed_and_missing_tensors_are_named(judge, right):
    own = right["casts/e4m3-ptx"]
    verdict = judge("casts/e4m3-ptx", {"codes_bf16": own["codes_bf16"].get("x")[:5]})
    assert [t.verdict for t in verdict.tensors] == ["malformed", "missing"]
    assert not verdict.holds
    assert "codes_f32: missing, it is required" in report.text(verdict)


def test_a_product_may_be_given_in_bf16_alone(judge, right):
    own = right["gemm/masked"]
    assert judge("gemm/masked", {"d_bf16": own["d_bf16"]}).holds
    assert judge("gemm/masked", {"d": own["d"]}).holds
    assert not judge("gemm/masked", {}).holds
    assert not judge("gemm/masked", {"d": own["d"], "d_bf16": _changed(own["d_bf16"])}).holds


def test_another_nan_holds_where_any_does(judge, right):
    own = right["tensorcore/wgmma-bf16-k16"]["d"].get("d").view(np.uint32).copy()
    nan = np.isnan(own.view(np.float32))
    assert nan.any()
    own[nan] = 0xFFC00000
    assert judge("tensorcore/wgmma-bf16-k16", {"d": own.view(np.float32)}).holds


def test_a_precision_cannot_be_claimed_for_bits(judge, right):
    with pytest.raises(Invalid, match="compares bits, but fp32 was claimed"):
        judge("casts/e4m3-ptx", right["casts/e4m3-ptx"], "fp32")


def _alternative(id, name):
    d = definition(id)
    given = {n: source.made(f"{d.id} {n}")[0] for n, source in d.inputs.items()}
    data = Data(given, {n: source.dtype for n, source in d.inputs.items()}, d.arguments)
    row = next(r for r in FINGERPRINTS[d.fingerprint](data).alternatives if r.name == name)
    return {n: folder.stored(folder.as_codes(o.array), o.dtype) for n, o in row.compute(data).items()}


def test_a_wrong_arithmetic_is_named_and_does_not_hold(judge):
    verdict = judge("fingerprint/gemm-fp8-tensor", _alternative("fingerprint/gemm-fp8-tensor", "unpromoted"))
    assert not verdict.holds
    assert verdict.arithmetic == ("unpromoted",)
    assert "Arithmetic: unpromoted" in report.text(verdict)
    assert "which the case does not allow" in verdict.first_off.note
    assert json.loads(report.to_json(verdict))["arithmetic"] == ["unpromoted"]


def test_another_allowed_arithmetic_holds_and_is_named(judge):
    verdict = judge(
        "fingerprint/gemm-fp8-tensor", _alternative("fingerprint/gemm-fp8-tensor", "fp32-sequential")
    )
    assert verdict.holds
    assert verdict.arithmetic == ("fp32-sequential",)


def test_bits_of_no_alternative_say_so(judge, right):
    id = "fingerprint/cast-e4m3"
    verdict = judge(id, {"codes": _changed(right[id]["codes"], 7)})
    assert verdict.arithmetic == ()
    assert "Arithmetic: none of the listed" in report.text(verdict)
    assert "agrees most with" in verdict.first_off.note


def test_an_output_without_a_usable_tensor_has_no_arithmetic(judge):
    verdict = judge("fingerprint/cast-e4m3", {"codes": np.zeros(3, np.uint8)})
    assert not verdict.holds
    assert verdict.arithmetic == ()


def test_the_command_line_says_it_by_its_status(golden, right, tmp_path, capsys):
    id, output = "fingerprint/gemm-fp8-tensor", tmp_path / "out.safetensors"
    for tensors, status, name in (
        (right[id], 0, "promoted-128"),
        (_alternative(id, "unpromoted"), 1, "unpromoted"),
    ):
        safetensors.write(output, tensors)
        assert cli.main(["check", str(golden / id), str(output)]) == status
        assert f"Arithmetic: {name}\n" in capsys.readouterr().out
