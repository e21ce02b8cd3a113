"""A stored case as the setting of a program: to be computed again, changed, or in another arithmetic."""

from __future__ import annotations

from refimpl.cases.folder import Folder
from refimpl.cases.format import INPUT, WEIGHT
from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.numerics.arithmetic import Arithmetic
from refimpl.programs import IDX, Setting


def setting_of(folder: Folder, ar: Arithmetic) -> Setting:
    """The setting of a case of numbers (not of bits, not one to be refused).  Routing that is among the
    inputs is forced.  Raises Unreadable."""
    case = folder.case
    arrays = {t.name: folder.given(t) for t in case.tensors if t.role in (INPUT, WEIGHT)}
    routing = {
        name.removesuffix(IDX): value
        for name, value in arrays.items()
        if name.endswith(IDX) and case.component != "experts"
    }
    forced = {f"{path}{IDX}" for path in routing}
    inputs = [t.name for t in case.tensors if t.role == INPUT and t.name not in forced]
    weights = [t.name for t in case.tensors if t.role == WEIGHT]
    return Setting(
        ar,
        ModelConfig.from_dict(case.config),
        Choices.from_dict(case.choices),
        case.path,
        case.backward,
        case.arguments,
        {name: arrays[name] for name in inputs},
        {name: arrays[name] for name in weights},
        routing,
    )
