"""A case in memory whose numbers are chosen by the test."""

import numpy as np

from refimpl.cases import format
from refimpl.cases.format import Case, Tensor
from refimpl.cases.judging import InMemory

ZERO = (0.0, 0.0, 0.0)


def number(name, value, *, bound=1.0, spread=1.0, bias=0.0, **more):
    """(tensor, value, extras): errors up to `bound` roundoffs of storage."""
    value = np.asarray(value, np.float64)
    extras = {"bound.storage": np.full(value.shape, bound)}
    tensor = Tensor(
        name,
        "required",
        "F64",
        value.shape,
        format.digest(value, "F64"),
        spread=(spread, 0.0, 0.0),
        bias=(bias, 0.0, 0.0),
        extras=dict.fromkeys(extras, "0" * 64),
        **more,
    )
    return tensor, value, extras


def members(name, value, margin, doubt=1.0, below=100):
    value, margin = np.asarray(value), np.asarray(margin, np.float64)
    extras = {"margin": margin, "doubt.storage": np.full(margin.shape, doubt)}
    tensor = Tensor(
        name,
        "required",
        "I64",
        value.shape,
        format.digest(value, "I64"),
        set=True,
        below=below,
        extras=dict.fromkeys(extras, "0" * 64),
    )
    return tensor, value, extras


def case(*parts, **more):
    tensors = tuple(part[0] for part in parts)
    given = Case(
        id="toy/toy",
        kind="forward",
        outcome="values",
        title="toy",
        clauses=(),
        component="norm",
        backward=False,
        config={},
        choices={},
        flags=(),
        claims=("fp32", "bf16"),
        tensors=tensors,
        certificate={"rejects": {}, "not_applicable": {}},
        tolerance={"derivation": "bound", "text": "chosen"},
        **more,
    )
    expected = {part[0].name: part[1] for part in parts}
    extras = {f"{kind}/{part[0].name}": array for part in parts for kind, array in part[2].items()}
    return InMemory(given, expected, extras)
