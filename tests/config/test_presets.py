"""The presets: published sizes, and peculiarities that small ones keep.  SPEC CONF-6."""

import pytest

from refimpl.config import PRESETS, preset
from refimpl.errors import Invalid

SMALL = [name for name in PRESETS if name.startswith(("tiny", "mid"))]


@pytest.mark.parametrize("name", PRESETS)
def test_nothing_in_a_preset_is_unknown(name):
    assert not preset(name).unknown


@pytest.mark.parametrize("name", SMALL)
def test_a_small_preset_keeps_every_peculiarity(name):
    c = preset(name)
    assert c.v_head_dim != c.qk_head_dim
    assert c.v_head_dim != c.qk_nope_head_dim
    assert 1 < c.kept_groups < c.groups
    assert c.num_experts_per_tok < c.kept_groups * c.experts_per_group < c.n_routed_experts
    assert c.qk_rope_head_dim == 64
    assert c.rope_scaling is not None
    assert c.is_moe_layer(c.num_hidden_layers - 1)
    assert not c.is_moe_layer(0)


def test_the_variant_with_128_experts_differs_in_nothing_else():
    full, half = preset("deepseek-v3").to_dict(), preset("deepseek-v3-128e").to_dict()
    assert {name for name in full if full[name] != half[name]} == {"n_routed_experts"}


def test_an_unknown_preset_is_refused_with_the_names():
    with pytest.raises(Invalid, match=r'preset "v3" is unknown, but it must be one of deepseek-v3, .*\.'):
        preset("v3")
