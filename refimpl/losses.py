"""The parts of the loss, what divides them, and how they weigh.  SPEC LOSS-1, MTP-5, BALANCE-4.

total = main + lambda / D * sum_k mtp_k + sum over kinds of alpha_kind * balance_kind
Every part is a sum over tokens or sequences, divided by a count of the whole batch that is known before
anything is computed, so that microbatches add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.config.choices import Choices
from refimpl.config.training import TrainingConfig
from refimpl.errors import Invalid
from refimpl.layers import loss
from refimpl.layers.balance import Balancing
from refimpl.layers.batch import PADDING, Inputs
from refimpl.numerics.arithmetic import Arithmetic, Array


@dataclass(frozen=True)
class Divisors:
    """By what the sums are divided; entry 0 is the main model, entry k MTP module k.

    targets: of the cross-entropies;  sequences: of the balance losses, those that have a token.
    Divisors of microbatches add up to those of their batch.
    """

    targets: tuple[int, ...]
    sequences: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, counts in (("targets", self.targets), ("sequences", self.sequences)):
            for count in counts:
                if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 0:
                    raise Invalid(
                        f"divisors.{name} has {count!r}, but it has to have integers of at least 0."
                    )

    def __add__(self, other: Divisors) -> Divisors:
        return Divisors(_added(self.targets, other.targets), _added(self.sequences, other.sequences))


def _added(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    if len(a) != len(b):
        raise Invalid(f"divisors of {len(a)} and of {len(b)} depths are added, but they have to be alike.")
    return tuple(x + y for x, y in zip(a, b, strict=True))


def counted(depths: Sequence[Inputs], choices: Choices) -> Divisors:
    """The divisors of a batch by itself.  depths: the main model's inputs, then each module's."""
    main = depths[0]
    targets = []
    for depth, given in enumerate(depths):
        how = choices.mtp_loss_divisor if depth else choices.loss_divisor
        if given.targets is None:
            targets.append(0)
        elif how == "positions":
            targets.append(int(np.count_nonzero(main.exists)))
        else:
            targets.append(int(np.count_nonzero(given.targets != loss.IGNORED)))
    sequences = [len(np.unique(of[of >= 0])) for of in (sequence_of(x, choices) for x in depths)]
    return Divisors(tuple(targets), tuple(sequences))


def sequence_of(given: Inputs, choices: Choices) -> Array:
    """(T,) int: the number of the sequence that each token's balance loss is of, -1 for none."""
    rows = np.broadcast_to(np.arange(len(given.ids))[:, None], given.ids.shape)
    exists = given.segments != PADDING
    if choices.balance_sequence == "row":
        return np.where(exists, rows, -1).reshape(-1)
    wide = int(given.segments.max()) + 1
    every = np.where(exists, rows * wide + given.segments, -1).reshape(-1)
    kinds, number = np.unique(every, return_inverse=True)
    return np.asarray(number.reshape(-1) - int(kinds[0] == -1))


def balancing(given: Inputs, choices: Choices, training: TrainingConfig, sequences: int) -> Balancing:
    """What is balanced at one depth, when its losses are means over so many sequences."""
    of = sequence_of(given, choices)
    weights = {kind: weight / max(sequences, 1) for kind, weight in balance_weights(training).items()}
    return Balancing(of, int(of.max(initial=-1)) + 1, weights, training.balance_devices)


def balance_weights(training: TrainingConfig) -> Mapping[str, float]:
    """kind -> alpha.  The sequence-wise loss is always measured, V2's where they have a weight."""
    v2 = {
        "expert": training.expert_balance_weight,
        "device": training.device_balance_weight,
        "communication": training.communication_balance_weight,
    }
    return {"sequence": training.balance_loss_weight} | {kind: w for kind, w in v2.items() if w}


@dataclass(frozen=True)
class Terms:
    """What the losses are sums of.  nll: for each depth (M,);  balance: (kind, layer, depth) -> (B,)."""

    nll: tuple[Array, ...]
    balance: Mapping[tuple[str, int, int], Array]


def joined(terms: Sequence[Terms]) -> Terms:
    """The terms of a batch, from its microbatches."""
    nll = tuple(np.concatenate(parts) for parts in zip(*(one.nll for one in terms), strict=True))
    return Terms(nll, {key: np.concatenate([one.balance[key] for one in terms]) for key in terms[0].balance})


def parts(ar: Arithmetic, terms: Terms, divided: Divisors) -> dict[str, float]:
    """The unweighted parts of the loss: main, mtp (the mean over modules), balance (the sum over layers)."""
    if not terms.nll:
        return {}
    means = [ar.sum(nll).item() / max(n, 1) for nll, n in zip(terms.nll, divided.targets, strict=True)]
    found = {"main": means[0]}
    if len(means) > 1:
        found["mtp"] = ar.sum(ar.array(means[1:])).item() / (len(means) - 1)
    for (kind, _, depth), losses in terms.balance.items():
        share = ar.sum(losses).item() / max(divided.sequences[depth], 1)
        found[PART_OF[kind]] = found.get(PART_OF[kind], 0.0) + share
    return found


PART_OF = {  # kind of balance loss -> its name among the parts of the loss
    "sequence": "balance",
    "expert": "expert_balance",
    "device": "device_balance",
    "communication": "communication_balance",
}


def total(parts: Mapping[str, float], training: TrainingConfig | None) -> float:
    """The weighted sum, in the order main, mtp, balance losses."""
    value = parts["main"]
    if training is None:
        return value
    if "mtp" in parts:
        value = value + training.mtp_loss_weight * parts["mtp"]
    for kind, weight in balance_weights(training).items():
        if weight and PART_OF[kind] in parts:
            value = value + weight * parts[PART_OF[kind]]
    return value
