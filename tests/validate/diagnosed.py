"""Ports for the tests of the diagnosis: a stored case run in float32, or with the roundings of bfloat16."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from refimpl import programs
from refimpl.cases.claims import CLAIMS
from refimpl.cases.folder import Folder
from refimpl.cases.setting import setting_of
from refimpl.checkpoint import safetensors
from refimpl.numerics.floating import Floating
from refimpl.numerics.precision import arithmetic
from refimpl.validate.evidence import Evidence
from refimpl.variants.variation import unchanged

GOLDEN = Path(__file__).parent.parent.parent / "golden"


def port(
    case: str, folder: Path, change=unchanged, claim: str = "fp32", without=(), program=programs.run
) -> Evidence:
    """What a port with this change writes for a case, as evidence."""
    opened = Folder.open(GOLDEN / case)
    ar = Floating(np.float32) if claim == "fp32" else arithmetic("bf16")
    outputs = program(opened.case.component, change(setting_of(opened, ar)))
    written = {}
    for t in opened.case.outputs:
        if t.name in outputs and t.name not in without:
            value = np.asarray(outputs[t.name]).reshape(t.shape)
            written[t.name] = value if value.dtype.kind == "i" else value.astype(np.float32)
    output = folder / f"{case.replace('/', '-')}.safetensors"
    safetensors.write(output, written)
    return Evidence(opened, output)


FP32, BF16 = CLAIMS["fp32"], CLAIMS["bf16"]
