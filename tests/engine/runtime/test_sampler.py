import dataclasses
import math
from array import array
from itertools import pairwise

import pytest
import torch

from engine.config import Sampling
from engine.kernels import ops
from engine.kernels.draw_reference import narrowed
from engine.runtime.sampler import Draws, collect_draws, sample, uniform
from engine.runtime.sequence import Sequence

COUNT = 4000


def draw_many(logits, count=COUNT, **options):
    """How often each token is drawn for `count` seeds."""
    rows = torch.tensor(logits).expand(count, -1)
    draws = Draws(options=[Sampling(**options)] * count, uniforms=[uniform(seed, 3) for seed in range(count)])
    return sample(rows, draws).bincount(minlength=len(logits)).tolist()


def chi_square(counts, expected):
    """Pearson's statistic over the tokens that can be drawn; a token that cannot must not have been."""
    total = sum(counts)
    assert all(count == 0 for count, share in zip(counts, expected, strict=True) if share == 0)
    return sum((n - total * p) ** 2 / (total * p) for n, p in zip(counts, expected, strict=True) if p > 0)


def softmax(logits, temperature=1.0):
    weights = [math.exp(logit / temperature) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def renormalized(shares, keep):
    kept = [share if index in keep else 0.0 for index, share in enumerate(shares)]
    return [share / sum(kept) for share in kept]


LOGITS = [0.1, 2.0, -1.0, 1.2, 0.7, -0.3, 1.9, 0.0]
# The 99.9% point of chi-square with 7 degrees of freedom; fewer degrees have a lower one. The seeds are fixed, so
# a right sampler passes always and one that is off by a few percent fails always.
BOUND = 24.3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature):
    counts = draw_many(LOGITS, temperature=temperature)
    assert chi_square(counts, softmax(LOGITS, temperature)) < BOUND
    assert chi_square(counts, softmax(LOGITS, temperature * 1.25)) > BOUND, "the bound can fail"


def test_top_k():
    expected = renormalized(softmax(LOGITS), {1, 6, 3})
    assert chi_square(draw_many(LOGITS, top_k=3), expected) < BOUND


def test_top_p_is_the_smallest_set_that_reaches_the_share():
    shares = softmax(LOGITS)  # sorted: token 1 0.33, 6 0.30, 3 0.15, 4 0.09, ...
    assert shares[1] + shares[6] < 0.7 < shares[1] + shares[6] + shares[3]
    assert chi_square(draw_many(LOGITS, top_p=0.7), renormalized(shares, {1, 6, 3})) < BOUND
    assert chi_square(draw_many(LOGITS, top_p=0.3), renormalized(shares, {1})) < BOUND


def test_the_nucleus_is_taken_inside_top_k():
    shares = renormalized(softmax(LOGITS), {1, 6, 3})
    assert shares[1] + shares[6] > 0.8 > softmax(LOGITS)[1] + softmax(LOGITS)[6]
    assert chi_square(draw_many(LOGITS, top_k=3, top_p=0.8), renormalized(shares, {1, 6})) < BOUND


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 1}, {"top_p": 0.0}, {"temperature": 1e-30}])
def test_the_ends_are_greedy(options):
    assert draw_many(LOGITS, count=50, **options)[1] == 50


def test_top_k_beyond_the_vocabulary_changes_nothing():
    assert draw_many(LOGITS, top_k=100) == draw_many(LOGITS)


@pytest.mark.parametrize("flatness", [0.01, 3.0])
@pytest.mark.parametrize("options", [{"top_k": 1500, "top_p": 0.99}, {"top_p": 0.9}, {"top_k": 7}])
def test_a_large_vocabulary_is_narrowed_as_a_full_ranking_says(options, flatness):
    """A flat distribution needs more tokens than are ranked at first, a steep one fewer."""
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(2)) * flatness
    probabilities = logits.softmax(-1)
    order = probabilities.argsort(descending=True)[: options.get("top_k")]
    kept = probabilities[order].double()
    size = int((kept.cumsum(0) - kept < options.get("top_p", 1.0) * kept.sum()).sum())
    allowed = set(order[:size].tolist())
    top_k, top_p = (torch.tensor([all_, options.get(name, all_)]) for name, all_ in (("top_k", 0), ("top_p", 1.0)))
    found = narrowed(torch.stack([probabilities, probabilities]), top_k, top_p)
    assert set(found[1].nonzero()[:, 0].tolist()) == allowed
    assert torch.equal(found[0], probabilities)
    assert torch.equal(narrowed(probabilities[None], top_k[1:], top_p[1:]), found[1:])


def test_tokens_as_likely_as_the_last_one_kept_are_kept():
    counts = draw_many([1.0, 1.0, 1.0, 0.0], top_k=2)
    assert chi_square(counts, [1 / 3, 1 / 3, 1 / 3, 0]) < BOUND


def test_a_token_that_is_impossible_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]] * 3)
    draws = Draws(options=[Sampling()] * 3, uniforms=[0.0, 0.5, 1 - 2.0**-40])
    assert sample(logits, draws).tolist() == [1, 1, 1]


def test_repetition_penalty_counts_once_and_by_sign():
    sequence = Sequence(
        request_id="a",
        tokens=[0, 1, 1, 1],
        limit=9,
        sampling=Sampling(temperature=0, repetition_penalty=2.0),
    )
    draws = collect_draws([sequence], eos_token_ids=())
    logits = torch.tensor([[-1.0, 3.0, 1.4]])
    given = logits.clone()
    assert sample(logits, draws).tolist() == [1], "3 / 2 is still more than 1.4"
    assert sample(torch.tensor([[-1.0, 3.0, 1.6]]), draws).tolist() == [2]
    assert sample(torch.tensor([[-1.0, -9.0, -1.9]]), draws).tolist() == [2], "a negative logit becomes more so"
    assert torch.equal(logits, given), "the logits given stay as they are"


def test_penalty_and_ban_touch_their_own_row_alone():
    plain = Sequence(request_id="a", tokens=[0], limit=9, sampling=Sampling(temperature=0))
    penalized = Sequence(request_id="b", tokens=[0], limit=9, sampling=Sampling(temperature=0, repetition_penalty=4.0))
    endless = Sequence(request_id="c", tokens=[0], limit=9, sampling=Sampling(temperature=0, ignore_eos=True))
    draws = collect_draws([plain, penalized, endless, plain], eos_token_ids=(0, 1))
    assert sample(torch.tensor([[3.0, 2.0, 1.0]] * 4), draws).tolist() == [0, 1, 2, 0]


def test_min_p_drops_what_is_less_likely_than_its_share_of_the_likeliest():
    shares = softmax(LOGITS)
    kept = {index for index, share in enumerate(shares) if share >= 0.4 * max(shares)}
    assert 1 < len(kept) < 5
    assert chi_square(draw_many(LOGITS, min_p=0.4), renormalized(shares, kept)) < BOUND
    assert draw_many(LOGITS, count=50, min_p=1.0)[1] == 50


def drawn(logits, sequence):
    return sample(torch.tensor([logits]), collect_draws([sequence], eos_token_ids=())).item()


def test_presence_and_frequency_count_the_answer_alone():
    def answered(answer, **options):
        sequence = Sequence(request_id="a", tokens=[0, 0, 0], limit=99, sampling=Sampling(temperature=0, **options))
        sequence.tokens += answer
        return sequence

    for name in ("presence_penalty", "frequency_penalty"):
        assert drawn([2.0, 1.0, 0.0], answered([], **{name: 2.0})) == 0, "the prompt does not count"
        assert drawn([2.0, 1.0, 0.5], answered([0], **{name: 1.1})) == 1
        assert drawn([2.0, 1.0, 0.5], answered([0], **{name: 0.9})) == 0
        assert drawn([2.0, 2.1, 0.5], answered([0], **{name: -0.2})) == 0, "a negative one makes it likelier"
    assert drawn([2.0, 1.0, 0.5], answered([0, 0, 0], presence_penalty=0.9)) == 0, "once, however often it came"
    assert drawn([2.0, 1.0, 0.5], answered([0, 0, 0], frequency_penalty=0.4)) == 1, "for each time"


def test_a_bias_is_added_to_the_logit():
    biased = Sequence(
        request_id="a", tokens=[5], limit=9, sampling=Sampling(temperature=0, logit_bias=((2, 1.1), (0, -100.0)))
    )
    assert drawn([9.0, 1.0, 0.0], biased) == 2
    counts = draw_many(LOGITS)
    sequence = Sequence(request_id="a", tokens=[5], limit=9, sampling=Sampling(logit_bias=((0, 1.9),)))
    rows = torch.tensor(LOGITS).expand(COUNT, -1)
    draws = collect_draws([sequence] * COUNT, eos_token_ids=())
    draws = dataclasses.replace(draws, uniforms=[uniform(seed, 3) for seed in range(COUNT)])
    shifted = [LOGITS[0] + 1.9, *LOGITS[1:]]
    assert chi_square(sample(rows, draws).bincount(minlength=8).tolist(), softmax(shifted)) < BOUND
    assert chi_square(counts, softmax(shifted)) > BOUND, "the bound can fail"


def test_a_bias_and_a_penalty_of_one_token_are_both_applied():
    sampling = Sampling(temperature=0, logit_bias=((0, 3.0),), presence_penalty=2.0)
    sequence = Sequence(request_id="a", tokens=[7], limit=9, sampling=sampling)
    sequence.tokens.append(0)
    assert drawn([0.0, 0.9], sequence) == 0
    assert drawn([0.0, 1.1], sequence) == 1


class Only:
    """A constraint of some tokens."""

    def __init__(self, *tokens, vocabulary=50):
        self._words = [0] * -(-vocabulary // 32)
        for token in tokens:
            self._words[token // 32] |= 1 << token % 32

    def allowed(self, answer):
        return array("i", array("I", self._words).tobytes())


def test_a_constraint_allows_its_tokens_in_its_row_alone():
    tokens = (0, 31, 32, 49)
    free = Sequence(request_id="a", tokens=[1], limit=9, sampling=Sampling(temperature=0))
    logits = torch.zeros(6, 50)
    logits[:, 7] = 9.0
    for row, token in enumerate(tokens, start=1):
        logits[row, token] = 1.0
    rows = [
        free,
        *(
            Sequence(request_id="b", tokens=[1], limit=9, sampling=Sampling(temperature=0), constraint=Only(*tokens))
            for _ in tokens
        ),
        free,
    ]
    assert sample(logits, collect_draws(rows, eos_token_ids=())).tolist() == [7, *tokens, 7]
    assert rows[1].needs_host


def test_a_row_has_the_same_token_whatever_the_other_rows_are():
    generator = torch.Generator().manual_seed(1)
    kinds = [
        Sampling(seed=1),
        Sampling(seed=2, top_k=5),
        Sampling(seed=3, top_p=0.7),
        Sampling(seed=4, temperature=0),
        Sampling(seed=5, top_k=20, top_p=0.9, temperature=1.5),
        Sampling(seed=6, repetition_penalty=1.3, ignore_eos=True),
        Sampling(seed=7, min_p=0.05, presence_penalty=0.7),
        Sampling(seed=8, frequency_penalty=-1.3, logit_bias=((11, 2.0), (12, -100.0)), top_k=9),
        Sampling(seed=9, min_p=0.2, top_p=0.9, temperature=0.8, repetition_penalty=1.1, presence_penalty=0.1),
    ]
    sequences = [
        Sequence(
            request_id=str(i),
            tokens=[i % 50, 7],
            limit=9,
            sampling=kind,
            seed=kind.seed,
            constraint=Only(*range(i % 50, 50)) if i % 5 == 0 else None,
        )
        for i, kind in enumerate(kinds * 20)
    ]
    for sequence in sequences:
        sequence.tokens += [3, 9, 3]
    logits = torch.randn(len(sequences), 50, generator=generator)
    together = sample(logits, collect_draws(sequences, eos_token_ids=(3,))).tolist()
    for row, sequence in enumerate(sequences):
        assert sample(logits[row : row + 1], collect_draws([sequence], eos_token_ids=(3,))).item() == together[row]


def test_uniforms_are_even_and_independent_of_neighbours():
    for numbers in (
        [uniform(seed, 0) for seed in range(COUNT)],
        [uniform(7, position) for position in range(COUNT)],
    ):
        assert all(0 <= number < 1 for number in numbers)
    for numbers in ([uniform(seed, 0) for seed in range(COUNT)], [uniform(7, position) for position in range(COUNT)]):
        bins, pairs = [0] * 8, [0] * 8
        for number in numbers:
            bins[int(number * 8)] += 1
        for first, second in pairwise(numbers):
            pairs[int(first * 2) * 4 + int(second * 4)] += 1
        assert chi_square(bins, [1 / 8] * 8) < BOUND
        assert chi_square(pairs, [1 / 8] * 8) < BOUND


def test_any_integer_is_a_seed():
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)
    assert len({uniform(seed, 0) for seed in (-1, 0, 1, 2**63)}) == 4


@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_the_ends_of_the_penalty_leave_numbers(penalty):
    sampling = Sampling(repetition_penalty=penalty)
    sequence = Sequence(request_id="a", tokens=list(range(8)), limit=99, sampling=sampling)
    logits = torch.tensor([[-300.0, 300.0, 0.0, 1e-30, -1e-30, 5.0, -5.0, 2.0]])
    assert 0 <= sample(logits, collect_draws([sequence], eos_token_ids=())).item() < 8


def test_logits_that_are_no_numbers_give_a_token_of_the_vocabulary():
    logits = torch.full((2, 8), torch.nan)
    draws = Draws(options=[Sampling(), Sampling(temperature=0)], uniforms=[0.5, 0.5])
    assert all(0 <= token < 8 for token in sample(logits, draws).tolist())


def test_the_likeliest_token_is_that_of_the_sampler_with_end_tokens_ignored_by_some_rows():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(3))
    ends = (int(logits[0].argmax()), int(logits[1].argmax()))
    ignoring = [True, False, True, False, True, True]
    options = [Sampling(temperature=0, ignore_eos=ignores) for ignores in ignoring]
    banned = [(row, end) for row, ignores in enumerate(ignoring) if ignores for end in ends]
    draws = Draws(options=options, uniforms=[0.5] * 6, banned=tuple(map(list, zip(*banned, strict=True))))
    expected, out = sample(logits, draws), torch.zeros(6, dtype=torch.int64)
    given = logits.clone()
    ops.likeliest(logits, torch.tensor(ignoring), torch.tensor(ends), out)
    assert torch.equal(logits, given)
    assert torch.equal(out, expected)
    assert out[0] not in ends
    assert out[1] == ends[1]
