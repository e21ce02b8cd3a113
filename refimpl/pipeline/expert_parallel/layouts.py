"""The rows of a rank as grouped GEMMs read them.  SPEC XPAR-8.

A layout is an array of slots with -1 for padding, so that one pair of functions serves all of them: `filled`
takes tokens into the layout, `emptied` takes results out into their slots.

    contiguous   DeepGEMM: the experts one after the other, each padded to a multiple of 128 rows, with
                 `m_indices`, the local expert of each row, -1 for padding
    masked       DeepGEMM's masked form and DeepEP's low-latency receive: (E, most, D) and the counts (E,)
    blocks       vLLM's and SGLang's moe_align_block_size: slots of all experts padded to blocks, one expert
                 for each block, -1 for blocks of other ranks
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refimpl.errors import Invalid
from refimpl.numerics.arithmetic import Array
from refimpl.pipeline.expert_parallel.dispatch import Dispatch
from refimpl.pipeline.expert_parallel.permutation import Rows

ALIGNMENT = 128  # rows of a block of DeepGEMM's contiguous layout


@dataclass(frozen=True)
class Contiguous:
    slots: Array  # (M,)  -1 for padding
    m_indices: Array  # (M,)  local expert, -1 for padding


@dataclass(frozen=True)
class Masked:
    slots: Array  # (E, most)  -1 behind the rows of an expert
    counts: Array  # (E,)


@dataclass(frozen=True)
class Blocks:
    sorted_token_ids: Array  # (M,)  slots; T K for padding
    expert_ids: Array  # (M / block,)  local expert, -1 for one of another rank

    @property
    def num_tokens_post_padded(self) -> int:
        return len(self.sorted_token_ids)


def contiguous(rows: Rows, alignment: int = ALIGNMENT) -> Contiguous:
    """The rows of `permutation.computed`, each expert's padded behind; one without tokens has none."""
    padded = [_padded(run, alignment) for run in rows.runs()]
    slots = _joined(padded)
    expert = np.repeat(np.arange(len(padded)), [len(run) for run in padded])
    return Contiguous(slots, np.where(slots < 0, -1, expert))


def masked(rows: Rows, most: int | None = None) -> Masked:
    """most: the rows that each expert has room for; DeepEP's is R times the tokens that a rank may send."""
    needed = max(rows.parts.tolist(), default=0)
    most = needed if most is None else most
    if most < needed:
        raise Invalid(f"most is {most}, but an expert has {needed} tokens and needs as many rows.")
    slots = np.full((len(rows.parts), most), -1)
    for expert, run in enumerate(rows.runs()):
        slots[expert, : len(run)] = run
    return Masked(slots, rows.parts)


def blocks(plan: Dispatch, rank: int, block: int = ALIGNMENT) -> Blocks:
    """All tokens are here (no all-to-all, or one rank), and the rank skips the blocks of others' experts."""
    if block < 1:
        raise Invalid(f"block is {block}, but at least 1 row is required.")
    flat = plan.idx.reshape(-1)
    padded = [_padded(np.flatnonzero(flat == expert), block) for expert in range(plan.placement.experts)]
    slots = _joined(padded)
    local = np.where(plan.placement.rank == rank, plan.placement.local, -1)  # (N,) vLLM: expert_map
    return Blocks(
        np.where(slots < 0, flat.size, slots), np.repeat(local, [len(run) // block for run in padded])
    )


def filled(x: Array, slots: Array, chosen: int) -> Array:
    """x (T, D), slots (...)  ->  (..., D): the row of each slot's token, zeros where it is padding."""
    found = x[np.maximum(slots, 0) // chosen] if len(x) else np.zeros((*slots.shape, x.shape[1]), x.dtype)
    return np.where((slots < 0)[..., None], np.zeros_like(found), found)


def emptied(out: Array, slots: Array, into: Array) -> None:
    """out (..., D) at slots (...)  ->  into (T K, D), whatever stands in the padding."""
    real = slots >= 0
    into[slots[real]] = out[real]


def _padded(run: Array, alignment: int) -> Array:
    """The run with -1 behind it, up to a multiple of the alignment."""
    if alignment < 1:
        raise Invalid(f"alignment is {alignment}, but at least 1 row is required.")
    return np.concatenate([run, np.full(-len(run) % alignment, -1, np.int64)])


def _joined(runs: list[Array]) -> Array:
    return np.concatenate([np.zeros(0, np.int64), *runs])
