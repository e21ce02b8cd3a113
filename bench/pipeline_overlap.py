"""How much all-to-all an overlapped pair hides, by the SMs that communication has."""

from tabulate import tabulate

from refimpl.config.presets import preset
from refimpl.pipeline.overlap import COMPUTE, Parts, SMs, durations, overlapped

LENGTH = 4096
BLOCKS = 4  # 61 layers on 16 ranks are 3.8
GIVEN = (4, 8, 12, 16, 18, 20, 22, 24, 28, 32, 48)


def work() -> dict[str, int]:
    """Multiply-adds of a V3 MoE block for a token, in thousands, causal at LENGTH, without recomputation."""
    c = preset("deepseek-v3")
    d, heads = c.hidden_size, c.num_attention_heads
    query, value = c.qk_nope_head_dim + c.qk_rope_head_dim, c.v_head_dim
    linear = (
        d * c.q_lora_rank
        + c.q_lora_rank * heads * query
        + d * (c.kv_lora_rank + c.qk_rope_head_dim)
        + c.kv_lora_rank * heads * (c.qk_nope_head_dim + value)
        + heads * value * d
    )
    core = heads * (query + value) * (LENGTH + 1) // 2  # (LENGTH + 1) / 2 keys on average
    experts = (c.num_experts_per_tok + c.n_shared_experts) * 3 * d * c.moe_intermediate_size
    return {
        "attention_forward": (linear + core) // 1000,
        "attention_input": (linear + 2 * core) // 1000,
        "attention_weight": linear // 1000,
        "mlp_forward": experts // 1000,
        "mlp_input": experts // 1000,
        "mlp_weight": experts // 1000,
    }


def parts() -> Parts:
    """The work as durations, and all-to-all of the same sum: what goes out takes 1, what comes back 2."""
    compute = work()
    share = sum(compute.values()) // 6
    return Parts(
        **compute,
        dispatch_forward=share,
        combine_forward=2 * share,
        combine_backward=share,
        dispatch_backward=2 * share,
        pp=share // 4,
    )


def section() -> tuple[str, bool]:
    given = parts()
    rows = []
    for sms in GIVEN:
        pair = overlapped(given, SMs(communication=sms), BLOCKS)
        own = overlapped(given, SMs(communication=sms), BLOCKS, aligned=True)
        times, ticks = durations(given, SMs(communication=sms), BLOCKS)
        serial = (times.F + times.B) / ticks
        rows.append(
            [
                sms,
                f"{pair.makespan / pair.ticks / serial:.3f}",
                f"{own.makespan / own.ticks / serial:.3f}",
                f"{pair.hidden / pair.communication:.1%}",
                f"{pair.exposed / pair.makespan:.1%}",
                f"{pair.compute / pair.makespan:.1%}",
            ]
        )
    one = overlapped(given)
    listed = [
        [part.lane, part.name, round(start / one.ticks), round(end / one.ticks)]
        for part, start, end in sorted(
            zip(one.parts, one.start, one.end, strict=True), key=lambda row: (row[0].lane != COMPUTE, row[1])
        )
    ]
    head = ["SMs", "pair", "aligned pair", "hidden", "exposed, of the pair", "compute lane busy"]
    text = f"""## Hidden all-to-all

`refimpl.pipeline.overlap`: the parts of figure 4 in its order, on a lane of computing and one of
communication. Durations: multiply-adds of a block of V3 for computing (causal, {LENGTH} tokens, no
recomputation), and
communication that takes as long in all (the report's ratio of about 1 : 1 before overlapping), dispatch in
FP8 and combine in bf16 as 1 : 2 in both directions, PP a quarter of a dispatch. These shares are an
assumption, measured values are not published. {BLOCKS} blocks in a chunk. SMs are those of 132 that
communication has; 20 saturate it, below that it slows in proportion, and computing has the rest. *Pair* is
F&B over F + B of chunks that run alone without any overlap.

{tabulate(rows, head, tablefmt="github", disable_numparse=True)}

One block with 20 SMs, in thousands of multiply-adds for a token:

{tabulate(listed, ["lane", "part", "start", "end"], tablefmt="github")}
"""
    return text, True
