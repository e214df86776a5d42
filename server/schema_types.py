"""Types of JSON values, and whether two schemas can hold for the same value."""

from __future__ import annotations

from typing import Any


def type_of(value: Any) -> str:
    """The narrowest type of a JSON value."""
    match value:
        case bool():
            return "boolean"
        case None:
            return "null"
        case int():
            return "integer"
        case float():
            return "integer" if value.is_integer() else "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def has_type(value: Any, types: list[str]) -> bool:
    """Whether a value has one of `types`, or whether none is asked for."""
    found = type_of(value)
    return not types or found in types or (found == "integer" and "number" in types)


def apart(nodes: list[dict[str, Any]]) -> bool:
    """Whether no value can hold for two of the schemas: by their types, or by a required property's constants."""
    return all(_two_apart(nodes[i], nodes[j]) for i in range(len(nodes)) for j in range(i))


def _two_apart(one: dict[str, Any], other: dict[str, Any]) -> bool:
    kinds = [_kinds(node) for node in (one, other)]
    if all(kinds) and not set(kinds[0]) & set(kinds[1]):
        return True
    if "enum" in one and "enum" in other:
        return not any(left == right for left in one["enum"] for right in other["enum"])
    return any(
        _two_apart(one["properties"][name], other["properties"][name])
        for name in set(one.get("required", ())) & set(other.get("required", ()))
        if name in one.get("properties", {}) and name in other.get("properties", {})
    )


def _kinds(node: dict[str, Any]) -> list[str]:
    """The types of a rewritten schema; empty where they are open. integer is one of number's."""
    if "enum" in node:
        found = [type_of(value) for value in node["enum"]]
    else:
        found = [node["type"]] if "type" in node else []
    return ["number" if name == "integer" else name for name in found]
