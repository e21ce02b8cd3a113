"""The generator against Random123's definition and its published vectors, in plain Python integers."""

import hashlib
import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.errors import Invalid
from refimpl.numerics import generator

MASK = (1 << 64) - 1


def philox(counter, key):
    """Philox 4x64-10 as Random123 defines it: four words in, four words out."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & MASK, (p0 >> 64) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return c0, c1, c2, c3


def word(key, i):
    k = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
    return philox((i // 4, 0, 0, 0), k)[i % 4]


def field(key, f):
    bits = word(key, f // 4) >> (16 * (f % 4)) & 0xFFFF
    return sum(byte - 256 if byte > 127 else byte for byte in (bits & 0xFF, bits >> 8))


PI = "243f6a8885a308d3 13198a2e03707344 a4093822299f31d0 082efa98ec4e6c89 452821e638d01377 be5466cf34e90c6c"
KNOWN = [
    ("0 0 0 0 0 0", "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
    (" ".join(["f" * 16] * 6), "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
    (PI, "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6"),
]


@pytest.mark.parametrize(("given_words", "expected"), KNOWN)
def test_twin_gives_the_published_vectors_of_random123(given_words, expected):
    c0, c1, c2, c3, k0, k1 = (int(w, 16) for w in given_words.split())
    assert philox((c0, c1, c2, c3), (k0, k1)) == tuple(int(w, 16) for w in expected.split())


def test_the_zero_key_starts_with_the_published_vector():
    assert [f"{w:016x}" for w in generator.words(bytes(16), 0, 4).tolist()] == KNOWN[0][1].split()


@given(
    key=st.binary(min_size=16, max_size=16),
    start=st.one_of(st.integers(0, 9), st.integers(0, (1 << 66) - 20)),
    count=st.integers(0, 13),
)
def test_words_are_those_of_the_twin(key, start, count):
    made = generator.words(key, start, count)
    assert made.dtype == np.uint64
    assert made.tolist() == [word(key, start + i) for i in range(count)]


def test_a_thousand_words_in_a_row_are_those_of_the_twin():
    key = generator.tensor_key(0, "row")
    assert generator.words(key, 1, 1000).tolist() == [word(key, i) for i in range(1, 1001)]


def test_key_is_the_start_of_sha256_of_seed_slash_name():
    name = "model.layers.3.mlp.größe"
    assert generator.tensor_key(17, name) == hashlib.sha256(b"17/" + name.encode("utf-8")).digest()[:16]
    assert generator.tensor_key(np.int64(17), name) == generator.tensor_key(17, name)


def test_streams_of_different_names_and_seeds_differ():
    keys = [generator.tensor_key(s, n) for s, n in itertools.product((0, 1, 11), ("a", "1/a", "b"))]
    assert len({generator.words(k, 0, 4).tobytes() for k in keys}) == 9


@pytest.mark.parametrize("fields", [1, 2, 3, 5, 16])
def test_tensor_is_scale_times_the_sum_of_consecutive_fields(fields):
    key = generator.tensor_key(3, "w")
    made = generator.tensor(3, "w", (3, 5), 2.0**-9, fields, offset=1.0)
    expected = [1.0 + 2.0**-9 * sum(field(key, fields * e + j) for j in range(fields)) for e in range(15)]
    assert made.dtype == np.float64
    assert made.shape == (3, 5)
    assert made.ravel().tolist() == expected


@given(start=st.integers(0, 1 << 60), count=st.integers(0, 20), fields=st.integers(1, 5))
def test_slice_starts_anywhere(start, count, fields):
    key = generator.tensor_key(0, "virtual")
    made = generator.tensor_slice(0, "virtual", start, count, 1.0, fields)
    assert made.tolist() == [
        sum(field(key, fields * (start + e) + j) for j in range(fields)) for e in range(count)
    ]


@pytest.mark.parametrize("fields", [1, 3])
def test_a_slice_over_many_blocks_is_the_slice_of_the_whole(fields):
    whole = generator.tensor(5, "big", (300_001,), 0.5, fields, 2.0)
    assert np.array_equal(whole[12_345:], generator.tensor_slice(5, "big", 12_345, 287_656, 0.5, fields, 2.0))
    for at in (0, 87_380, 87_381, 262_143, 262_144, 300_000):
        assert whole[at] == generator.tensor_slice(5, "big", at, 1, 0.5, fields, 2.0)[0]


def test_one_field_is_exact_in_bf16_and_has_the_stated_range_and_moments():
    values = generator.tensor(0, "moments", (1 << 20,), 1.0)
    assert (values.min(), values.max()) == (-256, 254)
    assert np.array_equal(values.astype(ml_dtypes.bfloat16).astype(np.float64), values)
    n = values.size  # five standard errors of the mean and of the variance (kurtosis of a triangle: 2.4)
    assert abs(values.mean() + 1.0) < 5 * np.sqrt(10922.5 / n)
    assert abs(values.var() / 10922.5 - 1) < 5 * np.sqrt(1.4 / n)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0, 1),
        (0, 7),
        (-5, 129_280),
        (-(1 << 63), 1 << 63),
        (-(1 << 63), (1 << 63) - 1),
        (3, (1 << 62) + 12345),
    ],
)
def test_integers_are_the_upper_half_of_the_product(low, high):
    key = generator.tensor_key(9, "ids")
    made = generator.integers(9, "ids", (50, 4), low, high)
    assert made.dtype == np.int64
    assert made.ravel().tolist() == [low + (word(key, e) * (high - low) >> 64) for e in range(200)]


def test_integers_fill_their_range():
    assert np.array_equal(np.unique(generator.integers(0, "dice", (1000,), 1, 7)), np.arange(1, 7))


def test_permutation_sorts_the_words():
    key = generator.tensor_key(0, "order")
    expected = sorted(range(500), key=lambda i: word(key, i))
    assert generator.permutation(0, "order", 500).tolist() == expected


def test_nothing_is_made_of_nothing():
    assert generator.words(bytes(16), 7, 0).shape == (0,)
    assert generator.tensor(0, "x", (3, 0, 2), 1.0).shape == (3, 0, 2)
    assert generator.tensor(0, "x", (), 1.0).shape == ()
    assert generator.permutation(0, "x", 0).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: generator.words(b"short", 0, 1), "a key has 5 bytes"),
        (lambda: generator.words(bytes(16), -1, 1), "must not be negative"),
        (lambda: generator.tensor(0, "w", (1,), 0.3), "scale of tensor w is 0.3"),
        (lambda: generator.tensor(0, "w", (1,), -1.0), "a positive power of two is required"),
        (lambda: generator.tensor(0, "w", (1,), float("inf")), "a positive power of two is required"),
        (lambda: generator.tensor(0, "w", (1,), 1.0, fields=0), "at least one is required"),
        (lambda: generator.tensor_slice(0, "w", 0, -1, 1.0), "must not be negative"),
        (lambda: generator.integers(0, "i", (1,), 4, 4), "not empty"),
    ],
)
def test_impossible_requests_are_refused(call, message):
    with pytest.raises(Invalid, match=message):
        call()
