"""The catalogue of mistakes: complete, cited, and each with a disposition."""

import re
from collections import Counter
from pathlib import Path

import pytest

from refimpl.variants.catalogue import CATALOGUE, DISPOSITIONS, SUBJECTS, VISIBILITIES, Entry
from refimpl.variants.mutants import EVERY

SPEC = (Path(__file__).parent.parent.parent / "SPEC.md").read_text()
ENTRIES = pytest.mark.parametrize("entry", CATALOGUE.values(), ids=lambda entry: entry.id)

# Changing a disposition is a decision, so it is written down twice.
LATER = {
    "decoding": "A14 A15",
    "mtp": "",
    "pipeline": "",
    "sparse attention": "D01 D02 D03 D04 D05 D06 D07",
    "training": "",
}
OTHER = {"same": "Y11", "layout": "R03", "inexpressible": "F13"}


def of(disposition: str) -> set[str]:
    return {entry.id for entry in CATALOGUE.values() if entry.disposition == disposition}


def test_there_are_125_entries_in_the_families_of_the_catalogue() -> None:
    families = Counter(id[0] for id in CATALOGUE)
    assert families == {"R": 6, "Y": 11, "A": 17, "G": 21, "F": 15, "T": 11, "L": 17, "D": 7, "X": 4, "S": 16}


def test_the_dispositions_are_these() -> None:
    later = {subject: set(ids.split()) for subject, ids in LATER.items()}
    found = {s: {id for id in of("later") if CATALOGUE[id].refers == s} for s in SUBJECTS}
    assert found == later
    assert {disposition: of(disposition) for disposition in OTHER} == {
        d: set(t.split()) for d, t in OTHER.items()
    }
    rest = set(CATALOGUE) - set().union(*later.values(), *(of(d) for d in OTHER))
    assert of("mutant") == rest


@ENTRIES
def test_an_entry_is_whole(entry: Entry) -> None:
    assert entry.disposition in DISPOSITIONS
    assert entry.visibility in VISIBILITIES
    assert all((entry.component, entry.wrong, entry.right))
    assert entry.wrong != entry.right
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", entry.name)
    pattern = r"https://github\.com/[^/\s]+/[^/\s]+(/(issues|pull)/\d+)?"
    assert all(re.fullmatch(pattern, thread) for thread in entry.threads)
    assert bool(entry.reason) == (entry.disposition != "mutant")
    assert bool(entry.refers) == (entry.disposition in ("same", "later"))


@ENTRIES
def test_an_entry_about_what_exists_cites_clauses_that_exist(entry: Entry) -> None:
    assert bool(entry.clauses) == (entry.disposition != "later")
    for clause in entry.clauses:
        assert f"#### {clause}. " in SPEC


def test_names_are_told_apart() -> None:
    names = [entry.name for entry in CATALOGUE.values()]
    assert len(set(names)) == len(names)


def test_every_mutant_of_the_catalogue_runs_and_nothing_else_does() -> None:
    entries = {mutant.entry for mutant in EVERY.values()}
    assert of("mutant") <= entries <= of("mutant") | of("layout")


def test_the_same_effect_is_that_of_a_mutant() -> None:
    assert {CATALOGUE[id].refers for id in of("same")} <= {mutant.entry for mutant in EVERY.values()}
