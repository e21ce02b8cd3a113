"""A picture of a run: the curve of its losses, and the load of every expert over time.

Needs matplotlib, the extra `plot`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Final

import numpy as np

from refimpl.errors import Invalid, Unreadable, Unsupported
from refimpl.training import curve

_LINES: Final = (("main", "main loss", "#1f4e79"), ("mtp", "MTP loss", "#c55a11"))


def available() -> None:
    """Raises Unsupported where matplotlib is not installed."""
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise Unsupported("matplotlib is not installed, but a picture needs it: the extra plot.") from None


def draw(csv: str | PathLike[str], target: str | PathLike[str]) -> None:
    """From the CSV file of a curve to a picture in the format of the target's suffix.  Raises Invalid for a
    curve without rows, Unreadable, Unsupported."""
    available()
    rows = curve.read(csv)
    if not rows:
        raise Invalid(f"{csv} has no rows, but a picture needs at least one.")
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    plot: Any = importlib.import_module("matplotlib.pyplot")
    layers = sorted({int(name.split(".")[1]) for name in rows[0] if name.startswith("load.")})
    figure, axes = plot.subplots(
        1 + len(layers), 1, figsize=(8, 2.6 + 1.5 * len(layers)), sharex=True, layout="constrained",
        squeeze=False, height_ratios=[2.2, *[1] * len(layers)],
    )  # fmt: skip
    steps = [int(one["step"]) for one in rows]
    _losses(axes[0, 0], rows, steps)
    images = [_loads(ax, rows, steps, layer) for ax, layer in zip(axes[1:, 0], layers, strict=True)]
    if images:
        figure.colorbar(images[0], ax=list(axes[1:, 0]), label="load / mean load", aspect=8 * len(images))
    axes[-1, 0].set_xlabel("step")
    try:
        figure.savefig(target, dpi=150)
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or str(error).splitlines()[0].split("(")[0].strip()
        raise Unreadable(f"{Path(target)} cannot be written ({what}), but a picture must be.") from None
    finally:
        plot.close(figure)


def _losses(ax: Any, rows: Sequence[dict[str, str]], steps: Sequence[int]) -> None:
    for name, label, colour in _LINES:
        if name in rows[0]:
            ax.plot(steps, [float(one[name]) for one in rows], color=colour, label=label, linewidth=1.2)
    ax.set_ylabel("cross-entropy (nats per byte)")
    right = ax.twinx()
    violation = [float(one["max_violation"]) for one in rows]
    right.plot(steps, violation, color="#999999", linewidth=0.8, label="MaxVio, largest of the layers")
    right.set_ylabel("MaxVio")
    right.set_ylim(bottom=0)
    lines = [*ax.get_lines(), *right.get_lines()]
    ax.legend(lines, [line.get_label() for line in lines], loc="upper right", frameon=False)


def _loads(ax: Any, rows: Sequence[dict[str, str]], steps: Sequence[int], layer: int) -> Any:
    experts = [name for name in rows[0] if name.startswith(f"load.{layer}.")]
    load = np.array([[float(one[name]) for one in rows] for name in experts])  # (N, steps)
    ax.set_ylabel(f"layer {layer}\nexpert")
    extent = (steps[0] - 0.5, steps[-1] + 0.5, len(experts) - 0.5, -0.5)
    return ax.imshow(
        load, aspect="auto", extent=extent, vmin=0.0, vmax=2.0, cmap="RdBu_r", interpolation="none"
    )
