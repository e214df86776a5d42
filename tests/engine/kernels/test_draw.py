"""The kernel that draws tokens against plain torch: interpreted here, compiled where there is a GPU."""

import itertools

import pytest
import torch

from engine.kernels import draw_reference
from engine.kernels.draw_reference import FIELDS, UNIFORM
from tests.engine.kernels.paged import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")
from engine.kernels import draw

# temperature, top_k, top_p, min_p
OPTIONS = [
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.3, 0, 0.8, 0.0),
    (1.0, 0, 1.0, 0.2),
    (1.0, 40, 0.9, 0.05),
    (2.0, 10**6, 0.0, 0.0),
    (1e-30, 0, 1.0, 0.0),
    (1e30, 0, 1.0, 0.0),
]
WIDTHS = [7, 5003] + ([32000, 103168, 151936] if DEVICE == "cuda" else [])
UNIFORMS = (0.0, 0.31, 0.77, 1 - 2.0**-40)


@pytest.fixture(params=WIDTHS)
def rows(request):
    generator = torch.Generator().manual_seed(request.param)
    numbers = [(*option, uniform) for option, uniform in itertools.product(OPTIONS, UNIFORMS)]
    return torch.randn(len(numbers), request.param, generator=generator) * 3, torch.tensor(numbers, dtype=torch.float64)


def test_rows_are_drawn_as_the_reference_draws_them(rows):
    logits, numbers = rows
    expected = draw_reference.draw_tokens(logits, numbers)
    found = draw.draw_tokens(logits.to(DEVICE), numbers.to(DEVICE)).cpu()
    for row in (found != expected).nonzero()[:, 0].tolist():
        # Sums are rounded otherwise: a uniform on the border of two tokens may go either way.
        nearest = (numbers[row, UNIFORM] + torch.tensor([-1e-6, 1e-6])).clamp(0, 1 - 1e-9)
        both = numbers[row].repeat(2, 1)
        both[:, UNIFORM] = nearest
        around = draw_reference.draw_tokens(logits[row].expand(2, -1), both)
        assert found[row] in around, (row, numbers[row], found[row], expected[row])
    assert (found == expected).float().mean() > 0.9


def test_equals_are_kept_together_and_the_first_is_the_likeliest():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]]).repeat(4, 1).to(DEVICE)
    numbers = torch.tensor(
        [[0, 0, 1, 0, 0.9], [1, 2, 1, 0, 0.9], [1, 0, 0.2, 0, 0.5], [1, 0, 1, 1.0, 0.1]], dtype=torch.float64
    )
    assert numbers.shape[1] == FIELDS
    assert draw.draw_tokens(logits, numbers.to(DEVICE)).tolist() == [1, 3, 2, 1]


def test_what_is_impossible_is_not_drawn_and_what_is_no_number_harms_nobody():
    nothing = [float("nan")] * 6
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf, -torch.inf], nothing]).repeat(4, 1).to(DEVICE)
    numbers = torch.tensor([[1, 0, 1, 0, uniform] for uniform in UNIFORMS for _ in range(2)], dtype=torch.float64)
    found = draw.draw_tokens(logits, numbers.to(DEVICE)).tolist()
    assert found[::2] == [1, 1, 3, 3]
    assert all(0 <= token < 6 for token in found[1::2])


def test_half_precision_and_no_rows():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).half()
    numbers = torch.tensor([[1, 0, 0.9, 0, 0.4]] * 3, dtype=torch.float64)
    found = draw.draw_tokens(logits.to(DEVICE), numbers.to(DEVICE)).cpu()
    assert torch.equal(found, draw_reference.draw_tokens(logits.float(), numbers))
    assert draw.draw_tokens(logits[:0].to(DEVICE), numbers[:0].to(DEVICE)).shape == (0,)
