"""A linear without bias.  SPEC LINEAR-1.

Fprop y = x w^T;  Dgrad dx = dy w;  Wgrad dw = dy^T x, summed over tokens, run now or later.
The input is an operand: several linears may read the same one.
"""

from dataclasses import dataclass

from refimpl.layers.context import Context, tensor
from refimpl.numerics.arithmetic import Array, Operand
from refimpl.numerics.gradients import Gradients


@dataclass(frozen=True)
class Saved:
    x: Operand  # (T, K)
    out: Array | None = tensor("")  # (T, N)


def forward(c: Context, x: Operand) -> tuple[Array, Saved]:
    """x (T, K)  ->  y (T, N)."""
    y = c.ar.at(f"{c.leaf}.out", c.ar.fprop(x, c.weight("weight")))  # (T, N)
    return y, Saved(x, c.probe(y))


def backward(c: Context, dy: Array, saved: Saved, grads: Gradients) -> Array:
    """dy (T, N)  ->  dx (T, K); hands the weight's gradient over as operands."""
    out = c.ar.operand(f"{c.leaf}.dy", c.joined(dy))  # (T, N)
    grads.weight(c.name("weight"), c.microbatch, out, saved.x)
    return c.ar.at(f"{c.leaf}.dx", c.ar.dgrad(out, c.weight("weight")))  # (T, K)
