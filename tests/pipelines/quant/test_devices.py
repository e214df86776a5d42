"""Where there is no GPU: everything that the searches make is made where their inputs are, not where torch makes it."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from engine.kernels import reference
from engine.models import batch
from pipelines.quant import w4a16, w8a8
from pipelines.recipe_fields import weights_part
from pipelines.schema import Weights
from tests.pipelines.tiny_checkpoint import write_tiny_checkpoint

MAKERS = {
    getattr(torch, name)
    for name in ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "tensor", "zeros")
}


class DevicesNamed(TorchFunctionMode):
    """Refuses a new tensor whose device is not said. One number alone may be anywhere: it goes with any device; and a
    batch is made of lists, and moved as a whole."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        moved = sys._getframe(1).f_code.co_filename == batch.__file__
        if func in MAKERS and not (kwargs or {}).get("device") and made.dim() and not moved:
            raise AssertionError(f"torch.{func.__name__} makes {tuple(made.shape)} on no device in particular")
        return made


class InOrder:
    """Workers of this thread: modes are a thread's own."""

    def in_order(self, one, count):
        yield from map(one, range(count))


def test_the_mode_refuses():
    with DevicesNamed(), pytest.raises(AssertionError, match=r"torch.ones makes \(2,\)"):
        torch.ones(2)
    with DevicesNamed():
        torch.ones(2, device="cpu")
        torch.tensor(1.0)


@pytest.mark.parametrize(
    ("package", "asked"),
    [
        (w8a8, {"name": "w8a8", "alphas": [0.3, 0.6]}),
        (w4a16, {"name": "w4a16", "group_size": 32, "method": "awq+gptq", "head": "int4"}),
        (w4a16, {"name": "w4a16", "group_size": 32, "method": "awq", "symmetric": True, "head": "int8"}),
        (w4a16, {"name": "w4a16", "group_size": 32, "method": "rtn"}),
    ],
    ids=["w8a8", "awq+gptq", "awq", "rtn"],
)
def test_a_search_makes_tensors_where_it_works(package, asked, tmp_path: Path, monkeypatch):
    source = write_tiny_checkpoint(tmp_path / "model", attention_bias=True)
    calibration, out = tmp_path / "calibration", tmp_path / "out"
    calibration.mkdir()
    out.mkdir()
    blocks = torch.randint(0, 100, (3, 24), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    save_file({"tokens": blocks}, calibration / "blocks.safetensors")
    monkeypatch.setattr(package, "side_by_side", lambda **_: contextlib.nullcontext(InOrder()))
    monkeypatch.setattr(reference, "_int_mm_is_exact", lambda: False)  # int8 products are a GPU's then
    with DevicesNamed():
        package.quantize(weights_part(Weights(**asked)), source, calibration, out)
    assert (out / "weights.safetensors").stat().st_size
