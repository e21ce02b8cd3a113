"""Mistakes of balance losses.  SPEC BALANCE-1 to BALANCE-4."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from refimpl.config.training import TrainingConfig
from refimpl.layers import balance
from refimpl.layers.context import Context, Op, Ops
from refimpl.losses import Divisors
from refimpl.numerics.arithmetic import Array
from refimpl.programs import Setting
from refimpl.variants.mutants.mutant import Mutant
from refimpl.variants.variation import Change, operations

EPSILON: Final = 1e-20
FINE: Final = ("fp32", "tf32")  # scores and balance losses are float32 in every port
_KIND: Final = "sequence"  # the loss that these are mistakes of
Shares = Callable[[Context, Array], tuple[Array, Callable[[Array], Array]]]
# scores (M, N)  ->  p (M, N), and dp (M, N) -> dscores (M, N)


def _with_shares(made: Shares) -> Change:
    """The sequence-wise loss with other p."""

    def changed(ops: Ops) -> Op:
        def forward(c: Context, scores: Array, idx: Array) -> tuple[Mapping[str, Array], balance.Saved]:
            ar, given = c.ar, c.balancing
            losses, saved = ops.balance.forward(c, scores, idx)
            if _KIND not in losses:
                return losses, saved
            own, of = scores[saved.rows], given.sequence[saved.rows]
            shares = made(c, own)[0]
            mean = ar.segment_sum(shares, of, given.number) / _divisor(c, saved)
            losses = {**losses, _KIND: ar.dot(saved.factors[_KIND], mean)}
            value = c.probe(np.stack(list(losses.values())))
            return losses, replace(saved, losses=losses, value=value, total=_Kept(own, saved.total))

        def backward(c: Context, saved: balance.Saved) -> Array:
            given = c.balancing
            if not isinstance(saved.total, _Kept):
                dscores: Array = ops.balance.backward(c, saved)
                return dscores
            kept = saved.total
            others = replace(c, balancing=replace(given, weights={**given.weights, _KIND: 0.0}))
            dscores = ops.balance.backward(others, replace(saved, total=kept.total))
            of = given.sequence[saved.rows]
            dp = (given.weights[_KIND] / _divisor(c, saved))[of] * saved.factors[_KIND][of]
            dscores[saved.rows] = dscores[saved.rows] + made(c, kept.scores)[1](dp)
            return dscores

        return Op(forward, backward)

    return operations(balance=changed)


class _Kept:
    """The scores beside their sums."""

    def __init__(self, scores: Array, total: Array) -> None:
        self.scores, self.total = scores, total


def _divisor(c: Context, saved: balance.Saved) -> Array:
    return c.ar.array(np.maximum(saved.tokens, 1))[:, None]


def _plain(c: Context, scores: Array) -> tuple[Array, Callable[[Array], Array]]:
    return scores, lambda dp: dp


def _softmax(c: Context, scores: Array) -> tuple[Array, Callable[[Array], Array]]:
    """softmax(logits), where scores = sigmoid(logits) and so exp(logits) = scores / (1 - scores)."""
    if c.config.scoring_func != "sigmoid":
        return scores / c.ar.sum(scores)[:, None], lambda dp: _of_ratio(
            c, scores, dp, c.ar.sum(scores)[:, None]
        )
    odds = scores / (1.0 - scores)
    total = c.ar.sum(odds)[:, None]
    return odds / total, lambda dp: _of_ratio(c, odds, dp, total) / ((1.0 - scores) * (1.0 - scores))


def _floored(c: Context, scores: Array) -> tuple[Array, Callable[[Array], Array]]:
    total = c.ar.sum(scores)[:, None] + EPSILON
    return scores / total, lambda dp: _of_ratio(c, scores, dp, total)


def _of_ratio(c: Context, x: Array, dp: Array, total: Array) -> Array:
    """The gradient of x / total with total = sum x + constant."""
    return np.asarray((dp - c.ar.dot(dp, x / total)[:, None]) / total)


def _given(change: Callable[[balance.Balancing], balance.Balancing], losses: bool = True) -> Change:
    """What is balanced is something else; losses: in the forward pass too, not only in the gradient."""

    def changed(ops: Ops) -> Op:
        def forward(c: Context, scores: Array, idx: Array) -> Any:
            own = replace(c, balancing=change(c.balancing)) if losses else c
            found, saved = ops.balance.forward(own, scores, idx)
            found = _for_each(found, c.balancing.number)
            return found, replace(saved, losses=found)

        def backward(c: Context, saved: balance.Saved) -> Array:
            dscores: Array = ops.balance.backward(replace(c, balancing=change(c.balancing)), saved)
            return dscores

        return Op(forward, backward)

    return operations(balance=changed)


def _for_each(losses: Mapping[str, Array], number: int) -> Mapping[str, Array]:
    """One loss of the whole batch stands for that of each sequence."""
    return {kind: np.repeat(x, number) if len(x) == 1 else x for kind, x in losses.items()}


def _one_sequence(given: balance.Balancing) -> balance.Balancing:
    of = np.where(given.sequence >= 0, 0, -1)
    return replace(
        given, sequence=of, number=1, weights={k: w * given.number for k, w in given.weights.items()}
    )


def _by_size(given: balance.Balancing) -> balance.Balancing:
    return replace(given, weights={kind: w / given.number for kind, w in given.weights.items()})


def _with_padding(given: balance.Balancing) -> balance.Balancing:
    """A token of padding is of the sequence of the token before it, or of the first."""
    of = given.sequence.copy()
    for t in np.flatnonzero(of < 0):
        of[t] = of[t - 1] if t else 0
    return replace(given, sequence=of)


def _own_sequences(s: Setting) -> Any:
    """Each microbatch divides by its own sequences."""

    def divisors(own: Sequence[Divisors]) -> list[Divisors]:
        right = s.rules.divisors(own)
        return [replace(a, sequences=b.sequences) for a, b in zip(right, own, strict=True)]

    return divisors


def _no_weight(s: Setting) -> Any:
    def at(training: TrainingConfig, tokens: int) -> TrainingConfig:
        return replace(s.rules.at(training, tokens), balance_loss_weight=0.0)

    return at


def _ruled(**made: Any) -> Change:
    """Rules of the step replaced, each made from the setting."""
    return lambda s: replace(s, rules=replace(s.rules, **{name: make(s) for name, make in made.items()}))


def _other_counts(s: Setting) -> Setting:
    other = "selected" if s.choices.balance_counts == "plain" else "plain"
    return replace(s, choices=replace(s.choices, balance_counts=other))


MUTANTS: Final = (
    Mutant("L01a", _with_shares(_plain), FINE),
    Mutant("L01b", _with_shares(_softmax), FINE),
    Mutant("L02", _given(_one_sequence), FINE),
    Mutant("L03", _given(_by_size, losses=False), FINE),
    Mutant("L04", _ruled(divisors=_own_sequences), FINE),
    Mutant("L05", _ruled(at=_no_weight), FINE),
    Mutant("L06", _other_counts, FINE),
    Mutant("L12", _given(_with_padding), FINE),
    Mutant("L14", _with_shares(_floored), FINE),
)
