"""SPEC.md and the code say the same: clauses, citations, tables, examples, links."""

from __future__ import annotations

import doctest
import re
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spec_tables
import support

import refimpl
from refimpl.cases import judge, tolerances
from refimpl.numerics.arithmetic import Operand
from refimpl.numerics.blockscale import QUANTISERS
from refimpl.numerics.casts import CASTS
from refimpl.numerics.floating import Floating
from refimpl.numerics.gemm import KERNELS, NAMES
from refimpl.numerics.sites import VALUES as SITES
from refimpl.numerics.sites import every

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "SPEC.md").read_text("utf-8")
DOCUMENTS = ("SPEC.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md")

CLAUSE = re.compile(r"^#### ([A-Z]+)-(\d+)\. (.+)$", re.M)
HEADING = re.compile(r"^(#{1,6}) (.+)$", re.M)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
CITATION = re.compile(r"\b([A-Z]{3,8})-(\d+)(?: to (?:([A-Z]{3,8})-)?(\d+))?\b")
NO_CLAUSES = frozenset({"SHA", "UTF", "IEEE"})  # SHA-256 and the like


def clauses() -> dict[str, str]:
    """Clause -> its text, up to the next heading."""
    found: dict[str, str] = {}
    for match in CLAUSE.finditer(TEXT):
        following = HEADING.search(TEXT, match.end())
        end = following.start() if following else len(TEXT)
        assert f"{match[1]}-{match[2]}" not in found, f"clause {match[1]}-{match[2]} stands twice"
        found[f"{match[1]}-{match[2]}"] = TEXT[match.end() : end]
    return found


def cited(text: str) -> set[str]:
    """The clauses that a text names; a range names all in it."""
    found: set[str] = set()
    for family, first, last_family, last in CITATION.findall(text):
        if family in NO_CLAUSES:
            continue
        assert last_family in ("", family), f"a range from {family} to {last_family}"
        found |= {f"{family}-{n}" for n in range(int(first), int(last or first) + 1)}
    return found


def citations() -> dict[str, set[str]]:
    """Clause -> the files of the package that cite it."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "refimpl").rglob("*.py")):
        for clause in cited(path.read_text("utf-8")):
            found.setdefault(clause, set()).add(path.relative_to(ROOT).as_posix())
    return found


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    found: set[str] = set()
    for _, title in HEADING.findall(FENCE.sub("", text)):
        plain = re.sub(r"[^\w\- ]", "", title.strip().lower())
        found.add(plain.replace(" ", "-"))
    return found


def test_clauses_are_numbered_from_one_in_order() -> None:
    families: dict[str, list[int]] = {}
    for match in CLAUSE.finditer(TEXT):
        families.setdefault(match[1], []).append(int(match[2]))
    for family, numbers in families.items():
        assert numbers == list(range(1, len(numbers) + 1)), family


def test_a_family_of_clauses_stands_together() -> None:
    order = [match[1] for match in CLAUSE.finditer(TEXT)]
    starts = [family for i, family in enumerate(order) if i == 0 or order[i - 1] != family]
    assert len(starts) == len(set(starts)), starts


def test_every_heading_of_the_fourth_level_is_a_clause_a_choice_or_an_example() -> None:
    for level, title in HEADING.findall(FENCE.sub("", TEXT)):
        known = re.match(r"[A-Z]+-\d+\. |Choice \w+$|Example: ", title)
        assert level != "####" or known, title


@pytest.mark.parametrize("clause", list(clauses()))
def test_clause_has_one_source(clause: str) -> None:
    assert clauses()[clause].count("\n*Source:* ") == 1


def test_every_clause_that_code_cites_exists() -> None:
    unknown = {clause: files for clause, files in citations().items() if clause not in clauses()}
    assert not unknown


def test_every_clause_is_cited_by_code_or_says_why_not() -> None:
    known = citations()
    silent = [c for c, text in clauses().items() if c not in known and "\n*Not in code:* " not in text]
    assert not silent


def test_every_family_that_code_names_exists() -> None:
    families = {clause.partition("-")[0] for clause in clauses()}
    for path in (ROOT / "refimpl").rglob("*.py"):
        for names in re.findall(r"\bSPEC ([A-Z]{3,8}(?:, [A-Z]{3,8})*)\b(?!-)", path.read_text("utf-8")):
            assert set(names.split(", ")) <= families, path


def test_clauses_that_the_text_refers_to_exist() -> None:
    assert cited(without_code(TEXT)) <= set(clauses())


def test_every_table_in_marks_is_known() -> None:
    assert set(spec_tables.blocks(TEXT)) == set(spec_tables.TABLES)
    assert TEXT.count("<!-- table: ") == TEXT.count("<!-- end -->") == len(spec_tables.TABLES)


@pytest.mark.parametrize("name", list(spec_tables.TABLES))
def test_table_equals_the_code(name: str) -> None:
    assert spec_tables.blocks(TEXT)[name] == spec_tables.TABLES[name](), (
        "run python tests/spec_tables.py and look at what it changes"
    )


def test_rows_of_a_table_have_as_many_cells_as_its_head() -> None:
    for table in re.findall(r"(?:^\|.*\n)+", FENCE.sub("", TEXT), re.M):
        counts = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
        assert len(set(counts)) == 1, table[:200]


def test_examples_give_the_numbers_that_are_written() -> None:
    names: dict[str, Any] = {}
    report: list[str] = []
    count = 0
    for match in FENCE.finditer(TEXT):
        if match[1] != "python":
            continue
        line = TEXT.count("\n", 0, match.start()) + 1
        test = doctest.DocTestParser().get_doctest(match[2], names, f"line {line}", "SPEC.md", line)
        runner = doctest.DocTestRunner(verbose=False)
        count += runner.run(test, out=report.append, clear_globs=False).attempted
        names = test.globs
    assert not report, "".join(report)
    assert count > 60


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text).replace("\n", " ")):
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        file = ROOT / path if path else ROOT / name
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text("utf-8")), target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_fences_are_closed(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    assert len(re.findall(r"^```", text, re.M)) % 2 == 0


def test_documents_name_the_version_of_the_package() -> None:
    version = refimpl.__version__
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text("utf-8")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_changelog_has_known_headings_only() -> None:
    headings = re.findall(r"^### (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert set(headings) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Vectors"}
    assert "Vectors" in headings


def test_every_choice_has_a_box_and_every_recipe_a_table() -> None:
    for choice in spec_tables.CHOICES:
        assert f"\n#### Choice {choice.name}\n" in TEXT
    for recipe in spec_tables.RECIPES:
        assert f"<!-- table: recipe {recipe} -->" in TEXT


class Sites(Floating):
    """float64 that notes the sites that values cross."""

    def __init__(self) -> None:
        super().__init__(np.float64)
        self.seen: set[str] = set()

    def at(self, site: str, x: Any) -> Any:
        self.seen.add(site)
        return x

    def operand(self, site: str, x: Any) -> Operand:
        self.seen.add(site)
        return Operand(x)


@cache
def crossed() -> frozenset[str]:
    """Every site of a training step, with a query latent and without, with MTP modules and without."""
    sites = Sites()
    for changes in ({}, {"q_lora_rank": None}, {"num_nextn_predict_layers": 2}):
        config = support.config(**changes)
        ids = support.random_ids(config, (1, 4), 2)
        training = refimpl.TrainingConfig(ema_decay=0.5, warmup_steps=0)
        state = refimpl.training.start(config, support.random_weights(config, 1), training, precision=sites)
        refimpl.training.step(state, [{"input_ids": ids, "labels": ids}])
    return frozenset(sites.seen)


def test_every_site_that_a_model_crosses_is_listed() -> None:
    unlisted = [site for site in crossed() if not any(fnmatchcase(site, pattern) for pattern in SITES)]
    assert not unlisted


def test_every_listed_site_is_crossed() -> None:
    idle = [pattern for pattern in SITES if not any(fnmatchcase(site, pattern) for site in crossed())]
    assert not idle


@pytest.mark.parametrize("name", list(spec_tables.RECIPES))
def test_every_rule_of_a_recipe_decides_some_site(name: str) -> None:
    rules = spec_tables.RECIPES[name].rules
    sites = crossed() | set(every())
    first = {next(rule.site for rule in rules if fnmatchcase(site, rule.site)) for site in sites}
    assert first == {rule.site for rule in rules}


def test_every_kernel_of_a_block_scaled_product_is_specified() -> None:
    text = clauses()
    assert re.findall(r"^\| `(\w+)`", text["GEMM-1"], re.M) == sorted(KERNELS, key=text["GEMM-1"].find), (
        "a row for every kernel"
    )
    for name in NAMES:
        assert f"`{name}`" in text["GEMM-1"] + text["GEMM-2"] + text["GEMM-3"]


def test_evidence_of_casts_and_floors_is_that_of_the_code() -> None:
    assert {row.evidence for row in CASTS.values()} == {"recorded"}  # as CAST-1 says of all rows
    assert [row.name for row in QUANTISERS.values() if row.floor is None] == [
        "noclamp"
    ]  # SCALE-1: one has none


def test_constants_of_verdicts_are_those_of_the_code() -> None:
    text = {clause: " ".join(body.split()) for clause, body in clauses().items()}
    assert f"is at most {tolerances.ROW_FACTOR:g} times the noise of its row" in text["VERDICT-4"]
    assert "anything beyond 1e4 of the same sign" in text["VERDICT-5"]
    assert judge.MASKED == 1e4
    assert f"`{judge.SPREAD:g} + 4 / sqrt(count)`" in text["VERDICT-6"]
    assert judge.spread_factor(100) == judge.SPREAD + 4 / 10
    assert f"is at most {judge.BIAS:g} times that of the noise" in text["VERDICT-7"]
