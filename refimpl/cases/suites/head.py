"""Suite head: final norm, logits and cross-entropy.  SPEC HEAD-1, LOSS-1 to LOSS-3."""

from refimpl.cases.definition import Definition, Draw, Given, shaped
from refimpl.cases.suites import flags
from refimpl.cases.suites.common import V3, pair

_TARGETS = Given((3, 511, -100, 0, 77, 77, -100, 200, 13, 400, 256, -100), "I64")
_CONFIG = shaped(V3, hidden_size=1024, vocab_size=512)

CASES: tuple[Definition, ...] = (
    *pair(
        "head/loss",
        "Logits and the mean cross-entropy over 9 of 12 positions",
        ("HEAD-1", "LOSS-1", "LOSS-2"),
        "head_loss",
        _CONFIG,
        {"x": Draw((12, 1024)), "targets": _TARGETS},
        dy={},
        backward_clauses=("LOSS-3",),
        flags=(flags.TARGETS_SHIFTED,),
    ),
    *pair(
        "head/large",
        "Rows of size 100 and logits of deviation 8: the largest is subtracted before exp",
        ("HEAD-1", "LOSS-1", "LOSS-2"),
        "head_loss",
        _CONFIG,
        {"x": Draw((12, 1024), 1.0), "targets": _TARGETS},
        dy={},
        backward_clauses=("LOSS-3",),
        weights={"lm_head.weight": Draw((512, 1024), 2.0**-9)},
    ),
)
