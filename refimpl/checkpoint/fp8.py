"""FP8 weights: codes with a grid of scales, read and written.  SPEC CKPT-9, CKPT-10.

CKPT-9.  A linear's weight W (R, C) may be stored as FP8 codes beside `weight_scale_inv`, one scale for each
block of r x c (`weight_block_size`), so (ceil(R / r), ceil(C / c)) of them: the last blocks may be smaller,
as in the 576 rows of kv_a_proj_with_mqa.  In spite of its name the scale multiplies:

    W[i, j] = RN(value of code[i, j] * scale[i div r, j div c])        float32, one rounding

and, by the choice `fp8_weights`, another rounding to bf16.  Scales are float32 or UE8M0.

CKPT-10.  Written is a folder of config.json and model.safetensors, where every weight that a published
checkpoint has in FP8 is quantised by a recipe of `blockscale`, and all else is stored as it was.
"""

from __future__ import annotations

import dataclasses
import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from refimpl.checkpoint.atomic import write_bytes
from refimpl.checkpoint.dtypes import Array, Stored
from refimpl.checkpoint.names import parameters
from refimpl.checkpoint.safetensors import write
from refimpl.errors import Invalid
from refimpl.numerics import formats, layouts
from refimpl.numerics.blockscale import Quantised, Tile, dequantise, quantise, quantiser

if TYPE_CHECKING:
    from refimpl.checkpoint.weights import Weights

SUFFIX: Final = "_scale_inv"
CODES: Final = {
    "F8_E4M3": formats.E4M3,
    "F8_E5M2": formats.E5M2,
    "F8_E4M3FNUZ": formats.E4M3FNUZ,
    "F8_E5M2FNUZ": formats.E5M2FNUZ,
}
SCALES: Final = ("F32", "F8_E8M0")


def weight(q: Quantised, rounding: str) -> Array:
    """Codes and scales  ->  float32 (R, C), with `rounding` "bf16" rounded to that as well.  SPEC CKPT-9."""
    return rounded(dequantise(q), rounding)


def rounded(value: Array, rounding: str) -> Array:
    """float32  ->  float32, with `rounding` "bf16" to the nearest of those."""
    return formats.round_to(value, formats.BF16).astype(np.float32) if rounding == "bf16" else value


def elements(values: Array, scales: Array, tile: Tile, columns: int, start: int) -> Array:
    """Decoded codes `start` and on of a weight, in C order (n,)  ->  their dequantised values (n,)."""
    row, column = np.divmod(np.arange(start, start + values.size), columns)
    with np.errstate(all="ignore"):
        product: Array = values * scales[row // tile[0], column // tile[1]]
    return product


def write_folder(
    path: str | PathLike[str], weights: Weights, recipe: str = "w_block", scales: str = "F32"
) -> None:
    """Write a checkpoint with FP8 weights in blocks of 128x128.  SPEC CKPT-10.

    recipe: of `blockscale.QUANTISERS`; scales: F32, or F8_E8M0 for a recipe with power-of-two scales.
    Weights are quantised one by one, when their bytes are written.  The folder must exist.
    Raises Invalid, Unreadable.
    """
    power = quantiser(recipe).power != ""
    if scales not in SCALES or (scales == "F8_E8M0" and not power):
        required = " or ".join(SCALES) if power else "F32 (its scales are no powers of two)"
        raise Invalid(f"scales are to be stored as {scales}, but those of {recipe} must be {required}.")
    quantization: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    if power:
        quantization["scale_fmt"] = "ue8m0"
    config = dataclasses.replace(weights.config, quantization_config=quantization)
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
    tensors: dict[str, Array | Stored] = {}
    specs = parameters(config)
    for name in weights:
        scale = f"{name}{SUFFIX}"
        if scale in specs:
            made = _Made(weights, name, recipe, scales)
            tensors[name] = Stored("F8_E4M3", specs[name].shape, made.codes)
            tensors[scale] = Stored(scales, specs[scale].shape, made.scales)
        else:
            tensors[name] = Stored(weights.dtype(name), weights.shape(name), _Codes(weights, name))
    write(Path(path) / "model.safetensors", tensors, {"format": "pt"})
    write_bytes(Path(path) / "config.json", text.encode())


@dataclasses.dataclass(frozen=True)
class _Made:
    """A weight that is quantised when it is written: once for its codes, once for its scales."""

    weights: Weights
    name: str
    recipe: str
    stored: str

    def quantised(self) -> Quantised:
        return quantise(np.asarray(self.weights[self.name], np.float32), self.recipe, (128, 128))

    def codes(self) -> Array:
        return self.quantised().codes

    def scales(self) -> Array:
        made = self.quantised().scales
        return layouts.to_ue8m0(made, f"scales of {self.name}") if self.stored == "F8_E8M0" else made


@dataclasses.dataclass(frozen=True)
class _Codes:
    weights: Weights
    name: str

    def __call__(self) -> Array:
        return self.weights.codes(self.name)
