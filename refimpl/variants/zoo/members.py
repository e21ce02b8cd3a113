"""The zoo: correct variants, a row for each.  SPEC ZOO-1 to ZOO-3."""

from __future__ import annotations

from typing import Final

from refimpl.numerics.emulated import cut_to_tf32, to_bf16, to_fp16, to_tf32
from refimpl.variants.variation import Change, both
from refimpl.variants.zoo import attention, experts, gate, loss, mla, norm, rope, training
from refimpl.variants.zoo.arithmetics import (
    DEMO_BF16,
    EAGER_BF16,
    EAGER_FP16,
    FUSED_BF16,
    FUSED_FP16,
    emulated,
    except_at,
    half,
    tokens,
)
from refimpl.variants.zoo.member import Member

_BF16, _FP16, _TF32 = ("bf16",), ("fp16",), ("tf32", "bf16")
_WHERE_MLA = ("mla", "block", "model")
_EAGER: Change = both(rope.PRODUCTS_STORED, experts.SILU_STORED, experts.SCATTERED)


def _single(change: Change, order: str = "one by one") -> Change:
    """A form in emulated float32."""
    return both(emulated(order), change)


_ORDERS: tuple[Member, ...] = (
    Member("one by one", "float32, every sum from its first term to its last", emulated()),
    Member("reversed", "every sum from its last term to its first", emulated("reversed")),
    Member("tree", "neighbours are added first", emulated("tree")),
    Member("split-K 2", "two halves of a sum, then one addition", emulated("split-K 2")),
    Member("split-K 8", "eight parts of a sum, added in order", emulated("split-K 8")),
    Member("lanes", "16 lanes of a vector unit, then a tree", emulated("lanes")),
    Member("chunks", "parts of 128 terms, each promoted into a second accumulator", emulated("chunks")),
    Member("fused", "a chain of fused multiply-adds", emulated("fused")),
    Member("fused chunks", "fused multiply-adds in parts of 32, then a tree", emulated("fused chunks")),
    Member("fine", "sums are correctly rounded, as by a float64 accumulator", emulated("fine")),
    Member(
        "tokens by 4",
        "weight gradients are added over groups of four tokens, as over microbatches",
        both(emulated("lanes"), tokens(4)),
    ),
    Member(
        "last token first",
        "weight gradients are added from the last token to the first",
        both(emulated("chunks"), tokens(None)),
    ),
)

_TF32_ROWS: tuple[Member, ...] = (
    Member("tf32", "operands of products are rounded to tf32", emulated("chunks", to_tf32), _TF32),
    Member(
        "tf32 cut",
        "operands lose the bits that tf32 lacks, and the accumulator is cut after 16 products",
        emulated("cut", cut_to_tf32),
        _TF32,
    ),
    Member(
        "tf32 one by one", "operands of products are rounded to tf32", emulated("one by one", to_tf32), _TF32
    ),
    Member(
        "tf32 flash",
        "FlashAttention with operands in tf32",
        both(emulated("tree", to_tf32), attention.FLASH),
        _TF32,
        withholds=("*.scores", "*.probs"),
    ),
    Member(
        "tf32 scaled query",
        "the query is scaled before it is rounded to tf32",
        both(emulated("chunks", to_tf32), attention.QUERY_SCALED),
        _TF32,
    ),
)

_BF16_ROWS: tuple[Member, ...] = (
    Member(
        "bf16 eager",
        "every kernel stores bf16, as in transformers: normed before the gain, products of the rotation, "
        "silu, the sum of experts",
        both(half(to_bf16, EAGER_BF16), _EAGER),
        _BF16,
    ),
    Member(
        "bf16 demo",
        "as DeepSeek's code: the gate in bf16 up to its scores, rotation and norm rounded once",
        both(half(to_bf16, DEMO_BF16), experts.SILU_STORED, experts.SCATTERED, rope.FINE_TABLES),
        _BF16,
    ),
    Member(
        "bf16 fused",
        "fused kernels: FlashAttention, SwiGLU, norm and rotation round once, and the residual is float32",
        both(half(to_bf16, FUSED_BF16, "cut", to_bf16), attention.FLASH, experts.FUSED_GATE_UP),
        _BF16,
        withholds=("*.scores", "*.probs"),
    ),
    Member(
        "bf16 operands",
        "float32 everywhere, but products read bf16",
        emulated("chunks", to_bf16),
        _BF16,
    ),
    Member(
        "bf16 residual in float32",
        "as eager, with the residual stream in float32",
        both(half(to_bf16, except_at(EAGER_BF16, "residual", "d.residual", "embed.out")), _EAGER),
        _BF16,
    ),
    Member(
        "bf16 softmax in float32",
        "scores and probabilities stay float32, and products read them in bf16",
        both(
            half(
                to_bf16,
                except_at(EAGER_BF16, "attention.scores", "attention.probs", "d.attention.scores"),
                "chunks",
                to_bf16,
            ),
            _EAGER,
        ),
        _BF16,
    ),
    Member(
        "bf16 tables in float32",
        "cos and sin stay float32, and the rotation is rounded once",
        both(half(to_bf16, except_at(EAGER_BF16, "rope.table")), experts.SILU_STORED),
        _BF16,
    ),
    Member(
        "bf16 experts in float32",
        "the sum of experts is float32, and rounded once",
        both(half(to_bf16, except_at(EAGER_BF16, "experts.slot", "experts.sum")), _EAGER),
        _BF16,
    ),
    Member(
        "bf16 gain in float32",
        "the norm is rounded once, after the gain",
        both(half(to_bf16, except_at(EAGER_BF16, "norm.normed"), "lanes"), norm.RSQRT),
        _BF16,
    ),
    Member(
        "bf16 absorbed",
        "absorbed latent attention, which stores the query in the latent space",
        both(half(to_bf16, EAGER_BF16), mla.ABSORBED),
        _BF16,
        withholds=("*.kv_b_proj",),
        components=_WHERE_MLA,
    ),
    Member(
        "bf16 scaled query",
        "the scaled query is stored",
        both(half(to_bf16, EAGER_BF16), attention.QUERY_SCALED),
        _BF16,
    ),
    Member(
        "bf16 tanh",
        "silu by the hyperbolic tangent, whose error is small beside bf16",
        both(half(to_bf16, EAGER_BF16, "split-K 8"), experts.SILU_TANH),
        _BF16,
    ),
    Member(
        "bf16 one by one",
        "every kernel stores bf16, sums one by one",
        half(to_bf16, EAGER_BF16, "one by one"),
        _BF16,
    ),
    Member(
        "bf16 weighted early",
        "the routing weight goes into the activation, which is stored",
        both(half(to_bf16, EAGER_BF16), experts.WEIGHTED_EARLY),
        _BF16,
    ),
    Member(
        "fp16 eager",
        "every kernel stores fp16",
        both(half(to_fp16, EAGER_FP16), _EAGER),
        _FP16,
    ),
    Member(
        "fp16 fused",
        "fused kernels: FlashAttention, SwiGLU, norm and rotation round once",
        both(half(to_fp16, FUSED_FP16, "cut", to_fp16), attention.FLASH, experts.FUSED_GATE_UP),
        _FP16,
        withholds=("*.scores", "*.probs"),
    ),
    Member(
        "fp16 operands",
        "float32 everywhere, but products read fp16",
        emulated("chunks", to_fp16),
        _FP16,
    ),
    Member(
        "fp16 scaled query",
        "the scaled query is stored",
        both(half(to_fp16, EAGER_FP16), attention.QUERY_SCALED),
        _FP16,
    ),
)

_FORMS: tuple[Member, ...] = (
    Member("x / rms", "a division for each element instead of one reciprocal", _single(norm.DIVIDED)),
    Member("rsqrt", "the reciprocal root is one function, rounded once", _single(norm.RSQRT, "lanes")),
    Member(
        "gain first", "the gain is multiplied before the reciprocal root", _single(norm.GAIN_FIRST, "tree")
    ),
    Member("rotation fused", "fused multiply-adds in the rotation", _single(rope.FUSED, "fused")),
    Member("tables in float64", "angles, cos and sin in float64, rounded once", _single(rope.FINE_TABLES)),
    Member(
        "constants in float32",
        "frequencies and softmax scale are computed in float32, step by step",
        _single(rope.SINGLE_CONSTANTS),
    ),
    Member("scaled query", "the softmax scale goes into the query", _single(attention.QUERY_SCALED)),
    Member("exp2", "softmax by powers of 2, the factor in the scale", _single(attention.EXP2)),
    Member(
        "flash",
        "FlashAttention: blocks of keys with a running maximum; backward from the sum of do * o",
        _single(attention.FLASH),
        withholds=("*.scores", "*.probs"),
    ),
    Member("row sums", "only the backward of FlashAttention", _single(attention.ROW_SUMS, "split-K 2")),
    Member(
        "late division", "softmax divides after the product with the values", _single(attention.LATE_DIVISION)
    ),
    Member("fused q_a and kv_a", "one matrix: its Dgrad is one sum over both", _single(mla.FUSED_DOWN)),
    Member("split kv_b", "a matrix for the keys and one for the values", _single(mla.SPLIT_UP)),
    Member(
        "absorbed",
        "latent attention with kv_b in the query and behind the sum over keys",
        _single(mla.ABSORBED),
        withholds=("*.kv_b_proj",),
        components=_WHERE_MLA,
    ),
    Member(
        "other layout",
        "the other layout of rotary pairs, in the weights and in the rotation",
        _single(mla.OTHER_LAYOUT),
        withholds=("*.q_b_proj", "*.q_proj", "*.kv_a_proj_with_mqa"),
        components=_WHERE_MLA,
    ),
    Member(
        "shifted positions",
        "positions start elsewhere; attention knows their differences only",
        _single(mla.SHIFTED),
        withholds=("*.q_pe", "*.k_pe"),
        components=_WHERE_MLA,
    ),
    Member(
        "silu quotient",
        "x / (1 + exp(-x)), and another form of its derivative",
        _single(experts.SILU_QUOTIENT),
    ),
    Member("fused gate_up", "one matrix: its Dgrad is one sum over both", _single(experts.FUSED_GATE_UP)),
    Member(
        "scatter-add", "experts one after the other, each added to its tokens", _single(experts.SCATTERED)
    ),
    Member(
        "last expert first",
        "experts from the last to the first, each added to its tokens",
        _single(experts.LAST_EXPERT_FIRST),
    ),
    Member(
        "weighted early",
        "the routing weight goes into the activation, before the down projection",
        _single(experts.WEIGHTED_EARLY),
    ),
    Member(
        "shared expert first",
        "the shared expert is one more slot, with weight 1, and the first to be added",
        _single(experts.ONE_MORE),
        components=("moe", "block", "model"),
        withholds=("*.mlp.experts",),
    ),
    Member(
        "one factor per token", "routing weights by one factor instead of divisions", _single(gate.RECIPROCAL)
    ),
    Member(
        "other sort", "ties go to the higher index, and ids come in ascending order", _single(gate.OTHER_SORT)
    ),
    Member(
        "centred bias",
        "the selection bias without its mean",
        _single(gate.CENTRED),
        withholds=("after.*e_score_correction_bias",),
    ),
    Member("log-sum-exp", "the loss from the logarithm of the sum of exp", _single(loss.LOG_SUM_EXP)),
    Member(
        "vocabulary in chunks",
        "the same, with a running sum over chunks of the vocabulary",
        _single(loss.CHUNKED),
    ),
)

_OF_STEPS = ("adamw", "step", "chain")
_TRAINING: tuple[Member, ...] = (
    Member(
        "fused AdamW",
        "as torch's kernel: a factor of decay, moments as two products each, the step size times m",
        _single(training.FUSED_ADAMW, "fused"),
        components=_OF_STEPS,
    ),
    Member(
        "corrected moments",
        "m / (1 - beta1^n) and v / (1 - beta2^n) first, as the paper of Adam",
        _single(training.CORRECTED_FIRST, "lanes"),
        components=_OF_STEPS,
    ),
    Member(
        "norm of norms",
        "the norm of each gradient, then the norm of these",
        _single(training.NORM_OF_NORMS, "tree"),
        components=_OF_STEPS,
    ),
    Member(
        "last tensor first",
        "the global norm adds tensors from the last to the first",
        _single(training.LAST_TENSOR_FIRST, "reversed"),
        components=_OF_STEPS,
    ),
    Member(
        "balance by tokens",
        "the mean over tokens of sum g p, instead of sum g times the mean of p",
        _single(training.BY_TOKEN, "lanes"),
        components=("balance", "model", "step", "chain"),
    ),
    Member(
        "positions of the hidden state",
        "MTP modules use the other one of the two positions; attention knows differences only",
        _single(training.POSITIONS_OF_HIDDEN, "chunks"),
        components=("mtp", "model", "step", "chain"),
        withholds=("*.q_pe", "*.k_pe"),
    ),
)

ZOO: Final[tuple[Member, ...]] = (*_ORDERS, *_FORMS, *_TRAINING, *_TF32_ROWS, *_BF16_ROWS)
