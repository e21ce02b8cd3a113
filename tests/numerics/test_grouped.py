"""Grouped products: each group is a product of its own."""

import numpy as np
import pytest
from support import one_sentence
from test_gemm import bits, case

from refimpl.errors import Invalid
from refimpl.numerics.gemm import gemm_fp8
from refimpl.numerics.grouped import along_k, contiguous, masked


def experts(count: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    made = [case(20 + g, 1, n, k)[2:] for g in range(count)]
    return np.stack([b for b, _ in made]), np.stack([sb for _, sb in made])


class TestContiguous:
    def given(self) -> dict[str, np.ndarray]:
        a, sa, _, _ = case(0, 24, 1, 256)
        b, sb = experts(3, 130, 256)
        group = np.array([2] * 8 + [0] * 5 + [-1] * 3 + [2] * 1 + [-1] * 7)
        return {"a": a, "a_scale": sa, "b": b, "b_scale": sb, "group": group}

    def test_every_token_meets_its_expert(self) -> None:
        given = self.given()
        found = contiguous(**given, alignment=8)
        for t, g in enumerate(given["group"]):
            row = slice(t, t + 1)
            operands = given["a"][row], given["a_scale"][row], given["b"][g], given["b_scale"][g]
            expected = gemm_fp8(*operands, "deepgemm") if g >= 0 else np.zeros((1, 130), np.float32)
            assert (bits(found[row]) == bits(expected)).all()
        assert (contiguous(**given, alignment=8, kernel="exact") != found).any()
        assert contiguous(**given, alignment=8, out="bf16").dtype == np.uint16

    def test_a_tile_must_not_be_mixed(self) -> None:
        given = self.given()
        for at, value in ((3, 1), (13, 0), (0, -1)):
            group = given["group"].copy()
            group[at], group[14 if at == 13 else at] = value, value if at != 13 else 1
            with pytest.raises(Invalid) as caught:
                contiguous(**{**given, "group": group}, alignment=8)
            one_sentence(caught, "group mixes", "a tile of 8 rows")

    @pytest.mark.parametrize(
        ("name", "value", "fragment"),
        [
            ("group", np.zeros(23, int), "24 integers"),
            ("group", np.zeros(24), "24 integers"),
            ("group", np.full(24, 3), "below 3"),
            ("group", np.full(24, -2), "-1 or below 3"),
            ("b", np.zeros((130, 256), np.uint8), "three axes"),
            ("b_scale", np.zeros((2, 2, 2), np.float32), "must be 3"),
            ("a_scale", np.zeros((2, 2), np.float32), "must be 24"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, name: str, value: np.ndarray, fragment: str) -> None:
        with pytest.raises(Invalid) as caught:
            contiguous(**{**self.given(), name: value}, alignment=8)
        one_sentence(caught, name, fragment)


class TestMasked:
    def given(self) -> dict[str, np.ndarray]:
        tokens = [case(g, 6, 1, 256)[:2] for g in range(3)]
        b, sb = experts(3, 5, 256)
        return {
            "a": np.stack([a for a, _ in tokens]),
            "a_scale": np.stack([sa for _, sa in tokens]),
            "b": b,
            "b_scale": sb,
            "counts": np.array([4, 0, 6]),
        }

    def test_each_expert_has_its_first_rows(self) -> None:
        given = self.given()
        found = masked(**given)
        for g, count in enumerate(given["counts"]):
            operands = [given[name][g] for name in ("a", "a_scale", "b", "b_scale")]
            assert (found[g, :count] == gemm_fp8(*operands, "deepgemm")[:count]).all()
            assert not bits(found[g, count:]).any()
        assert masked(**given, out="bf16").dtype == np.uint16

    def test_what_does_not_fit_is_refused(self) -> None:
        for name, value, fragment in (
            ("counts", np.array([4, 0, 7]), "from 0 to 6"),
            ("counts", np.array([4, 0]), "must be 3"),
            ("a", np.zeros((2, 6, 256), np.uint8), "(3, T, K)"),
        ):
            with pytest.raises(Invalid) as caught:
                masked(**{**self.given(), name: value})
            one_sentence(caught, name, fragment)


class TestAlongK:
    def given(self) -> dict[str, np.ndarray]:
        a, sa, b, _ = case(1, 3, 4, 512)
        sb = np.random.default_rng(2).uniform(0.5, 2, (4, 4)).astype(np.float32)
        return {"a": a, "a_scale": sa, "b": b, "b_scale": sb}

    def test_every_group_reduces_over_its_tokens_and_adds_to_its_gradient(self) -> None:
        given = self.given()
        c = np.random.default_rng(3).standard_normal((3, 3, 4)).astype(np.float32) * 1e4
        found = along_k(**given, sizes=[256, 0, 256], c=c)
        a, sa, b, sb = given.values()
        first = gemm_fp8(a[:, :256], sa[:, :2], b[:, :256], sb[:, :2], "deepgemm")
        last = gemm_fp8(a[:, 256:], sa[:, 2:], b[:, 256:], sb[:, 2:], "deepgemm")
        assert (found == np.stack([c[0] + first, c[1], c[2] + last])).all()
        alone = along_k(**given, sizes=[256, 0, 256])
        assert (alone == np.stack([first, 0 * first, last])).all()

    def test_what_does_not_fit_is_refused(self) -> None:
        c = np.zeros((2, 3, 4))
        for changes, fragments in (
            ({"sizes": [256, 255]}, ("sizes is", "multiple of 128")),
            ({"sizes": [256, 128]}, ("sizes add up to 384", "512")),
            ({"sizes": [256, 256], "c": c}, ("c is float64", "float32 of shape (2, 3, 4)")),
            ({"sizes": [512], "b_scale": np.ones((1, 4), np.float32)}, ("b_scale", "(4, 4)")),
        ):
            with pytest.raises(Invalid) as caught:
                along_k(**{**self.given(), **changes})
            one_sentence(caught, *fragments)
