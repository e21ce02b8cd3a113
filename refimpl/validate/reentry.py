"""Every stage of a port judged from its own earlier tensors, so that one error does not hide the next.
SPEC VERDICT-18.

The right program runs once more.  Where the port has handed out a tensor, ours is noted, computed from what
came in, and the program goes on with theirs.  So a stage is off only if it is wrong given its own input.
What roundings may do to a stage alone is measured by runs with random roundings of the same stages on the
same input, so values that an earlier mistake made large or small are judged at their own size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refimpl import programs
from refimpl.cases.claims import Claim
from refimpl.cases.folder import Folder
from refimpl.cases.format import Tensor
from refimpl.cases.setting import setting_of
from refimpl.layers.context import Context, Op, Ops
from refimpl.numerics.arithmetic import Array, Operand
from refimpl.numerics.floating import Floating
from refimpl.validate.evidence import FLOAT64, SEEDS, sigma
from refimpl.validate.jitter import Jittered
from refimpl.validate.output import Output
from refimpl.variants.variation import Change, unchanged

RIGHT, OFF = "right", "off"
ELEMENT = 12.0  # sigma that an element may be off, as for the noise of a row in VERDICT-4
MASKED = -1e4  # scores below are of keys that are not seen
SPREAD = 4.0  # sigma that all elements together may be off, as in VERDICT-6

# Where a site's value is a named tensor of the module that is running.
_SITES = {
    "gate.logits": "logits",
    "gate.scores": "scores",
    "gate.weights": "topk_weight",
    "attention.scores": "scores",
    "attention.probs": "probs",
    "swiglu.act": "act",
}
_OPERANDS = {"o_proj.in": "heads"}
_MODULES = ("embedding", "linear", "norm", "mla", "mlp", "experts", "moe", "block")  # y is named by the path


@dataclass(frozen=True)
class Stage:
    """A tensor as this stage alone makes it.  ours, theirs: flat; z: how many sigma they are apart, of a set
    one number for each row and no sigma."""

    name: str
    shape: tuple[int, ...]
    verdict: str
    worst: float  # sigma
    ours: Array
    theirs: Array
    z: Array
    sigma: Array

    @property
    def set(self) -> bool:
        return self.sigma.size == 0

    @property
    def off(self) -> bool:
        return self.verdict == OFF


class _Stepping:
    """An arithmetic that notes named values and goes on with the port's."""

    def __init__(self, inner: Floating, theirs: Mapping[str, Array]) -> None:
        self.inner, self.theirs = inner, theirs
        self.path = ""
        self.allowed: Array | None = None  # of the attention that is running
        self.ours: dict[str, Array] = {}
        self.sequence: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def at(self, site: str, x: Array) -> Array:
        y = self.inner.at(site, x)
        if site == "attention.scores" and self.allowed is not None:
            y = np.where(self.allowed, y, -np.inf)
        own = site.removeprefix("shared_").removeprefix("experts.")
        return self.met(f"{self.path}.{_SITES[own]}", y) if own in _SITES else y

    def operand(self, site: str, x: Array) -> Operand:
        if site in _OPERANDS:
            x = self.met(f"{self.path}.{_OPERANDS[site]}", x)
        return self.inner.operand(site, x)

    def each(self, call: Callable[[Any], Any], items: Any) -> list[Any]:
        return [call(item) for item in items]  # in order: the path is of what is running

    def met(self, name: str, y: Array) -> Array:
        """Ours is noted; theirs, with the rounding that storing it made, goes on."""
        if name not in self.theirs:
            return y
        self.ours[name] = y
        self.sequence.append(name)
        theirs = self.theirs[name].reshape(np.shape(y))
        return self.inner.at("", theirs) if theirs.dtype.kind == "f" else theirs


def _entered(ar: _Stepping, ops: Ops) -> Ops:
    """The operations with every module's output noted and replaced."""
    turns: dict[str, int] = {}

    def within(op: Op, after: Callable[[Context, Any], Any]) -> Op:
        def forward(c: Context, *args: Any) -> Any:
            before, ar.path = ar.path, c.path
            try:
                return after(c, op.forward(c, *args))
            finally:
                ar.path = before

        return Op(forward, op.backward)

    def module(c: Context, made: tuple[Array, Any]) -> tuple[Array, Any]:
        return ar.met(c.path, made[0]), made[1]

    def rotated(c: Context, y: Array) -> Array:
        turns[c.path] = turns.get(c.path, 0) + 1
        return ar.met(f"{c.path}.{'q_pe' if turns[c.path] % 2 else 'k_pe'}", y)

    def attention(c: Context, query: Array, key: Array, value: Array, scale: float, allowed: Array) -> Any:
        scores, ar.allowed = ar.theirs.get(f"{c.path}.scores"), allowed
        if scores is not None:  # go on with what they saw, unless a row sees nothing
            seen = scores.reshape(*query.shape[:3], key.shape[2]) > MASKED
            allowed = seen if seen.any(-1).all() else allowed
        try:
            return ops.attention.forward(c, query, key, value, scale, allowed)
        finally:
            ar.allowed = None

    def plain(c: Context, made: Any) -> Any:
        return made

    def logits(c: Context, made: tuple[Array, Any]) -> tuple[Array, Any]:
        return ar.met("logits", made[0]), made[1]

    def choose(c: Context, scores: Array) -> Array:
        return ar.met(f"{c.path}.topk_idx", ops.choose(c, scores))

    def loss(c: Context, z: Array, targets: Array, count: int) -> tuple[Array, Any]:
        value, saved = ops.loss.forward(c, z, targets, count)
        if "loss.nll" in ar.theirs:
            value = c.ar.sum(ar.met("loss.nll", saved.nll)) / count
        return value, saved

    def frequencies(config: Any, choices: Any) -> Array:
        own = ops.frequencies(config, choices)
        name = next((n for n in ar.theirs if n.endswith(".inv_freq")), "")
        return ar.met(name, own) if name else own

    changed: dict[str, Any] = {name: within(getattr(ops, name), module) for name in _MODULES}
    changed |= {"rope": within(ops.rope, rotated), "head": within(ops.head, logits)}
    changed["attention"] = within(Op(attention, ops.attention.backward), plain)
    changed["gate"] = within(ops.gate, plain)
    changed |= {"choose": choose, "loss": Op(loss, ops.loss.backward), "frequencies": frequencies}
    return replace(ops, **changed)


def stages(folder: Folder, output: Output, claim: Claim, change: Change = unchanged) -> list[Stage]:
    """The tensors that the port gave, in the order of computation, each judged from those before it.

    Raises Unreadable.
    """
    given = {t.name: t for t in folder.case.outputs if t.name in output and output.fault(t) is None}
    theirs = {
        name: output.array(t) for name, t in given.items() if not t.set or output.sets(name) is not None
    }
    base = change(setting_of(folder, FLOAT64))

    def run(ar: Floating) -> tuple[dict[str, Array], list[str]]:
        stepping = _Stepping(ar, theirs)
        setting = replace(base, ar=stepping, ops=_entered(stepping, base.ops))
        with np.errstate(all="ignore"):
            outputs = programs.run(folder.case.component, setting)
        rest = {n: np.asarray(outputs[n]) for n in theirs if n not in stepping.ours and n in outputs}
        order = [*dict.fromkeys(stepping.sequence), *(n for n in given if n in rest)]
        return {**stepping.ours, **rest}, order

    ours, order = run(FLOAT64)
    runs = [run(Jittered(claim, seed))[0] for seed in SEEDS]
    judged = []
    for name in order:
        t = given[name]
        both = [np.asarray(own[name]) for own in (ours, *runs)]
        judged.append(_set(t, both, theirs[name]) if t.set else _numbers(t, both, theirs[name], claim))
    return judged


def _numbers(t: Tensor, ours: list[Array], theirs: Array, claim: Claim) -> Stage:
    own = [a.astype(np.float64).reshape(-1, t.shape[-1] if t.shape else 1) for a in ours]
    scale = sigma(own[0], own[1:], claim)
    flat = own[0].reshape(-1)
    options = [theirs.astype(np.float64).reshape(-1)]
    if "halves" in t.layouts:
        order = np.arange(t.shape[-1]).reshape(2, -1).T.reshape(-1)
        options.append(theirs.reshape(t.shape)[..., order].astype(np.float64).reshape(-1))
    with np.errstate(all="ignore"):
        found = [(np.abs(option - flat) / scale, option) for option in options]
    cleaned = []
    for z, option in found:
        masked = ~np.isfinite(flat) & (np.sign(option) == np.sign(flat)) & (np.abs(option) > 1e4)
        cleaned.append((np.where(masked, 0.0, np.where(np.isnan(z), np.inf, z)), option))
    z, option = min(cleaned, key=lambda one: float(np.median(one[0])) if one[0].size else 0.0)
    worst = float(z.max(initial=0.0))
    root = float(np.sqrt(np.mean(np.minimum(z, 1e100) ** 2))) if z.size else 0.0
    off = worst > ELEMENT or root > SPREAD + 4.0 / np.sqrt(max(1, z.size))
    return Stage(t.name, t.shape, OFF if off else RIGHT, worst, flat, option, z, scale)


def _set(t: Tensor, ours: list[Array], theirs: Array) -> Stage:
    own = [np.sort(a.reshape(-1, t.shape[-1]), -1) for a in ours]
    other = np.sort(theirs.reshape(-1, t.shape[-1]), -1)
    unstable = np.any([np.any(own[0] != run, -1) for run in own[1:]], 0)
    wrong = np.any(own[0] != other, -1) & ~unstable
    z = np.where(wrong, np.inf, 0.0)
    verdict = OFF if wrong.any() else RIGHT
    return Stage(t.name, t.shape, verdict, float(z.max(initial=0.0)), own[0], other, z, np.zeros(0))
