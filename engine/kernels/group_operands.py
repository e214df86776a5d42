# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,misc,assignment"
"""Query heads of a group as columns of matrix instructions, in Gluon; K and V are `page_fragments`'.

In the words of mma.m16n8k16, lane 4 r + c holds of a right operand column r, rows 2c, 2c + 1, 2c + 8 and 2c + 9, and of
products rows r and r + 8, columns 2c and 2c + 1. All warps of a program hold the same, or the compiler thinks so.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from engine.kernels.decode_fragments import UNIT, ZERO
from engine.kernels.page_fragments import bases, same
from engine.kernels.page_rows import CHANNELS, PLAIN

# $1, $2: a row's weights in two columns; $0: what a transposed matrix of 8 by 8 of them has there.
TRANSPOSED_FLOAT16, TRANSPOSED_BFLOAT16 = (
    gl.constexpr(f"""{{
    .reg .b32 pair;
    cvt.rn.{kind}x2.f32 pair, $2, $1;
    movmatrix.sync.aligned.m8n8.trans.b16 $0, pair;
}}""")
    for kind in ("f16", "bf16")
)


@gluon.constexpr_function
def _query_layout(part, dims, warps):
    """Of [dimensions, 8 query heads]: head r, and the dimensions whose K the lane has."""
    registers = [*bases(1, part, 0, 2), *bases(4 * part, dims, 0, 2)]
    lanes = [*bases(part, 4 * part, 0, 2), *bases(1, 8, 1, 2)]
    return gl.DistributedLinearLayout(registers, lanes, same(warps, 2), [], [dims, 8])


@gluon.constexpr_function
def out_layout(part, dims, warps):
    """Of [dimensions, 8 query heads] of the result: of one warp what its lanes have, else shared out among all."""
    if warps > 1:
        return gl.BlockedLayout([dims // 32, 1], [32, 1], [1, warps], [0, 1])
    registers = [*bases(1, part, 0, 2), *bases(8 * part, dims, 0, 2), [0, 1]]
    return gl.DistributedLinearLayout(registers, [[0, 2], [0, 4], *bases(part, 8 * part, 0, 2)], [], [], [dims, 8])


@gluon.constexpr_function
def sums_layout(warps):
    """Of [8 rows, 8 columns] of products."""
    return gl.DistributedLinearLayout([[0, 1]], [[0, 2], [0, 4], *bases(1, 8, 0, 2)], same(warps, 2), [], [8, 8])


@gluon.constexpr_function
def lines_layout(lines, warps):
    """Of as many lines, a lane each as far as they go."""
    lanes = [[base] if base < lines else [0] for base in (1, 2, 4, 8, 16)]
    return gl.DistributedLinearLayout(bases(32, lines, 0, 1), lanes, same(warps, 1), [], [lines])


@gluon.jit
def query_operand(
    query,
    key_scale,
    factor,
    STORED: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK: gl.constexpr,
    DIMS: gl.constexpr,
    WARPS: gl.constexpr,
    dtype: gl.constexpr,
    MMA: gl.constexpr,
):
    """The right operand of the scores [DIMS, 8], what its products are to be multiplied by, what they begin with [8].

    See `decode_fragments`. Heads beyond the group are zeros. Beside bytes the largest of all heads has a magnitude of 1
    to 2.
    """
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    PART: gl.constexpr = 8 if STORED == PLAIN else 16
    LAYOUT: gl.constexpr = _query_layout(PART, DIMS, WARPS)
    dim = gl.arange(0, DIMS, layout=gl.SliceLayout(1, LAYOUT))
    head = gl.arange(0, 8, layout=gl.SliceLayout(0, LAYOUT))
    q = gl.load(query + (head[None, :] * DIMS + dim[:, None]), mask=(head < GROUP)[None, :], other=0.0)
    start = gl.zeros([8], gl.float32, gl.SliceLayout(0, MMA))
    if STORED == CHANNELS or q.dtype != dtype:
        wide = q.to(gl.float32)
        if STORED == CHANNELS:
            wide *= gl.load(key_scale + dim)[:, None]
        # 2^e of the largest, and 2^-e: where all are zeros 2^127 of them.
        power = gl.max(gl.max(gl.abs(wide), 0).to(gl.int32, bitcast=True), 0) & 0x7F800000
        q = (wide * (0x7F000000 - power).to(gl.float32, bitcast=True)).to(dtype)
        factor *= power.to(gl.float32, bitcast=True)
    q = q.reshape([DIMS // (4 * PART), 4, PART // 4, 2, 2, 8]).permute([0, 2, 3, 1, 4, 5]).reshape([DIMS, 8])
    q = gl.convert_layout(q, B, assert_trivial=True)
    if STORED != PLAIN:
        rows = mma_v2(gl.full([16, DIMS], -ZERO * UNIT, dtype, A), q, gl.zeros([16, 8], gl.float32, MMA))
        start = gl.max(rows, 0)
        factor *= 1.0 / UNIT
    return q, factor, start


@gluon.jit
def weight_operand(p, BLOCK: gl.constexpr, dtype: gl.constexpr, B: gl.constexpr):
    """The right operand [BLOCK, 8] of weights [BLOCK, 8]: lane (r, c) has columns 2 c and 2 c + 1 of row r and needs
    rows 2 c and 2 c + 1 of column r."""
    if dtype == gl.float16:
        p = gl.inline_asm_elementwise(TRANSPOSED_FLOAT16, "=r,r,r", [p], dtype=gl.float16, is_pure=False, pack=2)
    else:
        p = gl.inline_asm_elementwise(TRANSPOSED_BFLOAT16, "=r,r,r", [p], dtype=gl.bfloat16, is_pure=False, pack=2)
    p = p.reshape([BLOCK // 8, 8, 8]).permute([0, 2, 1]).reshape([BLOCK, 8])
    return gl.convert_layout(p, B, assert_trivial=True)


@gluon.jit
def in_turns(acc, PART: gl.constexpr, DIMS: gl.constexpr):
    """Sums [DIMS, 8] of `value_operand`'s rows in the order of the dimensions."""
    return acc.reshape([DIMS // (8 * PART), PART, 8, 8]).permute([0, 2, 1, 3]).reshape([DIMS, 8])
