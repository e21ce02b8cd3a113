"""Suite quantise: scales and codes of tiles and blocks, layouts of scales.  SPEC SCALE-1 to SCALE-6."""

from __future__ import annotations

import numpy as np

from refimpl.cases.bits import Bits, Codes, Drawn, Source, Whole
from refimpl.cases.definition import SEED
from refimpl.cases.suites import flags
from refimpl.numerics import generator
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.blockscale import ACTIVATION, BLOCK, QUANTISERS, TRANSPOSED

_POWER = (flags.UE8M0_AFTER, flags.UE8M0_TRUNCATED, flags.UE8M0_LOG2)


def edge_tiles() -> Array:
    """(20, 128) codes of bf16: zero tiles of both signs, NaN, infinity and both, subnormal and tiny maxima,
    the floor, a single large value, maxima at and beside 448 times powers of two, the largest value."""
    x = np.abs(generator.tensor(SEED, "bits quantise edges", (20, 128), 2.0**-12)) + 2.0**-10
    x = x * np.where(generator.integers(SEED, "bits quantise signs", (20, 128), 0, 2), 1.0, -1.0)
    x[0], x[1] = 0.0, -0.0
    x[2, ::2] = 0.0
    x[7] *= 2.0**-130
    x[8] = np.ldexp(np.sign(x[8]), -133)
    x[9] *= 2.0**-13  # below the floor
    x[10, 64] = 2.0**15
    for row, top in enumerate((448.0, 450.0, 446.0, 448.0 * 2.0**-20, 450.0 * 2.0**-20, 1.0, 2.0**127), 11):
        x[row, 5] = top
    x[18] = np.ldexp(x[18], np.arange(128) // -4)  # all sizes, down to what falls below the codes
    x[19] = 2.0**-9
    codes = (x.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    codes[3, 10], codes[3, 70] = 0x7FC0, 0xFFC0
    codes[4, 10], codes[4, 70] = 0x7F80, 0xFF80
    codes[5, 10], codes[5, 70] = 0x7FC0, 0x7F80
    codes[6] = 0x7FC0
    return codes


def _activations(name: str) -> Bits:
    row = QUANTISERS[name]
    inputs: dict[str, Source] = {
        "x_edges": Codes(edge_tiles(), "BF16"),
        "x_bf16": Drawn((64, 7168), "BF16", 2.0**-7),
        "x_f32": Drawn((64, 512), "F32", 2.0**-28, 3),
    }
    return Bits(
        f"quantise/{name.replace('_', '-')}",
        f"Tiles of 1x128 as {row.source}",
        ("SCALE-1", "SCALE-2", "SCALE-3", "SCALE-4", "SCALE-6"),
        "quantise",
        inputs,
        {"recipe": name, "tile": list(ACTIVATION)},
        streams="quantise/activations",
        flags=(
            flags.ZERO_TILE,
            flags.ONE_SCALE_A_ROW,
            flags.SCALE_LOW_PRECISION,
            *(_POWER if row.power else ()),
        ),
    )


def above_powers() -> Array:
    """(60, 128) codes of float32: maxima 448 times powers of two, and up to five units of float32 off."""
    x = generator.tensor(SEED, "bits quantise powers", (60, 128), 2.0**-8).astype(np.float32)
    exponent = np.repeat(np.arange(-10, 10), 3).astype(np.int32)
    top = np.ldexp(np.float32(448.0), exponent).astype(np.float32).view(np.uint32)
    x = np.ldexp(x, exponent[:, None]).astype(np.float32)
    x[:, 9] = (top + np.tile(np.array([-1, 1, 4], np.int64), 20).astype(np.uint32)).view(np.float32)
    return x.view(np.uint32)


def _above_powers(name: str) -> Bits:
    return Bits(
        f"quantise/near-powers-{name.replace('_', '-')}",
        f"Maxima a few units of float32 beside powers of two, as {QUANTISERS[name].source}",
        ("SCALE-3", "SCALE-4", "SCALE-6"),
        "quantise",
        {"x": Codes(above_powers(), "F32")},
        {"recipe": name, "tile": list(ACTIVATION)},
        flags=_POWER,
    )


def _weights(name: str) -> Bits:
    inputs: dict[str, Source] = {
        "x_576": Drawn((576, 7168), "BF16", 2.0**-12),
        "x_ragged": Drawn((200, 300), "BF16", 2.0**-12),
    }
    return Bits(
        f"quantise/{name.replace('_', '-')}",
        f"Blocks of 128x128, the last of 64 or fewer rows and columns, as {QUANTISERS[name].source}",
        ("SCALE-1", "SCALE-3", "SCALE-4", "SCALE-6"),
        "quantise",
        inputs,
        {"recipe": name, "tile": list(BLOCK)},
        streams="quantise/weights",
        flags=(flags.LAST_BLOCK_LOST, *(_POWER if QUANTISERS[name].power else ())),
    )


def _requantised(name: str, power: bool) -> Bits:
    scales: Source = Whole((256, 2), "F8_E8M0", 100, 140) if power else _scales((256, 2))
    if power:
        scales = Codes(
            (generator.integers(SEED, "bits powers", (256, 2), 117, 130) << 23).astype(np.uint32), "F32"
        )
    return Bits(
        f"quantise/transposed-{name.replace('_', '-')}",
        "Tiles of 1x128 quantised again in tiles of 128x1, for Wgrad"
        + (": exact up to underflow" if power else ""),
        ("SCALE-5",),
        "requantise",
        {"codes": Drawn((256, 256)), "scales": scales},
        {"recipe": name, "tile": list(ACTIVATION), "tile_out": list(TRANSPOSED)},
    )


def _scales(shape: tuple[int, ...]) -> Whole:
    return Whole(shape, "F32", 1 << 20, 1 << 24, 2.0**-34)


CASES: tuple[Bits, ...] = (
    *(_activations(name) for name, row in QUANTISERS.items() if row.tile == ACTIVATION),
    *(_weights(name) for name, row in QUANTISERS.items() if row.tile == BLOCK),
    *(_above_powers(name) for name, row in QUANTISERS.items() if row.tile == ACTIVATION and row.power),
    Bits(
        "quantise/dequantise-weights",
        "A weight of 576 rows, which no block divides, from codes and scales",
        ("SCALE-5", "CKPT-9"),
        "dequantise",
        {"codes": Whole((576, 1536), "F8_E4M3", 0, 256), "scales": _scales((5, 12))},
        {"tile": list(BLOCK)},
        flags=(flags.SCALE_IGNORED, flags.SCALE_DIVIDED, flags.LAST_BLOCK_LOST, flags.GRID_TRANSPOSED),
    ),
    _requantised("ue8m0", True),
    _requantised("ieee", False),
    Bits(
        "quantise/scale-layouts",
        "Power-of-two scales (130, 14): column-major and aligned, as UE8M0, and four of these in a word",
        ("LAYOUT-1", "LAYOUT-2", "LAYOUT-3", "LAYOUT-4"),
        "scale_layouts",
        {
            "scales": Codes(
                (generator.integers(SEED, "bits layout", (130, 14), 90, 140) << 23).astype(np.uint32), "F32"
            )
        },
    ),
)
