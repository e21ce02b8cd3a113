"""What changes in the course of a run."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl import TrainingConfig
from refimpl.training import schedules
from refimpl.training.schedules import CONTEXT_EXTENSION, V2, V2_LITE, V3, batch_sequences, learning_rate

T = 10**12  # tokens
LATE = 10**6  # steps


class TestV3:
    def test_the_rise_is_linear_and_begins_at_one_part(self) -> None:
        assert learning_rate(V3, 0, 0) == 2.2e-4 / 2000
        assert learning_rate(V3, 999, 0) == 2.2e-4 * 0.5
        assert learning_rate(V3, 1999, 0) == learning_rate(V3, 2000, 0) == 2.2e-4

    @pytest.mark.parametrize(
        ("tokens", "rate"),
        [
            (10 * T - 1, 2.2e-4),
            (10 * T, 2.2e-4),
            (10 * T + 4_300_000_000_000 // 2, (2.2e-4 + 2.2e-5) / 2),
            (14_300_000_000_000, 2.2e-5),
            (14_633_000_000_000 - 1, 2.2e-5),
            (14_633_000_000_000, 7.3e-6),
            (14_800_000_000_000, 7.3e-6),
        ],
    )
    def test_constant_then_cosine_then_two_constants(self, tokens: int, rate: float) -> None:
        assert learning_rate(V3, LATE, tokens) == pytest.approx(rate, rel=1e-12)

    @given(st.integers(0, 4_300_000_000_000 - 1))
    def test_the_cosine_is_the_cosine(self, into: int) -> None:
        half = 0.5 * (1 + math.cos(math.pi * into / 4_300_000_000_000))
        expected = 2.2e-5 + (2.2e-4 - 2.2e-5) * half
        assert learning_rate(V3, LATE, 10 * T + into) == pytest.approx(expected, rel=1e-14)

    @given(st.integers(0, 15 * T), st.integers(0, 10**11))
    def test_the_rate_never_rises_after_the_warm_up(self, tokens: int, more: int) -> None:
        assert learning_rate(V3, LATE, tokens + more) <= learning_rate(V3, LATE, tokens)

    def test_the_batch_rises_over_469b_tokens(self) -> None:
        assert batch_sequences(V3, 0) == 3072
        assert batch_sequences(V3, 469_000_000_000 // 2) == (3072 + 15360) // 2
        assert batch_sequences(V3, 469_000_000_000 - 1) == 15359
        assert batch_sequences(V3, 469_000_000_000) == batch_sequences(V3, 10 * T) == 15360

    def test_lambda_and_gamma_have_two_phases(self) -> None:
        assert (V3.at(0).mtp_loss_weight, V3.at(0).bias_update_speed) == (0.3, 0.001)
        assert V3.at(10 * T - 1).mtp_loss_weight == 0.3
        assert V3.at(10 * T).mtp_loss_weight == 0.1
        assert V3.at(14_300_000_000_000 - 1).bias_update_speed == 0.001
        assert V3.at(14_300_000_000_000).bias_update_speed == 0.0

    def test_both_context_phases_read_as_many_tokens_a_step(self) -> None:
        assert [phase.sequence_length for phase in CONTEXT_EXTENSION] == [32768, 131072]
        assert {phase.tokens for phase in CONTEXT_EXTENSION} == {62_914_560_000}


class TestV2:
    @pytest.mark.parametrize(
        ("training", "shares", "peak"), [(V2, (0.6, 0.9), 2.4e-4), (V2_LITE, (0.8, 0.9), 4.2e-4)]
    )
    def test_the_rate_falls_twice(
        self, training: TrainingConfig, shares: tuple[float, float], peak: float
    ) -> None:
        at = [round(share * training.total_tokens) for share in shares]
        assert learning_rate(training, LATE, at[0] - 1) == peak
        assert learning_rate(training, LATE, at[0]) == pytest.approx(0.316 * peak)
        assert learning_rate(training, LATE, at[1]) == pytest.approx(0.316 * 0.316 * peak)

    def test_the_batch_of_the_lite_model_does_not_rise(self) -> None:
        assert {batch_sequences(V2_LITE, tokens) for tokens in (0, 1, 10 * T)} == {4608}
        assert (batch_sequences(V2, 0), batch_sequences(V2, 225_000_000_000)) == (2304, 9216)


def test_a_constant_rate_keeps_its_rise() -> None:
    training = TrainingConfig(learning_rate_schedule="constant", learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(training, n, 10**15) for n in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_no_warm_up_begins_at_the_peak() -> None:
    assert learning_rate(TrainingConfig(warmup_steps=0), 0, 0) == schedules.V3.learning_rate
