"""The tests that the documents name are there: a map that points nowhere is worse than none."""

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/families.md").read_text(encoding="utf-8")
NODE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)(\[[^\]`]+\])?`")
SHORT = re.compile(r"`([a-z][\w-]*)(\[[^\]`]+\])?`")
COLUMNS = ("logits", "workspace", "AWQ", "tp", "re-shard", "chat", "tokenizer")
FAMILIES = (
    *("Llama 1, 2", "Llama 3, 3.1", "Code Llama", "InternLM", "InternLM2, 2.5", "InternLM3", "Qwen", "Qwen2, 2.5"),
    *("Qwen3", "Mistral", "Baichuan", "Baichuan2", "Yi", "Meta's `.pth`"),
)


def rows(text: str, columns: int) -> list[list[str]]:
    """The tables' rows of that many columns, without heads and rules."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in cells if len(row) == columns and not set(row[0]) <= {"-"}][1:]


NAMES = {row[0].strip("`"): NODE.fullmatch(row[1]).groups() for row in rows(TEXT, 3)}


@pytest.fixture
def tests_in(request):
    """The node names, with parameters, that a file of tests has."""

    @cache
    def names(file: str) -> set[str]:
        module = pytest.Module.from_parent(request.session, path=ROOT / file)
        return {item.name for item in module.collect()}

    return names


def exists(tests: set[str], name: str, parameters: str | None) -> bool:
    """Whether there is that very test, or, without parameters, the test with any."""
    return f"{name}{parameters}" in tests if parameters else any(one.partition("[")[0] == name for one in tests)


def test_every_cell_names_tests_that_are_there_or_says_why_there_is_none(tests_in):
    table = rows(TEXT, 8)
    assert tuple(row[0] for row in table) == FAMILIES
    for row in table:
        for column, cell in zip(COLUMNS, row[1:], strict=True):
            where = f"{row[0]}, {column}: {cell}"
            named = SHORT.findall(cell)
            assert named or "none" in cell or "no one" in cell or "at hand" in cell, where
            for short, parameters in named:
                file, name, _ = NAMES[short]
                assert exists(tests_in(file), name, parameters), f"{where}: there is no {file}::{name}{parameters}"


@pytest.mark.parametrize("document", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_every_test_that_a_document_names_is_there(tests_in, document):
    for file, name, parameters in NODE.findall((ROOT / "docs" / document).read_text(encoding="utf-8")):
        assert exists(tests_in(file), name, parameters), f"{document} names {file}::{name}{parameters}"


def test_a_name_that_is_not_there_is_seen(tests_in):
    found = tests_in("tests/docs/test_families.py")
    assert exists(found, "test_a_name_that_is_not_there_is_seen", None)
    assert exists(found, "test_every_test_that_a_document_names_is_there", "[families.md]")
    assert not exists(found, "test_a_name", None)
    assert not exists(found, "test_every_test_that_a_document_names_is_there", "[other.md]")
