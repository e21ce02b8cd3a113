"""A text file as sequences of byte-level ids.

Ids 0 to 255 are bytes, 256 begins a text and 257 ends it.  The sequences of a step are slices at places that
the generator draws from the seed and the number of the step, so a resumed run reads what it would have read.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Final

import numpy as np

from refimpl.errors import Invalid, Unreadable
from refimpl.numerics import generator
from refimpl.numerics.arithmetic import Array

BEGIN: Final = 256
END: Final = 257
VOCABULARY: Final = 258
LIMIT: Final = 1 << 30  # bytes of a text


@dataclass(frozen=True)
class Corpus:
    """ids (n,) of one text, with its SHA-256."""

    ids: Array
    sha256: str

    @classmethod
    def read(cls, path: str | PathLike[str], length: int) -> Corpus:
        """Raises Unreadable, and Invalid for a text shorter than one sequence and the token after it."""
        try:
            with Path(path).open("rb") as file:
                data = file.read(LIMIT + 1)
        except OSError as error:
            raise Unreadable(f"{path} cannot be read ({error.strerror}), but it must be a text.") from None
        if len(data) > LIMIT:
            raise Unreadable(f"{path} is larger than {LIMIT} bytes, but a text must be at most that.")
        ids = np.empty(len(data) + 2, np.uint16)
        ids[0], ids[1:-1], ids[-1] = BEGIN, np.frombuffer(data, np.uint8), END
        if len(ids) <= length:
            raise Invalid(
                f"{path} has {len(ids)} tokens, but one sequence and its last target need {length + 1}."
            )
        return cls(ids, hashlib.sha256(data).hexdigest())

    def batch(self, seed: int, step: int, sequences: int, length: int) -> tuple[Array, Array]:
        """input_ids and targets, both (sequences, length), of a step."""
        starts = generator.integers(seed, f"batch {step}", (sequences,), 0, len(self.ids) - length)
        some = self.ids[starts[:, None] + np.arange(length + 1)].astype(np.int64)
        return some[:, :-1], some[:, 1:]
