"""Suite norm: RMS normalisation at the model's width.  SPEC NORM-1."""

from refimpl.cases.definition import Definition, Draw
from refimpl.cases.suites.common import V3, LAYER, pair

CASES: tuple[Definition, ...] = (
    *pair(
        "norm/hidden",
        "RMSNorm of 8 rows of width 7168, gain not 1",
        ("NORM-1",),
        "norm",
        V3,
        {"x": Draw((8, 7168))},
        dy=(8, 7168),
        path=f"{LAYER}.input_layernorm",
        arguments={"eps": 1e-6},
    ),
)
