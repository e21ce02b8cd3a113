"""The small validator agrees with the jsonschema package on our schema."""

import copy
import json

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.cases import schema
from refimpl.cases.build import build
from refimpl.cases.suites import definition

SHIPPED = schema.shipped("schema.json")


@pytest.fixture(scope="module")
def case():
    return json.loads(build(definition("gate/single")).case.to_json())


def _places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*path, key))


def test_the_schema_is_a_valid_schema():
    jsonschema.Draft202012Validator.check_schema(SHIPPED)


def test_a_built_case_validates(case):
    jsonschema.validate(case, SHIPPED, jsonschema.Draft202012Validator)
    assert schema.first_fault(case, SHIPPED) is None


JUNK = st.sampled_from([None, True, -1, 1.5, "", "x" * 500, "../../etc/passwd", [], {}, [None], {"x": 1}])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_both_validators_agree_on_damaged_cases(case, data):
    damaged = copy.deepcopy(case)
    places = [p for p in _places(damaged) if p]
    for _ in range(data.draw(st.integers(1, 2))):
        *path, last = data.draw(st.sampled_from(places))
        inner = damaged
        try:
            for key in path:
                inner = inner[key]
            if data.draw(st.booleans()) and isinstance(inner, dict):
                inner.pop(last, None)
            else:
                inner[last] = data.draw(JUNK)
        except (KeyError, IndexError, TypeError, AttributeError):
            continue  # the first damage removed the place of the second
    valid = jsonschema.Draft202012Validator(SHIPPED).is_valid(damaged)
    assert (schema.first_fault(damaged, SHIPPED) is None) == valid


def test_a_fault_says_where_what_and_what_is_required(case):
    damaged = copy.deepcopy(case)
    damaged["tensors"][0]["sha256"] = "abc"
    fault = schema.first_fault(damaged, SHIPPED)
    assert fault == 'tensors[0].sha256 is "abc"; text of the form ^[0-9a-f]{64}$ is required'
