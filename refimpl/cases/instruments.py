"""What a case that is compared exactly computes: number formats, block scales, tensor cores, schedules.

SPEC CASE-12, CASE-18, CASE-19.

A component takes inputs by name and the case's arguments, and returns its outputs by name.

    decode           codes -> value                           arguments: format
    cast             x -> codes                               format, behaviour, rounding
    quantise         x -> codes, scales                       recipe, tile
    dequantise       codes, scales -> value, value_bf16       tile
    requantise       codes, scales -> codes_out, scales_out   recipe, tile, tile_out
    scale_layouts    scales -> columns, ue8m0, packed
    wgmma_fp8 ...    a, b, c -> d                             a_format, b_format
    gemm_fp8         a, a_scale, b, b_scale -> d              kernel, split, accumulation
    gemm_contiguous, gemm_masked                              the same with group or counts; kernel
    gemm_along_k     with c                                   sizes
    plan             -> order, its times and metrics          schedule, ranks, microbatches, chunks, durations
    legality         order, placement -> illegal, rank        stages, microbatches

Products may be given as d, float32, or d_bf16, that rounded to nearest even.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from refimpl.checkpoint.dtypes import bf16_value
from refimpl.numerics import casts, grouped, layouts, tensorcore
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.blockscale import Quantised, dequantise, quantise, requantise
from refimpl.numerics.float32 import Single, canonical, to_bf16
from refimpl.numerics.formats import FORMATS, Rounding, Stochastic
from refimpl.numerics.gemm import gemm_fp8
from refimpl.pipeline import arrays

DTYPE_OF: Final = {  # the type of a file that holds the codes of a format
    "fp32": "F32",
    "tf32": "U32",
    "bf16": "BF16",
    "fp16": "F16",
    "e5m2": "F8_E5M2",
    "e4m3": "F8_E4M3",
    "e5m6": "U16",
    "e5m6fn": "U16",
    "e4m3fnuz": "F8_E4M3FNUZ",
    "e5m2fnuz": "F8_E5M2FNUZ",
    "ue8m0": "F8_E8M0",
}


@dataclass(frozen=True)
class Data:
    """The inputs of a case, and its arguments."""

    codes: Mapping[str, Array]
    dtypes: Mapping[str, str]
    arguments: Mapping[str, Any]

    def single(self, name: str) -> Single:
        """An input of type F32 or BF16 as float32."""
        codes = self.codes[name]
        return bf16_value(codes) if self.dtypes[name] == "BF16" else codes.view(np.float32)

    def tile(self, name: str) -> tuple[int, int]:
        rows, columns = self.arguments[name]
        return rows, columns


@dataclass(frozen=True)
class Out:
    """An output: the array of its codes or values, and its type in the file."""

    array: Array
    dtype: str
    instead_of: str | None = None  # the output that a port need not give when it gives this one
    probe: bool = False
    one_of: tuple[int, ...] = ()  # what is as right, of an integer


Outputs = dict[str, Out]


def run(component: str, data: Data) -> Outputs:
    """name -> output, in the order of computation."""
    return COMPONENTS[component](data)


def rounding(given: Any) -> Rounding:
    """nearest, zero or away, or {seed, stream} of random numbers."""
    return given if isinstance(given, str) else Stochastic(given["seed"], given["stream"])


def _decode(d: Data) -> Outputs:
    return {
        "value": Out(canonical(casts.widen(d.codes["codes"], FORMATS[d.arguments["format"]]).copy()), "F32")
    }


def _cast(d: Data) -> Outputs:
    fmt = FORMATS[d.arguments["format"]]
    found: Outputs = {}
    for name in d.codes:
        how = d.arguments.get("rounding", "nearest")
        codes = casts.cast(d.single(name), fmt, d.arguments["behaviour"], rounding(how))
        found[name.replace("x", "codes", 1)] = Out(codes, DTYPE_OF[fmt.name])
    return found


def _quantise(d: Data) -> Outputs:
    found: Outputs = {}
    for name in d.codes:
        q = quantise(d.single(name), d.arguments["recipe"], d.tile("tile"))
        found |= _parts(q, name[1:])
    return found


def _parts(q: Quantised, suffix: str) -> Outputs:
    scales = canonical(np.ascontiguousarray(q.scales))
    return {
        f"codes{suffix}": Out(np.ascontiguousarray(q.codes), "F8_E4M3"),
        f"scales{suffix}": Out(scales, "F32"),
    }


def _quantised(d: Data) -> Quantised:
    return Quantised(d.codes["codes"], d.single("scales"), d.tile("tile"))


def _dequantise(d: Data) -> Outputs:
    value = canonical(dequantise(_quantised(d)))
    return {"value": Out(value, "F32"), "value_bf16": Out(to_bf16(value), "BF16", "value")}


def _requantise(d: Data) -> Outputs:
    return _parts(requantise(_quantised(d), d.arguments["recipe"], d.tile("tile_out")), "_out")


def _scale_layouts(d: Data) -> Outputs:
    scales = d.single("scales")
    codes = layouts.to_ue8m0(scales)
    return {
        "columns": Out(layouts.to_columns(scales), "F32"),
        "ue8m0": Out(codes, "F8_E8M0"),
        "packed": Out(layouts.pack(codes), "I32"),
    }


def _tensorcore(d: Data, instruction: Callable[..., Single]) -> Outputs:
    c = d.single("c") if "c" in d.codes else None
    return {"d": Out(instruction(d.codes["a"], d.codes["b"], c, **d.arguments), "F32")}


def product(d: Single) -> Outputs:
    """A product's result in the two types in which a port may give it."""
    return {"d": Out(d, "F32"), "d_bf16": Out(to_bf16(d), "BF16", "d")}


def _operands(d: Data) -> tuple[Array, Single, Array, Single]:
    return d.codes["a"], d.single("a_scale"), d.codes["b"], d.single("b_scale")


def _gemm(d: Data) -> Outputs:
    result = gemm_fp8(*_operands(d), **d.arguments)
    assert result.dtype == np.float32
    return product(result.view(np.float32))


def _contiguous(d: Data) -> Outputs:
    result = grouped.contiguous(*_operands(d), d.codes["group"], d.arguments["kernel"])
    return product(result.view(np.float32))


def _masked(d: Data) -> Outputs:
    result = grouped.masked(*_operands(d), d.codes["counts"], d.arguments["kernel"])
    return product(result.view(np.float32))


def _along_k(d: Data) -> Outputs:
    sizes, kernel = d.arguments["sizes"], d.arguments["kernel"]
    return {"d": Out(grouped.along_k(*_operands(d), sizes, d.single("c"), kernel), "F32")}


_PROBES: Final = ("placement", "start", "copies")


def _plan(d: Data) -> Outputs:
    found = arrays.planned(d.arguments)
    return {name: Out(array, "I32", probe=name in _PROBES) for name, array in found.items()}


def _legality(d: Data) -> Outputs:
    found = arrays.judged(d.codes, d.arguments)
    rank = found["rank"]
    one_of = tuple(map(int, rank))
    return {"illegal": Out(found["illegal"], "I32"), "rank": Out(rank[:1], "I32", probe=True, one_of=one_of)}


COMPONENTS: dict[str, Callable[[Data], Outputs]] = {
    "decode": _decode,
    "cast": _cast,
    "quantise": _quantise,
    "dequantise": _dequantise,
    "requantise": _requantise,
    "scale_layouts": _scale_layouts,
    "wgmma_fp8": lambda d: _tensorcore(d, tensorcore.wgmma_fp8),
    "mma_fp8": lambda d: _tensorcore(d, tensorcore.mma_fp8),
    "wgmma_bf16": lambda d: _tensorcore(d, tensorcore.wgmma_bf16),
    "wgmma_fp16": lambda d: _tensorcore(d, tensorcore.wgmma_fp16),
    "gemm_fp8": _gemm,
    "gemm_contiguous": _contiguous,
    "gemm_masked": _masked,
    "gemm_along_k": _along_k,
    "plan": _plan,
    "legality": _legality,
}
