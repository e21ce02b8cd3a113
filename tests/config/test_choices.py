"""Choices, their table and their profiles.  SPEC CHOICE-1."""

import dataclasses
import json
import re

import pytest

from refimpl.config import CHOICES, PROFILES, Choices, preset
from refimpl.errors import Invalid


def test_every_field_is_in_the_table_with_its_default():
    assert [item.name for item in dataclasses.fields(Choices)] == [choice.name for choice in CHOICES]
    for choice in CHOICES:
        assert getattr(Choices(), choice.name) == choice.default
        assert choice.question.endswith("?")
        assert choice.reason
        assert all(choice.alternatives.values())


def test_the_default_profile_is_hf():
    assert Choices.named("hf") == Choices()
    assert set(PROFILES) == {"hf", "official", "report", "megatron"}


def test_every_alternative_is_allowed_and_printed():
    for choice in CHOICES:
        for value in choice.alternatives:
            given = None if value == "null" else value
            assert getattr(Choices().replace(**{choice.name: given}), choice.name) == given
        assert ("null" if choice.default is None else choice.default) in choice.alternatives


@pytest.mark.parametrize("name", [choice.name for choice in CHOICES])
@pytest.mark.parametrize("value", ["something", True, -1, 0, 2.5, []])
def test_a_wrong_value_is_refused_with_what_is_allowed(name, value):
    if (name, value) == ("topk_norm_epsilon", 0) and isinstance(value, float):
        return
    with pytest.raises(Invalid, match=rf"^choice {name} is .*, but it must be .*\.$"):
        Choices().replace(**{name: value})


def test_a_wrong_name_is_refused_with_what_is_allowed():
    with pytest.raises(Invalid, match=r'choice "yarn" is unknown, but it must be one of yarn_applies, .*\.'):
        Choices.from_dict({"yarn": 1})
    with pytest.raises(Invalid, match=re.escape("one of hf, official, report, megatron.")):
        Choices.named("HF")


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_survives_json(name):
    choices = PROFILES[name]
    assert Choices.from_dict(json.loads(json.dumps(choices.to_dict()))) == choices


def test_differences_are_named():
    assert PROFILES["official"].differing(PROFILES["hf"]) == (
        "yarn_applies",
        "yarn_mscale_zero",
        "topk_norm_epsilon",
        "v2_topk_norm",
    )


def test_yarn_applies_whenever_the_config_has_it_or_beyond_the_original_length():
    config = preset("deepseek-v3")
    assert Choices().yarn_active(config)
    beyond = Choices(yarn_applies="beyond_original")
    assert beyond.yarn_active(config)
    assert not beyond.replace(max_seq_len=4096).yarn_active(config)
    assert beyond.replace(max_seq_len=4097).yarn_active(config)
    assert not Choices(yarn_applies="never").yarn_active(config)
    assert not Choices().yarn_active(dataclasses.replace(config, rope_scaling=None))


def test_group_scores_count_two_or_what_the_kept_groups_share():
    megatron = PROFILES["megatron"]
    assert Choices().group_score_count(preset("deepseek-v3")) == 2
    assert megatron.group_score_count(preset("deepseek-v3")) == 2
    assert megatron.group_score_count(preset("tiny-v3")) == 1  # 3 // 2
    few = dataclasses.replace(preset("deepseek-v3"), num_experts_per_tok=3)
    with pytest.raises(Invalid, match="is 0, but it must be from 1"):
        megatron.group_score_count(few)


def test_latent_norms_ignore_the_configs_epsilon_by_default():
    config = dataclasses.replace(preset("tiny-v3"), rms_norm_eps=1e-3)
    assert Choices().norm_epsilon(config) == 1e-6
    assert PROFILES["megatron"].norm_epsilon(config) == 1e-3
