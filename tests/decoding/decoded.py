"""What the tests of decoding share: sequences through a decoder in chunks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refimpl.decoding.cache import Cache
from refimpl.decoding.decode import Decoder, Request


def in_turns(
    decoder: Decoder, ids: Sequence[np.ndarray], turns: Sequence[Sequence[int]], caches: Sequence[Cache] = ()
) -> list[np.ndarray]:
    """The logits of whole sequences, turn by turn: in a turn, sequence i goes on by so many tokens, and takes
    no part in it if that is negative."""
    caches = caches or [decoder.cache() for _ in ids]
    found: list[list[np.ndarray]] = [[] for _ in ids]
    for turn in turns:
        taking = [i for i, n in enumerate(turn) if n >= 0]
        new = [ids[i][caches[i].length : caches[i].length + turn[i]] for i in taking]
        logits = decoder.forward([Request(caches[i], x) for i, x in zip(taking, new, strict=True)])
        for i, rows in zip(taking, logits, strict=True):
            found[i].append(rows)
    assert [cache.length for cache in caches] == [len(own) for own in ids]
    return [np.concatenate(rows) for rows in found]


def turns_of(lengths: Sequence[int], rng: np.random.Generator) -> list[list[int]]:
    """Random turns that bring every sequence to its length: some long, some of one token, some empty, some
    without this sequence."""
    left, turns = list(lengths), []
    while any(left):
        turn = [int(rng.choice([-1, 0, 1, 2, 5])) for _ in left]
        turn = [min(n, rest) if n > 0 else n for n, rest in zip(turn, left, strict=True)]
        if any(n >= 0 for n in turn):
            turns.append(turn)
            left = [rest - max(n, 0) for n, rest in zip(turn, left, strict=True)]
    return turns
