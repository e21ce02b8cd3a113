"""case.json: canonical, checked, and nothing that it says is believed."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.cases import format
from refimpl.cases.build import build
from refimpl.cases.format import Case
from refimpl.cases.suites import definition
from refimpl.errors import Invalid, Unreadable


@pytest.fixture(scope="module")
def case():
    return build(definition("gate/single")).case


def _read(tmp_path, value):
    (tmp_path / "case.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return format.read(tmp_path)


def test_reading_gives_back_what_was_written(case, tmp_path):
    assert _read(tmp_path, case.to_json()).to_json() == case.to_json()


def test_the_text_does_not_depend_on_the_run(case):
    assert build(definition("gate/single")).case.to_json() == case.to_json()


def test_a_digest_is_that_of_the_little_endian_bytes():
    x = np.array([[1.0, -2.5], [0.0, 3.0]])
    assert format.digest(x, "F64") == hashlib.sha256(x.astype("<f8").tobytes()).hexdigest()
    assert format.digest(x, "BF16") == hashlib.sha256(bytes.fromhex("803f 20c0 0000 4040")).hexdigest()
    assert format.digest(x.T, "F64") == hashlib.sha256(x.T.copy().tobytes()).hexdigest()


@pytest.mark.parametrize(("value", "dtype"), [(1 + 2.0**-9, "BF16"), (1 + 2.0**-30, "F32"), (0.5, "I64")])
def test_a_value_that_the_dtype_has_not_is_refused(value, dtype):
    with pytest.raises(Invalid, match="exact in"):
        format.encode(np.array([value]), dtype)


@given(st.lists(st.floats(0, 1e38), min_size=1))
def test_rounding_upwards_goes_to_the_next_bf16(values):
    x = np.array(values)
    up = format.upwards(x)
    assert (up >= x).all()
    assert np.array_equal(format.upwards(up), up)  # bf16 values stay
    assert (up <= x * (1 + 2.0**-7) + 2.0**-132).all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"format": 2}, "format is 2; 1 is required"),
        ({"id": "../../etc"}, "id is"),
        ({"kind": "magic"}, "kind is"),
        ({"kind": "reject"}, "reject must go with reject"),
        ({"surprise": 1}, "surprise is not known"),
        ({"tensors": []}, "tensors has 0 items"),
    ],
)
def test_a_damaged_case_is_refused_in_one_sentence(case, tmp_path, damage, message):
    value = json.loads(case.to_json()) | damage
    with pytest.raises(Unreadable, match=message) as caught:
        _read(tmp_path, value)
    assert "\n" not in str(caught.value)


def test_a_tensor_twice_or_a_reference_to_nothing_is_refused(case, tmp_path):
    value = json.loads(case.to_json())
    value["tensors"].append(value["tensors"][0])
    with pytest.raises(Unreadable, match="listed twice"):
        _read(tmp_path, value)
    value = json.loads(case.to_json())
    value["tensors"][-1]["decided_by"] = ["nobody"]
    with pytest.raises(Unreadable, match="refers to nobody"):
        _read(tmp_path, value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": NaN}', "\x00", "[" * 100000])
def test_what_is_no_json_object_is_refused(tmp_path, text):
    with pytest.raises((Unreadable, Invalid)):
        _read(tmp_path, text)


def test_a_huge_file_is_not_read(tmp_path):
    (tmp_path / "case.json").write_bytes(b" " * (format.LIMIT + 1))
    with pytest.raises(Unreadable, match="larger than"):
        format.read(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(Unreadable, match="nowhere"):
        format.read(tmp_path / "nowhere")
    with pytest.raises(Unreadable, match="not a folder"):
        format.cases(tmp_path / "nowhere")


def test_text_that_fits_is_on_one_line_and_the_rest_is_indented():
    assert format.pretty({"a": [1, 2], "b": "x"}) == '{"a": [1, 2], "b": "x"}'
    long = format.pretty({"a": ["x" * 80, "y" * 80]})
    assert json.loads(long) == {"a": ["x" * 80, "y" * 80]}
    assert long.splitlines()[1] == ' "a": ['


def test_every_field_of_a_case_is_in_the_schema(case):
    from refimpl.cases import schema

    known = schema.shipped("schema.json")["properties"]
    assert set(Case.__dataclass_fields__) | {"format"} == set(known)
