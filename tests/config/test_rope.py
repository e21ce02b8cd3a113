"""The rotary fields in both published forms.  SPEC CONF-3."""

import math

import pytest

from refimpl.config.rope import YarnScaling, read_rope
from refimpl.errors import Invalid, Missing, Unsupported

YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}


def test_plain_rope_has_no_scaling():
    assert read_rope({"rope_theta": 10000, "rope_scaling": None}) == (10000, None)
    assert read_rope({"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}}) == (50.0, None)
    assert read_rope({}) == (None, None)


def test_both_forms_of_yarn_are_the_same():
    hub = read_rope({"rope_theta": 100, "rope_scaling": YARN})
    five = read_rope({"rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 100}})
    assert hub == five == (100, YarnScaling(factor=40.0, original_max_position_embeddings=4096))


def test_absent_and_null_are_the_same():
    given = YARN | {"beta_fast": None, "mscale": None}
    assert read_rope({"rope_scaling": given}) == read_rope({"rope_scaling": YARN})


def test_absent_mscale_is_told_from_zero():
    absent = read_rope({"rope_scaling": YARN})[1]
    zero = read_rope({"rope_scaling": YARN | {"mscale": 0, "mscale_all_dim": 0}})[1]
    assert (absent.mscale, absent.mscale_all_dim) == (None, None)
    assert (zero.mscale, zero.mscale_all_dim) == (0.0, 0.0)
    assert read_rope({"rope_scaling": zero.to_dict()})[1] == zero


@pytest.mark.parametrize("name", ["factor", "original_max_position_embeddings"])
def test_a_missing_field_is_refused_by_name(name):
    with pytest.raises(Missing, match=f"rope_scaling: {name} is missing"):
        read_rope({"rope_scaling": {key: value for key, value in YARN.items() if key != name}})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("factor", 0),
        ("factor", 0.5),
        ("factor", math.inf),
        ("factor", "40"),
        ("original_max_position_embeddings", 0),
        ("original_max_position_embeddings", 4096.5),
        ("beta_fast", 0),
        ("beta_slow", -1),
        ("beta_slow", 33),
        ("mscale", -1),
        ("mscale_all_dim", math.nan),
        ("mscale", True),
    ],
)
def test_a_wrong_value_is_refused_by_name(name, value):
    words = "beta_fast|beta_slow" if name.startswith("beta") else name
    with pytest.raises(Invalid, match=words):
        read_rope({"rope_scaling": YARN | {name: value}})


@pytest.mark.parametrize("name", ["attention_factor", "truncate", "low_freq_factor"])
def test_a_field_that_would_change_the_numbers_is_unsupported(name):
    with pytest.raises(Unsupported, match=name):
        read_rope({"rope_scaling": YARN | {name: 1.5}})


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", 3])
def test_another_rope_type_is_unsupported(kind):
    with pytest.raises(Unsupported, match="type is"):
        read_rope({"rope_scaling": YARN | {"type": kind}})


def test_forms_that_disagree_are_refused():
    with pytest.raises(Invalid, match=r"rope_theta is 200, but it must equal rope_theta .100"):
        read_rope({"rope_theta": 100, "rope_parameters": {"rope_theta": 200}})
    with pytest.raises(Invalid, match="differ"):
        read_rope({"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 4}})
    with pytest.raises(Invalid, match="must equal rope_type"):
        read_rope({"rope_scaling": YARN | {"rope_type": "default"}})
