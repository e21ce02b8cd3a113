"""Running adapters in this process: committed cases with their verdict, and made-up ones beside float64."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from refimpl import programs
from refimpl.cases.definition import Definition
from refimpl.checkpoint import safetensors
from refimpl.numerics.precision import arithmetic
from refimpl.validate.given import PortCase
from refimpl.validate.verdict import Verdict, check

GOLDEN = "golden"
CLAIM = {"float32": "fp32", "bfloat16": "bf16"}
IDX = ".topk_idx"

# float32 code against float64, relative to the largest element: tables of positions are float32 as well.
CLOSE = 2e-4


def verdict(id: str, dtype: str, compute: Callable[[PortCase], dict], folder: Path) -> Verdict:
    """The verdict on what an adapter gives for a committed case."""
    output = folder / "output.safetensors"
    safetensors.write(output, compute(PortCase.open(f"{GOLDEN}/{id}")))
    return check(f"{GOLDEN}/{id}", output, CLAIM[dtype])


def made_up(d: Definition) -> tuple[PortCase, dict[str, np.ndarray]]:
    """A case that is in no suite, and its outputs in float64, with the routing that this gives."""
    inputs = {name: source.made(f"{d.id} {name}")[0] for name, source in d.inputs.items()}
    weights = {name: source.made(name)[0] for name, source in d.weight_sources().items()}
    setting = programs.Setting(
        arithmetic("float64"), d.config, d.choices, d.path, d.backward, d.arguments, inputs, weights, {}
    )
    found = programs.run(d.component, setting)
    expected = {name: np.asarray(value) for name, value in found.items() if "slots" not in name}
    routing = {name: value for name, value in expected.items() if name.endswith(IDX)}
    case = PortCase(
        Path(), d.id, d.kind, d.component, d.path, d.backward, d.config.to_dict(), d.choices.to_dict(),
        d.arguments, {**inputs, **routing}, weights,
        {name: value.shape for name, value in expected.items()}, (),
    )  # fmt: skip
    return case, expected


def agree(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], but: tuple[str, ...] = ()) -> int:
    """How many tensors were compared; all of them agree, and none is lacking but those that end so."""
    for name, value in expected.items():
        if name.endswith((*but, IDX, ".scores", ".nll", ".q_pe", ".k_pe")):
            continue
        assert name in found, name
        size = np.abs(value).max(initial=0.0)
        assert np.abs(found[name] - value).max(initial=0.0) <= CLOSE * size, name
    return len(found)
