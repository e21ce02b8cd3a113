"""Formats, casts and block scales: speed beside others, and agreement with whole recordings.

    python bench/formats.py speed                one core, side by side, the best of nine
    python bench/formats.py recordings FOLDER    casts, actquant and mufu_rcp.safetensors, every value

The tests hold trimmed recordings (tests/recordings/h100), which say the same by digests.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file
from tabulate import tabulate

from refimpl.numerics import blockscale, casts, formats, reciprocal
from refimpl.numerics.formats import BF16, E4M3, E5M2, FORMATS

NAMES = {"ptx_satfinite": "ptx", "torch": "torch-2.11"}


def seconds(call: Callable[[], object], repeat: int = 9) -> float:
    """The best of `repeat` runs, after one that is not counted."""
    call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def speed() -> int:
    """Nanoseconds per element.  Status 1 if ml_dtypes encodes E4M3 faster."""
    x = np.random.default_rng(0).normal(size=(1024, 4096)).astype(np.float32) * 50
    wide = x.astype(np.float64)
    activation, weight = blockscale.quantise(x, "ieee"), blockscale.quantise(x, "w_block")
    rows: list[tuple[str, Callable[[], object]]] = [
        ("E4M3 from float32, ptx", lambda: casts.cast(x, E4M3, "ptx")),
        ("E4M3 from float32, ml_dtypes' behaviour", lambda: casts.cast(x, E4M3, "ml_dtypes-0.6")),
        ("  ml_dtypes itself", lambda: x.astype(ml_dtypes.float8_e4m3fn)),
        ("E5M2 from float32, ptx", lambda: casts.cast(x, E5M2, "ptx")),
        ("  ml_dtypes", lambda: x.astype(ml_dtypes.float8_e5m2)),
        ("E4M3 from float64, the plain cast", lambda: casts.cast(wide, E4M3, "ptx")),
        ("E4M3 stochastic", lambda: casts.cast(x, E4M3, "ptx", formats.Stochastic(0, "bench"))),
        ("E4M3 to float32", lambda: casts.widen(activation.codes, E4M3)),
        ("  ml_dtypes", lambda: activation.codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)),
        *(
            (f"quantise {name}", lambda name=name: blockscale.quantise(x, name))
            for name in blockscale.QUANTISERS
        ),
        ("dequantise 1x128", lambda: blockscale.dequantise(activation)),
        ("dequantise 128x128", lambda: blockscale.dequantise(weight)),
        ("requantise 1x128 -> 128x1", lambda: blockscale.requantise(activation, "ieee")),
    ]
    if "torch" in sys.modules or _has_torch():
        import torch

        torch.set_num_threads(1)
        given = torch.from_numpy(x)
        rows.insert(3, (f"  torch {torch.__version__}", lambda: given.to(torch.float8_e4m3fn)))
    took = {name: seconds(call) / x.size * 1e9 for name, call in rows}
    print(tabulate(took.items(), ["4,194,304 elements, one core", "ns each"], floatfmt=".2f"))
    slower = took["E4M3 from float32, ptx"] > took["  ml_dtypes itself"]
    return int(slower)


def _has_torch() -> bool:
    from importlib.util import find_spec

    return find_spec("torch") is not None


class Counts:
    """What was compared, and what differed."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, int]] = []

    def add(self, name: str, found: np.ndarray, expected: np.ndarray) -> None:
        """Arrays of codes, or of float32, of which any NaN equals any NaN."""
        same = found == expected
        if found.dtype.kind == "f":
            same = (found.view(np.uint32) == expected.view(np.uint32)) | (
                np.isnan(found) & np.isnan(expected)
            )
        self.rows.append((name, same.size, int((~same).sum())))

    def digest(self, name: str, found: np.ndarray, expected: str) -> None:
        """A digest stands for all of its values."""
        holds = hashlib.sha256(found.tobytes()).hexdigest() == expected
        self.rows.append((f"{name} (digest)", found.size, 0 if holds else found.size))

    def report(self) -> int:
        total = ("all", sum(row[1] for row in self.rows), sum(row[2] for row in self.rows))
        print(tabulate([*self.rows, total], ["recording", "values", "differ"], intfmt=","))
        return int(total[2] > 0)


def recordings(folder: Path) -> int:
    """Status 1 if any value differs."""
    counts = Counts()
    recorded_casts(folder / "casts.safetensors", counts)
    recorded_quantisation(folder / "actquant.safetensors", counts)
    table = load_file(folder / "mufu_rcp.safetensors")["rcp_delta_2bit"]
    x = (np.arange(1 << 23, dtype=np.uint32) + np.uint32(127 << 23)).view(np.float32)
    delta = np.stack([table >> np.uint8(2 * i) & 3 for i in range(4)], -1).reshape(-1)
    nearest = (np.float32(1) / x).view(np.uint32)
    counts.add(
        "mufu_rcp", reciprocal.rcp(x).view(np.uint32), nearest + delta.astype(np.uint32) - np.uint32(1)
    )
    return counts.report()


def recorded_casts(path: Path, counts: Counts) -> None:
    data = load_file(path)
    meta = json.loads(safe_open(path, "np").metadata()["json"])
    upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    drawn = np.frombuffer(np.random.RandomState(1006).bytes(4 * 2**22), np.uint32).view(np.float32)
    for key, expected in data.items():
        kind, rest = key.split("_", 1)
        if kind == "decode":
            fmt = FORMATS[rest.removesuffix("_f32")]
            made = casts.widen(np.arange(256), fmt, "torch-2.11").view(np.uint32)
            counts.add(f"casts {key}", made, expected)
            continue
        if key == "f32_x":
            continue
        name, last = rest.rsplit("_", 1)
        fmt, name = FORMATS["ue8m0" if last == "e8m0" else last], NAMES[name]
        if kind == "cp":
            changes(key, expected, fmt, name, counts)
        else:
            x = upper if kind == "bf16" else data["f32_x"]
            counts.add(f"casts {key}", casts.cast(x.view(np.float32), fmt, name), expected)
        if f"{rest}" in meta["sha256_4M"] and kind == "cp":
            counts.digest(f"casts 4M {rest}", casts.cast(drawn, fmt, name), meta["sha256_4M"][rest])


def changes(key: str, table: np.ndarray, fmt: formats.Format, name: str, counts: Counts) -> None:
    """All 2^32 patterns: 2^17 classes on which the cast is constant, each of them an interval."""
    first, codes = table >> np.uint64(8), (table & np.uint64(0xFF)).astype(np.uint8)
    upper = np.arange(1 << 16, dtype=np.uint64) << np.uint64(16)
    starts = np.stack([upper, upper + np.uint64(1)], -1).reshape(-1)
    ends = np.append(starts[1:], np.uint64(1 << 32)) - np.uint64(1)
    expected = codes[np.searchsorted(first, starts, "right") - 1]
    wrong = np.zeros(starts.size, bool)
    for at in (starts, ends):
        wrong |= casts.cast(at.astype(np.uint32).view(np.float32), fmt, name) != expected
    wrong |= codes[np.searchsorted(first, ends, "right") - 1] != expected
    assert np.isin(first, starts).all(), "a change inside of a class"
    sizes = (ends - starts + np.uint64(1)).astype(np.int64)
    counts.rows.append((f"casts {key}", int(sizes.sum()), int(sizes[wrong].sum())))


def recorded_quantisation(path: Path, counts: Counts) -> None:
    data = load_file(path)
    x = {
        "bf16": (data["x_bf16"].astype(np.uint32) << np.uint32(16)).view(np.float32),
        "f32": data["x_f32"].view(np.float32),
        "w": data["w_f32"].view(np.float32),
    }
    for key in data:
        if not key.endswith("_y"):
            continue
        path_name = key.removesuffix("_y")
        recipe, kind = (path_name, "w") if path_name.startswith("w_") else path_name.rsplit("_", 1)
        made = blockscale.quantise(x[kind], recipe)
        scales = data[f"{path_name}_s"].view(np.float32)
        counts.add(f"actquant {path_name} codes", made.codes, data[key])
        counts.add(f"actquant {path_name} scales", made.scales, scales.reshape(made.scales.shape))
    weight = blockscale.Quantised(data["w_block_y"], data["w_block_s"].view(np.float32), blockscale.BLOCK)
    value = blockscale.dequantise(weight)
    counts.add("actquant w_dequant_f32", value.view(np.uint32), data["w_dequant_f32"])
    counts.add("actquant w_dequant_bf16", casts.cast(value, BF16, "torch-2.11"), data["w_dequant_bf16"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("speed")
    commands.add_parser("recordings").add_argument("folder", type=Path)
    given = parser.parse_args()
    return speed() if given.command == "speed" else recordings(given.folder)


if __name__ == "__main__":
    sys.exit(main())
