"""The rotary fields of a configuration, in both published forms.  SPEC CONF-3.

The hub has `rope_theta` and `rope_scaling` side by side; transformers 5 writes one object, `rope_parameters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from refimpl.config.rules import integer, one_of, optional, real, ruled, settle, show
from refimpl.errors import Invalid, Missing, Unsupported


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN.  mscale and mscale_all_dim are None when the config has none: sources differ in what that means
    (choice yarn_mscale_zero).  beta_fast and beta_slow default to 32 and 1, as in every source."""

    factor: float = ruled(real(1.0, strict=False), "s, by which the context is extended")
    original_max_position_embeddings: int = ruled(integer(), "context length before extension")
    beta_fast: float = ruled(real(), "rotations above which a frequency is kept", default=32.0)
    beta_slow: float = ruled(real(), "rotations below which a frequency is divided by s", default=1.0)
    mscale: float | None = ruled(optional(real(strict=False)), "numerator's mscale", default=None)
    mscale_all_dim: float | None = ruled(optional(real(strict=False)), "softmax scale's mscale", default=None)

    def __post_init__(self) -> None:
        settle(self, "config field rope_scaling:")
        if self.beta_fast < self.beta_slow:
            raise Invalid(
                f"config field rope_scaling: beta_fast is {show(self.beta_fast)}, "
                f"but it must be at least beta_slow ({show(self.beta_slow)})."
            )

    def to_dict(self) -> dict[str, Any]:
        """The published form."""
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        return {"type": "yarn"} | {name: value for name, value in given.items() if value is not None}


def read_rope(given: Mapping[str, Any]) -> tuple[Any, YarnScaling | None]:
    """(rope_theta or None when there is none, scaling) of a published config in either form."""
    objects: dict[str, dict[str, Any]] = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = given.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise Invalid(f"config field {name} is {show(value)}, but it must be an object or null.")
        if value is not None:
            objects[name] = {key: item for key, item in value.items() if item is not None}
    thetas = [
        (f"{name}: rope_theta", item.pop("rope_theta"))
        for name, item in objects.items()
        if "rope_theta" in item
    ]
    if given.get("rope_theta") is not None:
        thetas.insert(0, ("rope_theta", given["rope_theta"]))
    for name, theta in thetas:
        real(1.0).settle(f"config field {name}", theta)
        if theta != thetas[0][1]:
            raise Invalid(
                f"config field {name} is {show(theta)}, "
                f"but it must equal {thetas[0][0]} ({show(thetas[0][1])})."
            )
    scalings = {name: _read_scaling(name, item) for name, item in objects.items()}
    if len(scalings) == 2 and scalings["rope_scaling"] != scalings["rope_parameters"]:
        raise Invalid("config fields rope_scaling and rope_parameters differ, but they must say the same.")
    return (thetas[0][1] if thetas else None), next(iter(scalings.values()), None)


def _read_scaling(where: str, given: dict[str, Any]) -> YarnScaling | None:
    kinds = [given.pop(key) for key in ("rope_type", "type") if key in given] or ["default"]
    for kind in kinds:
        one_of("default", "yarn", error=Unsupported).settle(f"config field {where}: type", kind)
        if kind != kinds[0]:
            raise Invalid(
                f"config field {where}: type is {show(kind)}, but it must equal rope_type ({show(kinds[0])})."
            )
    if given.get("partial_rotary_factor") in (1, 1.0):
        del given["partial_rotary_factor"]  # what transformers 5 may write for the whole width
    known = {item.name for item in fields(YarnScaling)} if kinds[0] == "yarn" else set()
    for name in given:
        if name not in known:
            raise Unsupported(
                f"config field {where}: {name[:60]} is {show(given[name])}, but rope type "
                f"{show(kinds[0])} must have no such field."
            )
    if kinds[0] == "default":
        return None
    for name in ("factor", "original_max_position_embeddings"):
        if name not in given:
            raise Missing(f'config field {where}: {name} is missing, but rope type "yarn" must have it.')
    return YarnScaling(**given)
