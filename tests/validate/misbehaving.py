"""A port of RMSNorm that does what the name of the case folder says.  Run as a command, or imported."""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np


def norm(case):
    """float32, right."""
    x, gain = case.inputs["x"], case.weights[f"{case.path}.weight"]
    rms = np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(case.arguments["eps"]))
    return {case.path: x / rms * gain}


def run(case):
    what = case.folder.name
    if what == "not-for-me":
        return None
    y = norm(case)
    right = y[case.path]
    if what in RUNS:
        RUNS[what]()
    return {
        "nan": {case.path: np.where(np.arange(right.shape[-1]) == 3, np.nan, right)},
        "shape": {case.path: right[:, :-1]},
        "dtype": {case.path: right.astype(np.int64)},
        "unstorable": {case.path: right.astype(np.complex128)},
        "surplus": {**y, "debug": right},
        "missing": {"debug": right},
        "empty": {},
        "wrong": {case.path: np.float32(0.9) * right},
    }.get(what, y)


def _crash():
    os.abort()


def _leave():
    os._exit(3)


def _raise():
    raise RuntimeError("this kernel is not there\nsecond line")


def _hang():
    time.sleep(600)


def _print():
    sys.stdout.write("no\x00ise " * 1_000_000)
    sys.stderr.write("the end of it\n")


def _fork():
    if os.fork() == 0:
        Path(os.environ["CHILD"]).write_text(str(os.getpid()))
        time.sleep(600)
        os._exit(0)


RUNS = {"crash": _crash, "leaves": _leave, "raises": _raise, "hangs": _hang, "prints": _print, "forks": _fork}


def main(folder, output):
    """The same as a command, and what only a command can do to its file."""
    sys.path.insert(0, str(Path(__file__).parent.parent.parent / "golden"))
    import sample_port  # which reads and writes files without the package, so that it starts quickly

    folder, output = Path(folder), Path(output)
    given = json.loads((folder / "case.json").read_text())
    tensors = sample_port.read(folder / "inputs.safetensors")
    case = SimpleNamespace(
        folder=folder, path=given["path"], arguments=given["arguments"], inputs=tensors, weights=tensors
    )
    what = case.folder.name
    if what == "sparse":
        with output.open("wb") as file:
            file.truncate(2 << 30)
        return 0
    if what == "folder":
        output.mkdir()
        return 0
    if what == "pipe":
        os.mkfifo(output)
        return 0
    if what == "floods":
        with output.open("wb") as file:
            while True:
                file.write(bytes(1 << 20))
    if what in ("silent", "refuses"):
        return 0 if what == "silent" else 1
    found = run(case)
    if found is None:
        return 77
    if what != "unstorable":
        sample_port.write(output, found)
    if what == "truncated":
        os.truncate(output, output.stat().st_size - 5)
    if what == "junk":
        output.write_bytes(b"junk" * 1000)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
