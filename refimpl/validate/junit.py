"""A validation as JUnit XML, which CI systems read.  SPEC VERDICT-17.

A suite is a testsuite and a case a testcase: `failure` where it does not hold, `error` where the port failed,
`skipped` where it was not tried.  Each inconsistent choice is a testcase of the suite `choices`.
"""

from __future__ import annotations

import re
from xml.sax.saxutils import escape, quoteattr

from refimpl.validate import report
from refimpl.validate.results import FAILED, HELD, NOT_HELD, CaseResult, Validation
from refimpl.validate.settling import Inconsistent

_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # not allowed in XML 1.0


def text(v: Validation) -> str:
    """The document."""
    suites: dict[str, list[CaseResult]] = {}
    for r in v.cases:
        suites.setdefault(r.suite, []).append(r)
    body = [_suite(name, found) for name, found in suites.items()]
    if v.inconsistent:
        body.append(_choices(v.inconsistent))
    failures = v.count(NOT_HELD) + len(v.inconsistent)
    head = _counts(len(v.cases) + len(v.inconsistent), failures, v.count(FAILED), _seconds(list(v.cases)))
    skipped = sum(not r.tried for r in v.cases)
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<testsuites name={_quoted(f"refimpl validate {v.port}")} {head} skipped="{skipped}">\n'
        + "".join(body)
        + "</testsuites>\n"
    )


def _suite(name: str, found: list[CaseResult]) -> str:
    failures, errors = (sum(r.status == s for r in found) for s in (NOT_HELD, FAILED))
    skipped = sum(not r.tried for r in found)
    head = _counts(len(found), failures, errors, _seconds(found))
    cases = "".join(_case(r) for r in found)
    return f' <testsuite name={_quoted(name)} {head} skipped="{skipped}">\n{cases} </testsuite>\n'


def _case(r: CaseResult) -> str:
    time = f"{r.seconds or 0.0:.3f}"
    start = f'  <testcase classname={_quoted(r.suite)} name={_quoted(r.id.partition("/")[2])} time="{time}">'
    inner = ""
    if r.status == NOT_HELD:
        detail = report.text(r.verdict) if r.verdict is not None else r.why
        inner = f'\n   <failure type="off" message={_quoted(r.why)}>{_escaped(detail)}</failure>\n  '
    elif r.status == FAILED:
        inner = f'\n   <error type="failed" message={_quoted(r.why)}>{_escaped(r.why)}</error>\n  '
    elif r.status != HELD:
        inner = f"\n   <skipped message={_quoted(r.status + (f': {r.why}' if r.why else ''))}/>\n  "
    if r.ran is not None and r.status in (NOT_HELD, FAILED):
        for tag, printed in (("system-out", r.ran.stdout), ("system-err", r.ran.stderr)):
            if printed:
                inner += f" <{tag}>{_escaped(printed)}</{tag}>\n  "
    return f"{start}{inner}</testcase>\n"


def _choices(found: tuple[Inconsistent, ...]) -> str:
    cases = "".join(
        f'  <testcase classname="choices" name={_quoted(f.choice)} time="0">\n'
        f'   <failure type="inconsistent" message={_quoted(f.text)}>{_escaped(f.text)}</failure>\n'
        "  </testcase>\n"
        for f in found
    )
    head = _counts(len(found), len(found), 0, 0.0)
    return f' <testsuite name="choices" {head} skipped="0">\n{cases} </testsuite>\n'


def _counts(tests: int, failures: int, errors: int, seconds: float) -> str:
    return f'tests="{tests}" failures="{failures}" errors="{errors}" time="{seconds:.3f}"'


def _seconds(found: list[CaseResult]) -> float:
    total = 0.0
    for r in found:
        total += r.seconds or 0.0
    return total


def _quoted(given: str) -> str:
    return quoteattr(_FORBIDDEN.sub("\ufffd", given))


def _escaped(given: str) -> str:
    return escape(_FORBIDDEN.sub("\ufffd", given))
