import pytest
import torch

from pipelines.evaluation.divergence import TOP, BaseDistribution, Divergence
from pipelines.evaluation.perplexity import Scoring
from pipelines.evaluation.texts import Item


def _scores(vocabulary: int, noise: float, *, length: int = 40) -> tuple[torch.Tensor, torch.Tensor, Divergence]:
    source = torch.Generator().manual_seed(vocabulary)
    base = torch.randn(length, vocabulary, generator=source) * 3
    candidate = base + noise * torch.randn(length, vocabulary, generator=source)
    item = Item(token_ids=tuple(range(length)), first_scored=1)
    kept = BaseDistribution(length - 1, vocabulary)
    Scoring([item], [kept]).on_logits(0, 0, base)
    divergence = Divergence(kept.logprobs, kept.ids, kept.rest)
    Scoring([item], [divergence]).on_logits(0, 0, candidate)
    return base[:-1], candidate[:-1], divergence


@pytest.mark.parametrize(("vocabulary", "share"), [(1000, 0.5), (70000, 0.1)])
@pytest.mark.parametrize("noise", [0.05, 1.0])
def test_kl_is_a_close_lower_bound(vocabulary: int, share: float, noise: float) -> None:
    base, candidate, found = _scores(vocabulary, noise)
    p, q = base.double().log_softmax(1), candidate.double().log_softmax(1)
    whole = (p.exp() * (p - q)).sum(1)
    assert bool((found.kl <= whole + 1e-6).all())
    assert bool((found.kl >= 0).all())
    assert float(found.kl.mean()) > share * float(whole.mean())
    assert torch.equal(found.agrees, base.argmax(1) == candidate.argmax(1))


def test_kl_of_a_small_vocabulary_is_exact() -> None:
    base, candidate, found = _scores(TOP // 2, 0.3)
    p, q = base.double().log_softmax(1), candidate.double().log_softmax(1)
    torch.testing.assert_close(found.kl, (p.exp() * (p - q)).sum(1), atol=1e-6, rtol=1e-4)


def test_the_same_model_has_exactly_no_divergence() -> None:
    _, _, found = _scores(1000, 0.0)
    assert bool((found.kl == 0).all())
    assert bool(found.agrees.all())


def test_what_is_kept_is_a_distribution_in_few_bytes() -> None:
    kept = BaseDistribution(2, 5000)
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1)) * 4
    logits[0, 17] += 60  # the rest is far below what float32 can tell from 1 - 1
    Scoring([Item(token_ids=(1, 2, 3), first_scored=1)], [kept]).on_logits(0, 0, logits)
    total = kept.logprobs.double().exp().sum(1) + kept.rest.double().exp()
    torch.testing.assert_close(total, torch.ones(2, dtype=torch.float64), atol=1e-6, rtol=0)
    exact = logits[0].double().log_softmax(0)
    exact[kept.ids[0].long()] = -torch.inf
    assert float(kept.rest[0]) == pytest.approx(float(exact.logsumexp(0)), rel=1e-4)
    stored = sum(tensor.nbytes for tensor in (kept.logprobs, kept.ids, kept.rest)) / 2
    assert stored + 4 == 392


def test_ids_of_a_large_vocabulary_survive() -> None:
    kept = BaseDistribution(1, 70000)
    logits = torch.zeros(2, 70000)
    logits[0, 69999] = 20.0
    Scoring([Item(token_ids=(1, 2), first_scored=1)], [kept]).on_logits(0, 0, logits)
    assert int(kept.ids[0, 0]) == 69999
