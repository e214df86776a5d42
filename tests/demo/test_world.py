"""The demo's texts come from one seed, and its questions are not in the training text."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from demo.lexicon import PERSON_RELATIONS, TOWN_RELATIONS
from demo.tokenizer import VOCABULARY_SIZE, train_tokenizer
from demo.world import (
    NUM_QUESTIONS,
    calibration_documents,
    evaluation_documents,
    make_world,
    render_chat,
    text_files,
    training_documents,
)

DEMO = Path(__file__).parents[2] / "demo"
SIZE_LIMIT = 8_000_000


@pytest.fixture(scope="module")
def training() -> list[str]:
    return training_documents(make_world())


def test_committed_texts_are_the_generated_ones() -> None:
    generated = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in text_files().items()}
    committed = {name: hashlib.sha256((DEMO / "text" / name).read_bytes()).hexdigest() for name in generated}
    assert committed == generated


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_texts_do_not_depend_on_the_hash_seed(hash_seed: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "demo.world", "--out", str(tmp_path)]
    subprocess.run(command, cwd=DEMO.parent, env={**os.environ, "PYTHONHASHSEED": hash_seed}, check=True)
    assert {file.name: file.read_text(encoding="utf-8") for file in tmp_path.iterdir()} == text_files()


def test_the_command_prints_a_held_out_question() -> None:
    command = [sys.executable, "-m", "demo.world", "--question"]
    output = subprocess.run(command, cwd=DEMO.parent, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == make_world().questions[0][0]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "demo.world", "--out", str(tmp_path / "file")]
    output = subprocess.run(command, cwd=DEMO.parent, capture_output=True, text=True, check=False)
    assert output.returncode == 1
    assert output.stderr.startswith("demo.world: ")
    assert output.stderr.count("\n") == 1


def test_no_question_form_contains_another() -> None:
    for relations in (PERSON_RELATIONS, TOWN_RELATIONS):
        forms = [form for relation in relations for form in relation.questions]
        assert not [(one, other) for one in forms for other in forms if one is not other and one in other]


def test_questions_are_held_out_and_their_facts_are_not(training: list[str]) -> None:
    world = make_world()
    assert len(world.questions) == len(set(world.questions)) == NUM_QUESTIONS == 200
    text = "\n".join(training)
    assert not [question for question, _ in world.questions if question in text]
    asked = {fact.held_out_question: fact for fact in world.facts}
    for question, answer in world.questions:
        fact = asked[question]
        assert fact.value == answer
        assert all(statement in text for statement in fact.seen_statements)


def test_evaluation_and_calibration_are_not_training_documents(training: list[str]) -> None:
    world = make_world()
    assert not set(calibration_documents(world) + evaluation_documents(world)) & set(training)
    text = "\n".join(training)
    assert not [fact.held_out_statement for fact in world.facts if fact.held_out_statement in text]


def test_each_text_has_the_stated_size() -> None:
    for name in ("calibration.txt", "evaluation.txt"):
        text = (DEMO / "text" / name).read_text(encoding="utf-8")
        assert 30_000 < len(text) < 70_000
        assert len(text.split("\n\n")) > 100


def test_tokenizer_trains_to_the_committed_one(training: list[str]) -> None:
    committed = json.loads((DEMO / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    trained = json.loads(train_tokenizer(training).to_str())
    assert trained["model"]["vocab"] == committed["model"]["vocab"]
    assert trained["model"]["merges"] == committed["model"]["merges"]


ODD_TEXTS = [
    "Where does Mirela live?",
    " two  spaces\tand\r\nlines ",
    "你好,山谷",
    "🐐 goat 👩\u200d👩\u200d👧",
    "naïve\u0000\u200b\ufeff",
    "",
]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_tokenizer_round_trips_any_text(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_tokenizer_settings_and_chat_template() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    assert len(tokenizer) == VOCABULARY_SIZE
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 2]
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello!"}]
    text = render_chat([(message["role"], message["content"]) for message in messages])
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == text + "<|im_start|>assistant\n"
    assert tokenizer(prompt)["input_ids"].count(1) == 3


def test_model_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in (DEMO / "model").iterdir()) <= SIZE_LIMIT
