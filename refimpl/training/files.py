"""A state as a folder: written whole or not at all, read with every number checked.  SPEC STEP-1.

state.json names the one safetensors file that belongs to it.  That file is written first, under a name that
was never used, and state.json is then replaced at once; so whenever the writer is killed, state.json and the
file that it names are there and belong together.  Files that nothing names are removed by the next writer.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Final

import numpy as np

from refimpl.checkpoint import names, safetensors
from refimpl.checkpoint.atomic import write_bytes
from refimpl.checkpoint.folder import CONFIG, SINGLE
from refimpl.checkpoint.weights import require_finite
from refimpl.config.choices import Choices
from refimpl.config.jsonfile import read_object
from refimpl.config.model import ModelConfig
from refimpl.config.rules import integer, real, show
from refimpl.config.training import TrainingConfig
from refimpl.errors import Invalid, Missing, Unreadable, Unsupported
from refimpl.layers.ops import DEEPSEEK_V3
from refimpl.numerics.arithmetic import Arithmetic, Array
from refimpl.numerics.precision import arithmetic
from refimpl.numerics.recipe import Recipe
from refimpl.training.adamw import Powers
from refimpl.training.rules import DEEPSEEK_V3 as RULES
from refimpl.training.state import State

STATE: Final = "state.json"
VERSION: Final = 1
_TENSORS: Final = re.compile(r"state-\d{1,19}-[0-9a-f]{8}\.safetensors")
_COUNT: Final = integer(low=0, high=2**63 - 1)
_POWER: Final = real(high=1.0, strict=False)
_FIELDS: Final = (
    "version",
    "precision",
    "steps",
    "tokens",
    "powers",
    "tensors",
    "config",
    "training",
    "choices",
    "run",
)


def save(state: State, folder: str | PathLike[str], run: Mapping[str, Any] | None = None) -> None:
    """Write the state, and what the run wants to remember (JSON's types).

    Raises: Invalid for a state whose arithmetic, operations or rules have no name, or that is not finite;
    Unreadable.
    """
    recipe = getattr(state.ar, "recipe", None)
    if state.ops is not DEEPSEEK_V3 or state.rules is not RULES or not _known(state.ar):
        raise Invalid(
            "the state has operations, rules or an arithmetic of its own, but only a named precision or a "
            "recipe with the operations and rules of DeepSeek-V3 can be saved."
        )
    path = Path(folder)
    for name, array in _named(state):  # or the state that is there would be replaced by one that is refused
        require_finite(f"{name} after step {state.steps}", array)
    _make(path)
    file = f"state-{state.steps}-{secrets.token_hex(4)}.safetensors"
    written = {
        "version": VERSION,
        "precision": state.precision,
        "recipe": None if recipe is None else recipe.to_dict(),
        "steps": state.steps,
        "tokens": state.tokens,
        "powers": [state.powers.beta1, state.powers.beta2],
        "tensors": file,
        "config": state.config.to_dict(),
        "training": state.training.to_dict(),
        "choices": state.choices.to_dict(),
        "run": dict(run or {}),
    }
    text = json.dumps(written, indent=1, allow_nan=False).encode() + b"\n"
    safetensors.write(path / file, dict(_named(state)))
    write_bytes(path / STATE, text)
    for other in path.iterdir():
        if other.name != file and (_TENSORS.fullmatch(other.name) or _left_behind(other.name)):
            with suppress(OSError):
                other.unlink()


def load(folder: str | PathLike[str]) -> tuple[State, dict[str, Any]]:
    """The state and what the run remembered.  Raises Unreadable, Unsupported (another version), Invalid,
    Missing (a field or tensor)."""
    path = Path(folder) / STATE
    if not path.exists():
        raise Missing(f"{path} is missing, but a saved state must have it.")
    while True:
        given = read_object(path)
        try:
            return _loaded(path, given)
        except Unreadable:
            if read_object(path).get("tensors") == given.get("tensors"):
                raise  # and not because a writer put a new state in its place meanwhile


def _loaded(path: Path, given: Mapping[str, Any]) -> tuple[State, dict[str, Any]]:
    if given.get("version") != VERSION:
        raise Unsupported(f"{path} has version {show(given.get('version'))}, but it must be {VERSION}.")
    for name in _FIELDS:
        if name not in given:
            raise Missing(f"{path} has no field {name}, but a saved state must have it.")
    config, training, choices = (_object(path, given, name) for name in ("config", "training", "choices"))
    file, powers = given["tensors"], given["powers"]
    if not isinstance(file, str) or not _TENSORS.fullmatch(file):
        raise Invalid(f"{path} names the tensors {show(file)}, but it must name a state's file beside it.")
    if not isinstance(powers, list) or len(powers) != 2:
        raise Invalid(f"{path} has powers {show(powers)}, but they must be two numbers.")
    own, ar = ModelConfig.from_dict(config), _arithmetic(path, given)
    settings = TrainingConfig.from_dict(training)
    weights, first, second, average = _read(path.parent / file, own, settings, ar)
    state = State(
        own,
        settings,
        Choices.from_dict(choices),
        ar,
        weights,
        first,
        second,
        average,
        Powers(*(_POWER.settle(f"{path}: power", power) for power in powers)),
        _COUNT.settle(f"{path}: steps", given["steps"]),
        _COUNT.settle(f"{path}: tokens", given["tokens"]),
    )
    return state, _object(path, given, "run")


def export(state: State, folder: str | PathLike[str], average: bool = False) -> None:
    """The weights, or their average, as a checkpoint in the published layout.  A tensor is F32 where that
    loses nothing.  Raises Invalid if the folder is there or there is no average, Unreadable."""
    path = Path(folder)
    if path.exists():
        raise Invalid(f"{path} exists, but a checkpoint must be exported to a new folder.")
    if average and not state.average:
        raise Invalid("the state has no average, but to export it ema_decay must not be 0.")
    held = {**state.weights, **(state.average if average else {})}
    arrays = held | {name: held[own] for name, own in names.aliases(state.config).items()}
    config = replace(state.config, quantization_config=None)  # nothing is in FP8
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        _make(temporary)
        safetensors.write(temporary / SINGLE, {name: _narrow(array) for name, array in arrays.items()})
        write_bytes(temporary / CONFIG, json.dumps(config.to_dict(), indent=1).encode() + b"\n")
        try:
            temporary.rename(path)
        except OSError as error:
            raise Unreadable(f"{path} cannot be made ({error.strerror}), but it must be possible.") from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _named(state: State) -> Iterator[tuple[str, Array]]:
    for kind, arrays in zip(_KINDS, (state.weights, state.first, state.second, state.average), strict=True):
        yield from ((f"{kind}/{name}", array) for name, array in arrays.items())


_KINDS: Final = ("weight", "first", "second", "average")


def _read(
    path: Path, config: ModelConfig, training: TrainingConfig, ar: Arithmetic
) -> list[dict[str, Array]]:
    """Weights, moments and average.  Nothing is read before all names, types and shapes are what they must
    be."""
    file = safetensors.open_file(path)
    specs = {name: spec for name, spec in names.parameters(config).items() if spec.kind != "scale"}
    learned = [name for name, spec in specs.items() if spec.kind == "param"]
    kept = learned if training.ema_decay else []
    wanted = {
        (kind, name): specs[name].shape
        for kind, those in zip(_KINDS, (specs, learned, learned, kept), strict=True)
        for name in those
    }
    carrier = np.dtype(ar.zeros((1,)).dtype)
    dtype = {"float64": "F64", "float32": "F32"}[carrier.name]
    for (kind, name), shape in wanted.items():
        full = f"{kind}/{name}"
        if full not in file:
            raise Missing(f"tensor {full} is not in {path}, but it must be there.")
        if (file.dtype(full), file.shape(full)) != (dtype, shape):
            raise Invalid(
                f"tensor {full} in {path} is {file.dtype(full)} {file.shape(full)}, but it must be {dtype} "
                f"{shape}."
            )
    if len(file) != len(wanted):
        extra = next(name for name in file if tuple(name.split("/", 1)) not in wanted)
        raise Invalid(f"tensor {extra[:80]} is in {path}, but nothing of the state has that name.")
    found: list[dict[str, Array]] = [{}, {}, {}, {}]
    for kind, name in wanted:
        value = file[f"{kind}/{name}"]
        require_finite(f"{kind}/{name} in {path}", value)
        found[_KINDS.index(kind)][name] = value
    return found


def _known(ar: Arithmetic) -> bool:
    """Whether the name of an arithmetic, or its recipe, says all about it."""
    try:
        known = arithmetic(getattr(ar, "recipe", ar.name))
    except Invalid:
        return False
    return type(known) is type(ar)


def _arithmetic(path: Path, given: Mapping[str, Any]) -> Arithmetic:
    """Of the recipe whose rows are in the file, else of the precision's name."""
    name = _text(path, given, "precision")
    if given.get("recipe") is None:
        return arithmetic(name)
    recipe = Recipe.from_dict(_object(path, given, "recipe"))
    if recipe.name != name:
        raise Invalid(f"{path} has precision {show(name)}, but its recipe is named {show(recipe.name)}.")
    return arithmetic(recipe)


def _narrow(array: Array) -> Array:
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float32)
    return narrow if np.array_equal(narrow, array) else array


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unreadable(f"{path} cannot be made ({error.strerror}), but it must be a folder.") from None


def _left_behind(name: str) -> bool:
    return name.startswith(".state") and name.endswith(".tmp")


def _object(path: Path, given: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = given[name]
    if not isinstance(value, dict):
        raise Invalid(f"{path} has {name} {show(value)}, but it must be an object of named fields.")
    return value


def _text(path: Path, given: Mapping[str, Any], name: str) -> str:
    value = given[name]
    if not isinstance(value, str):
        raise Invalid(f"{path} has {name} {show(value)}, but it must be text.")
    return value
