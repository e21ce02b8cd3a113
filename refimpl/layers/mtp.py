"""One module of multi-token prediction.  SPEC MTP-1 to MTP-4; report equations 21 to 23.

Module k at position i, with h the trunk's or the previous module's hidden state and e the embedding of token
i + k:
    x = eh_proj [enorm(e); hnorm(h)];  y = block(x);  logits = head(shared_head.norm(y))
Embedding and head are the main model's; the norms, eh_proj and the block are the module's own.
"""

from dataclasses import dataclass

import numpy as np

from refimpl.config.choices import Choices
from refimpl.layers import block, embedding, linear, loss, norm
from refimpl.layers.batch import PADDING, Inputs, Tokens
from refimpl.layers.context import Context, child
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.gradients import Gradients


@dataclass(frozen=True)
class Saved:
    embedded: embedding.Saved = child("embed_tokens")
    enorm: norm.Saved = child("enorm")
    hnorm: norm.Saved = child("hnorm")
    eh_proj: linear.Saved = child("eh_proj")
    layer: block.Saved = child("")
    last: norm.Saved = child("shared_head.norm")
    head: linear.Saved = child("shared_head.head")


def forward(c: Context, hidden: Array, tokens: Tokens, dense: bool) -> tuple[Array, Array, Saved]:
    """hidden (T, D)  ->  what the next module reads (T, D), logits (T, V)."""
    ar, ops, eps = c.ar, c.ops, c.config.rms_norm_eps
    e, embedded = ops.embedding.forward(c.at("embed_tokens"), tokens.ids)  # (T, D)
    if c.choices.mtp_first_embedding == "zero":
        e = np.where(tokens.first[:, None], np.zeros_like(e), e)
    e, enorm = ops.norm.forward(c.at("enorm"), e, eps)
    h, hnorm = ops.norm.forward(c.at("hnorm"), hidden, eps)
    x, eh_proj = ops.linear.forward(c.at("eh_proj"), ar.operand("eh_proj.in", _pair(c, e, h)))  # (T, D)
    y, inner = ops.block.forward(c, x, tokens.batch, dense)
    normed, last = ops.norm.forward(c.at("shared_head", "norm"), y, eps)
    logits, head = ops.linear.forward(c.at("shared_head", "head"), ar.operand("lm_head.in", normed))
    following = normed if c.choices.mtp_passes == "after_norm" else y
    return following, logits, Saved(embedded, enorm, hnorm, eh_proj, inner, last, head)


def backward(
    c: Context,
    dlogits: Array,
    dfollowing: Array | None,
    saved: Saved,
    tokens: Tokens,
    dense: bool,
    grads: Gradients,
) -> Array:
    """dlogits (T, V), dfollowing (T, D) from the next module  ->  dhidden (T, D)."""
    ops, wide = c.ops, c.config.hidden_size
    dnormed = ops.linear.backward(c.at("shared_head", "head"), dlogits, _head_again(c, saved), grads)
    normed_is_passed = c.choices.mtp_passes == "after_norm"
    if dfollowing is not None and normed_is_passed:
        dnormed = c.ar.at("d.hidden", dnormed + dfollowing)
    dy = ops.norm.backward(c.at("shared_head", "norm"), dnormed, saved.last, grads)
    if dfollowing is not None and not normed_is_passed:
        dy = c.ar.at("d.hidden", dy + dfollowing)
    dx = ops.block.backward(c, dy, saved.layer, tokens.batch, dense, grads)
    djoined = ops.linear.backward(c.at("eh_proj"), dx, _pair_again(c, saved), grads)  # (T, 2 D)
    de, dh = djoined[:, :wide], djoined[:, wide:]
    if c.choices.mtp_concat != "embedding_first":
        de, dh = dh, de
    de = ops.norm.backward(c.at("enorm"), de, saved.enorm, grads)
    if c.choices.mtp_first_embedding == "zero":
        de = np.where(tokens.first[:, None], np.zeros_like(de), de)
    ops.embedding.backward(c.at("embed_tokens"), de, saved.embedded, grads)
    dhidden: Array = ops.norm.backward(c.at("hnorm"), dh, saved.hnorm, grads)
    return dhidden


def _pair(c: Context, e: Array, h: Array) -> Array:
    """e, h (T, D)  ->  (T, 2 D)."""
    return np.concatenate((e, h) if c.choices.mtp_concat == "embedding_first" else (h, e), -1)


def _head_again(c: Context, saved: Saved) -> linear.Saved:
    """What the head saved, with the last norm's output computed again, if it was not kept."""
    if not c.ar.recomputes("lm_head.in"):
        return saved.head
    x = norm.again(c.at("shared_head", "norm"), saved.last, c.config.rms_norm_eps)
    return linear.again(saved.head, c.ar.keeping.operand("lm_head.in", x))


def _pair_again(c: Context, saved: Saved) -> linear.Saved:
    """What eh_proj saved, with the outputs of both norms computed again, if they were not kept."""
    if not c.ar.recomputes("eh_proj.in"):
        return saved.eh_proj
    eps = c.config.rms_norm_eps
    e = norm.again(c.at("enorm"), saved.enorm, eps)
    h = norm.again(c.at("hnorm"), saved.hnorm, eps)
    return linear.again(saved.eh_proj, c.ar.keeping.operand("eh_proj.in", _pair(c, e, h)))


def shifted(given: Inputs, choices: Choices) -> Inputs:
    """The inputs of the next MTP module: ids, targets, masks and segments one position to the left, together.
    A position exists as long as the token after it is of the same segment.  SPEC MTP-2."""
    follows = np.zeros(given.ids.shape, bool)
    follows[:, :-1] = (given.segments[:, 1:] == given.segments[:, :-1]) & given.exists[:, :-1]

    def left(x: Array, fill: int) -> Array:
        moved = np.full(x.shape, fill, x.dtype)
        moved[:, :-1] = x[:, 1:]
        return np.where(follows, moved, fill)

    segments = np.where(follows, given.segments, PADDING)
    places = left(given.positions, 0) if choices.mtp_positions == "token" else given.positions
    targets = None if given.targets is None else left(given.targets, loss.IGNORED)
    return Inputs(left(given.ids, 0), segments, places, targets)
