"""A rotary base that depends on how long a sequence may get: fixed at its start, the same however it is computed."""

import dataclasses

import pytest
import torch

from engine.config import EngineConfig, ModelConfig, RopeScaling, Sampling
from engine.models.batch import packed
from engine.models.rope_scaling import rope_base
from engine.runtime.engine import Engine
from engine.runtime.sequence import Sequence
from tests.engine.runtime.tiny_model import CONFIG, CharTokenizer, tiny_model, whole_logits

PROMPT = [11, 3, 45, 8, 8, 20, 61, 5, 17, 33, 2, 9]
KINDS = {
    "dynamic": RopeScaling(kind="dynamic", factor=4.0),
    "qwen": RopeScaling(kind="qwen"),
    "turbomind": RopeScaling(kind="turbomind", factor=2.0),
}


def config_of(kind: str) -> ModelConfig:
    return dataclasses.replace(CONFIG, rope_scaling=KINDS[kind], max_position_embeddings=16, logn=True)


def make(model, **options):
    settings = {"cache_max_entry_count": 64, "cache_block_seq_len": 4} | options
    return Engine(model, CharTokenizer(()), EngineConfig(**settings), session_len=64)


def greedy_with(model, prompt, count, base):
    """The answer of a model whose base is `base` whatever the length, token by token over whole sequences."""
    tokens = list(prompt)
    for _ in range(count):
        batch = dataclasses.replace(packed([tokens]), rope_bases=torch.tensor([base], dtype=torch.float64))
        tokens.append(int(model(batch, None)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"num_tokens_per_iter": 5}], ids=["whole", "chunked"])
def test_one_base_from_the_first_token_to_the_last(kind, options):
    model = tiny_model(config_of(kind))
    engine = make(model, **options)
    lengths = [2, 30]  # limits 14 and 42: within and beyond the trained 16
    for _ in range(2):  # the second round starts from prefix hits, each of its own base
        answers = engine.generate([PROMPT] * 2, [Sampling(temperature=0, max_new_tokens=n) for n in lengths])
        for length, answer in zip(lengths, answers, strict=True):
            base = rope_base(model.config, len(PROMPT) + length)
            assert list(answer.token_ids) == greedy_with(model, PROMPT, length, base)
    assert answers[0].cached_tokens == answers[1].cached_tokens == 8


def test_scored_sequences_have_the_base_of_their_length():
    model = tiny_model(config_of("dynamic"))
    seen = {}

    def on_logits(item, start, logits):
        seen.setdefault(item, []).append(logits)

    items = [PROMPT * 3, PROMPT]
    make(model, num_tokens_per_iter=7).score(items, on_logits)
    for item, tokens in enumerate(items):
        assert (torch.cat(seen[item]) - whole_logits(model, tokens)).abs().max() < 1e-3


def test_sequences_of_different_bases_share_no_page():
    plain = Sequence(request_id="a", tokens=[1], limit=2)
    roots = [Sequence(request_id="a", tokens=[1], limit=2, rope_base=base).prefix_root for base in (1e4, 2e4, 1e4)]
    assert plain.prefix_root == b"" and roots[0] == roots[2] != roots[1] and roots[0] != b""
