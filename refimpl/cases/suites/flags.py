"""The mistakes that cases are about.  All were made by real ports; a verdict that fails prints the case's
own."""

from refimpl.cases.definition import Flag

ROPE_HALF_SPLIT = Flag(
    "rope-half-split",
    "layout",
    "The rotary part is split into halves where the checkpoint's pairs are neighbours.",
    "Every rotated query and key is wrong from position 1 on.",
)
ROPE_ANGLE_LOW_PRECISION = Flag(
    "rope-angle-low-precision",
    "precision",
    "Positions or frequencies are rounded to bfloat16 before they are multiplied.",
    "cos and sin are off by 0.001 at position 5, by 0.7 at 4000.",
)
POSITION_NARROWED = Flag(
    "position-narrowed", "overflow", "Positions pass through 16 bits.", "Positions from 32768 on are wrong."
)
YARN_MISSING = Flag(
    "yarn-missing",
    "omission",
    "YaRN's frequencies are not applied.",
    "The frequencies from index 11 on are up to 40 times too high.",
)
YARN_RANGE = Flag(
    "yarn-range",
    "formula",
    "The ends of YaRN's ramp are not rounded outwards to whole dimensions.",
    "The frequencies in the ramp (11 to 22 of 32) differ.",
)
YARN_COS_SCALED = Flag(
    "yarn-cos-scaled",
    "formula",
    "cos and sin are multiplied by mscale instead of by the ratio of the two mscales.",
    "The rotary part of the logits is 1.87 times too large.",
)
SOFTMAX_SCALE = Flag(
    "softmax-scale",
    "formula",
    "The softmax scale lacks the square of YaRN's mscale, or takes the width of the latent.",
    "Attention logits are 0.53 times what they should be.",
)
MSCALE_NOT_ALL_DIM = Flag(
    "mscale-not-all-dim",
    "formula",
    "The softmax scale takes mscale instead of mscale_all_dim.",
    "Nothing changes where the two are equal, as in every released configuration.",
)
NORM_EPSILON = Flag(
    "norm-epsilon",
    "constant",
    "The epsilon is another one, or is added after the root.",
    "Rows of small size are wrong, others are not.",
)
NORM_MEAN = Flag(
    "norm-mean",
    "formula",
    "The mean is subtracted, as in LayerNorm.",
    "Rows whose mean is not zero are wrong.",
)
NORM_OVER_576 = Flag(
    "norm-over-576",
    "shape",
    "The latent's norm runs over the rotary key as well.",
    "The key and value latent has another scale, and the rotary key is normalised.",
)
VALUE_WIDTH = Flag(
    "value-width",
    "shape",
    "Values are reshaped with the width of keys.",
    "The heads' outputs are read across heads.",
)
KV_B_SPLIT = Flag(
    "kv-b-split",
    "layout",
    "kv_b_proj is split into all keys and all values instead of per head.",
    "Keys and values are mixed up for more than one head.",
)
SOFTMAX_LOW_PRECISION = Flag(
    "softmax-low-precision",
    "precision",
    "The softmax is computed in bfloat16, its sum included.",
    "The sum of many equal terms stops growing at 256.",
)
PRODUCTS_OVERFLOW = Flag(
    "products-overflow",
    "overflow",
    "Queries times keys are float16 before they are scaled.",
    "Beyond 65504 they are infinite, and the output is NaN.",
)
LAYER_KINDS = Flag(
    "layer-kinds",
    "index",
    "The first layer with experts is another one, or moe_layer_freq is not used, or counted from there.",
    "Layers have another kind, so weights are missing.",
)
MASK_SEGMENTS = Flag(
    "mask-segments",
    "omission",
    "Packed documents see each other, or positions run on over their boundary.",
    "All but the first document are wrong.",
)
SWIGLU_SWAPPED = Flag(
    "swiglu-swapped", "layout", "gate_proj and up_proj are exchanged.", "The activation is silu(up) * gate."
)
BIAS_IN_WEIGHTS = Flag(
    "bias-in-weights",
    "formula",
    "Routing weights are taken from the biased scores.",
    "The experts are right and their weights are 5% off.",
)
BIAS_ROUNDED = Flag(
    "bias-rounded",
    "precision",
    "The selection bias is stored in bfloat16.",
    "Near 12 its steps are 0.06, and most tokens get other experts.",
)
ZERO_MASK = Flag(
    "zero-mask",
    "formula",
    "Experts of dropped groups get 0 instead of minus infinity.",
    "Where kept experts have negative biased scores, dropped ones are chosen.",
)
GROUP_SCORE_MAX = Flag(
    "group-score-max",
    "formula",
    "A group's score is its largest biased score instead of the sum of the two largest.",
    "Half of the tokens get other experts.",
)
GROUP_UNBIASED = Flag(
    "group-unbiased",
    "formula",
    "Group scores are made without the bias.",
    "Almost all tokens get other experts.",
)
BIAS_BEFORE_SIGMOID = Flag(
    "bias-before-sigmoid", "formula", "The bias is added to the logits.", "Experts and weights are wrong."
)
NORM_TOPK = Flag(
    "norm-topk",
    "formula",
    "Chosen scores are normalised where they should not be, or not where they should.",
    "Routing weights are several times too large or too small.",
)
NORM_FLOOR = Flag(
    "norm-floor",
    "constant",
    "The sum of the chosen scores is clamped from below, or has a larger epsilon.",
    "Weights vanish for tokens whose scores are all tiny.",
)
TIE_ORDER = Flag(
    "tie-order",
    "order",
    "Equal scores are ordered by another rule.",
    "Harmless: such rows are counted, not judged.",
)
SCALING = Flag(
    "routed-scaling",
    "constant",
    "routed_scaling_factor is missing, applied twice, or applied to the shared experts.",
    "Routed and shared experts have the wrong proportion.",
)
SHARED_DROPPED = Flag(
    "shared-dropped",
    "omission",
    "The shared experts are not added.",
    "The output is that of the routed experts.",
)
SOFTMAX_AFTER_MASK = Flag(
    "softmax-after-mask",
    "order",
    "The softmax runs over the kept groups only.",
    "The experts are right and their weights are too large.",
)
TARGETS_SHIFTED = Flag(
    "targets-shifted",
    "shape",
    "Targets are shifted once more, or ignored ones count.",
    "The loss is another one.",
)
BIAS_NOT_FINITE = Flag(
    "bias-not-finite",
    "input",
    "A checkpoint with a selection bias that is not finite is accepted.",
    "The routing depends on the sorting algorithm: a popular small fixture is like that.",
)
FNUZ = Flag(
    "fn-vs-fnuz",
    "format",
    "Codes of the fn form are read as the fnuz form, or the other way round.",
    "Every value is half or twice as large, and the NaN is another code.",
)
SCALE_IGNORED = Flag(
    "scale-ignored",
    "omission",
    "Codes are cast without their scale, or their bytes are read as integers.",
    "Dequantised weights are thousands of times too large.",
)
SCALE_DIVIDED = Flag(
    "divide-by-scale-inv",
    "formula",
    "Values are divided by weight_scale_inv, whose name misleads.",
    "Dequantised weights are millions of times too large.",
)
LAST_BLOCK_LOST = Flag(
    "last-partial-block-lost",
    "shape",
    "The number of blocks is rounded down where the rows do not divide into 128.",
    "Rows 512 to 575 of kv_a_proj_with_mqa, all of the rotary key, have no scale of their own.",
)
GRID_TRANSPOSED = Flag(
    "scale-grid-transposed",
    "layout",
    "Scales are read as (columns, rows), or row-major where the kernel takes them column-major.",
    "With blocks of similar size the result is a few percent off only.",
)
UE8M0_AFTER = Flag(
    "ue8m0-round-after-quantise",
    "order",
    "Codes are made with the float32 scale, and the scale is rounded up to a power of two after that.",
    "Dequantised values are up to twice too large.",
)
UE8M0_TRUNCATED = Flag(
    "ue8m0-truncate",
    "formula",
    "The scale's exponent is taken without rounding up.",
    "Large values saturate; products are a quarter off.",
)
UE8M0_LOG2 = Flag(
    "ue8m0-log2-rounding",
    "precision",
    "The power of two is found by a logarithm in float32, which rounds, instead of by bits.",
    "Scales a few units above a power of two are half of what bits give.",
)
ZERO_TILE = Flag(
    "zero-block",
    "formula",
    "The largest value has no floor, or another one.",
    "Tiles of zeros become NaN, and tiny ones have another scale.",
)
ONE_SCALE_A_ROW = Flag(
    "per-token-instead-of-per-group",
    "shape",
    "There is one scale for a row instead of one for 128 of its columns.",
    "Hidden until the sizes in a row differ by a factor of 100000.",
)
SCALE_LOW_PRECISION = Flag(
    "scale-amax-in-low-precision",
    "precision",
    "The largest value or the scale is computed in bfloat16.",
    "Scales are up to 2^-8 off.",
)
SHORT_ACCUMULATOR = Flag(
    "short-accumulator",
    "precision",
    "The matrix unit accumulates over all of K, without promotion every 128.",
    "Errors of 0.1 to 10 percent at K = 7168, the larger the more terms have one sign.",
)
