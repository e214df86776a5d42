"""The kernel against the loop that it stands for: under Triton's interpreter here, compiled where there is a GPU."""

import os
import subprocess
import sys

import pytest
import torch

CASE = """
import torch
from pipelines.quant.w4a16.feedback import round_block
from pipelines.quant.w4a16.feedback_kernel import round_block as kernel
from pipelines.quant.w4a16.rounding import levels
device = "DEVICE"
generator = torch.Generator().manual_seed(0)
for group, out in ((32, 40), (96, 33), (8, 1), (64, 70)):
    block = torch.randn(group, out, generator=generator) * torch.logspace(-2, 2, out)
    corner = torch.randn(group, group, generator=generator).triu() * 0.2
    corner.diagonal().copy_(torch.rand(group, generator=generator) + 0.5)
    scales, zeros = levels(block.t())
    expected = round_block(block.clone(), corner, scales, zeros)
    codes, errors = (x.cpu() for x in kernel(*(x.to(device) for x in (block, corner, scales, zeros))))
    # A half that the other order of operations turns the other way moves the columns after it.
    same = (codes == expected[0]).all(dim=0)
    assert same.float().mean() > 0.97, (group, out, same.float().mean())
    torch.testing.assert_close(errors[:, same], expected[1][:, same], rtol=1e-3, atol=1e-4)
print("equal")
"""


def run(device, **environment):
    command = [sys.executable, "-c", CASE.replace("DEVICE", device)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def test_the_kernel_is_the_loop():
    pytest.importorskip("triton", reason="Triton is not installed")
    done = run("cpu", TRITON_INTERPRET="1")
    assert done.stdout == "equal\n", done.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_is_the_loop_on_a_gpu():
    done = run("cuda")
    assert done.stdout == "equal\n", done.stderr[-2000:]
