"""Verification: what was changed in a committed folder is named."""

import json
import shutil

import numpy as np
import pytest

from refimpl.cases import folder
from refimpl.cases.build import build
from refimpl.cases.generate import generate
from refimpl.cases.suites import definition
from refimpl.cases.verify import verify
from refimpl.checkpoint import safetensors
from refimpl.errors import Unreadable


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("golden")
    generate(["embedding"], root, whole=False, jobs=1)
    return root


@pytest.fixture
def golden(made, tmp_path):
    shutil.copytree(made, tmp_path / "golden")
    return tmp_path / "golden"


def _what(root):
    return {(d.case, d.what) for d in verify(root)[1]}


def test_what_was_written_is_what_is_computed(golden):
    assert verify(golden) == (3, [])


@pytest.mark.parametrize("whole", [True, False])
def test_whole_and_compact_folders_hold_with_small_and_large_inputs(tmp_path, whole):
    generate(["embedding", "rope"], tmp_path, whole=whole, jobs=1)
    assert verify(tmp_path) == (15, [])


def test_a_changed_digest_names_the_tensor(golden):
    path = golden / "embedding/vjp/case.json"
    case = json.loads(path.read_text())
    case["tensors"][-1]["sha256"] = "0" * 64
    path.write_text(json.dumps(case))
    assert _what(golden) == {("embedding/vjp", "tensor grad.model.embed_tokens.weight differs")}


def test_other_bytes_of_the_same_case_are_noticed(golden):
    path = golden / "embedding/vjp/case.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert _what(golden) == {("embedding/vjp", "case.json says the same in other bytes")}


def test_a_changed_title_or_tolerance_is_noticed(golden):
    path = golden / "embedding/vjp/case.json"
    case = json.loads(path.read_text())
    path.write_text(json.dumps(case | {"title": "another"}))
    assert _what(golden) == {("embedding/vjp", "case.json differs")}
    case["tensors"][-1]["spread"] = [9.0, 9.0, 9.0]
    path.write_text(json.dumps(case))
    assert _what(golden) == {("embedding/vjp", "what judges tensor grad.model.embed_tokens.weight differs")}


def test_one_changed_bit_of_a_sample_is_noticed(golden):
    path = golden / "embedding/vjp/expected.safetensors"
    name = "samples/grad.model.embed_tokens.weight"
    data = bytearray(path.read_bytes())
    data[safetensors.open_file(path).entries[name].begin] ^= 1
    path.write_bytes(data)
    assert _what(golden) == {("embedding/vjp", f"expected.safetensors has other bits in {name}")}


def test_missing_and_surplus_tensors_are_named(golden):
    path = golden / "embedding/exact/inputs.safetensors"
    safetensors.write(path, {"other": np.zeros(1)})
    found = _what(golden)
    assert ("embedding/exact", "inputs.safetensors lacks ids") in found
    assert ("embedding/exact", "inputs.safetensors has other, which is not computed") in found


def test_missing_and_unknown_cases_are_named(golden):
    (golden / "embedding/vjp").rename(golden / "embedding/older")
    assert _what(golden) == {
        ("embedding/vjp", "is not there"),
        ("embedding/older", "is no case of this version"),
    }


def test_a_damaged_case_is_a_difference_and_not_an_end(golden):
    (golden / "embedding/vjp/case.json").write_text("{")
    (golden / "embedding/exact/expected.safetensors").unlink()
    found = verify(golden)[1]
    assert [d.case for d in found] == ["embedding/exact", "embedding/vjp"]
    assert all(d.what.startswith("cannot be read") for d in found)


def test_a_folder_without_cases_cannot_be_verified(tmp_path):
    with pytest.raises(Unreadable, match="no golden cases"):
        verify(tmp_path)


@pytest.mark.parametrize("whole", [True, False])
def test_cases_of_bits_hold_whole_and_compact(tmp_path, whole):
    for id in ("casts/e4m3-ptx", "gemm/masked", "formats/e5m6", "fingerprint/cast-e4m3"):
        built = build(definition(id))
        folder.write(tmp_path, built.case, built.given, built.expected, built.extras, whole)
    count, differences = verify(tmp_path)
    assert count == 4
    assert {d.what for d in differences} == {"is not there"}  # the rest of the suites
