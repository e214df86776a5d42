"""Training repeats to the byte, and the committed model knows its valley until it is rounded too far."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from demo.measure import accuracy, greedy_answers, load_model, perplexity, read_questions, round_to_nearest
from demo.tokenizer import train_tokenizer
from demo.train import MODEL_CONFIG, Schedule, batches, train, write_model
from demo.world import make_world, training_documents

DEMO = Path(__file__).parents[2] / "demo"
FEW_STEPS = Schedule(num_steps=6, tokens_per_step=256, short_row=64, long_row=128, warmup_steps=2)


@pytest.fixture(autouse=True)
def torch_settings() -> Any:
    """Give back the process-wide torch settings that training fixes."""
    num_threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(deterministic)


def test_few_steps_twice_give_equal_bytes(tmp_path: Path) -> None:
    documents = training_documents(make_world(), num_sweeps=3)
    digests = []
    for name in ("first", "second"):
        tokenizer = train_tokenizer(documents)
        write_model(train(tokenizer, documents, FEW_STEPS), tokenizer, tmp_path / name)
        files = sorted((tmp_path / name).iterdir())
        digests.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})
    assert digests[0] == digests[1]
    assert set(digests[0]) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_rows_start_at_documents_and_end_of_text_is_an_error() -> None:
    documents = training_documents(make_world(), num_sweeps=3)
    tokenizer = train_tokenizer(documents)
    first, weights = next(batches(tokenizer, documents, FEW_STEPS))
    assert first.shape == weights.shape == (4, 65)
    assert tokenizer.decode(first[0].tolist(), skip_special_tokens=False).startswith(documents[0][:40])
    assert first[1, 0] == 0
    with pytest.raises(ValueError, match="training text ends at step"):
        list(batches(tokenizer, documents[:20], FEW_STEPS))


def test_rounding_stays_within_half_a_step() -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    rounded = round_to_nearest(weight, bits=4)
    groups, close = weight.view(8, 2, 128), rounded.view(8, 2, 128)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    assert ((groups - close).abs().amax(-1) <= step * 1.01).all()
    assert all(len(group.unique()) <= 16 for row in close for group in row)


def test_committed_weights_are_fp16_and_named_as_the_config_says() -> None:
    config = json.loads((DEMO / "model" / "config.json").read_text(encoding="utf-8"))
    assert config == MODEL_CONFIG
    with safe_open(DEMO / "model" / "model.safetensors", framework="pt") as weights:
        assert weights.metadata() == {"format": "pt"}
        names = list(weights.keys())
        assert {weights.get_tensor(name).dtype for name in names} == {torch.float16}
        assert weights.get_slice("lm_head.weight").get_shape() == [config["vocab_size"], config["hidden_size"]]
        assert sum(name.endswith("k_proj.weight") for name in names) == config["num_hidden_layers"]


def test_answers_are_right_in_fp16_and_worse_at_three_bits() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    rows = read_questions(DEMO / "text" / "questions.jsonl")
    text = (DEMO / "text" / "evaluation.txt").read_text(encoding="utf-8")
    right, loss = {}, {}
    for bits in (16, 4, 3):
        model = load_model(DEMO / "model", bits=bits)
        right[bits] = accuracy(greedy_answers(model, tokenizer, rows), rows)
        loss[bits] = perplexity(model, tokenizer, text)
    assert right[16] >= 0.95
    assert right[3] < 0.85
    assert right[16] >= right[4] > right[3]
    assert loss[16] < loss[4] < loss[3]
