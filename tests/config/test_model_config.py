"""ModelConfig: what is read, what is refused, and in which words.  SPEC CONF-1 to CONF-4."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.config import PRESETS, ModelConfig, YarnScaling, preset
from refimpl.errors import Error, Invalid, Missing, Unreadable, Unsupported

RECORDINGS = Path(__file__).parent.parent / "recordings" / "models"
FOLDERS = sorted(path.parent for path in RECORDINGS.glob("*/config.transformers5.json"))


def published(**changes):
    return preset("deepseek-v3").to_dict() | changes


def without(name):
    given = published()
    del given[name]
    return given


def test_a_published_config_is_read_field_by_field():
    c = ModelConfig.from_dict(published())
    assert (c.hidden_size, c.num_hidden_layers, c.qk_head_dim, c.v_head_dim) == (7168, 61, 192, 128)
    assert (c.groups, c.kept_groups, c.experts_per_group, c.num_experts_per_tok) == (8, 4, 32, 8)
    assert c.rope_theta == 10000.0
    assert isinstance(c.rope_theta, float)
    assert c.rope_scaling == YarnScaling(
        factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
    )
    assert [c.is_moe_layer(i) for i in (0, 2, 3, 60, 61)] == [False, False, True, True, True]
    assert c.fp8_block == (128, 128)
    assert c.has_selection_bias
    assert not c.has_indexer


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_both_published_forms_give_the_same_config(folder):
    hub = ModelConfig.from_json(folder / "config.json")
    five = ModelConfig.from_json(folder / "config.transformers5.json")
    assert hub == five
    assert hash(hub) == hash(five)
    assert not hub.unknown
    assert not five.unknown


def test_the_recordings_are_there():
    assert len(FOLDERS) >= 7


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_written_is_read_as_the_same(name):
    config = preset(name)
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.to_dict() == config.to_dict()


def test_unknown_and_ignored_fields_are_kept_listed_and_written_back():
    given = published(hyper_mode={"depth": [1, 2]}, aux_loss_alpha=0.5)
    config = ModelConfig.from_dict(given)
    assert dict(config.unknown) == {"hyper_mode": {"depth": [1, 2]}}
    assert config.ignored["aux_loss_alpha"] == 0.5
    assert config == preset("deepseek-v3")
    assert config.to_dict() == given


def test_the_config_keeps_no_part_of_what_it_was_given():
    given = published(hyper_mode=[1])
    before = copy.deepcopy(given)
    config = ModelConfig.from_dict(given)
    config.to_dict()["quantization_config"]["fmt"] = "changed"
    assert given == before
    assert ModelConfig.from_dict(given) == config
    assert config.quantization_config["fmt"] == "e4m3"


def test_zero_query_rank_means_none():
    assert ModelConfig.from_dict(published(q_lora_rank=0)).q_lora_rank is None
    assert ModelConfig.from_dict(published(q_lora_rank=None)).q_lora_rank is None


def test_no_shared_experts_may_be_null():
    config = ModelConfig.from_dict(published(n_shared_experts=None))
    assert config.n_shared_experts == 0
    assert config.shared_intermediate_size == 0


def test_v2_greedy_has_no_groups():
    given = preset("deepseek-v2-lite").to_dict() | {"n_group": None, "topk_group": None}
    config = ModelConfig.from_dict(given)
    assert (config.n_group, config.groups, config.kept_groups, config.experts_per_group) == (None, 1, 1, 64)


def test_every_layer_may_be_dense():
    config = ModelConfig.from_dict(published(first_k_dense_replace=100))
    assert not any(config.is_moe_layer(i) for i in range(61))


def test_moe_layer_freq_is_honoured():
    config = ModelConfig.from_dict(published(first_k_dense_replace=1, moe_layer_freq=2))
    assert [config.is_moe_layer(i) for i in range(5)] == [False, False, True, False, True]


@pytest.mark.parametrize(
    ("family", "scoring", "method"),
    [("deepseek_v2", "softmax", "greedy"), ("deepseek_v3", "sigmoid", "noaux_tc")],
)
def test_absent_gate_fields_follow_the_family(family, scoring, method):
    given = published(model_type=family)
    del given["scoring_func"], given["topk_method"]
    config = ModelConfig.from_dict(given)
    assert (config.scoring_func, config.topk_method) == (scoring, method)


REQUIRED = [
    item.name
    for item in dataclasses.fields(ModelConfig)
    if item.default is dataclasses.MISSING
    and item.default_factory is dataclasses.MISSING
    and item.name not in ("scoring_func", "topk_method")
]


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_field_is_refused_by_name(name):
    with pytest.raises(Missing, match=rf"^config field {name} is missing, but it must be .*\.$"):
        ModelConfig.from_dict(without(name))


INTEGERS = [
    name
    for name in REQUIRED
    if dataclasses.fields(ModelConfig)[[f.name for f in dataclasses.fields(ModelConfig)].index(name)].type
    == "int"
]


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize(
    "value", [True, "7168", 1.5, 64.0, -1, [4], 2**31, 10**400, math.nan], ids=lambda value: str(value)[:12]
)
def test_what_is_no_size_is_refused_by_name(name, value):
    with pytest.raises(Invalid, match=rf"^config field {name} is .*, but it must be an integer from .*\.$"):
        ModelConfig.from_dict(published(**{name: value}))


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "kv_lora_rank", "num_attention_heads"])
def test_zero_is_no_size(name):
    with pytest.raises((Invalid, Unsupported), match=r"is 0|must equal"):
        ModelConfig.from_dict(published(**{name: 0}))


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta", "routed_scaling_factor"])
@pytest.mark.parametrize(
    "value",
    [True, "1", math.nan, math.inf, -math.inf, 0, -1.0, 10**400, None],
    ids=lambda value: str(value)[:12],
)
def test_what_is_no_positive_number_is_refused_by_name(name, value):
    with pytest.raises((Invalid, Missing), match=rf"^config field {name} is .*\.$"):
        ModelConfig.from_dict(published(**{name: value}))


def test_an_integer_is_a_fine_number():
    assert ModelConfig.from_dict(published(routed_scaling_factor=2)).routed_scaling_factor == 2.0


COMBINATIONS = [
    ({"num_experts_per_tok": 129}, "num_experts_per_tok is 129, but it must be at most .*4 groups of 32"),
    ({"n_routed_experts": 255}, "n_routed_experts is 255, but it must be a multiple of n_group .8"),
    ({"topk_group": 9}, "topk_group is 9, but it must be at most n_group .8"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63, but it must be even"),
    ({"n_routed_experts": 8, "num_experts_per_tok": 2}, "groups of 1 expert, .* at least 2"),
    ({"n_group": None}, "n_group is null"),
    ({"norm_topk_prob": 1}, "norm_topk_prob is 1, but it must be true or false"),
    ({"scoring_func": "relu"}, 'scoring_func is "relu", but it must be "sigmoid" or "softmax"'),
    ({"topk_method": "best"}, 'topk_method is "best"'),
    ({"model_type": "llama"}, 'model_type is "llama", but it must be "deepseek_v2" or "deepseek_v3" or'),
    ({"model_type": 3}, "model_type is 3"),
    ({"quantization_config": 3}, "quantization_config is 3"),
    ({"quantization_config": {"weight_block_size": [128]}}, "weight_block_size"),
    ({"quantization_config": {"weight_block_size": [128, 0]}}, "weight_block_size is 0"),
    ({"qk_head_dim": 100}, "qk_head_dim is 100, but it must be .*192"),
    ({"rope_scaling": 7}, "rope_scaling is 7"),
]


@pytest.mark.parametrize(("changes", "words"), COMBINATIONS, ids=lambda value: str(value)[:40])
def test_an_impossible_combination_is_refused_by_name(changes, words):
    with pytest.raises(Invalid, match=words) as caught:
        ModelConfig.from_dict(published(**changes))
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"attention_dropout": 0.1},
        {"num_key_value_heads": 8},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
    ids=str,
)
def test_what_is_valid_and_not_computed_is_unsupported(changes):
    with pytest.raises(Unsupported, match=next(iter(changes))):
        ModelConfig.from_dict(published(**changes))


def test_a_sparse_attention_config_needs_its_indexer():
    given = preset("deepseek-v3.2").to_dict()
    assert ModelConfig.from_dict(given).has_indexer
    del given["index_topk"]
    with pytest.raises(Missing, match="index_topk"):
        ModelConfig.from_dict(given)


def test_a_changed_config_is_checked_again():
    with pytest.raises(Invalid, match="topk_group is 99"):
        dataclasses.replace(preset("tiny-v3"), topk_group=99)


def test_what_is_no_object_is_refused():
    with pytest.raises(Invalid, match="is a list"):
        ModelConfig.from_dict([1])


def test_a_config_that_is_not_there_is_unreadable(tmp_path):
    with pytest.raises(Unreadable, match=r"config\.json cannot be read \(No such file or directory\)"):
        ModelConfig.from_json(tmp_path / "config.json")


NAMES = [*sorted(preset("deepseek-v3").to_dict()), "rope_parameters", "num_mtp_layers"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3))
def test_any_values_are_read_or_refused_in_one_sentence(changes):
    refusal = "fine."
    try:
        config = ModelConfig.from_dict(published(**changes))
    except Error as error:
        refusal = str(error)
    else:
        assert ModelConfig.from_dict(config.to_dict()) == config
    assert refusal.endswith(".")
    assert len(refusal) < 400
