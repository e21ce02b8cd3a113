"""Suite norm: RMS normalisation.  SPEC NORM-1, NORM-2."""

import numpy as np

from refimpl.cases.definition import SEED, Definition, Draw, Given
from refimpl.cases.suites import flags
from refimpl.cases.suites.common import LAYER, V3, pair
from refimpl.numerics import generator


def _rows() -> Given:
    """16 rows of width 512 with root mean squares of 0.82, 0.1, 0.013 and 0.0032, a quarter each; the last of
    every quarter has a mean that is not 0."""
    values = generator.tensor(SEED, "norm/ranges rows", (16, 512), 2.0**-7)
    values = values * np.ldexp(1.0, -np.repeat([0, 3, 6, 8], 4))[:, None]
    values[3::4] = np.abs(values[3::4])
    return Given(values)


CASES: tuple[Definition, ...] = (
    *pair(
        "norm/hidden",
        "RMSNorm of 8 rows of width 7168, gain from 0.4 to 1.6",
        ("NORM-1",),
        "norm",
        V3,
        {"x": Draw((8, 7168))},
        dy=(8, 7168),
        backward_clauses=("NORM-2",),
        path=f"{LAYER}.input_layernorm",
        arguments={"eps": 1e-6},
    ),
    *pair(
        "norm/ranges",
        "Rows of sizes from 0.82 to 0.0032, some with a mean, epsilon 1e-6",
        ("NORM-1",),
        "norm",
        V3,
        {"x": _rows()},
        dy=(16, 512),
        backward_clauses=("NORM-2",),
        path=f"{LAYER}.self_attn.kv_a_layernorm",
        arguments={"eps": 1e-6},
        flags=(flags.NORM_EPSILON, flags.NORM_MEAN),
    ),
    *pair(
        "norm/epsilon",
        "The same rows with epsilon 1e-5, which matters for the small ones",
        ("NORM-1",),
        "norm",
        V3,
        {"x": _rows()},
        dy=(16, 512),
        backward_clauses=("NORM-2",),
        path=f"{LAYER}.self_attn.kv_a_layernorm",
        arguments={"eps": 1e-5},
        flags=(flags.NORM_EPSILON,),
    ),
)
