"""Suite attention: masks and the softmax core.  SPEC MASK-1 to MASK-4, MLA-6 to MLA-9."""

import numpy as np

from refimpl.cases.definition import Definition, Draw, Given, Source, shaped
from refimpl.cases.suites import flags
from refimpl.cases.suites.common import LAYER, V3, pair
from refimpl.numerics.arithmetic import Array

_PACKED = np.concatenate([np.repeat([0, 1, 2], [11, 1, 14]), np.full(6, -1)])[
    None
]  # the last six are padding


def _core(
    id: str, title: str, size: float, segments: Array, masks: tuple[str, ...]
) -> tuple[Definition, ...]:
    """`size`: queries are that many times as large as keys; the logits have a deviation of 1.26 times it."""
    tokens = segments.shape[1]
    inputs: dict[str, Source] = {
        "query": Draw((1, 2, tokens, 192), size * 2.0**-7),
        "key": Draw((1, 2, tokens, 192)),
        "value": Draw((1, 2, tokens, 128)),
        "segment_ids": Given(segments, "I64"),
    }
    return pair(
        f"attention/{id}",
        title,
        (*masks, "MLA-6", "MLA-7", "MLA-8"),
        "attention",
        V3,
        inputs,
        dy=(1, 2, tokens, 128),
        backward_clauses=("MLA-9",),
        path=f"{LAYER}.self_attn",
        required=("*.heads",),
        flags=(flags.SOFTMAX_SCALE, *((flags.MASK_SEGMENTS,) if masks else ())),
    )


_ONE = np.zeros((1, 32), np.int64)
CASES: tuple[Definition, ...] = (
    *_core("causal", "Causal attention, logits of standard deviation 1.3", 1.0, _ONE, ("MASK-3",)),
    *_core("sharp", "Causal attention, logits of standard deviation 5", 4.0, _ONE, ("MASK-3",)),
    *_core(
        "packed",
        "Three documents, one of a single token, and padding",
        2.0,
        _PACKED,
        ("MASK-1", "MASK-3", "MASK-4"),
    ),
    Definition(
        "attention/flat",
        "640 keys that count almost the same: a short sum would stop growing",
        ("MASK-3", "MLA-6", "MLA-7", "MLA-8"),
        "attention",
        shaped(V3, num_attention_heads=1),
        {
            "query": Draw((1, 1, 640, 192), 2.0**-12),
            "key": Draw((1, 1, 640, 192)),
            "value": Draw((1, 1, 640, 128)),
            "segment_ids": Given(np.zeros((1, 640), np.int64), "I64"),
        },
        path=f"{LAYER}.self_attn",
        required=("*.heads",),
        flags=(flags.SOFTMAX_LOW_PRECISION,),
    ),
    Definition(
        "attention/large",
        "Products of queries and keys up to 200000, beyond float16 before they are scaled",
        ("MASK-3", "MLA-6", "MLA-7", "MLA-8"),
        "attention",
        V3,
        {
            "query": Draw((1, 2, 32, 192), 64.0 * 2.0**-7),
            "key": Draw((1, 2, 32, 192), 64.0 * 2.0**-7),
            "value": Draw((1, 2, 32, 128)),
            "segment_ids": Given(_ONE, "I64"),
        },
        path=f"{LAYER}.self_attn",
        required=("*.heads",),
        flags=(flags.PRODUCTS_OVERFLOW,),
    ),
)
