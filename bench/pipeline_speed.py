"""How long planning and simulating take, beside PyTorch's construction of the same orders."""

import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from unittest import mock

from tabulate import tabulate

from refimpl.pipeline.rules import plan
from refimpl.pipeline.simulate import Durations, simulate

TIMES = Durations(10, 12, 9, FB=25)
SIZES = ((16, 64), (64, 1024))
LONG = 2.0  # seconds; what takes PyTorch longer is constructed once
LIMITS = {("dualpipe", 16, 64): 0.2, ("dualpipe", 64, 1024): 10.0}  # seconds, planned and simulated
GROWTH = ((16, 64), (16, 256), (16, 1024), (16, 4096), (64, 4096))
THEIRS = {  # ours -> PyTorch's class, chunks
    "interleaved": ("ScheduleInterleaved1F1B", 2),
    "zb1p": ("ScheduleInterleavedZeroBubble", 1),
    "zbv": ("ScheduleZBVZeroBubble", 2),
    "dualpipev": ("ScheduleDualPipeV", 2),
}
NAMES = ("dualpipe", "dualpipev", "zbv", "zb1p", "interleaved", "1f1b", "gpipe")


def clocked(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def theirs(name: str, ranks: int, microbatches: int) -> Callable[[], object] | None:
    """PyTorch's constructor, which makes the orders of all ranks, on a stage that only has sizes."""
    if name not in THEIRS or find_spec("torch") is None:
        return None
    from torch.distributed.pipelining import schedules
    from torch.distributed.pipelining.stage import PipelineStage

    title, chunks = THEIRS[name]
    stage = mock.create_autospec(PipelineStage, instance=True)
    stage.group_rank, stage.group_size, stage.submod = 0, ranks, None
    stage.num_stages = ranks * chunks
    return lambda: getattr(schedules, title)([stage] * chunks, microbatches)


def section() -> tuple[str, bool]:
    rows: list[list[object]] = []
    holds = True
    for ranks, microbatches in SIZES:
        for name in NAMES:
            row, fast = measured(name, ranks, microbatches)
            rows.append(row)
            holds &= fast
    growth = []
    for ranks, microbatches in GROWTH:
        schedule = plan("dualpipe", ranks, microbatches)
        actions = len(list(schedule.actions()))
        seconds = min(clocked(lambda s=schedule: simulate(s, TIMES)) for _ in range(3))
        growth.append([ranks, microbatches, actions, f"{seconds:.3f}", f"{seconds / actions * 1e6:.1f}"])
    torch = f", torch {version('torch')}" if find_spec("torch") else ""
    columns = ["schedule", "P", "M", "actions", "plan", "simulate", "both", "limit", "PyTorch constructs"]
    first = tabulate(rows, columns, "github", disable_numparse=True)
    columns = ["P", "M", "actions", "simulate", "microseconds per action"]
    second = tabulate(growth, columns, "github", disable_numparse=True)
    text = f"""## Speed

Seconds, the best of three, alternating with PyTorch's constructor (`pipeline_order` of all ranks) in one
process on one core (Python {platform.python_version()}{torch}); what takes it more than {LONG:g} s ran once.
PyTorch makes an order, it has no durations; its 1F1B and GPipe make none ahead, and DualPipe it does not
have.

{first}

A simulation of DualPipe takes time in proportion to its actions:

{second}
"""
    return text, holds


def measured(name: str, ranks: int, microbatches: int) -> tuple[list[object], bool]:
    """A row of the table, and whether it keeps its limit."""
    other = theirs(name, ranks, microbatches)
    planned, simulated, constructed = [], [], []
    for _ in range(3):
        planned.append(clocked(lambda: plan(name, ranks, microbatches)))
        schedule = plan(name, ranks, microbatches)
        simulated.append(clocked(lambda s=schedule: simulate(s, TIMES)))
        if other is not None and max(constructed, default=0) < LONG:
            constructed.append(clocked(other))
    both, limit = min(planned) + min(simulated), LIMITS.get((name, ranks, microbatches))
    actions = len(list(schedule.actions()))
    seconds = [f"{value:.3f}" for value in (min(planned), min(simulated), both)]
    limits = "" if limit is None else f"{limit:g}"
    beside = f"{min(constructed):.3f}" if constructed else ""
    return [name, ranks, microbatches, actions, *seconds, limits, beside], limit is None or both < limit
