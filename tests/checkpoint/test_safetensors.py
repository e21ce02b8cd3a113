"""The safetensors codec beside the format's own library, and what is broken.  SPEC CKPT-1 to CKPT-3."""

import contextlib
import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refimpl.checkpoint import Stored, open_file, write
from refimpl.errors import Error, Invalid, Missing, Unreadable, Unsupported

PLAIN = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1"} | {
    "U64": "u8",
    "U32": "u4",
    "U16": "u2",
    "U8": "u1",
    "BOOL": "?",
}
SPECIAL = {
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


def arrays():
    """One array of every dtype that the library can hold, with an empty one, a scalar and an odd name."""
    rng = np.random.default_rng(1)
    made = {f"t.{name}": (rng.standard_normal((3, 5)) * 9).astype(code) for name, code in PLAIN.items()}
    made |= {f"t.{name}": rng.standard_normal((3, 5)).astype(code) for name, code in SPECIAL.items()}
    made["scalar"] = np.array(2.5)
    made["empty"] = np.zeros((0, 7), np.float32)
    made['odd "é\n'] = np.arange(3.0)
    return made


def as_stored(made):
    codes = {1: np.uint8, 2: np.uint16}
    names = {np.dtype(code): name for name, code in SPECIAL.items()}
    return {
        name: Stored(names[a.dtype], a.shape, a.view(codes[a.itemsize])) if a.dtype in names else a
        for name, a in made.items()
    }


def container(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def opened(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    return open_file(path)


def test_our_bytes_are_those_of_the_library(tmp_path):
    write(tmp_path / "ours", as_stored(arrays()), {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == safetensors.numpy.save(arrays(), {"format": "pt"})


def test_we_read_what_the_library_writes(tmp_path):
    safetensors.numpy.save_file(arrays(), tmp_path / "theirs", {"note": "here"})
    file = open_file(tmp_path / "theirs")
    assert file.metadata == {"note": "here"}
    assert set(file) == set(arrays())
    for name, array in arrays().items():
        assert file.shape(name) == array.shape
        assert file.codes(name).tobytes() == array.tobytes()
        assert np.array_equal(file[name].astype(np.float64), array.astype(np.float64))


def test_the_order_of_the_mapping_does_not_matter(tmp_path):
    made = as_stored(arrays())
    write(tmp_path / "a", made)
    write(tmp_path / "b", dict(reversed(made.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_views_and_foreign_byte_orders_are_written_by_value(tmp_path):
    plain = np.arange(12.0).reshape(3, 4)
    write(tmp_path / "a", {"x": plain.T.copy(), "y": plain})
    write(tmp_path / "b", {"x": plain.T, "y": plain.astype(">f8")})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_codes_may_be_made_when_they_are_written(tmp_path):
    write(tmp_path / "a", {"x": Stored("BF16", (2,), lambda: np.array([0x3F80, 0xC000], np.uint16))})
    assert open_file(tmp_path / "a")["x"].tolist() == [1.0, -2.0]


def test_every_bf16_code_decodes_exactly(tmp_path):
    codes = np.arange(1 << 16, dtype=np.uint16)
    write(tmp_path / "a", {"x": Stored("BF16", codes.shape, codes)})
    file = open_file(tmp_path / "a")
    assert np.array_equal(file.codes("x"), codes)
    expected = codes.view(ml_dtypes.bfloat16).astype(np.float32)
    assert file["x"].dtype == np.float32
    assert np.array_equal(file["x"], expected, equal_nan=True)


def test_a_slice_is_a_part(tmp_path):
    write(tmp_path / "a", {"x": np.arange(12.0).reshape(3, 4), "y": np.arange(5)})
    file = open_file(tmp_path / "a")
    assert file.slice("x", 3, 4).tolist() == [3.0, 4.0, 5.0, 6.0]
    assert file.slice("x", 12, 0).tolist() == []
    for start, count in ((10, 3), (-1, 2), (5, -1)):
        with pytest.raises(Invalid, match="must lie in its 12 elements"):
            file.slice("x", start, count)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("F8_E4M3", ml_dtypes.float8_e4m3fn),
        ("F8_E5M2", ml_dtypes.float8_e5m2),
        ("F8_E8M0", ml_dtypes.float8_e8m0fnu),
        ("F8_E4M3FNUZ", ml_dtypes.float8_e4m3fnuz),
        ("F8_E5M2FNUZ", ml_dtypes.float8_e5m2fnuz),
    ],
)
def test_every_fp8_code_decodes_exactly(tmp_path, name, dtype):
    codes = np.arange(256, dtype=np.uint8)
    write(tmp_path / "a", {"x": Stored(name, codes.shape, codes)})
    file = open_file(tmp_path / "a")
    assert np.array_equal(file.codes("x"), codes)
    assert file["x"].dtype == np.float32
    assert np.array_equal(file["x"], codes.view(dtype).astype(np.float32), equal_nan=True)
    assert np.array_equal(file.slice("x", 40, 3), file["x"][40:43])


@pytest.mark.crosscheck
def test_the_library_sorts_fp8_as_we_do(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    special = {
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    }
    plain = {"a": np.arange(3, dtype=np.int16), "b": np.arange(3, dtype=np.int8)}
    theirs = {name: torch.from_numpy(array) for name, array in plain.items()}
    theirs |= {name: torch.arange(3, dtype=torch.uint8).view(dtype) for name, dtype in special.items()}
    save_file(theirs, tmp_path / "theirs")
    codes = np.arange(3, dtype=np.uint8)
    write(tmp_path / "ours", plain | {name: Stored(name, (3,), codes) for name in special})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_an_absent_tensor_is_named(tmp_path):
    write(tmp_path / "a", {"x": np.zeros(2)})
    with pytest.raises(Missing, match="tensor y is not in"):
        open_file(tmp_path / "a")["y"]
    assert "y" not in open_file(tmp_path / "a")


def test_opening_holds_no_tensor(tmp_path):
    path = tmp_path / "large"
    header = container({"x": entry("F32", (1 << 14, 1 << 16), (0, 1 << 32))})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + (1 << 32))  # 4 GiB, sparse
    tracemalloc.start()
    opened_file = open_file(path)
    assert opened_file.slice("x", 1 << 29, 3).tolist() == [0.0, 0.0, 0.0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


BROKEN = {
    "nothing": (b"", "has 0 bytes"),
    "only a length": (b"\x02" + b"\0" * 7, "has 8 bytes"),
    "a header of gigabytes": (container(b"{}", length=1 << 33), "declares a header of 8589934592 bytes"),
    "a header of 2^64": (b"\xff" * 8 + b"{}", "declares a header"),
    "a header longer than the file": (container(b"{}", length=3), "declares a header of 3 bytes"),
    "no object": (container(b"[]"), "begins with"),
    "a space before": (container(b" {}"), "begins with"),
    "no JSON": (container(b"{x}"), "not JSON"),
    "not UTF-8": (container(b'{"\xff": 1}'), "not UTF-8"),
    "a name twice": (
        container(
            b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}",
            b"\0" * 8,
        ),
        "twice",
    ),
    "an entry that is no object": (container({"a": 1}), "malformed entry"),
    "an entry with more": (container({"a": entry() | {"more": 1}}, b"\0" * 8), "malformed entry"),
    "no shape": (container({"a": {"dtype": "F32", "data_offsets": [0, 0]}}), "malformed entry"),
    "an unknown dtype": (container({"a": entry("F31")}, b"\0" * 8), "dtype F31"),
    "a dtype that is no text": (container({"a": entry(7)}, b"\0" * 8), "dtype 7"),
    "a negative size": (container({"a": entry(shape=(-2,))}, b"\0" * 8), "has shape"),
    "a size that is a bool": (container({"a": entry(shape=(True,), offsets=(0, 4))}, b"\0" * 4), "has shape"),
    "a size that is a float": (container({"a": entry(shape=(2.0,))}, b"\0" * 8), "has shape"),
    "a huge size": (container({"a": entry(shape=(1 << 60,))}, b"\0" * 8), "has shape"),
    "a product that wraps": (container({"a": entry(shape=(1 << 32, 1 << 32), offsets=(0, 0))}), "2.59"),
    "a huge size beside zero": (container({"a": entry(shape=(0, 1 << 40, 1 << 40), offsets=(0, 0))}), "2.59"),
    "many dimensions": (container({"a": entry(shape=(1,) * 99, offsets=(0, 4))}, b"\0" * 4), "has shape"),
    "falling offsets": (container({"a": entry(offsets=(8, 0))}, b"\0" * 8), "two rising integers"),
    "three offsets": (container({"a": entry(offsets=(0, 8, 8))}, b"\0" * 8), "two rising integers"),
    "a size that disagrees": (
        container({"a": entry(shape=(3,))}, b"\0" * 8),
        "has 8 bytes, but F32 .3. must have 12",
    ),
    "an overlap": (
        container({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12),
        "tensor b overlaps tensor a",
    ),
    "a hole": (
        container({"a": entry(), "b": entry(offsets=(9, 17))}, b"\0" * 17),
        "leaves a hole after tensor a",
    ),
    "a hole at the beginning": (container({"a": entry(offsets=(1, 9))}, b"\0" * 9), "after the header"),
    "truncated": (container({"a": entry()}, b"\0" * 7), "by its header it must have"),
    "too long": (container({"a": entry()}, b"\0" * 9), "by its header it must have"),
    "metadata of numbers": (container({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata that is a list": (container({"__metadata__": []}), "__metadata__"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_the_format_is_unreadable_in_one_sentence(tmp_path, name):
    data, words = BROKEN[name]
    with pytest.raises(Unreadable, match=words) as caught:
        opened(tmp_path, data)
    assert str(caught.value).endswith(".")
    assert "x.safetensors" in str(caught.value)


def test_a_dtype_of_the_format_that_is_not_read_is_unsupported(tmp_path):
    with pytest.raises(Unsupported, match="dtype F4"):
        opened(tmp_path, container({"a": entry("F4")}, b"\0" * 8))


def test_a_bool_is_zero_or_one(tmp_path):
    file = opened(tmp_path, container({"a": entry("BOOL", (2,), (0, 2))}, b"\1\2"))
    with pytest.raises(Unreadable, match="BOOL that is not 0 or 1"):
        file["a"]


def test_a_file_that_shrinks_is_unreadable(tmp_path):
    file = opened(tmp_path, container({"a": entry()}, b"\0" * 8))
    file.path.write_bytes(file.path.read_bytes()[:-1])
    with pytest.raises(Unreadable, match="ends in tensor a"):
        file["a"]


def test_a_file_that_is_not_there_is_unreadable(tmp_path):
    with pytest.raises(Unreadable, match="No such file"):
        open_file(tmp_path / "nothing")
    with pytest.raises(Unreadable, match="Is a directory"):
        open_file(tmp_path)


def test_what_cannot_be_stored_is_refused_before_writing(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(Unsupported, match="tensor x has the type complex128"):
        write(path, {"x": np.zeros(2, complex)})
    with pytest.raises(Invalid, match="at most one"):
        write(path, {}, {"a": "1", "b": "2"})
    with pytest.raises(Invalid, match="__metadata__"):
        write(path, {"__metadata__": np.zeros(2)})
    with pytest.raises(Unsupported, match="declared as F5"):
        write(path, {"x": Stored("F5", (2,), np.zeros(2))})
    with pytest.raises(Invalid, match="BF16 must have uint16"):
        write(path, {"x": Stored("BF16", (2,), np.zeros(3, np.uint16))})
    assert list(tmp_path.iterdir()) == []


def read_all(path):
    with contextlib.suppress(Error):
        file = open_file(path)
        for name in file:
            with contextlib.suppress(Unsupported):
                file[name]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "sound"
    write(path, as_stored(arrays()), {"format": "pt"})
    return path.read_bytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "file.safetensors"


QUICK = settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])


@QUICK
@given(data=st.data())
def test_a_changed_file_gives_our_errors_only(sound, place, data):
    changed = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, 1500))] = data.draw(st.integers(0, 255))
    place.write_bytes(changed[: data.draw(st.integers(0, len(changed)) | st.just(len(changed)))])
    read_all(place)


NUMBER = st.integers(-2, 12) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30]) | st.floats() | st.none()
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "BOOL", "F8_E4M3", "F4", "X", None]),
        "shape": st.lists(NUMBER, max_size=4),
        "data_offsets": st.lists(NUMBER, min_size=1, max_size=3),
    }
)


@QUICK
@given(
    st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRY, max_size=3), st.binary(max_size=24)
)
def test_any_header_gives_our_errors_only(place, header, data):
    place.write_bytes(container(header, data))
    read_all(place)


@QUICK
@given(st.binary(max_size=64))
def test_any_bytes_give_our_errors_only(place, data):
    place.write_bytes(data)
    read_all(place)


@QUICK
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=6).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(PLAIN)), st.lists(st.integers(0, 3), max_size=3)),
        max_size=4,
    )
)
def test_any_tensors_survive(place, given_tensors):
    made = {
        name: (np.arange(np.prod(shape, dtype=int)) % 7).astype(PLAIN[dtype]).reshape(shape)
        for name, (dtype, shape) in given_tensors.items()
    }
    write(place, made)
    file = open_file(place)
    theirs = safetensors.numpy.load_file(place)
    assert set(file) == set(made) == set(theirs)
    for name, array in made.items():
        assert file[name].dtype == array.dtype
        assert np.array_equal(file[name], array)
        assert np.array_equal(theirs[name], array)
