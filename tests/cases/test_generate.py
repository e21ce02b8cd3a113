"""Writing suites, in one process and in several."""

from pathlib import Path

import pytest

from refimpl.cases.generate import definitions, generate, over
from refimpl.errors import Invalid


def _bytes(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_any_number_of_processes_writes_the_same_bytes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    generate(["norm"], one, whole=False, jobs=1)
    generate(["norm"], two, whole=False, jobs=2)
    assert _bytes(one) == _bytes(two)
    assert len(_bytes(one)) == 3 * 6


def test_every_case_is_reported_when_it_is_done(tmp_path):
    seen = []
    assert generate(["embedding"], tmp_path, whole=True, jobs=1, done=seen.append) == 3
    assert sorted(seen) == ["embedding/exact", "embedding/exact-vjp", "embedding/vjp"]


def test_an_unknown_suite_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(Invalid, match="suite 'nothing'"):
        generate(["norm", "nothing"], tmp_path / "out", whole=False, jobs=1)
    assert not (tmp_path / "out").exists()


def test_all_suites_are_the_default():
    assert {d.suite for d in definitions()} > {"norm", "gate", "model", "reject"}


def test_an_error_in_a_process_comes_back(tmp_path):
    (tmp_path / "norm").write_text("in the way")
    with pytest.raises(Exception, match="norm"):
        list(over(_fails, [("a", tmp_path), ("b", tmp_path)], 2))


def _fails(_: str, root: Path) -> None:
    raise Invalid(f"{root / 'norm'} is in the way")
