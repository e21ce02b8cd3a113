"""Forward and backward of a mid-size model in float32, beside transformers' DeepseekV3 in one run.

    python bench/forward_backward.py [--preset mid-v3] [--batch 2] [--length 512] [--threads 2] [--repeats 7]
                                     [--json FILE]

Both get the same weights, ids and number of threads and compute the loss and the gradients of all parameters.
Their runs alternate, so that whatever else the machine does falls on both.  transformers runs with eager
attention and both of its ways to run experts: `grouped_mm`, its default, and `eager`, a loop over experts,
whose backward fills a zero gradient of all experts for each expert (it is timed fewer times).

The machine's rate is that of a large square float32 product in NumPy, timed between the runs.  A model's
share of it is its FLOPs in GEMMs (forward, twice that in backward, K of N experts, attention without use of
the mask) over its time and that rate.  Needs torch and transformers (the extra `crosscheck`).
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mid-v3")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--loop-repeats", type=int, default=1, help="of transformers' loop over experts")
    parser.add_argument("--keep-memory", action="store_true", help="glibc's malloc keeps what is freed")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


def gemm_flops(c: Any, batch: int, length: int) -> float:
    """FLOPs of the matrix products of one forward and backward."""
    d, heads, width = c.hidden_size, c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
    q = c.q_lora_rank * (d + heads * width) if c.q_lora_rank else d * heads * width
    kv = (c.kv_lora_rank + c.qk_rope_head_dim) * d
    kv += c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
    attention = q + kv + heads * c.v_head_dim * d + heads * length * (width + c.v_head_dim)
    dense = 3 * d * c.intermediate_size
    experts = c.num_experts_per_tok + c.n_shared_experts
    sparse = 3 * d * c.moe_intermediate_size * experts + d * c.n_routed_experts
    first = c.first_k_dense_replace
    layers = c.num_hidden_layers * attention + first * dense + (c.num_hidden_layers - first) * sparse
    return 3 * 2.0 * batch * length * (layers + d * c.vocab_size)


def transformers_model(config: Any, weights: dict[str, Any], experts: str) -> Any:
    """DeepseekV3ForCausalLM with our weights, experts fused as it stores them."""
    import numpy as np
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    known = {
        k: v for k, v in config.to_dict().items() if k not in ("num_nextn_predict_layers", "rope_scaling")
    }
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling := config.to_dict().get("rope_scaling"):
        rope |= {k: v for k, v in scaling.items() if k != "type"} | {"rope_type": scaling["type"]}
    theirs = DeepseekV3Config(**known, rope_parameters=rope, num_nextn_predict_layers=0, use_cache=False)
    model = DeepseekV3ForCausalLM._from_config(
        theirs, attn_implementation="eager", experts_implementation=experts
    )
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith("experts.gate_up_proj"):
            each = [
                [weights[n] for n in pair] for pair in expert_names(name, config, ("gate_proj", "up_proj"))
            ]
            array = np.stack([np.concatenate(pair) for pair in each])
        elif name.endswith("experts.down_proj"):
            array = np.stack([weights[n] for (n,) in expert_names(name, config, ("down_proj",))])
        else:
            array = weights[name]
        with torch.no_grad():
            value.copy_(torch.from_numpy(np.asarray(array, np.float32)))
    return model


def expert_names(fused: str, config: Any, leaves: tuple[str, ...]) -> list[list[str]]:
    stem = fused.rsplit(".", 1)[0]
    return [[f"{stem}.{e}.{leaf}.weight" for leaf in leaves] for e in range(config.n_routed_experts)]


def transformers_gradients(model: Any, config: Any) -> dict[str, Any]:
    """Its gradients under the checkpoint's names."""
    out: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        g = parameter.grad.numpy()
        if name.endswith("experts.gate_up_proj"):
            half = g.shape[1] // 2
            for e, (gate, up) in enumerate(expert_names(name, config, ("gate_proj", "up_proj"))):
                out[gate], out[up] = g[e, :half], g[e, half:]
        elif name.endswith("experts.down_proj"):
            out |= {n: g[e] for e, (n,) in enumerate(expert_names(name, config, ("down_proj",)))}
        else:
            out[name] = g
    return out


def clocked(call: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def main() -> int:
    options = parse()
    if any(os.environ.get(v) != str(options.threads) for v in THREAD_VARIABLES):  # read when NumPy is loaded
        os.environ |= dict.fromkeys(THREAD_VARIABLES, str(options.threads))
        os.execv(sys.executable, [sys.executable, *sys.argv])
    if options.keep_memory:
        libc = ctypes.CDLL(None)
        for what, value in ((-3, 1 << 30), (-1, (1 << 31) - 1), (-8, 1)):  # mmap and trim threshold, arenas
            libc.mallopt(what, value)
    sys.path.insert(0, str(ROOT))

    import numpy as np
    import torch
    import transformers
    from tabulate import tabulate

    import refimpl
    from refimpl.checkpoint.virtual import VirtualWeights
    from refimpl.numerics.generator import integers

    torch.set_num_threads(options.threads)
    config = refimpl.preset(options.preset)
    print("Making weights ...", file=sys.stderr)
    virtual = VirtualWeights(config)
    weights = {name: np.asarray(virtual[name], np.float32) for name in virtual}
    parameters = sum(w.size for w in weights.values())
    ids = integers(0, "bench/ids", (options.batch, options.length), 0, config.vocab_size)
    flops = gemm_flops(config, options.batch, options.length)

    ours = refimpl.load((config, weights), precision="float32")
    theirs = {e: transformers_model(config, weights, e) for e in ("grouped_mm", "eager")}
    tensor = torch.from_numpy(ids)

    def run_ours() -> tuple[float, Any]:
        result = ours.forward(ids, labels=ids, trace=())
        return float(result.loss), ours.backward(result)

    def run_theirs(experts: str) -> float:
        model = theirs[experts]
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=tensor, labels=tensor).loss
        loss.backward()
        return float(loss.detach())

    square = np.ones((3000, 3000), np.float32)
    times: dict[str, list[float]] = {"ours": [], "grouped_mm": [], "eager": [], "gemm": []}
    losses: dict[str, float] = {}
    for n in range(options.repeats + 1):  # the first round warms up
        seconds, (losses["ours"], grads) = clocked(run_ours)
        times["ours"].append(seconds)
        if n < options.repeats:
            del grads
        for experts in ("grouped_mm", "eager"):
            if experts == "grouped_mm" or n < 1 + options.loop_repeats:
                seconds, losses[experts] = clocked(lambda experts=experts: run_theirs(experts))
                times[experts].append(seconds)
                if experts == "eager":
                    theirs[experts].zero_grad(set_to_none=True)
        times["gemm"] += [clocked(lambda: square @ square)[0] for _ in range(2)]
        print(
            f"[{n}/{options.repeats}] " + ", ".join(f"{k} {v[-1]:.2f} s" for k, v in times.items()),
            file=sys.stderr,
        )

    rate = 2.0 * len(square) ** 3 / min(times["gemm"])
    reference = transformers_gradients(theirs["grouped_mm"], config)
    worst, where = max(
        (float(np.abs(grads[n] - g).max() / np.abs(g).max()), n) for n, g in reference.items() if g.any()
    )
    names = {
        "ours": "refimpl float32",
        "grouped_mm": "transformers, eager attention, grouped_mm experts (default)",
        "eager": "transformers, eager attention, eager experts (loop)",
    }
    best = {k: min(v[1:]) for k, v in times.items() if len(v) > 1}
    table = []
    for k, name in names.items():
        if k in best:
            median = statistics.median(times[k][1:])
            share = flops / best[k] / rate
            table.append(
                [name, best[k], median, len(times[k]) - 1, best[k] / best["ours"], f"{share:.0%}", losses[k]]
            )
    print(
        f"{options.preset}: {parameters / 1e6:.1f}M parameters, {options.batch} x {options.length} tokens, "
        f"{options.threads} threads; {flops / 1e9:.0f} GFLOP in products, GEMM at {rate / 1e9:.0f} GFLOP/s; "
        f"NumPy {np.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
        + ("; freed memory kept" if options.keep_memory else "")
    )
    print(
        tabulate(
            table, ["", "best s", "median s", "runs", "time / ours", "of GEMM rate", "loss"], floatfmt=".3f"
        )
    )
    print(f"Largest difference of a gradient, relative to its largest element: {worst:.1e} ({where}).")
    print(f"Names of gradients agree: {set(reference) == set(grads)}.")
    if options.json:
        data = {"times": times, "gemm_flops": flops, "gemm_rate": rate, "losses": losses, "worst": worst}
        Path(options.json).write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
