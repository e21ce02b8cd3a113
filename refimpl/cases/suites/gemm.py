"""Suite gemm: block-scaled products at the checkpoint's shapes, for every kernel.  SPEC GEMM-1 to GEMM-7."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.cases.bits import Bits, Codes, Drawn, Source, Whole
from refimpl.cases.suites import flags

_KERNELS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("deepgemm", {"kernel": "deepgemm"}),
    ("triton-wgmma", {"kernel": "triton_wgmma"}),
    ("triton-mma", {"kernel": "triton_mma"}),
    ("cublas-split-2", {"kernel": "cublas", "split": 2}),
    ("promote-fp32", {"kernel": "promote_fp32"}),
    ("exact", {"kernel": "exact"}),
)
_HOPPER = _KERNELS[:3]
_ALL = (*_KERNELS, ("unpromoted", {"kernel": "unpromoted"}))


def _scales(shape: tuple[int, ...]) -> Whole:
    """float32 with all their bits, from 2^-14 to 2^-10."""
    return Whole(shape, "F32", 1 << 20, 1 << 24, 2.0**-34)


def _inputs(m: int, n: int, k: int) -> dict[str, Source]:
    return {
        "a": Drawn((m, k)),
        "a_scale": _scales((m, k // 128)),
        "b": Drawn((n, k)),
        "b_scale": _scales((-(-n // 128), k // 128)),
    }


def _shape(
    m: int, n: int, k: int, what: str, kernels: tuple[tuple[str, dict[str, Any]], ...]
) -> tuple[Bits, ...]:
    id = f"gemm/{m}x{n}x{k}"
    return tuple(
        Bits(
            f"{id}-{name}",
            f"{what}: ({m}, {k}) by ({n}, {k}) in tiles of 1x128 and blocks of 128x128, as {name}",
            ("GEMM-2" if name == "exact" else "GEMM-1", "GEMM-4"),
            "gemm_fp8",
            _inputs(m, n, k),
            arguments,
            streams=id,
            flags=(
                *((flags.SHORT_ACCUMULATOR,) if name != "unpromoted" else ()),
                flags.GRID_TRANSPOSED,
                *((flags.LAST_BLOCK_LOST,) if n % 128 else ()),
            ),
        )
        for name, arguments in kernels
    )


def _tensor(accumulation: str, split: int) -> Bits:
    id, (m, n, k) = "gemm/tensor", (64, 256, 2048)
    inputs: dict[str, Source] = {"a": Drawn((m, k)), "a_scale": _scales((1,))}
    inputs |= {"b": Drawn((n, k)), "b_scale": _scales((1,))}
    suffix = f"{accumulation}-split-{split}" if split > 1 else accumulation
    return Bits(
        f"{id}-{suffix}",
        f"One scale for each operand, ({m}, {k}) by ({n}, {k}), accumulation {accumulation}, K in {split}",
        ("GEMM-3", "GEMM-4"),
        "gemm_fp8",
        inputs,
        {"kernel": "cublas_tensor", "accumulation": accumulation, "split": split},
        streams=id,
    )


_K = 512
_GROUPED: dict[str, Source] = {"b": Drawn((3, 256, _K)), "b_scale": _scales((3, 2, _K // 128))}
_GROUP = np.repeat([0, 1, -1, 2, -1], [128, 100, 28, 7, 121]).astype(np.int32)  # one expert has 7 tokens

CASES: tuple[Bits, ...] = (
    *_shape(64, 576, 7168, "kv_a_proj_with_mqa, whose 576 rows no block divides", _KERNELS),
    *_shape(16, 2112, 7168, "q_a_proj and kv_a_proj_with_mqa together, 2112 rows", _HOPPER),
    *_shape(16, 2048, 2048, "The experts' down_proj, K = 2048, of 2048 of its rows", _ALL),
    *_shape(16, 256, 18432, "The dense down_proj, K = 18432, of 256 of its rows", _HOPPER),
    _tensor("fast", 1),
    _tensor("blocks", 1),
    _tensor("fast", 2),
    _tensor("blocks", 2),
    Bits(
        "gemm/contiguous",
        "Three experts with 128, 100 and 7 tokens, one after another in tiles of 128 rows; padding is zero",
        ("GEMM-1", "GEMM-5"),
        "gemm_contiguous",
        {
            "a": Drawn((384, _K)),
            "a_scale": _scales((384, _K // 128)),
            **_GROUPED,
            "group": Codes(_GROUP, "I32"),
        },
        {"kernel": "deepgemm"},
    ),
    Bits(
        "gemm/masked",
        "Three experts of at most 64 tokens, of which 64, 5 and none are there; the rest is zero",
        ("GEMM-1", "GEMM-6"),
        "gemm_masked",
        {
            "a": Drawn((3, 64, _K)),
            "a_scale": _scales((3, 64, _K // 128)),
            **_GROUPED,
            "counts": Codes(np.array([64, 5, 0], np.int32), "I32"),
        },
        {"kernel": "deepgemm"},
    ),
    Bits(
        "gemm/along-k",
        "Weight gradients of three experts with 256, 0 and 128 tokens, added to what is there",
        ("GEMM-1", "GEMM-7"),
        "gemm_along_k",
        {
            "a": Drawn((128, 384)),
            "a_scale": _scales((128, 3)),
            "b": Drawn((256, 384)),
            "b_scale": _scales((256, 3)),
            "c": Drawn((3, 128, 256), "F32", 2.0**-20, 4),
        },
        {"sizes": [256, 0, 128], "kernel": "deepgemm"},
    ),
)
