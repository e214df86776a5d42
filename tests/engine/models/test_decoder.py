"""The decoder against HF transformers in float32: whole, through the paged cache, alone and in company; and int8 KV."""

import dataclasses

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from engine.models import names
from engine.models.batch import packed
from engine.models.cache import KVCache, KVScales
from engine.models.decoder import Decoder, DecoderLayer
from engine.models.rope import rope_tables
from engine.storage.checkpoint import load_checkpoint
from tests.engine.models.tiny import PagedRun, as_int8, random_weights, tiny_config
from tests.shared_data import shared

TOLERANCE = 1e-4  # of the largest absolute logit
STORY = (
    "Once upon a time there was a little girl named Lily. She loved to play outside in the park with her friends. "
    "One day she saw a big red ball, and she wanted to play with it. Her mom said that it was too late."
)


def distance(logits, expected):
    return float((logits - expected).abs().max() / expected.abs().max())


def token_ids(vocab_size, length, *, seed=0):
    return torch.randint(3, vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module", params=["stories15M-llama", "stories260K-llama", "minimind2-small-llama"])
def real_folder(request):
    return shared(f"data/models/{request.param}")


@pytest.fixture(scope="module")
def real(real_folder):
    """(our model, three prompts, HF's logits of each)"""
    model = load_checkpoint(real_folder)
    prompts = [token_ids(model.config.vocab_size, length, seed=length) for length in (70, 33, 9)]
    reference = AutoModelForCausalLM.from_pretrained(real_folder, dtype=torch.float32)
    with torch.no_grad():
        expected = [reference(torch.tensor([prompt])).logits[0] for prompt in prompts]
    return model, prompts, expected


def test_real_models_whole(real):
    model, prompts, expected = real
    logits = model(packed(prompts), None)
    assert logits.dtype == torch.float32
    for ours, theirs in zip(logits.split([len(prompt) for prompt in prompts]), expected, strict=True):
        assert distance(ours, theirs) <= TOLERANCE


def test_real_models_in_chunks_through_the_cache(real):
    model, prompts, expected = real
    run = PagedRun(model, prompts[:1])
    for amount in (16, 1, 30, 22, 1):
        run.step({0: amount})
    assert distance(run.result(0), expected[0]) <= TOLERANCE


def test_real_models_in_a_mixed_batch(real):
    model, prompts, expected = real
    run = PagedRun(model, prompts)
    run.step({0: 40, 2: 8})
    run.step({2: 1, 0: 1, 1: 20})
    run.step({0: 1, 1: 12})
    run.step({1: 1, 0: 28})
    for row in range(3):
        assert distance(run.result(row), expected[row]) <= TOLERANCE


def test_the_tolerance_refuses_a_slightly_wrong_rope_base(real, monkeypatch):
    model, prompts, expected = real
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, rope_theta=model.config.rope_theta * 1.05))
    assert distance(model(packed(prompts[:1]), None), expected[0]) > 10 * TOLERANCE


SHAPES = {
    "grouped heads": {},
    "one kv head, five heads": {"hidden_size": 30, "num_heads": 5, "num_kv_heads": 1, "head_dim": 6},
    "no groups, head_dim unlike hidden/heads": {"hidden_size": 36, "num_heads": 3, "num_kv_heads": 3, "head_dim": 20},
    "biases": {"qkv_bias": True, "o_bias": True},
    "tied, other base": {"tie_word_embeddings": True, "rope_theta": 500.0},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_random_models_of_any_shape(changes):
    config = tiny_config(**changes)
    weights = random_weights(config)
    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            attention_bias=config.qkv_bias,
            tie_word_embeddings=config.tie_word_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    )
    reference.load_state_dict(weights)
    prompts = [token_ids(64, 21), token_ids(64, 10, seed=1)]
    model = Decoder(config, weights, device="cpu", dtype=torch.float32)
    run = PagedRun(model, prompts, page_len=4)
    run.step({0: 13, 1: 9})
    run.step({1: 1, 0: 1})
    run.step({0: 7})
    with torch.no_grad():
        for row, prompt in enumerate(prompts):
            expected = reference(torch.tensor([prompt])).logits[0]
            assert distance(model(packed([prompt]), None), expected) <= TOLERANCE
            assert distance(run.result(row), expected) <= TOLERANCE


def test_logits_only_where_they_are_wanted():
    model = Decoder(tiny_config(), random_weights(tiny_config()), device="cpu", dtype=torch.float32)
    batch = packed([token_ids(64, 5), token_ids(64, 3)])
    wanted = dataclasses.replace(batch, logits_at=torch.tensor([7, 4]))
    assert torch.allclose(model(wanted, None), model(batch, None)[[7, 4]], atol=1e-5)


def calibrated(model, prompts):
    """KV scales over the prompts as they are taken for an artifact: one pair per layer, repeated over its heads."""
    batch = packed(prompts)
    hidden, rope = model.embed(batch.token_ids), rope_tables(model.config, batch)
    pairs = {"self_attn.k": [], "self_attn.v": []}

    def observe(module, x):
        if module in pairs:
            pair = torch.stack([(x.max() - x.min()) / 255, (x.max() + x.min()) / 2])
            pairs[module].append(pair.expand(model.config.num_kv_heads, 2))

    for layer in model.layers:
        hidden = layer(hidden, batch, None, rope, observe)
    key, value = (torch.stack(pairs[module]) for module in ("self_attn.k", "self_attn.v"))
    return KVScales.of_heads(key=key, value=value, head_dim=model.config.head_dim)


def test_int8_kv_costs_little_and_a_wrong_zero_point_much(real_folder):
    model = load_checkpoint(real_folder)
    prompt = Tokenizer.from_file(str(real_folder / "tokenizer.json")).encode(STORY).ids[:60]
    exact = model(packed([prompt]), None).log_softmax(-1)
    scales = calibrated(model, [prompt])

    def divergence(scales):
        run = PagedRun(model, [prompt], scales=scales)
        run.step({0: 40})
        run.step({0: len(prompt) - 40})
        return float((exact.exp() * (exact - run.result(0).log_softmax(-1))).sum(-1).mean())

    assert 0 < divergence(scales) < 0.005
    for name in ("key", "value"):
        pairs = getattr(scales, name).clone()
        pairs[..., 1] -= 127.5 * pairs[..., 0]  # the minimum taken for the middle
        assert divergence(dataclasses.replace(scales, **{name: pairs})) > 0.02


def test_observe_sees_the_input_of_every_linear():
    config = tiny_config(num_layers=1)
    weights = random_weights(config)
    layer = DecoderLayer(
        config,
        {names.split_name(name)[1]: x for name, x in weights.items() if names.split_name(name)[0] == 0},
        device="cpu",
        dtype=torch.float32,
    )
    batch = packed([token_ids(64, 6)])
    hidden = weights[names.EMBEDDING][batch.token_ids]
    seen = {}
    out = layer(hidden, batch, None, rope_tables(config, batch), seen.__setitem__)
    assert set(seen) == {*names.LINEARS, "self_attn.k", "self_attn.v"}
    for module in names.LINEARS:
        assert seen[module].shape == (6, names.linear_shape(config, module)[1])
    assert seen["self_attn.q_proj"] is seen["self_attn.k_proj"] is seen["self_attn.v_proj"]
    value = seen["self_attn.v_proj"] @ weights["model.layers.0.self_attn.v_proj.weight"].T
    assert torch.allclose(seen["self_attn.v"].flatten(1), value, atol=1e-5)
    key = (seen["self_attn.k_proj"] @ weights["model.layers.0.self_attn.k_proj.weight"].T).view(6, 2, 8)
    assert torch.allclose(seen["self_attn.k"][0], key[0], atol=1e-5)  # position 0 is not turned
    assert not torch.allclose(seen["self_attn.k"][1:], key[1:], atol=1e-2)
    attended = hidden + seen["self_attn.o_proj"] @ weights["model.layers.0.self_attn.o_proj.weight"].T
    mlp = seen["mlp.down_proj"] @ weights["model.layers.0.mlp.down_proj.weight"].T
    assert torch.allclose(out, attended + mlp, atol=1e-5)


def test_int8_layers_compute_with_rows_quantized_in_the_norm_and_in_silu():
    config = tiny_config(qkv_bias=True)
    weights = random_weights(config)
    quantized = as_int8(weights, config)
    batch = packed([token_ids(config.vocab_size, length, seed=length) for length in (9, 5)])
    exact = Decoder(config, weights, device="cpu", dtype=torch.float32)(batch, None)
    model = Decoder(config, quantized, device="cpu", dtype=torch.float32)
    logits = model(batch, None)
    assert 1e-4 < distance(logits, exact) < 0.05
    # The same with floats between: every linear quantizes its input itself.
    layer, seen = model.layers[0], {}
    hidden, rope = model.embed(batch.token_ids), rope_tables(config, batch)
    after = layer(hidden, batch, None, rope, observe=seen.__setitem__)
    normed = layer.attention_input(hidden)
    assert torch.equal(seen["self_attn.q_proj"], normed.dense())
    attended = layer.attend(normed.dense(), batch, rope)
    between = layer.after_attention(hidden, attended)
    inner = layer.inner(layer.mlp_input(between).dense())
    assert distance(layer.after_mlp(between, inner.dense()), after) < 0.02
    # Through the cache a sequence is what it is alone.
    sequence = token_ids(config.vocab_size, 20)
    run = PagedRun(model, [sequence])
    run.step({0: 11})
    for _ in range(9):
        run.step({0: 1})
    assert distance(run.result(0), model(packed([sequence]), None)) <= TOLERANCE


def test_a_rehearsal_runs_one_layer_of_each_kind_and_the_first_once_more(monkeypatch):
    config = tiny_config(num_layers=5)
    weights = random_weights(config)
    name = names.layer_name(2, "mlp.up_proj.weight")
    weights[name] = weights[name].double()  # of another kind, and computed in float32 all the same
    model = Decoder(config, weights, device="cpu", dtype=torch.float32)
    run, given = [], DecoderLayer.run
    monkeypatch.setattr(DecoderLayer, "run", lambda layer, *rest: run.append(layer) or given(layer, *rest))
    cache = KVCache(config, num_pages=1, page_len=16, device="cpu", dtype=torch.float32)
    batch = dataclasses.replace(
        packed([[1, 2, 3]]), page_table=torch.zeros(1, 1, dtype=torch.int32), slots=torch.arange(3)
    )
    model.rehearse(batch, cache)
    assert [model.layers.index(layer) for layer in run] == [0, 2, 0]
    run.clear()
    model.logits(batch, cache)
    assert run == model.layers
