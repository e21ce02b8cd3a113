"""One alternative for a whole port, from what single cases show."""

from refimpl.validate.settling import Evidence, settle

CONFIG, NEVER, BEYOND = ({"yarn_applies": name} for name in ("config", "never", "beyond_original"))


def test_what_most_cases_show_explains_a_case_that_fits_two():
    settled = settle(
        [
            Evidence("a", CONFIG, explained=(BEYOND, NEVER)),
            Evidence("b", CONFIG, explained=(NEVER,)),
            Evidence("c", CONFIG, explained=(NEVER,)),
        ]
    )
    assert settled.assigned == {"a": NEVER, "b": NEVER, "c": NEVER}
    assert not settled.inconsistent
    assert settled.known == NEVER


def test_a_case_that_refutes_an_alternative_goes_before_the_number_of_cases():
    settled = settle(
        [
            Evidence("a", CONFIG, explained=(BEYOND, NEVER)),
            Evidence("b", CONFIG, explained=(BEYOND, NEVER)),
            Evidence("c", BEYOND, refuted={"yarn_applies": ("never",)}),
        ]
    )
    assert settled.assigned == {"a": BEYOND, "b": BEYOND}
    assert not settled.inconsistent


def test_two_cases_that_contradict_each_other_are_both_named():
    settled = settle(
        [
            Evidence("a", CONFIG, explained=(NEVER,)),
            Evidence("b", CONFIG, refuted={"yarn_applies": ("never",)}),
        ]
    )
    (found,) = settled.inconsistent
    assert (found.first, found.second) == ("a", "b")
    assert "never in a, but config in b" in found.text
    (found,) = settle(
        [Evidence("a", CONFIG, explained=(NEVER,)), Evidence("b", CONFIG, explained=(BEYOND,))]
    ).inconsistent
    assert "never in a, but beyond_original in b" in found.text


def test_cases_of_which_each_says_something_else_and_hold_are_no_contradiction():
    settled = settle(
        [
            Evidence("a", CONFIG, refuted={"yarn_applies": ("never",)}),
            Evidence("b", NEVER, refuted={"yarn_applies": ("config",)}),
        ]
    )
    assert not settled.inconsistent
    assert [(s.alternative, s.own, s.cases) for s in settled.seen] == [
        ("config", True, ("a",)),
        ("never", True, ("b",)),
    ]


def test_without_evidence_nothing_is_said():
    assert settle([Evidence("a", CONFIG)]).seen == ()
