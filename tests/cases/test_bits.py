"""Cases of kind `bits`: what they hold agrees with other implementations, and their folders are complete."""

import json

import jsonschema
import ml_dtypes
import numpy as np
import pytest

from refimpl.cases import bits, folder, format, schema
from refimpl.cases.bits import Bits, Classes, Drawn, Every, Whole
from refimpl.cases.build import build
from refimpl.cases.folder import Folder
from refimpl.cases.generate import definitions
from refimpl.cases.suites import definition, suite
from refimpl.errors import Invalid, Unreadable
from refimpl.numerics import tensorcore_twin
from refimpl.numerics.formats import FORMATS
from refimpl.numerics.gemm import gemm_fp8
from refimpl.numerics.tensorcore import QGMMA

EVERY = [d for d in definitions() if isinstance(d, Bits)]
SMALL = [d for d in EVERY if d.suite in ("formats", "casts", "tensorcore", "fingerprint")]
LIBRARY = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "ue8m0": ml_dtypes.float8_e8m0fnu,
    "bf16": ml_dtypes.bfloat16,
}


def _written(root, d, whole):
    built = build(d)
    folder.write(root, built.case, built.given, built.expected, built.extras, whole)
    return Folder.open(root / d.id), built


@pytest.mark.parametrize("d", SMALL, ids=lambda d: d.id)
def test_case_is_valid_certified_and_the_same_each_time(d):
    case = build(d).case
    text = case.to_json()
    jsonschema.validate(json.loads(text), schema.shipped("schema.json"), jsonschema.Draft202012Validator)
    assert format.Case.from_dict(json.loads(text), "case.json").to_json() == text
    assert case.kind == "bits"
    assert case.claims == ("bits",)
    assert {"zeros", "rows"} <= set(case.certificate["rejects"]["bits"])
    assert build(d).case == case


@pytest.mark.parametrize("whole", [True, False])
def test_inputs_come_back_from_the_file_or_the_generator(tmp_path, whole):
    for id in ("casts/e4m3-ptx", "quantise/scale-layouts", "gemm/along-k", "tensorcore/wgmma-bf16-k16"):
        opened, built = _written(tmp_path, definition(id), whole)
        for t in opened.case.tensors:
            if t.given:
                assert np.array_equal(opened.given_codes(t), built.given[t.name]), t.name


def test_a_whole_folder_has_every_input_and_output_in_its_true_type(tmp_path):
    opened, _ = _written(tmp_path, definition("gemm/masked"), True)
    types = {name: opened.inputs.dtype(name) for name in opened.inputs}
    assert types == {"a": "F8_E4M3", "b": "F8_E4M3", "a_scale": "F32", "b_scale": "F32", "counts": "I32"}
    assert {name: opened.expected.dtype(name) for name in opened.expected} == {"d": "F32", "d_bf16": "BF16"}


def test_a_compact_folder_is_small_and_has_samples(tmp_path):
    opened, built = _written(tmp_path, definition("gemm/masked"), False)
    t = opened.case.outputs[0]
    values, at = opened.judged_codes(t)
    assert np.array_equal(values, built.expected[t.name].reshape(-1)[at])
    assert sum(file.stat().st_size for file in opened.path.iterdir()) < 8_000


@pytest.mark.parametrize("name", list(LIBRARY))
def test_tables_of_formats_are_those_of_ml_dtypes(name):
    built = build(definition(f"formats/{name}"))
    codes, value = built.given["codes"], built.expected["value"].view(np.float32)
    theirs = codes.view(LIBRARY[name]).astype(np.float32)
    assert np.array_equal(value, theirs, equal_nan=True)
    assert np.array_equal(np.signbit(value)[~np.isnan(value)], np.signbit(theirs)[~np.isnan(theirs)])


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz", "bf16"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_casts_are_those_of_ml_dtypes(name):
    built = build(definition(f"casts/{name}-ml_dtypes-0.6"))
    for kind in ("bf16", "f32"):
        codes = built.given[f"x_{kind}"]
        x = (codes.astype(np.uint32) << 16 if kind == "bf16" else codes).view(np.float32)
        theirs = x.astype(LIBRARY[name]).view(np.uint16 if name == "bf16" else np.uint8)
        ours = built.expected[f"codes_{kind}"]
        number = ~np.isnan(x)
        assert np.array_equal(ours[number], theirs[number])


def test_classes_reach_every_code_of_a_format():
    for name in ("e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz"):
        built = build(definition(f"casts/{name}-ml_dtypes-0.6"))
        fmt, seen = FORMATS[name], set(built.expected["codes_bf16"].tolist())
        assert len(seen) >= 2 * fmt.top


def test_classes_have_what_is_beside_the_middle_at_every_place():
    source = definition("casts/e4m3-ptx").inputs["x_f32"]
    assert isinstance(source, Classes)
    for i in range(1, 23):
        assert {1 << i, (1 << i) - 1, (1 << i) + 1} <= set(source.fractions)
    assert {0, 1, 254, 255} <= set(source.exponents)


def test_instructions_are_those_of_the_twin():
    built = build(definition("tensorcore/wgmma-fp8-e4m3-e5m2-k32"))
    a, b, c = (built.given[name] for name in "abc")
    fa, fb = FORMATS["e4m3"], FORMATS["e5m2"]
    for i, j in np.random.default_rng(0).integers(0, 16, (60, 2)).tolist():
        bits_ = tensorcore_twin.step(a[i].tolist(), b[j].tolist(), int(c[i, j]), fa, fb, QGMMA)
        assert bits_ == built.expected["d"][i, j]


def test_operands_are_hard():
    built = build(definition("tensorcore/wgmma-fp8-e4m3-e4m3-k128"))
    d = built.expected["d"].view(np.float32)
    assert 0 < np.isnan(d).mean() < 0.5
    assert (d == 0).any()
    assert len(np.unique(np.frexp(d[np.isfinite(d)])[1])) > 20


def test_kernels_give_different_bits_at_a_real_shape():
    ids = ("deepgemm", "triton-wgmma", "triton-mma", "cublas-split-2", "promote-fp32", "exact")
    found = {name: build(definition(f"gemm/16x2048x2048-{name}")).case.tensor("d").sha256 for name in ids}
    assert len(set(found.values())) == len(ids)


def test_cases_of_one_product_have_the_same_inputs():
    first, second = (build(definition(f"gemm/16x256x18432-{name}")) for name in ("deepgemm", "triton-wgmma"))
    for name in first.given:
        assert first.case.tensor(name).sha256 == second.case.tensor(name).sha256
    given = first.given
    scales = (given[n].view(np.float32) for n in ("a_scale", "b_scale"))
    a_scale, b_scale = scales
    d = gemm_fp8(given["a"], a_scale, given["b"], b_scale, "triton_wgmma")
    assert np.array_equal(d.view(np.uint32), second.expected["d"])


def test_groups_are_products_of_their_own():
    built = build(definition("gemm/contiguous"))
    given, group = built.given, built.given["group"]
    for g in range(3):
        rows = group == g
        d = gemm_fp8(
            given["a"][rows],
            given["a_scale"].view(np.float32)[rows],
            given["b"][g],
            given["b_scale"].view(np.float32)[g],
            "deepgemm",
        )
        assert np.array_equal(d.view(np.uint32), built.expected["d"][rows])
    assert not built.expected["d"][group < 0].any()


def test_quantised_edges_are_there():
    built = build(definition("quantise/triton-v3"))
    codes, scales = built.expected["codes_edges"], built.expected["scales_edges"].view(np.float32)
    assert scales[0, 0] == scales[1, 0] == np.float32(1e-4) * np.float32(1 / 448)
    assert (codes[0] == 0).all()
    assert (codes[1] == 0x80).all()
    assert np.isinf(scales[4, 0])
    assert (codes[3] == 0x7F).sum() == 2


def test_every_recipe_and_kernel_and_behaviour_has_a_case():
    from refimpl.numerics.blockscale import QUANTISERS
    from refimpl.numerics.casts import CASTS
    from refimpl.numerics.gemm import NAMES

    arguments = [d.arguments for d in EVERY if not d.fingerprint]
    assert set(QUANTISERS) <= {a.get("recipe") for a in arguments}
    assert set(NAMES) <= {a.get("kernel") for a in arguments}
    assert set(CASTS) <= {(a.get("behaviour"), a.get("format")) for a in arguments}


def test_sources_make_the_codes_that_their_generator_says():
    for source in (
        Drawn((5, 7)),
        Whole((5, 7), "F8_E4M3", 0, 256),
        Whole((5,), "F32", 1, 99, 0.5),
        Every(8, "U8"),
    ):
        codes, how = source.made("a stream")
        assert np.array_equal(codes, folder.generated_codes(codes.shape, how, source.dtype))


def test_codes_of_the_wrong_width_are_refused():
    with pytest.raises(Invalid, match="codes of BF16 are uint8, but they must have 2 bytes"):
        format.encode(np.zeros(3, np.uint8), "BF16")


def test_a_generator_that_lacks_something_is_refused():
    with pytest.raises(Unreadable, match="a generator has no key"):
        folder.generated_codes((3,), {"seed": 1, "stream": "x", "low": 0, "high": 4}, "U8")


def test_classes_that_do_not_fit_are_refused():
    with pytest.raises(Unreadable, match="both or neither"):
        folder.generated_codes((2,), {"exponents": [1]}, "F32")
    with pytest.raises(Unreadable, match="makes 4 codes"):
        folder.generated_codes((3,), {"exponents": [1], "fractions": [2, 3]}, "F32")


def test_any_nan_of_codes_without_one_is_refused():
    value = json.loads(build(definition("formats/e4m3")).case.to_json())
    value["tensors"][0]["any_nan"] = 3
    with pytest.raises(Unreadable, match="any_nan must be of a float type"):
        format.Case.from_dict(value, "case.json")


def test_a_fingerprint_without_all_its_bits_is_refused():
    value = json.loads(build(definition("fingerprint/cast-e4m3")).case.to_json())
    value["fingerprint"]["alternatives"][1]["bits"]["codes"].pop()
    with pytest.raises(Unreadable, match="bits at every position"):
        format.Case.from_dict(value, "case.json")
    value["fingerprint"]["positions"]["codes"][0] = 1 << 20
    with pytest.raises(Unreadable, match=r"bits at every position|lie in its"):
        format.Case.from_dict(value, "case.json")


def test_a_case_whose_verdict_cannot_fail_is_no_case(monkeypatch):
    d = definition("formats/e4m3")
    monkeypatch.setattr(bits.exact, "spoiled", lambda right, t: {"zeros": right})
    with pytest.raises(Invalid, match="no output that can be wrong"):
        bits.made(d)
    monkeypatch.setattr(bits.exact, "canonical", lambda codes, dtype, nan: codes & 0)
    monkeypatch.setattr(bits.exact, "spoiled", lambda right, t: {"zeros": right ^ np.uint32(1)})
    with pytest.raises(Invalid, match="would accept value when it is wrong: zeros"):
        bits.made(d)


def test_committed_size_of_a_suite_is_bounded(tmp_path):
    for d in suite("casts"):
        _written(tmp_path, d, False)
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) < 400_000
