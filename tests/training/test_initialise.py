"""Initial weights."""

import numpy as np
import pytest
from support import config

from refimpl import TrainingConfig
from refimpl.checkpoint import names
from refimpl.training.initialise import FIELDS, initialise

CFG = config(num_nextn_predict_layers=1, vocab_size=400, hidden_size=64)


def test_every_matrix_has_the_deviation_and_the_mean_zero() -> None:
    """Of n values the deviation is sigma / sqrt(2 n) off, and the mean sigma / sqrt(n)."""
    made = initialise(CFG, TrainingConfig(initializer_std=0.006), 3)
    large = {n: w for n, w in made.items() if w.ndim == 2}
    for name, w in large.items():
        assert abs(w.mean()) < 5 * 0.006 / np.sqrt(w.size), name
        assert abs(w.std() / 0.006 - 1) < 5 / np.sqrt(2 * w.size), name
    every = np.concatenate([w.reshape(-1) for w in large.values()])
    assert abs(every.std() / 0.006 - 1) < 5 / np.sqrt(2 * every.size)


def test_the_deviation_is_exactly_that_of_the_distribution() -> None:
    """Each field is the sum of two uniform signed bytes; the mean of the sum is taken away."""
    byte = np.arange(-128, 128)
    variance = FIELDS * 2 * (byte.astype(float) ** 2).mean() - FIELDS * 2 * byte.mean() ** 2
    w = initialise(CFG, TrainingConfig(initializer_std=0.5), 0)[names.EMBEDDING]
    units = w / (0.5 / np.sqrt(variance))
    assert units == pytest.approx(np.round(units), abs=1e-9)
    assert np.abs(units).max() <= 256 * FIELDS


def test_gains_are_one_and_selection_biases_zero() -> None:
    made = initialise(CFG, TrainingConfig(), 0)
    for name, spec in names.parameters(CFG).items():
        assert made[name].shape == spec.shape
        if spec.role == "gain":
            assert (made[name] == 1).all()
        if spec.role == "bias":
            assert not made[name].any()


def test_a_value_depends_on_the_seed_and_the_name_alone() -> None:
    one, same, other = (initialise(CFG, TrainingConfig(), seed) for seed in (0, 0, 1))
    shallow = initialise(config(vocab_size=400, hidden_size=64, num_hidden_layers=3), TrainingConfig(), 0)
    assert (one[names.HEAD] == same[names.HEAD]).all()
    assert (one[names.HEAD] != other[names.HEAD]).any()
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert (one[name] == shallow[name]).all()
    assert (one[name] != one[name.replace("2", "3")]).any()
