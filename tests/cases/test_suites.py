"""The tables of cases themselves."""

import re
from pathlib import Path

import numpy as np
import pytest

from refimpl.cases.build import build
from refimpl.cases.definition import STEPS, Definition
from refimpl.cases.folder import Folder, write
from refimpl.cases.generate import definitions
from refimpl.cases.suites import SUITES, definition, suite
from refimpl.checkpoint.dtypes import bf16_codes
from refimpl.errors import Invalid

SPEC = Path(__file__).parents[2] / "SPEC.md"
EVERY = definitions()
MODEL = [d for d in EVERY if isinstance(d, Definition)]
QUICK = [d for d in MODEL if d.suite in ("embedding", "norm", "rope", "attention", "gate", "head", "reject")]


def test_ids_are_unique_and_named_by_their_suite():
    ids = [d.id for d in EVERY]
    assert len(set(ids)) == len(ids)
    assert all(d.suite == name for name in SUITES for d in suite(name))


@pytest.mark.skipif(not SPEC.exists(), reason="SPEC.md is not installed with the package")
def test_every_clause_that_a_case_cites_is_in_the_specification():
    known = set(re.findall(r"^#### ([A-Z]+-\d+)\.", SPEC.read_text(), re.M))
    cited = {clause for d in EVERY for clause in d.clauses}
    assert cited <= known


def test_twins_have_the_inputs_of_their_first():
    for d in EVERY:
        if d.twin:
            first = definition(d.twin)
            for name, source in first.inputs.items():
                assert d.inputs[name] == source or name in d.inputs


def test_every_operation_has_a_backward_case():
    forward = {d.component for d in MODEL if not d.rejects} - {"rope_tables", *STEPS}
    assert forward == {d.component for d in MODEL if d.backward}


def test_linears_have_a_twin_in_which_any_order_gives_the_same_bits():
    for d in suite("linear"):
        if d.exact:
            built = build(d) if "q_b" in d.id else None
            if built is None:
                continue
            x, w = built.given["x"], built.given[f"{d.path}.weight"]
            rng = np.random.default_rng(0)
            for _ in range(3):
                order = rng.permutation(x.shape[1])
                y = np.float32(x[:, order]) @ np.float32(w[:, order]).T
                assert np.array_equal(y, built.expected[d.path])


@pytest.mark.parametrize(
    "d",
    [d for d in QUICK if not d.exact and "wide" not in d.id],
    ids=lambda d: d.id,
)
def test_inputs_are_exact_in_bf16_but_for_the_selection_bias(d):
    for name, source in {**d.inputs, **d.weight_sources()}.items():
        if source.dtype == "I64":
            continue
        values, _ = source.made(name)
        if (
            name.endswith("e_score_correction_bias")
            and not d.rejects
            and d.id.rpartition("/")[2][:4] != "ties"
        ):
            assert source.dtype == "F32"
            with pytest.raises(Invalid):
                bf16_codes(values)
        elif source.dtype == "BF16":
            bf16_codes(values)


def test_the_bias_near_12_changes_the_experts_of_most_tokens_when_it_is_rounded():
    built = build(definition("gate/bias-12"))
    path = built.case.path
    bias = built.given[f"{path}.e_score_correction_bias"]
    assert abs(bias.mean() - 12) < 0.02
    scores = built.expected[f"{path}.scores"]
    rounded = np.round(bias * 16) / 16  # bf16 between 8 and 16
    exact = np.argsort(-(scores + bias), -1)[:, :8]
    other = np.argsort(-(scores + rounded), -1)[:, :8]
    assert np.mean([set(a) != set(b) for a, b in zip(exact, other, strict=True)]) > 0.5


def test_the_negative_bias_shows_a_mask_of_zeros():
    built = build(definition("gate/bias-negative"))
    choice = (
        built.expected[f"{built.case.path}.scores"]
        + built.given[f"{built.case.path}.e_score_correction_bias"]
    )
    kth = np.take_along_axis(choice, built.expected[f"{built.case.path}.topk_idx"], -1).min(-1)
    assert (kth < 0).mean() > 0.9


def test_tied_rows_have_no_margin_and_the_others_do():
    built = build(definition("gate/ties"))
    margin = built.extras[f"margin/{built.case.path}.topk_idx"]
    assert 0 < (margin == 0).sum() < len(margin)


def test_logits_of_attention_are_neither_flat_nor_saturated():
    for name, low, high in (("causal", 1.0, 2.0), ("packed", 2.0, 3.5), ("sharp", 4.0, 7.0)):
        scores = build(definition(f"attention/{name}")).expected["model.layers.3.self_attn.scores"]
        assert low < scores[np.isfinite(scores)].std() < high


def test_every_claim_that_is_offered_is_certified(tmp_path):
    for d in (definition("norm/ranges"), definition("gate/v2-greedy"), definition("head/loss")):
        built = build(d)
        write(tmp_path, built.case, built.given, built.expected, built.extras, False)
        case = Folder.open(tmp_path / d.id).case
        assert set(case.certificate["rejects"]) == set(case.claims)
        for factors in case.certificate["rejects"].values():
            assert all(factor == "exact" or factor > 1 for factor in factors.values())


def test_an_unknown_suite_or_case_is_named():
    with pytest.raises(Invalid, match="suite 'nothing' is unknown"):
        suite("nothing")
    with pytest.raises(Invalid, match="norm/nothing"):
        definition("norm/nothing")
