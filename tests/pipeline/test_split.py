"""Where a network is cut into stages."""

from __future__ import annotations

from typing import Any

import pytest
from support import config, one_sentence

from refimpl.config.presets import preset
from refimpl.errors import Invalid
from refimpl.pipeline.split import SPREADS, name, split
from refimpl.units import units

UNITS = units(config(num_hidden_layers=5, num_nextn_predict_layers=2), 2)
NAMES = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(5)), "lm_head"]
MODULES = ["model.layers.5", "model.layers.6"]


def layers(stages: Any) -> list[int]:
    return [sum(unit.kind == "layer" for unit in own) for own in stages]


def named(stages: Any) -> list[list[str]]:
    return [[name(unit) for unit in own] for own in stages]


def test_layers_are_spread_evenly_and_the_ends_stay_with_them() -> None:
    assert named(split(UNITS, 2)) == [
        ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2"],
        ["model.layers.3", "model.layers.4", "lm_head", "model.layers.5", "model.layers.6"],
    ]
    assert named(split(UNITS, 1)) == [NAMES + MODULES]


@pytest.mark.parametrize("how", SPREADS)
@pytest.mark.parametrize("stages", range(1, 6))
def test_every_spread_is_a_partition_in_order(how: str, stages: int) -> None:
    found = split(UNITS, stages, how)
    assert [unit for own in found for unit in own] == UNITS
    assert len(found) == stages
    assert max(layers(found)) - min(layers(found)) <= 1
    assert layers(found) == sorted(layers(found), reverse=how == "more_first")


def test_the_released_model_over_16_stages() -> None:
    found = split(units(preset("deepseek-v3"), 1), 16)
    assert layers(found) == [4] * 13 + [3] * 3
    assert named(found)[-1] == [f"model.layers.{i}" for i in (58, 59, 60)] + ["lm_head", "model.layers.61"]


def test_numbers_are_decoder_layers() -> None:
    assert named(split(UNITS, 3, (0, 5, 0))) == [NAMES[:1], NAMES[1:6], [*NAMES[6:], *MODULES]]
    assert layers(split(UNITS, 3, [3, 1, 1])) == [3, 1, 1]


def test_names_are_any_partition() -> None:
    own = [[NAMES[0]], NAMES[1:4], NAMES[4:6], NAMES[6:], MODULES[:1], MODULES[1:]]
    assert named(split(UNITS, 6, own)) == own


@pytest.mark.parametrize(
    ("stages", "how", "fragments"),
    [
        (6, "more_first", ("6 stages", "5 decoder layers")),
        (0, "more_first", ("0 stages",)),
        (2, "even", ("'even'", "more_first, more_last")),
        (2, (5,), ("1 stages", "2 stages")),
        (2, 5, ("int",)),
        (2, (4, 2), ("4, 2", "add up to 5")),
        (2, (6, -1), ("-1", "at least 0")),
        (3, (2, 0, 3), ("stage 1", "no unit")),
        (2, (True, 4), ("stage 0", "True")),
        (2, (3, ["lm_head"]), ("stage 0", "3")),
        (2, ("model.embed_tokens", NAMES[1:]), ("stage 0", "'model.embed_tokens'")),
        (2, (NAMES[:3], NAMES[4:] + MODULES), ("stage 1", "'model.layers.3'", "next unit is model.layers.2")),
        (2, (NAMES[1::-1], NAMES[2:] + MODULES), ("stage 0", "'model.layers.0'", "model.embed_tokens")),
        (2, (NAMES[:3], NAMES[2:] + MODULES), ("stage 1", "'model.layers.1'")),
        (2, (NAMES, MODULES[:1]), ("model.layers.6", "every unit needs one")),
        (2, (NAMES + MODULES, ["lm_head"]), ("stage 1", "'lm_head'", "has its stage")),
        (2, (NAMES + MODULES, []), ("stage 1", "no unit")),
        (2, (NAMES + [7], MODULES), ("stage 0", "7")),
    ],
)
def test_what_is_no_split_is_refused(stages: int, how: Any, fragments: tuple[str, ...]) -> None:
    with pytest.raises(Invalid) as caught:
        split(UNITS, stages, how)
    one_sentence(caught, *fragments)
