"""JSON schemas as the grammar compiler can follow them to the letter.

xgrammar passes over what it does not know, and some keywords beside others. Here a schema is rewritten into one whose
every answer validates under the original (it may be stricter); what cannot be is refused by its place and keyword.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from server.schema_formats import FORMATS
from server.schema_types import apart, has_type
from server.shapes import RefusedField

LARGEST = 64 << 10
DEEPEST = 32
MOST_NODES = 2000
LARGEST_COUNT = 4096

ANNOTATIONS = frozenset(
    ("$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly")
) | {"discriminator"}
DEFINITIONS = ("$defs", "definitions")
# The keywords of each type that may stand together.
KEYWORDS: Mapping[str, frozenset[str]] = {
    "string": frozenset(("minLength", "maxLength", "pattern", "format")),
    "integer": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    "number": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    "array": frozenset(("items", "prefixItems", "minItems", "maxItems")),
    "object": frozenset(("properties", "required", "additionalProperties", "patternProperties", "propertyNames"))
    | {"minProperties", "maxProperties"},
    "boolean": frozenset(),
    "null": frozenset(),
}
# Lookaround, backreferences, word borders, properties of characters: read past or misread by the compiler.
UNREAD = re.compile(r"\(\?(?!:)|\\[1-9bBkpPAZzG]|[*+?}][+?]")
# A character of a string that JSON writes as it is.
PLAIN = r'[^\x00-\x1f"\\]'


def followable(schema: Any, *, param: str) -> str:
    """The schema to compile, as JSON. RefusedField, naming `param`, for one that cannot be followed exactly."""
    return json.dumps(_Rewriter(param).whole(schema))


class _Rewriter:
    def __init__(self, param: str) -> None:
        self._param = param
        self._nodes = 0
        self._root: Any = None

    def whole(self, schema: Any) -> Any:
        try:
            size = len(json.dumps(schema))
        except RecursionError:
            size = LARGEST + 1
        if size > LARGEST:
            raise self._refused("#", f"is larger than {LARGEST} bytes")
        self._root = schema
        return self._node(schema, "#", 0)

    def _refused(self, place: str, why: str) -> RefusedField:
        return RefusedField(f"The schema at {place} {why}.", param=self._param, code="invalid_json_schema")

    def _node(self, schema: Any, place: str, depth: int) -> Any:
        self._nodes += 1
        if depth > DEEPEST or self._nodes > MOST_NODES:
            raise self._refused(place, f"is too large: {DEEPEST} levels and {MOST_NODES} schemas are taken")
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            raise self._refused(place, "must be an object or true")
        said = {key: value for key, value in schema.items() if key not in ANNOTATIONS}
        defined = {key: said.pop(key) for key in DEFINITIONS if key in said}
        kept: dict[str, Any] = {key: self._map(value, f"{place}/{key}", depth) for key, value in defined.items()}
        for keyword in ("$ref", "enum", "const", "anyOf", "oneOf", "allOf"):
            if keyword in said:
                return kept | self._alone(keyword, said, place, depth)
        return kept | self._typed(said, place, depth)

    def _alone(self, keyword: str, said: dict[str, Any], place: str, depth: int) -> dict[str, Any]:
        """Keywords beside which the compiler reads no other."""
        value, rest = said[keyword], set(said) - {keyword}
        if keyword in ("enum", "const"):
            rest -= {"type"}
        if rest:
            raise self._refused(place, f"has {sorted(rest)[0]!r} beside {keyword!r}, which cannot be followed together")
        if keyword == "$ref":
            if not isinstance(value, str) or not value.startswith("#"):
                raise self._refused(place, "refers outside of itself: '$ref' must begin with '#'")
            return {"$ref": value}
        if keyword in ("enum", "const"):
            values = value if keyword == "enum" else [value]
            if not isinstance(values, list):
                raise self._refused(place, "has an 'enum' that is no list")
            fitting = [each for each in values if has_type(each, self._types(said, place))]
            if not fitting:
                raise self._refused(place, f"has no value of its type in {keyword!r}")
            return {"enum": fitting}
        if not isinstance(value, list) or not value:
            raise self._refused(place, f"has an empty {keyword!r}")
        nodes = [self._node(each, f"{place}/{keyword}/{index}", depth + 1) for index, each in enumerate(value)]
        if keyword == "allOf" and len(nodes) > 1:
            raise self._refused(place, "has 'allOf' of more than one schema, which cannot be followed")
        if keyword == "oneOf" and not apart([self._node(self._meant(each), place, depth + 1) for each in value]):
            raise self._refused(
                place, "has a 'oneOf' whose schemas may hold together: give each its own type, or a constant of its own"
            )
        return nodes[0] if keyword == "allOf" else {"anyOf": nodes}

    def _meant(self, schema: Any) -> Any:
        """What a schema that only refers to a definition refers to."""
        match schema:
            case {"$ref": str(reference)} if reference.count("/") == 2:
                _, section, name = reference.split("/")
                found = self._root.get(section) if section in DEFINITIONS else None
                return found.get(name, schema) if isinstance(found, dict) else schema
        return schema

    def _typed(self, said: dict[str, Any], place: str, depth: int) -> dict[str, Any]:
        types = self._types(said, place)
        constraints = set(said) - {"type"}
        if not types and constraints:
            types = [name for name, keywords in KEYWORDS.items() if constraints <= keywords]
            if types == ["integer", "number"]:
                types = ["number"]
        for key in sorted(constraints):
            if not any(key in KEYWORDS[name] for name in types or KEYWORDS):
                raise self._refused(place, f"has {key!r}, which cannot be followed here")
        if not types:
            if constraints:
                raise self._refused(place, "has no 'type', and keywords of several")
            return {}
        nodes = [
            getattr(self, f"_{name}", self._plain)(
                name, {key: said[key] for key in constraints & KEYWORDS[name]}, place, depth
            )
            for name in types
        ]
        return nodes[0] if len(nodes) == 1 else {"anyOf": nodes}

    def _types(self, said: dict[str, Any], place: str) -> list[str]:
        found = said.get("type", [])
        names = [found] if isinstance(found, str) else found
        if not isinstance(names, list) or not all(isinstance(name, str) and name in KEYWORDS for name in names):
            raise self._refused(place, f"has a 'type' that is none of {', '.join(sorted(KEYWORDS))}")
        return list(dict.fromkeys(names))

    def _plain(self, name: str, said: dict[str, Any], place: str, depth: int) -> dict[str, Any]:
        return {"type": name}

    def _integer(self, name: str, said: dict[str, Any], place: str, depth: int) -> dict[str, Any]:
        for key, value in said.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e15:
                raise self._refused(place, f"has a {key!r} that is no number of at most 15 digits")
        return {"type": name, **said}

    _number = _integer

    def _string(self, name: str, said: dict[str, Any], place: str, depth: int) -> dict[str, Any]:
        kinds = [key for key in ("pattern", "format") if key in said]
        if kinds and len(said) > 1:
            raise self._refused(place, f"has {kinds[0]!r} beside another keyword, which cannot be followed together")
        if "format" in said:
            if not isinstance(said["format"], str) or said["format"] not in FORMATS:
                raise self._refused(place, f"has a 'format' that is none of {', '.join(sorted(FORMATS))}")
            return {"type": "string", "pattern": f"^{FORMATS[said['format']]}$"}
        if "pattern" in said:
            pattern = said["pattern"]
            if not isinstance(pattern, str) or UNREAD.search(pattern):
                raise self._refused(
                    place, "has a 'pattern' with lookaround, backreferences or classes beyond \\d \\w \\s"
                )
        if {"minLength", "maxLength"} & said.keys():
            least, most = self._range(said, "minLength", "maxLength", place)
            return {"type": "string", "pattern": f"^{PLAIN}{{{least},{'' if most is None else most}}}$"}
        return {"type": "string", **said}

    def _array(self, name: str, said: dict[str, Any], place: str, depth: int) -> dict[str, Any]:
        least, most = self._range(said, "minItems", "maxItems", place)
        made: dict[str, Any] = {"type": "array", "minItems": least}
        if most is not None:
            made["maxItems"] = most
        first = said.get("prefixItems")
        if first is not None:
            if not isinstance(first, list):
                raise self._refused(place, "has 'prefixItems' that are no list")
            made["prefixItems"] = [
                self._node(each, f"{place}/prefixItems/{index}", depth + 1) for index, each in enumerate(first)
            ]
        items = said.get("items", first is None)
        if items is False:
            made["items"] = False
            if first is None:
                made["maxItems"] = 0
        else:
            made["items"] = self._node(items, f"{place}/items", depth + 1)
        return made

    def _object(self, name: str, said: dict[str, Any], place: str, depth: int) -> dict[str, Any]:
        properties = self._map(said.get("properties", {}), f"{place}/properties", depth)
        required = said.get("required", [])
        if not isinstance(required, list) or not all(isinstance(each, str) for each in required):
            raise self._refused(place, "has a 'required' that is no list of names")
        named = "properties" in said or bool(required)
        open_ones = [key for key in ("patternProperties", "propertyNames") if key in said]
        counts = [key for key in ("minProperties", "maxProperties") if key in said]
        if open_ones and (named or len(open_ones) > 1 or said.get("additionalProperties", False) not in (True, False)):
            raise self._refused(
                place, f"has {open_ones[0]!r} beside other properties, which cannot be followed together"
            )
        if counts and not named:
            raise self._refused(place, f"has {counts[0]!r} without 'properties', which cannot be followed")
        least, most = self._range(said, "minProperties", "maxProperties", place)
        others = said.get("additionalProperties", True)
        if others is False and set(required) - properties.keys():
            raise self._refused(place, "requires a property that it does not allow")
        for each in required:
            if each not in properties:
                properties[each] = self._node(others, f"{place}/additionalProperties", depth + 1)
        made: dict[str, Any] = {"type": "object"}
        if named:
            # A key that a schema names could come again in another spelling ("\\u0061" is "a"), so others are left out.
            made |= {"properties": properties, "required": list(dict.fromkeys(required)), "additionalProperties": False}
            made |= {"minProperties": least} if least else {}
            made |= {} if most is None else {"maxProperties": most}
        elif "patternProperties" in said:
            patterns = said["patternProperties"]
            if not isinstance(patterns, dict) or len(patterns) != 1 or UNREAD.search(next(iter(patterns))):
                raise self._refused(place, "has 'patternProperties' with other than one plain pattern")
            made["patternProperties"] = self._map(patterns, f"{place}/patternProperties", depth)
            made["additionalProperties"] = False
        elif "propertyNames" in said:
            made["propertyNames"] = self._node(said["propertyNames"], f"{place}/propertyNames", depth + 1)
        elif others is False:
            made["additionalProperties"] = False
        else:
            made["additionalProperties"] = self._node(others, f"{place}/additionalProperties", depth + 1)
        return made

    def _map(self, schemas: Any, place: str, depth: int) -> dict[str, Any]:
        if not isinstance(schemas, dict):
            raise self._refused(place, "must be an object")
        return {key: self._node(value, f"{place}/{key[:64]}", depth + 1) for key, value in schemas.items()}

    def _range(self, said: dict[str, Any], low: str, high: str, place: str) -> tuple[int, int | None]:
        least, most = said.get(low, 0), said.get(high)
        for key, value in ((low, least), (high, most)):
            if value is not None and not (type(value) is int and 0 <= value <= LARGEST_COUNT):
                raise self._refused(place, f"has a {key!r} that is no whole number from 0 to {LARGEST_COUNT}")
        if most is not None and most < least:
            raise self._refused(place, f"has {low!r} above {high!r}")
        return least, most
