"""Losses that keep the load of experts even.  SPEC BALANCE-1 to BALANCE-4; report equations 17 to 20.

Per sequence b of T tokens, over all N experts, with counts n[i] of the tokens that go to expert i:
    L[b] = sum_i g[i] P[i],   P[i] = mean_t p[t, i]
    sequence       p = s / sum_j s[j] (V3),   g[i] = f[i] = N / (K T) n[i]
    expert         p = s,                     g[i] = f[i]                                     (V2, eq. 23-25)
    device         p = s,                     g[i] = mean of f over the experts of i's device (eq. 26-28)
    communication  p = s,                     g[i] = devices / (M T) (tokens sent to i's device) (eq. 29-31)
Counts have no gradient.  Backward, with w the weight of L[b]:
    sequence       ds[t, i] = w / T (g[i] - sum_j g[j] p[t, j]) / sum_j s[t, j]
    the others     ds[t, i] = w / T g[i]
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from refimpl.layers.context import Context, tensor
from refimpl.numerics.arithmetic import Array

KINDS = ("sequence", "expert", "device", "communication")


@dataclass(frozen=True)
class Balancing:
    """What a forward pass balances: which sequence each token is of, and how much each loss weighs.

    sequence (T,) int, -1 for tokens that do not count;  number of sequences B;
    weights: kind -> weight of one sequence's loss in the total, its mean over sequences included.
    devices: how many the experts are spread over, in order, for the losses of V2.
    """

    sequence: Array
    number: int
    weights: Mapping[str, float]
    devices: int = 1


@dataclass(frozen=True)
class Saved:
    rows: Array  # (M,) tokens that count
    shares: Mapping[str, Array]  # kind -> (M, N) p, of the kinds whose p is not s
    total: Array  # (M, 1) sum_j s[t, j]
    factors: Mapping[str, Array]  # kind -> (B, N) g
    tokens: Array  # (B,) T of each sequence
    losses: Mapping[str, Array]  # kind -> (B,)
    value: Array | None = tensor("balance", per_token=False)  # (kinds, B)


def forward(c: Context, scores: Array, idx: Array) -> tuple[Mapping[str, Array], Saved]:
    """scores (T, N), chosen experts idx (T, K)  ->  kind -> loss (B,), 0 for a sequence without tokens."""
    ar, given = c.ar, c.balancing
    assert given is not None
    rows = np.flatnonzero(given.sequence >= 0)
    of = given.sequence[rows]  # (M,)
    own = scores[rows]  # (M, N)
    total = ar.sum(own)[:, None]  # (M, 1)
    tokens = np.bincount(of, minlength=given.number)  # (B,)
    divisor = ar.array(np.maximum(tokens, 1))[:, None]
    shares, factors, losses = {}, {}, {}
    for kind in given.weights:
        share = own
        if kind == "sequence":
            share = shares[kind] = own / total
        counted = _plain_choice(c, own) if _counts_plain(c, kind) else idx[rows]
        factors[kind] = _factors(c, kind, counted, of, tokens)  # (B, N)
        mean = ar.segment_sum(share, of, given.number) / divisor  # (B, N)  P
        losses[kind] = ar.dot(factors[kind], mean)  # (B,)
    value = np.stack(list(losses.values()))  # (kinds, B)
    return losses, Saved(rows, shares, total, factors, tokens, losses, c.probe(value))


def backward(c: Context, saved: Saved) -> Array:
    """->  dscores (M', N) of all tokens (T, N), exact zeros where nothing counts."""
    ar, given = c.ar, c.balancing
    assert given is not None
    of = given.sequence[saved.rows]
    dscores = ar.zeros((len(given.sequence), c.config.n_routed_experts))
    divisor = ar.array(np.maximum(saved.tokens, 1))[:, None]
    for kind, weight in given.weights.items():
        if not weight:
            continue
        per_token = (weight / divisor)[of]  # (M, 1)
        g = saved.factors[kind][of]  # (M, N)
        if kind == "sequence":
            g = (g - ar.dot(g, saved.shares[kind])[:, None]) / saved.total
        dscores[saved.rows] = dscores[saved.rows] + per_token * g
    return dscores


def counts(idx: Array, of: Array, number: int, experts: int) -> Array:
    """idx (M, K), of (M,)  ->  (number, experts) int: how many tokens of each sequence go to each expert."""
    flat = of[:, None] * experts + idx
    return np.bincount(flat.reshape(-1), minlength=number * experts).reshape(number, experts)


def _counts_plain(c: Context, kind: str) -> bool:
    return kind == "sequence" and c.choices.balance_counts == "plain"


def _plain_choice(c: Context, scores: Array) -> Array:
    """The K largest scores, without bias and groups, ties to the lower index: report equation 18."""
    real = c.ar.decide(scores)
    return np.argsort(-real, axis=-1, kind="stable")[:, : c.config.num_experts_per_tok]


def _factors(c: Context, kind: str, idx: Array, of: Array, tokens: Array) -> Array:
    """(B, N) g of a kind: integers times one constant, divided by the tokens of the sequence."""
    ar, cfg, given = c.ar, c.config, c.balancing
    assert given is not None
    experts, chosen = cfg.n_routed_experts, cfg.num_experts_per_tok
    count = counts(idx, of, given.number, experts)  # (B, N)
    divisor = ar.array(np.maximum(tokens, 1))[:, None]
    if kind in ("sequence", "expert"):
        return ar.array(count * experts) / (divisor * float(chosen))
    width = experts // given.devices
    if kind == "device":
        grouped = count.reshape(len(count), given.devices, width).sum(-1)  # (B, devices)
        factor = ar.array(grouped * given.devices) / (divisor * float(chosen))
    else:
        device = idx // width  # (M, K)
        sent = np.zeros((len(device), given.devices), np.int64)
        np.put_along_axis(sent, device, 1, -1)
        grouped = np.stack([np.bincount(of, sent[:, d], given.number) for d in range(given.devices)], -1)
        factor = ar.array(grouped * given.devices) / (divisor * float(cfg.kept_groups))
    repeated: Array = factor[:, np.arange(experts) // width]
    return repeated
