"""New tokens of several sequences through the network.  SPEC DECODE-4, DECODE-8, DECODE-9.

One call takes any mixture: whole prompts, chunks of prompts, one token after a filled cache, or several, as
when drafts are verified.  Tokens of all requests are the T rows of one pass; only attention knows whose they
are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from refimpl.decoding import forms
from refimpl.decoding.cache import Cache, Contiguous, Kind, natural
from refimpl.decoding.pages import Pool
from refimpl.errors import Invalid
from refimpl.inputs import read_routing
from refimpl.layers import gate
from refimpl.layers.batch import Tokens
from refimpl.layers.context import Context, tensors
from refimpl.model import Model
from refimpl.numerics.arithmetic import Array
from refimpl.units import unit_forward


@dataclass(frozen=True)
class Request:
    """The next tokens (n,) of the sequence whose earlier ones a cache holds; n may be 0."""

    cache: Cache
    ids: npt.ArrayLike


@dataclass(frozen=True)
class Step:
    """What a call gave: for each request the logits (n, V) of its new tokens, and what an MTP module would
    read of them (n, D); named intermediate tensors, the tokens of all requests (T, ...) one after another."""

    logits: list[Array]
    hidden: list[Array]
    tensors: Mapping[str, Array] = field(default_factory=dict)


class Decoder:
    """A model that computes new tokens from caches."""

    def __init__(
        self, model: Model, form: str = "absorbed", pages: int | None = None, split: int | None = None
    ) -> None:
        """form: absorbed or naive.  pages: of the pool that its caches share, None for no pages.  split: the
        keys of a part of attention, None for all at once.  Raises Invalid."""
        if form not in forms.FORMS:
            raise Invalid(f"form is {form!r:.40}, but it must be one of {', '.join(forms.FORMS)}.")
        if split is not None and natural("split", split) < 1:
            raise Invalid("split is 0, but a part of the keys must have at least 1.")
        self.model, self.form, self.split = model, form, split
        self.kind = Kind.of(model.config, model.ar)
        self.pool = None if pages is None else Pool(self.kind, pages)
        self._op = forms.op(form, split)
        self._units = [unit for unit in model.units if unit.kind != "mtp"]

    def cache(self) -> Cache:
        """An empty cache for one sequence."""
        return Contiguous(self.kind) if self.pool is None else self.pool.cache()

    def forward(self, requests: Sequence[Request], routing: Mapping[int, Any] | None = None) -> list[Array]:
        """The logits (n, V) of every request's new tokens; see `run`."""
        return self.run(requests, routing).logits

    def run(
        self,
        requests: Sequence[Request],
        routing: Mapping[int, Any] | None = None,
        trace: str | Sequence[str] = (),
    ) -> Step:
        """The new tokens of all requests in one pass; their caches hold them afterwards.

        routing: {layer: topk_idx (T, K)} or {layer: (topk_idx, topk_weight)} forces the experts of all new
        tokens, in the order of the requests.  trace: patterns of the names of tensors that are wanted.
        Raises Invalid; whatever is raised, the caches are as they were.
        """
        ids = self._read(requests)
        patterns = (trace,) if isinstance(trace, str) else tuple(trace)
        c = replace(self.model.context(probing=bool(patterns)), ops=replace(self.model.ops, mla=self._op))
        if routing:
            ready = read_routing(c.config, routing, (len(np.concatenate([*ids, ()])),))
            c = replace(c, ops=gate.forced(c.ops, ready))
        before = [request.cache.length for request in requests]
        try:
            for request, new in zip(requests, ids, strict=True):
                request.cache.extend(len(new))
            return self._run(c, requests, ids, patterns)
        except BaseException:
            for request, length in zip(requests, before, strict=True):
                if request.cache.length > length:
                    request.cache.roll_back(length)
            raise

    def _run(
        self, c: Context, requests: Sequence[Request], ids: list[Array], patterns: tuple[str, ...]
    ) -> Step:
        ends = list(accumulate(map(len, ids), initial=0))
        rows = [slice(start, stop) for start, stop in pairwise(ends)]
        if not ends[-1]:
            logits, hidden = c.ar.zeros((0, c.config.vocab_size)), c.ar.zeros((0, c.config.hidden_size))
            return Step([logits] * len(rows), [hidden] * len(rows))
        parts = tuple(
            forms.Part(at, request.cache)
            for at, request in zip(rows, requests, strict=True)
            if at.stop > at.start
        )
        places = np.concatenate([np.arange(part.start, part.cache.length) for part in parts])
        everything = np.concatenate(ids)
        batch = forms.Cached(1, len(places), c.ops.tables(c, places), np.ones((1, 1, 0, 0), bool), parts)
        tokens = Tokens(everything, places == 0, np.ones(len(places), bool), batch)
        named: dict[str, Array] = {}
        x, own = None, None
        for unit in self._units:
            x, own, saved = unit_forward(c, unit, x, tokens)
            found = tensors(saved, unit.path) if patterns else ()
            named |= {n: a for n, a, _ in found if any(fnmatchcase(n, pattern) for pattern in patterns)}
        assert x is not None
        assert own is not None  # the head is a unit
        return Step([own[at] for at in rows], [x[at] for at in rows], named)

    def _read(self, requests: Sequence[Request]) -> list[Array]:
        """The new ids of every request, checked.  Raises Invalid."""
        ids, seen = [], set()
        if not requests:
            raise Invalid("there is no request, but at least 1 is required.")
        for i, request in enumerate(requests):
            kind = request.cache.kind
            if not kind.fits(self.kind):
                raise Invalid(
                    f"the cache of request {i} is of another configuration, arithmetic or range of layers, "
                    "but it must be of this model's."
                )
            if id(request.cache) in seen:
                raise Invalid(
                    f"the cache of request {i} is that of an earlier one, but each must have its own."
                )
            seen.add(id(request.cache))
            new = _ids(i, request.ids, self.kind.config.vocab_size)
            kind.longer(request.cache.length, len(new))
            ids.append(new)
        return ids


def _ids(i: int, given: npt.ArrayLike, vocabulary: int) -> Array:
    """Token ids (n,) as int64.  Raises Invalid."""
    try:
        ids = np.asarray(given)
    except ValueError:
        raise Invalid(f"ids of request {i} are ragged, but they must be one row.") from None
    if ids.ndim != 1:
        raise Invalid(f"ids of request {i} have shape {ids.shape}, but they must be (n,).")
    if ids.size == 0:
        return np.zeros(0, np.int64)
    if ids.dtype.kind not in "iu":
        raise Invalid(f"ids of request {i} have dtype {ids.dtype}, but they must be integers.")
    bad = (ids < 0) | (ids >= vocabulary)
    if bad.any():
        at = int(np.argmax(bad))
        raise Invalid(
            f"ids of request {i} have {ids[at]} at {at}, but they must be in [0, {vocabulary}): the "
            "vocabulary."
        )
    return ids.astype(np.int64)
