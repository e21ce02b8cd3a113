"""Training in V3's FP8 recipe against bf16, and what each of its rules is worth.

    python bench/experiments/fp8_training.py [--seeds N] [--steps N] [--jobs N] [--work FOLDER]

A small V3 with all parts is trained on real text in `bf16`, in `v3-fp8` with promote_fp32, and in `v3-fp8`
with one rule changed; with the same first weights and the same batches, so that runs are compared by paired
differences, with a t interval over the seeds.  From the trained state ten steps are replayed with Hopper's
accumulation, and one forward and backward pass is compared with float32.  Each with routing free and forced.
All on the fast carrier (float32).  `fp8_runs.py` says what is run, `fp8_page.py` makes page and picture.

What has been done is kept in the folder `--work`, and a run that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fp8_page
from fp8_runs import Task, perform, tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/fp8_training"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes, which load NumPy after this
    work = options.work / f"{options.steps}-steps"
    work.mkdir(parents=True, exist_ok=True)
    todo = tasks(options.seeds)
    found = done(todo, options.steps, options.jobs, work)
    page = fp8_page.page(todo, found, options.seeds, options.steps)
    options.out.with_suffix(".md").write_text(page, "utf-8")
    print(page)
    try:
        fp8_page.picture(found, options.seeds, options.out.with_suffix(".svg"))
    except ImportError:
        print("No picture: matplotlib is not installed (pip install 'refimpl[plot]').")


def done(todo: list[Task], steps: int, jobs: int, work: Path) -> dict[str, Any]:
    """Key of a task -> its result.  Each is begun when what it needs is there."""
    files = {task.key: work / f"{task.key}.json" for task in todo}
    found = {key: json.loads(file.read_text()) for key, file in files.items() if file.exists()}
    waiting = [task for task in todo if task.key not in found]
    running: dict[Future[dict[str, Any]], tuple[Task, float]] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        while waiting or running:
            ready = [task for task in waiting if all(need.key in found for need in task.needs)]
            for task in ready[: jobs - len(running)]:
                waiting.remove(task)
                running[pool.submit(perform, task, steps, work)] = task, time.perf_counter()
            for future in wait(running, return_when=FIRST_COMPLETED)[0]:
                task, begun = running.pop(future)
                seconds = time.perf_counter() - begun
                found[task.key] = future.result() | {"seconds": seconds}
                part = files[task.key].with_suffix(".part")
                part.write_text(json.dumps(found[task.key]))
                part.replace(files[task.key])  # whole or not at all
                print(f"{task.key} in {seconds:.0f} s, {len(waiting) + len(running)} left", flush=True)
    return found


if __name__ == "__main__":
    main()
