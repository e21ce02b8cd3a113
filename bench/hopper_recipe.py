"""Linears and one expert of V3's width in the recipe v3-fp8 on a Hopper GPU, against the recipe's arithmetic.

    python bench/hopper_recipe.py [--seed N] [--tokens N] [--quick] [--without-gpu] [--out FILE]

hopper_recipe_chain.py runs each component forward and backward on the GPU, with torch and two products in
hardware FP8: cuBLAS's block-scaled one and the hand-written wgmma kernel of hopper.cu.  Here every tensor is
judged twice, bit for bit:

    stage by stage   as made from the GPU's own tensors before it, so that no difference is carried on
    chained          as the recipe makes it from the same input by itself

In which order cuBLAS adds, and in how many parts of K, it does not say: rows of GEMM-1 that fit its first
values are looked for, and the whole product is held to the first of them.  Writes hopper_recipe.md; needs
torch with CUDA, and nvcc.
Exit status: 0 all agrees that has to, 1 some does not, 2 it could not be tried.  Not bit for bit is only what
a SwiGLU in float32 makes (`Row.close`), and what follows from it, or from another order, when chained.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # there are as many processes as cores

import argparse
import datetime
import hashlib
import json
import multiprocessing
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from refimpl import programs  # noqa: E402
from refimpl.config.choices import Choices  # noqa: E402
from refimpl.config.presets import preset  # noqa: E402
from refimpl.numerics.arithmetic import Array  # noqa: E402
from refimpl.numerics.float32 import canonical  # noqa: E402
from refimpl.numerics.formats import BF16, E4M3, decode, round_to  # noqa: E402
from refimpl.numerics.gemm import gemm_fp8  # noqa: E402
from refimpl.numerics.precision import recipe  # noqa: E402
from refimpl.numerics.scaled import Rows  # noqa: E402
from refimpl.recipe_programs import PRODUCT, VALUE, Met, Noting, located  # noqa: E402
from refimpl.setting import Setting  # noqa: E402

RECIPE = "v3-fp8"
LAYER = "model.layers.3"
SWIGLU = (".act", ".down_proj.in", ".down_proj.in.again", ".gate_proj.dy", ".up_proj.dy")  # what it makes
ORDERS = [(kernel, parts) for parts in (1, 2, 3, 4, 5, 6, 7, 8) for kernel in ("deepgemm", "triton_wgmma")]
ROUNDINGS = 8  # of a gradient of SwiGLU in float32: exp, 1 +, 1 /, 1 -, products, a sum
PIECE = 192  # rows of an operand that a process takes at a time


@dataclass(frozen=True)
class Case:
    name: str
    component: str
    path: str
    width: int  # of x
    inner: int  # of a linear's output, or of the expert
    tokens: int  # a multiple of 64

    @property
    def weights(self) -> dict[str, tuple[int, int]]:
        if self.component == "linear":
            return {"weight": (self.inner, self.width)}
        up = (self.inner, self.width)
        return {"gate_proj": up, "up_proj": up, "down_proj": up[::-1]}

    @property
    def out(self) -> int:
        return self.inner if self.component == "linear" else self.width

    def named(self, weight: str) -> str:
        return f"{self.path}.{weight}" if self.component == "linear" else f"{self.path}.{weight}.weight"


CASES = (
    Case("kv_a_proj", "linear", f"{LAYER}.self_attn.kv_a_proj_with_mqa", 7168, 576, 1088),
    Case("o_proj", "linear", f"{LAYER}.self_attn.o_proj", 16384, 7168, 192),
    Case("expert", "mlp", f"{LAYER}.mlp.experts.3", 7168, 2048, 192),
)
Order = tuple[str, int]  # a kernel of GEMM-1 that adds as it does, and the parts of K
SMALL = ((512, 192), (640, 384), (384, 256))


def drawn(rng: np.random.Generator, case: Case) -> dict[str, Array]:
    """Numbers of BF16: tokens and channels of different size, a token of zeros, a channel far outside."""

    def tensor(rows: int, columns: int, size: float) -> Array:
        spread = np.exp2(rng.uniform(-2, 2, (rows, 1)) + rng.uniform(-1, 1, columns))
        made = rng.standard_normal((rows, columns)) * spread * size
        made[3 % rows], made[:, 5 % columns] = 0.0, made[:, 5 % columns] * 64
        return round_to(made, BF16).astype(np.float32)

    given = {"x": tensor(case.tokens, case.width, 1.0), "dy": tensor(case.tokens, case.out, 2.0**-9)}
    return given | {
        name: round_to(rng.standard_normal(shape) * 0.02, BF16).astype(np.float32)
        for name, shape in case.weights.items()
    }


class Emulation:
    """gemm_fp8 on all cores; what was multiplied before is not multiplied again."""

    def __init__(self, folder: Path) -> None:
        # before there are any threads, and while there is little to copy
        self.pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork"))
        self.folder, self.done = folder, dict[str, Array]()
        list(self.pool.map(abs, range(1000)))

    def __call__(self, a: Rows, b: Rows, order: Order) -> Array:
        given = [np.ascontiguousarray(x) for x in (a.codes, a.scales, b.codes, b.scales)]
        key = hashlib.blake2b(str((order, [x.shape for x in given])).encode())
        for x in given:
            key.update(x)
        name = key.hexdigest()[:32]
        if name not in self.done:
            files = [str(self.folder / f"{name}-{i}.npy") for i in range(4)]
            for file, x in zip(files, given, strict=True):
                np.save(file, x)
            wide = len(b.codes) > len(a.codes)
            rows = range(0, max(len(a.codes), len(b.codes)), PIECE)
            parts = self.pool.map(_piece, [(files, wide, at, order) for at in rows])
            self.done[name] = np.concatenate(list(parts), axis=int(wide))
            for file in files:
                Path(file).unlink()
        return self.done[name]


def _piece(work: tuple[list[str], bool, int, Order]) -> Array:
    files, wide, at, order = work
    a, sa, b, sb = (np.load(file, mmap_mode="r") for file in files)
    part = slice(at, at + PIECE)
    a, sa, b, sb = (a, sa, b[part], sb[part]) if wide else (a[part], sa[part], b, sb)
    return product(Rows(a, sa, "e4m3"), Rows(b, sb, "e4m3"), order)


def product(a: Rows, b: Rows, order: Order) -> Array:
    """a b^T as a kernel of GEMM-1 adds, in equal parts of K."""
    kernel, parts = order
    size = a.scales.shape[1] // parts

    def of(part: int) -> Array:
        blocks = slice(part * size, part * size + size)
        codes = slice(blocks.start * 128, blocks.stop * 128)
        given = (a.codes[:, codes], a.scales[:, blocks], b.codes[:, codes], b.scales[:, blocks])
        made: Any = gemm_fp8(*(np.ascontiguousarray(x) for x in given), kernel)
        return made

    total = of(0)
    for part in range(1, parts):
        total = total + of(part)
    return canonical(total)


class Judge(Noting):
    """`Noting` whose products are computed on all cores, in the order that the GPU's were."""

    def __init__(self, emulation: Emulation, theirs: dict[str, Array] | None) -> None:
        super().__init__(recipe(RECIPE), theirs)
        self._emulation = emulation
        self.orders: dict[str, tuple[list[Order], tuple[int, int, int]]] = {}  # GEMM -> what fits, shape

    def gemm(self, site: str, a: Rows, b: Rows) -> Array:
        name = f"{self._state.path}.{site.rpartition('.')[2]}"
        a, b = self._read(f"{name}.a", a), self._read(f"{name}.b", b)
        theirs = self._state.theirs.get(f"{name}.d")
        orders = ORDERS[:1] if theirs is None else fitting(a, b, theirs)
        self.orders[name] = orders, (len(a.codes), len(b.codes), a.codes.shape[1])
        made = self._emulation(a, b, (orders or ORDERS)[0])
        return self.array(self._meet(f"{name}.d", PRODUCT, made))


def fitting(a: Rows, b: Rows, found: Array) -> list[Order]:
    """The orders that give the first values, in the smallest number of parts that does."""
    some = [Rows(x.codes[:n], x.scales[:n], x.format) for x, n in ((a, 16), (b, 64))]
    fit: list[Order] = []
    for order in ORDERS:
        apart = a.scales.shape[1] % order[1] or (fit and fit[0][1] < order[1])
        if not apart and differing(product(*some, order), found[:16, :64]) == 0:
            fit.append(order)
    return fit


def differing(ours: Array, theirs: Array) -> int:
    """How many values have other bits; values are those of float32."""
    if ours.dtype.kind == "u":
        return int((ours != theirs).sum())
    pair = [np.asarray(x, np.float32) for x in (ours, theirs)]
    if np.array_equal(pair[0].view(np.uint32), pair[1].view(np.uint32)):
        return 0
    pair = [canonical(x.copy()).view(np.uint32) for x in pair]  # any NaN equals any NaN
    return int((pair[0] != pair[1]).sum())


def sizes(path: str, theirs: dict[str, Array]) -> dict[str, Array]:
    """What roundings of float32 in the gradients of SwiGLU's inputs are relative to: the terms of sums."""

    def kept(name: str) -> Array:
        scales = np.repeat(theirs[f"{path}.swiglu.{name}.codes_scale"], 128, axis=1)
        return decode(theirs[f"{path}.swiglu.{name}.codes"], E4M3) * scales

    gate, up, dact = kept("gate"), kept("up"), round_to(theirs[f"{path}.down_proj.dgrad.d"], BF16)
    s = 1.0 / (1.0 + np.exp(-gate))
    silu = gate * s
    dgate, dup = np.abs(dact * up) * (s + np.abs(silu)), np.abs(dact * silu)
    return {f"{path}.gate_proj.dy": dgate, f"{path}.up_proj.dy": dup}


def distance(ours: Array, theirs: Array, size: Array) -> float:
    """The largest difference, relative to `size`."""
    away = np.abs(np.asarray(ours, np.float64) - theirs)
    return float(np.max(away / np.maximum(np.abs(size), 2.0**-126)))


@dataclass(frozen=True)
class Row:
    """A tensor of a run: values, and how many differ from what is made of the GPU's own, and chained."""

    name: str
    kind: str
    values: int
    stage: int
    chained: int
    distance: float = 0.0  # of a stage that differs

    @property
    def close(self) -> bool:
        """Whether a stage that was computed in float32 is right: at most one in a thousand of the values that
        are stored in BF16 is its neighbour, and float32 ones differ by a few roundings."""
        if self.name.endswith("_proj.dy"):
            return self.distance <= ROUNDINGS * 2.0**-24
        return self.distance <= 2.0**-7 and self.stage <= self.values / 1000


@dataclass(frozen=True)
class Result:
    case: Case
    way: str
    wide: str
    rows: list[Row]
    orders: dict[str, tuple[list[Order], tuple[int, int, int]]]

    @property
    def single(self) -> bool:
        """Whether there is an elementary function in float32."""
        return self.case.component == "mlp" and self.wide == "float32"

    @property
    def holds(self) -> bool:
        allowed = SWIGLU if self.single else ()
        stages = all(row.close if row.name.endswith(allowed) else not row.stage for row in self.rows)
        as_recipe = not self.single and all(ORDERS[0] in fit for fit, _ in self.orders.values())
        return stages and not (as_recipe and any(row.chained for row in self.rows))


def judged(case: Case, given: dict[str, Array], folder: Path, emulation: Emulation) -> list[Result]:
    weights = {case.named(name): given[name] for name in case.weights}
    inputs = {name: given[name] for name in ("x", "dy")}
    setting = Setting(
        None,
        preset("deepseek-v3"),
        Choices(),
        case.path,
        True,
        {},
        inputs,
        weights,
        {},  # type: ignore[arg-type]
    )

    def run(theirs: dict[str, Array] | None) -> tuple[dict[str, Met], Judge]:
        ar = Judge(emulation, theirs)
        outputs = programs.run(case.component, replace(setting, ar=ar, ops=located(ar, setting.ops)))
        met = {m.name: m for m in ar.met}
        for name, y in outputs.items():
            met[name] = Met(name, VALUE, np.asarray(y), (theirs or {}).get(name))
        return met, ar

    alone, _ = run(None)
    results = []
    for at in sorted(p for p in folder.iterdir() if p.is_dir()):
        theirs = {p.name.removesuffix(".npy"): np.load(p, mmap_mode="r") for p in at.glob("*.npy")}
        for name in [name for name in theirs if name.endswith("wgrad.d")]:
            theirs[f"grad.{name.removesuffix('.wgrad.d')}.weight"] = theirs[name]
        met, ar = run(theirs)
        missing = [name for name, m in met.items() if m.theirs is None]
        unread = theirs.keys() - met.keys() - {f"{name}.again" for name in met}
        if missing or unread:
            raise RuntimeError(
                f"names of one side alone: {missing} in the recipe, {sorted(unread)} on the GPU"
            )
        rows = []
        size = sizes(case.path, theirs) if case.component == "mlp" else {}
        for name, m in met.items():
            own = alone.get(name) or alone[name.removesuffix(".again")]
            stage, chained = differing(m.ours, m.theirs), differing(own.ours, m.theirs)
            differs = stage and m.kind == VALUE
            far = distance(m.ours, m.theirs, size.get(name, m.ours)) if differs else 0.0
            rows.append(Row(name, m.kind, m.ours.size, stage, chained, far))
        way, _, wide = at.name.rpartition("-")
        results.append(Result(case, way, wide, rows, ar.orders))
        stages, chained = sum(row.stage for row in rows), sum(row.chained for row in rows)
        print(f"{case.name} {at.name}: {stages} differ, chained {chained}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, help="of every component, a multiple of 64")
    parser.add_argument("--quick", action="store_true", help="small widths")
    parser.add_argument(
        "--without-gpu", action="store_true", help="emulated on both sides: tries the script out"
    )
    parser.add_argument("--out", type=Path, default=HERE / "hopper_recipe.md")
    options = parser.parse_args()
    cases = CASES
    if options.quick:
        pairs = zip(CASES, SMALL, strict=True)
        cases = tuple(replace(case, width=width, inner=inner, tokens=192) for case, (width, inner) in pairs)
    if options.tokens:
        cases = tuple(replace(case, tokens=options.tokens) for case in cases)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        emulation = Emulation(folder)
        given = {}
        for i, case in enumerate(cases):
            given[case.name] = drawn(np.random.default_rng([options.seed, i]), case)
            (folder / case.name).mkdir()
            for key, x in given[case.name].items():
                np.save(folder / case.name / f"{key}.npy", x)
        device = "cpu" if options.without_gpu else "cuda"
        job = {"device": device, "cases": [vars(case) for case in cases]}
        (folder / "job.json").write_text(json.dumps(job))
        chain = subprocess.run([sys.executable, HERE / "hopper_recipe_chain.py", folder], check=False)
        if chain.returncode:
            print("it could not be tried: the run on the GPU failed", file=sys.stderr)
            return 2
        print("computed; now compared", flush=True)
        about = json.loads((folder / "about.json").read_text())
        results = [
            result
            for case in cases
            for result in judged(case, given[case.name], folder / case.name, emulation)
        ]
        emulation.pool.shutdown()
    import hopper_recipe_page

    options.out.write_text(hopper_recipe_page.page(results, about, options, datetime.date.today()))
    return 0 if all(result.holds for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
