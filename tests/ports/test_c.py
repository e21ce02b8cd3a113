"""The C port: it needs nothing but the case folders, it is right, and what is planted in it is found."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from ports import c_port, planted_c
from ports.planted_c import PLANTED

from refimpl.cases.folder import Folder, stored
from refimpl.checkpoint import safetensors
from refimpl.validate.verdict import check

pytestmark = pytest.mark.skipif(c_port.compiler() is None, reason="there is no C compiler here")

GOLDEN = Path(__file__).parent.parent.parent / "golden"
SUITES = ("norm", "rope", "gate", "mlp")
CASES = [f"{suite}/{path.name}" for suite in SUITES for path in sorted((GOLDEN / suite).iterdir())]
SMALL = (
    "norm/epsilon-vjp",
    "rope/yarn-vjp",
    "rope/tables-yarn",
    "gate/v2-groups-vjp",
    "gate/ties",
    "mlp/narrow",
)
FAILS = [name for name, p in PLANTED.items() if not p.right and not p.hidden]


def write_whole(case: str, folder: Path) -> Path:
    """A committed case as `refimpl golden generate` writes it, as far as a port reads it."""
    given = Folder.open(GOLDEN / case)
    folder.mkdir(parents=True)
    shutil.copy(GOLDEN / case / "case.json", folder)
    tensors = {t.name: stored(given.given(t), t.dtype) for t in given.case.tensors if t.given}
    safetensors.write(folder / "inputs.safetensors", tensors)
    return folder


class Whole(dict[str, Path]):
    """Whole cases by id, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __missing__(self, case: str) -> Path:
        self[case] = write_whole(case, self.root / case)
        return self[case]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("cases"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> c_port.Build:
    return c_port.Build(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def port(plain: c_port.Build) -> Path:
    return plain.port()


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The port with the sanitizers of addresses and undefined behaviour."""
    build = c_port.Build(tmp_path_factory.mktemp("checked"), c_port.SANITIZERS)
    try:
        return build.port()
    except AssertionError as error:  # the compiler is there, its run-time libraries need not be
        if "asan" in str(error) or "sanitize" in str(error):
            pytest.skip("this compiler has no sanitizers")
        raise


def ran(port: Path, case: Path, output: Path) -> None:
    done = c_port.run(port, case, output)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def refused(port: Path, case: Path, output: Path) -> str:
    """The one sentence of a port that ends with status 1 and writes nothing."""
    done = c_port.run(port, case, output)
    assert done.returncode == 1, done.stderr
    assert not output.exists()
    line = done.stderr.removeprefix("port: ").removesuffix("\n")
    assert done.stderr.startswith("port: ")
    assert line.endswith(".")
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    "case",  # 44 million numbers of one expert take 5 s; mlp/narrow is the same with fewer
    [pytest.param(case, marks=pytest.mark.slow) if case == "mlp/expert" else case for case in CASES],
)
def test_the_port_is_right(case: str, port: Path, whole: Whole, tmp_path: Path) -> None:
    output = tmp_path / "output.safetensors"
    ran(port, whole[case], output)
    verdict = check(GOLDEN / case, output, "fp32")
    assert verdict.holds, verdict.first_off
    assert not verdict.surplus
    assert {t.name for t in Folder.open(GOLDEN / case).case.outputs} == set(safetensors.open_file(output))


@pytest.mark.parametrize("case", ["linear/q_b_proj", "moe/v3", "casts/bf16-format", "reject/bias-nan"])
def test_other_components_and_kinds_are_not_for_it(case: str, port: Path, tmp_path: Path) -> None:
    output = tmp_path / "output.safetensors"
    assert c_port.run(port, GOLDEN / case, output).returncode == c_port.NOT_FOR_ME
    assert not output.exists()


@pytest.mark.parametrize("case", SMALL)
def test_no_sanitizer_complains(case: str, checked: Path, whole: Whole, tmp_path: Path) -> None:
    output = tmp_path / "output.safetensors"
    ran(checked, whole[case], output)
    assert check(GOLDEN / case, output, "fp32").holds


# Malformed files


def header(tensors: object, data: bytes = b"") -> bytes:
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: object = "F32", shape: object = (2,), at: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": at}


FILES = {
    "empty": (b"", "0 bytes"),
    "only a length": (struct.pack("<Q", 2), "2 bytes, but 0 follow"),
    "header beyond the file": (struct.pack("<Q", 1 << 40) + b"{}", "1099511627776 bytes, but 2 follow"),
    "largest header": (b"\xff" * 8 + b"{}", "header has 18446744073709551616 bytes"),
    "long header": (header(b" " * (5 << 20)), "at most 4194304"),
    "header is a list": (header([]), "not a JSON object"),
    "header is cut": (header(b'{"x": '), "where a value is required"),
    "string is cut": (header(b'{"x'), "a string that ends"),
    "string ends in an escape": (header(b'{"x\\'), "a string that ends"),
    "half a pair": (header(b'{"\\ud800": 1}'), "the second half of a pair"),
    "bytes after the header": (header(b"{} x"), "where the end is required"),
    "deep arrays": (header(b"[" * 100000), "nested deeper than 32"),
    "deep objects": (header(b'{"x":' * 100000), "nested deeper than 32"),
    "name twice": (header(b'{"x": 1, "x": 2}'), "has the key x twice"),
    "entry is a number": (header({"x": 1}), "not an object"),
    "no dtype": (header({"x": {}}), "the field dtype is absent"),
    "unknown dtype": (header({"x": entry("F8_E4M3")}), "dtype F8_E4M3"),
    "dtype is a number": (header({"x": entry(3)}), "dtype is a number"),
    "shape is text": (header({"x": entry(shape="2")}), "shape is a string"),
    "axis is negative": (header({"x": entry(shape=[-1])}), "not an integer from 0"),
    "axis is not whole": (header({"x": entry(shape=[1.5])}), "not an integer from 0"),
    "axis is huge": (
        header(b'{"x":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}'),
        "a finite number",
    ),
    "shape overflows": (header({"x": entry(shape=[1 << 30] * 8)}, bytes(8)), "larger than its file"),
    "many axes": (header({"x": entry(shape=[1] * 9)}, bytes(4)), "9 axes"),
    "one offset": (header({"x": entry(at=[0])}, bytes(8)), "1 data_offsets"),
    "offsets backwards": (header({"x": entry(at=[8, 0])}, bytes(8)), "ends outside"),
    "offsets outside": (header({"x": entry(at=[0, 8])}, bytes(4)), "larger than its file|ends outside"),
    "too few bytes": (header({"x": entry(at=[0, 4])}, bytes(8)), "not what its shape and dtype need"),
    "surplus bytes": (header({"x": entry()}, bytes(12)), "12 bytes of tensors"),
    "overlap": (header({"x": entry(), "y": entry()}, bytes(8)), "a hole or an overlap"),
    "tensor is absent": (header({"y": entry()}, bytes(8)), "the tensor x is absent"),
    "tensor without axes": (header({"x": entry(shape=[], at=[0, 4])}, bytes(4)), "empty or has no axes"),
    "tensor is empty": (header({"x": entry(shape=[0], at=[0, 0])}), "empty or has no axes"),
    "newline in a name": (header({"a\nb": entry("F8\n")}), "dtype F8?"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_malformed_file_is_refused(name: str, checked: Path, tmp_path: Path) -> None:
    data, sentence = FILES[name]
    shutil.copy(GOLDEN / "norm/hidden/case.json", tmp_path)
    (tmp_path / "inputs.safetensors").write_bytes(data)
    said = refused(checked, tmp_path, tmp_path / "output.safetensors")
    assert any(part in said for part in sentence.split("|")), said


@pytest.mark.parametrize("case", ["norm/epsilon-vjp", "gate/v3", "rope/yarn"])
def test_no_truncation_is_read_beyond_its_end(case: str, checked: Path, whole: Whole, tmp_path: Path) -> None:
    data = (whole[case] / "inputs.safetensors").read_bytes()
    shutil.copy(whole[case] / "case.json", tmp_path)
    for length in np.random.default_rng(5).integers(0, len(data), 6):
        (tmp_path / "inputs.safetensors").write_bytes(data[:length])
        refused(checked, tmp_path, tmp_path / "output.safetensors")


JSON = {
    "no text": (b"", "where a value is required"),
    "control character": (b'{"kind": "a\tb"}', "a printable character"),
    "a number without digits": (b'{"kind": -}', "a digit"),
    "NaN": (b'{"kind": NaN}', "a value"),
    "kind is a number": (b'{"kind": 3}', "the field kind is a number, but a string is required"),
    "no kind": (b"[]", "the field kind is absent"),
}


@pytest.mark.parametrize("name", JSON)
def test_a_malformed_case_is_refused(name: str, checked: Path, tmp_path: Path) -> None:
    text, sentence = JSON[name]
    (tmp_path / "case.json").write_bytes(text)
    assert sentence in refused(checked, tmp_path, tmp_path / "output.safetensors")


CHANGES = {  # case -> (what is changed in case.json, what the port says)
    "experts do not divide": ("gate/v3", ("n_group", 7), "256 experts do not divide into 7 groups"),
    "more groups than there are": ("gate/v3", ("topk_group", 9), "9 of 8 groups"),
    "more experts than are kept": ("gate/v3", ("num_experts_per_tok", 129), "129 experts are to be chosen"),
    "other shape than the router": ("gate/v3", ("n_routed_experts", 264), "256 rows, but 264 are required"),
    "zero experts": ("gate/v3", ("n_routed_experts", 0), "at least 1"),
    "unknown scores": ("gate/v3", ("scoring_func", "tanh"), "scoring_func is tanh"),
    "odd rotary width": ("rope/yarn", ("qk_rope_head_dim", 63), "an even number is required"),
    "rotary base below 1": ("rope/yarn", ("rope_theta", 0.5), "rope_theta is 0.5"),
    "YaRN that shortens": (
        "rope/yarn",
        ("rope_scaling", {"type": "yarn", "factor": 0.5, "original_max_position_embeddings": 4096}),
        "YaRN's factor is 0.5",
    ),
    "unknown rotary type": ("rope/yarn", ("rope_scaling", {"type": "ntk"}), "the rotary type is ntk"),
    "an enormous rotary width": ("rope/yarn", ("qk_rope_head_dim", 1 << 30), "memory"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_configuration_that_does_not_fit_is_refused(
    name: str, checked: Path, whole: Whole, tmp_path: Path
) -> None:
    case, (field, value), sentence = CHANGES[name]
    content = json.loads((whole[case] / "case.json").read_text())
    content["config"][field] = value
    (tmp_path / "case.json").write_text(json.dumps(content))
    shutil.copy(whole[case] / "inputs.safetensors", tmp_path)
    assert sentence in refused(checked, tmp_path, tmp_path / "output.safetensors")


def test_numbers_that_are_not_finite_are_refused(checked: Path, whole: Whole, tmp_path: Path) -> None:
    folder = whole["gate/ties"]
    shutil.copy(folder / "case.json", tmp_path)
    file = safetensors.open_file(folder / "inputs.safetensors")
    tensors = {name: np.asarray(file[name], np.float32) for name in file}
    tensors["model.layers.3.mlp.gate.e_score_correction_bias"][3] = np.nan
    safetensors.write(tmp_path / "inputs.safetensors", tensors)
    said = refused(checked, tmp_path, tmp_path / "output.safetensors")
    assert "element 3 of tensor model.layers.3.mlp.gate.e_score_correction_bias is not finite" in said


def test_routing_that_is_given_is_checked(checked: Path, whole: Whole, tmp_path: Path) -> None:
    folder = whole["gate/ties-vjp"]
    shutil.copy(folder / "case.json", tmp_path)
    file = safetensors.open_file(folder / "inputs.safetensors")
    for expert, sentence in ((-1, "expert -1"), (256, "expert 256"), (None, "twice")):
        tensors = {name: np.array(file[name]) for name in file}
        ids = tensors["model.layers.3.mlp.gate.topk_idx"]
        ids[2, 1] = ids[2, 0] if expert is None else expert
        safetensors.write(tmp_path / "inputs.safetensors", tensors)
        assert sentence in refused(checked, tmp_path, tmp_path / "output.safetensors")


def test_outputs_of_one_name_are_refused(checked: Path, whole: Whole, tmp_path: Path) -> None:
    content = (whole["norm/hidden-vjp"] / "case.json").read_text()
    (tmp_path / "case.json").write_text(content.replace("model.layers.3.input_layernorm", "grad.x"))
    file = safetensors.open_file(whole["norm/hidden-vjp"] / "inputs.safetensors")
    named = {name.replace("model.layers.3.input_layernorm", "grad.x"): np.array(file[name]) for name in file}
    safetensors.write(tmp_path / "inputs.safetensors", {k: v.astype(np.float32) for k, v in named.items()})
    said = refused(checked, tmp_path, tmp_path / "output.safetensors")
    assert "two outputs of this case are named grad.x" in said


def test_arguments_are_required(port: Path) -> None:
    done = subprocess.run([port], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        "port: the arguments are a case folder and an output file.\n",
    )


# Planted mistakes


def off(port: Path, cases: list[str], whole: Whole, folder: Path) -> Iterator[tuple[str, str]]:
    """Each case that does not hold, with the first tensor that is off."""
    output = folder / "output.safetensors"
    for case in cases:
        ran(port, whole[case], output)
        verdict = check(GOLDEN / case, output, "fp32")
        if verdict.first_off is not None:
            yield case, verdict.first_off.name


def of(planted: planted_c.Planted) -> list[str]:
    """The cases in which it could show, forward ones first; the two large ones are left to the rest."""
    small = [case for case in CASES if case not in ("mlp/expert", "gate/wide")]
    found = [case for case in small if component(case) in planted.components]
    return sorted(found, key=lambda case: case.endswith("-vjp"))


@cache
def component(case: str) -> str:
    return Folder.open(GOLDEN / case).case.component


@pytest.mark.parametrize("name", FAILS)
def test_what_is_planted_is_caught(
    name: str, plain: c_port.Build, port: Path, whole: Whole, tmp_path: Path
) -> None:
    planted = PLANTED[name]
    found = next(off(plain.changed(name, planted.file, planted.source), of(planted), whole, tmp_path), None)
    assert found is not None
    if planted.stage:
        assert any(fnmatch(found[1], pattern) for pattern in planted.stage), found


@pytest.mark.parametrize("name", [name for name in PLANTED if name not in FAILS])
def test_what_is_right_or_hidden_passes(
    name: str, plain: c_port.Build, port: Path, whole: Whole, tmp_path: Path
) -> None:
    planted = PLANTED[name]
    assert not list(off(plain.changed(name, planted.file, planted.source), of(planted), whole, tmp_path))
