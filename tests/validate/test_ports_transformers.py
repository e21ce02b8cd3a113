"""transformers as a port: what it claims holds, and a mistake in its source does not.  Group `crosscheck`.

The whole run is `python bench/ports.py`; its table is bench/ports.md.
"""

import sys
from dataclasses import replace
from functools import partial
from importlib.util import module_from_spec

import numpy as np
import pytest
from port_runs import GOLDEN, agree, made_up, verdict

from refimpl import preset
from refimpl.cases.definition import Definition, Draw, Given, shaped
from refimpl.config.choices import Choices
from refimpl.validate.given import NotForMe, PortCase
from refimpl.validate.ports import transformers

pytestmark = [
    pytest.mark.crosscheck,
    pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning"),
]
torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

SAMPLE = (
    *("norm/hidden", "norm/ranges-vjp", "rope/yarn", "rope/yarn-vjp", "rope/halves-vjp", "rope/tables-yarn"),
    *("rope/tables-yarn-unequal", "attention/packed", "attention/sharp-vjp", "mla/far", "mla/packed"),
    *("mla/no-query-latent-vjp", "mla/packed-vjp", "mlp/narrow-vjp", "gate/v3", "gate/v3-vjp"),
    *("gate/single-vjp", "gate/bias-negative", "gate/v2-groups-vjp", "moe/experts-vjp", "moe/v3-few-vjp"),
    *("block/dense", "block/experts-vjp", "head/loss-vjp", "linear/q_b_proj-vjp", "embedding/exact-vjp"),
    *("model/packed", "model/tiny-v3-noq-forced"),
)


@pytest.mark.parametrize("attention", transformers.ATTENTION)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("id", SAMPLE)
def test_it_holds(id, dtype, attention, tmp_path):
    found = verdict(id, dtype, partial(transformers.outputs, dtype=dtype, attention=attention), tmp_path)
    assert found.holds, found.first_off


@pytest.mark.parametrize("attention", transformers.ATTENTION)
def test_all_gradients_of_a_model_hold(attention, tmp_path):
    """In float32; in bfloat16 no verdict could tell them from wrong ones."""
    found = verdict(
        "model/tiny-v3-noq-forced-vjp",
        "float32",
        partial(transformers.outputs, attention=attention),
        tmp_path,
    )
    assert found.holds, found.first_off


@pytest.mark.parametrize("experts", ["eager", "batched_mm"])
def test_its_other_forms_of_experts_hold_too(experts, tmp_path):
    found = verdict("moe/v3-few-vjp", "float32", partial(transformers.outputs, experts=experts), tmp_path)
    assert found.holds, found.first_off


TINY = preset("tiny-v3")
IDS = np.arange(24).reshape(2, 12) * 37 % TINY.vocab_size
MASK = np.array([[1] * 12, [0] * 3 + [1] * 9])
OTHER = {
    "a tied head, one group, labels, padding on the left": Definition(
        "made/tied",
        "",
        (),
        "model",
        shaped(TINY, tie_word_embeddings=True, n_group=1, topk_group=1, first_k_dense_replace=0),
        {"input_ids": Given(IDS, "I64"), "labels": Given(IDS, "I64"), "mask": Given(MASK, "I64")},
        backward=True,
    ),
    "positions of its own, a cotangent and no loss": Definition(
        "made/cotangent",
        "",
        (),
        "model",
        shaped(TINY, q_lora_rank=None, rope_interleave=False, norm_topk_prob=False, rope_scaling=None),
        {
            "input_ids": Given(IDS, "I64"),
            "position_ids": Given(np.arange(24).reshape(2, 12) * 5 % 64, "I64"),
            "d.model.layers.1": Draw((2, 12, TINY.hidden_size)),
            "d.logits": Draw((2, 12, TINY.vocab_size)),
        },
        backward=True,
    ),
    "V2": Definition(
        "made/v2",
        "",
        (),
        "model",
        shaped(preset("tiny-v2"), topk_method="greedy", routed_scaling_factor=3.0),
        {"input_ids": Given(IDS, "I64"), "targets": Given(IDS[:, ::-1].copy(), "I64")},
        backward=True,
    ),
}


@pytest.mark.parametrize("title", OTHER)
@pytest.mark.parametrize("attention", transformers.ATTENTION)
def test_configurations_that_no_case_has(title, attention):
    case, expected = made_up(OTHER[title])
    found = transformers.outputs(case, attention=attention)
    but = (".probs",) if attention == "sdpa" else ()
    assert agree(found, expected, but) > 100


HALF = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.5}


@pytest.mark.parametrize(
    ("id", "changes", "why"),
    [
        ("rope/tables-yarn-short", {}, "yarn_applies = beyond_original"),
        ("mla/query-latent", {"choices": {"latent_norm_epsilon": "config"}, "config": {"rms_norm_eps": 1e-5}},
         "latent_norm_epsilon"),
        ("gate/single", {"choices": {"topk_norm_single": "leave"}}, "topk_norm_single = leave"),
        ("gate/v2-greedy", {"config": {"norm_topk_prob": True}}, "v2_topk_norm = normalise_unscaled"),
        ("gate/v3", {"config": {"topk_method": "greedy"}}, "sigmoid and topk_method greedy"),
        ("model/tiny-v3", {"config": {"moe_layer_freq": 2}}, "moe_layer_freq"),
        ("head/loss", {"choices": {"loss_divisor": "positions"}}, "loss_divisor = positions"),
        ("rope/yarn", {"choices": {"yarn_mscale_zero": "remote"}, "config": {"rope_scaling": HALF}},
         "yarn_mscale_zero"),
    ],
)  # fmt: skip
def test_what_it_computes_otherwise_is_not_for_it(id, changes, why):
    case = PortCase.open(f"{GOLDEN}/{id}")
    changed = {name: {**getattr(case, name), **values} for name, values in changes.items()}
    with pytest.raises(NotForMe, match=why):
        transformers.outputs(replace(case, **changed))


def test_a_choice_that_has_no_effect_on_a_case_does_not_exclude_it():
    case = PortCase.open(f"{GOLDEN}/gate/v3")
    megatron = Choices.named("megatron").to_dict() | {"yarn_applies": "never"}
    found = transformers.outputs(replace(case, choices=megatron))
    assert found["model.layers.3.mlp.gate.topk_weight"].shape == (48, 8)


def test_its_gradient_of_an_embedding_in_bfloat16_adds_in_bfloat16():
    """The one failure in bfloat16 (bench/ports.md): rows are added one by one, each sum rounded."""
    case = PortCase.open(f"{GOLDEN}/embedding/vjp")
    found = transformers.outputs(case, dtype="bfloat16")["grad.model.embed_tokens.weight"]
    total = torch.zeros(found.shape, dtype=torch.bfloat16)
    for token, row in zip(case.inputs["ids"], torch.from_numpy(case.inputs["dy"]).bfloat16(), strict=True):
        total[token] = total[token] + row
    assert (total.float().numpy() == found).all()
    exact = np.zeros(found.shape)
    np.add.at(exact, case.inputs["ids"], case.inputs["dy"].astype(np.float64))
    assert np.abs(exact - found).max() > 2.0**-8 * np.abs(exact).max() / 8


PLANTED = {  # id of the catalogue -> text of modeling_deepseek_v3.py, what becomes of it, a case, what is off
    "Y07": (
        "scaling = scaling * mscale * mscale",
        "scaling = scaling",
        "mla/query-latent",
        "model.layers.3.self_attn.scores",
    ),
    "G01": (
        "topk_weights = scores.gather(1, topk_indices)",
        "topk_weights = (scores + self.e_score_correction_bias).gather(1, topk_indices)",
        "gate/bias-12",
        "model.layers.3.mlp.gate.topk_weight",
    ),
    "G04": (
        'masked_fill(~score_mask.bool(), float("-inf"))',
        "masked_fill(~score_mask.bool(), 0.0)",
        "gate/bias-negative",
        "model.layers.3.mlp.gate.topk_idx",
    ),
    "R01": (
        "q1, q2 = q[..., 0::2], q[..., 1::2]",
        "q1, q2 = q.chunk(2, -1)",
        "rope/yarn",
        "model.layers.3.self_attn.q_pe",
    ),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_mistake_in_its_source_is_caught_where_it_is(mistake, monkeypatch, tmp_path):
    right, wrong, id, first = PLANTED[mistake]
    name = "transformers.models.deepseek_v3.modeling_deepseek_v3"
    original = __import__(name, fromlist=["__spec__"])
    text = original.__loader__.get_data(original.__file__).decode()
    assert text.count(right) == 1
    broken = module_from_spec(original.__spec__)
    exec(compile(text.replace(right, wrong), original.__file__, "exec"), broken.__dict__)
    monkeypatch.setitem(sys.modules, name, broken)
    found = verdict(id, "float32", transformers.outputs, tmp_path)
    assert not found.holds
    assert found.first_off.name == first
