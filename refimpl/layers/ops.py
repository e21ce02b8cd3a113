"""The operations of DeepSeek-V3, as one record."""

from types import ModuleType

from refimpl.layers import (
    attention,
    balance,
    block,
    embedding,
    experts,
    gate,
    head,
    linear,
    loss,
    mla,
    mlp,
    moe,
    mtp,
    norm,
    rope,
)
from refimpl.layers.context import Op, Ops


def _op(module: ModuleType) -> Op:
    return Op(module.forward, module.backward)


DEEPSEEK_V3 = Ops(
    embedding=_op(embedding),
    linear=_op(linear),
    norm=_op(norm),
    rope=_op(rope),
    attention=_op(attention),
    mla=Op(mla.forward, mla.backward, mla.again),
    mlp=_op(mlp),
    gate=_op(gate),
    balance=_op(balance),
    experts=_op(experts),
    moe=Op(moe.forward, moe.backward, moe.again),
    block=_op(block),
    head=_op(head),
    mtp=_op(mtp),
    loss=_op(loss),
    frequencies=rope.inverse_frequencies,
    cos_sin_factor=rope.cos_sin_factor,
    softmax_scale=rope.softmax_scale,
    tables=rope.tables,
    choose=gate.choose,
    shifted=mtp.shifted,
)
