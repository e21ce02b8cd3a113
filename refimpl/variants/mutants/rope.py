"""Mistakes of rotary positions: layouts of pairs and tables, and the precision of angles.  SPEC ROPE-2 to
ROPE-7."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np

from refimpl.config.model import ModelConfig
from refimpl.config.rope import YarnScaling
from refimpl.layers.context import Context, Op, Ops
from refimpl.layers.rope import Tables
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.formats import BF16, round_to
from refimpl.variants.mutants.mutant import Mutant
from refimpl.variants.stages import Other
from refimpl.variants.variation import Change, both, configured, given, operations, rounded

INT16: Final = 32767


def _key_in_halves(ops: Ops) -> Op:
    """Queries are rotated in pairs as they should be, the key, which has one head, in halves."""

    def at(c: Context, x: Array) -> Context:
        return replace(c, config=replace(c.config, rope_interleave=False)) if x.shape[1] == 1 else c

    return Op(
        lambda c, x, table: ops.rope.forward(at(c, x), x, table),
        lambda c, dy, table: ops.rope.backward(at(c, dy), dy, table),
    )


def _element_tables(columns: Callable[[int], Array]) -> Change:
    """Every element is multiplied with a column of the tables of its own: element i of R takes columns(R)[i].
    y0 = x0 cos0 - x1 sin0, y1 = x1 cos1 + x0 sin1."""

    def parts(c: Context, x: Array) -> tuple[Array, Array]:
        first, second = _places(c.config)
        return x[..., first], x[..., second]

    def joined(c: Context, x: Array, y0: Array, y1: Array) -> Array:
        first, second = _places(c.config)
        y = np.empty(x.shape, np.result_type(y0, y1))
        y[..., first], y[..., second] = y0, y1
        return y

    def turned(c: Context, table: Tables) -> tuple[Array, Array, Array, Array]:
        at = columns(c.config.qk_rope_head_dim)
        first, second = _places(c.config)
        return (
            table.cos[..., at[first]],
            table.sin[..., at[first]],
            table.cos[..., at[second]],
            table.sin[..., at[second]],
        )

    def forward(c: Context, x: Array, table: Tables) -> Array:
        (x0, x1), (cos0, sin0, cos1, sin1) = parts(c, x), turned(c, table)
        return c.ar.at("rope.out", joined(c, x, x0 * cos0 - x1 * sin0, x1 * cos1 + x0 * sin1))

    def backward(c: Context, dy: Array, table: Tables) -> Array:
        (d0, d1), (cos0, sin0, cos1, sin1) = parts(c, dy), turned(c, table)
        return c.ar.at("d.rope.in", joined(c, dy, d0 * cos0 + d1 * sin1, d1 * cos1 - d0 * sin0))

    return operations(rope=lambda ops: Op(forward, backward))


def _places(config: ModelConfig) -> tuple[Array, Array]:
    """Where the first and the second elements of the pairs are."""
    places = np.arange(config.qk_rope_head_dim)
    if config.rope_interleave:
        return places[0::2], places[1::2]
    half = len(places) // 2
    return places[:half], places[half:]


def _other_layout() -> Change:
    """Pairs as they should be, tables laid out for the other kind of pairs."""
    wide = _element_tables(lambda width: np.arange(width) % (width // 2))
    repeated = _element_tables(lambda width: np.arange(width) // 2)
    return lambda s: (wide if s.config.rope_interleave else repeated)(s)


def _into_halves(x: Array) -> Array:
    """(..., R): first elements of the pairs, then second ones."""
    return np.concatenate([x[..., 0::2], x[..., 1::2]], -1)


def _from_halves(x: Array) -> Array:
    half = x.shape[-1] // 2
    return np.stack([x[..., :half], x[..., half:]], -1).reshape(x.shape)


def _permuted(ops: Ops) -> Op:
    """Rotated queries and keys are both stored as halves."""

    def forward(c: Context, x: Array, table: Tables) -> Array:
        y: Array = ops.rope.forward(c, x, table)
        return _into_halves(y) if c.config.rope_interleave else y

    def backward(c: Context, dy: Array, table: Tables) -> Array:
        dx: Array = ops.rope.backward(c, _from_halves(dy) if c.config.rope_interleave else dy, table)
        return dx

    return Op(forward, backward)


def _cotangents_permuted(s: Any) -> Any:
    """A port that stores halves takes the cotangents of what it stores in halves."""

    def change(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        own = {name: _into_halves(inputs[name]) for name in ("dq_pe", "dk_pe") if name in inputs}
        return {**inputs, **own}

    return given(change)(s) if s.config.rope_interleave else s


def _tables(positions: Callable[[Array], Array], frequencies: Callable[[Array], Array]) -> Change:
    """Tables of other positions and frequencies; what else reads the frequencies has the right ones."""

    def made(ops: Ops) -> Callable[[Context, Array], Any]:
        def tables(c: Context, at: Array) -> Any:
            own = replace(c.ops, frequencies=lambda *given: frequencies(ops.frequencies(*given)))
            return ops.tables(replace(c, ops=own), positions(at))

        return tables

    return operations(tables=made)


def _same(x: Array) -> Array:
    return x


def _bf16(x: Array) -> Array:
    return round_to(x, BF16)


def _angles_rounded(ops: Ops) -> Callable[[Context, Array], Any]:
    """position times frequency is rounded to bfloat16."""

    def tables(c: Context, at: Array) -> Any:
        ar = c.ar

        def narrow(x: Array) -> Array:
            return ar.array(round_to(ar.decide(x), BF16))

        other: Any = Other(ar, cos=lambda x: ar.cos(narrow(x)), sin=lambda x: ar.sin(narrow(x)))
        return ops.tables(replace(c, ar=other), at)

    return tables


def _wrapped(positions: Array) -> Array:
    return np.asarray(positions).astype(np.int16).astype(np.int64)


def _lengths_narrowed(config: ModelConfig) -> YarnScaling | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    length = min(scaling.original_max_position_embeddings, INT16)
    return replace(scaling, original_max_position_embeddings=length)


MUTANTS: Final = (
    Mutant("R01a", configured(rope_interleave=False)),
    Mutant("R01b", configured(rope_interleave=True)),
    Mutant("R02a", _other_layout()),
    Mutant("R02b", operations(rope=_key_in_halves)),
    Mutant("R03", both(operations(rope=_permuted), _cotangents_permuted), benign=True),
    Mutant("R04a", _tables(_bf16, _bf16)),
    Mutant("R04b", operations(tables=_angles_rounded)),
    Mutant("R04c", _tables(_same, _bf16)),
    Mutant("R04d", _tables(_bf16, _same)),
    Mutant("R05", rounded(BF16, "rope.table"), claims=("fp32", "tf32", "fp16")),
    Mutant("R06a", _tables(lambda at: np.minimum(at, INT16), _same)),
    Mutant("R06b", _tables(_wrapped, _same)),
    Mutant(
        "R06c",
        configured(
            rope_scaling=_lengths_narrowed,
            max_position_embeddings=lambda config: min(config.max_position_embeddings, INT16),
        ),
    ),
)
