"""What can be said of a stage that is wrong in no known way.  SPEC VERDICT-21.

ours is what the stage makes of its own input, theirs is what the port has.  Each test is a sentence that
holds for nearly all elements to within roundings, or is not said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase

import numpy as np

from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.layers.rope import softmax_scale, yarn
from refimpl.numerics.arithmetic import Array
from refimpl.validate.reentry import ELEMENT, Stage

NEARLY = 0.98  # of the elements
BLOCK = 128  # rows of a block of a kernel
COMPONENTS = (
    ("*.topk_idx", "the selection of experts"),
    ("*.gate.*", "the gate"),
    ("*.inv_freq", "the rotary frequencies"),
    ("*.cos", "the rotary table"),
    ("*.sin", "the rotary table"),
    ("*.softmax_scale", "the softmax scale"),
    ("*.q_pe", "the rotation of queries"),
    ("*.k_pe", "the rotation of keys"),
    ("*.scores", "the attention scores"),
    ("*.probs", "the softmax of the attention"),
    ("*.heads", "the attention's weighted values"),
    ("*norm", "RMSNorm"),
    ("*.act", "SwiGLU"),
    ("*_proj*", "a linear"),
    ("*.self_attn", "the attention's output"),
    ("*.experts", "the weighted sum of the experts"),
    ("*.mlp", "the sum of routed and shared experts, or the MLP's output"),
    ("model.embed_tokens", "the embedding"),
    ("model.layers.*", "the residual sum of a layer"),
    ("l*", "the head or the loss"),
)


def component(name: str) -> str:
    """What computes a tensor, in words."""
    if name.startswith("grad."):
        return "the backward pass"
    return next((words for pattern, words in COMPONENTS if fnmatchcase(name, pattern)), "this tensor")


def said(stage: Stage, config: ModelConfig, others: Mapping[str, Array], length: int) -> list[str]:
    """Sentences on a stage that is off.  others: the tensors of the port and of the case, by name; length:
    tokens of a sequence, or 0."""
    if stage.set:
        return list(_where(stage, stage.z.reshape(-1, 1), length))
    broken = ~np.isfinite(stage.theirs) & np.isfinite(stage.ours)
    if broken.any():
        rows = _grid(stage, broken)
        share = f"{np.count_nonzero(broken)} of {broken.size} elements are NaN or infinity"
        full = np.count_nonzero(rows.all(-1))
        return [f"{share}{f', whole rows of them ({full} of {len(rows)})' if full else ''}."]
    finite = np.isfinite(stage.ours)
    found = list(_factor(stage, config, finite))
    if not found:
        found = list(_order(stage, config))
    if not found:
        found = list(_summand(stage, others))
    return [*found, *_where(stage, _grid(stage, stage.z), length)]


def _grid(stage: Stage, flat: Array) -> Array:
    return flat.reshape(-1, stage.shape[-1] if stage.shape else 1)


def _fits(stage: Stage, alike: Array, scale: float = 1.0) -> bool:
    """Whether theirs is this, where it is off."""
    with np.errstate(all="ignore"):
        z = np.abs(stage.theirs - alike) / (stage.sigma * max(1.0, abs(scale)))
    z = np.where(np.isnan(z), 0.0, z)
    return bool(np.mean(z <= ELEMENT) >= NEARLY and np.mean(z[stage.z > ELEMENT] <= ELEMENT) >= NEARLY)


def _factor(stage: Stage, config: ModelConfig, finite: Array) -> Iterator[str]:
    off = finite & (stage.z > ELEMENT)
    large = off & (np.abs(stage.ours) > 30.0 * stage.sigma)
    if np.count_nonzero(large) < 1 or np.mean(stage.z[finite] > ELEMENT) < 0.02:
        return
    factor = float(np.median(stage.theirs[large] / stage.ours[large]))
    if abs(factor - 1.0) < 1e-9 or not _fits(
        stage, np.where(finite, stage.ours * factor, stage.ours), factor
    ):
        return
    if abs(factor + 1.0) < 1e-3:
        yield "The sign is flipped."
    elif abs(factor) < 1e-12:
        yield "It is zero."
    else:
        name = next((n for n, v in constants(config).items() if abs(factor / v - 1.0) < 2e-3), "")
        yield f"It is {factor:.6g} times what it should be{f', which is {name}' if name else ''}."


def constants(config: ModelConfig) -> dict[str, float]:
    """Factors that a port can forget, or apply twice."""
    found = {
        "the routed scaling factor": config.routed_scaling_factor,
        "the square root of the head's width": float(np.sqrt(config.qk_head_dim)),
        "the square root of the hidden size": float(np.sqrt(config.hidden_size)),
        "sqrt(latent and rotary width / head's width)": float(
            np.sqrt((config.kv_lora_rank + config.qk_rope_head_dim) / config.qk_head_dim)
        ),
        "sqrt(head's width / its part without rotation)": float(
            np.sqrt(config.qk_head_dim / config.qk_nope_head_dim)
        ),
        "the number of experts of a token": float(config.num_experts_per_tok),
        "the number of heads": float(config.num_attention_heads),
        "two": 2.0,
    }
    choices = Choices()
    if yarn(config, choices) is not None:
        square = softmax_scale(config, choices) * float(np.sqrt(config.qk_head_dim))
        found |= {"the square of YaRN's mscale": square, "YaRN's mscale": float(np.sqrt(square))}
    both = found | {f"1 over {name}": 1.0 / value for name, value in found.items() if value}
    return {name: value for name, value in both.items() if value and abs(value - 1.0) > 2e-3}


def _order(stage: Stage, config: ModelConfig) -> Iterator[str]:
    ours = _grid(stage, stage.ours)
    rows, wide = ours.shape
    heads = config.num_attention_heads
    tried: list[tuple[str, Callable[[], Array]]] = [
        ("reversed", lambda: ours[:, ::-1]),
        (
            "in another order: the first half and the second half change places",
            lambda: _rolled(ours, wide // 2),
        ),
        ("in another order: even places first, then odd ones", lambda: _parted(ours)),
        ("in another order: the halves are interleaved", lambda: _joined(ours)),
        ("shifted by one place", lambda: _rolled(ours, 1)),
        ("shifted back by one place", lambda: _rolled(ours, -1)),
    ]
    if wide % heads == 0 and wide > heads > 1:
        by_head = ours.reshape(rows, heads, -1)
        tried += [
            ("right, with the heads reversed", lambda: by_head[:, ::-1].reshape(rows, wide)),
            (
                "right, with heads and places within a head exchanged",
                lambda: by_head.swapaxes(1, 2).reshape(rows, wide),
            ),
            ("right, with the heads shifted by one", lambda: np.roll(by_head, 1, 1).reshape(rows, wide)),
        ]
    tried += [
        ("right, with the rows reversed", lambda: ours[::-1]),
        ("right, with the rows shifted by one", lambda: np.roll(ours, 1, 0)),
        ("right, with the rows shifted back by one", lambda: np.roll(ours, -1, 0)),
    ]
    if rows == wide:
        tried.append(("transposed", lambda: ours.T))
    for words, made in tried:
        if _fits(stage, np.ascontiguousarray(made()).reshape(-1)):
            yield f"Its elements are {words}."
            return
    theirs, scale = _grid(stage, stage.theirs), _grid(stage, stage.sigma)
    with np.errstate(invalid="ignore"):  # masked scores are -inf
        same = np.abs(np.sort(ours, -1) - np.sort(theirs, -1)) / scale
    if wide > 2 and np.mean(np.where(np.isnan(same), 0.0, same) <= ELEMENT) >= NEARLY:
        yield "Every row has the right values in another order."


def _rolled(x: Array, by: int) -> Array:
    return np.roll(x, by, -1)


def _parted(x: Array) -> Array:
    return np.concatenate([x[:, 0::2], x[:, 1::2]], -1)


def _joined(x: Array) -> Array:
    return x.reshape(len(x), 2, -1).swapaxes(1, 2).reshape(x.shape) if x.shape[-1] % 2 == 0 else x


def _summand(stage: Stage, others: Mapping[str, Array]) -> Iterator[str]:
    for name, value in others.items():
        if name == stage.name or value.size != stage.ours.size or value.dtype.kind != "f":
            continue
        if _fits(stage, stage.ours - value.reshape(-1)):
            yield f"The summand {name} is missing."
            return
        if _fits(stage, stage.ours + value.reshape(-1)):
            yield f"The summand {name} is added once too often."
            return
        if _fits(stage, value.reshape(-1).astype(np.float64)):
            yield f"It is {name}, unchanged."
            return


def _where(stage: Stage, z: Array, length: int) -> Iterator[str]:
    """Which rows and columns are off."""
    off = z > ELEMENT
    rows, columns = np.asarray(off.any(-1)), np.asarray(off.any(0))
    count = np.count_nonzero(rows)
    if not count:
        yield "No single element is far off, but all together are more than roundings make them."
        return
    if np.count_nonzero(off) == 1 and off.size > 1:
        yield f"Only one element is off, at {tuple(int(i) for i in np.argwhere(off)[0])}."
        return
    first, total = int(np.argmax(rows)), len(rows)
    if count == 1 and total > 1:
        yield f"Only row {first} of {total} is off."
    elif total > BLOCK and total % BLOCK and first >= total - total % BLOCK:
        yield f"Only rows of the last block of {BLOCK}, which is not full, are off."
    elif length > 1 and total % length == 0:
        place = np.flatnonzero(rows.reshape(-1, length).any(0))
        if place[0] > 0 and rows.reshape(-1, length)[:, place[0] :].mean() > 0.9:
            yield f"Only positions from {place[0]} on are off."
        elif len(place) == 1:
            yield f"Only position {place[0]} is off."
        elif count < total:
            yield f"{count} of {total} rows are off."
    elif count < total:
        yield f"{count} of {total} rows are off."
    if 0 < np.count_nonzero(columns) <= len(columns) // 2:
        which = np.flatnonzero(columns)
        span = f"{which[0]} to {which[-1]}" if len(which) == which[-1] - which[0] + 1 else f"{len(which)}"
        yield (
            f"Only columns {span} of {len(columns)} are off."
            if " to " in span
            else (f"Only {span} of {len(columns)} columns are off.")
        )
