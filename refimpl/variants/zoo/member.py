"""A correct variant as something that runs.  SPEC ZOO-1."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from refimpl.programs import Outputs, Setting, run
from refimpl.variants.variation import Change

ALL: Final = ("fp32", "tf32", "fp16", "bf16")  # claims; what is right in float32 is right under each


@dataclass(frozen=True)
class Member:
    """An implementation that computes V3 correctly, and not as the specification writes it.

    why: what is different, and why it is right all the same.
    change: makes its program, its arithmetic included.
    claims: the precisions that it may claim.
    withholds: patterns of outputs that it does not have, or has in another form.
    components: those that it can run; none means all.
    """

    name: str
    why: str
    change: Change
    claims: tuple[str, ...] = ALL
    withholds: tuple[str, ...] = ()
    components: tuple[str, ...] = ()

    def runs(self, component: str) -> bool:
        """Whether it can run a component."""
        return not self.components or component in self.components

    def outputs(self, component: str, setting: Setting) -> Outputs:
        """What it gives for a setting: name -> tensor."""
        found = run(component, self.change(setting))
        return {name: x for name, x in found.items() if not self._withheld(name)}

    def _withheld(self, name: str) -> bool:
        return not name.startswith("grad.") and any(fnmatchcase(name, p) for p in self.withholds)
