"""Fingerprints: every alternative is told from every other, and named."""

from itertools import combinations

import numpy as np
import pytest

from refimpl.cases import exact, fingerprints
from refimpl.cases.arithmetics import FINGERPRINTS
from refimpl.cases.build import build
from refimpl.cases.instruments import Data
from refimpl.cases.suites import definition, suite

CASES = suite("fingerprint")
ISSUE = {  # what has to be told apart, and where
    "wgmma-fp8-e4m3-e4m3": {"hopper", "aligned-to-nearest", "fp32-sequential", "mma.sync", "25-bits"},
    "wgmma-bf16": {"24-bits", "steps-of-8", "no-lowest", "lowest-132", "lowest-134", "aligned-to-nearest"},
    "wgmma-fp16": {"24-bits", "steps-of-8", "fp16-accumulator"},
    "gemm-fp8": {"deepgemm", "deepgemm-apart", "triton-mma", "fp32-sequential", "promote-fp32", "exact"},
    "gemm-fp8-tensor": {"unpromoted", "promoted-128", "unpromoted-nearest", "fp32-sequential"},
    "cast-e4m3": {"ptx", "toward-zero"},
    "quantise": {
        "ieee",
        "triton_v3",
        "deepgemm_sat",
        "scale-division-value-div.full",
        "noclamp",
        "ue8m0-truncated",
    },
}


@pytest.fixture(scope="module")
def outputs():
    """case -> alternative -> output -> codes, computed apart from the table of the case."""
    found = {}
    for d in CASES:
        given = {name: source.made(f"{d.streams or d.id} {name}")[0] for name, source in d.inputs.items()}
        data = Data(given, {name: source.dtype for name, source in d.inputs.items()}, d.arguments)
        question = FINGERPRINTS[d.fingerprint](data)
        found[d.id] = {
            row.name: {n: exact.stored(o.array, o.dtype, d.any_nan) for n, o in row.compute(data).items()}
            for row in question.alternatives
        }
    return found


@pytest.mark.parametrize("d", CASES, ids=lambda d: d.id)
def test_bits_at_the_positions_tell_all_alternatives_apart(d):
    table = build(d).case.fingerprint
    for one, other in combinations(table["alternatives"], 2):
        assert one["bits"] != other["bits"], (one["name"], other["name"])
        assert one["sha256"] != other["sha256"]
    assert len({row["name"] for row in table["alternatives"]}) == len(table["alternatives"])


@pytest.mark.parametrize("d", CASES, ids=lambda d: d.id)
def test_every_alternative_is_named_and_passes_if_it_is_allowed(d, outputs):
    case = build(d).case
    allowed = {row["name"]: row["allowed"] for row in case.fingerprint["alternatives"]}
    required = [t for t in case.outputs if t.instead_of is None]
    for name, codes in outputs[d.id].items():
        found = fingerprints.identify(case.fingerprint, {t.name: (t, codes[t.name]) for t in required})
        assert found.names == (name,)
        assert found.allowed is allowed[name]


@pytest.mark.parametrize("d", CASES, ids=lambda d: d.id)
def test_the_table_has_the_bits_of_the_alternatives(d, outputs):
    case = build(d).case
    for row in case.fingerprint["alternatives"]:
        for name, at in case.fingerprint["positions"].items():
            codes = outputs[d.id][row["name"]][name].reshape(-1)[at]
            assert [int(text, 16) for text in row["bits"][name]] == codes.tolist()


@pytest.mark.parametrize("name", list(ISSUE))
def test_what_has_to_be_told_apart_is_there(name):
    table = build(definition(f"fingerprint/{name}")).case.fingerprint
    names = {part for row in table["alternatives"] for part in row["name"].split(" = ")}
    assert ISSUE[name] <= names


@pytest.mark.parametrize("d", CASES, ids=lambda d: d.id)
def test_other_bits_are_none_of_the_listed(d, outputs):
    case = build(d).case
    t = case.outputs[0]
    codes = next(iter(outputs[d.id].values()))[t.name].copy()
    at = case.fingerprint["positions"][t.name][:1] or [0]
    codes.reshape(-1)[at] ^= codes.dtype.type(22)
    found = fingerprints.identify(case.fingerprint, {t.name: (t, codes)})
    assert (found.names, found.allowed) == ((), False)
    assert found.nearest.startswith("agrees")


def test_the_expected_tensors_are_those_of_the_first_alternative(outputs):
    for d in CASES:
        built = build(d)
        first = outputs[d.id][built.case.fingerprint["alternatives"][0]["name"]]
        assert all(np.array_equal(first[name], built.expected[name]) for name in first)
        assert built.case.fingerprint["alternatives"][0]["allowed"]


def test_saturation_and_nan_are_told_apart():
    table = build(definition("fingerprint/cast-e4m3")).case.fingerprint
    names = [row["name"] for row in table["alternatives"]]
    assert any("ptx" in name.split(" = ") for name in names)
    together = next(name for name in names if "torch-2.11" in name.split(" = "))
    assert "torch-2.13" not in together.split(" = ")


def test_two_equal_rows_are_found_and_few_positions_suffice():
    assert fingerprints.telling(np.array([[1, 2], [3, 4], [1, 2]])) == (0, 2)
    assert fingerprints.telling(np.array([[1, 5, 0], [2, 5, 0], [3, 5, 1]])) == [0, 2]


def test_no_fingerprint_needs_many_positions():
    for d in CASES:
        positions = build(d).case.fingerprint["positions"]
        assert sum(map(len, positions.values())) <= 40
