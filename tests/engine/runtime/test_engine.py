"""The engine as its callers see it. One file over 300 lines: every case shares the tiny model and its fixtures."""

import dataclasses
import random

import pytest
import torch

from engine.config import EngineConfig, Recipe, Sampling
from engine.models.cache import KVScales
from engine.runtime.engine import Engine
from engine.runtime.tokenizer import Tokenizer
from engine.storage.checkpoint import Checkpoint, load_checkpoint
from engine.storage.config_ini import write_config_ini
from engine.storage.kv_scale_files import write_kv_scales
from engine.storage.workspace import WEIGHTS, write_weights
from tests.engine.runtime.tiny_model import CONFIG, END, CharTokenizer, greedy, tiny_model, whole_logits
from tests.shared_data import shared

GREEDY = Sampling(temperature=0, max_new_tokens=8)
PROMPTS = [[11, 3, 45, 8, 8, 20, 61, 5, 17, 33, 2], [9, 9, 1, 30], [11, 3, 45, 8, 8, 20, 61, 5, 17], [50]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def make(model, *, session_len=40, eos=(), scales=None, **options):
    options = {"cache_max_entry_count": 64, "cache_block_seq_len": 4, "max_batch_size": 4} | options
    config = EngineConfig(**options)
    return Engine(model, CharTokenizer(eos), config, session_len=session_len, kv_scales=scales)


def drain(engine):
    events = []
    while engine.has_work():
        events += engine.step()
        engine.check()
    assert engine._scheduler.pages.num_available == engine._scheduler.pages.num_pages, "pages leaked"
    return events


WAYS = {
    "whole": {},
    "chunked": {"num_tokens_per_iter": 3},
    "one at a time": {"max_batch_size": 1},
    "preempted": {"cache_max_entry_count": 12, "cache_block_seq_len": 2, "prefix_caching": False},
    "preempted with prefixes": {"cache_max_entry_count": 12, "cache_block_seq_len": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_greedy_answers_are_the_same_whichever_way_they_are_computed(model, way):
    engine = make(model, session_len=24, **WAYS[way])
    for _ in range(2):  # the second round starts from prefix hits
        answers = engine.generate(PROMPTS, GREEDY)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert list(answer.token_ids) == greedy(model, prompt, 8)
            assert (answer.finish_reason, answer.prompt_tokens) == ("length", len(prompt))
            assert answer.text == CharTokenizer().text(answer.token_ids)
    assert (engine._scheduler.num_preemptions > 0) == way.startswith("preempted")
    drain(engine)


def test_cached_tokens_are_told(model):
    engine = make(model)
    assert [answer.cached_tokens for answer in engine.generate([PROMPTS[0]], GREEDY)] == [0]
    assert [answer.cached_tokens for answer in engine.generate([PROMPTS[0], PROMPTS[2]], GREEDY)] == [8, 8]
    assert [answer.cached_tokens for answer in make(model, prefix_caching=False).generate(PROMPTS, GREEDY)] == [0] * 4


def test_an_end_token_ends_the_answer_and_is_not_in_the_text(model):
    tokens = greedy(model, PROMPTS[0], 8)
    end = tokens[4]
    before = tokens.index(end)
    answer = make(model, eos=(end,)).generate([PROMPTS[0]], GREEDY)[0]
    assert answer.finish_reason == "stop"
    assert list(answer.token_ids) == tokens[: before + 1]
    assert answer.text == CharTokenizer().text(tokens[:before])
    endless = make(model, eos=(end,)).generate([PROMPTS[0]], dataclasses.replace(GREEDY, ignore_eos=True))[0]
    assert (endless.finish_reason, len(endless.token_ids)) == ("length", 8)
    assert end not in endless.token_ids


def test_the_end_tokens_of_the_model_count_too(model):
    ending = tiny_model(dataclasses.replace(CONFIG, eos_token_ids=(greedy(model, PROMPTS[0], 1)[0],)))
    assert make(ending).generate([PROMPTS[0]], GREEDY)[0].text == ""


def test_a_stop_string_is_cut_and_never_streamed(model):
    tokenizer = CharTokenizer()
    text = tokenizer.text(greedy(model, PROMPTS[0], 8))
    stop = text[3:6]
    first = text.find(stop)
    engine = make(model)
    engine.add(PROMPTS[0], dataclasses.replace(GREEDY, stop=("never here", stop)), request_id="a")
    events = drain(engine)
    assert "".join(event.text for event in events) == text[:first]
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + ["stop"]
    assert sum(len(event.token_ids) for event in events) == first + 3 == events[-1].completion_tokens


def test_text_held_back_for_a_stop_string_comes_when_the_answer_ends(model):
    text = CharTokenizer().text(greedy(model, PROMPTS[0], 8))
    answer = make(model).generate([PROMPTS[0]], dataclasses.replace(GREEDY, stop=(text[-3:] + "never here",)))[0]
    assert (answer.text, answer.finish_reason) == (text, "length")


def test_session_len_cuts_the_answer(model):
    answer = make(model, session_len=14).generate([PROMPTS[0]], GREEDY)[0]
    assert (len(answer.token_ids), answer.finish_reason) == (3, "length")


def test_what_cannot_be_served_is_refused_in_words(model):
    engine = make(model, session_len=8)
    for prompt, words in (
        (PROMPTS[0], "11 tokens.*session_len 8"),
        ([1] * 8, "8 tokens.*session_len 8"),
        ([], "The prompt is empty"),
        ([1, CONFIG.vocab_size], f"token id {CONFIG.vocab_size}"),
        ([-1], "token id -1"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.add(prompt, GREEDY)
        with pytest.raises(ValueError, match=words):
            engine.generate([[1], prompt], GREEDY)
    with pytest.raises(ValueError, match="top_p"):
        engine.add([1], Sampling(top_p=2))
    assert not engine.has_work(), "a refused request leaves nothing behind"
    engine.add([1], GREEDY, request_id="a")
    with pytest.raises(ValueError, match="'a' is in use"):
        engine.add([1], GREEDY, request_id="a")
    with pytest.raises(ValueError, match="unfinished"):
        engine.generate([[1]], GREEDY)
    with pytest.raises(ValueError, match="unfinished"):
        engine.score([[1]], lambda *_: None)
    with pytest.raises(ValueError, match=r"cache_max_entry_count.*session_len 40"):
        make(model, cache_max_entry_count=9)
    with pytest.raises(ValueError, match="cache_block_seq_len"):
        make(model, cache_block_seq_len=-1)
    with pytest.raises(ValueError, match="session_len is 1"):
        make(model, session_len=1)


def test_abort_frees_the_pages_at_once_and_is_told(model):
    engine = make(model)
    pages = engine._scheduler.pages
    for name in "ab":
        engine.add(PROMPTS[0], GREEDY, request_id=name)
    engine.step()
    held = pages.num_pages - pages.num_available
    engine.abort("a")
    engine.check()
    assert pages.num_pages - pages.num_available < held
    engine.abort("a")
    engine.abort("unknown")
    events = drain(engine)
    assert [event.finish_reason for event in events if event.request_id == "a"] == ["abort"]
    assert "".join(event.text for event in events if event.request_id == "b")
    engine.add([1], GREEDY, request_id="a")  # the id is free again
    assert drain(engine)[-1].finish_reason == "length"


def random_service(model, seed, count):
    """Requests of every kind come and are aborted at random; returns how many were, and what each answered."""
    rng = random.Random(seed)
    engine = make(
        model,
        session_len=24,
        eos=(END,),
        cache_max_entry_count=14,
        cache_block_seq_len=2,
        num_tokens_per_iter=rng.choice([2, 9, 64]),
        prefix_caching=rng.random() < 0.7,
    )
    expected, pieces, reasons, aborted = {}, {}, {}, set()
    for number in range(count):
        action = rng.random()
        if action < 0.3 and len(expected) - len(reasons) < 8:
            prompt, new = rng.choice(PROMPTS), rng.randint(1, 12)
            sampling = Sampling(
                temperature=rng.choice([0, 1]),
                top_k=rng.choice([0, 5]),
                top_p=rng.choice([0.8, 1]),
                repetition_penalty=rng.choice([1, 1.3]),
                max_new_tokens=new,
                seed=rng.choice([None, 3]),
                stop=rng.choice([(), ("ab", "c")]),
                ignore_eos=rng.random() < 0.5,
                min_p=rng.choice([0, 0.1]),
                presence_penalty=rng.choice([0, 1.5]),
                frequency_penalty=rng.choice([0, -0.5]),
                logit_bias=rng.choice([(), ((3, 2.0), (7, -50.0))]),
                stop_token_ids=rng.choice([(), (9,)]),
                logprobs=rng.choice([None, 2]),
            )
            expected[engine.add(prompt, sampling, request_id=str(number))] = (prompt, sampling)
        elif action < 0.36 and expected:
            name = rng.choice(list(expected))
            aborted |= {name} - reasons.keys()
            engine.abort(name)
        else:
            record(engine.step(), pieces, reasons)
        engine.check()
    record(drain(engine), pieces, reasons)
    assert reasons.keys() == expected.keys()
    assert {name for name, reason in reasons.items() if reason == "abort"} == aborted
    return {name: (expected[name], pieces[name]) for name in reasons.keys() - aborted}


def record(events, pieces, reasons):
    for event in events:
        assert event.request_id not in reasons, "an event after the end"
        pieces.setdefault(event.request_id, []).extend(event.token_ids)
        assert event.completion_tokens == len(pieces[event.request_id])
        if event.finish_reason:
            reasons[event.request_id] = event.finish_reason


def test_random_service(model):
    alone, compared = make(model, session_len=24, eos=(END,)), 0
    for seed in range(3):
        for (prompt, sampling), tokens in random_service(model, seed, 120).values():
            if sampling.seed is not None or sampling.temperature == 0:
                assert list(alone.generate([prompt], sampling)[0].token_ids) == tokens
                compared += 1
    assert compared > 40


@pytest.mark.soak
def test_random_service_soak(model, soak_row):
    for seed in range(100):
        random_service(model, seed, 1000)
        soak_row["count"] += 1000


@pytest.mark.parametrize("options", [{}, {"num_tokens_per_iter": 5}, {"max_batch_size": 1}])
def test_score_gives_the_logits_of_every_position(model, options):
    engine = make(model, **options)
    engine.generate(PROMPTS, GREEDY)  # what is in the prefix cache must not be left out
    items = [*PROMPTS, PROMPTS[0], list(range(40))]
    rows = [[] for _ in items]

    def on_logits(item, start, logits):
        assert start == sum(len(piece) for piece in rows[item])
        assert logits.dtype == torch.float32
        rows[item].append(logits.cpu())

    engine.score(items, on_logits)
    drain(engine)
    for item, pieces in zip(items, rows, strict=True):
        expected = whole_logits(model, item)
        assert (torch.cat(pieces) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert engine.generate([PROMPTS[0]], GREEDY)[0].token_ids == tuple(greedy(model, PROMPTS[0], 8))


def test_a_failing_callback_leaves_the_engine_usable(model):
    engine = make(model, num_tokens_per_iter=3)

    def on_logits(item, start, logits):
        raise RuntimeError("full disk")

    with pytest.raises(RuntimeError, match="full disk"):
        engine.score(PROMPTS, on_logits)
    drain(engine)
    assert engine.generate([PROMPTS[0]], GREEDY)[0].token_ids == tuple(greedy(model, PROMPTS[0], 8))


def test_an_int8_cache_is_close_and_the_same_chunked(model):
    shape = (CONFIG.num_layers, CONFIG.num_kv_heads)
    pairs = torch.tensor([0.06, 0.0]).expand(*shape, 2).contiguous()
    scales = KVScales.of_heads(key=pairs, value=pairs, head_dim=CONFIG.head_dim)
    expected = whole_logits(model, PROMPTS[0])
    found = []
    for options in ({}, {"num_tokens_per_iter": 3}, {"num_tokens_per_iter": 1}):
        rows = []
        make(model, scales=scales, **options).score([PROMPTS[0]], lambda i, start, logits: rows.append(logits.cpu()))  # noqa: B023
        found.append(torch.cat(rows))
    largest = expected.abs().max()
    assert 1e-4 * largest < (found[0] - expected).abs().max() < 0.1 * largest
    for other in found[1:]:
        assert (other - found[0]).abs().max() <= 1e-4 * largest


STORY = (
    " Lily. She loved to play outside in the sunshine. One day, she saw a big, red ball in the sky. It was the sun! "
    "She thought it was so pretty."
)


def test_stories15m_tells_the_story():
    folder = shared("data/models/stories15M-llama")
    tokenizer = Tokenizer(folder)
    config = EngineConfig(num_tokens_per_iter=7, cache_block_seq_len=16)
    engine = Engine(load_checkpoint(folder), tokenizer, config, session_len=256)
    prompt = tokenizer.encode("Once upon a time, there was a little girl named")
    answer = engine.generate([prompt], Sampling(temperature=0, max_new_tokens=48))[0]
    assert answer.text.startswith(STORY)
    stopped = engine.generate([prompt], Sampling(temperature=0, max_new_tokens=48, stop=("the sunshine",)))[0]
    assert (stopped.text, stopped.finish_reason) == (" Lily. She loved to play outside in ", "stop")
    assert stopped.cached_tokens == 0, "the prompt does not fill a page of 16"


def test_stories260k_answers_like_transformers():
    folder = shared("data/models/stories260K-llama")
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = Tokenizer(folder)
    engine = Engine(
        load_checkpoint(folder),
        tokenizer,
        EngineConfig(num_tokens_per_iter=20, cache_block_seq_len=8),
        session_len=128,
    )
    prompts = [tokenizer.encode(text) for text in ("Once upon a time", "The cat sat on", "One day, a boy named Tim")]
    answers = engine.generate(prompts, Sampling(temperature=0, max_new_tokens=40))
    rows = [[] for _ in prompts]
    whole = [[*prompt, *answer.token_ids] for prompt, answer in zip(prompts, answers, strict=True)]
    engine.score(whole, lambda item, start, logits: rows[item].append(logits))
    for prompt, tokens, pieces in zip(prompts, whole, rows, strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([tokens])).logits[0]
        assert expected[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens[len(prompt) :]
        assert (torch.cat(pieces) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.fixture
def workspace(tmp_path):
    """stories260K as a workspace with session_len 100, without KV scales."""
    folder = shared("data/models/stories260K-llama")
    checkpoint = Checkpoint(folder)
    write_weights(tmp_path / WEIGHTS, checkpoint.config, checkpoint.tensor, recipe=Recipe(), tp=1)
    write_ini(tmp_path, checkpoint.config, kv="kv16")
    (tmp_path / "triton_models/tokenizer").mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "triton_models/tokenizer" / file).write_bytes((folder / file).read_bytes())
    return tmp_path


def write_ini(folder, config, *, kv):
    write_config_ini(
        folder / WEIGHTS / "config.ini",
        config,
        model_name="llama",
        recipe=Recipe(kv=kv),
        tp=1,
        session_len=100,
        weight_type="fp16",
        extra={},
    )


def test_a_workspace_runs_as_its_config_says(workspace):
    checkpoint = load_checkpoint(shared("data/models/stories260K-llama"))
    engine = Engine.from_workspace(workspace, EngineConfig(cache_block_seq_len=16))
    assert engine.session_len == 100
    assert Engine.from_workspace(workspace, EngineConfig(session_len=50)).session_len == 50
    prompt = Tokenizer(workspace / "triton_models/tokenizer").encode("Once upon a time")
    assert list(engine.generate([prompt], GREEDY)[0].token_ids) == greedy(checkpoint, prompt, 8)
    with pytest.raises(ValueError, match="session_len 100"):
        engine.add([1] * 101, GREEDY)


def test_an_int8_cache_needs_scales(workspace):
    with pytest.raises(ValueError, match=r"quant_policy is 4.*no KV scales.*kv=kv8"):
        Engine.from_workspace(workspace, EngineConfig(quant_policy=4))
    with pytest.raises(ValueError, match="quant_policy is 3"):
        Engine.from_workspace(workspace, EngineConfig(quant_policy=3))
    config = Checkpoint(shared("data/models/stories260K-llama")).config
    write_ini(workspace, config, kv="kv8")
    for layer in range(config.num_layers):
        write_kv_scales(workspace / WEIGHTS, layer, [(0.05, 0.0, 0.05, 0.0)])
    for quant_policy, stored in ((None, torch.uint8), (4, torch.uint8), (0, torch.float32)):
        engine = Engine.from_workspace(workspace, EngineConfig(quant_policy=quant_policy))
        assert engine._runner._cache.layers[0].key.dtype == stored
