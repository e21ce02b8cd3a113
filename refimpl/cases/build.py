"""From a definition to a whole case: exact values, tolerances, margins, certificate.  SPEC CASE-9."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from refimpl import programs
from refimpl.cases import bits, cap, certificate, decisions, format, staged, tolerances
from refimpl.cases.bits import Bits
from refimpl.cases.claims import CLAIMS
from refimpl.cases.definition import Definition, Given
from refimpl.cases.folder import KEPT_OUTPUT, sample_positions
from refimpl.cases.format import INPUT, PROBE, REQUIRED, WEIGHT, Case, Tensor
from refimpl.cases.judging import InMemory, decided
from refimpl.cases.staged import Staged
from refimpl.cases.tolerances import Judges
from refimpl.config.model import ModelConfig
from refimpl.errors import Invalid
from refimpl.numerics.arithmetic import Arithmetic, Array, Exact
from refimpl.programs import IDX, Outputs, Setting

AnyDefinition = Definition | Bits | Staged
LARGEST_FP16 = 2.0**15  # of a value in a case that is offered to fp16
LARGEST_STEP = 0.5  # rounding of an attention score, beyond which first-order bounds of its exponential fail
# judged by the noise floor: bounds of whole networks say nothing
NETWORKS = ("model", "mtp", "step", "chain", "pipelined")


_DERIVATIONS = {
    "exact": "Every order of float32 accumulation gives these bits, so they are demanded.",
    "bound": "Per element and roundoff: the smaller of the bound of first order (the same computation on "
    "absolute values, with the length of every sum) and 12 times the row's noise under random roundings.",
    "noise": "Per row and roundoff: 12 times the noise under random roundings, with the exact routing.",
}


@dataclass(frozen=True)
class Built:
    """A case with all its numbers."""

    case: Case
    given: Mapping[str, Array]
    expected: Mapping[str, Array]
    extras: Mapping[str, Array]


def build(definition: AnyDefinition) -> Built:
    """Compute everything.  Raises Invalid for a definition that makes no good case."""
    if isinstance(definition, Bits):
        return Built(*bits.made(definition), extras={})
    if isinstance(definition, Staged):
        return _staged(definition)
    definition = _with_routing(definition)
    given, tensors = _given(definition)
    case = _case(definition, tensors)
    if definition.rejects:
        return _rejected(definition, given, case)
    expected = {n: np.asarray(v) for n, v in run(definition, given, Exact(), definition.forced).items()}
    expected = {name: value for name, value in expected.items() if _kept(definition, name)}
    _check(definition, expected)
    judges = {} if definition.exact else _judges(definition, given, expected)
    sets = _sets(definition, given, expected, judges)
    outputs = tuple(
        _output(definition, name, value, judges.get(name), sets) for name, value in expected.items()
    )
    extras = {f"{kind}/{name}": array for name, own in judges.items() for kind, array in own.arrays.items()}
    case = replace(case, tensors=(*case.tensors, *outputs))
    offered = _offered(definition, case, expected, extras)
    if judges:
        settled = setting(definition, _decided(given, expected), Exact(), True)
        claims = [CLAIMS[name] for name, why in offered.items() if why is None]
        case = cap.capped(InMemory(case, expected, extras), settled, claims)
    return Built(certificate.certified(case, expected, extras, offered), given, expected, extras)


def _staged(d: Staged) -> Built:
    definition = _with_routing(d.definition)
    given, tensors = _given(definition)
    recipe: dict[str, Any] = {"name": d.recipe} | ({"set": list(d.settings)} if d.settings else {})
    case = _case(definition, tensors)
    case = replace(case, arguments={**case.arguments, "recipe": recipe})
    ready = setting(definition, given, Exact(), definition.forced)
    case, expected = staged.completed(case, ready, definition.is_required)
    return Built(case, given, expected, {})


def run(d: Definition, given: Mapping[str, Array], ar: Arithmetic, forced: bool) -> Outputs:
    """The program of a definition on its data; forced: the routing is that among the inputs."""
    return programs.run(d.component, setting(d, given, ar, forced))


def setting(d: Definition, given: Mapping[str, Array], ar: Arithmetic, forced: bool) -> Setting:
    """A definition with its data, ready to run."""
    routing = {name.removesuffix(IDX): value for name, value in given.items() if name.endswith(IDX)}
    inputs = {name: given[name] for name in d.inputs if not (name.endswith(IDX) and d.component != "experts")}
    weights = {name: given[name] for name in d.weight_sources()}
    return Setting(
        ar, d.config, d.choices, d.path, d.backward, d.arguments, inputs, weights, routing if forced else {}
    )


def _with_routing(d: Definition) -> Definition:
    """A forced twin gets the exact routing of the free case as inputs."""
    if not d.forced or any(name.endswith(IDX) for name in d.inputs):
        return d
    free = replace(d, backward=False, forced=False)
    given, _ = _given(free)
    found = run(free, given, Exact(), False)
    routing = {name: Given(value, "I64") for name, value in found.items() if name.endswith(IDX)}
    return replace(d, inputs={**d.inputs, **routing})


def _given(d: Definition) -> tuple[dict[str, Array], tuple[Tensor, ...]]:
    arrays: dict[str, Array] = {}
    tensors: list[Tensor] = []
    for role, sources in ((INPUT, d.inputs), (WEIGHT, d.weight_sources())):
        for name, source in sources.items():
            arrays[name], how = source.made(f"{d.stream} {name}" if role == INPUT else name)
            sha = format.digest(arrays[name], source.dtype)
            tensors.append(Tensor(name, role, source.dtype, tuple(arrays[name].shape), sha, generator=how))
    if d.shared:
        asset = format.asset_name(t for t in tensors if t.role == WEIGHT)
        tensors = [replace(t, asset=asset) if t.role == WEIGHT else t for t in tensors]
    return arrays, tuple(tensors)


def _case(d: Definition, tensors: tuple[Tensor, ...]) -> Case:
    derivation = "exact" if d.exact else "noise" if d.component in NETWORKS else "bound"
    tolerance = {"derivation": derivation, "text": _DERIVATIONS[derivation]}
    return Case(
        id=d.id,
        kind=d.kind,
        outcome="reject" if d.rejects else "values",
        title=d.title,
        clauses=d.clauses,
        component=d.component,
        backward=d.backward,
        config={**d.config.to_dict(), **d.published},
        choices=d.choices.to_dict(),
        flags=tuple(flag.to_json() for flag in d.flags),
        claims=(),
        tensors=tensors,
        certificate={"rejects": {}, "not_applicable": {}},
        path=d.path,
        arguments=d.arguments,
        reason=d.rejects,
        twin=d.twin,
        tolerance=None if d.rejects else tolerance,
    )


def _rejected(d: Definition, given: Mapping[str, Array], case: Case) -> Built:
    try:
        ModelConfig.from_dict(case.config)
        run(d, given, Exact(), d.forced)
    except Invalid:
        return Built(case, given, {}, {})
    raise Invalid(f"case {d.id} is to be rejected, but it was computed without an error.")


def _kept(d: Definition, name: str) -> bool:
    """Routing that is given is no output; the slots' order is ours; probes of the forward are in the
    forward case."""
    if (d.forced and name.endswith(IDX)) or name.endswith(".slots") or _matches(name, d.omits):
        return False
    return d.is_required(name) or not d.backward or name.endswith(".gate.scores")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check(d: Definition, expected: Mapping[str, Array]) -> None:
    for name, value in expected.items():
        masked = name.endswith(".scores") and "attn" in name
        if not value.size or np.isnan(value).any() or (np.isinf(value).any() and not masked):
            raise Invalid(f"case {d.id}: tensor {name} is empty or has values that are not finite.")


def _decided(given: Mapping[str, Array], expected: Mapping[str, Array]) -> dict[str, Array]:
    """What is given, with the exact routing."""
    return {**given, **{name: value for name, value in expected.items() if name.endswith(IDX)}}


def _judges(d: Definition, given: Mapping[str, Array], expected: Mapping[str, Array]) -> dict[str, Judges]:
    """Of every tensor, with the routing forced to the exact one."""
    forced = _decided(given, expected)
    return tolerances.judges(lambda ar: run(d, forced, ar, True), expected, d.component not in NETWORKS)


def _sets(
    d: Definition, given: Mapping[str, Array], expected: Mapping[str, Array], judges: dict[str, Judges]
) -> dict[str, tuple[float, float]]:
    """Adds margins and doubts of every decision to the judges; name -> (smallest, median) margin."""
    found: dict[str, tuple[float, float]] = {}
    for name in [name for name in expected if name.endswith(IDX)]:
        path = name.removesuffix(IDX)
        scores = expected[f"{path}.scores"]
        choice = decisions.choice_of(scores, given, path)
        margin = decisions.margins(choice, d.config, d.choices)
        found[name] = (float(f"{margin.min():.3g}"), float(f"{np.median(margin):.3g}"))
        doubt = decisions.doubts(scores, choice, judges[f"{path}.scores"]) if judges else {}
        judges[name] = Judges(arrays={"margin": margin} | doubt)
    return found


def _output(
    d: Definition, name: str, value: Array, judges: Judges | None, sets: Mapping[str, tuple[float, float]]
) -> Tensor:
    integer = value.dtype.kind in "iu"
    leaf = name.rpartition(".")[2]
    gate = f"{name.removesuffix('.topk_weight')}{IDX}"
    small = value.size <= KEPT_OUTPUT or integer or leaf == "topk_weight"
    return Tensor(
        name,
        REQUIRED if d.is_required(name) else PROBE,
        "I64" if integer else "F64",
        tuple(value.shape),
        format.digest(value, "I64" if integer else "F64"),
        samples=None if small else len(sample_positions(name, value.size)),
        layouts=("halves",) if leaf in ("q_pe", "k_pe") and not name.startswith("grad.") else (),
        set=name in sets,
        ordered_by=gate if leaf == "topk_weight" and gate in sets else None,
        decided_by=_decided_by(d, name, sets),
        below=d.config.n_routed_experts if name in sets else None,
        spread=judges.spread if judges and name not in sets else None,
        bias=judges.bias if judges and name not in sets else None,
        margins=sets.get(name) or _load_margins(name, value),
        extras={k: format.digest(a, "F64" if k == "margin" else "BF16") for k, a in judges.arrays.items()}
        if judges
        else {},
    )


def _load_margins(name: str, value: Array) -> tuple[float, float] | None:
    """Of the tokens that each expert gets: how many more or fewer change the sign of mean - load."""
    if not name.endswith("load"):
        return None
    margin = np.abs(value.mean(-1, keepdims=True) - value)
    return float(f"{margin.min():.3g}"), float(f"{np.median(margin):.3g}")


def _decided_by(d: Definition, name: str, sets: Mapping[str, tuple[float, float]]) -> tuple[str, ...]:
    """Rows of what comes after a gate count only where that gate decided; weights' gradients sum over all
    rows, so cases whose outputs mix rows are not offered where any row is open."""
    if not sets or d.component in NETWORKS or name in sets or name.startswith("grad."):
        return ()
    gates = [s for s in sets if _order(name) > _order(s)]
    return tuple(gates)


def _order(name: str) -> int:
    """0 before the gate's decision, 1 from it on, as the names of one layer are ordered."""
    before = ("layernorm", "self_attn", "gate.logits", "gate.scores")
    return 0 if any(part in name for part in before) else 2 if not name.endswith(IDX) else 1


def _largest_score(expected: Mapping[str, Array]) -> float:
    scores = [v for name, v in expected.items() if name.endswith(".scores") and "attn" in name]
    return max((float(np.abs(v[np.isfinite(v)]).max(initial=0.0)) for v in scores), default=0.0)


def _offered(
    d: Definition, case: Case, expected: Mapping[str, Array], extras: Mapping[str, Array]
) -> dict[str, str | None]:
    """claim -> why it is not offered, or None."""
    reference = InMemory(case, expected, extras)
    largest = max(float(np.abs(v[np.isfinite(v)]).max(initial=0.0)) for v in expected.values())
    found: dict[str, str | None] = {}
    for name in d.claims:
        found[name] = None
        open_rows = sum(int((~decided(reference, t, CLAIMS[name])).sum()) for t in case.tensors if t.set)
        step = CLAIMS[name].storage * _largest_score(expected)
        if step > LARGEST_STEP:
            found[name] = f"storing an attention score rounds it by up to {step:.2g}, which no bound follows"
        elif name == "fp16" and largest > LARGEST_FP16:
            found[name] = f"values up to {largest:.2g} come close to the largest number of fp16"
        elif open_rows and (d.backward or d.component in NETWORKS):
            found[name] = f"{open_rows} routing decisions are within its errors; the forced twin has no such"
    return found
