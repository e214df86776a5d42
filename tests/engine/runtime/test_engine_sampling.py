"""What the engine does with options of sampling that touch more than one of its parts."""

import dataclasses
import re

import pytest

from engine.config import Grammar, Sampling
from tests.engine.runtime.test_engine import GREEDY, PROMPTS, WAYS, make
from tests.engine.runtime.tiny_model import END, CharTokenizer, greedy, tiny_model, whole_logits


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 12},
        {"top_p": 0.9, "repetition_penalty": 1.2},
        {"min_p": 0.02, "frequency_penalty": 1.5, "logit_bias": ((5, 1.5), (6, -100.0))},
        {"presence_penalty": 2.0, "grammar": Grammar(kind="regex", text="([A-Z][a-z]{1,3} ?){9}")},
    ],
)
def test_a_seed_gives_the_same_answer_alone_in_a_batch_and_across_preemption(model, options):
    sampling = Sampling(temperature=1.3, seed=77, max_new_tokens=12, **options)
    alone = make(model, eos=(END,)).generate([PROMPTS[0]], sampling)[0].token_ids
    others = Sampling(temperature=0.8, max_new_tokens=12)
    tight = make(
        model, eos=(END,), session_len=24, cache_max_entry_count=12, cache_block_seq_len=2, prefix_caching=False
    )
    for engine in (make(model, eos=(END,)), make(model, eos=(END,), num_tokens_per_iter=3), tight):
        mixed = [others, others, sampling, others]
        prompts = [PROMPTS[1], PROMPTS[2], PROMPTS[0], PROMPTS[3]]
        assert engine.generate(prompts, mixed)[2].token_ids == alone
    assert tight._scheduler.num_preemptions > 0
    other_seed = dataclasses.replace(sampling, seed=78)
    assert make(model, eos=(END,)).generate([PROMPTS[0]], other_seed)[0].token_ids != alone


def test_without_a_seed_every_answer_is_another(model):
    engine = make(model)
    answers = engine.generate([PROMPTS[0]] * 4, Sampling(temperature=1.5, max_new_tokens=12))
    assert len({answer.token_ids for answer in answers}) == 4


def test_a_stop_token_ends_the_answer_and_has_no_text(model):
    tokens = greedy(model, PROMPTS[0], 8)
    before = tokens.index(tokens[4])
    sampling = dataclasses.replace(GREEDY, stop_token_ids=(tokens[4],), ignore_eos=True)
    answer = make(model).generate([PROMPTS[0]], sampling)[0]
    assert (list(answer.token_ids), answer.finish_reason) == (tokens[: before + 1], "stop")
    assert answer.text == CharTokenizer().text(tokens[:before])


@pytest.mark.parametrize("way", WAYS)
def test_a_grammar_is_followed_whichever_way_the_answer_is_computed(model, way):
    engine = make(model, session_len=24, eos=(END,), **WAYS[way])
    pattern = "[A-Z][a-z]{1,2}\\. [0-9]{2}"
    sampling = [
        Sampling(temperature=1.5, seed=seed, max_new_tokens=10, grammar=Grammar(kind="regex", text=pattern))
        for seed in (1, 2)
    ]
    free = dataclasses.replace(GREEDY, max_new_tokens=10)
    answers = engine.generate(PROMPTS, [*sampling, free, sampling[0]])
    for answer in (answers[0], answers[1], answers[3]):
        assert re.fullmatch(pattern, answer.text), answer.text
        assert (answer.finish_reason, answer.token_ids[-1]) == ("stop", END)
    assert answers[2].text == make(model, eos=(END,)).generate([PROMPTS[2]], free)[0].text
    assert make(model, eos=(END,)).generate([PROMPTS[0]], sampling[0])[0].text == answers[0].text


def test_a_grammar_that_is_not_valid_leaves_nothing_behind(model):
    engine = make(model, eos=(END,))
    with pytest.raises(ValueError, match="The regex cannot be followed"):
        engine.add(PROMPTS[0], Sampling(grammar=Grammar(kind="regex", text="(")))
    assert not engine.has_work()


def test_logprobs_are_those_of_the_model_whatever_is_sampled(model):
    options = {"temperature": 0.2, "top_k": 3, "presence_penalty": 2.0, "logit_bias": ((5, 9.0),), "seed": 1}
    wanted = Sampling(max_new_tokens=6, logprobs=3, **options)
    answers = make(model).generate(PROMPTS[:2], [wanted, Sampling(max_new_tokens=6, **options)])
    assert answers[1].logprobs == ()
    answer = answers[0]
    assert [each.token_id for each in answer.logprobs] == list(answer.token_ids)
    tokens = [*PROMPTS[0], *answer.token_ids]
    expected = whole_logits(model, tokens[:-1])[len(PROMPTS[0]) - 1 :].log_softmax(-1)
    for each, row in zip(answer.logprobs, expected, strict=True):
        assert each.logprob == pytest.approx(row[each.token_id].item(), abs=1e-4)
        values, ids = row.topk(3)
        assert [token for token, _ in each.top] == ids.tolist()
        assert [value for _, value in each.top] == pytest.approx(values.tolist(), abs=1e-4)
