"""The deterministic mode: log-probabilities are the same floats whatever else is computed."""

import random
from dataclasses import replace

import pytest
import torch

from engine.config import EngineConfig, Sampling
from engine.models.cache import KVScales, PerToken
from engine.models.decoder import Decoder
from engine.runtime.engine import Engine
from tests.engine.models.tiny import quantized, random_weights, tiny_config
from tests.engine.runtime.tiny_model import DEVICE, CharTokenizer

# Large enough that libraries choose other orders for other numbers of rows.
CONFIG = tiny_config(
    vocab_size=63, hidden_size=128, head_dim=32, num_heads=4, num_kv_heads=2, intermediate_size=352, num_layers=2
)
BUSY = {"max_batch_size": 24, "cache_max_entry_count": 800}
TIGHT = {"max_batch_size": 6, "num_tokens_per_iter": 11, "cache_max_entry_count": 26}


def model_of(weights: str, *, deterministic=True, window=None) -> Decoder:
    config = replace(CONFIG, sliding_window=window)
    tensors = quantized(weights, random_weights(config), config)
    dtype = torch.float32 if DEVICE == "cpu" else torch.float16
    return Decoder(config, tensors, device=DEVICE, dtype=dtype, deterministic=deterministic)


def scales_of(kv: str):
    if kv == "kv8":
        pairs = torch.tensor([0.05, 0.0]).expand(CONFIG.num_layers, CONFIG.num_kv_heads, CONFIG.head_dim, 2)
        return KVScales(key=pairs.contiguous(), value=pairs.contiguous())
    return PerToken() if kv == "kv8-token" else None


def requests(number):
    chooser = random.Random(5)
    prompts = [[chooser.randrange(62) for _ in range(chooser.choice((1, 3, 5, 17, 70)))] for _ in range(number)]
    prompts[2] = prompts[1][: len(prompts[1]) // 2] + prompts[0]  # something for the prefix cache to find
    samplings = [
        Sampling(
            temperature=index % 2, seed=index, max_new_tokens=chooser.randrange(2, 30), ignore_eos=True, logprobs=3
        )
        for index in range(number)
    ]
    return prompts, samplings


def answers(model, kv, prompts, samplings, **options):
    config = EngineConfig(cache_block_seq_len=4, deterministic=True, **options)
    engine = Engine(model, CharTokenizer(), config, session_len=100, kv_scales=scales_of(kv))
    found = engine.generate(prompts, samplings)
    return [(list(answer.token_ids), answer.logprobs) for answer in found], engine


@pytest.mark.parametrize("kv", ["kv16", "kv8", "kv8-token"])
@pytest.mark.parametrize("weights", ["fp16", "w4a16", "w8a8"])
def test_answers_have_the_same_bits_alone_and_in_any_batch(weights, kv):
    prompts, samplings = requests(20)
    model = model_of(weights)
    alone = []
    for prompt, sampling in zip(prompts, samplings, strict=True):
        alone += answers(model, kv, [prompt], [sampling], **BUSY)[0]
    assert all(logprobs for _, logprobs in alone)
    together, _ = answers(model, kv, prompts, samplings, **BUSY)
    assert together == alone
    in_pieces, engine = answers(model, kv, prompts, samplings, **TIGHT)
    assert in_pieces == alone
    assert engine._scheduler.num_preemptions > 0


def test_a_window_does_not_change_that():
    prompts, samplings = requests(8)
    model = model_of("fp16", window=19)
    whole, _ = answers(model, "kv16", prompts, samplings, **BUSY)
    assert answers(model, "kv16", prompts, samplings, **TIGHT)[0] == whole


def test_the_answers_are_those_of_the_model():
    prompts, samplings = requests(6)
    exact, _ = answers(model_of("fp16", deterministic=False), "kv16", prompts, samplings, **BUSY)
    ours, _ = answers(model_of("fp16"), "kv16", prompts, samplings, **BUSY)
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in exact]
