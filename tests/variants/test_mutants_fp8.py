"""Mistakes with codes and scales, on numbers by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl.cases.instruments import Data, run
from refimpl.numerics.formats import E4M3, E4M3FNUZ, decode, encode
from refimpl.variants.mutants import BITS_MUTANTS

VALUES = decode(np.arange(256, dtype=np.uint8), E4M3)


def wrong(id: str, component: str, codes: dict[str, np.ndarray], **arguments: Any) -> dict[str, np.ndarray]:
    with np.errstate(all="ignore"):
        return dict(BITS_MUTANTS[id].runs[component](data(codes, **arguments)))


def data(codes: dict[str, np.ndarray], **arguments: Any) -> Data:
    return Data(codes, {n: "F32" if c.dtype == np.uint32 else "F8_E4M3" for n, c in codes.items()}, arguments)


def weight(rows: int, columns: int, step: float) -> dict[str, np.ndarray]:
    """Codes of 1 with the scales 1, 1 + step, 1 + 2 step, ... of the grid, row by row."""
    grid = (-(-rows // 128), -(-columns // 128))
    scales = (1.0 + step * np.arange(grid[0] * grid[1])).reshape(grid).astype(np.float32)
    return {"codes": np.full((rows, columns), encode(1.0, E4M3)), "scales": scales.view(np.uint32)}


def value(id: str, codes: dict[str, np.ndarray]) -> np.ndarray:
    return wrong(id, "dequantise", codes, tile=[128, 128])["value"]


@pytest.mark.parametrize(
    ("id", "expected"),
    [("F01a", [[1.0, 1.0]]), ("F01b", [[56.0, 56.0]]), ("F02", [[1.0, 0.8]]), ("F10", [[0.5, 0.625]])],
)
def test_values_of_a_row_of_two_blocks(id: str, expected: list[list[float]]) -> None:
    found = value(id, weight(1, 256, 0.25))
    assert found[:, ::128] == pytest.approx(np.array(expected), rel=1e-7)


def test_f03_reads_the_scale_before_for_the_last_partial_block() -> None:
    found = value("F03", weight(320, 128, 1.0))
    assert found[[0, 127, 128, 255, 256, 319], 0].tolist() == [1, 1, 2, 2, 2, 2]


def test_f04_reads_the_grid_by_columns() -> None:
    found = value("F04", weight(256, 384, 1.0))
    assert found[::128, ::128].tolist() == [[1, 3, 5], [2, 4, 6]]


def test_f08_has_powers_of_two_and_fewer_values() -> None:
    codes = weight(1, 128, 0.0)
    codes["scales"] = np.full((1, 1), 3.0, np.float32).view(np.uint32)
    codes["codes"] = np.full((1, 128), encode(448.0, E4M3))
    codes["codes"][0, 1] = encode(15.0, E4M3)
    # with the scale 4: 336 is a tie of 320 and 352 and goes to even, 11.25 is nearest to 11
    assert value("F08", codes)[0, :2].tolist() == [1280.0, 44.0]


def test_f15_counts_blocks_from_the_shard() -> None:
    found = value("F15", weight(576, 128, 1.0))
    # 192 to 319 are the first 128 rows of the second shard, which begins in block 1
    assert found[[0, 128, 191, 192, 319, 320, 383, 384, 511, 512], 0].tolist() == [
        1,
        2,
        2,
        2,
        2,
        3,
        3,
        4,
        4,
        5,
    ]


def test_x04_rounds_scales_and_values_to_bf16() -> None:
    found = value("X04", weight(1, 128, 0.0) | {"scales": np.full((1, 1), 1.01, np.float32).view(np.uint32)})
    assert found[0, 0] == 1.0078125


def quantised(id: str, x: np.ndarray, recipe: str) -> tuple[np.ndarray, np.ndarray]:
    made = wrong(id, "quantise", {"x": x.astype(np.float32).view(np.uint32)}, recipe=recipe, tile=[1, 128])
    return decode(made["codes"], E4M3), made["scales"]


def tile(largest: float, other: float) -> np.ndarray:
    x = np.zeros((1, 128), np.float32)
    x[0, :2] = largest, other
    return x


def test_f05_rounds_the_scale_after_the_codes() -> None:
    values, scales = quantised("F05", tile(1344.0, 336.0), "ue8m0")
    assert values[0, :2].tolist() == [448, 112]
    assert scales.tolist() == [[4.0]]


def test_f06_rounds_the_scale_down() -> None:
    values, scales = quantised("F06", tile(1344.0, 336.0), "ue8m0")
    assert values[0, :2].tolist() == [448, 160]  # 672 saturates, and 168 is a tie of 160 and 176
    assert scales.tolist() == [[2.0]]


def test_f07_takes_a_few_units_above_a_power_for_the_power() -> None:
    largest = np.nextafter(np.float32(448.0 * 2.0**8), np.float32(np.inf))
    right = run("quantise", data({"x": tile(largest, 1.0).view(np.uint32)}, recipe="ue8m0", tile=[1, 128]))
    assert right["scales"].array.tolist() == [[512.0]]
    assert quantised("F07", tile(largest, 1.0), "ue8m0")[1].tolist() == [[256.0]]


def test_f09_has_no_floor_or_a_lower_one() -> None:
    assert np.isnan(quantised("F09a", np.zeros((1, 128)), "ieee")[0]).all()
    assert quantised("F09b", tile(1e-5, 0.0), "ieee")[1] == pytest.approx(1e-5 / 448, rel=1e-6)


def test_f10_reads_codes_as_the_other_form() -> None:
    codes = {"codes": np.arange(256, dtype=np.uint8)}
    found = wrong("F10", "decode", codes, format="e4m3")["value"]
    assert np.array_equal(found, decode(codes["codes"], E4M3FNUZ), equal_nan=True)
    assert found[1] == VALUES[1] / 2
    assert np.isnan(found[0x80])
    assert wrong("F10", "decode", codes, format="bf16") == {}


def test_f11_has_one_scale_for_a_row() -> None:
    x = np.zeros((1, 256), np.float32)
    x[0, 0], x[0, 128] = 448.0, 4.48
    values, scales = quantised("F11", x, "ieee")
    assert scales.tolist() == [[1.0, 1.0]]
    assert values[0, 128] == 4.5


def test_f12_never_promotes() -> None:
    ones = np.full((1, 4096), encode(1.0, E4M3))
    tiny = ones.copy()
    tiny[0, 1024:] = encode(2.0**-9, E4M3)
    one = np.ones(1, np.float32).view(np.uint32)
    codes = {"a": tiny, "a_scale": one, "b": ones, "b_scale": one}
    how = {"kernel": "cublas_tensor", "accumulation": "blocks", "split": 1}
    right = run("gemm_fp8", data(codes, **how))["d"].array
    assert right.tolist() == [[1024.0 + 3072 * 2.0**-9]]
    assert wrong("F12", "gemm_fp8", codes, **how)["d"].tolist() != right.tolist()


def test_f14_rounds_the_scale_to_bf16() -> None:
    _, scales = quantised("F14", tile(448.0 * 1.01, 1.0), "ieee")
    assert scales.tolist() == [[1.0078125]]


@pytest.mark.parametrize("id", ["F05", "F06", "F07"])
def test_recipes_without_powers_are_left_alone(id: str) -> None:
    made = wrong(id, "quantise", {"x": tile(3.0, 1.0).view(np.uint32)}, recipe="ieee", tile=[1, 128])
    assert made == {}
