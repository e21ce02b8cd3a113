"""A validation as one page of HTML, without scripts and without anything from elsewhere.  SPEC VERDICT-17."""

from __future__ import annotations

from html import escape

from refimpl.validate import diagnosis_report, report, summary
from refimpl.validate.results import FAILED, HELD, NOT_HELD, CaseResult, Validation

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem;
  color: #1b1b1b; background: #fff; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
caption { text-align: left; padding: 0.25rem 0; }
th, td { text-align: left; padding: 0.3rem 0.6rem; border-bottom: 1px solid #ccc; vertical-align: top; }
td { overflow-wrap: anywhere; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.v { font-weight: 600; white-space: nowrap; }
.good { color: #0b6b2b; } .bad { color: #a3120a; } .none { color: #555; }
.verdict { border-left: 0.4rem solid; padding: 0.5rem 1rem; margin: 1rem 0; font-weight: 600; }
.scroll { overflow-x: auto; }
pre { overflow-x: auto; padding: 0.5rem; background: #f3f3f3; font-size: 0.8rem; line-height: 1.35; }
summary { cursor: pointer; }
details { margin: 0.5rem 0; }
@media (prefers-color-scheme: dark) {
  body { color: #e8e8e8; background: #161616; } th, td { border-color: #444; } pre { background: #242424; }
  .good { color: #6fd08c; } .bad { color: #ff8d80; } .none { color: #aaa; }
}
"""
_SIGNS = {HELD: ("good", "holds"), NOT_HELD: ("bad", "off"), FAILED: ("bad", "failed")}


def text(v: Validation) -> str:
    """The page."""
    *lines, conclusion = summary.sentences(v)
    kind = "good" if v.holds else "bad" if v.tried else "none"
    title = f"Validation of {v.port}"
    wrong = [r for r in v.tried if r.status != HELD]
    skipped = [r for r in v.cases if not r.tried]
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n",
        f"<h1>{escape(title)}</h1>\n",
        f'<p class="verdict {kind}">{escape(conclusion)}</p>\n',
        "<ul>\n" + "".join(f"<li>{escape(line)}</li>\n" for line in lines) + "</ul>\n",
    ]
    texts = [diagnosis_report.text(diagnosis) for diagnosis in v.diagnoses]
    parts += [f"<h2>Diagnosis</h2>\n<pre>{escape(text)}</pre>\n" for text in texts]
    if wrong:
        parts += ["<h2>What does not hold</h2>\n", *(_detail(r) for r in wrong)]
    if v.tried:
        parts += ["<h2>Cases that were tried</h2>\n", _table(list(v.tried))]
    if skipped:
        parts += ["<h2>Cases that were not tried</h2>\n", _left(skipped)]
    return "".join(parts) + "</main>\n</body>\n</html>\n"


def _table(found: list[CaseResult]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(r.id)}</th>{_sign(r)}<td>{escape(r.claim)}</td>'
        f'<td class="n">{summary.number(r.worst)}</td><td class="n">{summary.seconds(r)}</td>'
        f"<td>{escape(r.why)}</td></tr>\n"
        for r in found
    )
    return (
        '<div class="scroll" role="region" aria-label="Cases that were tried" tabindex="0">\n<table>\n'
        "<caption>The worst element, spread or bias is given as a factor of what is allowed.</caption>\n"
        '<thead><tr><th scope="col">case</th><th scope="col">verdict</th><th scope="col">as</th>'
        '<th scope="col" class="n">of tolerance</th><th scope="col" class="n">seconds</th>'
        '<th scope="col">first tensor that is off, or why</th></tr></thead>\n'
        f"<tbody>\n{rows}</tbody>\n</table>\n</div>\n"
    )


def _sign(r: CaseResult) -> str:
    kind, word = _SIGNS[r.status]
    return f'<td class="v {kind}">{word}</td>'


def _detail(r: CaseResult) -> str:
    inner = f"<p>{escape(r.title)}</p>\n" if r.title else ""
    if r.verdict is not None:
        inner += f"<pre>{escape(report.text(r.verdict))}</pre>\n"
    if r.ran is not None:
        for name, printed in (("standard output", r.ran.stdout), ("standard error", r.ran.stderr)):
            if printed.strip():
                inner += f"<p>The end of {name}:</p>\n<pre>{escape(printed)}</pre>\n"
    head = f'<span class="v bad">{escape(r.id)}</span>: {escape(r.why)}'
    return f"<details>\n<summary>{head}</summary>\n{inner}</details>\n"


def _left(found: list[CaseResult]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(r.id)}</th><td>{escape(r.status)}</td><td>{escape(r.why)}</td></tr>\n'
        for r in found
    )
    return (
        f"<details>\n<summary>{len(found)} cases</summary>\n<table>\n"
        '<thead><tr><th scope="col">case</th><th scope="col">status</th>'
        '<th scope="col">why</th></tr></thead>\n'
        f"<tbody>\n{rows}</tbody>\n</table>\n</details>\n"
    )
