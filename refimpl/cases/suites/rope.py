"""Suite rope: frequencies, tables and rotation, plain and with YaRN.  SPEC ROPE-1 to ROPE-7."""

from typing import Any

from refimpl.cases.definition import Definition, Draw, Given, Source, shaped
from refimpl.cases.suites import flags
from refimpl.cases.suites.common import LAYER, V3, pair
from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig

POSITIONS = Given((0, 1, 2, 17, 255, 300, 4000, 15962, 40001, 131071), "I64")
_PATH = f"{LAYER}.self_attn"
_PLAIN = shaped(V3, rope_scaling=None)
_YARN_FIELDS = V3.to_dict()["rope_scaling"]
_LONG = shaped(V3, rope_scaling=_YARN_FIELDS | {"original_max_position_embeddings": 40000})
_UNEQUAL = shaped(V3, rope_scaling=_YARN_FIELDS | {"mscale_all_dim": 0.707})
_ABSENT = {name: value for name, value in _YARN_FIELDS.items() if not name.startswith("mscale")}
_ALL = ("*.inv_freq", "*.cos", "*.sin", "*.softmax_scale")
_PE: dict[str, Source] = {"q_pe": Draw((10, 2, 64)), "k_pe": Draw((10, 1, 64)), "position_ids": POSITIONS}
_DPE: dict[str, Source] = {"dq_pe": Draw((10, 2, 64)), "dk_pe": Draw((10, 1, 64))}


def _tables(
    id: str,
    title: str,
    config: ModelConfig = V3,
    clauses: tuple[str, ...] = ("ROPE-2", "ROPE-5"),
    **more: Any,
) -> Definition:
    return Definition(
        f"rope/{id}",
        title,
        clauses,
        "rope_tables",
        config,
        {"position_ids": POSITIONS},
        path=_PATH,
        required=_ALL,
        **more,
    )


_YARN = ("ROPE-1", "ROPE-3", "ROPE-4", "ROPE-5")
_YARN_FLAGS = (flags.YARN_MISSING, flags.YARN_RANGE, flags.YARN_COS_SCALED, flags.SOFTMAX_SCALE)

CASES: tuple[Definition, ...] = (
    _tables("tables-plain", "Frequencies, cos and sin without YaRN", _PLAIN),
    _tables(
        "tables-yarn",
        "Frequencies, cos, sin and softmax scale with V3's YaRN",
        clauses=_YARN,
        flags=_YARN_FLAGS,
    ),
    _tables(
        "tables-yarn-short",
        "YaRN is in the configuration, but applies only beyond the original context",
        clauses=("ROPE-1",),
        choices=Choices(yarn_applies="beyond_original", max_seq_len=4096),
        flags=(flags.YARN_MISSING,),
    ),
    _tables(
        "tables-yarn-unequal",
        "mscale 1 and mscale_all_dim 0.707: cos and sin are scaled by their ratio",
        _UNEQUAL,
        _YARN,
        flags=(flags.MSCALE_NOT_ALL_DIM, flags.YARN_COS_SCALED),
    ),
    _tables(
        "tables-yarn-no-mscale",
        "YaRN without mscale and mscale_all_dim, as transformers understands it",
        shaped(V3, rope_scaling=_ABSENT),
        _YARN,
    ),
    _tables(
        "tables-yarn-long",
        "An original context of 40000, which 16 bits do not hold",
        _LONG,
        _YARN,
        flags=(flags.POSITION_NARROWED, flags.YARN_RANGE),
    ),
    *pair(
        "rope/yarn",
        "Rotation of neighbouring pairs at positions up to 131071, with YaRN",
        ("ROPE-5", "ROPE-6"),
        "rope",
        V3,
        _PE,
        dy=_DPE,
        backward_clauses=("ROPE-7",),
        path=_PATH,
        required=("*.q_pe", "*.k_pe"),
        flags=(flags.ROPE_HALF_SPLIT, flags.ROPE_ANGLE_LOW_PRECISION, flags.POSITION_NARROWED),
    ),
    *pair(
        "rope/plain",
        "Rotation of neighbouring pairs without YaRN",
        ("ROPE-5", "ROPE-6"),
        "rope",
        _PLAIN,
        _PE,
        dy=_DPE,
        backward_clauses=("ROPE-7",),
        path=_PATH,
        required=("*.q_pe", "*.k_pe"),
        flags=(flags.ROPE_HALF_SPLIT,),
    ),
    *pair(
        "rope/halves",
        "Rotation of halves, for weights that were permuted for it",
        ("ROPE-6",),
        "rope",
        shaped(V3, rope_interleave=False),
        _PE,
        dy=_DPE,
        backward_clauses=("ROPE-7",),
        path=_PATH,
        required=("*.q_pe", "*.k_pe"),
    ),
)
