"""Case folders: whole and compact, complete or absent, and checked when they are read."""

import json

import numpy as np
import pytest

from refimpl.cases import folder, format
from refimpl.cases.build import build
from refimpl.cases.folder import Folder
from refimpl.cases.suites import definition
from refimpl.checkpoint import safetensors
from refimpl.errors import Unreadable


@pytest.fixture(scope="module")
def built():
    return build(definition("norm/hidden"))


def _write(root, built, whole):
    folder.write(root, built.case, built.given, built.expected, built.extras, whole)
    return Folder.open(root / built.case.id)


@pytest.mark.parametrize("whole", [True, False])
def test_inputs_come_back_whether_stored_or_generated(tmp_path, built, whole):
    opened = _write(tmp_path, built, whole)
    for t in opened.case.tensors:
        if t.given:
            assert np.array_equal(opened.given(t), built.given[t.name])


def test_a_compact_folder_has_the_samples_of_a_whole_one(tmp_path, built):
    whole, compact = _write(tmp_path / "a", built, True), _write(tmp_path / "b", built, False)
    t = whole.case.outputs[0]
    every, none = whole.judged(t)
    some, index = compact.judged(t)
    assert none is None
    assert np.array_equal(every[index], some)
    assert np.array_equal(
        whole.extra(t, "bound.storage").reshape(-1)[index], compact.extra(t, "bound.storage")
    )
    size = sum(file.stat().st_size for file in compact.path.iterdir())
    assert size < 30_000


def test_both_folders_have_the_same_case_json(tmp_path, built):
    paths = [_write(tmp_path / name, built, name == "a").path / "case.json" for name in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_writing_again_replaces_and_leaves_nothing_behind(tmp_path, built):
    _write(tmp_path, built, True)
    _write(tmp_path, built, False)
    assert [p.name for p in (tmp_path / "norm").iterdir()] == ["hidden"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, Unreadable("no space")])
def test_a_failure_in_the_middle_leaves_the_old_case_or_none(tmp_path, built, monkeypatch, error):
    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_bytes", fail)
        with pytest.raises((KeyboardInterrupt, Unreadable)):
            _write(tmp_path, built, True)
    assert list((tmp_path / "norm").iterdir()) == []
    _write(tmp_path, built, True)
    before = (tmp_path / "norm/hidden/case.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_bytes", fail)
        with pytest.raises((KeyboardInterrupt, Unreadable)):
            _write(tmp_path, built, False)
    assert [p.name for p in (tmp_path / "norm").iterdir()] == ["hidden"]
    assert (tmp_path / "norm/hidden/case.json").read_bytes() == before


def test_changed_bits_of_an_input_or_output_are_noticed(tmp_path, built):
    opened = _write(tmp_path, built, True)
    for name, t in (("inputs", opened.case.tensors[0]), ("expected", opened.case.outputs[0])):
        path = opened.path / f"{name}.safetensors"
        data = bytearray(path.read_bytes())
        data[safetensors.open_file(path).entries[t.name].begin] ^= 1
        path.write_bytes(data)
    damaged = Folder.open(opened.path)
    with pytest.raises(Unreadable, match="another SHA-256"):
        damaged.given(damaged.case.tensors[0])
    with pytest.raises(Unreadable, match="is not the tensor"):
        damaged.judged(damaged.case.outputs[0])


def test_samples_outside_of_their_tensor_are_refused(tmp_path, built):
    opened = _write(tmp_path, built, False)
    path = opened.path / "expected.safetensors"
    name = opened.case.outputs[0].name
    arrays = {f"samples/{name}": np.zeros(2), f"index/{name}": np.array([0, 1 << 30])}
    safetensors.write(path, arrays)
    with pytest.raises(Unreadable, match="do not fit"):
        Folder.open(opened.path).judged(opened.case.outputs[0])


def test_a_key_that_is_not_of_its_stream_is_refused(tmp_path, built):
    opened = _write(tmp_path, built, False)
    value = json.loads((opened.path / "case.json").read_text())
    value["tensors"][0]["generator"]["key"] = "0" * 32
    (opened.path / "case.json").write_text(json.dumps(value))
    damaged = Folder.open(opened.path)
    with pytest.raises(Unreadable, match="the key of stream"):
        damaged.given(damaged.case.tensors[0])


def test_a_file_in_the_place_of_a_folder_is_one_sentence(tmp_path, built):
    (tmp_path / "norm").write_text("")
    with pytest.raises(Unreadable, match="must be a writable folder"):
        _write(tmp_path, built, True)


def test_shared_weights_are_found_beside_the_suites(tmp_path):
    built = build(definition("model/tiny-v3-noq-forced"))
    weights = [t for t in built.case.tensors if t.role == format.WEIGHT]
    stored = {t.name: folder.stored(built.given[t.name], t.dtype) for t in weights}
    folder.write_asset(tmp_path, weights[0].asset, stored)
    opened = _write(tmp_path, built, True)
    assert weights[0].name not in opened.inputs
    assert np.array_equal(opened.given(weights[0]), built.given[weights[0].name])
    data = safetensors.open_file(tmp_path / "assets" / f"{weights[0].asset}.safetensors")
    assert len(data) == len(weights)
