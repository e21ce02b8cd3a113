"""Small V3s on real text: what the experiments of training share.

The text is the Python documentation that every Python carries (`pydoc_data.topics`), as byte-level ids; its
last tenth is held out.  A run is a model of 2 layers, 16 experts in 4 groups, 4 chosen of 2 groups, width 64,
trained in float32 with V3's step.  Arms with the same seed have the same first weights and read the same
sequences in the same order, so arms are compared by paired differences, with a t interval over the seeds.
A difference whose interval has 0 in it is "not resolved at this size".
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from scipy import stats

from refimpl.config.model import ModelConfig
from refimpl.config.training import TrainingConfig
from refimpl.training import loads, start, step
from refimpl.training.corpus import Corpus
from refimpl.training.initialise import initialise
from refimpl.training.run import SHORT, SMALL

LENGTH, SEQUENCES, HELD_OUT = 64, 16, 64  # tokens of a sequence, sequences of a step and of the validation
LAST = 50  # steps over which the load in training is averaged
CONFIDENCE = 0.95

CONFIG: dict[str, Any] = {**SMALL, "num_hidden_layers": 2, "num_attention_heads": 2}
TRAINING: dict[str, Any] = {
    **SHORT,
    "sequence_length": LENGTH,
    "batch_sequences": SEQUENCES,
    "final_batch_sequences": SEQUENCES,
    "balance_loss_weight": 0.0,
    "bias_update_speed": 0.0,
}


@dataclass(frozen=True)
class Arm:
    """What one side of a comparison does."""

    name: str
    training: Mapping[str, Any] = field(default_factory=dict)
    modules: int = 0


def text() -> bytes:
    return "\n".join(topics[name] for name in sorted(topics)).encode()


def corpora() -> tuple[Corpus, Corpus]:
    """(training, held out)."""
    whole = np.frombuffer(text(), np.uint8).astype(np.uint16)
    cut = len(whole) * 9 // 10
    sha = hashlib.sha256(text()).hexdigest()
    return Corpus(whole[:cut], sha), Corpus(whole[cut:], sha)


def run(arm: Arm, seed: int, steps: int) -> dict[str, Any]:
    """Train, then measure on the held-out text.  Curves are lists with an entry for each step."""
    config = ModelConfig.from_dict({**CONFIG, "num_nextn_predict_layers": arm.modules})
    training = TrainingConfig(**{**TRAINING, **arm.training})
    learned, held_out = corpora()
    state = start(config, initialise(config, training, seed), training, "hf", "float32")
    violation, loss = [], []
    for number in range(steps):
        ids, targets = learned.batch(seed, number, SEQUENCES, LENGTH)
        state, report = step(state, [{"input_ids": ids, "targets": targets}])
        violation.append(report.max_violation[1])  # of the trunk's layer with experts
        loss.append(report.losses["main"])
    ids, targets = held_out.batch(0, 0, HELD_OUT, LENGTH)  # the same for all
    result = state.model.forward(ids, targets=targets, trace=("*.shared_head.head",))
    counts = result.counts[1]  # (B, N)
    found = {
        "validation loss": result.losses["main"],
        "MaxVio, training batches": float(np.mean(violation[-LAST:])),
        "MaxVio, held-out text": loads.max_violation(counts.sum(0)),
        "MaxVio, single sequences": float(np.mean([loads.max_violation(one) for one in counts])),
        "experts of a sequence": float((counts > 0).sum(-1).mean()),
        "curve of MaxVio": violation,
        "curve of loss": loss,
    }
    return found | (_second_token(result, targets) if arm.modules else {})


def _second_token(result: Any, targets: np.ndarray) -> dict[str, float]:
    """How often the module's most probable token is the main model's at the next position, where both have
    read the true tokens; and how often it is the true one."""
    drafted = next(iter(result.tensors.values())).reshape(result.logits.shape)[:, :-1].argmax(-1)
    main = result.logits[:, 1:].argmax(-1)
    return {
        "acceptance, %": 100.0 * float((drafted == main).mean()),
        "module right, %": 100.0 * float((drafted == targets[:, 1:]).mean()),
        "main model right, %": 100.0 * float((main == targets[:, 1:]).mean()),
        "MTP loss": result.losses["mtp"],
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half of the t interval)."""
    n = len(values)
    spread = float(np.std(values, ddof=1)) / math.sqrt(n)
    return float(np.mean(values)), float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * spread


Found = dict[str, list[dict[str, Any]]]  # arm -> results by seed


def main(
    description: str,
    arms: Sequence[Arm],
    measures: Sequence[str],
    published: str,
    curve: str,
    file: str,
) -> None:
    """One experiment: runs, tables in `FILE.md`, picture in `FILE.svg`."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(file).with_suffix(""))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes, which load NumPy after this
    begun = time.perf_counter()
    found: Found = {arm.name: [] for arm in arms}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        work = [(arm, seed) for seed in range(options.seeds) for arm in arms]
        futures = [pool.submit(run, arm, seed, options.steps) for arm, seed in work]
        for (arm, _), future in zip(work, futures, strict=True):
            found[arm.name].append(future.result())
    seconds = time.perf_counter() - begun
    lines = [
        f"{options.seeds} seeds, {options.steps} steps of {SEQUENCES} sequences of {LENGTH} bytes; "
        f"{seconds:.0f} s on {options.jobs} processes; text {corpora()[0].sha256[:12]}.",
        "",
        *table(found, measures),
        "",
        *differences(found, measures),
        "",
        published,
    ]
    options.out.with_suffix(".md").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))
    try:
        picture(found, curve, measures, options.out.with_suffix(".svg"))
    except ImportError:
        print("No picture: matplotlib is not installed (pip install 'refimpl[plot]').")


def table(found: Found, measures: Sequence[str]) -> list[str]:
    """Mean and 95% interval over the seeds."""

    def cell(results: list[dict[str, Any]], measure: str) -> str:
        if measure not in results[0]:
            return "-"
        mean, half = interval([one[measure] for one in results])
        return f"{mean:.4g} ± {half:.2g}"

    rows = [[name, *(cell(results, m) for m in measures)] for name, results in found.items()]
    return markdown(["mean ± 95% interval", *measures], rows)


def differences(found: Found, measures: Sequence[str]) -> list[str]:
    """Each arm minus the first, paired by seed."""
    (first, base), *others = found.items()

    def cell(results: list[dict[str, Any]], measure: str) -> str:
        if measure not in results[0] or measure not in base[0]:
            return "-"
        mean, half = interval([a[measure] - b[measure] for a, b in zip(results, base, strict=True)])
        verdict = "" if abs(mean) > half else ", not resolved at this size"
        return f"{mean:+.3g} ± {half:.2g}{verdict}"

    rows = [[f"{name} - {first}", *(cell(results, m) for m in measures)] for name, results in others]
    return markdown(["paired difference", *measures], rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    line: Callable[[Sequence[str]], str] = lambda cells: "| " + " | ".join(cells) + " |"  # noqa: E731
    return [line(head), line(["---"] * len(head)), *(line(row) for row in rows)]


def picture(found: Found, curve: str, measures: Sequence[str], path: Path) -> None:
    """The curve of each arm, mean and range over the seeds; and the first measure with its intervals."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"svg.hashsalt": "refimpl", "svg.fonttype": "none"})
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for number, (name, results) in enumerate(found.items()):
        colour = f"C{number}"
        lines = np.array([_smooth(one[curve]) for one in results])
        at = np.arange(lines.shape[1])[::4]  # enough for the eye
        lines = lines[:, ::4]
        left.plot(at, lines.mean(0), color=colour, label=name)
        left.fill_between(at, lines.min(0), lines.max(0), color=colour, alpha=0.15, linewidth=0)
        mean, half = interval([one[measures[0]] for one in results])
        right.errorbar([number], [mean], [half], fmt="o", color=colour, capsize=3)
    left.set_xlabel("step")
    left.set_ylabel(curve.removeprefix("curve of ") + ", mean of 10 steps")
    left.grid(color="#ddd")
    left.legend(frameon=False, fontsize=8)
    right.set_xticks([])
    right.set_xlim(-0.5, len(found) - 0.5)
    right.set_ylabel(f"{measures[0]}, 95% interval")
    right.grid(axis="y", color="#ddd")
    figure.savefig(path, metadata={"Date": None})


def _smooth(values: Sequence[float]) -> np.ndarray:
    return np.convolve(values, np.ones(10) / 10, "valid")
