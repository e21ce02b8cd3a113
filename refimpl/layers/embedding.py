"""Token embedding.  SPEC EMBED-1.

y[t] = weight[ids[t]];  dweight[v] = sum of dy[t] over the tokens with ids[t] = v.
"""

from dataclasses import dataclass

from refimpl.layers.context import Context, tensor
from refimpl.numerics.arithmetic import Array
from refimpl.numerics.gradients import Gradients


@dataclass(frozen=True)
class Saved:
    ids: Array  # (T,)
    out: Array | None = tensor("")  # (T, D)


def forward(c: Context, ids: Array) -> tuple[Array, Saved]:
    """ids (T,) int  ->  y (T, D)."""
    y = c.ar.at("embed.out", c.array("weight")[ids])  # (T, D)
    return y, Saved(ids, c.probe(y))


def backward(c: Context, dy: Array, saved: Saved, grads: Gradients) -> None:
    """dy (T, D); adds the table's gradient, (V, D)."""
    dy = c.joined(dy)
    grads.rows(c.name("weight"), c.microbatch, saved.ids, dy, c.config.vocab_size)
