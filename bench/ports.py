"""Validate transformers and DeepSeek's own code on every case of numbers; writes bench/ports.md.

    python bench/ports.py [--cases build/golden] [--checkout DIR] [--jobs N] [--out FILE]

Each row is one run of `refimpl validate --port refimpl.validate.ports.NAME --as PRECISION`, with the
options of the adapter in REFIMPL_PORT_OPTIONS.  DeepSeek's rows need a checkout of deepseek-ai/DeepSeek-V3
(--checkout, or REFIMPL_DEEPSEEK_V3).  Failures are listed with their explanation from `EXPLAINED`, tensors
that hold with a share of their tolerance above `NEAR` with that from `CLOSE`; the exit status is 1 if one
has none.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("ports.md")
SUITES = (
    *("attention", "block", "embedding", "gate", "head", "linear"),
    *("mla", "mlp", "model", "moe", "norm", "rope"),
)
CLAIMS = {"float32": "fp32", "bfloat16": "bf16"}

NEAR = 1 / 1.3


@dataclass(frozen=True)
class Row:
    """One configuration of a port."""

    port: str
    dtype: str
    options: str

    @property
    def name(self) -> str:
        return f"{self.port} {self.dtype} {self.options}".strip()


ROWS = (
    *(
        Row("transformers", dtype, f"--attention {attention}")
        for dtype in CLAIMS
        for attention in ("eager", "sdpa")
    ),
    *(Row("transformers", dtype, f"--experts {how}") for dtype in CLAIMS for how in ("eager", "batched_mm")),
    *(
        Row("deepseek", dtype, f"--attention {attention}{backward}")
        for backward in ("", " --backward")
        for dtype in ("bfloat16", "float32")
        for attention in ("absorb", "naive")
    ),
)

# (port, dtype, case) -> why it fails, as found out; patterns.
EMBEDDING = (
    "PyTorch's gradient of an embedding on the CPU adds the rows of a token one by one in bfloat16 "
    "(embedding_dense_backward; the bits are those of that sum), where the claim adds in float32. An element "
    "in which large terms cancel keeps their rounding."
)
SINGLE = (
    "With one expert its weight is s / s, whose gradient is 0. The gate computes in bfloat16, so that "
    "autograd's two terms are rounded to bfloat16 each, and their difference is a rounding of bfloat16, not "
    "0. Inference never computes it."
)
EXPLAINED = {
    ("*", "bfloat16", "embedding/vjp"): EMBEDDING,
    ("deepseek", "bfloat16", "gate/single-vjp"): SINGLE,
}
ONCE = (
    "The bound of an element is that of one rounding to bfloat16 and little else. A rounding nearly fills it "
    "where the value lies between two numbers just above a power of two, and cannot exceed it."
)
CLOSE = {
    ("*", "bfloat16", "linear/*"): ONCE,
}


def reason(known: dict[tuple[str, str, str], str], row: Row, case: str) -> str | None:
    """What is known about a case under a configuration."""
    for (port, dtype, pattern), why in known.items():
        if fnmatchcase(row.port, port) and row.dtype == dtype and fnmatchcase(case, pattern):
            return why
    return None


def validated(row: Row, cases: Path, checkout: str, jobs: int) -> tuple[dict[str, Any], float]:
    """What `refimpl validate` says about a configuration, as JSON, and the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [
            sys.executable,
            "-m",
            "refimpl",
            "validate",
            "--port",
            f"refimpl.validate.ports.{row.port}",
        ]
        command += ["--as", CLAIMS[row.dtype], "--cases", str(cases), "--jobs", str(jobs), "--json", str(out)]
        command += [word for suite in SUITES for word in ("--suite", suite)]
        options = {"REFIMPL_PORT_OPTIONS": f"--dtype {row.dtype} {row.options}"}
        start = time.perf_counter()
        done = subprocess.run(
            command,
            env={**os.environ, **options, "REFIMPL_DEEPSEEK_V3": checkout},
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - start
        if not out.exists():
            raise SystemExit(f"{row.name}: {done.stderr.strip()}")
        found: dict[str, Any] = json.loads(out.read_text())
    return found, seconds


def failures(row: Row, found: dict[str, Any]) -> list[list[str]]:
    """Of every case that does not hold: configuration, case, what is off, why."""
    listed = []
    for case in found["cases"]:
        if case["status"] in ("holds", "not for me", "not offered"):
            continue
        tensors = (case["verdict"] or {}).get("tensors", [])
        off = [t["name"] for t in tensors if t["verdict"] in ("off", "malformed")]
        factor = case["worst"]
        shown = f"{', '.join(off) or case['why'] or case['status']}"
        shown += f" ({factor:.3g} of tolerance)" if isinstance(factor, float) else ""
        listed.append([row.name, case["id"], shown, reason(EXPLAINED, row, case["id"]) or "NOT EXPLAINED"])
    return listed


def near(row: Row, found: dict[str, Any]) -> list[list[str]]:
    """Of every tensor that holds and is near to a limit: configuration, case, tensor and test, why."""
    listed = []
    for case in found["cases"]:
        for t in (case["verdict"] or {}).get("tensors", []) if case["status"] == "holds" else []:
            for test, key in (("element", "excess"), ("spread", "spread"), ("bias", "bias_excess")):
                share = t.get(key)
                if isinstance(share, float) and share > NEAR:
                    why = reason(CLOSE, row, case["id"]) or "NOT EXPLAINED"
                    listed.append([row.name, case["id"], f"{t['name']}: {test} ({share:.2f})", why])
    return listed


def largest(found: dict[str, Any]) -> str:
    """The largest error over tolerance among the cases that hold, and where."""
    held = [(case["worst"], case["id"]) for case in found["cases"] if case["status"] == "holds"]
    share, where = max(held, default=(0.0, ""))
    return f"{share:.2f} {where}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=Path, default=Path("build/golden"))
    parser.add_argument("--checkout", default=os.environ.get("REFIMPL_DEEPSEEK_V3", ""))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=PAGE)
    given = parser.parse_args()
    rows: list[list[object]] = []
    listed: list[list[str]] = []
    close: list[list[str]] = []
    reasons = Counter[tuple[str, str, str]]()
    for row in ROWS:
        if row.port == "deepseek" and not given.checkout:
            print(f"{row.name}: left out, no --checkout")
            continue
        found, seconds = validated(row, given.cases, given.checkout, given.jobs)
        counts = Counter(case["status"] for case in found["cases"])
        held, other = counts.pop("holds", 0), counts.pop("not for me", 0)
        unoffered = counts.pop("not offered", 0)
        off = sum(counts.values())
        rows.append(
            [row.port, row.dtype, row.options, held + off, held, off, unoffered, other, largest(found)]
        )
        listed += failures(row, found)
        close += near(row, found)
        for case in found["cases"]:
            if case["status"] == "not for me":
                reasons[row.port, case["id"], case["why"]] += 1
        print(*rows[-1], f"{seconds:.0f} s", flush=True)
    given.out.write_text(page(rows, listed, close, reasons))
    unexplained = [line for line in listed + close if line[3] == "NOT EXPLAINED"]
    for line in unexplained:
        print(*line[:3], sep=": ")
    return 1 if unexplained else 0


def page(
    rows: list[list[object]],
    listed: list[list[str]],
    close: list[list[str]],
    reasons: Counter[tuple[str, str, str]],
) -> str:
    """The page in Markdown."""
    head = [
        "port",
        "type",
        "options",
        "judged",
        "hold",
        "off",
        "not offered",
        "not for it",
        "largest that holds",
    ]
    ordered: dict[tuple[str, str], list[str]] = {}
    for port, case, why in sorted(reasons):
        ordered.setdefault((port, why), []).append(case)
    return f"""# Real ports

Written by `python bench/ports.py` with torch {version("torch")} and transformers {version("transformers")}
over the suites {", ".join(SUITES)}.
*Judged* cases are claimed by the port and offered under its precision; *not offered* ones are claimed, but
could not tell a right output from a wrong one under that precision (`refused` in case.json). *Largest that
holds* is the largest error over tolerance of a case that holds.

{table([*head, "largest that holds"], rows)}

## What is off, and why

{table(["case", "tensors", "why", "where"], joined(listed))}

## What holds, nearer to a limit than 1.3 times

{table(["case", "tensor and test", "why", "where"], joined(close))}

## Not for the port

{table(["port", "reason", "cases"], [[*key, ", ".join(cases)] for key, cases in ordered.items()])}
"""


def joined(listed: list[list[str]]) -> list[list[object]]:
    """One line for the configurations in which the same happens for the same reason."""
    same: dict[tuple[str, str, str], list[str]] = {}
    for name, case, what, why in listed:
        plain, _, share = what.rpartition(" (")
        same.setdefault((case, plain, why), []).append(f"{name} ({share}")
    return [[*key, "; ".join(where)] for key, where in same.items()]


def table(head: list[str], rows: list[list[object]]) -> str:
    """A table in Markdown, without padding."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
