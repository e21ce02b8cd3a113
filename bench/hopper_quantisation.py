"""Quantisation and casts on a Hopper GPU against the emulation, on fresh data.

    python bench/hopper_quantisation.py [--seed N] [--tiles N]        needs torch with CUDA, and Triton

Compares bit for bit: x / s as Triton compiles it, 2^ceil(log2) for every normal float32, the official
act_quant's formulas with both kinds of scale, DeepGEMM's formulas in torch, and torch's casts.  Tiles are
random numbers of all sizes, random bit patterns, mostly zero tiles, and maxima just above a power of two.
Exit status: 0 all agree, 1 some differ, 2 there is no such GPU.
"""

import argparse
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np

from refimpl.numerics import blockscale, casts, reciprocal
from refimpl.numerics.formats import E4M3, E5M2

if find_spec("torch") is None or find_spec("triton") is None:
    print("torch and triton are needed, and they are not installed", file=sys.stderr)
    sys.exit(2)

import torch
import triton
import triton.language as tl

Rows = list[tuple[str, int, int]]


@triton.jit
def power_kernel(x, y, size: tl.constexpr):
    at = tl.program_id(0) * size + tl.arange(0, size)
    tl.store(y + at, tl.math.exp2(tl.math.ceil(tl.math.log2(tl.load(x + at)))))


@triton.jit
def divide_kernel(x, s, y, size: tl.constexpr):
    at = tl.program_id(0) * size + tl.arange(0, size)
    tl.store(y + at, tl.load(x + at) / tl.load(s + at))


@triton.jit
def quantise_kernel(x, y, s, size: tl.constexpr, power: tl.constexpr):
    tile = tl.program_id(0)
    at = tile * size + tl.arange(0, size)
    values = tl.load(x + at).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values)), 1e-4) / 448.0
    if power:
        scale = tl.math.exp2(tl.math.ceil(tl.math.log2(scale)))
    tl.store(y + at, (values / scale).to(y.dtype.element_ty))
    tl.store(s + tile, scale)


def differ(found: np.ndarray, expected: np.ndarray) -> int:
    """How many values differ; any NaN equals any NaN."""
    if found.dtype.kind != "f":
        return int((found != expected).sum())
    same = (found.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(found) & np.isnan(expected))
    return int((~same).sum())


def patterns(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(0, 1 << 32, shape, dtype=np.uint32).view(np.float32)


def tiles(rng: np.random.Generator, n: int) -> np.ndarray:
    x = rng.standard_normal((n, 128)) * np.exp2(rng.integers(-40, 100, (n, 1)))
    x = x.astype(np.float32)
    x[::16] = patterns(rng, x[::16].shape)
    x[5::64, :120] = 0
    above = (np.arange(n) % 24 + (rng.integers(100, 160, n) << 23)).astype(np.uint32).view(np.float32)
    x[1::4, 1:] = 0
    x[1::4, 0] = (above * np.float32(448))[1::4]
    return x


def powers() -> Rows:
    base = torch.arange(1 << 23, device="cuda", dtype=torch.int32)
    wrong = 0
    for field in range(1, 255):
        x = (base + (field << 23)).view(torch.float32)
        y = torch.empty_like(x)
        power_kernel[(x.numel() // 1024,)](x, y, 1024)
        with np.errstate(over="ignore"):
            wrong += differ(blockscale._log2(x.cpu().numpy()), y.cpu().numpy())
    return [("2^ceil(log2 s), all normal s > 0", 254 << 23, wrong)]


def quotients(rng: np.random.Generator) -> Rows:
    x, s = patterns(rng, (1 << 20,)), patterns(rng, (1 << 20,))
    x[::2] = 1.0
    given, divisor = torch.from_numpy(x).cuda(), torch.from_numpy(s).cuda()
    y = torch.empty_like(given)
    divide_kernel[(x.size // 1024,)](given, divisor, y, 1024)
    return [("x / s in Triton", x.size, differ(reciprocal.div_full(x, s), y.cpu().numpy()))]


def by_triton(x: np.ndarray) -> Rows:
    rows: Rows = []
    given = torch.from_numpy(x).cuda()
    for recipe, power in (("triton_v3", False), ("triton_v3_ue8m0", True)):
        y = torch.empty(x.shape, device="cuda", dtype=torch.float8_e4m3fn)
        s = torch.empty(len(x), device="cuda")
        quantise_kernel[(len(x),)](given, y, s, 128, power)
        rows += compared(recipe, x, y, s)
    return rows


def by_torch(x: np.ndarray) -> Rows:
    rows: Rows = []
    given = torch.from_numpy(x).cuda()
    s = given.abs().float().amax(1, keepdim=True).clamp(1e-4) / 448.0
    bits = s.view(torch.int32)
    field = ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    power = (field.clamp(1, 254) << 23).view(torch.float32)
    for recipe, scale in (("torch_dg", s), ("torch_dg_ue8m0", power)):
        y = (given * (1.0 / scale)).to(torch.float8_e4m3fn)
        rows += compared(recipe, x, y, scale[:, 0])
    return rows


def compared(recipe: str, x: np.ndarray, y: Any, s: Any) -> Rows:
    made = blockscale.quantise(x, recipe)
    codes = y.view(torch.uint8).cpu().numpy()
    return [
        (f"{recipe} codes", codes.size, differ(made.codes, codes)),
        (f"{recipe} scales", len(x), differ(made.scales[:, 0], s.cpu().numpy())),
    ]


def by_cast(rng: np.random.Generator) -> Rows:
    version = ".".join(torch.__version__.split(".")[:2])
    x = patterns(rng, (1 << 24,))
    rows: Rows = []
    for fmt, dtype in ((E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)):
        if (f"torch-{version}", fmt.name) in casts.CASTS:
            codes = torch.from_numpy(x).cuda().to(dtype).view(torch.uint8).cpu().numpy()
            rows.append(
                (
                    f"torch {version} to {fmt.name}",
                    x.size,
                    differ(casts.cast(x, fmt, f"torch-{version}"), codes),
                )
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiles", type=int, default=1 << 16)
    given = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("a Hopper GPU (compute capability 9.0) is needed, and there is none", file=sys.stderr)
        return 2
    rng = np.random.default_rng(given.seed)
    x = tiles(rng, given.tiles)
    rows = [*powers(), *quotients(rng), *by_triton(x), *by_torch(x), *by_cast(rng)]
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, Triton {triton.__version__}, seed {given.seed}")
    for name, values, wrong in rows:
        print(f"{name:36}{values:16,} values {wrong:10,} differ")
    return int(any(row[2] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
