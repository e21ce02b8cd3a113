"""Cases of kind schedule: what they hold is what was recorded, computed by others, and certified."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from ports import pipeline_engine
from recorded_orders import recorded

from refimpl import programs
from refimpl.cases import bits, format, orders, schema
from refimpl.cases.bits import Bits
from refimpl.cases.build import Built, build, setting
from refimpl.cases.definition import Definition
from refimpl.cases.suites import defects, definition, suite
from refimpl.checkpoint.weights import DictWeights
from refimpl.errors import Invalid
from refimpl.model import Model
from refimpl.numerics.arithmetic import Exact
from refimpl.pipeline import arrays
from refimpl.pipeline.rules import RULES, plan
from refimpl.pipeline.split import split
from refimpl.pipeline.stages import staged
from refimpl.training_programs import microbatches

PLANS = [d for d in suite("schedule") if d.component == "plan"]
LEGALITY = [d for d in suite("schedule") if d.component == "legality"]
GRADIENTS = [d for d in suite("schedule") if isinstance(d, Definition)]
GOLDEN = Path(__file__).parent.parent.parent / "golden"
SOURCES = {
    "gpipe-4x10": "torch_gpipe_P4_M10_V1",
    "1f1b-4x10": "torch_1f1b_P4_M10_V1",
    "interleaved-4x2-v2": "torch_interleaved1f1b_P4_M2_V2",
    "interleaved-4x8-v2": "torch_interleaved1f1b_P4_M8_V2",
    "interleaved-4x16-v2-g8": "megatron_interleaved_G8_P4_M16_V2",
    "zb1p-4x10": "torch_interleavedzerobubble_P4_M10_V1",
    "zbv-4x10": "torch_zbvzerobubble_P4_M10_V2",
    "zbv-8x20": "torch_zbvzerobubble_P8_M20_V2",
    "dualpipe-2x4": "deepseek_dualpipe_P2_M4_V2",
    "dualpipe-4x10": "deepseek_dualpipe_P4_M10_V2",
    "dualpipe-8x20": "deepseek_dualpipe_P8_M20_V2",
    "dualpipev-2x4": "deepseek_dualpipev_P2_M4_V2",
    "dualpipev-4x10": "deepseek_dualpipev_P4_M10_V2",
}
by_id = {"ids": lambda d: d.id}


@cache
def _built(id: str) -> Built:
    return build(definition(id))


def built(d: Bits) -> Built:
    return _built(d.id)


@pytest.mark.parametrize("d", [*PLANS, *LEGALITY], **by_id)
def test_a_case_is_valid_and_certified(d: Bits) -> None:
    case = built(d).case
    text = case.to_json()
    jsonschema.validate(json.loads(text), schema.shipped("schema.json"), jsonschema.Draft202012Validator)
    assert format.Case.from_dict(json.loads(text), "case.json").to_json() == text
    assert (case.kind, case.by_bits, case.arguments["kinds"]) == ("schedule", True, arrays.CODES)
    wanted = {"next"} if d.component == "legality" else {"next", "ranks", "swapped", "zeros"}
    assert wanted <= set(case.certificate["rejects"]["bits"])


def test_every_rule_has_cases_of_several_sizes_and_group_sizes() -> None:
    sizes = {name: [d for d in PLANS if d.arguments["schedule"] == name] for name in RULES}
    assert all(
        len({(d.arguments["ranks"], d.arguments["microbatches"]) for d in s}) > 1 for s in sizes.values()
    )
    assert len({d.arguments["chunks"] for d in sizes["interleaved"]}) > 1
    assert len([d for d in sizes["interleaved"] if "group" in d.arguments]) > 1
    for d in PLANS:
        even, uneven = d.arguments["durations"]
        assert (even["latency"], len(set(even["scale"]))) == (0, 1)
        assert uneven["latency"] > 0
        assert len(set(uneven["scale"])) > 1


@pytest.mark.parametrize(("id", "source"), SOURCES.items())
def test_orders_are_those_that_were_recorded(id: str, source: str) -> None:
    expected = built(definition(f"schedule/{id}")).expected
    theirs = recorded(source)
    assert np.array_equal(expected["order"], arrays.order(theirs.ranks))
    assert [set(own) for own in expected["placement"].tolist()] == [set(own) for own in theirs.placement]


@pytest.mark.parametrize("d", PLANS, **by_id)
def test_times_are_those_of_a_simulation_that_asks_again_and_again(d: Bits) -> None:
    expected = built(d).expected
    for n, durations in enumerate(d.arguments["durations"]):
        start, end, left = pipeline_engine.simulate(expected["order"], d.arguments["stages"], durations)
        assert not left
        busy = [sum(e) - sum(s) for s, e in zip(start, end, strict=True)]
        span = [e[-1] - s[0] for s, e in zip(start, end, strict=True)]
        whole = max(e[-1] for e in end)
        assert np.array_equal(expected["start"][n], arrays.padded(start))
        assert expected["makespan"][n] == whole
        assert expected["busy"][n].tolist() == busy
        assert expected["idle"][n].tolist() == [whole - own for own in busy]
        assert (expected["idle_within_span"][n] + busy).tolist() == span


@pytest.mark.parametrize("d", LEGALITY, **by_id)
def test_another_checker_says_the_same(d: Bits) -> None:
    made = built(d)
    found = pipeline_engine.legality(made.given["order"], made.given["placement"], d.arguments)
    assert np.array_equal(found["illegal"], made.expected["illegal"])
    assert made.expected["illegal"][0] == d.id.startswith("schedule/illegal-")
    assert made.case.tensor("rank").one_of == ((-1,) if d.id.startswith("schedule/legal-") else ANY)


class _Ranks:
    """Equal to any ranks."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, tuple) and len(other) > 0 and min(other) >= 0


ANY = _Ranks()


@pytest.mark.parametrize(
    ("id", "ranks"),
    [
        ("dropped-1f1b", (1,)),
        ("doubled-1f1b", (1,)),
        ("w-before-i-zb1p", (1,)),
        ("deadlock-1f1b", (0, 1)),
        ("wrong-rank-1f1b", (1, 2)),  # one does it, the other lacks it
        ("wrong-rank-dualpipe", (0, 3)),
    ],
)
def test_the_ranks_at_fault_are_those_where_it_was_changed(id: str, ranks: tuple[int, ...]) -> None:
    assert built(definition(f"schedule/illegal-{id}")).case.tensor("rank").one_of == ranks


@pytest.mark.parametrize("row", [*defects.ILLEGAL, *defects.LEGAL], ids=lambda row: row[0])
def test_arrays_say_the_schedule(row: defects.Row) -> None:
    made = row[2]
    again = arrays.schedule(
        arrays.order(made.ranks), arrays.padded(made.placement), made.stages, made.microbatches
    )
    assert again.ranks == made.ranks
    assert again.placement == made.placement


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ([9, 0, 0, -1, -1], r"\[9, 0, 0, -1, -1\] is no entry"),
        ([0, 0, 0, 1, 1], r"is no entry of an order\.$"),
    ],
)
def test_what_is_no_entry_is_refused(row: list[int], why: str) -> None:
    with pytest.raises(Invalid, match=why):
        arrays.entry(row)


def test_an_entry_behind_the_last_one_is_refused() -> None:
    order = np.full((1, 3, 5), -1)
    order[0, 2, :3] = 0
    with pytest.raises(Invalid, match=r"rank 0 has entries behind its last one\.$"):
        arrays.schedule(order, np.array([[0]]), 1, 1)


def test_wrong_outputs_are_others_ranks_swapped_and_one_more() -> None:
    d = definition("schedule/1f1b-4x10")
    made = built(d)
    for t in made.case.outputs:
        for wrong, spoiled in orders.spoiled(made.expected[t.name], t).items():
            assert spoiled.shape == t.shape, wrong
    order = made.case.tensor("order")
    spoiled = orders.spoiled(made.expected["order"], order)
    assert np.array_equal(spoiled["ranks"][0], made.expected["order"][-1])
    differ = np.argwhere((spoiled["swapped"] != made.expected["order"]).any(-1))
    assert len(differ) == 2
    makespan = made.case.tensor("makespan")
    assert (
        orders.spoiled(made.expected["makespan"], makespan)["next"] == made.expected["makespan"] + 1
    ).all()


def test_a_verdict_that_cannot_fail_makes_no_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "spoiled", lambda right, t: {"zeros": right})
    with pytest.raises(Invalid, match="no output that can be wrong"):
        bits.made(definition("schedule/gpipe-2x3"))


def test_ranks_that_are_as_right_pass_the_certificate_as_such() -> None:
    case = built(definition("schedule/illegal-deadlock-1f1b")).case
    assert case.certificate["not_applicable"]["rank"]["next"] == "is as right"


@pytest.mark.parametrize("d", GRADIENTS, **by_id)
def test_gradients_of_ranks_add_up_to_those_of_the_model_without_a_pipeline(d: Definition) -> None:
    given = {name: source.made(f"{d.stream} {name}")[0] for name, source in d.inputs.items()}
    given |= {name: source.made(name)[0] for name, source in d.weight_sources().items()}
    s = setting(d, given, Exact(), True)
    found = programs.run("pipelined", s)
    model = Model(s.config, DictWeights(s.config, s.weights), s.ar, s.choices, s.ops, s.training)
    batches = microbatches(s, range(d.arguments["microbatches"]))
    network = staged(model, batches, split(model.units, 2))
    total: dict[str, np.ndarray] = {}
    for number, batch in enumerate(batches):
        result = model.forward(**batch, divisors=network.divisors, microbatch=number)
        own = model.backward(result)
        for name in own:
            total[name] = total.get(name, 0.0) + own[name]
    names = {n.partition(".")[2].partition(".")[2] for n in found if n.startswith("grad.")}
    assert names <= set(total)
    for name in names:
        ranks = [found[f"grad.rank{r}.{name}"] for r in (0, 1) if f"grad.rank{r}.{name}" in found]
        summed = sum(ranks[1:], start=ranks[0])
        assert np.abs(summed - total[name]).max() <= 1e-14 * np.abs(total[name]).max()


@pytest.mark.parametrize("d", GRADIENTS, **by_id)
def test_gradients_are_of_the_stages_that_a_rank_holds(d: Definition) -> None:
    case = format.read(GOLDEN / d.id)
    assert (case.kind, case.by_bits, case.claims[0]) == ("schedule", False, "fp32")
    held = plan(d.arguments["schedule"], 2, d.arguments["microbatches"]).placement
    for rank, stages in enumerate(held):
        names = [t.name for t in case.outputs if t.name.startswith(f"grad.rank{rank}.")]
        assert any("layers.0" in n for n in names) == (0 in stages)
        assert any("lm_head" in n for n in names) == (1 in stages)
        assert any("embed_tokens" in n for n in names)  # of stage 1 the MTP module reads it


def test_the_committed_suite_is_small() -> None:
    files = [path for d in suite("schedule") for path in (GOLDEN / d.id).iterdir()]
    assert sum(path.stat().st_size for path in files) < 300_000


def test_other_durations_are_asked_for_by_a_row() -> None:
    d = definition("schedule/dualpipe-4x10")
    assert isinstance(d, Bits)
    one = {"F": 1, "I": 1, "W": 1, "B": 2, "FB": 2, "latency": 3, "scale": [1, 1, 1, 1]}
    made = build(replace(d, arguments={**d.arguments, "durations": [one]}))
    assert made.expected["start"].shape[0] == 1
