"""Mistakes of the softmax core: strides of values, masks, precision, and partial results put together.
SPEC MASK-3, MLA-6 to MLA-9.

A partial result of some keys is softmax(s) v over these keys with lse = ln sum exp(s); partial results are
added with the weights exp(lse - lse of all).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from refimpl.layers import attention
from refimpl.layers.context import Context, Cotangents, Op, Ops, child
from refimpl.numerics.arithmetic import Arithmetic, Array
from refimpl.numerics.formats import BF16, FP16, round_to
from refimpl.variants.mutants.mutant import Mutant
from refimpl.variants.stages import Other, Step, Stepped, behind, computing, gathered
from refimpl.variants.variation import operations, rounded

PART: Final = 8  # keys of a partial result


def _heads_apart(width: Callable[[Context], int], tokens_too: bool = False) -> Step:
    """Heads of (B, H, S, W), stored as (B, S, H, W), are taken to lie width(c) elements apart; so are tokens,
    H times that, if they too."""

    def index(c: Context, shape: tuple[int, ...]) -> Array:
        sizes, own = (shape[0], shape[2], shape[1], shape[3]), width(c)  # (B, S, H, W)
        b, s, h, w = np.ogrid[tuple(slice(n) for n in sizes)]
        row = sizes[2] * (own if tokens_too else sizes[3])
        flat = (b * sizes[1] + s) * row + h * own + w
        places = np.arange(shape[0] * shape[1] * shape[2] * shape[3]).reshape(shape)  # of (B, H, S, W)
        stored = places.swapaxes(1, 2).reshape(-1)
        return np.asarray(stored[flat % stored.size].swapaxes(1, 2))

    return gathered(index)


_KEY_WIDTH: Final = _heads_apart(lambda c: c.config.qk_head_dim)
_PADDED: Final = _heads_apart(lambda c: c.config.qk_head_dim, tokens_too=True)


def _padding_read() -> Step:
    """Heads are padded to the width of keys, and what is stored is read as if they were not."""

    def taken(c: Context, shape: tuple[int, ...]) -> tuple[Array, Array]:
        batch, heads, length, width = shape
        places = np.arange(batch * heads * length * width).reshape(shape).swapaxes(1, 2)  # as stored
        wide = np.full((*places.shape[:-1], max(c.config.qk_head_dim, width)), -1)
        wide[..., :width] = places
        read = wide.reshape(-1)[: places.size].reshape(places.shape).swapaxes(1, 2)
        return np.maximum(read, 0), read >= 0

    def forward(c: Context, y: Array) -> tuple[Array, Any]:
        at, there = taken(c, y.shape)
        return np.where(there, y.reshape(-1)[at], 0.0), (at, there)

    def backward(c: Context, dy: Array, kept: Any) -> Array:
        at, there = kept
        dy = np.where(there, dy, 0.0)
        return c.ar.segment_sum(dy.reshape(-1, 1), at.reshape(-1), dy.size).reshape(dy.shape)

    return Step(forward, backward)


def _values_apart(ops: Ops) -> Op:
    """Values are read from where they would be if they were as wide as keys."""

    def forward(c: Context, query: Array, key: Array, value: Array, *rest: Any) -> tuple[Array, Any]:
        out: tuple[Array, Any] = ops.attention.forward(c, query, key, _KEY_WIDTH.forward(c, value)[0], *rest)
        return out

    def backward(c: Context, dout: Array, saved: Any, scale: float) -> tuple[Array, Array, Array]:
        dquery, dkey, dvalue = ops.attention.backward(c, dout, saved, scale)
        at = _KEY_WIDTH.forward(c, dvalue)[1]
        return dquery, dkey, _KEY_WIDTH.backward(c, dvalue, at)

    return Op(forward, backward)


def _two_at_once(ops: Ops) -> Op:
    """The last two tokens are a step of their own without a mask: the first of them sees the second, if
    that sees it."""

    def forward(c: Context, query: Array, key: Array, value: Array, scale: float, allowed: Array) -> Any:
        if allowed.shape[-1] > 1:
            allowed = allowed.copy()
            allowed[..., -2, -1] = allowed[..., -1, -2]
        return ops.attention.forward(c, query, key, value, scale, allowed)

    return Op(forward, ops.attention.backward)


@dataclass(frozen=True)
class _Merged:
    inner: attention.Saved = child("")
    late: Any = None  # (B, H, S, S)  probabilities of the later half of the keys
    weight: Any = None  # (B, H, S, 1)  their sum
    inverse: Any = None  # of it, 0 where it is 0
    partial: Any = None  # (B, H, S, Wv)  the later half's own output
    places: Any = None


class _Also(Cotangents):
    """One gradient more that joins."""

    def __init__(self, others: Cotangents, name: str, dy: Array) -> None:
        super().__init__({})
        self._others, self._name, self._dy = others, name, dy

    def join(self, name: str, dy: Array) -> Array:
        return self._others.join(name, dy + self._dy if name == self._name else dy)


def _merged_with_one_stride(ops: Ops) -> Op:
    """out = w_1 o_1 + w_2 o_2 of the two halves of the keys.  o_1 is padded to the width of keys; o_2 is not,
    and is read as if it were."""

    def forward(c: Context, query: Array, key: Array, value: Array, *rest: Any) -> tuple[Array, _Merged]:
        out, saved = ops.attention.forward(c, query, key, value, *rest)
        probs = saved.probs.value()
        late = np.where(np.arange(probs.shape[-1]) >= probs.shape[-1] // 2, probs, 0.0)
        weight = c.ar.sum(late)[..., None]
        inverse = np.where(weight != 0.0, 1.0 / np.where(weight != 0.0, weight, 1.0), 0.0)
        partial = c.ar.matmul(late, value.swapaxes(-1, -2)) * inverse
        read, places = _PADDED.forward(c, partial)
        out = c.ar.at("attention.out", out + weight * (read - partial))
        return out, _Merged(saved, late, weight, inverse, partial, places)

    def backward(c: Context, dout: Array, saved: _Merged, scale: float) -> tuple[Array, Array, Array]:
        ar, value = c.ar, saved.inner.value.value()
        read = _PADDED.forward(c, saved.partial)[0]
        dpartial = _PADDED.backward(c, saved.weight * dout, saved.places) - saved.weight * dout
        dsum = dpartial * saved.inverse  # of late v
        dweight = ar.dot(dout, read - saved.partial) - ar.dot(dsum, saved.partial)  # (B, H, S)
        dlate = ar.matmul(dsum, value) + dweight[..., None]
        dlate = np.where(np.arange(dlate.shape[-1]) >= dlate.shape[-1] // 2, dlate, 0.0)
        inside = replace(c, cotangents=_Also(c.cotangents, c.name("probs"), dlate))
        dquery, dkey, dvalue = ops.attention.backward(inside, dout, saved.inner, scale)
        return dquery, dkey, dvalue + ar.matmul(saved.late.swapaxes(-1, -2), dsum.swapaxes(-1, -2))

    return Op(forward, backward)


Parts = Callable[[int], list[slice]]  # number of keys -> which are together


def _of_eight(keys: int) -> list[slice]:
    return [slice(at, at + PART) for at in range(0, keys, PART)]


def _two(keys: int) -> list[slice]:
    half = (keys + 1) // 2
    return [slice(0, half), slice(half, keys)]


def _empty_counts(parts: Parts) -> Callable[..., Any]:
    """A part without a key for a query has lse = 0 and the result 0."""

    def wrapped(ar: Arithmetic, *given: Any) -> Any:
        def softmax(x: Array) -> Array:
            empty = np.count_nonzero([np.isinf(x[..., at]).all(-1) for at in parts(x.shape[-1])], 0)
            largest = ar.max(x)[..., None]
            e = ar.exp(x - largest)
            weight: Array = e / (ar.sum(e)[..., None] + empty[..., None] * ar.exp(-largest))
            return weight

        return Other(ar, softmax=softmax)

    return wrapped


def _empty_is_seen(ops: Ops) -> Op:
    """A half of the keys of which a query sees none has logits of 0: lse = ln n, the mean of its values."""

    def forward(c: Context, *given: Any) -> tuple[Array, Stepped]:
        allowed = given[-1]
        none = np.zeros(allowed.shape, bool)
        for at in _two(allowed.shape[-1]):
            none[..., at] = ~allowed[..., at].any(-1, keepdims=True)
        ar: Any = Other(c.ar, softmax=lambda x: c.ar.softmax(np.where(none, 0.0, x)))
        out, saved = ops.attention.forward(replace(c, ar=ar), *given)
        return out, Stepped(saved, none, True)

    def backward(c: Context, dout: Array, saved: Stepped, scale: float) -> Any:
        ar: Any = Other(c.ar, dsoftmax=lambda p, dp: np.where(saved.kept, 0.0, c.ar.dsoftmax(p, dp)))
        return ops.attention.backward(replace(c, ar=ar), dout, saved.inner, scale)

    return Op(forward, backward)


def _maxima_forgotten(parts: Parts) -> Callable[..., Any]:
    """Parts are added with the weights sum exp(s - own maximum), as if all had the same maximum."""

    def wrapped(ar: Arithmetic, *given: Any) -> Any:
        def softmax(x: Array) -> Array:
            shifted = np.empty_like(x)
            for at in parts(x.shape[-1]):
                largest = ar.max(x[..., at])[..., None]
                shifted[..., at] = x[..., at] - np.where(np.isinf(largest), 0.0, largest)
            return ar.softmax(shifted)

        def dsoftmax(p: Array, dp: Array) -> Array:
            ds = ar.dsoftmax(p, dp)
            for at in parts(p.shape[-1]):
                first = ar.decide(p[..., at]).argmax(-1)[..., None]
                own = np.arange(p[..., at].shape[-1]) == first
                ds[..., at] = ds[..., at] - np.where(own, ar.sum(ds[..., at])[..., None], 0.0)
            return ds

        return Other(ar, softmax=softmax, dsoftmax=dsoftmax)

    return wrapped


def _in_bf16(ar: Arithmetic, *given: Any) -> Any:
    """Every step of the softmax is rounded to bfloat16, also its running sum."""

    def low(x: Array) -> Array:
        return ar.array(round_to(ar.decide(x), BF16))

    def softmax(x: Array) -> Array:
        x = low(x)
        e = low(ar.exp(low(x - ar.max(x)[..., None])))
        total = ar.zeros(x.shape[:-1])
        for at in range(x.shape[-1]):
            total = low(total + e[..., at])
        return low(e / total[..., None])

    return Other(ar, softmax=softmax)


def _products_in_fp16(ar: Arithmetic, *given: Any) -> Any:
    """q k^T is float16, infinite beyond 65504, before it is scaled."""
    scale = given[3] if given else 1.0  # of the forward; the backward has no such site

    def at(site: str, x: Array) -> Array:
        x = ar.at(site, x)
        if site != "attention.scores":
            return x
        return ar.array(round_to(ar.decide(x) / scale, FP16)) * scale

    return Other(ar, at=at)


MUTANTS: Final = (
    Mutant("A02a", operations(attention=_values_apart)),
    Mutant("A02b", operations(**behind("attention", _KEY_WIDTH))),
    Mutant("A02c", operations(**behind("attention", _padding_read()))),
    Mutant("A09a", computing("attention", _empty_counts(_of_eight))),
    Mutant("A09b", computing("attention", _empty_counts(_two))),
    Mutant("A09c", operations(attention=_empty_is_seen)),
    Mutant("A10", operations(attention=_merged_with_one_stride)),
    Mutant("A11", operations(attention=_two_at_once)),
    Mutant("A12", computing("attention", _products_in_fp16)),
    Mutant("A13a", computing("attention", _maxima_forgotten(_of_eight))),
    Mutant("A13b", computing("attention", _maxima_forgotten(_two))),
    Mutant("A16a", rounded(BF16, "attention.scores", "attention.probs"), claims=("fp32", "tf32", "fp16")),
    Mutant("A16b", computing("attention", _in_bf16)),
)
