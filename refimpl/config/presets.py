"""Presets: published configurations, and small ones that keep every peculiarity.  SPEC CONF-6.

The published ones come from the released configs and the code beside them.  The small ones have a value width
that is not the key width, several groups, more experts than are chosen, YaRN, and the rope width 64.
"""

from functools import cache
from importlib.resources import files
from typing import Final

from refimpl.config.jsonfile import parse_object
from refimpl.config.model import ModelConfig
from refimpl.config.rules import show
from refimpl.errors import Invalid

PRESETS: Final[tuple[str, ...]] = (
    "deepseek-v3",
    "deepseek-v3-128e",
    "deepseek-v3.2",
    "deepseek-v2",
    "deepseek-v2-lite",
    "kimi-k2",
    "tiny-v3",
    "tiny-v3-noq",
    "tiny-v3-mtp",
    "tiny-v2",
    "mid-v3",
)


@cache
def preset(name: str) -> ModelConfig:
    """The configuration of that name.  Raises Invalid for another name."""
    if name not in PRESETS:
        raise Invalid(f"preset {show(name)} is unknown, but it must be one of {', '.join(PRESETS)}.")
    file = files("refimpl.config").joinpath("presets").joinpath(f"{name}.json")
    return ModelConfig.from_dict(parse_object(file.read_bytes(), f"preset {name}"))
