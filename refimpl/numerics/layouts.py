"""The layouts of scales that kernels take.  SPEC LAYOUT-1 to LAYOUT-4.

LAYOUT-1, row-major: float32 (M, G), G tiles along the contracted axis; what `blockscale` makes.

LAYOUT-2, column-major, aligned for the tensor memory accelerator: float32 (G, M'), M' the next multiple of 4
(16 bytes) from M; row g holds the scales of tile g.  DeepGEMM sees it as (M, G) with strides (1, M').  What
pads it is zero here and left open there.

LAYOUT-3, UE8M0 codes: uint8 (M, G), the exponent field of a scale that is a power of two.

LAYOUT-4, four UE8M0 in a word, aligned: int32 (ceil(G / 4), M'); tile 4 w + i is byte i, from the lowest up,
of word w.  Tiles beyond G and rows beyond M are zero.
"""

import numpy as np
from numpy.typing import NDArray

from refimpl.errors import Invalid
from refimpl.numerics.formats import UE8M0, decode

Single = NDArray[np.float32]

_ALIGNMENT = 4  # float32 or int32 in 16 bytes


def aligned(rows: int) -> int:
    """M' of M.  SPEC LAYOUT-2."""
    return -(-rows // _ALIGNMENT) * _ALIGNMENT


def to_columns(scales: Single) -> Single:
    """Scales (M, G)  ->  (G, M').  SPEC LAYOUT-2."""
    _require_matrix(scales, np.float32, "scales")
    columns = np.zeros((scales.shape[1], aligned(scales.shape[0])), np.float32)
    columns[:, : scales.shape[0]] = scales.T
    return columns


def from_columns(columns: Single, rows: int) -> Single:
    """(G, M')  ->  scales (M, G), M = `rows`.  SPEC LAYOUT-2.  Raises Invalid."""
    _require_matrix(columns, np.float32, "columns")
    _require_rows(columns, rows)
    return np.ascontiguousarray(columns[:, :rows].T)


def to_ue8m0(scales: Single, what: str = "scales") -> NDArray[np.uint8]:
    """Scales (...), powers of two  ->  codes (...).  SPEC LAYOUT-3.  Raises Invalid for other scales."""
    scales = np.asarray(scales, np.float32)
    codes = (scales.view(np.uint32) >> np.uint32(23)).astype(np.uint8)
    exact = (from_ue8m0(codes) == scales) & (codes < UE8M0.nan)
    if not exact.all():
        index = tuple(int(i) for i in np.argwhere(~exact)[0])
        raise Invalid(f"{what} have {scales[index]} at {index}, but all must be powers of two.")
    return codes


def from_ue8m0(codes: NDArray[np.uint8]) -> Single:
    """Codes (...)  ->  scales (...), NaN for 255.  SPEC LAYOUT-3."""
    return decode(codes, UE8M0).astype(np.float32)


def pack(codes: NDArray[np.uint8]) -> NDArray[np.int32]:
    """UE8M0 codes (M, G)  ->  words (ceil(G / 4), M').  SPEC LAYOUT-4."""
    _require_matrix(codes, np.uint8, "codes")
    rows, tiles = codes.shape
    padded = np.zeros((aligned(rows), -(-tiles // 4) * 4), np.uint8)
    padded[:rows, :tiles] = codes
    return np.ascontiguousarray(padded.view("<i4").T).astype(np.int32, copy=False)


def unpack(words: NDArray[np.int32], rows: int, tiles: int) -> NDArray[np.uint8]:
    """Words (ceil(G / 4), M')  ->  UE8M0 codes (M, G), M = `rows`, G = `tiles`.  SPEC LAYOUT-4."""
    _require_matrix(words, np.int32, "words")
    _require_rows(words, rows)
    if words.shape[0] != -(-tiles // 4):
        raise Invalid(f"words have shape {words.shape}, but {tiles} tiles must have {-(-tiles // 4)} rows.")
    codes = np.ascontiguousarray(words.T).astype("<i4", copy=False).view(np.uint8)
    return np.ascontiguousarray(codes[:rows, :tiles])


def _require_matrix(array: NDArray[np.generic], dtype: type[np.generic], what: str) -> None:
    if array.ndim != 2 or array.dtype != dtype:
        raise Invalid(f"{what} are {array.dtype} {array.shape}, but they must be a {np.dtype(dtype)} matrix.")


def _require_rows(array: NDArray[np.generic], rows: int) -> None:
    if array.shape[1] != aligned(rows):
        raise Invalid(
            f"the layout has shape {array.shape}, but for {rows} rows it must have {aligned(rows)} columns."
        )
