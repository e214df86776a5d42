import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluation.texts import (
    Item,
    answer_items,
    document_items,
    is_right,
    items_digest,
    read_questions,
    window_items,
)


class Characters:
    """A token is a character; BOS is 1."""

    bos_token_id: int | None = 1

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        ids = [ord(letter) for letter in text]
        return [1, *ids] if add_special and self.bos_token_id is not None else ids

    def chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + (
            "<assistant>" if add_generation_prompt else ""
        )


class WithoutBos(Characters):
    bos_token_id = None


def test_documents_start_with_bos_and_are_cut() -> None:
    items = document_items(["\nabcdef ", "", "xy"], Characters(), length=4, max_tokens=100)
    assert items == [
        Item(token_ids=(1, 97, 98, 99), first_scored=1),
        Item(token_ids=(1, 120, 121), first_scored=1),
    ]
    assert [item.num_scored for item in items] == [3, 2]


def test_documents_stop_at_the_budget_and_without_bos_lose_their_first_token() -> None:
    items = document_items(["abc", "defg", "h"], WithoutBos(), length=10, max_tokens=6)
    assert items == [Item(token_ids=(97, 98, 99), first_scored=1)]
    with pytest.raises(ValueError, match="max_tokens=2"):
        document_items(["abc"], WithoutBos(), length=10, max_tokens=2)


def test_windows_are_cut_from_the_joined_text_without_overlap() -> None:
    items = window_items(["abc", "de"], Characters(), length=4, max_tokens=100)
    assert [item.token_ids for item in items] == [(1, 97, 98, 99), (10, 10, 100, 101)]
    assert len(window_items(["abc", "de"], Characters(), length=4, max_tokens=7)) == 1
    with pytest.raises(ValueError, match="no window of 9 tokens"):
        window_items(["abc", "de"], Characters(), length=9, max_tokens=100)


def test_questions_are_rendered_and_only_answers_are_scored(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "q"}], "answer": "yes!"}, {"prompt": "2+2=", "answer": "4"}]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    questions = read_questions(path, Characters())
    assert [question.prompt for question in questions] == ["<user>q<assistant>", "2+2="]
    assert questions[0].prompt_ids[0] == ord("<"), "a rendered prompt gets no second BOS"
    assert questions[1].prompt_ids[0] == 1
    items = answer_items(questions, Characters(), max_answer_tokens=3)
    assert items[0].token_ids[items[0].first_scored :] == tuple(map(ord, "yes"))
    assert items[1].token_ids[items[1].first_scored :] == (ord("4"),)


@pytest.mark.parametrize(
    "line",
    [
        '{"answer": "x"}',
        '{"prompt": "x"}',
        '{"prompt": "x", "answer": " "}',
        '{"prompt": "x", "answer": 4}',
        "no",
        "[]",
    ],
)
def test_a_bad_question_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "x", "answer": "y"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"questions\.jsonl, line 2 is not a question"):
        read_questions(path, Characters())


def test_an_empty_file_of_questions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no question"):
        read_questions(tmp_path / "questions.jsonl", Characters())


def test_right_answers() -> None:
    assert is_right(" Paris.\n", "paris")
    assert not is_right("Paris, France", "Paris")
    assert not is_right("", "Paris")


def test_digest_tells_any_change() -> None:
    one = Item(token_ids=(1, 2, 3), first_scored=1)
    assert items_digest([one], []) == items_digest([Item(token_ids=(1, 2, 3), first_scored=1)], [])
    others = [Item(token_ids=(1, 2, 4), first_scored=1), Item(token_ids=(1, 2, 3), first_scored=2)]
    assert len({items_digest([item], []) for item in [one, *others]}) == 3
