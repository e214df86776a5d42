import contextlib
import json

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.json_schema import (
    ANNOTATIONS,
    DEEPEST,
    DEFINITIONS,
    KEYWORDS,
    LARGEST,
    LARGEST_COUNT,
    followable,
)
from server.shapes import RefusedField


def rewritten(schema):
    return json.loads(followable(schema, param="x"))


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (True, {}),
        ({"title": "t", "description": "d", "default": 3}, {}),
        ({"type": "integer", "minimum": 3}, {"type": "integer", "minimum": 3}),
        ({"minimum": 3}, {"type": "number", "minimum": 3}),
        ({"type": ["integer", "null"]}, {"anyOf": [{"type": "integer"}, {"type": "null"}]}),
        ({"type": "string", "enum": ["a", 1]}, {"enum": ["a"]}),
        ({"const": None}, {"enum": [None]}),
        ({"allOf": [{"type": "null"}], "title": "t"}, {"type": "null"}),
        ({"type": "string", "maxLength": 3}, {"type": "string", "pattern": '^[^\\x00-\\x1f"\\\\]{0,3}$'}),
        ({"items": {"const": 1}}, {"type": "array", "minItems": 0, "items": {"enum": [1]}}),
        ({"type": "array", "items": False}, {"type": "array", "minItems": 0, "maxItems": 0, "items": False}),
        (
            {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a", "b"]},
            {
                "type": "object",
                "properties": {"a": {"type": "null"}, "b": {}},
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        ),
        (
            {"additionalProperties": {"type": "null"}},
            {"type": "object", "additionalProperties": {"type": "null"}},
        ),
    ],
)
def test_what_is_followed(schema, expected):
    assert rewritten(schema) == expected


@pytest.mark.parametrize(
    ("schema", "place", "words"),
    [
        (False, "#", "object or true"),
        ([], "#", "object or true"),
        ({"not": {}}, "#", "'not'"),
        ({"type": "array", "uniqueItems": True}, "#", "'uniqueItems'"),
        ({"type": "integer", "multipleOf": 3}, "#", "'multipleOf'"),
        ({"properties": {"a": {"if": {}}}}, "#/properties/a", "'if'"),
        ({"type": "string", "pattern": "(?=a)b"}, "#", "lookaround"),
        ({"type": "string", "pattern": "(a)\\1"}, "#", "backreferences"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "#", "'pattern' beside"),
        ({"type": "string", "format": "nonsense"}, "#", "'format'"),
        ({"$ref": "http://elsewhere/x"}, "#", "outside"),
        ({"$ref": "#/$defs/a", "minimum": 3}, "#", "'minimum' beside '\\$ref'"),
        ({"anyOf": [{}], "type": "string"}, "#", "'type' beside 'anyOf'"),
        ({"allOf": [{}, {}]}, "#", "'allOf' of more"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#", "'oneOf'"),
        ({"enum": [1], "type": "string"}, "#", "no value of its type"),
        ({"type": "text"}, "#", "'type' that is none of"),
        ({"minimum": 3, "maxLength": 3}, "#", "'maxLength'|keywords of several"),
        ({"type": "object", "properties": {}, "required": ["a"], "additionalProperties": False}, "#", "requires"),
        ({"patternProperties": {"a": {}}, "properties": {"b": {}}}, "#", "beside other properties"),
        ({"minProperties": 1}, "#", "without 'properties'"),
        ({"type": "array", "maxItems": LARGEST_COUNT + 1}, "#", "'maxItems'"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "#", "'minLength' above 'maxLength'"),
        ({"type": "integer", "minimum": "3"}, "#", "'minimum'"),
        ({"const": "a" * LARGEST}, "#", "larger than"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_its_place(schema, place, words):
    with pytest.raises(RefusedField, match=words) as caught:
        followable(schema, param="where.it.was")
    assert f"at {place} " in str(caught.value)
    assert caught.value.param == "where.it.was"


def test_a_deep_schema_is_refused():
    schema = {}
    for _ in range(DEEPEST + 1):
        schema = {"type": "array", "items": schema}
    with pytest.raises(RefusedField, match="too large"):
        followable(schema, param="x")
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises(RefusedField, match=r"too large|larger"):
        followable(schema, param="x")


@pytest.mark.parametrize(
    "schemas",
    [
        [{"type": "integer"}, {"type": "string"}, {"type": "null"}],
        [{"const": "a"}, {"enum": ["b", "c"]}],
        [
            {"properties": {"kind": {"const": "a"}, "x": {"type": "integer"}}, "required": ["kind"]},
            {"properties": {"kind": {"const": "b"}}, "required": ["kind"]},
        ],
    ],
)
def test_one_of_schemas_that_exclude_each_other_is_any_of_them(schemas):
    assert set(rewritten({"oneOf": schemas})) == {"anyOf"}


def test_one_of_definitions_that_exclude_each_other():
    """As pydantic writes a discriminated union."""
    cat = {"type": "object", "properties": {"kind": {"const": "cat", "type": "string"}}, "required": ["kind"]}
    dog = {"type": "object", "properties": {"kind": {"const": "dog", "type": "string"}}, "required": ["kind"]}
    schema = {
        "$defs": {"Cat": cat, "Dog": dog},
        "discriminator": {"mapping": {"cat": "#/$defs/Cat"}, "propertyName": "kind"},
        "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
    }
    assert rewritten(schema)["anyOf"] == [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]
    schema["$defs"]["Dog"] = cat
    with pytest.raises(RefusedField, match="oneOf"):
        rewritten(schema)


def test_what_is_rewritten_is_a_schema():
    schema = {"type": "object", "properties": {"a": {"type": ["string", "array"], "minLength": 2, "minItems": 1}}}
    jsonschema.Draft202012Validator.check_schema(rewritten(schema))


KEYS = st.sampled_from([*sorted(set().union(*KEYWORDS.values())), *ANNOTATIONS, *DEFINITIONS, "type", "enum", "const"])
MORE = st.sampled_from(["$ref", "anyOf", "oneOf", "allOf", "not", "a", "b"])
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from([*KEYWORDS, "#/$defs/a"]),
)
SCHEMAS = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | MORE, inner, max_size=4), max_leaves=20
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(SCHEMAS)
def test_whatever_it_is_given_it_follows_or_refuses(schema):
    with contextlib.suppress(RefusedField):
        followable(schema, param="x")
