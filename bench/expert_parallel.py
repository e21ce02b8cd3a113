"""What expert parallelism sends: bytes per token by number of nodes, with and without the limit of the gate.

    python bench/expert_parallel.py [--tokens 4096] [--layers 3] [--width 7168] [--md]

The routings are those of a model with V3's gate (256 experts in 8 groups, 8 for each token out of 4 groups)
and `layers` layers of experts, whose weights the generator makes; its width is small, since what a gate can
choose does not depend on it.  Without the limit the same weights choose among all 256 experts.  The selection
bias is 0, which leaves the experts about equally loaded, as V3's training does.  Each node has 8 ranks,
experts are in order, and each rank has a run of the tokens.

A row out is in FP8 with its scales, a row back in bfloat16, both of `width` channels.  Bytes are those of a
token on average in one layer's forward pass; the backward pass has the same again.  The first table has the
bytes of both ways together.  Microseconds are bytes over 50 GB/s of the network and 160 GB/s inside a node,
per rank.  *As DeepEP counts* includes the token's own node and rank, which cost no link.  `--md` prints
this page.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from tabulate import tabulate

from refimpl.checkpoint.virtual import VirtualWeights
from refimpl.config.model import ModelConfig
from refimpl.config.presets import preset
from refimpl.model import load
from refimpl.pipeline.expert_parallel import traffic
from refimpl.pipeline.expert_parallel.dispatch import Dispatch, check_nodes, dispatch
from refimpl.pipeline.expert_parallel.placement import evenly, most_nodes

RANKS_PER_NODE = 8
NODES = (1, 2, 4, 8, 16, 32)
V3_NODES = 8
LENGTH = 512  # of a sequence
DEEPEP = "as DeepEP counts"

Plans = list[Dispatch]  # one for each layer


def configuration(layers: int, limited: bool) -> ModelConfig:
    """V3's gate in a small model."""
    fields = preset("tiny-v3").to_dict() | {"num_hidden_layers": layers, "first_k_dense_replace": 0}
    fields |= {"n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 16}
    return ModelConfig.from_dict(fields | {"n_group": 8 if limited else 1, "topk_group": 4 if limited else 1})


def routings(config: ModelConfig, tokens: int) -> list[np.ndarray]:
    """(T, K) of each layer."""
    virtual = VirtualWeights(config)
    weights = {
        name: np.zeros(virtual.shape(name), np.float32) if name.endswith("correction_bias") else virtual[name]
        for name in virtual
    }
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (-(-tokens // LENGTH), LENGTH))
    result = load((config, weights), "float32").forward(ids, trace="*.topk_idx")
    return [idx.reshape(-1, idx.shape[-1])[:tokens] for idx in result.tensors.values()]


def mean(plans: Plans, value: Callable[[Dispatch], float]) -> float:
    return float(np.mean([value(plan) for plan in plans]))


def traffic_row(plans: Plans, way: Callable[[Dispatch], traffic.Copies], width: int) -> list[float]:
    """Of a token: copies, bytes out, bytes back, microseconds; each over the network, then inside."""
    tokens = len(plans[0].idx)
    network, inside = (mean(plans, lambda plan, i=i: way(plan).total[i] / tokens) for i in (0, 1))
    out, back = traffic.fp8_row(width), traffic.bf16_row(width)
    both = out + back
    times = [network * both / traffic.NETWORK * 1e6, inside * both / traffic.INSIDE * 1e6]
    return [network, inside, network * out, inside * out, network * back, inside * back, *times]


def ways(limited: Plans, free: Plans, width: int) -> str:
    rows = []
    every = traffic.WAYS | {DEEPEP: traffic.as_deepep_counts}
    for limit, plans in (("4 of 8 groups", limited), ("none", free)):
        for name, way in every.items():
            values = traffic_row(plans, way, width)
            rows.append([limit, name, *values[:2], *[round(v) for v in values[2:6]], *values[6:]])
    headers = ["limit", "a token is sent", "copies: network", "inside", "FP8 out: network", "inside"]
    headers += ["bf16 back: network", "inside", "us: network", "inside"]
    return tabulate(rows, headers, tablefmt="github", floatfmt=".2f")


def by_nodes(config: dict[str, ModelConfig], idx: dict[str, list[np.ndarray]], width: int) -> str:
    rows = []
    both = traffic.fp8_row(width) + traffic.bf16_row(width)
    for nodes in NODES:
        placement = evenly(256, RANKS_PER_NODE * nodes, nodes)
        for limit, routing in idx.items():
            plans = [dispatch(one, placement) for one in routing]
            bound = most_nodes(config[limit], placement)
            for plan in plans:
                check_nodes(plan, bound)
            share = [
                mean(plans, lambda plan, way=way: way(plan).total[0] * both / len(plan.idx))
                for way in traffic.WAYS.values()
            ]
            inside = mean(plans, lambda plan: traffic.once_per_node(plan).total[1] * both / len(plan.idx))
            reached = [mean(plans, lambda plan: plan.nodes_per_token.mean())]
            most = max(int(plan.nodes_per_token.max()) for plan in plans)
            rows.append([nodes, placement.ranks, limit, *reached, most, bound, *map(round, [*share, inside])])
    headers = ["nodes", "ranks", "limit", "nodes of a token", "most", "bound", "network: once per node"]
    headers += ["once per rank", "once per expert", "inside: once per node"]
    return tabulate(rows, headers, tablefmt="github", floatfmt=".2f")


def design(plans: Plans) -> str:
    """The measured routing beside the report's figures."""
    tokens, chosen = plans[0].idx.shape
    experts = mean(plans, lambda plan: plan.idx.size / np.count_nonzero(plan.in_node))
    loads = [traffic.loads(plan) for plan in plans]
    busiest = max(
        float(side.max() / side.mean())
        for load_ in loads
        for side in (load_.network_out, load_.network_in, load_.inside_out, load_.inside_in)
    )
    ratio = traffic.INSIDE / traffic.NETWORK
    ranks = mean(plans, lambda plan: np.count_nonzero(plan.in_rank) / np.count_nonzero(plan.in_node))
    copies = [mean(plans, lambda plan, i=i: traffic.once_per_node(plan).total[i] / tokens) for i in (0, 1)]
    rows = [
        ["nodes of a token, at most", "4", max(int(plan.nodes_per_token.max()) for plan in plans)],
        ["experts of a token on each of its nodes", f"8 / 4 = 2 (room for {ratio:.1f})", f"{experts:.2f}"],
        ["ranks of a token on each of its nodes", "", f"{ranks:.2f}"],
        ["experts of a token that the links could serve", f"4 x {ratio:.1f} = 12.8, so 13", chosen],
        ["copies inside for one over the network", f"at most {ratio:.1f}", f"{copies[1] / copies[0]:.2f}"],
        ["busiest rank's link, over the mean", "", f"{busiest:.2f}"],
    ]
    return tabulate(rows, ["", "report", "measured"], tablefmt="github")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=7168)
    parser.add_argument("--md", action="store_true", help="as a page with the text above")
    given = parser.parse_args()
    configs = {
        "4 of 8 groups": configuration(given.layers, limited=True),
        "none": configuration(given.layers, limited=False),
    }
    idx = {limit: routings(config, given.tokens) for limit, config in configs.items()}
    placement = evenly(256, RANKS_PER_NODE * V3_NODES, V3_NODES)
    limited, free = ([dispatch(one, placement) for one in routing] for routing in idx.values())
    if given.md:
        print(f"# Expert parallelism\n\n{__doc__.split(chr(10), 2)[2]}")
    print(f"## Bytes a token by number of nodes\n\n{by_nodes(configs, idx, given.width)}\n")
    print(f"## V3's 64 ranks on 8 nodes\n\n{ways(limited, free, given.width)}\n")
    print(f"## Beside the report\n\n{design(limited)}")


if __name__ == "__main__":
    main()
