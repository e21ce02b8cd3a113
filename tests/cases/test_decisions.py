"""Margins: how far a decision is from another one."""

from dataclasses import replace

import numpy as np
import pytest

from refimpl.cases import decisions
from refimpl.cases.claims import CLAIMS
from refimpl.cases.tolerances import Judges
from refimpl.config import Choices, preset
from refimpl.layers import gate

CONFIG = preset("tiny-v3")  # 16 experts in 4 groups, the 3 best of the 2 best groups
CHOICES = Choices()


def _sets(choice, config=CONFIG):
    return np.sort(gate.select(choice, config, CHOICES), -1)


@pytest.mark.parametrize("name", ["tiny-v3", "tiny-v2"])
def test_changes_below_half_the_margin_change_no_set(name):
    config = preset(name)
    rng = np.random.default_rng(0)
    choice = rng.uniform(size=(500, config.n_routed_experts))
    margin = decisions.margins(choice, config, CHOICES)
    for _ in range(20):
        signs = rng.choice([-1.0, 1.0], choice.shape)
        moved = choice + 0.4999 * margin[:, None] * signs
        assert np.array_equal(_sets(choice, config), _sets(moved, config))


def test_some_change_of_the_size_of_the_margin_changes_the_set():
    rng = np.random.default_rng(1)
    choice = rng.uniform(size=(200, 16))
    margin = decisions.margins(choice, CONFIG, CHOICES)
    changed = np.zeros(200, bool)
    for _ in range(300):
        moved = choice + 1.001 * margin[:, None] * rng.choice([-1.0, 1.0], choice.shape)
        changed |= (_sets(choice) != _sets(moved)).any(-1)
    assert changed.mean() > 0.95


def test_a_tie_has_no_margin():
    choice = np.zeros((1, 16))
    assert decisions.margins(choice, CONFIG, CHOICES) == 0.0


def test_where_every_expert_is_chosen_nothing_could_be_different():
    config = replace(CONFIG, n_group=1, topk_group=1, num_experts_per_tok=16)
    assert np.isinf(decisions.margins(np.ones((2, 16)), config, CHOICES)).all()


def test_the_doubt_counts_the_addition_of_the_bias():
    judges = Judges(arrays={"bound.storage": np.full((2, 16), 0.25)})
    choice = np.full((2, 16), 12.0)
    found = decisions.doubts(choice, choice, judges)
    assert (found["doubt.storage"] == 0.25).all()
    assert (found["doubt.accumulate"] == 24.0).all()
    assert CLAIMS["fp32"].accumulate * 24.0 > 1e-6  # the spacing of float32 near 12
