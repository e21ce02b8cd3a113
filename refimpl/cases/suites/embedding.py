"""Suite embedding.  SPEC EMBED-1."""

from refimpl.cases.definition import Definition, Draw, Given, Integers
from refimpl.cases.suites.common import V3, pair

_IDS = Given((0, 63, 7, 7, 21, 0, 40, 7), "I64")  # the first, the last, and repeated ones

CASES: tuple[Definition, ...] = (
    *pair(
        "embedding/exact",
        "Rows of the embedding; gradients of repeated ids add, exact in any order",
        ("EMBED-1",),
        "embedding",
        V3,
        {"ids": _IDS},
        dy={"dy": Integers((8, 7168), -8, 8, 2.0**-3)},
        path="model.embed_tokens",
        exact=True,
    ),
    Definition(
        "embedding/vjp",
        "Gradient of the embedding for a cotangent that float32 cannot add exactly",
        ("EMBED-1", "EXACT-6"),
        "embedding",
        V3,
        {"ids": _IDS, "dy": Draw((8, 7168))},
        path="model.embed_tokens",
        backward=True,
    ),
)
