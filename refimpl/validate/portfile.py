"""What a port says about itself in a port.toml; every line of it may be left out.  SPEC VERDICT-16.

components = ["gate", "norm", "mla/packed*"]   # what it computes: components, suites or cases, as patterns
kinds = ["forward"]                            # forward, vjp, bits, reject, ...
outputs = ["*.topk_idx"]                       # what it gives; by default every required tensor
precision = "bf16"                             # or a table: [precision] default = "bf16", gate = "fp32"
[choices]                                      # which alternatives it implements
profile = "official"                           # to begin with
topk_norm_epsilon = 0.0
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from refimpl.cases.claims import claim
from refimpl.cases.format import Case
from refimpl.config.choices import Choices
from refimpl.errors import Invalid, Unreadable

NAME: Final = "port.toml"
LIMIT: Final = 1 << 20  # bytes
KEYS: Final = ("components", "kinds", "outputs", "precision", "choices")


@dataclass(frozen=True)
class PortFile:
    """The declarations of a port.  choices: only those that it declares."""

    path: Path | None = None
    components: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    precision: Mapping[str, str] = field(default_factory=dict)  # pattern -> claim, the more special ones last
    choices: Mapping[str, Any] = field(default_factory=dict)

    def excludes(self, case: Case) -> str | None:
        """Why a case is not for this port; None if it is."""
        if self.components and not matches(case, self.components):
            return f"{NAME} does not list it under components"
        if self.kinds and not any(fnmatchcase(case.kind, pattern) for pattern in self.kinds):
            return f"{NAME} does not list kind {case.kind}"
        return None

    def claim_for(self, case: Case) -> str | None:
        """The precision that the port declares for a case."""
        found = self.precision.get("default")
        for pattern, name in self.precision.items():
            if pattern != "default" and matches(case, (pattern,)):
                found = name
        return found

    def gives(self, name: str) -> bool:
        """Whether the port gives a tensor of that name, as far as it says."""
        return not self.outputs or any(fnmatchcase(name, pattern) for pattern in self.outputs)


def matches(case: Case, patterns: Iterable[str]) -> bool:
    """Whether a pattern is the component of a case, its suite, or its id."""
    names = (case.component, case.id.partition("/")[0], case.id)
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def find(places: Iterable[Path]) -> PortFile:
    """The port.toml in the first folder that has one; without one, nothing is declared."""
    for place in places:
        if (place / NAME).is_file():
            return read(place / NAME)
    return PortFile()


def read(path: Path) -> PortFile:
    """Raises Unreadable for what is no TOML file, Invalid for what it may not say."""
    try:
        with path.open("rb") as file:
            data = file.read(LIMIT + 1)
        if len(data) > LIMIT:
            raise Unreadable(f"{path} is longer than {LIMIT} bytes, but it must not be.")
        given = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Unreadable(f"{path} is no TOML file ({str(error)[:120]}).") from None
    except OSError as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"{path} cannot be read ({error.strerror}), but it must be a TOML file.") from None
    return _checked(path, given)


def _checked(path: Path, given: Mapping[str, Any]) -> PortFile:
    for key in given:
        if key not in KEYS:
            raise Invalid(f"{path} has {key[:40]!r}, but it may only have {', '.join(KEYS)}.")
    lists = {key: _texts(path, key, given[key]) for key in ("components", "kinds", "outputs") if key in given}
    precision = given.get("precision", {})
    if isinstance(precision, str):
        precision = {"default": precision}
    if not isinstance(precision, dict) or not all(isinstance(name, str) for name in precision.values()):
        raise Invalid(f"{path}: precision must be a claim, or a table from component to claim.")
    for name in precision.values():
        claim(name)
    return PortFile(path, **lists, precision=precision, choices=_choices(path, given.get("choices", {})))


def _texts(path: Path, key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise Invalid(f"{path}: {key} must be a list of one or more texts.")
    return tuple(value)


def _choices(path: Path, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise Invalid(f"{path}: choices must be a table from choice to alternative.")
    own = {name: value for name, value in given.items() if name != "profile"}
    Choices.from_dict(own)
    if "profile" not in given:
        return own
    return Choices.named(given["profile"]).to_dict() | own
