"""Forward and backward of a mid-size model in an FP8 recipe, beside plain float32 in one run.

    python bench/recipe_speed.py [--preset mid-v3] [--batch 2] [--length 512] [--threads 2] [--repeats 5]
                                 [--recipe v3-fp8] [--set SITE.FIELD=VALUE ...] [--accumulator promote_fp32]
                                 [--exact] [--json FILE]

Both read the same weights and ids and use the same number of threads; their runs alternate, so that whatever
else the machine does falls on both, and medians are compared.  Then one more run of each on one thread says
where the time goes: every function of a list is timed, with what it calls counted under the innermost of the
list alone.  `--exact` adds one run on the exact carrier.
"""

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forward_backward import ROOT, THREAD_VARIABLES, clocked

# What is timed: a heading, and the functions under it, as module:name.
PARTS = {
    "partial sums (products of matrices in float64)": ["refimpl.numerics.promoted:_Tile.sums"],
    "promotion (scale, add, round to float32)": ["refimpl.numerics.promoted:_Tile.promote"],
    "decoding operands, and the rest of GEMMs": ["refimpl.numerics.rounded:gemm_fp8"],
    "quantising": ["refimpl.numerics.scaled:quantise"],
    "dequantising": ["refimpl.numerics.scaled:dequantise"],
    "rounding to BF16": ["refimpl.numerics.rounded:nearest_bf16"],
    "products in float32: attention, gate, head": ["refimpl.numerics.floating:Floating.matmul"],
    "softmax and its gradient": [
        "refimpl.numerics.floating:Floating.softmax",
        "refimpl.numerics.floating:Floating.dsoftmax",
    ],
}
AGAIN = ["refimpl.layers.block:_mlp_again", "refimpl.layers.block:_attention_again"]
REST = "between the sites: SwiGLU, norms, rotations, gathering"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mid-v3")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--recipe", default="v3-fp8")
    parser.add_argument("--accumulator", default="promote_fp32", help="of all three GEMMs")
    parser.add_argument("--set", action="append", default=[], metavar="SITE.FIELD=VALUE")
    parser.add_argument("--exact", action="store_true", help="one run on the exact carrier as well")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


class Clock:
    """Seconds by heading; a function's own time is without that of listed functions that it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._inner = [0.0]

    def timed(self, heading: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            start = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*args, **more)
            finally:
                whole = time.perf_counter() - start
                self.seconds[heading] += whole - self._inner.pop()
                self.calls[heading] += 1
                self._inner[-1] += whole

        return call


@contextmanager
def replaced(changes: dict[str, list[str]], clock: Clock) -> Any:
    """The functions of each heading timed, for as long as this lasts."""
    before = []
    for heading, places in changes.items():
        for place in places:
            module, _, name = place.partition(":")
            owner: Any = importlib.import_module(module)
            *path, leaf = name.split(".")
            for step in path:
                owner = getattr(owner, step)
            before.append((owner, leaf, getattr(owner, leaf)))
            setattr(owner, leaf, clock.timed(heading, getattr(owner, leaf)))
    try:
        yield
    finally:
        for owner, leaf, function in before:
            setattr(owner, leaf, function)


def broken_down(run: Callable[[], Any], blas: Any) -> tuple[float, Clock, float]:
    """Seconds of a run on one thread, what they were spent on, and how much of them on computing again."""
    threads = blas.get()
    blas.set(1)
    clock, again = Clock(), Clock()
    with replaced(PARTS, clock):
        seconds, _ = clocked(run)
    with replaced({"again": AGAIN}, again):
        run()
    blas.set(threads)
    return seconds, clock, again.seconds["again"]


def main() -> int:
    options = parse()
    if any(os.environ.get(v) != str(options.threads) for v in THREAD_VARIABLES):  # read when NumPy is loaded
        os.environ |= dict.fromkeys(THREAD_VARIABLES, str(options.threads))
        os.execv(sys.executable, [sys.executable, *sys.argv])
    sys.path.insert(0, str(ROOT))

    import numpy as np
    from tabulate import tabulate

    import refimpl
    from refimpl.checkpoint.virtual import VirtualWeights
    from refimpl.numerics import threads
    from refimpl.numerics.generator import integers
    from refimpl.numerics.precision import recipe

    config = refimpl.preset(options.preset)
    print("Making weights ...", file=sys.stderr)
    virtual = VirtualWeights(config)
    weights = {name: np.asarray(virtual[name], np.float32) for name in virtual}
    ids = integers(0, "bench/ids", (options.batch, options.length), 0, config.vocab_size)
    gemms = [f"*.{gemm}.accumulator={options.accumulator}" for gemm in ("fprop", "dgrad", "wgrad")]
    fast = recipe(f"{options.recipe}@float32").set([*gemms, *options.set])
    models = {name: refimpl.load((config, weights), precision=name) for name in ("float32",)}
    models["recipe"] = refimpl.load((config, weights), precision=fast)

    def run(name: str) -> tuple[float, float, float]:
        start = time.perf_counter()
        result = models[name].forward(ids, labels=ids, trace=())
        middle = time.perf_counter()
        models[name].backward(result)
        return middle - start, time.perf_counter() - middle, float(result.loss)

    times: dict[str, list[tuple[float, float, float]]] = {"float32": [], "recipe": []}
    for n in range(options.repeats + 1):  # the first round warms up
        for name, found in times.items():
            found.append(clocked(lambda name=name: run(name))[1])
        shown = ", ".join(f"{name} {v[-1][0]:.2f} + {v[-1][1]:.2f} s" for name, v in times.items())
        print(f"[{n}/{options.repeats}] {shown}", file=sys.stderr)
    whole = {name: [f + b for f, b, _ in v[1:]] for name, v in times.items()}
    median = {name: statistics.median(v) for name, v in whole.items()}
    ratio = median["recipe"] / median["float32"]
    rounds = [r / f for r, f in zip(whole["recipe"], whole["float32"], strict=True)]
    names = {"float32": "float32", "recipe": f"{options.recipe}@float32, {options.accumulator}"}
    table = [
        [
            names[k],
            statistics.median(f for f, _, _ in times[k][1:]),
            statistics.median(b for _, b, _ in times[k][1:]),
            median[k],
            min(whole[k]),
            median[k] / median["float32"],
            times[k][-1][2],
        ]
        for k in times
    ]
    if options.exact:
        exact = recipe(options.recipe).set([*gemms, *options.set])
        models["exact"] = refimpl.load((config, weights), precision=exact)
        f, b, loss = run("exact")
        table.append(
            [
                f"{options.recipe}, {options.accumulator}",
                f,
                b,
                f + b,
                f + b,
                (f + b) / median["float32"],
                loss,
            ]
        )
        del models["exact"]
    print(
        f"{options.preset}: {options.batch} x {options.length} tokens, {options.threads} threads, "
        f"{options.repeats} rounds, NumPy {np.__version__}"
        + ("; " + ", ".join(options.set) if options.set else "")
    )
    heads = ["", "forward s", "backward s", "median s", "best s", "time / float32", "loss"]
    print(tabulate(table, heads, floatfmt=".3f"))
    print(f"Ratio of medians {ratio:.2f}; of the rounds {min(rounds):.2f} to {max(rounds):.2f}.")

    blas = threads.blas()
    if blas is None:
        print("Where the time goes is not told: the threads of this BLAS cannot be set.")
        return 0
    parts: dict[str, Any] = {}
    for name in times:
        seconds, clock, again = broken_down(lambda name=name: run(name), blas)
        parts[name] = {"seconds": seconds, "again": again, "parts": dict(clock.seconds)}
        rows = [
            [part, clock.seconds[part], clock.seconds[part] / seconds, clock.calls[part]] for part in PARTS
        ]
        left = seconds - sum(clock.seconds.values())
        rows.append([REST, left, left / seconds, None])
        print(f"\n{names[name]} on one thread, {seconds:.2f} s:")
        shown = [[part, s, f"{share:.0%}", calls] for part, s, share, calls in rows if s > 0]
        print(tabulate(shown, ["", "s", "share", "calls"], floatfmt=".2f"))
        if again:
            print(f"Of all this, computing again in backward what was not kept: {again:.2f} s.")
    if options.json:
        data = {"times": times, "ratio": ratio, "parts": parts}
        Path(options.json).write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
