"""The forms of a report: a table, JSON, JUnit and a page, also of a port that prints what XML forbids."""

import json
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from refimpl.checkpoint import safetensors
from refimpl.validate import details, junit, page, summary
from refimpl.validate.portfile import PortFile
from refimpl.validate.results import FAILED, HELD, NOT_FOR_ME, NOT_HELD, CaseResult, Validation
from refimpl.validate.running import Ran
from refimpl.validate.settling import Inconsistent, Seen
from refimpl.validate.verdict import check

GOLDEN = Path(__file__).parent.parent.parent / "golden"


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "out.safetensors"
    safetensors.write(out, {"model.layers.3.self_attn.kv_a_layernorm": np.full((16, 512), np.inf)})
    off = check(GOLDEN / "norm/epsilon", out)
    ran = Ran("failed", "exit status 1", 1.25, "a\x00b <b>&amp;</b>", "\x1b[31mred\ud800")
    return Validation(
        "./port --fast <&>",
        PortFile(),
        None,
        (
            CaseResult(
                "norm/a", "A", "forward", "norm", HELD, "", "fp32", None, {"fp32": True, "bf16": True}
            ),
            CaseResult(
                "norm/b", "B", "forward", "norm", NOT_HELD, "off <&>", "fp32", off, {"fp32": False}, ran=ran
            ),
            CaseResult("gate/c", "C", "forward", "gate", FAILED, "exit status 1: \x00", ran=ran),
            CaseResult("gate/d", "D", "vjp", "gate", NOT_FOR_ME, ""),
        ),
        (Seen("yarn_applies", "never", False, ("gate/c",)),),
        (Inconsistent("yarn_applies", "gate/c", "never", "norm/a", "config"),),
    )


def test_the_table_has_a_line_for_each_case_that_was_tried_and_says_what_it_comes_to(validation):
    text = summary.text(validation)
    assert [line.split()[:2] for line in text.splitlines()[2:5]] == [
        ["norm/a", "holds"],
        ["norm/b", "OFF"],
        ["gate/c", "FAILED"],
    ]
    assert "1 cases not for me: gate 1." in text
    assert "infinite" in text
    assert text.endswith("1 of 3 cases hold, 1 off, 1 failed. It does not hold.")


def test_a_validation_in_which_nothing_was_tried_does_not_hold():
    found = Validation("port", PortFile(), None, (CaseResult("gate/d", status=NOT_FOR_ME),))
    assert not found.holds
    assert "Nothing was tried" in summary.text(found)


def test_a_weaker_precision_under_which_all_would_hold_is_named():
    def case(id, fp32):
        claims = {"fp32": fp32, "bf16": True}
        return CaseResult(id, status=HELD if fp32 else NOT_HELD, claim="fp32", claims=claims)

    found = Validation("port", PortFile(), None, (case("norm/a", True), case("norm/b", False)))
    assert found.tightest == "bf16"
    text = summary.text(found)
    assert "by precision: fp32 1 of 2, bf16 2 of 2." in text
    assert text.endswith("All would hold as bf16: if that is the port's precision, say so with --as.")


def test_json_has_everything_and_is_json(validation):
    value = json.loads(details.text(validation))
    assert value["holds"] is False
    assert value["counts"] == {
        "holds": 1,
        "off": 1,
        "failed": 1,
        "not for me": 1,
        "not offered": 0,
        "left out": 0,
    }
    assert value["cases"][1]["worst"] == "inf"
    assert value["cases"][1]["verdict"]["first_off"] == "model.layers.3.self_attn.kv_a_layernorm"
    assert value["cases"][2]["ran"]["stdout"] == "a\x00b <b>&amp;</b>"


def test_junit_counts_what_it_lists_and_is_xml(validation):
    root = ElementTree.fromstring(junit.text(validation).encode())
    suites = {suite.get("name"): suite for suite in root}
    assert list(suites) == ["norm", "gate", "choices"]
    for element in (root, *root):
        cases = element.findall(".//testcase")
        counts = [len(element.findall(f".//{tag}")) for tag in ("failure", "error", "skipped")]
        assert [int(element.get(name)) for name in ("failures", "errors", "skipped")] == counts
        assert int(element.get("tests")) == len(cases)
    assert suites["norm"][1].find("failure").get("message") == "off <&>"
    assert suites["gate"][0].find("system-out").text == "a\ufffdb <b>&amp;</b>"
    assert "yarn_applies is never in gate/c" in suites["choices"][0].find("failure").text


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_needs_nothing_else_and_escapes_what_ports_print(validation):
    text = page.text(validation)
    tags = _Tags()
    tags.feed(text)
    assert tags.open == []
    names = [tag for tag, _ in tags.seen]
    assert not {"script", "link", "img", "iframe"} & set(names)
    assert names.count("h1") == names.count("main") == 1
    assert tags.seen[0] == ("html", {"lang": "en"})
    assert all(a.get("scope") in ("row", "col") for tag, a in tags.seen if tag == "th")
    assert "<b>&amp;</b>" not in text
    assert "&lt;b&gt;&amp;amp;&lt;/b&gt;" in text
