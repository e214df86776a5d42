import json
from pathlib import Path

import pytest
import torch

from engine.models.batch import packed
from engine.runtime.tokenizer import Tokenizer
from engine.storage.checkpoint import load_checkpoint
from pipelines.baseline import ask_checkpoint
from pipelines.evaluation.kept import read_baseline
from pipelines.evaluation.perplexity import perplexity
from pipelines.evaluation.texts import document_items
from tests.pipelines.chain import Chain, tiny_rows
from tests.pipelines.tiny_checkpoint import TEXT, write_tiny_checkpoint
from tests.shared_data import shared

QUESTIONS = [
    {"messages": [{"role": "user", "content": "the cat"}], "answer": "sat"},
    {"prompt": "the dog", "answer": "ran to the cat"},
]


def _chain(tmp_path: Path, *, questions: bool = True, **options) -> Chain:
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint")
    text, asked = tmp_path / "text.txt", tmp_path / "questions.jsonl"
    text.write_text(TEXT)
    asked.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    rows = tiny_rows(checkpoint, text, [("fp16", "kv16")], questions=asked if questions else None)
    for name, value in options.items():
        setattr(rows[0].config.evaluation, name, value)
    return Chain(tmp_path / "root", rows, project=tmp_path)


def test_baseline_keeps_what_the_checkpoint_says(tmp_path: Path) -> None:
    chain = _chain(tmp_path)
    kept = read_baseline(chain.baseline("tiny-e"))
    assert len(kept.items) == 20 + 2
    assert [item.num_scored for item in kept.items] == [23] * 20 + [len(kept.items[20].token_ids) - 2, 4]
    model = load_checkpoint(tmp_path / "checkpoint")
    at = 0
    for item in kept.items:
        with torch.inference_mode():
            logprobs = model(packed([item.token_ids]), None).double().log_softmax(1)
        rows = logprobs[item.first_scored - 1 : -1]
        targets = torch.tensor(item.token_ids[item.first_scored :])
        places = slice(at, at + item.num_scored)
        torch.testing.assert_close(
            kept.losses[places].double(), -rows.gather(1, targets[:, None])[:, 0], atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            kept.logprobs[places].double(), rows.gather(1, kept.ids[places].long()), atol=1e-4, rtol=0
        )
        at += item.num_scored
    assert kept.weight_bytes == (tmp_path / "checkpoint/model.safetensors").stat().st_size
    assert all(0 < len(answer.token_ids) <= 4 for answer in kept.answers)


def test_baseline_twice_is_the_same_bytes(tmp_path: Path) -> None:
    one, other = (_chain(tmp_path / name).baseline("tiny-e") for name in ("one", "other"))
    assert {path.name for path in one.iterdir()} == {"scores.safetensors", "questions.json"}
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_files_of_two_baselines_are_told_apart(tmp_path: Path) -> None:
    with_questions = _chain(tmp_path / "one").baseline("tiny-e")
    without = _chain(tmp_path / "other", questions=False).baseline("tiny-e")
    (with_questions / "questions.json").write_bytes((without / "questions.json").read_bytes())
    with pytest.raises(ValueError, match="two different baselines"):
        read_baseline(with_questions)


def test_what_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.sequence_length=65 is longer than the 64 positions"):
        _chain(tmp_path / "window", sequence_length=65).baseline("tiny-e")
    with pytest.raises(ValueError, match=r"evaluation\.answer_tokens=63"):
        _chain(tmp_path / "answer", answer_tokens=63).baseline("tiny-e")
    assert not (tmp_path / "window/root/build/baseline/tiny-e").exists()


def test_perplexity_of_stories15m_is_the_published_one() -> None:
    folder = shared("data/models/stories15M-llama")
    stories = shared("data/text/tinystories_train_head_2MiB.txt").read_text().split("<|endoftext|>")[:20]
    tokenizer = Tokenizer(folder)
    items = document_items(stories, tokenizer, length=256, max_tokens=10_000)
    kept = ask_checkpoint(folder, tokenizer, items, [], answer_tokens=1)
    assert len(kept.losses) == 3595
    found = perplexity(kept.losses, [item.num_scored for item in items])
    assert found.value == pytest.approx(2.50573, abs=0.0005)
