"""Suite linear: Fprop, Dgrad and Wgrad at the checkpoint's shapes.  SPEC LINEAR-1."""

from refimpl.cases.definition import Definition, Draw, Integers
from refimpl.cases.suites.common import LAYER, V3, pair

_ATTENTION = f"{LAYER}.self_attn"


def _shape(leaf: str, tokens: int, wide: int, high: int, title: str) -> tuple[Definition, ...]:
    """A linear (high, wide) with bell-shaped values, and its twin in which every order of float32 sums is
    exact."""
    path = f"{_ATTENTION}.{leaf}"
    few = {"x": Integers((tokens, wide), -4, 4, 2.0**-2)}
    exact = pair(
        f"linear/{leaf}-exact",
        f"{title}: few-bit values, so that any order of accumulation gives the same bits",
        ("LINEAR-1", "EXACT-1"),
        "linear",
        V3,
        few,
        dy={"dy": Integers((tokens, high), -4, 4, 2.0**-2)},
        path=path,
        weights={"weight": Integers((high, wide), -4, 4, 2.0**-6)},
        exact=True,
    )
    plain = pair(
        f"linear/{leaf}",
        title,
        ("LINEAR-1",),
        "linear",
        V3,
        {"x": Draw((tokens, wide))},
        dy=(tokens, high),
        path=path,
    )
    return (*plain, *exact)


CASES: tuple[Definition, ...] = (
    *_shape("kv_a_proj_with_mqa", 16, 7168, 576, "576 rows, which no tile of 128 divides, and K = 7168"),
    *_shape("q_b_proj", 16, 1536, 384, "From the query latent, K = 1536"),
    *_shape("o_proj", 12, 256, 7168, "To the hidden width, K = 256; Dgrad has K = 7168"),
)
