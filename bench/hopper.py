"""Does a Hopper GPU still compute what the emulation computes?  Fresh operands, random and adversarial.

    python bench/hopper.py [--way nvcc|torch] [--seed N] [--rounds N] [--quick]

Every round compares the products of all instructions (wgmma on FP8 in all mixes, BF16, FP16; mma.sync on FP8,
BF16, FP16) with accumulators of all kinds, half of them random and half adversarial; then two block-scaled
products in DeepGEMM's order at shapes of DeepSeek-V3.  Needs a GPU of compute capability 9.0 and one of:

    nvcc     compiles hopper.cu, which issues the instructions themselves: the full comparison
    torch    torch._scaled_mm, E4M3 without accumulator, K up to 128 (cuBLAS may split a longer one); of the
             block-scaled products, the sums of 128 come from the GPU and the promotion from the emulation

Exit status: 0 all bits agree, 1 some differ, 2 it could not be tried.
"""

import argparse
import datetime
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests" / "numerics")]

import adversary  # noqa: E402  (the tests' operands)

from refimpl.numerics import tensorcore as cores  # noqa: E402  (run from a checkout, installed or not)
from refimpl.numerics.float32 import canonical, fma  # noqa: E402
from refimpl.numerics.formats import FORMATS, encode  # noqa: E402
from refimpl.numerics.gemm import gemm_fp8  # noqa: E402
from refimpl.numerics.threads import each  # noqa: E402

FLAGS = ("-std=c++17", "-O2", "-gencode", "arch=compute_90a,code=sm_90a")
M, N = 576, 360  # of a product of instructions: whole tiles of 64 and 8, and all pairs of kinds
V3 = ((128, 576, 7168), (64, 2112, 7168))  # kv_a_proj_with_mqa; it and q_a_proj as one


@dataclass(frozen=True)
class Instruction:
    number: int  # in hopper.cu
    name: str
    a: str
    b: str
    emulation: Callable[..., np.ndarray]

    @property
    def step(self) -> int:
        return 32 // FORMATS[self.a].code_type.itemsize


INSTRUCTIONS = (
    Instruction(0, "wgmma", "e4m3", "e4m3", cores.wgmma_fp8),
    Instruction(1, "wgmma", "e4m3", "e5m2", cores.wgmma_fp8),
    Instruction(2, "wgmma", "e5m2", "e4m3", cores.wgmma_fp8),
    Instruction(3, "wgmma", "e5m2", "e5m2", cores.wgmma_fp8),
    Instruction(4, "wgmma", "bf16", "bf16", cores.wgmma_bf16),
    Instruction(5, "wgmma", "fp16", "fp16", cores.wgmma_fp16),
    Instruction(6, "mma.sync", "e4m3", "e4m3", cores.mma_fp8),
    Instruction(7, "mma.sync", "e5m2", "e5m2", cores.mma_fp8),
    Instruction(8, "mma.sync", "bf16", "bf16", cores.mma_bf16),
    Instruction(9, "mma.sync", "fp16", "fp16", cores.mma_fp16),
)


@dataclass(frozen=True)
class Job:
    """A product for the GPU, and what the emulation makes of it."""

    name: str
    instruction: Instruction
    a: np.ndarray  # (M, K)
    b: np.ndarray  # (N, K)
    c: np.ndarray  # (M, N), zeros if scaled
    scales: tuple[np.ndarray, np.ndarray] | None = None  # (M, K/128), (N, K/128)

    def emulated(self) -> np.ndarray:
        """float32 (M, N), rows on several threads."""

        def rows(at: int) -> np.ndarray:
            part = slice(at, at + 64)
            if self.scales is not None:
                sa, sb = self.scales
                return gemm_fp8(self.a[part], sa[part], self.b, sb, "deepgemm")
            formats = [self.instruction.a, self.instruction.b] if self.a.dtype == np.uint8 else []
            return self.instruction.emulation(self.a[part], self.b, self.c[part], *formats)

        return np.concatenate(each(rows, range(0, len(self.a), 64)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--way", choices=("nvcc", "torch"))
    parser.add_argument("--seed", type=int, default=int(datetime.date.today().strftime("%Y%m%d")))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small products only")
    options = parser.parse_args()
    way = options.way or ("nvcc" if shutil.which("nvcc") else "torch")
    print(f"{datetime.date.today()}, seed {options.seed}, by {way}", flush=True)
    totals: dict[str, list[int]] = {}
    try:
        compute = by_nvcc if way == "nvcc" else by_torch
        for turn in range(options.rounds):
            made = list(jobs(np.random.default_rng([options.seed, turn]), way, options.quick, turn))
            for job, found in zip(made, compute(made), strict=True):
                expected = job.emulated()
                differing = np.flatnonzero(found.view(np.uint32) != expected.view(np.uint32))
                counts = totals.setdefault(job.name, [0, 0])
                counts[0] += expected.size
                counts[1] += differing.size
                for at in differing[:3]:
                    report(job, found, expected, int(at))
    except (OSError, ImportError, subprocess.CalledProcessError, RuntimeError) as failure:
        print(f"it could not be tried: {failure}", file=sys.stderr)
        return 2
    totals["all"] = [sum(column) for column in zip(*totals.values(), strict=True)]
    for name, (values, wrong) in totals.items():
        print(f"{name:40} {values:12,} values {wrong:10,} mismatches")
    return 1 if totals["all"][1] else 0


def jobs(rng: np.random.Generator, way: str, quick: bool, turn: int) -> Iterator[Job]:
    """The products of one round."""
    for instruction in INSTRUCTIONS if way == "nvcc" else INSTRUCTIONS[:1]:
        fa, fb = FORMATS[instruction.a], FORMATS[instruction.b]
        for kind in ("random", "adversarial"):
            k = instruction.step * (1, 2, 4, 4)[turn % 4]
            if kind == "random":
                a, b = (encode(rng.standard_normal((rows, k)), f) for rows, f in ((M, fa), (N, fb)))
                c = rng.standard_normal((M, N)).astype(np.float32)
            else:
                a, b = adversary.codes(rng, fa, M, k), adversary.codes(rng, fb, N, k)
                c = adversary.accumulators(rng, M, N)
            if way == "torch":
                c[:] = 0
            name = f"{instruction.name} {instruction.a} {instruction.b}, {kind}"
            yield Job(name, instruction, a, b, c)
    if way == "nvcc":
        a, b = (encode(rng.standard_normal((rows, 4096)), FORMATS["e4m3"]) for rows in (64, 64))
        yield Job("wgmma e4m3 e4m3, K = 4096", INSTRUCTIONS[0], a, b, np.zeros((64, 64), np.float32))
    for m, n, k in () if quick or turn else V3:
        a, b = (encode(rng.standard_normal((rows, k)) * 100, FORMATS["e4m3"]) for rows in (m, n))
        sa = rng.uniform(0.5, 2, (m, k // 128)).astype(np.float32)
        sb = np.repeat(rng.uniform(0.5, 2, (-(-n // 128), k // 128)).astype(np.float32), 128, axis=0)[:n]
        zero = np.zeros((m, n), np.float32)
        yield Job(f"block-scaled {m} x {n} x {k}", INSTRUCTIONS[0], a, b, zero, (sa, sb))


def by_nvcc(made: list[Job]) -> Iterator[np.ndarray]:
    """The results of hopper.cu, which is compiled and run in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        program, given, result = (Path(folder) / name for name in ("hopper", "in", "out"))
        subprocess.run(["nvcc", *FLAGS, "-o", program, HERE / "hopper.cu"], check=True)
        with given.open("wb") as file:
            for job in made:
                scaled = job.scales is not None
                bytes_of_k = job.a.shape[1] * job.a.itemsize
                head = [job.instruction.number, len(job.a), len(job.b), bytes_of_k, scaled, 0]
                for array in (np.array(head, np.int32), job.a, job.b, job.c, *(job.scales or ())):
                    file.write(np.ascontiguousarray(array).tobytes())
        subprocess.run([program, given, result], check=True)
        values = np.fromfile(result, np.float32)
    at = 0
    for job in made:
        yield values[at : at + job.c.size].reshape(job.c.shape)
        at += job.c.size


def by_torch(made: list[Job]) -> Iterator[np.ndarray]:
    """The results of cuBLAS, through torch."""
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise RuntimeError("torch sees no GPU of compute capability 9.0")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    one = torch.ones((), device="cuda")

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        left, right = (torch.from_numpy(x.copy()).cuda().view(torch.float8_e4m3fn) for x in (a, b))
        made = torch._scaled_mm(
            left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=True
        )
        return canonical(made.cpu().numpy())

    # torch wants N in multiples of 16
    for job in made:
        n = len(job.b)
        b = np.concatenate([job.b, np.zeros((-n % 16, job.b.shape[1]), np.uint8)])
        if job.scales is None:
            yield product(job.a, b)[:, :n]
            continue
        sa, sb = job.scales
        acc = np.zeros((len(job.a), n), np.float32)
        for k in range(sa.shape[1]):
            part = slice(128 * k, 128 * k + 128)
            acc = fma(sa[:, k, None] * sb[None, :, k], product(job.a[:, part], b[:, part])[:, :n], acc)
        yield acc


def report(job: Job, found: np.ndarray, expected: np.ndarray, at: int) -> None:
    i, j = divmod(at, len(job.b))
    bits = [f"{x[i, j].view(np.uint32):08x}" for x in (found, expected, job.c)]
    print(f"{job.name}: ({i}, {j}) is {bits[0]} on the GPU and {bits[1]} emulated, from c = {bits[2]}")


if __name__ == "__main__":
    sys.exit(main())
