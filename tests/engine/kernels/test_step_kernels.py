"""What a step begins and ends with, against plain torch: interpreted here, compiled where there is a GPU."""

import pytest
import torch

from engine.kernels import reference
from tests.engine.kernels.paged import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")
from engine.kernels import begin_step, likeliest

VOCABULARIES = [5, 2049, 20000] + ([103168, 151936] if DEVICE == "cuda" else [])


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_likeliest(vocabulary, dtype):
    logits = torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[2, vocabulary // 2 :] = 7.0  # equals: the first of them
    logits[3, -1] = 9.0
    ends = torch.tensor([int(logits[0].argmax()), vocabulary - 1])
    ignoring = torch.tensor([1, 0, 0, 1, 0], dtype=torch.int32)
    expected, out = torch.zeros(5, dtype=torch.int64), torch.full((5,), -1).to(DEVICE)
    reference.likeliest(logits, ignoring, ends, expected)
    there, copy = logits.to(DEVICE), torch.zeros(6, vocabulary, dtype=dtype, device=DEVICE)
    for take in (None, copy[:5]):
        out.fill_(-1)
        likeliest.likeliest(there, ignoring.to(DEVICE), ends.to(DEVICE), out, take)
        assert torch.equal(out.cpu(), expected)
        assert torch.equal(there.cpu(), logits)
    assert torch.equal(copy[:5].cpu(), logits) and not copy[5].any()
    assert out[0] != ends[0] and out[3] != ends[1] and out[2] == vocabulary // 2
    likeliest.likeliest(there, ignoring.to(DEVICE), ends[:0].to(DEVICE), out)
    assert out[0] == ends[0] and out[3] == ends[1]
    likeliest.likeliest(there[:0], ignoring[:0].to(DEVICE), ends.to(DEVICE), out[:0])


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_rows_that_are_no_numbers_have_a_token():
    logits = torch.full((2, 3000), float("nan"), device=DEVICE)
    logits[1, 2999] = 1.0
    out = torch.full((2,), -1, device=DEVICE)
    likeliest.likeliest(logits, torch.zeros(2, dtype=torch.int32, device=DEVICE), torch.tensor([0]).to(DEVICE), out)
    assert all(0 <= token < 3000 for token in out.tolist())


@pytest.mark.parametrize(("hidden", "half"), [(8, 4), (96, 20), (2500, 64)])
@pytest.mark.parametrize("own", [False, True], ids=["one base", "bases of sequences"])
@pytest.mark.parametrize("drawn", [None, [7, 3, 9]], ids=["known", "drawn"])
def test_begin_step(hidden, half, own, drawn):
    generator = torch.Generator().manual_seed(hidden)
    embedding = torch.randn(11, hidden, generator=generator).half()
    positions = torch.tensor([0, 1, 77, 4095, 31000], dtype=torch.int32)
    frequencies = torch.rand((5, half) if own else (half,), generator=generator) ** 4
    ids = torch.tensor([4, -2 if drawn else 2, 0, -3 if drawn else 10, -1 if drawn else 1], dtype=torch.int32)
    last = None if drawn is None else torch.tensor(drawn)
    expected = reference.begin_step(ids, last, embedding, positions, frequencies, 1.25)
    there = [None if x is None else x.to(DEVICE) for x in (ids, last, embedding, positions, frequencies)]
    rows, cos, sin = begin_step.begin_step(*there, 1.25)
    assert torch.equal(rows.cpu(), expected[0])
    for found, exact in ((cos, expected[1]), (sin, expected[2])):
        torch.testing.assert_close(found.cpu(), exact, rtol=0, atol=2e-6)
    assert begin_step.begin_step(*(None if x is None else x[:0] for x in there[:2]), *there[2:], 1.0)[0].shape[0] == 0
