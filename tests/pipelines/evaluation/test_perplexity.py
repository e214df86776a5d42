import math

import pytest
import torch

from pipelines.evaluation.perplexity import Scoring, TokenLoss, perplexity, perplexity_ratio
from pipelines.evaluation.texts import Item

VOCABULARY = 11


def _items() -> list[Item]:
    source = torch.Generator().manual_seed(5)
    draws = [torch.randint(0, VOCABULARY, (n,), generator=source).tolist() for n in (7, 3, 9)]
    return [Item(token_ids=tuple(ids), first_scored=first) for ids, first in zip(draws, (1, 2, 6), strict=True)]


def _logits(items: list[Item]) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(6)
    return [torch.randn(len(item.token_ids), VOCABULARY, generator=source) * 3 for item in items]


@pytest.mark.parametrize("chunk", [1, 2, 4, 100])
def test_losses_are_cross_entropy_however_the_logits_are_cut(chunk: int) -> None:
    items = _items()
    logits = _logits(items)
    losses = TokenLoss(6 + 1 + 3)
    scoring = Scoring(items, [losses])
    for start in range(0, 9, chunk):
        for number in (2, 0, 1):
            piece = logits[number][start : start + chunk]
            if len(piece):
                scoring.on_logits(number, start, piece)
    scoring.finish()
    expected = torch.cat(
        [
            torch.nn.functional.cross_entropy(
                rows[item.first_scored - 1 : -1], torch.tensor(item.token_ids[item.first_scored :]), reduction="none"
            )
            for item, rows in zip(items, logits, strict=True)
        ]
    )
    torch.testing.assert_close(losses.values.float(), expected)
    assert perplexity(losses.values, scoring.counts).value == pytest.approx(math.exp(expected.mean()), rel=1e-6)


def test_a_token_that_never_came_is_an_error() -> None:
    items = _items()
    scoring = Scoring(items, [TokenLoss(10)])
    scoring.on_logits(0, 0, _logits(items)[0])
    with pytest.raises(RuntimeError, match="6 tokens where 10"):
        scoring.finish()


def test_pairing_cancels_what_both_find_hard() -> None:
    source = torch.Generator().manual_seed(7)
    base = torch.rand(600, generator=source, dtype=torch.float64) * 8
    counts = [20] * 30
    ratio = perplexity_ratio(base + 0.01, base, counts, confidence=0.95)
    assert ratio.value == pytest.approx(math.exp(0.01))
    assert ratio.high - ratio.low < 1e-9
    alone = perplexity(base, counts)
    assert alone.high / alone.low > 1.1
