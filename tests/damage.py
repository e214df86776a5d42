"""Strategies that damage a valid file: its bytes, its JSON, its lines."""

import copy
import json
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.confined import DamagedFolder

ODD_BYTES = [b"\x00", b"\xff", b"\xff" * 8, b"\x00" * 8, b"\x80", b"\xed\xa0\x80", b"\n", b'"', b"{", b"[", b"}", b"e9"]
ODD_NUMBERS = [
    *(0, 1, 2, 3, -1, -2, 7, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**60, 2**63 - 1, 2**63),
    *(2**64 - 1, 2**64, -(2**63), 10**30, 10**400, 10**4000),
    *(0.5, -0.5, 1.0, 1e-320, 1e16, 1e308, -1e308, float("inf"), float("-inf"), float("nan")),
]
ODD_TEXTS = [
    *(
        "",
        " ",
        "0",
        "1",
        "-1",
        "x",
        "1e999",
        "true",
        "null",
        "None",
        "\x00",
        "\n",
        "\x1b[2J",
        "\ud800",
        "\U0001f600",
        "﷽",
    ),
    *("a\u0300" * 50, "x" * 3000, "/etc/passwd", "..", ".", "../model.safetensors", "a/b", "n" * 300, "(a+)+$", "("),
    *("[PAD]", "<s>", "\u2581", "float16", "llama3", "yarn", "dynamic", "Sequence", "ByteFallback", "{{", "{% for %}"),
]
# JSON text that no value of Python's encodes to; put in where the mark stands.
LONG = "\x02more digits than Python reads\x02"
DEEP = {
    f"\x02nested {kind} {depth}\x02": (kind, depth) for kind in ("list", "object") for depth in (60, 120, 900, 20000)
}

odd_values: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([None, True, False]),
    st.sampled_from(ODD_NUMBERS),
    st.sampled_from(ODD_TEXTS),
    st.sampled_from([[], {}, [[]], [None], {"": None}, {"type": None}, [[1, 2], "a"], [0] * 100, {"a": {"b": {}}}]),
    st.sampled_from([*DEEP, LONG]),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=6),
    st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=5), max_size=4),
)


def encode(value: Any) -> bytes:
    text = json.dumps(value)
    text = text.replace(json.dumps(LONG), "9" * 5000)
    for mark, (kind, depth) in DEEP.items():
        nested = "[" * depth + "]" * depth if kind == "list" else '{"a":' * depth + "0" + "}" * depth
        text = text.replace(json.dumps(mark), nested)
    return text.encode()


@st.composite
def _places(draw: st.DrawFn, value: dict[str, Any]) -> tuple[Any, ...]:
    """The path of a value within `value`, any depth as likely as the next, whatever is below."""
    path: list[Any] = []
    while (
        keys := list(value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0))
    ) and (not path or draw(st.integers(0, 3))):
        path.append(draw(st.sampled_from(keys)))
        value = value[path[-1]]
    return tuple(path)


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


@st.composite
def damaged_value(draw: st.DrawFn, valid: Any) -> Any:
    """A JSON value with one to three things changed: values, types, names, nesting, order."""
    holder = {"": copy.deepcopy(valid)}
    for _ in range(draw(st.integers(1, 3))):
        path = draw(_places(holder))
        inside, key = _at(holder, path[:-1]), path[-1]
        match draw(
            st.sampled_from(["replace", "replace", "replace", "copy", "remove", "rename", "wrap", "add", "number"])
        ):
            case "replace":
                inside[key] = copy.deepcopy(draw(odd_values))
            case "copy":
                inside[key] = copy.deepcopy(_at(holder, draw(_places(holder))))
            case "remove" if len(path) > 1:
                del inside[key]
            case "rename" if isinstance(inside, dict) and len(path) > 1:
                inside[draw(st.sampled_from(ODD_TEXTS) | st.text(max_size=5))] = inside.pop(key)
            case "wrap":
                inside[key] = draw(
                    st.sampled_from(
                        [lambda one: [one], lambda one: {"type": one}, lambda one: [one, copy.deepcopy(one)]]
                    )
                )(inside[key])
            case "add" if isinstance(inside[key], dict):
                inside[key][draw(st.sampled_from(ODD_TEXTS) | st.text(max_size=8))] = copy.deepcopy(draw(odd_values))
            case "add" if isinstance(inside[key], list):
                inside[key].insert(draw(st.integers(0, len(inside[key]))), copy.deepcopy(draw(odd_values)))
            case "number" if type(inside[key]) in (int, float):
                inside[key] = min(inside[key], 10**300) * draw(st.sampled_from([-1, 2, 0.5, 1000])) + draw(
                    st.sampled_from([-1, 0, 1])
                )
    return holder[""]


@st.composite
def damaged_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """Bytes with one to four things done to them: flipped, cut off, put in, taken out, doubled."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from([1, 1, 2, 4, 8, 64, 1000])))
        match draw(st.sampled_from(["flip", "flip", "set", "cut", "insert", "remove", "double", "zero"])):
            case "flip" if start < len(content):
                content[start] ^= 1 << draw(st.integers(0, 7))
            case "set" if start < len(content):
                content[start] = draw(st.integers(0, 255))
            case "cut":
                del content[start:]
            case "insert":
                content[start:start] = draw(st.sampled_from(ODD_BYTES) | st.binary(max_size=16))
            case "remove":
                del content[start:end]
            case "double":
                content[end:end] = content[start:end]
            case "zero":
                content[start:end] = bytes(end - start)
    return bytes(content)


def damaged_json(valid: Any) -> st.SearchStrategy[bytes]:
    """A JSON file, mostly still JSON."""
    as_bytes = encode(valid)
    as_value = damaged_value(valid).map(encode)
    return st.one_of(as_value, as_value, as_value, damaged_bytes(as_bytes))


Damage = st.SearchStrategy[dict[str, bytes | None]]


class Case(dict[str, bytes | None]):
    """Files that take the place of valid ones; a failing test prints their names and sizes."""

    def __repr__(self) -> str:
        return str({name: None if content is None else len(content) for name, content in self.items()})


def hold(folder: DamagedFolder, damage: Damage, *, count: int, random: bool) -> dict[str, int]:
    """Look at `count` damaged folders; how many were refused, and how many taken all the same.

    What is found is kept as a folder, not made smaller. Without `random` the cases are the same each time.
    """
    outcomes = {"refused": 0, "taken": 0}

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=not random,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(damage.map(Case))
    def look(damaged: Case) -> None:
        outcomes[folder.check(damaged)] += 1

    look()
    return outcomes
