"""Arithmetics of one matrix instruction, and of a chain of them.  SPEC CASE-13, TENSOR-5."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from refimpl.cases.arithmetics.question import Alternative, Question
from refimpl.cases.instruments import Data, Out, Outputs
from refimpl.numerics import tensorcore, variants
from refimpl.numerics.float32 import Single, canonical
from refimpl.numerics.formats import FORMATS
from refimpl.numerics.variants import Variant

FP8 = Variant("", "", 32, 13, 13)
FP8_CHANGES: dict[str, tuple[str, dict[str, object]]] = {
    "aligned-to-nearest": ("addends are rounded to 13 fraction bits instead of cut", {"align": "nearest"}),
    "stored-to-nearest": ("the sum is rounded to 13 fraction bits instead of cut", {"store": "nearest"}),
    "12-bits": ("12 fraction bits", {"fraction": 12, "kept": 12}),
    "14-bits": ("14 fraction bits", {"fraction": 14, "kept": 14}),
    "stored-whole": ("the sum is not cut to 13 fraction bits", {"kept": 23}),
    "25-bits": ("25 fraction bits, as for BF16", {"fraction": 25, "kept": 23}),
    "normalised": ("exponents of normalised products", {"normalised": True}),
    "zeros-count": ("the exponent of a zero product counts", {"zeros": True}),
    "c-apart": ("c is added to the sum of the products in float32", {"fused": False}),
    "steps-of-16": ("16 products in a step", {"products": 16}),
    "steps-of-64": ("64 products in a step", {"products": 64}),
    "subnormals-flushed": ("subnormal operands are zero", {"flush": True}),
}
_HALF = Variant("", "", 16, 25, 23, -133)
_HALF_CHANGES: dict[str, tuple[str, dict[str, object]]] = {
    "24-bits": ("24 fraction bits", {"fraction": 24}),
    "26-bits": ("26 fraction bits", {"fraction": 26}),
    "steps-of-4": ("4 products in a step", {"products": 4}),
    "steps-of-8": ("8 products in a step", {"products": 8}),
    "steps-of-8-24-bits": ("8 products in a step, 24 fraction bits", {"products": 8, "fraction": 24}),
    "steps-of-32": ("32 products in a step", {"products": 32}),
    "aligned-to-nearest": ("addends are rounded to 25 fraction bits instead of cut", {"align": "nearest"}),
    "stored-to-nearest": ("the sum is rounded to float32 instead of cut", {"store": "nearest"}),
    "normalised": ("exponents of normalised products", {"normalised": True}),
    "zeros-count": ("the exponent of a zero product counts", {"zeros": True}),
    "c-apart": ("c is added to the sum of the products in float32", {"fused": False}),
    "subnormals-flushed": ("subnormal operands are zero", {"flush": True}),
}
_CLAMPS: dict[str, tuple[str, dict[str, object]]] = {
    "lowest-132": ("the largest exponent is at least -132", {"lowest": -132}),
    "lowest-134": ("the largest exponent is at least -134", {"lowest": -134}),
    "no-lowest": ("the largest exponent has no lower limit", {"lowest": None}),
}
_ACCUMULATOR: dict[str, tuple[str, dict[str, object]]] = {
    "fp16-accumulator": ("the accumulator is FP16, rounded to nearest", {"half": True, "store": "nearest"}),
}
_INSTRUCTION = (
    "The instruction has one right answer, the first; the others are named so that it can be seen what an "
    "emulation or another unit does."
)


def _instruction(d: Data, base: Variant, changes: dict[str, Any], own: str, fa: str, fb: str) -> Question:
    a, b, c, left, right = d.codes["a"], d.codes["b"], d.single("c"), FORMATS[fa], FORMATS[fb]

    def made(call: Callable[[], Single]) -> Callable[[Data], Outputs]:
        return lambda _: {"d": Out(canonical(call().copy()), "F32")}

    hardware: dict[str, Callable[[], Single]] = {
        "wgmma_fp8": lambda: tensorcore.wgmma_fp8(a, b, c, fa, fb),
        "mma_fp8": lambda: tensorcore.mma_fp8(a, b, c, fa, fb),
        "wgmma_bf16": lambda: tensorcore.wgmma_bf16(a, b, c),
        "wgmma_fp16": lambda: tensorcore.wgmma_fp16(a, b, c),
    }
    rows = [Alternative("hopper", f"{own} of Hopper", True, made(hardware[own]))]
    if own == "wgmma_fp8":
        text = "mma.sync: unpacked to FP16, two steps of 16, added in float32"
        rows.append(Alternative("mma.sync", text, False, made(hardware["mma_fp8"])))
    rows += [
        Alternative(v.name, v.text, False, made(partial(variants.multiply, a, b, c, left, right, v)))
        for v in variants.variants(base, changes)
    ]
    text = "fused multiply-adds in float32, one after the other"
    rows.append(
        Alternative("fp32-sequential", text, False, made(partial(variants.sequential, a, b, c, left, right)))
    )
    text = "the exact sum, rounded to float64 and then to float32"
    rows.append(Alternative("float64", text, False, made(partial(variants.wide, a, b, c, left, right))))
    return Question(_INSTRUCTION, rows)


def wgmma_fp8(d: Data) -> Question:
    """FP8 in any mix."""
    formats = d.arguments["a_format"], d.arguments["b_format"]
    return _instruction(d, FP8, FP8_CHANGES, "wgmma_fp8", *formats)


def wgmma_bf16(d: Data) -> Question:
    """BF16."""
    return _instruction(d, _HALF, _HALF_CHANGES | _CLAMPS, "wgmma_bf16", "bf16", "bf16")


def wgmma_fp16(d: Data) -> Question:
    """FP16."""
    return _instruction(d, _HALF, _HALF_CHANGES | _ACCUMULATOR, "wgmma_fp16", "fp16", "fp16")
