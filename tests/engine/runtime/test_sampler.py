import math
from itertools import pairwise

import pytest
import torch

from engine.config import Sampling
from engine.runtime.sampler import Draws, _narrow, collect_draws, sample, uniform
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
    steep = [Sampling(), Sampling(**options)]
    found = _narrow(torch.stack([probabilities, probabilities]), steep)
    assert set(found[1].nonzero()[:, 0].tolist()) == allowed
    assert torch.equal(found[0], probabilities)
    assert torch.equal(_narrow(probabilities[None], steep[1:]), found[1:])


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


def test_a_row_has_the_same_token_whatever_the_other_rows_are():
    generator = torch.Generator().manual_seed(1)
    kinds = [
        Sampling(seed=1),
        Sampling(seed=2, top_k=5),
        Sampling(seed=3, top_p=0.7),
        Sampling(seed=4, temperature=0),
        Sampling(seed=5, top_k=20, top_p=0.9, temperature=1.5),
        Sampling(seed=6, repetition_penalty=1.3, ignore_eos=True),
    ]
    sequences = [
        Sequence(request_id=str(i), tokens=[i % 50, 7], limit=9, sampling=kind, seed=kind.seed)
        for i, kind in enumerate(kinds * 20)
    ]
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
