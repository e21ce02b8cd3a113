"""A linear without bias.  SPEC LINEAR-1.

Fprop y = x w^T;  Dgrad dx = dy w;  Wgrad dw = dy^T x, summed over tokens, run now or later.
The input is an operand: several linears may read the same one.  If it is not kept, the layer around computes
it again before the backward pass (`again`).
"""

from dataclasses import dataclass, replace

from refimpl.layers.context import Context, tensor
from refimpl.numerics.arithmetic import Array, Dropped, Operand
from refimpl.numerics.gradients import Gradients


@dataclass(frozen=True)
class Saved:
    x: Operand | Dropped  # (T, K)
    out: Array | None = tensor("")  # (T, N)

    @property
    def operand(self) -> Operand:
        """The input, kept or computed again."""
        assert isinstance(self.x, Operand), "the input of a linear was not computed again"
        return self.x


def forward(c: Context, x: Operand) -> tuple[Array, Saved]:
    """x (T, K)  ->  y (T, N)."""
    y = c.ar.at(f"{c.linear}.out", c.ar.fprop(x, c.weight("weight")))  # (T, N)
    return y, Saved(x.kept, c.probe(y))


def backward(c: Context, dy: Array, saved: Saved, grads: Gradients) -> Array:
    """dy (T, N)  ->  dx (T, K); hands the weight's gradient over as operands."""
    out = c.ar.operand(f"{c.linear}.dy", c.joined(dy))  # (T, N)
    grads.weight(c.name("weight"), c.microbatch, out, saved.operand)
    return c.ar.at(f"{c.linear}.dx", c.ar.dgrad(out, c.weight("weight")))  # (T, K)


def again(saved: Saved, x: Operand) -> Saved:
    """With the input computed again, if it was not kept."""
    return replace(saved, x=x) if isinstance(saved.x, Dropped) else saved
