# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,misc"
"""Order of what a kernel in Gluon does: loads that stay where they are written, and barriers."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Its name depends on the version of Triton.
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


@gluon.jit
def in_order(WARPS: gl.constexpr):
    """Nothing is loaded later than here that stands before it: ptxas moves loads to the end of a block of code, behind
    all that is computed there, but none past what orders the memory of a warp's lanes. It costs no instruction."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    lane = gl.arange(0, 32 * WARPS, layout=LAYOUT)
    gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1
    )
