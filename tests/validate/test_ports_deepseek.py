"""DeepSeek's inference code as a port.  Group `crosscheck`; REFIMPL_DEEPSEEK_V3 has to name a checkout of
deepseek-ai/DeepSeek-V3.  The whole run is `python bench/ports.py`; its table is bench/ports.md."""

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from port_runs import GOLDEN, agree, made_up, verdict

from refimpl import preset
from refimpl.cases.definition import Definition, Draw, Given, shaped
from refimpl.config.choices import Choices
from refimpl.validate.given import NotForMe, PortCase
from refimpl.validate.ports import deepseek
from refimpl.validate.ports.deepseek_code import CHECKOUT, SOURCE

pytestmark = pytest.mark.crosscheck
torch = pytest.importorskip("torch", reason="torch is not installed")
if not os.environ.get(CHECKOUT):
    pytest.skip(f"{CHECKOUT} names no checkout of deepseek-ai/DeepSeek-V3", allow_module_level=True)

SAMPLE = (
    *("norm/hidden", "rope/yarn", "rope/plain", "rope/tables-yarn", "rope/tables-plain"),
    *("rope/tables-yarn-short", "mla/far", "mla/packed", "mla/no-query-latent", "mlp/narrow", "gate/v3"),
    *("gate/bias-negative", "gate/v2-greedy", "moe/experts", "moe/v2", "block/dense", "block/experts"),
    *("head/loss", "linear/q_b_proj", "embedding/exact", "model/packed", "model/tiny-v2-forced"),
)
BACKWARD = (
    *("norm/ranges-vjp", "rope/yarn-vjp", "mla/packed-vjp", "gate/v3-vjp", "moe/experts-vjp"),
    *("block/experts-vjp", "model/tiny-v3-noq-forced-vjp"),
)


@pytest.mark.parametrize("attention", deepseek.ATTENTION)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("id", SAMPLE)
def test_it_holds(id, dtype, attention, tmp_path):
    found = verdict(id, dtype, partial(deepseek.outputs, dtype=dtype, attention=attention), tmp_path)
    assert found.holds, found.first_off


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("id", BACKWARD)
def test_autograd_through_it_gives_the_gradients(id, dtype, tmp_path):
    found = verdict(id, dtype, partial(deepseek.outputs, dtype=dtype, backward=True), tmp_path)
    assert found.holds, found.first_off


IDS = np.arange(24).reshape(2, 12) * 37 % 160
OTHER = {
    "YaRN beyond the original length, one group, three sequences in two rows": Definition(
        "made/official",
        "",
        (),
        "model",
        shaped(preset("tiny-v3"), n_group=1, topk_group=1, first_k_dense_replace=0),
        {
            "input_ids": Given(IDS, "I64"),
            "segment_ids": Given(np.array([[0] * 5 + [1] * 7, [0] * 12]), "I64"),
            "d.logits": Draw((2, 12, 160)),
        },
        choices=Choices.named("official"),
        backward=True,
    ),
    "no YaRN, since the sequences are short": Definition(
        "made/short",
        "",
        (),
        "model",
        shaped(preset("tiny-v3"), q_lora_rank=None),
        {"input_ids": Given(IDS, "I64"), "targets": Given(IDS[:, ::-1].copy(), "I64")},
        choices=Choices.named("official").replace(max_seq_len=64),
        backward=True,
    ),
}


@pytest.mark.parametrize("title", OTHER)
@pytest.mark.parametrize("attention", deepseek.ATTENTION)
def test_configurations_that_no_case_has(title, attention):
    case, expected = made_up(OTHER[title])
    found = deepseek.outputs(case, "float32", attention, backward=True)
    absent = (
        (".gate.logits", ".experts", ".kv_b_proj") if attention == "absorb" else (".gate.logits", ".experts")
    )
    assert agree(found, expected, absent) > 100


@pytest.mark.parametrize(
    ("id", "why"),
    [
        ("gate/unnormalised", "always normalises"),
        ("rope/halves", "neighbours only"),
        ("rope/tables-yarn-unequal", "one mscale"),
        ("moe/v2-vjp", "overwrites the scores"),
    ],
)
def test_what_it_has_no_argument_for_is_not_for_it(id, why):
    with pytest.raises(NotForMe, match=why):
        deepseek.outputs(PortCase.open(f"{GOLDEN}/{id}"), backward=True)


def test_sums_of_scores_in_which_its_missing_epsilon_shows_are_not_for_it():
    """Logits of -48: the sums are near 1e-20."""
    d = Definition(
        "made/tiny-sums",
        "",
        (),
        "gate",
        shaped(preset("tiny-v3"), hidden_size=64),
        {"x": Given(np.ones((4, 64)))},
        "model.layers.1.mlp.gate",
        {"weight": Given(np.full((16, 64), -0.75))},
    )
    with pytest.raises(NotForMe, match="topk_norm_epsilon"):
        deepseek.outputs(made_up(d)[0], "float32")


PLANTED = {  # id of the catalogue -> text of model.py, what becomes of it, a case, what is off
    "Y07": (
        "self.softmax_scale = self.softmax_scale * mscale * mscale",
        "pass",
        "mla/packed",
        "model.layers.3.self_attn.scores",
    ),
    "G01": (
        "weights = original_scores.gather(1, indices)",
        "weights = scores.gather(1, indices)",
        "gate/bias-12",
        "model.layers.3.mlp.gate.topk_weight",
    ),
    "G04": (
        'masked_fill_(mask.unsqueeze(-1), float("-inf"))',
        "masked_fill_(mask.unsqueeze(-1), 0.0)",
        "gate/bias-negative",
        "model.layers.3.mlp.gate.topk_idx",
    ),
    "R01": (
        "x = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))",
        "x = torch.complex(*x.float().chunk(2, -1))",
        "rope/yarn",
        "model.layers.3.self_attn.q_pe",
    ),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_mistake_in_its_source_is_caught_where_it_is(mistake, tmp_path):
    right, wrong, id, first = PLANTED[mistake]
    checkout = tmp_path / "checkout"
    shutil.copytree(Path(os.environ[CHECKOUT]) / "inference", checkout / "inference")
    text = (checkout / SOURCE).read_text("utf-8")
    assert text.count(right) == 1
    (checkout / SOURCE).write_text(text.replace(right, wrong), "utf-8")
    run = partial(deepseek.outputs, dtype="float32", checkout=str(checkout))
    found = verdict(id, "float32", run, tmp_path)
    assert not found.holds
    assert found.first_off.name == first
