"""Padded steps with the kernels of attention: interpreted here, compiled (as all others) where there is a GPU."""

import pytest
import torch

from engine.kernels import ops
from engine.models.decoder import Decoder
from tests.engine.kernels.triton_device import DEVICE
from tests.engine.models.tiny import random_weights, tiny_config
from tests.engine.runtime.test_mixed_steps import Both, scales_of


@pytest.fixture(autouse=True)
def attention_by_kernels(monkeypatch):
    if DEVICE == "cpu":  # queries alone have three dimensions where it is asked
        monkeypatch.setattr(ops, "on_kernels", lambda tensor: tensor.dim() == 3)


@pytest.mark.parametrize(("kv", "kv_heads"), [("kv16", 2), ("kv8", 2), ("kv8-token", 4)])
def test_a_padded_step_computes_what_the_plan_does(kv, kv_heads):
    window = 9 if kv == "kv8" else None
    config = tiny_config(head_dim=16, num_layers=1, num_kv_heads=kv_heads, sliding_window=window)
    model = Decoder(config, random_weights(config), device=DEVICE, dtype=torch.float32)
    kinds = Both(model, scales=scales_of(config, kv)).serve([21, 5], new=2)
    assert kinds == {(False, True), (True, False), (True, True)}
