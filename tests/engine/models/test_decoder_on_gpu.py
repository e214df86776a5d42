"""The decoder on a GPU against the one of a CPU, from the same weights: whole prompts, and tokens one by one."""

from dataclasses import replace

import pytest
import torch

from engine.kernels.reference import unpack_int4
from engine.models import names
from engine.models.decoder import Decoder
from tests.engine.models.test_decoder import token_ids
from tests.engine.models.tiny import PagedRun, quantized, random_weights, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
CONFIG = tiny_config(
    vocab_size=320, hidden_size=256, head_dim=64, num_heads=4, num_kv_heads=2, intermediate_size=512, qkv_bias=True
)


def as_dense(weights):
    """The same weights without 4-bit tensors."""
    dense = {name: tensor for name, tensor in weights.items() if not name.endswith(names.QUANTIZED)}
    for name in (name.removesuffix(".qweight") for name in weights if name.endswith(".qweight")):
        parts = (weights[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
        dense[f"{name}.weight"] = unpack_int4(*parts).float()
    return dense


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["fp16", "w4a16", "w8a8"])
def test_logits_are_those_of_a_cpu(kind, bias, deterministic):
    config = replace(CONFIG, qkv_bias=bias)
    weights = quantized(kind, random_weights(config), config, group=128)
    exact = Decoder(config, as_dense(weights) if kind == "w4a16" else weights, device="cpu", dtype=torch.float32)
    model = Decoder(config, weights, device="cuda", dtype=torch.float16, deterministic=deterministic)
    sequences = [token_ids(config.vocab_size, length, seed=length) for length in (70, 3)]
    runs = [PagedRun(each, sequences) for each in (exact, model)]
    for run in runs:
        run.step({1: 1, 0: 64})
        run.step({0: 5, 1: 1})
        run.step({0: 1, 1: 1})
    for number in range(2):
        expected, found = (run.result(number).float().cpu() for run in runs)
        error = (found - expected).norm() / expected.norm()
        assert error < (0.03 if kind == "w8a8" else 0.01), number
