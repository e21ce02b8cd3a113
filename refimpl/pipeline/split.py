"""The units of a network, cut into stages.  SPEC PIPE-50.

A stage is a run of units; the cuts are between decoder layers.  The embedding is with the first layers, the
final norm and the head with the last, MTP modules behind the head.  V3's own map of layers to stages is not
published, so how layers are spread is a choice with a name, or the user's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from refimpl.errors import Invalid
from refimpl.units import Unit

Split = tuple[tuple[Unit, ...], ...]
Cut = str | Sequence[int] | Sequence[Sequence[str]]


def more_first(layers: int, stages: int) -> list[int]:
    """As even as can be, what is left over one by one to the first stages: the last one has the head."""
    return [layers // stages + (stage < layers % stages) for stage in range(stages)]


def more_last(layers: int, stages: int) -> list[int]:
    """As even as can be, what is left over one by one to the last stages."""
    return more_first(layers, stages)[::-1]


SPREADS: dict[str, Callable[[int, int], list[int]]] = {"more_first": more_first, "more_last": more_last}


def name(unit: Unit) -> str:
    """What a user's own split calls a unit: model.embed_tokens, model.layers.3, lm_head."""
    return unit.path or "lm_head"


def split(units: Sequence[Unit], stages: int, how: Cut = "more_first") -> Split:
    """The units of each stage.

    how: a name of SPREADS; or the number of decoder layers of each stage; or the names of its units.
    Raises: Invalid for more stages than layers, and for what is no partition of the units in their order.
    """
    layers = [unit for unit in units if unit.kind == "layer"]
    if isinstance(how, str):
        if how not in SPREADS:
            raise Invalid(f"the split is {how!r}, but a split by name is one of {', '.join(SPREADS)}.")
        if not 1 <= stages <= len(layers):
            raise Invalid(
                f"there are {stages} stages, but the network has {len(layers)} decoder layers and can be "
                f"spread over 1 to {len(layers)}."
            )
        return _by_number(units, len(layers), SPREADS[how](len(layers), stages))
    if not isinstance(how, Sequence) or len(how) != stages:
        found = f"for {len(how)} stages" if isinstance(how, Sequence) else f"a {type(how).__name__}"
        raise Invalid(f"the split is {found}, but the schedule has {stages} stages and needs one for each.")
    numbers = [one for one in how if isinstance(one, int) and not isinstance(one, bool)]
    if len(numbers) == stages:
        return _by_number(units, len(layers), numbers)
    return _by_name(units, how)


def _by_number(units: Sequence[Unit], layers: int, numbers: Sequence[int]) -> Split:
    """Stages of so many decoder layers each."""
    if min(numbers) < 0 or sum(numbers) != layers:
        raise Invalid(
            f"the split has {', '.join(map(str, numbers))} decoder layers, but these have to be at least 0 "
            f"and add up to {layers}."
        )
    edges = [0, *(1 + end for end in accumulate(numbers))]  # unit 0 is the embedding
    edges[-1] = len(units)
    return _filled([tuple(units[a:b]) for a, b in pairwise(edges)])


def _by_name(units: Sequence[Unit], how: Sequence[object]) -> Split:
    """Stages of the units with these names, which have to be all of them in their order."""
    left, found = tuple(units), []
    for stage, names in enumerate(how):
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise Invalid(
                f"stage {stage} of the split is {names!r}, but stages are numbers of decoder layers, or "
                "sequences of the names of units."
            )
        own, left = left[: len(names)], left[len(names) :]
        for place, one in enumerate(names):
            if place >= len(own) or one != name(own[place]):
                then = (
                    f"the next unit is {name(own[place])}"
                    if own[place:]
                    else "every unit has its stage by then"
                )
                raise Invalid(f"stage {stage} of the split has {one!r}, but {then}.")
        found.append(own)
    if left:
        raise Invalid(f"the split has no stage for {name(left[0])}, but every unit needs one.")
    return _filled(found)


def _filled(found: Sequence[tuple[Unit, ...]]) -> Split:
    for stage, own in enumerate(found):
        if not own:
            raise Invalid(f"stage {stage} of the split has no unit, but every stage needs at least one.")
    return tuple(found)
