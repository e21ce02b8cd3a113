"""The PyTorch port holds on golden cases, and does not with mistakes in its source.  Group `crosscheck`."""

import sys
from pathlib import Path

import pytest

from refimpl.cases.definition import Definition
from refimpl.cases.folder import Folder
from refimpl.cases.suites import SUITES, suite
from refimpl.validate.preparing import prepared
from refimpl.validate.verdict import check

pytestmark = pytest.mark.crosscheck
torch = pytest.importorskip("torch", reason="torch is not installed")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

HERE = Path(__file__).parent
GOLDEN = HERE.parent.parent / "golden"
SAMPLE = (
    "norm/ranges-vjp",
    "rope/yarn-vjp",
    "rope/tables-yarn-unequal",
    "attention/packed-vjp",
    "mla/no-query-latent-vjp",
    "mla/packed",
    "gate/v3-vjp",
    "gate/bias-negative",
    "moe/experts-vjp",
    "moe/v2",
    "block/dense-vjp",
    "head/loss-vjp",
    "embedding/vjp",
    "linear/q_b_proj-exact",
    "model/packed",
)
# A planted mistake, the dtype in which it is one, and a case that shows it.
CAUGHT = (
    ("R01", "bfloat16", "rope/yarn-vjp"),
    ("Y09-once", "float32", "attention/packed-vjp"),
    ("A07", "bfloat16", "mla/packed"),
    ("A16", "float32", "attention/packed-vjp"),
    ("G04", "bfloat16", "gate/bias-negative"),
    ("G14", "float32", "moe/v2"),
    ("slots-not-restored", "bfloat16", "moe/experts-vjp"),
    ("loss-summed", "float32", "head/loss-vjp"),
)
CLAIMS = {"float32": "fp32", "bfloat16": "bf16"}


@pytest.fixture(scope="module")
def planted():
    """The table of planted changes, whose modules lie beside this file."""
    sys.path.insert(0, str(HERE))
    try:
        import planted_all

        yield planted_all.PLANTED
    finally:
        sys.path.remove(str(HERE))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """id -> a whole case folder, made from the committed one."""
    root, threads = tmp_path_factory.mktemp("whole"), torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda id: prepared(Folder.open(GOLDEN / id), root)
    torch.set_num_threads(threads)


def verdict(port, id, dtype, whole, tmp_path):
    """The port's output, judged by the committed case."""
    output = tmp_path / "output.safetensors"
    safetensors_torch.save_file(port.run(whole(id), dtype), output)
    return check(GOLDEN / id, output, CLAIMS[dtype])


@pytest.mark.parametrize("dtype", CLAIMS)
@pytest.mark.parametrize("id", SAMPLE)
def test_the_port_holds(id, dtype, whole, tmp_path, planted):
    import torch_v3

    found = verdict(torch_v3, id, dtype, whole, tmp_path)
    assert found.holds, found.first_off
    assert not found.surplus


@pytest.mark.parametrize(("name", "dtype", "id"), CAUGHT)
def test_a_mistake_in_its_source_is_found(name, dtype, id, whole, tmp_path, planted):
    assert not verdict(planted[name].port(), id, dtype, whole, tmp_path).holds


@pytest.mark.parametrize("name", ["complex-rotation", "halves-on-both-sides", "experts-backwards"])
def test_a_right_rewrite_holds(name, whole, tmp_path, planted):
    for id in ("rope/yarn-vjp", "mla/packed", "moe/experts-vjp"):
        assert verdict(planted[name].port(), id, "bfloat16", whole, tmp_path).holds, id


def test_every_change_applies_and_is_a_change(planted):
    from planted import SOURCE

    assert len(planted) > 90
    for change in planted.values():
        compile(change.source, change.name, "exec")  # an old text that is not there once is an error
        assert change.source != SOURCE, change.name
        assert change.components, change.name


def test_what_is_not_in_the_catalogue_says_where_it_shows(planted):
    for change in planted.values():
        assert bool(change.answer) + bool(change.stage) + change.right == 1, change.name


def test_the_sample_has_every_suite_that_a_float_port_computes():
    found = {case.suite for name in SUITES for case in suite(name) if isinstance(case, Definition)}
    training = {"mtp", "balance", "training", "schedule"}  # this port only computes the main model
    rest = {"mlp", "reject"} | training  # mlp: also in moe and block
    assert found - {id.partition("/")[0] for id in SAMPLE} == rest


def test_the_command_writes_a_file_and_leaves_other_cases(whole, tmp_path, planted, monkeypatch):
    import torch_v3

    output = tmp_path / "output.safetensors"
    for id, status in (("reject/id-negative", 77), ("norm/ranges", 0)):
        assert not output.exists()
        monkeypatch.setattr(sys, "argv", ["", str(whole(id)), str(output), "--dtype", "bfloat16"])
        assert torch_v3.main() == status
    assert check(GOLDEN / "norm/ranges", output, "bf16").holds
