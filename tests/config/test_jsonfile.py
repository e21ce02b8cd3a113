"""Strict JSON: what is refused, each in one sentence.  SPEC CONF-1."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.config.jsonfile import LIMIT, parse_object, read_object
from refimpl.errors import Error, Invalid, Unreadable


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"a": 1, "a": 2}', 'the key "a" twice'),
        (b'{"x": {"a": 1, "b": 3, "a": 2}}', 'the key "a" twice'),
        (b'{"a": NaN}', "literal NaN"),
        (b'{"a": -Infinity}', "literal -Infinity"),
        (b'{"a": 1e999}', "1e999"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": 1', "not JSON at line 1, column"),
        (b"", "not JSON"),
        (b"[" * 100000, "cannot be read as JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
        (b'{"\\ud800": 1}', "half a surrogate"),
        (b'{"a": ["\\uDC00"]}', "half a surrogate"),
    ],
    ids=range(12),
)
def test_what_is_not_strict_json_is_unreadable(data, words):
    with pytest.raises(Unreadable, match=words) as caught:
        parse_object(data, "config.json")
    assert str(caught.value).startswith("config.json ")
    assert str(caught.value).endswith(".")


def test_a_whole_surrogate_pair_is_fine():
    assert parse_object(b'{"a": "\\ud83d\\ude00"}', "it") == {"a": "\U0001f600"}


@pytest.mark.parametrize("data", [b"[1]", b"3", b'"text"', b"null"])
def test_what_is_no_object_is_invalid(data):
    with pytest.raises(Invalid, match="must be a JSON object"):
        parse_object(data, "it")


def test_a_large_file_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 36)  # takes no room on the disk, and must take none in memory
    with pytest.raises(Unreadable, match=f"larger than {LIMIT} bytes"):
        read_object(path)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(Unreadable, match="Is a directory"):
        read_object(tmp_path)


@given(st.binary(max_size=40) | st.text(alphabet='{}[]":,\\u0d8eE+-.aNI \n', max_size=30).map(str.encode))
def test_any_bytes_are_read_or_refused(data):
    refusal = "it is fine."
    try:
        assert isinstance(parse_object(data, "it"), dict)
    except Error as error:
        refusal = str(error)
    assert refusal.startswith("it ")
    assert refusal.endswith(".")
