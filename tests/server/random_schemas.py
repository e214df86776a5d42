"""JSON schemas drawn from a seed, of what the server says that it follows to the letter."""

import random
from typing import Any

from server.schema_formats import FORMATS

PATTERNS = (
    "^[a-z]{2,4}$",
    "^(cat|dog)s?$",
    "[0-9]+-[A-F]",
    "^\\d{3}\\.\\d$",
    "^[^x]{1,3}$",
    "^\\w{1,5}$",
    "^(a|b){2,5}$",
)
NAMES = ("name", "age", "ca t", "k-1", "é", 'a"b', "x_y", "日本", "_", "long_property_name", "a", "b")


def random_schema(seed: int) -> dict[str, Any]:
    """Strings and lists are bounded where a random model would go on with them too long."""
    draw = random.Random(seed)
    if draw.random() < 0.15:
        return _with_definitions(draw)
    return _node(draw, depth=draw.choice([1, 2, 2, 3]))


def _with_definitions(draw: random.Random) -> dict[str, Any]:
    leaf = _node(draw, depth=1)
    recursive = {
        "type": "object",
        "properties": {"value": leaf, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
        "required": ["value", "next"],
    }
    kinds = [
        {
            "type": "object",
            "properties": {"kind": {"const": name}, "leaf": {"$ref": "#/$defs/leaf"}},
            "required": ["kind"],
        }
        for name in ("one", "two")
    ]
    defs = {"leaf": leaf, "node": recursive}
    if draw.random() < 0.5:
        return {"$ref": "#/$defs/node", "$defs": defs}
    return {"oneOf": kinds, "$defs": defs}


def _node(draw: random.Random, depth: int) -> dict[str, Any]:
    makers = [_string, _number, _constant, _plain]
    if depth > 0:
        makers += [_object, _object, _object, _array, _array, _choice]
    node = draw.choice(makers)(draw, depth)
    if draw.random() < 0.2:
        node["description"] = "something"
    return node


def _string(draw: random.Random, depth: int) -> dict[str, Any]:
    match draw.randrange(4):
        case 0:
            return {"type": "string", "pattern": draw.choice(PATTERNS)}
        case 1:
            return {"type": "string", "format": draw.choice(sorted(FORMATS))}
        case _:
            least = draw.randrange(4)
            return {"type": "string", "minLength": least, "maxLength": least + draw.randrange(12)}


def _number(draw: random.Random, depth: int) -> dict[str, Any]:
    kind = draw.choice(["integer", "number"])
    low = draw.randrange(-1000, 1000) if kind == "integer" else round(draw.uniform(-50, 50), 2)
    high = low + draw.choice([0, 1, 7, 100, 12345])
    node: dict[str, Any] = {"type": kind, "minimum": low, "maximum": high}
    if draw.random() < 0.3:
        node = {"type": kind, "exclusiveMinimum": low, "exclusiveMaximum": low + draw.choice([2, 10, 1000])}
    return node


def _constant(draw: random.Random, depth: int) -> dict[str, Any]:
    values = ["red", 'gre"en', 3, -1.5, None, True, {"a": [1]}, "é", [], 10**12]
    if draw.random() < 0.3:
        return {"const": draw.choice(values)}
    return {"enum": draw.sample(values, draw.randrange(1, 5))}


def _plain(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"type": draw.choice(["boolean", "null", ["boolean", "null"]])}


def _object(draw: random.Random, depth: int) -> dict[str, Any]:
    names = draw.sample(NAMES, draw.randrange(1, 5))
    node: dict[str, Any] = {"type": "object", "properties": {name: _node(draw, depth - 1) for name in names}}
    node["required"] = draw.sample(names, draw.randrange(len(names) + 1))
    match draw.randrange(5):
        case 0:
            node["additionalProperties"] = False
        case 1:
            node["additionalProperties"] = _node(draw, 0)
        case 2:
            node["minProperties"] = draw.randrange(len(names) + 1)
        case 3:
            node["maxProperties"] = max(len(node["required"]), draw.randrange(1, len(names) + 1))
    return node


def _array(draw: random.Random, depth: int) -> dict[str, Any]:
    least = draw.randrange(3)
    node: dict[str, Any] = {"type": "array", "minItems": least, "maxItems": least + draw.randrange(4)}
    node["items"] = _node(draw, depth - 1)
    if draw.random() < 0.3:
        node["prefixItems"] = [_node(draw, 0) for _ in range(draw.randrange(1, 3))]
        node["maxItems"] = max(node["maxItems"], len(node["prefixItems"]))
    return node


def _choice(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_node(draw, depth - 1) for _ in range(draw.randrange(1, 4))]}
