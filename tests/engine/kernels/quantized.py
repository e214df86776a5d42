"""Random quantized weights for the tests of matrix products."""

import torch

from engine.kernels.int4_weights import Int4Weights


def awq(n, k, group, device="cpu", seed=0):
    """qweight, qzeros, scales of a weight [n, k] whose entries have a magnitude near 1."""
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2**31), 2**31
    qweight = torch.randint(low, high, (k, n // 8), generator=generator).to(torch.int32)
    qzeros = torch.randint(low, high, (k // group, n // 8), generator=generator).to(torch.int32)
    scales = (torch.rand(k // group, n, generator=generator) * 0.2 + 0.05).half()
    return tuple(tensor.to(device) for tensor in (qweight, qzeros, scales))


def int4(n, k, group, device="cpu", seed=0):
    return Int4Weights.pack(*awq(n, k, group, device, seed))


def normal(*shape, dtype=torch.float16, device="cpu", seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def codes(*shape, device="cpu", seed=2):
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8).to(device)


def error(y, expected):
    """|y - expected| / |expected| in float64; not a number where y has one that is not finite."""
    y, expected = y.double().cpu(), expected.double().cpu()
    assert y.shape == expected.shape and torch.isfinite(y).all()
    return float((y - expected).norm() / expected.norm())
