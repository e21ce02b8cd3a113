"""A stored case with other expected values: those of an alternative, or of a mistake.  SPEC VERDICT-13.

`values` computes a stored case again in float64, with a change.  `Recomputed` judges against such values with
what the case itself allows, which is quick; `rederived` derives what is allowed anew, as for a case that was
just built, which takes a dozen runs.  `Remembered` reads every tensor of a reference once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from refimpl import programs
from refimpl.cases import decisions, tolerances
from refimpl.cases.folder import Folder
from refimpl.cases.format import Case, Tensor
from refimpl.cases.judging import InMemory, Reference
from refimpl.cases.setting import setting_of
from refimpl.cases.tolerances import Judges
from refimpl.numerics.arithmetic import Arithmetic, Array
from refimpl.numerics.floating import Floating
from refimpl.programs import IDX, Outputs, Setting

FLOAT64 = Floating(np.float64)
Change = Callable[[Setting], Setting]


@dataclass(frozen=True)
class Recomputed:
    """A reference with other values by output name, and the tolerances of the case."""

    base: Reference
    values: Mapping[str, Array]

    @property
    def case(self) -> Case:
        return self.base.case

    def judged(self, t: Tensor) -> tuple[Array, Array | None]:
        index = self.base.judged(t)[1]
        flat = np.asarray(self.values[t.name]).reshape(-1)
        return (flat, None) if index is None else (flat[index], index)

    def extra(self, t: Tensor, kind: str) -> Array | None:
        return self.base.extra(t, kind)


@dataclass(frozen=True)
class Remembered:
    """A reference whose tensors are read and checked once, however many claims are judged."""

    base: Reference
    _judged: dict[str, tuple[Array, Array | None]] = field(default_factory=dict)
    _extras: dict[tuple[str, str], Array | None] = field(default_factory=dict)

    @property
    def case(self) -> Case:
        return self.base.case

    def judged(self, t: Tensor) -> tuple[Array, Array | None]:
        if t.name not in self._judged:
            self._judged[t.name] = self.base.judged(t)
        return self._judged[t.name]

    def extra(self, t: Tensor, kind: str) -> Array | None:
        if (t.name, kind) not in self._extras:
            self._extras[t.name, kind] = self.base.extra(t, kind)
        return self._extras[t.name, kind]


def values(case: Case, setting: Setting) -> Outputs:
    """What a setting computes.  Raises Invalid where a change makes it impossible, or gives other shapes."""
    return programs.run(case.component, setting)


def float64(folder: Folder, change: Change = lambda setting: setting) -> tuple[Setting, Outputs]:
    """The case in float64, changed.  Raises Unreadable, Invalid."""
    setting = change(setting_of(folder, FLOAT64))
    return setting, values(folder.case, setting)


def rederived(folder: Folder, setting: Setting, outputs: Outputs) -> InMemory:
    """The case with these outputs of the setting as what is expected, tolerances and margins included.

    Elements are judged at the positions at which the folder judges them.
    """
    case = folder.case
    expected = {t.name: np.asarray(outputs[t.name]).reshape(t.shape) for t in case.outputs}
    for path in _gates(outputs):
        expected.setdefault(f"{path}.scores", np.asarray(outputs[f"{path}.scores"]))
    judges = _judges(case, setting, outputs, expected)
    tensors = tuple(t if t.given else _output(folder, t, judges.get(t.name)) for t in case.tensors)
    extras = {f"{kind}/{name}": a for name, own in judges.items() for kind, a in own.arrays.items()}
    choices = setting.choices.to_dict()
    return InMemory(replace(case, choices=choices, tensors=tensors), expected, extras)


def _judges(
    case: Case, setting: Setting, outputs: Outputs, expected: Mapping[str, Array]
) -> dict[str, Judges]:
    """As `build` derives them: of the numbers under the routing of this setting, then of the decisions."""
    chosen = {path: np.asarray(outputs[f"{path}{IDX}"]) for path in _gates(outputs)}
    settled = replace(setting, routing={**setting.routing, **chosen})
    if case.tolerance is None or case.tolerance["derivation"] == "exact":
        return {}

    def run(ar: Arithmetic) -> Outputs:
        return values(case, replace(settled, ar=ar))

    found = tolerances.judges(run, expected, case.tolerance["derivation"] == "bound")
    for path in chosen.keys() - setting.routing.keys():
        scores = expected[f"{path}.scores"]
        choice = decisions.choice_of(scores, setting.weights, path)
        margin = decisions.margins(choice, setting.config, setting.choices)
        doubt = decisions.doubts(scores, choice, found[f"{path}.scores"])
        found[f"{path}{IDX}"] = Judges(arrays={"margin": margin} | doubt)
    return found


def _gates(outputs: Outputs) -> list[str]:
    """The modules whose decision and scores are among the outputs."""
    paths = [name.removesuffix(IDX) for name in outputs if name.endswith(IDX)]
    return [path for path in paths if f"{path}.scores" in outputs]


def _output(folder: Folder, t: Tensor, own: Judges | None) -> Tensor:
    whole = folder.judged(t)[1] is None
    t = replace(t, samples=None if whole else t.samples)
    if own is None:
        return t
    kinds = dict.fromkeys(own.arrays, "")
    if t.set:
        return replace(t, extras=kinds)
    return replace(t, spread=own.spread, bias=own.bias, extras=kinds)
