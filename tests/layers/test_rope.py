"""Rotary positions with YaRN."""

import math

import mpmath
import numpy as np
import pytest
from support import BASE, EXACT, FLOAT64, TOLERANCE, YARN, bits, config, context, worst_gradient_error

from refimpl.config.choices import Choices
from refimpl.layers import rope
from refimpl.layers.rope import Tables

QUARTER = Tables(np.zeros((1, 1, 2)), np.ones((1, 1, 2)))  # every pair turned by 90 degrees
HF, OFFICIAL = Choices(), Choices.named("official")


def interleaved(yes: bool, **more):
    return config(qk_rope_head_dim=4, rope_interleave=yes, **more)


def tables(cfg, positions, ar=FLOAT64, choices=HF):
    return rope.tables(context(cfg=cfg, ar=ar, choices=choices), np.asarray(positions))


def turn(x, cfg, positions, ar=FLOAT64):
    return rope.forward(context(cfg=cfg, ar=ar), ar.array(x), tables(cfg, positions, ar))


def test_interleaved_pairs_are_neighbours() -> None:
    y = rope.forward(context(cfg=interleaved(True)), np.array([[[1.0, 2.0, 3.0, 4.0]]]), QUARTER)
    assert y.tolist() == [[[-2, 1, -4, 3]]]


def test_halved_pairs_are_half_a_width_apart() -> None:
    y = rope.forward(context(cfg=interleaved(False)), np.array([[[1.0, 2.0, 3.0, 4.0]]]), QUARTER)
    assert y.tolist() == [[[-3, -4, 1, 2]]]


def test_the_layouts_differ_by_a_permutation_only() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 2, 4))
    order = [0, 2, 1, 3]  # neighbours to halves
    halved = turn(x[..., order], interleaved(False), np.arange(5))
    assert bits(halved) == bits(turn(x, interleaved(True), np.arange(5))[..., order])


def test_position_zero_is_the_identity() -> None:
    x = np.random.default_rng(0).standard_normal((1, 2, 4))
    assert bits(turn(x, interleaved(True), [0])) == bits(x)


def test_products_depend_on_the_distance_only() -> None:
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 1, 1, 6))
    cfg = config()

    def product(at_query: int, at_key: int) -> float:
        return float((turn(q, cfg, [at_query]) * turn(k, cfg, [at_key])).sum())

    for distance in (0, 1, 7):
        for start in (0, 5, 40):
            assert product(start + distance, start) == pytest.approx(
                product(distance, 0), rel=1e-12, abs=1e-13
            )
    assert product(3, 0) != pytest.approx(product(0, 3), rel=1e-3)  # and on its sign


def test_lengths_are_kept() -> None:
    x = np.random.default_rng(2).standard_normal((9, 3, 6))
    y = turn(x, config(), np.arange(9) * 7)
    assert np.abs((y**2).sum(-1) - (x**2).sum(-1)).max() < 1e-13


def test_the_pairs_turn_independently() -> None:
    x = np.random.default_rng(2).standard_normal((4, 1, 6))
    changed = x.copy()
    changed[..., 2:4] += 1.0
    y, z = turn(x, config(), np.arange(4)), turn(changed, config(), np.arange(4))
    assert (y == z).all((0, 1)).tolist() == [True, True, False, False, True, True]


def test_backward_is_the_transpose_and_undoes_forward() -> None:
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((6, 2, 6)), rng.standard_normal((6, 2, 6))
    c, at = context(), tables(config(), np.arange(6))
    assert (rope.forward(c, x, at) * dy).sum() == pytest.approx(
        (x * rope.backward(c, dy, at)).sum(), rel=1e-13
    )
    assert np.abs(rope.backward(c, rope.forward(c, x, at), at) - x).max() < 1e-14


@pytest.mark.parametrize("layout", [True, False])
@pytest.mark.parametrize("yarn", [None, YARN | {"mscale": 1.3}])
def test_the_gradient_is_that_of_the_complex_step(layout: bool, yarn) -> None:
    cfg, rng = interleaved(layout, rope_scaling=yarn), np.random.default_rng(3)
    values, cotangent = {"x": rng.standard_normal((5, 2, 4))}, rng.standard_normal((5, 2, 4))
    dx = rope.backward(context(cfg=cfg), cotangent, tables(cfg, np.arange(5)))

    def forward(ar, at):
        return rope.forward(context(cfg=cfg, ar=ar), at["x"], tables(cfg, np.arange(5), ar))

    assert worst_gradient_error(forward, values, {"x": dx}, cotangent) <= TOLERANCE


class TestFrequencies:
    def test_without_yarn_they_are_powers_of_the_base(self) -> None:
        found = rope.inverse_frequencies(config(qk_rope_head_dim=8, rope_theta=10000.0), HF)
        with mpmath.workdps(40):
            expected = [float(mpmath.mpf(10000) ** (-mpmath.mpf(2 * m) / 8)) for m in range(4)]
        # exp of a rounded logarithm: its argument, at most 7, is off by an ulp or two, at most 2^-51
        assert np.abs(found / expected - 1).max() <= 2.0**-50
        assert found[0] == 1.0

    def test_yarn_keeps_the_fast_divides_the_slow_and_is_linear_between(self) -> None:
        cfg = config(qk_rope_head_dim=16, rope_theta=100.0, rope_scaling=YARN)
        # Pair m turns 16 / (2 pi 100^(m/8)) times in 16 tokens: 4 times at m < 0, once at 1.62: from 0 to 2.
        plain = rope.inverse_frequencies(config(qk_rope_head_dim=16, rope_theta=100.0), HF)
        ramp = np.array([0, 0.5, 1, 1, 1, 1, 1, 1])
        assert rope.inverse_frequencies(cfg, HF) == pytest.approx(
            plain * (1 - ramp) + plain / 4 * ramp, rel=1e-15
        )

    def test_v3_s_ramp_runs_from_10_to_23(self) -> None:
        """As in DeepSeek's code for base 10000, width 64, 4096 tokens, beta 32 and 1."""
        yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
        cfg = config(qk_rope_head_dim=64, rope_theta=10000.0, rope_scaling=yarn)
        assert rope.ramp_bounds(cfg.rope_scaling, 64, 10000.0) == (10.0, 23.0)

    def test_the_bounds_stay_inside_and_apart(self) -> None:
        few = YARN | {"original_max_position_embeddings": 2}  # nothing turns even once
        cfg = config(rope_scaling=few, max_position_embeddings=8)
        low, high = rope.ramp_bounds(cfg.rope_scaling, 6, 100.0)
        assert low == 0.0
        assert low < high <= 5.0
        many = YARN | {"original_max_position_embeddings": 10**9}
        cfg = config(rope_scaling=many)
        low, high = rope.ramp_bounds(cfg.rope_scaling, 6, 100.0)
        assert high <= 5.0 + 0.001
        assert np.isfinite(rope.inverse_frequencies(cfg, HF)).all()

    def test_factor_one_changes_nothing(self) -> None:
        same = config(rope_scaling=YARN | {"factor": 1.0})
        assert rope.inverse_frequencies(same, HF) == pytest.approx(
            rope.inverse_frequencies(config(), HF), rel=2.0**-51
        )
        assert rope.softmax_scale(same, HF) == rope.softmax_scale(config(), HF)
        assert rope.cos_sin_factor(same, HF) == 1.0


class TestWhenYarnApplies:
    def test_hf_applies_it_at_every_length(self) -> None:
        assert rope.yarn(config(rope_scaling=YARN, max_position_embeddings=16), HF) is not None

    @pytest.mark.parametrize(("longest", "applies"), [(16, False), (17, True)])
    def test_deepseek_s_code_only_beyond_the_original_context(self, longest: int, applies: bool) -> None:
        cfg = config(rope_scaling=YARN, max_position_embeddings=longest)
        assert (rope.yarn(cfg, OFFICIAL) is not None) == applies

    def test_where_it_does_not_apply_nothing_of_it_does(self) -> None:
        cfg = config(rope_scaling=YARN, max_position_embeddings=16)
        plain = config(max_position_embeddings=16)
        assert bits(rope.inverse_frequencies(cfg, OFFICIAL)) == bits(
            rope.inverse_frequencies(plain, OFFICIAL)
        )
        assert rope.softmax_scale(cfg, OFFICIAL) == rope.softmax_scale(plain, OFFICIAL)
        assert rope.cos_sin_factor(cfg, OFFICIAL) == 1.0


class TestFactors:
    def test_the_softmax_scale_is_that_of_the_whole_head_times_mscale_squared(self) -> None:
        assert rope.softmax_scale(config(), HF) == pytest.approx((4 + 6) ** -0.5, rel=1e-15)
        factor = 0.1 * 0.8 * math.log(4.0) + 1.0
        assert rope.softmax_scale(config(rope_scaling=YARN), HF) == pytest.approx(
            10**-0.5 * factor**2, rel=1e-15
        )

    def test_v3_s_softmax_scale(self) -> None:
        yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
        cfg = config(
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            rope_scaling=yarn | {"mscale": 1.0, "mscale_all_dim": 1.0},
        )
        assert rope.softmax_scale(cfg, HF) == pytest.approx(192**-0.5 * 1.3688879454113936**2, rel=1e-14)
        assert rope.cos_sin_factor(cfg, HF) == 1.0

    def test_cos_and_sin_are_scaled_by_the_ratio_of_the_mscales(self) -> None:
        cfg = config(rope_scaling=YARN | {"mscale": 1.3})
        ratio = (0.13 * math.log(4.0) + 1) / (0.08 * math.log(4.0) + 1)
        assert rope.cos_sin_factor(cfg, HF) == pytest.approx(ratio, rel=1e-15)
        assert tables(cfg, [0]).cos.reshape(-1) == pytest.approx([ratio] * 3)

    @pytest.mark.parametrize(
        ("given", "hf", "remote"),
        [({"mscale": 0.5, "mscale_all_dim": 0.0}, 0.1, 0.05), ({"mscale": 0.5}, 0.1, 0.05), ({}, 0.1, 0.1)],
    )
    def test_sources_differ_when_mscale_all_dim_is_absent_or_zero(
        self, given, hf: float, remote: float
    ) -> None:
        yarn = {k: v for k, v in YARN.items() if not k.startswith("mscale")} | given
        cfg = config(rope_scaling=yarn)
        assert rope.cos_sin_factor(cfg, HF) == pytest.approx(hf * math.log(4.0) + 1)
        assert rope.cos_sin_factor(cfg, HF.replace(yarn_mscale_zero="remote")) == pytest.approx(
            remote * math.log(4.0) + 1
        )
        assert rope.softmax_scale(cfg, HF) == rope.softmax_scale(config(), HF)

    @pytest.mark.parametrize(("given", "numerator"), [({}, 0.1), ({"mscale": 0.0}, 0.0)])
    def test_remote_divides_by_the_mscale_of_all_dimensions_when_only_that_is_there(
        self, given, numerator: float
    ) -> None:
        yarn = {k: v for k, v in YARN.items() if k != "mscale"} | given
        ratio = (numerator * math.log(4.0) + 1) / (0.08 * math.log(4.0) + 1)
        cfg = config(rope_scaling=yarn)
        assert rope.cos_sin_factor(cfg, HF.replace(yarn_mscale_zero="remote")) == pytest.approx(
            ratio, rel=1e-15
        )
        assert rope.cos_sin_factor(cfg, HF) == pytest.approx(0.1 * math.log(4.0) + 1)


def test_tables_are_correctly_rounded_functions_of_the_angle_in_exact() -> None:
    at = tables(config(), np.arange(40), EXACT)
    frequencies = rope.inverse_frequencies(config(), HF)
    for position in (0, 1, 7, 39):
        for m, frequency in enumerate(frequencies):
            with mpmath.workdps(60):
                angle = mpmath.mpf(float(position * frequency))
                assert at.cos[position, 0, m] == float(mpmath.cos(angle))
                assert at.sin[position, 0, m] == float(mpmath.sin(angle))


def test_the_base_configuration_has_no_yarn() -> None:
    assert "rope_scaling" not in BASE
