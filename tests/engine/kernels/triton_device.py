"""Where tests run Triton kernels: on the GPU, or on a CPU under Triton's interpreter.

Kernels are interpreted when the variable is set before their modules are imported; import this module first.
"""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton.runtime import interpreter

    given = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, *scope):
        """Triton 3.6 keeps a scalar as an array of one element, which NumPy 2.4 does not turn into an integer."""
        given(tensor, *scope)
        index = lambda self: int(self.handle.data.item())  # noqa: E731
        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patch_lang_tensor
