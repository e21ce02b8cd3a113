"""Linears and one expert in the recipe v3-fp8 in torch, forward and backward: what hopper_recipe.py judges.

An implementation of its own: of refimpl it has the names of tensors alone.  Quantisation is torch on the
device; products are those of a `Products`.  SwiGLU is computed in float32, as kernels do, or in float64.
`Chain.noted` holds every tensor by its name in SPEC CASE-7.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

HERE = Path(__file__).resolve().parent
FLAGS = ("-std=c++17", "-O2", "-gencode", "arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler", "-fPIC")
SIZE = 128
TOP, TOP_E5M6 = 448.0, 65024.0


@dataclass(frozen=True)
class Rows:
    """codes (R, C padded to whole tiles), scales (R, C / 128), and the grid of 128x128 blocks of a weight."""

    codes: Tensor
    scales: Tensor
    grid: Tensor | None = None


Products = Callable[[str, Rows, Rows], Tensor]


def padded(x: Tensor, high: int = 1, wide: int = SIZE) -> Tensor:
    return functional.pad(x, (0, -x.shape[1] % wide, 0, -x.shape[0] % high))


def scale_of(amax: Tensor, power: bool, top: float = TOP) -> Tensor:
    # a division by a number of Python would be a product with its inverse on CUDA
    scale = amax.clamp(min=1e-4) / torch.full_like(amax, top)
    if not power:
        return scale
    return ((scale.view(torch.int32) + 0x7F_FFFF) & 0x7F80_0000).view(torch.float32)


def to_e4m3(quotient: Tensor) -> Tensor:
    return quotient.clamp(-TOP, TOP).to(torch.float8_e4m3fn)


def by_rows(x: Tensor, power: bool) -> Rows:
    """x (R, C) float32  ->  E4M3 in tiles of 1x128."""
    tiles = padded(x).reshape(x.shape[0], -1, SIZE)
    scales = scale_of(tiles.abs().amax(2), power)
    return Rows(to_e4m3(tiles / scales[..., None]).reshape(x.shape[0], -1), scales)


def by_columns(x: Tensor, power: bool) -> Rows:
    """x (T, C)  ->  x^T in tiles along the tokens, these padded with zeros."""
    return by_rows(x.t().contiguous(), power)


def by_blocks(w: Tensor) -> tuple[Rows, Rows]:
    """w (N, K)  ->  what Fprop reads, (N, K), and what Dgrad reads, (K, N)."""
    n, k = w.shape
    blocks = padded(w, SIZE).reshape(-(-n // SIZE), SIZE, -1, SIZE)
    grid = scale_of(blocks.abs().amax((1, 3)), False)
    codes = to_e4m3(blocks / grid[:, None, :, None]).reshape(-(-n // SIZE) * SIZE, -1)

    def side(codes: Tensor, grid: Tensor, rows: int) -> Rows:
        return Rows(codes[:rows].contiguous(), grid.repeat_interleave(SIZE, 0)[:rows].contiguous(), grid)

    return side(codes, grid, n), side(codes.t(), grid.t().contiguous(), k)


def e5m6(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (R, C) float32  ->  codes of 12 bits, scales (powers of two), values code * scale."""
    tiles = x.reshape(x.shape[0], -1, SIZE)
    scales = scale_of(tiles.abs().amax(2), True, TOP_E5M6)
    q = tiles / scales[..., None]
    power = (q.abs().clamp(min=2.0**-14).view(torch.int32) & 0x7F80_0000).view(torch.float32)
    step = power * 2.0**-6  # a unit in the last of 7 bits
    q = (torch.round(q / step) * step).clamp(-TOP_E5M6, TOP_E5M6)
    bits = (q.abs() * 2.0**-112).view(torch.int32) >> 17  # float32 whose exponents are those of E5M6
    codes = bits | (torch.signbit(q).to(torch.int32) << 11)
    return codes.reshape(x.shape), scales, (q * scales[..., None]).reshape(x.shape)


def widened(r: Rows, width: int) -> Tensor:
    return (r.codes.float() * r.scales.repeat_interleave(SIZE, 1))[:, :width]


def to_bf16(x: Tensor) -> Tensor:
    """Rounded once to BF16, as float32; float64 goes through a float32 that is rounded to odd."""
    if x.dtype == torch.float64:
        near = x.float()
        bits = near.view(torch.int32) - (near.double().abs() > x.abs()).to(torch.int32)
        x = (bits | (near.double() != x).to(torch.int32)).view(torch.float32)
    return x.bfloat16().float()


@dataclass
class Chain:
    """A component's run.  wide: the type of SwiGLU's arithmetic."""

    multiply: Products
    wide: torch.dtype = torch.float32
    noted: dict[str, Tensor] = field(default_factory=dict)

    def note(self, name: str, x: Tensor) -> Tensor:
        self.noted[name] = x
        return x

    def read(self, name: str, r: Rows) -> Rows:
        self.note(name, r.codes)
        self.note(f"{name}_scale", r.scales)
        return r

    def gemm(self, name: str, a: Rows, b: Rows) -> Tensor:
        self.read(f"{name}.a", a)
        self.read(f"{name}.b", b)
        return self.note(f"{name}.d", self.multiply(name, a, b))

    def backward(self, path: str, dy: Tensor, x_along: Rows, down: Rows, power: bool) -> Tensor:
        """Wgrad and Dgrad of a linear: dy (T, N) float32  ->  dx (T, K), before it is rounded.  power: dy was
        dispatched, and Wgrad reads what was."""
        self.note(f"{path}.dy", dy)
        across = self.read(f"{path}.dy.codes", by_rows(dy, power))
        along = by_columns(widened(across, dy.shape[1]) if power else dy, power)
        self.note(f"grad.{path}.weight", self.gemm(f"{path}.wgrad", along, x_along))
        return self.gemm(f"{path}.dgrad", across, down)

    def linear(self, path: str, x: Tensor, dy: Tensor, w: Tensor) -> None:
        """kv_a_proj_with_mqa, or o_proj, whose input is kept in E5M6."""
        last = path.endswith(".o_proj")
        name = "o_proj.in" if last else "self_attn.in"
        self.note(name, x)
        if last:
            codes, scales, stored = e5m6(x)
            self.note(f"{name}.codes", codes)
            self.note(f"{name}.codes_scale", scales)
            across, along = by_rows(stored, True), by_columns(stored, True)
        else:
            across = self.read(f"{name}.codes", by_rows(x, False))
            along = by_columns(widened(across, x.shape[1]), False)
        side, down = by_blocks(w)
        self.note(path, to_bf16(self.gemm(f"{path}.fprop", across, side)))
        self.note("grad.x", to_bf16(self.backward(path, dy, along, down, False)))

    def expert(self, path: str, x: Tensor, dy: Tensor, w: dict[str, Tensor]) -> None:
        """A routed expert: its input and its output's gradient are dispatched with powers of two."""
        sides = {name: by_blocks(matrix) for name, matrix in w.items()}
        hidden = self.read("experts.in.codes", by_rows(self.note("experts.in", x), True))
        outs = {}
        for name in ("gate_proj", "up_proj"):
            product = self.gemm(f"{path}.{name}.fprop", hidden, sides[name][0])
            outs[name] = self.note(f"{path}.{name}", to_bf16(product))
        act = self.note(f"{path}.act", self.swiglu(outs["gate_proj"], outs["up_proj"]))
        self.note(f"{path}.down_proj.in", act)
        read = self.read(f"{path}.down_proj.in.codes", by_rows(act, False))
        y = to_bf16(self.gemm(f"{path}.down_proj.fprop", read, sides["down_proj"][0]))
        self.note(f"{path}.down_proj", self.note(path, y))

        kept = {
            name: self.read(f"{path}.swiglu.{name}.codes", by_rows(outs[f"{name}_proj"], False))
            for name in ("gate", "up")
        }
        gate, up = (widened(q, act.shape[1]) for q in kept.values())
        again = self.note(f"{path}.down_proj.in.again", self.swiglu(gate, up))
        coded = by_rows(again, False)
        self.note(f"{path}.down_proj.in.codes.again", coded.codes)
        self.note(f"{path}.down_proj.in.codes_scale.again", coded.scales)
        along = by_columns(widened(coded, act.shape[1]), False)
        dact = to_bf16(self.backward(f"{path}.down_proj", dy, along, sides["down_proj"][1], True))

        gate, up, dact = (x.to(self.wide) for x in (gate, up, dact))
        s = torch.sigmoid(gate)
        silu = gate * s
        dup, dgate = (dact * silu).float(), (dact * up * (s + silu * (1.0 - s))).float()
        along = by_columns(widened(hidden, x.shape[1]), True)
        parts = [
            to_bf16(self.backward(f"{path}.{name}", given, along, sides[name][1], False))
            for name, given in (("gate_proj", dgate), ("up_proj", dup))
        ]
        self.note("grad.x", to_bf16(parts[0] + parts[1]))

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.to(self.wide), up.to(self.wide)
        return to_bf16(gate * torch.sigmoid(gate) * up)


class Library:
    """cuBLAS through torch: 1x128 times 128x128, or 1x128 times 1x128; and which of its kernels ran."""

    def __init__(self) -> None:
        self.kernels: dict[str, str] = {}

    def __call__(self, name: str, a: Rows, b: Rows) -> Tensor:
        from torch.nn.functional import ScalingType

        if b.grid is None:
            kind, scale = ScalingType.BlockWise1x128, by_columns_of(b.scales)
        else:
            kind, scale = ScalingType.BlockWise128x128, padded(b.grid, 1, 4).contiguous().t()

        def run() -> Tensor:
            made: Tensor = functional.scaled_mm(
                a.codes,
                b.codes.t(),
                by_columns_of(a.scales),
                ScalingType.BlockWise1x128,
                scale,
                kind,
                output_dtype=torch.float32,
            )
            return made

        run()  # so that what is measured is not what the library does once
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            made = run()
            torch.cuda.synchronize()
        self.kernels[name] = " + ".join(
            event.key.partition("<")[0].removeprefix("void ")
            for event in profile.key_averages()
            if event.device_type == torch.autograd.DeviceType.CUDA
        )
        return made


def by_columns_of(scales: Tensor) -> Tensor:
    """The same scales, stored column by column."""
    return scales.t().contiguous().t()


def hand_written(folder: Path) -> Products:
    """The kernel of hopper.cu, compiled into a folder."""
    library = folder / "hopper_recipe.so"
    subprocess.run(["nvcc", *FLAGS, "-o", library, HERE / "hopper_recipe.cu"], check=True)
    call = ctypes.CDLL(str(library)).product
    call.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int] * 3

    def product(name: str, a: Rows, b: Rows) -> Tensor:
        (m, k), n = a.codes.shape, len(b.codes)
        made = torch.empty((m, n), device=a.codes.device)
        given = [x.contiguous() for x in (a.codes, a.scales, b.codes, b.scales)]
        torch.cuda.synchronize()
        if call(*(x.data_ptr() for x in (*given, made)), m, n, k):
            raise RuntimeError(f"the kernel of hopper.cu did not run on {name}")
        return made

    return product


def emulated(name: str, a: Rows, b: Rows) -> Tensor:
    """Without a GPU: for trying this script out."""
    from refimpl.numerics.gemm import gemm_fp8

    made: Any = gemm_fp8(array(a.codes), array(a.scales), array(b.codes), array(b.scales), "deepgemm")
    return torch.from_numpy(made)


def array(x: Tensor) -> np.ndarray:
    return (x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x).contiguous().cpu().numpy()


def main() -> int:
    """FOLDER has x.npy, dy.npy, the weights and a job.json; tensors go to FOLDER/WAY-WIDE."""
    folder, job = Path(sys.argv[1]), json.loads((Path(sys.argv[1]) / "job.json").read_text())
    device = torch.device(job["device"])
    if device.type == "cuda" and (
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0)
    ):
        print("torch sees no GPU of compute capability 9.0", file=sys.stderr)
        return 2
    products: dict[str, Any] = {"emulation": emulated}
    if device.type == "cuda":
        products = {"wgmma": hand_written(folder), "library": Library()}
    name = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    about: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "kernels": {},
    }
    for case in job["cases"]:
        at = folder / case["name"]
        given = {p.stem: torch.from_numpy(np.load(p)).to(device) for p in at.glob("*.npy")}
        x, dy = given.pop("x"), given.pop("dy")
        for way, multiply in products.items():
            for wide in ("float32", "float64") if case["component"] == "mlp" else ("float32",):
                chain = Chain(multiply, getattr(torch, wide))
                if case["component"] == "mlp":
                    chain.expert(case["path"], x, dy, given)
                else:
                    chain.linear(case["path"], x, dy, given["weight"])
                to = at / f"{way}-{wide}"
                to.mkdir()
                for noted, tensor in chain.noted.items():
                    if not noted.endswith(".weight"):  # which is wgrad.d
                        np.save(to / f"{noted}.npy", array(tensor))
        if "library" in products:
            about["kernels"] |= {case["name"]: dict(products["library"].kernels)}
            products["library"].kernels.clear()
    (folder / "about.json").write_text(json.dumps(about))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    sys.exit(main())
