"""The arithmetics that fingerprints tell apart.  SPEC CASE-13.

A fingerprint is a row of `FINGERPRINTS`: from the inputs of its case to a note and the alternatives, the
first of which is what the case expects.  An instruction of Hopper has one right answer.  A product or a cast
has several, one for each published kernel or library; those that lose accuracy are named and do not pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from refimpl.cases.arithmetics.conversions import casts, recipes
from refimpl.cases.arithmetics.instructions import wgmma_bf16, wgmma_fp8, wgmma_fp16
from refimpl.cases.arithmetics.products import block_scaled, tensor_scaled
from refimpl.cases.arithmetics.question import Alternative, Question
from refimpl.cases.instruments import Data

__all__ = ["FINGERPRINTS", "Alternative", "Question"]

FINGERPRINTS: Final[dict[str, Callable[[Data], Question]]] = {
    "wgmma_fp8": wgmma_fp8,
    "wgmma_bf16": wgmma_bf16,
    "wgmma_fp16": wgmma_fp16,
    "gemm_fp8": block_scaled,
    "gemm_fp8_tensor": tensor_scaled,
    "cast": casts,
    "quantise": recipes,
}
