"""What a port that is a Python module is given, and how it is run.  SPEC VERDICT-15.

    def run(case):                       # case: PortCase
        if case.component != "norm" or case.backward:
            return None                  # not for me; or raise NotForMe
        x, gain = case.inputs["x"], case.weights[f"{case.path}.weight"]
        ...
        return {case.path: y}            # name -> array

The module runs in a process of its own, started as a worker: a request is a line with two paths in JSON, an
answer a line of JSON on a file descriptor of its own, so that the module may print what it likes.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from refimpl.cases.folder import Folder
from refimpl.cases.format import INPUT, WEIGHT
from refimpl.checkpoint import safetensors
from refimpl.checkpoint.dtypes import Stored
from refimpl.errors import Error, Invalid, Missing
from refimpl.numerics.arithmetic import Array
from refimpl.validate.output import largest


class NotForMe(Exception):
    """A module raises it for a case that it does not compute."""


class Arrays(Mapping[str, Array]):
    """The inputs, or the weights, of a case by name, read when they are asked for: float32 (exactly the
    values), float64, int64 or bool; 8-bit codes of a case of bits as they are."""

    def __init__(self, folder: Folder, role: str) -> None:
        self._folder = folder
        self._tensors = {t.name: t for t in folder.case.tensors if t.role == role}

    def __getitem__(self, name: str) -> Array:
        if name not in self._tensors:
            raise Missing(f"case {self._folder.case.id} has no {name}, but it must be one of {list(self)}.")
        t = self._tensors[name]
        if self._folder.case.by_bits:
            return self._folder.given_codes(t)
        value = self._folder.given(t)
        return value.astype(np.float32) if t.dtype in ("BF16", "F32") else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True)
class PortCase:
    """A case as a module sees it; the fields are those of case.json.

    folder: where case.json and inputs.safetensors are.  path: the module's name in the checkpoint, below
    which weights and outputs are named.  outputs: name -> shape of what is asked for, in the order of
    computation; required: those that have to be there.
    """

    folder: Path
    id: str
    kind: str
    component: str
    path: str
    backward: bool
    config: Mapping[str, Any]
    choices: Mapping[str, Any]
    arguments: Mapping[str, Any]
    inputs: Mapping[str, Array]
    weights: Mapping[str, Array]
    outputs: Mapping[str, tuple[int, ...]]
    required: tuple[str, ...]

    @classmethod
    def open(cls, path: str | Path) -> PortCase:
        """The case of a folder.  Raises Unreadable."""
        folder = Folder.open(path)
        case = folder.case
        return cls(
            folder.path,
            case.id,
            case.kind,
            case.component,
            case.path,
            case.backward,
            case.config,
            case.choices,
            case.arguments,
            Arrays(folder, INPUT),
            Arrays(folder, WEIGHT),
            {t.name: t.shape for t in case.outputs},
            tuple(t.name for t in case.outputs if t.role == "required"),
        )


def module(name: str) -> ModuleType:
    """The module of that name, or in that file.  Raises what its import raises."""
    if not name.endswith(".py"):
        sys.path.insert(0, os.getcwd())
        return importlib.import_module(name)
    path = Path(name).resolve()
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = found
    spec.loader.exec_module(found)
    return found


def serve(name: str, answers: int) -> None:
    """The worker: imports the module, says so, then runs case after case until there are no more."""
    requests = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.set_inheritable(answers, False)
    try:
        run = getattr(module(name), "run", None)
        fault = None if callable(run) else "has no function run(case)"
    except BaseException as error:
        traceback.print_exc()
        run, fault = None, f"cannot be imported ({_said(error)})"
    _answer(answers, {"outcome": "failed" if fault else "done", "why": fault or ""})
    if run is None or fault:
        return
    for line in requests:
        folder, output = json.loads(line)
        _answer(answers, _run(run, folder, output))


def _run(run: Callable[[PortCase], Any], folder: str, output: str) -> dict[str, str]:
    try:
        given = PortCase.open(folder)
        found = run(given)
        if found is None:
            return {"outcome": "not for me", "why": ""}
        _write(given, found, Path(output))
    except NotForMe as error:
        return {"outcome": "not for me", "why": str(error)[:200]}
    except BaseException as error:  # whatever it is, the other cases go on
        traceback.print_exc()
        return {"outcome": "failed", "why": _said(error)}
    return {"outcome": "done", "why": ""}


def _write(case: PortCase, found: Any, output: Path) -> None:
    if not isinstance(found, Mapping):
        raise Invalid(f"run returned {type(found).__name__}, but it must return a mapping, or None.")
    tensors = {str(name): _stored(str(name), value) for name, value in found.items()}
    count = sum(math.prod(stored.shape) for stored in tensors.values())
    limit = largest(Folder.open(case.folder).case)
    if 8 * count > limit:
        raise Invalid(f"run returned {count} elements, but they must fit in {limit} bytes.")
    safetensors.write(output, tensors)


def _stored(name: str, value: Any) -> Stored:
    """An array of NumPy, or whatever becomes one (a tensor of torch or JAX)."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if "bfloat16" in str(value.dtype) else value
    array = np.asarray(value)
    if array.dtype.name == "bfloat16":  # of ml_dtypes
        return Stored("BF16", array.shape, np.ascontiguousarray(array).view(np.uint16))
    try:
        return Stored.of(np.ascontiguousarray(array).reshape(array.shape), f"tensor {name}")
    except Error as error:
        raise Invalid(str(error)) from None


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:200] if lines else type(error).__name__


def _answer(answers: int, value: dict[str, str]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(answers, json.dumps(value).encode() + b"\n")
