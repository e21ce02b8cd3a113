"""The page and the picture of `fp8_training.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fp8_runs import (
    BASE,
    EVERY,
    FP8,
    HELD_OUT,
    HOPPER,
    REFERENCE,
    REPLAYED,
    SEQUENCES,
    TRAINED,
    UNPROMOTED,
    Task,
    precisions,
)
from small_training import LENGTH, corpora, interval, markdown

Found = Mapping[str, Any]  # key of a task -> its result
REPORT = 0.25  # percent
LAST = 5  # validations whose mean is the validation loss
ROUTINGS = ("free", "forced")


def smoothed(values: Sequence[float]) -> np.ndarray:
    """The exponential average with the coefficient 0.9, as in the report's figure 10."""
    out = [values[0]]
    for value in values[1:]:
        out.append(0.9 * out[-1] + 0.1 * value)
    return np.array(out)


def percent(found: Found, name: str, forced: bool, seed: int, curve: str) -> np.ndarray:
    """The difference of a smoothed curve from that of bf16 with the same seed, relative."""
    own = found[Task("train", name, seed, forced).key][curve]
    base = found[Task("train", BASE, seed).key][curve]
    return 100.0 * (smoothed(own) / smoothed(base) - 1.0)


def validation(found: Found, name: str, forced: bool, seed: int) -> float:
    return float(np.mean(found[Task("train", name, seed, forced).key]["validation"][-LAST:]))


def costs(found: Found, name: str, forced: bool, seeds: int, base: str = BASE) -> list[float]:
    """Of the validation loss, in percent of that of the base with the same seed; bf16 is never forced."""
    theirs = forced and base != BASE
    return [
        100.0 * (validation(found, name, forced, s) / validation(found, base, theirs, s) - 1.0)
        for s in range(seeds)
    ]


def shown(values: Sequence[float], digits: str = "+.3f") -> str:
    mean, half = interval(values)
    return f"{mean:{digits}} ± {half:.2g}"


def against_report(values: Sequence[float]) -> str:
    """What the interval says of the report's 0.25%."""
    mean, half = interval(values)
    if abs(mean) + half < REPORT:
        return "within 0.25%"
    return "beyond 0.25%" if abs(mean) - half > REPORT else "not resolved: the interval holds 0.25%"


def resolved(values: Sequence[float], digits: str = "+.3f") -> str:
    mean, half = interval(values)
    return shown(values, digits) + ("" if abs(mean) > half else ", not resolved at this size")


def page(tasks: Sequence[Task], found: Found, seeds: int, steps: int) -> str:
    seconds = sum(found[task.key]["seconds"] for task in tasks)
    sections = [
        f"{seeds} seeds, {steps} steps of {SEQUENCES} sequences of {LENGTH} bytes; {seconds / 3600:.1f} "
        f"hours of one core; text {corpora()[0].sha256[:12]}; on the carrier float32. Means and 95% t "
        "intervals over the seeds.",
        _headline(found, seeds),
        *_trainings(found, seeds),
        *_ablations(found, seeds),
        *_replays(found, seeds),
        *_passes(found, seeds),
    ]
    return "\n\n".join(sections) + "\n"


def _headline(found: Found, seeds: int) -> str:
    """The answer to the report's figure, by the intervals."""
    parts = []
    for forced in (False, True):
        values = costs(found, FP8, forced, seeds)
        parts.append(f"{shown(values)}% with routing {ROUTINGS[forced]} ({against_report(values)})")
    noise = costs(found, REFERENCE, False, seeds)
    return (
        f"The validation loss of v3-fp8 differs from that of bf16 by {parts[0]}, and by {parts[1]}. The "
        f"report has a relative loss error below {REPORT}%, after about a trillion tokens, in models of 16B "
        "and 230B. How much two runs differ for any small reason is shown by float32 against bf16: "
        f"{shown(noise)}% with routing free."
    )


def _trainings(found: Found, seeds: int) -> list[str]:
    rows = []
    for name in TRAINED:
        for forced in (False, True) if name != BASE else (False,):
            own = [validation(found, name, forced, s) for s in range(seeds)]
            row = [name, ROUTINGS[forced], shown(own, ".4f")]
            if name != BASE:
                values = costs(found, name, forced, seeds)
                train = [percent(found, name, forced, s, "loss")[-1] for s in range(seeds)]
                row += [shown(values), against_report(values), shown(train)]
            rows.append(row + ["-"] * (6 - len(row)))
    head = [
        "trained in",
        "routing",
        "validation loss",
        "from bf16, %",
        "beside the report's 0.25%",
        "training loss from bf16, %",
    ]
    return [
        "## Training",
        f"The validation loss is the mean of the last {LAST} validations, one every {EVERY} steps, on "
        f"{HELD_OUT} sequences of held-out text, each in the precision of its training. Forced: every step "
        "and validation takes the experts that the bf16 run of the same seed took. The training loss is the "
        "exponential average with 0.9 at the last step. Differences are paired by seed.",
        _table(head, rows),
    ]


def _ablations(found: Found, seeds: int) -> list[str]:
    rows = [
        [name, *(resolved(costs(found, name, forced, seeds, FP8)) for forced in (False, True))]
        for name in TRAINED[3:]
    ]
    return [
        "## One rule changed",
        "What the change adds to the validation loss of v3-fp8, in percent of it. Blocks: the gradient is "
        "quantised once in blocks of 128x128, for Dgrad and, transposed, for Wgrad (appendix B.2, where a "
        "16B model diverged after 300B tokens). One scale a tensor: inputs, gradients and weights. E5M2: the "
        "gradients that Dgrad and Wgrad read.",
        _table(["changed", "routing free, %", "routing forced, %"], rows),
    ]


def _replays(found: Found, seeds: int) -> list[str]:
    def cell(
        name: str, forced: bool, measure: Callable[[Any, Any], float], digits: str, show: Any = shown
    ) -> str:
        base = [found[Task("replay", FP8, s).key] for s in range(seeds)]
        own = [found[Task("replay", name, s, forced).key] for s in range(seeds)]
        return str(show([measure(a, b) for a, b in zip(own, base, strict=True)], digits))

    def largest(a: Any, b: Any) -> float:
        return 100.0 * float(np.abs(np.array(a["loss"]) / np.array(b["loss"]) - 1.0).max())

    def mean(a: Any, b: Any) -> float:
        return 100.0 * float(np.mean(a["loss"]) / np.mean(b["loss"]) - 1.0)

    rows = [
        [
            name,
            ROUTINGS[forced],
            cell(name, forced, mean, "+.4f", resolved),
            cell(name, forced, largest, ".4f"),
            cell(name, forced, lambda a, _: 100.0 * a["distance"], ".3g"),
            "-" if forced else cell(name, forced, lambda a, _: 100.0 * a["flipped"], ".3g"),
        ]
        for name in (HOPPER, UNPROMOTED, BASE)
        for forced in ((False, True) if name in precisions() else ())
    ]
    head = [
        "replayed with",
        "routing",
        "mean loss from promote_fp32, %",
        "largest of the steps, %",
        "distance of the weights, %",
        "tokens routed otherwise at the end, %",
    ]
    return [
        "## Ten steps replayed",
        f"The {REPLAYED} steps after the end of the training in v3-fp8, from its state, with another "
        "accumulation than promote_fp32; and in bf16, to compare. The distance of the weights is in percent "
        "of the way that they go in these steps with promote_fp32. No promotion: the tensor core's register "
        "runs on through all of a sum. Sums have at most 512 terms here; the "
        "report speaks of 4096.",
        _table(head, rows),
    ]


def _passes(found: Found, seeds: int) -> list[str]:
    results = [found[Task("passes", "all", s).key] for s in range(seeds)]
    rows = []
    for name in (name for name in precisions() if name != REFERENCE):
        for routing in ROUTINGS:

            def cell(
                measure: str, digits: str = ".3f", scale: float = 100.0, key: str = f"{name}, {routing}"
            ) -> str:
                return shown([scale * one[key][measure] for one in results], digits)

            beside = [
                100.0 * (one[f"{name}, {routing}"]["gradients"] - one[f"{FP8}, {routing}"]["gradients"])
                for one in results
            ]
            rows.append(
                [
                    name,
                    routing,
                    cell("loss", "+.4f"),
                    cell("logits"),
                    cell("gradients"),
                    "-" if name == FP8 else resolved(beside),
                    "-" if name == FP8 else cell("from v3-fp8"),
                    "-" if routing == "forced" else cell("flipped"),
                ]
            )
    head = [
        "precision",
        "routing",
        "loss",
        "logits",
        "gradients",
        "more than v3-fp8's",
        "gradients from v3-fp8's",
        "tokens routed otherwise",
    ]
    return [
        "## One pass",
        "Forward and backward on one batch of held-out text, with the weights that the training in v3-fp8 "
        "reached, rounded to bf16, against float32 with the same weights; in percent. Loss: relative "
        "difference. Logits and gradients (of all weights, as one vector): relative Frobenius error, and by "
        "how much it is above that of v3-fp8 with the same routing, paired by seed; the column after it "
        "measures from the gradients of v3-fp8. Tokens routed "
        "otherwise: to another set of experts than in float32, of all tokens and layers. Forced: with the "
        "experts of float32.",
        _table(head, rows),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(markdown(head, rows))


def picture(found: Found, seeds: int, path: Path) -> None:
    """The course of v3-fp8 against bf16; what each change costs; the gradients' errors of one pass."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"svg.hashsalt": "refimpl", "svg.fonttype": "none"})
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    course, ends, errors = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
    for number, (name, forced) in enumerate(((FP8, False), (FP8, True), (REFERENCE, False))):
        lines = np.array([percent(found, name, forced, s, "validation") for s in range(seeds)])
        at = EVERY * (1 + np.arange(lines.shape[1]))
        middle, half = np.array([interval(column) for column in lines.T]).T
        course.plot(at, middle, color=f"C{number}", label=f"{name}, {ROUTINGS[forced]}")
        course.fill_between(at, middle - half, middle + half, color=f"C{number}", alpha=0.15, linewidth=0)
    course.axhspan(-REPORT, REPORT, facecolor="#eee", edgecolor="#888", zorder=0, label="the report's 0.25%")
    course.set_xlabel("step")
    course.set_ylabel("smoothed validation loss from bf16, %")
    course.legend(framealpha=1, edgecolor="none", fontsize=7)

    names = TRAINED[1:]
    _points(ends, names, lambda name, forced: costs(found, name, forced, seeds))
    ends.axvspan(-REPORT, REPORT, color="#ddd", zorder=0)
    ends.set_xlabel("validation loss at the end from bf16, %")

    results = [found[Task("passes", "all", s).key] for s in range(seeds)]
    known = [name for name in precisions() if name != REFERENCE]
    _points(
        errors,
        known,
        lambda name, forced: [100.0 * one[f"{name}, {ROUTINGS[forced]}"]["gradients"] for one in results],
    )
    errors.set_xlabel("error of one pass's gradients, %")
    errors.set_xlim(left=0)
    figure.legend(*errors.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def _points(axes: Any, names: Sequence[str], values: Callable[[str, bool], Sequence[float]]) -> None:
    """A mean with its interval for each name, free above forced."""
    for forced, marker in ((False, "o"), (True, "s")):
        middle, half = np.array([interval(values(name, forced)) for name in names]).T
        at = np.arange(len(names)) + (0.15 if forced else -0.15)
        axes.errorbar(
            middle, at, xerr=half, fmt=marker, color=f"C{int(forced)}", capsize=2, markersize=4, linestyle="",
            label=f"routing {ROUTINGS[forced]}",
        )  # fmt: skip
    axes.set_yticks(np.arange(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", color="#eee")
