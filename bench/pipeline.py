"""Pipeline schedules: speed, where the published formulas hold, peaks, hidden all-to-all, V3's own setting.

    python bench/pipeline.py [speed] [formulas] [peaks] [overlap] [v3]      all of them if none is named

Each writes its section of bench/pipeline.md.  Status 1 if something there does not hold: a limit of time, a
formula inside of its region, a peak.  `speed` has PyTorch's own construction in the same run where torch is
installed.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import pipeline_formulas
import pipeline_overlap
import pipeline_speed
import pipeline_v3

PAGE = Path(__file__).with_suffix(".md")
HEAD = "# Pipeline schedules\n\nWritten by `python bench/pipeline.py`, a section by each of its words.\n"
SECTIONS: dict[str, Callable[[], tuple[str, bool]]] = {
    "speed": pipeline_speed.section,
    "formulas": pipeline_formulas.section,
    "peaks": pipeline_formulas.peaks,
    "overlap": pipeline_overlap.section,
    "v3": pipeline_v3.section,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    names = parser.parse_args().sections or list(SECTIONS)
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        parser.error(f"there is no section {unknown[0]!r}, but {', '.join(SECTIONS)}")
    status = 0
    for name in names:
        text, holds = SECTIONS[name]()
        print(text)
        write(name, text)
        status |= not holds
    return status


def write(name: str, text: str) -> None:
    """Replaces a section of the page, or adds it; the sections keep the order of SECTIONS."""
    old = PAGE.read_text("utf-8") if PAGE.exists() else ""
    parts = dict(re.findall(r"<!-- (\w+) -->\n(.*?)(?=\n<!-- |\Z)", old, re.DOTALL))
    parts[name] = text
    body = (f"<!-- {known} -->\n{parts[known].strip()}\n" for known in SECTIONS if known in parts)
    PAGE.write_text("\n".join([HEAD, *body]), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
