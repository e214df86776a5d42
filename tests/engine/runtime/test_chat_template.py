"""Chat templates are code of strangers: whatever they do, rendering ends in time, in a text or an error."""

import re
import threading
from pathlib import Path

import psutil
import pytest
from hypothesis import strategies as st

from engine.runtime.chat_template import ChatTemplate, read_chat_template
from tests.confined import Confined, DamagedFolder
from tests.damage import Damage, damaged_bytes, hold
from tests.tiny_artifact import TEMPLATE, write_tokenizer

MESSAGES = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
ENDED = r"^the model's chat template was ended: it may take 2 s of computing and 512 MiB"
DOUBLED = "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
SHARED = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}"
# These take all of their time, which is 2 seconds and more.
SLOW = ("nested loops", "a list of lists", "lorem ipsum")
BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ (messages | length + 1) ** (10 ** 9) }}",
    "a long repetition": "{{ messages[0].content * 10 ** 10 }}",
    "a long constant": "{{ 'x' * 10 ** 10 }}",
    "a wide format": "{{ '%9999999999d' % 1 }}",
    "a wide text": "{{ messages[0].content.ljust(10 ** 10) }}",
    "a range": "{{ range(10 ** 10) | list }}",
    "doubled text": DOUBLED,
    "a list of lists": SHARED,
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "lorem ipsum": "{{ lipsum(n=10 ** 9) }}",
    "a wide indentation": "{{ messages | tojson(indent=10 ** 10) }}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a long text": "{{ 'x' * 2 ** 21 }}",
}


def template(text: str) -> ChatTemplate:
    return ChatTemplate(text, source="test", special_tokens={"bos_token": "<s>"})


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.soak if name in SLOW else ()) for name in BOMBS])
def test_a_bomb_ends_in_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"{ENDED}|not valid|does not accept these messages"):
        template(BOMBS[name]).render(MESSAGES, add_generation_prompt=True)


def test_the_next_messages_are_rendered_after_a_bomb() -> None:
    ours = template("{% if messages | length > 1 %}{{ 'x' * messages[0].n }}{% endif %}{{ bos_token }}")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"MemoryError|ended"):
            ours.render([{"n": 10**11}] * 2, add_generation_prompt=True)
        assert ours.render([], add_generation_prompt=True) == "<s>"


def test_its_process_is_started_again_and_ends_with_the_template() -> None:
    others = sandboxes()  # of templates that tests before this one left to the garbage collector
    ours = template("{{ messages[0].content }}")
    [child] = sandboxes() - others
    child.kill()
    child.wait(5)
    assert ours.render(MESSAGES, add_generation_prompt=True) == "the cat"
    [child] = sandboxes() - others
    del ours
    child.wait(5)


def sandboxes() -> set[psutil.Process]:
    return {one for one in psutil.Process().children() if "engine.runtime.template_sandbox" in one.cmdline()}


def test_threads_take_turns() -> None:
    ours, texts = template("{{ messages[0].content }}"), [f"{i}" * 5000 for i in range(6)]
    found: dict[int, str] = {}

    def render(i: int) -> None:
        for _ in range(5):
            found[i] = ours.render([{"content": texts[i]}], add_generation_prompt=True)

    threads = [threading.Thread(target=render, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(texts))] == texts


def test_what_templates_of_models_use() -> None:
    text = (
        "{%- for m in messages if m.role == 'user' %}{{ m.content | trim | upper }}{% if loop.last %}!{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% break %}{% endfor %}{{ strftime_now('%Y') | length }}"
        "{{ tools is none }}{{ add_generation_prompt }}"
    )
    assert template(text).render([{"role": "user", "content": " ü "}], add_generation_prompt=False) == (
        'Ü!{"role": "user", "content": " ü "}4TrueFalse'
    )


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (5, "is a int, not a string"),
        ({"default": "x"}, "is a dict, not a string"),
        ([], r"names the chat templates \[\], no 'default'"),
        ([None, {"name": "default"}, {"name": ["x"], "template": "y"}], r"names the chat templates \[\]"),
    ],
)
def test_an_entry_of_another_form_is_refused(tmp_path: Path, entry: object, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}.*{words}"):
        read_chat_template(tmp_path, {"chat_template": entry})


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ \xff }}")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8 text"):
        read_chat_template(tmp_path, {})


PIECES = [
    *(
        "messages",
        "messages[0].content",
        "messages[-1]",
        "bos_token",
        "range(9999)",
        "loop.index",
        "'x'",
        "[1, 2]",
        "{}",
    ),
    *("3", "-1", "10 ** 6", "2 ** 40", "none", "namespace(a=1)", "cycler(1, 2)", "dict(a=1)", "self", "undefined.x"),
]
FILTERS = [
    *(
        "list",
        "length",
        "tojson",
        "string",
        "join(',')",
        "upper",
        "batch(3)",
        "slice(2)",
        "sum",
        "first",
        "last",
        "sort",
    ),
    *(
        "replace('x', 'xxxx')",
        "center(10000)",
        "indent(100)",
        "map('string')",
        "select",
        "groupby('role')",
        "int",
        "safe",
    ),
    *(
        "dictsort",
        "unique",
        "reverse",
        "items",
        "pprint",
        "format(1)",
        "round(2)",
        "attr('__class__')",
        "random",
        "urlize",
    ),
]
OPERATORS = ["+", "-", "*", "~", "%", "//", "**", "==", "in", "and", "<"]


@st.composite
def expression(draw: st.DrawFn) -> str:
    text = draw(st.sampled_from(PIECES))
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.booleans()):
            text = f"({text} {draw(st.sampled_from(OPERATORS))} {draw(st.sampled_from(PIECES))})"
        else:
            text = f"{text} | {draw(st.sampled_from(FILTERS))}"
    return text


@st.composite
def statement(draw: st.DrawFn, depth: int = 0) -> str:
    inner = "" if depth > 2 else "".join(draw(st.lists(statement(depth + 1), max_size=2)))
    value = draw(expression())
    return draw(
        st.sampled_from(
            [
                "{{ " + value + " }}",
                "{% set x = " + value + " %}" + inner,
                "{% for m in " + value + " %}" + inner + "{% endfor %}",
                "{% if " + value + " %}" + inner + "{% else %}y{% endif %}",
                "{% macro f(a) %}" + inner + "{% endmacro %}{{ f(" + value + ") }}",
                "{% filter upper %}" + inner + "{% endfilter %}",
                "{% set x %}" + inner + "{% endset %}{{ x ~ x }}",
            ]
        )
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, chat_template=None)
    return path


def look(folder: Path, *, count: int, random: bool) -> dict[str, int]:
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"chat_template.jinja": TEMPLATE.encode()}
    texts = st.lists(statement(), min_size=1, max_size=3).map("".join).map(str.encode)
    damage: Damage = st.one_of(texts, texts, damaged_bytes(TEMPLATE.encode())).map(
        lambda text: {"chat_template.jinja": text}
    )
    confined = Confined()
    try:
        damaged = DamagedFolder(confined, "tests.engine.runtime.doors:chat", files)
        return hold(damaged, damage, count=count, random=random)
    finally:
        confined.close()
        damaged.close()


def test_any_template_ends_in_a_text_or_an_error(folder: Path) -> None:
    assert look(folder, count=20, random=False)["refused"] > 4


@pytest.mark.soak
@pytest.mark.timeout(1800)  # a process a case
def test_any_template_soak(folder: Path, soak_row: dict[str, int]) -> None:
    soak_row["failures"] = 1
    outcomes = look(folder, count=2000, random=True)
    soak_row |= {"count": sum(outcomes.values()), "failures": 0}
