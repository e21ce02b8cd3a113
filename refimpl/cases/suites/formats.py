"""Suite formats: every code of a format and its value.  SPEC FORMAT-2, FORMAT-3, CAST-3."""

from refimpl.cases.bits import Bits, Every
from refimpl.cases.instruments import DTYPE_OF
from refimpl.cases.suites import flags
from refimpl.numerics.formats import FORMATS

_NAMES = ("e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz", "ue8m0", "e5m6", "e5m6fn", "bf16", "fp16")

CASES: tuple[Bits, ...] = tuple(
    Bits(
        f"formats/{name}",
        f"The values of all {1 << FORMATS[name].bits} codes of {name}",
        ("FORMAT-2", "FORMAT-3", "CAST-3"),
        "decode",
        {"codes": Every(FORMATS[name].bits, DTYPE_OF[name])},
        {"format": name},
        flags=(flags.FNUZ,) if name[:4] in ("e4m3", "e5m2") else (),
    )
    for name in _NAMES
)
