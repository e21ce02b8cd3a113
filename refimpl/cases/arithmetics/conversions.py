"""Arithmetics of casts to FP8 and of quantisation.  SPEC CASE-13, CAST-1, SCALE-6."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from refimpl.cases.arithmetics.question import Alternative, Question
from refimpl.cases.instruments import DTYPE_OF, Data, Out, Outputs
from refimpl.numerics import casts as behaviours
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.blockscale import ACTIVATION, QUANTISERS, Quantiser, quantise
from refimpl.numerics.float32 import Single, canonical
from refimpl.numerics.formats import BF16, FORMATS, FP16, round_to

_CAST = (
    "A port may cast as any library does; it is named.  Other roundings, and what libraries do not do with "
    "subnormal values, are named and do not pass."
)


def casts(d: Data) -> Question:
    """float32 to a format."""
    x, fmt = d.single("x"), FORMATS[d.arguments["format"]]
    groups: dict[tuple[Any, ...], list[str]] = {}
    for (behaviour, of), row in behaviours.CASTS.items():
        if of == fmt.name:
            groups.setdefault((row.overflow, row.infinity, row.nan, row.nan_sign), []).append(behaviour)
    for behaviour in ("saturate", "format"):
        row = behaviours.behaviour(behaviour, fmt)
        groups.setdefault((row.overflow, row.infinity, row.nan, row.nan_sign), []).append(behaviour)

    def made(codes: Array) -> Callable[[Data], Outputs]:
        return lambda _: {"codes": Out(codes, DTYPE_OF[fmt.name])}

    rows = [
        Alternative(" = ".join(names), _cast_text(names), True, made(behaviours.cast(x, fmt, names[0])))
        for names in groups.values()
    ]
    first = next(iter(groups.values()))[0]
    with np.errstate(all="ignore"):
        half = round_to(x, FP16 if fmt.exponent_bits < 8 else BF16).astype(np.float32)
        twice = round_to(x, BF16).astype(np.float32)
        size = np.abs(x).astype(np.float64)
        step = np.ldexp(1.0, np.maximum(np.frexp(size)[1] - 1, fmt.smallest_exponent) - fmt.fraction_bits)
        up = np.copysign(np.where(np.isfinite(size), np.floor(size / step + 0.5) * step, size), x)
        small = np.abs(behaviours.widen(behaviours.cast(x, fmt, first), fmt)) < fmt.smallest_normal
    others = {
        "toward-zero": ("rounded toward zero", behaviours.cast(x, fmt, first, "zero")),
        "ties-away": ("ties go away from zero", behaviours.cast(up, fmt, first)),
        "by-way-of-fp16": ("rounded to FP16 first", behaviours.cast(half, fmt, first)),
        "by-way-of-bf16": ("rounded to BF16 first", behaviours.cast(twice, fmt, first)),
        "subnormals-flushed": (
            "subnormal results are zero",
            behaviours.cast(np.where(small, np.copysign(np.float32(0), x), x), fmt, first),
        ),
    }
    rows += [
        Alternative(name, f"{text}, else as {first}", False, made(codes))
        for name, (text, codes) in others.items()
    ]
    return Question(_CAST, rows)


def _cast_text(names: list[str]) -> str:
    known = {
        "ptx": "PTX cvt.rn.satfinite, Triton",
        "saturate": "never overflows",
        "format": "overflow is infinity, or NaN where there is none",
    }
    return "; ".join(known.get(name, f"{name}, .to() or astype()") for name in names)


_QUANTISE = (
    "A port may quantise by any recipe of SCALE-6; it is named.  The other combinations of division and "
    "reciprocal for scales and for values belong to no published kernel; these and known mistakes are named, "
    "and do not pass."
)


def recipes(d: Data) -> Question:
    """Tiles of 1x128."""
    x = d.single("x")
    rows = [
        Alternative(row.name, row.source, True, partial(_recipe, x, row))
        for row in QUANTISERS.values()
        if row.tile == ACTIVATION
    ]
    known = {
        (r.scale, r.quotient, r.power) for r in QUANTISERS.values() if r.tile == ACTIVATION and not r.clamp
    }
    base = QUANTISERS["ieee"]
    words = {"divide": "division", "inverse": "reciprocal", "div.full": "div.full"}
    for scale in ("divide", "inverse"):
        for quotient in ("divide", "inverse", "div.full"):
            if (scale, quotient, "") not in known:
                row = replace(base, scale=scale, quotient=quotient, cast="ptx")
                text = f"scales by {words[scale]}, values by {words[quotient]}"
                name = f"scale-{words[scale]}-value-{words[quotient]}"
                rows.append(Alternative(name, text, False, partial(_recipe, x, row)))
    ieee = quantise(x, "ieee")
    bits = ieee.scales.view(np.uint32)
    cut = (bits & np.uint32(0x7F80_0000)).view(np.float32)
    short = round_to(ieee.scales, BF16).astype(np.float32)
    rows += [
        _mistake("ue8m0-truncated", "powers of two by the exponent alone", _divided(x, cut), cut),
        _mistake(
            "ue8m0-rounded-after",
            "codes by the float32 scale, which is then rounded up to a power of two",
            ieee.codes,
            quantise(x, "ue8m0").scales,
        ),
        _mistake("scales-in-bf16", "scales are rounded to BF16", _divided(x, short), short),
    ]
    return Question(_QUANTISE, rows)


def _divided(x: Single, scales: Single) -> Array:
    with np.errstate(all="ignore"):
        quotient = x / np.repeat(scales, ACTIVATION[1], axis=1)
    quotient[np.isnan(quotient)] = np.nan  # the positive one
    return behaviours.cast(quotient, FORMATS["e4m3"], "ptx")


def _mistake(name: str, text: str, codes: Array, scales: Single) -> Alternative:
    outputs = {"codes": Out(codes, "F8_E4M3"), "scales": Out(canonical(scales.copy()), "F32")}
    return Alternative(name, text, False, lambda _: outputs)


def _recipe(x: Single, row: Quantiser, _: Data) -> Outputs:
    q = quantise(x, row)
    return {"codes": Out(q.codes, "F8_E4M3"), "scales": Out(canonical(q.scales), "F32")}
