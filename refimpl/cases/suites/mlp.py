"""Suite mlp: SwiGLU.  SPEC MLP-1, MLP-2."""

from refimpl.cases.definition import Definition, Draw, shaped
from refimpl.cases.suites import flags
from refimpl.cases.suites.common import LAYER, V3, pair

_NARROW = shaped(V3, hidden_size=4096, moe_intermediate_size=128)

CASES: tuple[Definition, ...] = (
    Definition(
        "mlp/expert",
        "One routed expert at its real size, 7168 to 2048 and back",
        ("MLP-1",),
        "mlp",
        V3,
        {"x": Draw((4, 7168))},
        path=f"{LAYER}.mlp.experts.17",
        flags=(flags.SWIGLU_SWAPPED,),
    ),
    *pair(
        "mlp/narrow",
        "An expert of width 128 on a hidden width of 4096",
        ("MLP-1",),
        "mlp",
        _NARROW,
        {"x": Draw((8, 4096))},
        dy=(8, 4096),
        backward_clauses=("MLP-2",),
        path=f"{LAYER}.mlp.experts.17",
        flags=(flags.SWIGLU_SWAPPED,),
    ),
)
