"""The one source of random numbers.  SPEC RAND-1 to RAND-5.

A stream is a sequence of 64-bit words.  It is named by a 16-byte key, and word i is a pure function of the
key and of i, so any slice of any stream costs the same wherever it lies.

RAND-1, the words.  k0 and k1 are the key's bytes 0-7 and 8-15, each read as a little-endian integer.  Word i
is element i mod 4 of Philox 4x64-10 (Salmon et al., SC 2011) of the counter (i div 4, 0, 0, 0) under the key
(k0, k1).  One round, ten of which follow one another, with all arithmetic modulo 2^64 and hi, lo the two
halves of a 128-bit product:

    (c0, c1, c2, c3)  <-  (hi(M1 c2) ^ c1 ^ k0,  lo(M1 c2),  hi(M0 c0) ^ c3 ^ k1,  lo(M0 c0))
    (k0, k1)          <-  (k0 + 0x9E3779B97F4A7C15,  k1 + 0xBB67AE8584CAA73B)
    M0 = 0xD2E7470EE14C6C93,  M1 = 0xCA5A826395121157

NumPy computes the same function and increments its counter before the first block instead of after it; it
is therefore started one block early.

RAND-2, the keys.  key(seed, name) = the first 16 bytes of SHA-256(ASCII decimal of seed, "/", UTF-8 of name).

RAND-3, tensors.  Field f is the 16-bit number at bits 16 (f mod 4) and up of word f div 4, and its value is
the sum of its two bytes, each read as a signed 8-bit number: an integer in [-256, 254] with variance
10922.5 (standard deviation 104.5), roughly bell-shaped, and exact in bf16.  Element e of a tensor, counted
in C order, is

    offset + scale * (field n e + field n e + 1 + ... + field n e + n - 1)        n = fields

RAND-4, integers.  Element e is low + floor(word e * (high - low) / 2^64).

RAND-5, permutations.  The stable order that sorts words 0 to n - 1 ascending.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from refimpl.errors import Invalid

_BLOCK = 1 << 16  # words made at a time, so that what is between words and values stays in cache


def tensor_key(seed: int, name: str) -> bytes:
    """The 16-byte key of the stream `name` under `seed`.  SPEC RAND-2."""
    return hashlib.sha256(f"{int(seed)}/{name}".encode()).digest()[:16]


def words(key: bytes, start: int, count: int) -> NDArray[np.uint64]:
    """Words start to start + count - 1 of a stream, uint64 (count,).  SPEC RAND-1.

    Raises Invalid for a key that is not 16 bytes and for a negative start or count.
    """
    if len(key) != 16:
        raise Invalid(f"a key has {len(key)} bytes; 16 are required")
    if start < 0 or count < 0:
        raise Invalid(f"words({start}, {count}): the start and the count must not be negative")
    block, skip = divmod(start, 4)
    # NumPy steps the 256-bit counter before it makes a block, hence the one before (modulo 2^256).
    counter = (block - 1) % (1 << 256)
    generator = np.random.Philox(key=int.from_bytes(key, "little"), counter=counter)
    made: NDArray[np.uint64] = generator.random_raw(skip + count)
    return made[skip:]


def tensor(
    seed: int, name: str, shape: Sequence[int], scale: float, fields: int = 1, offset: float = 0.0
) -> NDArray[np.float64]:
    """The float64 tensor `name`: offset + scale * (sum of `fields` fields).  SPEC RAND-3.

    With one field and no offset, and a scale that keeps them in range, all values are exact in bf16.

    Raises Invalid if the scale is not a power of two or fields < 1.
    """
    values = tensor_slice(seed, name, 0, math.prod(shape), scale, fields, offset)
    return values.reshape(tuple(shape))


def tensor_slice(
    seed: int, name: str, start: int, count: int, scale: float, fields: int = 1, offset: float = 0.0
) -> NDArray[np.float64]:
    """Elements start to start + count - 1, in C order, of the tensor `name`: float64 (count,).  SPEC RAND-3.

    Raises Invalid if the scale is not a power of two, fields < 1, or start or count is negative.
    """
    if not (math.isfinite(scale) and math.frexp(scale)[0] == 0.5):
        raise Invalid(f"the scale of tensor {name} is {scale}; a positive power of two is required")
    if fields < 1:
        raise Invalid(f"tensor {name} is to sum {fields} fields; at least one is required")
    if start < 0 or count < 0:
        raise Invalid(f"slice ({start}, {count}) of tensor {name}: start and count must not be negative")
    key = tensor_key(seed, name)
    values = np.empty(count, np.float64)
    step = max(1, 4 * _BLOCK // fields)
    for at in range(0, count, step):
        some = values[at : at + step]
        made = _fields(key, fields * (start + at), fields * some.size)
        np.multiply(
            made if fields == 1 else made.reshape(-1, fields).sum(axis=1, dtype=np.int64), scale, out=some
        )
        if offset:
            some += offset
    return values


def integers(seed: int, name: str, shape: Sequence[int], low: int, high: int) -> NDArray[np.int64]:
    """Integers in [low, high), int64.  SPEC RAND-4.  The bias is at most (high - low) / 2^64.

    Raises Invalid unless -2^63 <= low < high <= 2^63.
    """
    if not -(1 << 63) <= low < high <= 1 << 63:
        raise Invalid(
            f"integers {name} are to lie in [{low}, {high}); the range must be in int64 and not empty"
        )
    raw = words(tensor_key(seed, name), 0, math.prod(shape))
    span = high - low
    if span == 1 << 64:
        above = raw
    else:
        # The upper half of the 128-bit product, from four products of 32-bit halves: no step overflows.
        mask, s = np.uint64(0xFFFFFFFF), np.uint64(32)
        a, b = raw & mask, raw >> s
        c, d = np.uint64(span & 0xFFFFFFFF), np.uint64(span >> 32)
        middle = b * c + (a * c >> s)
        above = b * d + (middle >> s) + ((a * d + (middle & mask)) >> s)
    # Modulo 2^64: the true sum lies in int64, so the wrapped one is it.
    return (above + np.uint64(low % (1 << 64))).view(np.int64).reshape(tuple(shape))


def permutation(seed: int, name: str, n: int) -> NDArray[np.int64]:
    """A permutation of 0 to n - 1, int64 (n,).  SPEC RAND-5."""
    return np.argsort(words(tensor_key(seed, name), 0, n), kind="stable").astype(np.int64, copy=False)


def _fields(key: bytes, start: int, count: int) -> NDArray[np.int16]:
    first, skip = divmod(start, 4)
    raw = words(key, first, (skip + count + 3) // 4)
    pair = raw.astype("<u8", copy=False).view("<i2")[skip : skip + count]
    eight = np.int16(8)
    return ((pair << eight) >> eight) + (pair >> eight)
