import pytest
import torch

from engine.runtime.logprobs import token_logprobs


def test_only_rows_that_ask_have_an_entry():
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    found = token_logprobs(logits, torch.tensor([2, 3, 4]), [None, 0, 3])
    expected = logits.double().log_softmax(-1)
    assert found[0] is None
    assert (found[1].token_id, found[1].top) == (3, ())
    assert found[1].logprob == pytest.approx(expected[1, 3].item(), abs=1e-6)
    assert found[2].token_id == 4
    ranked = expected[2].argsort(descending=True)[:3].tolist()
    assert [token for token, _ in found[2].top] == ranked
    assert [value for _, value in found[2].top] == pytest.approx(expected[2, ranked].tolist(), abs=1e-6)
    assert token_logprobs(logits, torch.tensor([2, 3, 4]), [None] * 3) == [None] * 3


def test_a_row_has_the_same_numbers_whatever_the_other_rows_are():
    logits = torch.randn(40, 999, generator=torch.Generator().manual_seed(2))
    tokens = torch.arange(40)
    counts = [(None, 0, 1, 20)[row % 4] for row in range(40)]
    together = token_logprobs(logits, tokens, counts)
    for row in range(40):
        assert token_logprobs(logits[row : row + 1], tokens[row : row + 1], counts[row : row + 1]) == [together[row]]


def test_more_than_the_vocabulary_is_all_of_it():
    [found] = token_logprobs(torch.zeros(1, 5), torch.tensor([0]), [20])
    assert len(found.top) == 5
