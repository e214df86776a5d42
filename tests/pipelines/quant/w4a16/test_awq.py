import torch

from pipelines.quant.w4a16 import awq


def test_candidates_begin_with_no_scaling_and_name_it_once():
    tried = awq.candidates(torch.rand(4) + 1, torch.ones(4), [(0.5, 0.0), (0.0, 0.0)], lambda scale: scale)
    assert [(candidate.x, candidate.y) for candidate in tried] == [(0.0, 0.0), (0.5, 0.0)]
    assert torch.equal(tried[0].scale, torch.ones(4))
