"""JSON Schema, as much of it as our schemas use, so that reading a case needs no other package.  SPEC CASE-2.

Known keywords: type, enum, const, pattern, minimum, maximum, minLength, maxLength, minItems, maxItems, items,
properties, required, additionalProperties, propertyNames, $ref to #/$defs/.  Any other keyword is refused
when the schema is read, so that nobody adds one that is silently not checked.
"""

import json
import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
}
_KEYWORDS = frozenset(
    [
        "$schema",
        "$id",
        "$defs",
        "$ref",
        "title",
        "description",
        "type",
        "enum",
        "const",
        "pattern",
        "minimum",
        "maximum",
        "minLength",
        "maxLength",
        "minItems",
        "maxItems",
        "items",
        "properties",
        "required",
        "additionalProperties",
        "propertyNames",
    ]
)


@cache
def shipped(name: str) -> dict[str, Any]:
    """A schema of this package, e.g. `schema.json`."""
    schema: dict[str, Any] = json.loads(files("refimpl.cases").joinpath(name).read_text("utf-8"))
    for part in _parts(schema):
        assert not part.keys() - _KEYWORDS, f"{name}: unknown keywords {part.keys() - _KEYWORDS}"
    return schema


def first_fault(value: Any, schema: dict[str, Any]) -> str | None:
    """Where and how `value` breaks the schema, as words; None when it holds."""
    return next(_faults(value, schema, schema, ""), None)


def _parts(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema
    for key in ("items", "additionalProperties", "propertyNames"):
        if isinstance(schema.get(key), dict):
            yield from _parts(schema[key])
    for key in ("properties", "$defs"):
        for part in schema.get(key, {}).values():
            yield from _parts(part)


def _faults(value: Any, schema: dict[str, Any], root: dict[str, Any], where: str) -> Iterator[str]:
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/$defs/")
        yield from _faults(value, root["$defs"][name], root, where)
    shown, at = json.dumps(value)[:60], where or "the top"
    if "type" in schema:
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        fits = any(
            isinstance(value, _TYPES[n]) and (n == "boolean" or not isinstance(value, bool)) for n in names
        )
        if not fits:
            yield f"{at} is {shown}; {' or '.join(names)} is required"
            return
    if "const" in schema and value != schema["const"]:
        yield f"{at} is {shown}; {json.dumps(schema['const'])} is required"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at} is {shown}; one of {', '.join(map(str, schema['enum']))} is required"
    if isinstance(value, str):
        yield from _text(value, schema, at, shown)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value < schema.get("minimum", value):
            yield f"{at} is {shown}; at least {schema['minimum']} is required"
        if value > schema.get("maximum", value):
            yield f"{at} is {shown}; at most {schema['maximum']} is required"
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            low, high = schema.get("minItems", 0), schema.get("maxItems", "any")
            yield f"{at} has {len(value)} items; {low} to {high} are required"
        if "items" in schema:
            for i, item in enumerate(value):
                yield from _faults(item, schema["items"], root, f"{where}[{i}]")
    if isinstance(value, dict):
        yield from _object(value, schema, root, where)


def _text(value: str, schema: dict[str, Any], at: str, shown: str) -> Iterator[str]:
    if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        yield f"{at} has {len(value)} characters; at most {schema.get('maxLength', 'any')} are allowed"
    elif "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{at} is {shown}; text of the form {schema['pattern']} is required"


def _object(value: dict[str, Any], schema: dict[str, Any], root: dict[str, Any], where: str) -> Iterator[str]:
    for key in schema.get("required", ()):
        if key not in value:
            yield f"{where or 'the top'} has no {key}; it is required"
    known = schema.get("properties", {})
    rest = schema.get("additionalProperties", True)
    for key, item in value.items():
        inner = f"{where}.{key[:60]}" if where else key[:60]
        if "propertyNames" in schema:
            yield from _faults(key, schema["propertyNames"], root, f"the name {inner}")
        if key in known:
            yield from _faults(item, known[key], root, inner)
        elif rest is False:
            yield f"{inner} is not known; it must not be there"
        elif isinstance(rest, dict):
            yield from _faults(item, rest, root, inner)
