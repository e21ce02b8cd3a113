"""Suite mla: latent attention, naive form.  SPEC MLA-1 to MLA-9."""

import numpy as np

from refimpl.cases.definition import Definition, Draw, Given, shaped
from refimpl.cases.suites import flags
from refimpl.cases.suites.common import LAYER, V3, pair
from refimpl.config.choices import Choices

_CLAUSES = ("MLA-1", "MLA-2", "MLA-3", "MLA-4", "MLA-6", "MLA-7", "MLA-8")
_BACKWARD = ("MLA-5", "MLA-9")
_PATH = f"{LAYER}.self_attn"
_NARROW = shaped(V3, hidden_size=256)  # every width of the heads and latents is the model's
_FLAGS = (
    flags.SOFTMAX_SCALE,
    flags.VALUE_WIDTH,
    flags.KV_B_SPLIT,
    flags.NORM_OVER_576,
    flags.ROPE_HALF_SPLIT,
)
_YARN = _NARROW.to_dict()["rope_scaling"]
_UNEQUAL = shaped(_NARROW, rope_scaling=_YARN | {"mscale_all_dim": 0.707})
_EPSILON = shaped(_NARROW, rms_norm_eps=1e-5)
_SMALL = {"x": Draw((1, 16, 256), 2.0**-14)}  # latents of 0.01, where the epsilon matters
_SEGMENTS = np.array([[0] * 7 + [1] * 6 + [-1] * 3, [0] * 16])

CASES: tuple[Definition, ...] = (
    *pair(
        "mla/query-latent",
        "Two sequences of 16 tokens, with the query latent and YaRN",
        _CLAUSES,
        "mla",
        _NARROW,
        {"x": Draw((2, 16, 256))},
        dy=(2, 16, 256),
        backward_clauses=_BACKWARD,
        path=_PATH,
        flags=_FLAGS,
    ),
    *pair(
        "mla/no-query-latent",
        "Without the query latent, as in V2-Lite",
        _CLAUSES,
        "mla",
        shaped(_NARROW, q_lora_rank=None),
        {"x": Draw((1, 16, 256))},
        dy=(1, 16, 256),
        backward_clauses=_BACKWARD,
        path=_PATH,
        flags=_FLAGS,
    ),
    *pair(
        "mla/packed",
        "Packed documents and padding: each is what it is alone",
        (*_CLAUSES, "MASK-1", "MASK-2", "MASK-3", "MASK-4"),
        "mla",
        _NARROW,
        {"x": Draw((2, 16, 256)), "segment_ids": Given(_SEGMENTS, "I64")},
        dy=(2, 16, 256),
        backward_clauses=_BACKWARD,
        path=_PATH,
        flags=(flags.MASK_SEGMENTS,),
    ),
    Definition(
        "mla/far",
        "Positions from 40000 on: only their differences matter",
        (*_CLAUSES, "ROPE-5"),
        "mla",
        _NARROW,
        {"x": Draw((1, 16, 256)), "position_ids": Given(40000 + np.arange(16)[None], "I64")},
        path=_PATH,
        flags=(flags.POSITION_NARROWED, flags.ROPE_ANGLE_LOW_PRECISION),
    ),
    Definition(
        "mla/halves",
        "Rotary parts in halves, for weights that were permuted for it",
        (*_CLAUSES, "ROPE-6"),
        "mla",
        shaped(_NARROW, rope_interleave=False),
        {"x": Draw((1, 16, 256))},
        path=_PATH,
    ),
    Definition(
        "mla/yarn-short",
        "YaRN is in the configuration, but applies only beyond the original context",
        (*_CLAUSES, "ROPE-1"),
        "mla",
        _NARROW,
        {"x": Draw((1, 16, 256))},
        path=_PATH,
        choices=Choices(yarn_applies="beyond_original", max_seq_len=4096),
        flags=(flags.YARN_MISSING, flags.SOFTMAX_SCALE),
    ),
    Definition(
        "mla/yarn-unequal",
        "mscale 1 and mscale_all_dim 0.707: the first scales cos and sin, the second the logits",
        (*_CLAUSES, "ROPE-4"),
        "mla",
        _UNEQUAL,
        {"x": Draw((1, 16, 256))},
        path=_PATH,
        flags=(flags.MSCALE_NOT_ALL_DIM, flags.YARN_COS_SCALED),
    ),
    *pair(
        "mla/epsilon",
        "Small latents, and 1e-5 in the configuration: the norms of the latents have 1e-6",
        _CLAUSES,
        "mla",
        _EPSILON,
        _SMALL,
        dy=(1, 16, 256),
        backward_clauses=_BACKWARD,
        path=_PATH,
        flags=(flags.NORM_EPSILON,),
    ),
    Definition(
        "mla/epsilon-config",
        "Small latents, and the configuration's 1e-5 is also that of the latents' norms",
        _CLAUSES,
        "mla",
        _EPSILON,
        _SMALL,
        path=_PATH,
        choices=Choices(latent_norm_epsilon="config"),
        flags=(flags.NORM_EPSILON,),
    ),
    Definition(
        "mla/wide",
        "The hidden width 7168",
        _CLAUSES,
        "mla",
        V3,
        {"x": Draw((1, 16, 7168))},
        path=_PATH,
        flags=_FLAGS,
    ),
)
