# ruff: noqa: RET505  (a branch of constants: the other is not compiled only if it is an else)
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,misc,assignment"
"""Rows of K and V from 16-byte loads to the registers of matrix instructions, in Gluon; no lane exchanges K or V.

In the words of mma.m16n8k16, lane 4 r + c (r 0..7, c 0..3) holds of the left operand rows r and r + 8, columns 2c,
2c + 1, 2c + 8 and 2c + 9. A sum over dimensions may be taken in any order, so each lane's operands are what it loaded.
  scores [tokens, 8] = K q: row 8 h + r is token 2 r + h (or 8 h + r, where h is said to be 8 apart). Lane (r, c) loads
  16 bytes of it, c-th of a run of 64.
  out [dims, 8] = V^T p: lane (r, c) loads the r-th part of the rows of tokens 2c, 2c + 1, 2c + 8 and 2c + 9.

A byte b with eight zeros before it is the float16 b / 2^24: a subnormal number, which matrix instructions take as any
other. (Under the bits of 1024 it would be 1024 + b, and sums of long contexts would be short of bits: matrix
instructions cut off what a float32 sum has no room for.)
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from engine.kernels.page_rows import PLAIN, TOKENS

# $2: two values of 16 bits.
HALVES = gl.constexpr("mov.b32 {$0, $1}, $2;")
# $2: four bytes of a row; two float16 of the first two, and of the last two.
BYTES = gl.constexpr("""{
    prmt.b32 $0, $2, 0, 0x4140;
    prmt.b32 $1, $2, 0, 0x4342;
}""")
# $4, $5: four bytes of two tokens' rows; of each dimension the two tokens' float16.
PAIRS = gl.constexpr("""{
    .reg .b32 low, high;
    prmt.b32 low, $4, $5, 0x5140;
    prmt.b32 high, $4, $5, 0x7362;
    prmt.b32 $0, low, 0, 0x4140;
    prmt.b32 $1, low, 0, 0x4342;
    prmt.b32 $2, high, 0, 0x4140;
    prmt.b32 $3, high, 0, 0x4342;
}""")
# $2, $3: weights of two tokens; $0, $1: those of lanes $4 and $5, in 16 bits each.
EXCHANGE_FLOAT16, EXCHANGE_BFLOAT16 = (
    gl.constexpr(f"""{{
    .reg .b32 pair;
    cvt.rn.{kind}x2.f32 pair, $3, $2;
    shfl.sync.idx.b32 $0, pair, $4, 0x1f, 0xffffffff;
    shfl.sync.idx.b32 $1, pair, $5, 0x1f, 0xffffffff;
}}""")
    for kind in ("f16", "bf16")
)


@gluon.constexpr_function
def bases(start, end, axis, rank):
    """Multiples of `start` by powers of two, below `end`, along an axis."""
    found = []
    while start < end:
        found.append([start if each == axis else 0 for each in range(rank)])
        start *= 2
    return found


@gluon.constexpr_function
def same(warps, rank):
    """The bases of warps that all hold the same, as the compiler is to think of what each of them does by itself."""
    return [[0] * rank] * (warps.bit_length() - 1)


@gluon.constexpr_function
def _tokenbases(apart):
    """Of the rows r of a matrix instruction, where rows r and r + 8 are tokens that many apart: 1 or 8."""
    return bases(2, 16, 0, 2) if apart == 1 else bases(1, 8, 0, 2)


@gluon.constexpr_function
def key_layout(block, width, warps=1, apart=1):
    """Of [tokens, words of a row]: see the module's text."""
    registers = [*bases(1, 4, 1, 2), *bases(16, width, 1, 2), [apart, 0], *bases(16, block, 0, 2)]
    lanes = [*bases(4, 16, 1, 2), *_tokenbases(apart)]
    return gl.DistributedLinearLayout(registers, lanes, same(warps, 2), [], [block, width])


@gluon.constexpr_function
def value_layout(block, width, warps=1):
    """The same of V."""
    part = min(4, width // 8)
    registers = [*bases(1, part, 1, 2), *bases(8 * part, width, 1, 2), [1, 0], *bases(8, block, 0, 2)]
    lanes = [*bases(2, 8, 0, 2), *bases(part, 8 * part, 1, 2)]
    return gl.DistributedLinearLayout(registers, lanes, same(warps, 2), [], [block, width])


@gluon.constexpr_function
def query_layout(part, dims):
    """Of a query: the dimensions whose K the lane has."""
    registers = [*bases(1, part, 0, 1), *bases(4 * part, dims, 0, 1)]
    return gl.DistributedLinearLayout(registers, [*bases(part, 4 * part, 0, 1), [0], [0], [0]], [], [], [dims])


@gluon.constexpr_function
def _step_layout(block, warps, apart):
    """Of [tokens, 2]: the scales and zero points of the tokens whose scores the lane has."""
    registers = [[0, 1], [apart, 0], *bases(16, block, 0, 2)]
    return gl.DistributedLinearLayout(registers, [[0, 0]] * 2 + _tokenbases(apart), same(warps, 2), [], [block, 2])


@gluon.constexpr_function
def score_layout(block, warps=1):
    """Of [rows, 4 copies] of scores."""
    lanes = [*bases(1, 4, 1, 2), *bases(1, 8, 0, 2)]
    return gl.DistributedLinearLayout(bases(8, block, 0, 2), lanes, same(warps, 2), [], [block, 4])


@gluon.constexpr_function
def out_layout(part, dims):
    """Of [dimensions, 4 copies] of the result."""
    registers = [*bases(1, part, 0, 2), *bases(8 * part, dims, 0, 2)]
    return gl.DistributedLinearLayout(registers, [[0, 1], [0, 2], *bases(part, 8 * part, 0, 2)], [], [], [dims, 4])


@gluon.jit
def load_rows(pages, place, LAYOUT: gl.constexpr, BLOCK: gl.constexpr, WIDTH: gl.constexpr):
    """Rows `place` and following, of WIDTH words: int32 [BLOCK, WIDTH]."""
    row = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, LAYOUT))
    word = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    return gl.load(pages + place * WIDTH + (row[:, None] * WIDTH + word[None, :]))


@gluon.jit
def load_steps(
    steps, place, STORED: gl.constexpr, BLOCK: gl.constexpr, WARPS: gl.constexpr = 1, APART: gl.constexpr = 1
):
    """The scales and zero points of tokens `place` and following: float16 [BLOCK, 2]; nothing where there are none."""
    if STORED == TOKENS:
        LAYOUT: gl.constexpr = _step_layout(BLOCK, WARPS, APART)
        row = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, LAYOUT))
        which = gl.arange(0, 2, layout=gl.SliceLayout(0, LAYOUT))
        return gl.load(steps + place * 2 + (row[:, None] * 2 + which[None, :]))
    else:
        return place


@gluon.jit
def _halves(words, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """int32 words as [ROWS, WIDTH] int16. A loop that keeps words is to keep them whole: halves are put together again
    by an instruction a word."""
    halves = gl.inline_asm_elementwise(HALVES, "=h,=h,r", [words], dtype=(gl.int16, gl.int16), is_pure=True, pack=1)
    return gl.join(halves[0], halves[1]).reshape([ROWS, WIDTH])


@gluon.jit
def key_operand(
    k,
    dtype: gl.constexpr,
    STORED: gl.constexpr,
    BLOCK: gl.constexpr,
    DIMS: gl.constexpr,
    A: gl.constexpr,
    APART: gl.constexpr = 1,
):
    """The left operand of the scores [BLOCK, DIMS]: rows and dimensions in the order of the module's text."""
    PART: gl.constexpr = 8 if STORED == PLAIN else 16
    if STORED == PLAIN:
        values = _halves(k, BLOCK, DIMS).to(dtype, bitcast=True)
    else:
        pairs = gl.inline_asm_elementwise(
            BYTES, "=r,=r,r", [_halves(k, BLOCK, DIMS // 2)], dtype=(gl.float16, gl.float16), is_pure=True, pack=2
        )
        values = gl.join(pairs[0], pairs[1]).reshape([BLOCK, DIMS // 4, 2, 2]).permute([0, 1, 3, 2])
    if APART == 1:
        values = values.reshape([BLOCK // 16, 8, 2, DIMS // (4 * PART), 4, PART // 4, 2, 2])
        values = values.permute([0, 2, 1, 3, 5, 6, 4, 7]).reshape([BLOCK, DIMS])
    else:
        values = values.reshape([BLOCK, DIMS // (4 * PART), 4, PART // 4, 2, 2])
        values = values.permute([0, 1, 3, 4, 2, 5]).reshape([BLOCK, DIMS])
    return gl.convert_layout(values, A, assert_trivial=True)


@gluon.jit
def value_operand(
    v, dtype: gl.constexpr, STORED: gl.constexpr, BLOCK: gl.constexpr, DIMS: gl.constexpr, A: gl.constexpr
):
    """The left operand of the result [DIMS, BLOCK]."""
    PART: gl.constexpr = 8 if STORED == PLAIN else DIMS // 8
    if STORED == PLAIN:
        values = _halves(v, BLOCK, DIMS).to(dtype, bitcast=True)
    else:
        even, odd = _halves(v, BLOCK, DIMS // 2).reshape([BLOCK // 2, 2, DIMS // 2]).permute([0, 2, 1]).split()
        each = gl.inline_asm_elementwise(
            PAIRS,
            "=&r,=&r,=&r,=&r,r,r",
            [even, odd],
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
            is_pure=True,
            pack=2,
        )
        values = gl.join(gl.join(each[0], each[1]), gl.join(each[2], each[3]))
        values = values.reshape([BLOCK // 2, DIMS // 4, 2, 2, 2]).permute([0, 2, 1, 4, 3])
    values = values.reshape([BLOCK, DIMS // (8 * PART), 8, PART]).permute([1, 3, 2, 0]).reshape([DIMS, BLOCK])
    return gl.convert_layout(values, A, assert_trivial=True)


@gluon.jit
def _exchange(p, lane, dtype: gl.constexpr):
    """Pairs of weights as `dtype` in two other lanes, whose numbers are pairs too."""
    if dtype == gl.float16:
        return gl.inline_asm_elementwise(
            EXCHANGE_FLOAT16,
            "=&r,=&r,r,r,r,r",
            [p, lane],
            dtype=(gl.float16, gl.float16),
            is_pure=False,
            pack=2,
        )
    else:
        return gl.inline_asm_elementwise(
            EXCHANGE_BFLOAT16,
            "=&r,=&r,r,r,r,r",
            [p, lane],
            dtype=(gl.bfloat16, gl.bfloat16),
            is_pure=False,
            pack=2,
        )


@gluon.jit
def weight_operand(p, BLOCK: gl.constexpr, dtype: gl.constexpr, B: gl.constexpr):
    """The right operand [BLOCK, 8] of weights [BLOCK, 4] in the order of the scores' rows, in eight equal columns.

    Lane (r, c) has those of tokens 2 r and 2 r + 1 and needs those of lanes (c, any) and (c + 4, any).
    """
    LAYOUT: gl.constexpr = score_layout(BLOCK)
    row = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, LAYOUT))
    copy = gl.arange(0, 4, layout=gl.SliceLayout(0, LAYOUT))
    lane = (row // 8 % 2 * 16)[:, None] + (copy * 4)[None, :]
    # [block, half, r, c] -> [block, r, c, half]
    p = p.reshape([BLOCK // 16, 2, 8, 4]).permute([0, 2, 3, 1])
    lane = lane.reshape([BLOCK // 16, 2, 8, 4]).permute([0, 2, 3, 1])
    first, second = _exchange(p, lane, dtype)
    # [block, column, c, half, 8 tokens] -> [(block, 8 tokens, c, half), column]
    p = gl.join(first, second).permute([0, 4, 2, 3, 1]).reshape([BLOCK, 8])
    return gl.convert_layout(p, B, assert_trivial=True)


@gluon.jit
def of_tokens(steps, BLOCK: gl.constexpr, WARPS: gl.constexpr = 1, APART: gl.constexpr = 1):
    """Scales and zero points [BLOCK, 1] float32, in the order of the scores' rows."""
    LAYOUT: gl.constexpr = score_layout(BLOCK, WARPS)
    steps = steps.to(gl.float32)
    if APART == 1:
        steps = steps.reshape([BLOCK // 16, 8, 2, 2]).permute([0, 2, 1, 3]).reshape([BLOCK, 2])
    scale, zero = steps.split()
    scale = gl.convert_layout(scale, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    zero = gl.convert_layout(zero, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    return gl.expand_dims(scale, 1), gl.expand_dims(zero, 1)


@gluon.jit
def natural(acc, PART: gl.constexpr, DIMS: gl.constexpr, OUT: gl.constexpr):
    """Sums [DIMS, 8] of `value_operand`'s rows in the order of the dimensions: [DIMS, 4], equal columns."""
    sums, _ = acc.reshape([DIMS // (8 * PART), PART, 8, 4, 2]).permute([0, 2, 1, 3, 4]).reshape([DIMS, 4, 2]).split()
    return gl.convert_layout(sums, OUT, assert_trivial=True)
