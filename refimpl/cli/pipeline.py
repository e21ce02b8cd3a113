"""`refimpl pipeline`: schedules, their times and memory, pictures and files.  SPEC PIPE-47 to PIPE-49."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from refimpl.checkpoint.atomic import write_bytes
from refimpl.cli.common import FAILS, HOLDS, Commands, natural
from refimpl.errors import Invalid
from refimpl.pipeline import exchange, picture, summary, torch_csv, trace
from refimpl.pipeline.check import check
from refimpl.pipeline.gantt import title
from refimpl.pipeline.orders import differences
from refimpl.pipeline.rules import RULES, plan
from refimpl.pipeline.schedule import Schedule
from refimpl.pipeline.simulate import Durations, Timeline, simulate
from refimpl.pipeline.waits import receives_ahead

FORM: Final = "F,I,W[,B[,FB]]"
LARGEST: Final = 1 << 20  # of any number that is given, but for times
LONGEST: Final = 10**12  # of times: a quarter of an hour in nanoseconds
FINDINGS: Final = 20  # so many are printed
CHUNKED: Final = "interleaved"

Output = Callable[[], str]


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """The command `pipeline`."""
    parser = commands.add_parser("pipeline", help="pipeline schedules: times, memory, pictures, files")
    own = parser.add_subparsers(required=True, metavar="SCHEDULE|compare|check")
    for name, rule in RULES.items():
        one = own.add_parser(name, help=f"{rule.title}, the order of {rule.source}")
        _common(one)
        one.add_argument("--csv", metavar="FILE", help="the order in PyTorch's form; - is standard output")
        one.set_defaults(run=_schedule, schedules=[name])
    several = own.add_parser("compare", help="several schedules in one table and one picture")
    several.add_argument("schedules", nargs="+", metavar="SCHEDULE", help=f"of {', '.join(RULES)}")
    _common(several)
    several.set_defaults(run=_compare, csv=None)
    judged = own.add_parser("check", help="whether a schedule in a file is complete, legal and runs through")
    judged.add_argument("file", metavar="FILE", type=Path, help="JSON as --json writes it, or PyTorch's CSV")
    judged.add_argument("--as", dest="rule", metavar="RULE", help=f"its order too: of {', '.join(RULES)}")
    _chunked(judged)
    judged.set_defaults(run=_check)


def _common(parser: argparse.ArgumentParser) -> None:
    parser._negative_number_matcher = re.compile(r"-\d")  # so that -1,1,1 is a value
    parser.add_argument("--ranks", required=True, metavar="P")
    parser.add_argument("--microbatches", required=True, metavar="M")
    _chunked(parser)
    parser.add_argument(
        "--times", default="1,1,1", metavar=FORM, help="whole numbers; default: 1,1,1, B = I+W, FB = F+B"
    )
    parser.add_argument("--latency", default="0", metavar="L", help="from rank to rank; default: 0")
    parser.add_argument(
        "--plot", metavar="FILE", help="a Gantt chart, SVG or PNG; - is SVG on standard output"
    )
    parser.add_argument(
        "--trace", dest="chrome", metavar="FILE", help="for Chrome or Perfetto; - is standard output"
    )
    parser.add_argument("--json", metavar="FILE", help="orders and metrics; - is standard output")


def _chunked(parser: argparse.ArgumentParser) -> None:
    alone = f"only {CHUNKED} takes it"
    parser.add_argument("--chunks", metavar="V", help=f"stages of a rank; {alone}; default: 2")
    parser.add_argument("--group", metavar="G", help=f"microbatches that go together; {alone}")


def _schedule(given: argparse.Namespace) -> int:
    durations = _durations(given)
    _outputs_possible(given)
    timeline = simulate(_planned(given.schedules[0], given), durations)
    schedule = timeline.schedule
    _told(
        given,
        [timeline],
        as_text=lambda: summary.text(timeline),
        as_json=lambda: exchange.to_json(schedule, summary.metrics(timeline)),
        as_csv=lambda: torch_csv.text(schedule),
    )
    return HOLDS


def _compare(given: argparse.Namespace) -> int:
    durations = _durations(given)
    _outputs_possible(given)
    timelines = summary.alike([_planned(name, given) for name in given.schedules], durations)
    _told(
        given,
        timelines,
        as_text=lambda: summary.compared(timelines, durations),
        as_json=lambda: exchange.several([(one.schedule, summary.metrics(one)) for one in timelines]),
    )
    return HOLDS


def _check(given: argparse.Namespace) -> int:
    chunks, group = _chunks_and_group(given)
    if given.rule is None and (chunks, group) != (None, None):
        raise Invalid("--chunks or --group is given without --as, but they are numbers of a rule.")
    found = exchange.read(given.file)
    others = differences(found.schedule, given.rule, chunks, group) if given.rule is not None else []
    findings = check(found.schedule)
    if found.left_out:
        print(f"{found.left_out} actions of communication are left out; they are not judged.")
    for several in (findings, others):
        for one in several[:FINDINGS]:
            print(one)
        if len(several) > FINDINGS:
            print(f"and {len(several) - FINDINGS} more")
    told = "not legal"
    if not findings:
        ahead = receives_ahead(found.schedule)
        told = f"legal; receives to be posted ahead under rendezvous: {ahead}"
    if given.rule is not None:
        told += f"; its order is {'not ' if others else ''}that of {given.rule}"
    print(f"{title(found.schedule)}: {told}")
    return FAILS if findings or others else HOLDS


def _told(
    given: argparse.Namespace,
    timelines: Sequence[Timeline],
    as_text: Output,
    as_json: Output,
    as_csv: Output | None = None,
) -> None:
    """Files first, and then what standard output is for."""
    outputs: list[tuple[str, str | None, Callable[[str], bytes]]] = [
        ("picture", given.plot, lambda name: picture.render(timelines, picture.form(name))),
        ("trace", given.chrome, lambda _: trace.text(timelines).encode()),
        ("csv", given.csv, lambda _: as_csv().encode() if as_csv else b""),
        ("json", given.json, lambda _: as_json().encode()),
    ]
    wanted = [(what, name, made(name)) for what, name, made in outputs if name is not None]
    for _, name, data in wanted:
        if name != "-":
            write_bytes(name, data)
    piped = [data for _, name, data in wanted if name == "-"]
    if piped:
        sys.stdout.write(piped[0].decode())
        return
    print(as_text())
    for what, name, _ in wanted:
        print(f"{what}: {name}")


def _outputs_possible(given: argparse.Namespace) -> None:
    """Before anything is computed.  Raises Invalid, Unsupported."""
    names = [name for name in (given.plot, given.chrome, given.csv, given.json) if name is not None]
    for name in names:
        if names.count(name) > 1:
            raise Invalid(f"{name} is given for several outputs, but each must have its own.")
        if not Path(name).name:
            raise Invalid(f"{name!r} is to be written, but a file must have a name.")
        if not Path(name).parent.is_dir():
            raise Invalid(f"{name} is to be written, but there is no folder {Path(name).parent}.")
    if given.plot is not None:
        picture.check(given.plot)


def _planned(name: str, given: argparse.Namespace) -> Schedule:
    """Raises Invalid."""
    ranks, microbatches = _number("--ranks", given.ranks, 1), _number("--microbatches", given.microbatches, 1)
    chunks, group = _chunks_and_group(given)
    if name != CHUNKED and CHUNKED in given.schedules:  # --chunks and --group are its own
        chunks = group = None
    return plan(name, ranks, microbatches, chunks, group)


def _chunks_and_group(given: argparse.Namespace) -> tuple[int | None, int | None]:
    """Raises Invalid."""
    chunks = None if given.chunks is None else _number("--chunks", given.chunks, 1)
    return chunks, None if given.group is None else _number("--group", given.group, 1)


def _durations(given: argparse.Namespace) -> Durations:
    """Raises Invalid."""
    parts = given.times.split(",")
    if not 3 <= len(parts) <= 5:
        raise Invalid(f"--times is {given.times[:60]!r}, but it must be {FORM}, three to five whole numbers.")
    forward, to_input, to_weights, *rest = (
        _number("--times", part, 0, LONGEST, given.times) for part in parts
    )
    backward, pair = [*rest, None, None][:2]
    latency = _number("--latency", given.latency, 0, LONGEST)
    return Durations(forward, to_input, to_weights, backward, pair, latency)


def _number(option: str, text: str, least: int, most: int = LARGEST, whole: str | None = None) -> int:
    """The number that a text is; `whole` is all that the option was given.  Raises Invalid."""
    value = natural(text)
    if value is None or not least <= value <= most:
        shown, what = (text, "it") if whole is None else (whole, "each part")
        raise Invalid(
            f"{option} is {shown[:60]!r}, but {what} must be a whole number from {least} to {most}."
        )
    return value
