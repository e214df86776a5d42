# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""4-bit weights from 16-byte loads to the registers of matrix instructions, in Gluon: see Int4Weights for their order.

Two integers of a word are floats after one instruction: under the bits of 1024 (float16) or 128 (bfloat16) a number's
lowest four bits are an integer's. That less 1024 + z is q - z, exactly.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from engine.kernels.activation import SIGMOID

# $0 to $7: two results from each of w0 to w3; $8: a word of eight q; $9: 1024 + z. The high nibble of a byte makes
# 1024 + 16 q: a sixteenth is 64 + q.
_FLOAT16 = """{
    .reg .b32 q, w, z, offset, scale, sixteenth, w0, w1, w2, w3;
    mov.b32 offset, {$9, $9};
    mov.b32 sixteenth, 0x2c002c00;
    mov.b32 z, 0x63806380;
    sub.rn.f16x2 z, z, offset;
    lop3.b32 q, $8, 0x000f000f, 0x64006400, 0xea;
    sub.rn.f16x2 w0, q, offset;
    lop3.b32 q, $8, 0x00f000f0, 0x64006400, 0xea;
    fma.rn.f16x2 w1, q, sixteenth, z;
    shr.u32 w, $8, 8;
    lop3.b32 q, w, 0x000f000f, 0x64006400, 0xea;
    sub.rn.f16x2 w2, q, offset;
    lop3.b32 q, w, 0x00f000f0, 0x64006400, 0xea;
    fma.rn.f16x2 w3, q, sixteenth, z;
"""
# $9: -(128 + z). Eight bits of a bfloat16 are too few for the sixteenths.
_BFLOAT16 = """{
    .reg .b32 q, w, offset, scale, one, w0, w1, w2, w3;
    mov.b32 offset, {$9, $9};
    mov.b32 one, 0x3f803f80;
    lop3.b32 q, $8, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 w0, q, one, offset;
    shr.u32 w, $8, 4;
    lop3.b32 q, w, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 w1, q, one, offset;
    shr.u32 w, $8, 8;
    lop3.b32 q, w, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 w2, q, one, offset;
    shr.u32 w, $8, 12;
    lop3.b32 q, w, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 w3, q, one, offset;
"""
# The same times $10, a scale.
_TIMES = "    mov.b32 scale, {$10, $10};\n" + "".join(f"    mul.rn.TYPE w{i}, w{i}, scale;\n" for i in range(4))
_APART = "".join(f"    mov.b32 {{${2 * i}, ${2 * i + 1}}}, w{i};\n" for i in range(4)) + "}"
UNPACK_FLOAT16, UNPACK_BFLOAT16 = gl.constexpr(_FLOAT16 + _APART), gl.constexpr(_BFLOAT16 + _APART)
SCALED_FLOAT16 = gl.constexpr(_FLOAT16 + _TIMES.replace("TYPE", "f16x2") + _APART)
SCALED_BFLOAT16 = gl.constexpr(_BFLOAT16 + _TIMES.replace("TYPE", "bf16x2") + _APART)
OPERANDS, SCALED_OPERANDS = gl.constexpr("=&h," * 8 + "r,h"), gl.constexpr("=&h," * 8 + "r,h,h")
EIGHT = gl.constexpr((gl.int16,) * 8)
# From one tile of inputs to the next.
WORDS, PAIRS = gl.constexpr(1024), gl.constexpr(64)


@gluon.jit
def unpack(words, offset, dtype: gl.constexpr):
    """q - z of inputs 16i + e in `dtype`, i 0..3: each [.., e], of int32 words [..] and `offsets`.

    One word at a time and whole. A loop that kept int16 would put words together again at its end, by an instruction
    for each that waits until all of them have been loaded; here two int16 as one operand would be copies of registers.
    """
    ASM: gl.constexpr = UNPACK_FLOAT16 if dtype == gl.float16 else UNPACK_BFLOAT16
    w = gl.inline_asm_elementwise(ASM, OPERANDS, [words, offset], dtype=EIGHT, is_pure=True, pack=1)
    return _pairs(w, dtype)


@gluon.jit
def unpack_scaled(words, offset, scale, dtype: gl.constexpr):
    """`unpack`, times a scale, the bits of one of `dtype` as int16, rounded once."""
    ASM: gl.constexpr = SCALED_FLOAT16 if dtype == gl.float16 else SCALED_BFLOAT16
    w = gl.inline_asm_elementwise(ASM, SCALED_OPERANDS, [words, offset, scale], dtype=EIGHT, is_pure=True, pack=1)
    return _pairs(w, dtype)


@gluon.jit
def _pairs(w, dtype: gl.constexpr):
    return (
        gl.join(w[0], w[1]).to(dtype, bitcast=True),
        gl.join(w[2], w[3]).to(dtype, bitcast=True),
        gl.join(w[4], w[5]).to(dtype, bitcast=True),
        gl.join(w[6], w[7]).to(dtype, bitcast=True),
    )


@gluon.jit
def offsets(scale_zero, dtype: gl.constexpr):
    """1024 + z as float16, or -(128 + z) as bfloat16, of words of scale and zero: their bits, int16."""
    if dtype == gl.float16:
        bits = scale_zero >> 16
    else:
        bits = ((scale_zero >> 16) & 15) | 0xC300
    return bits.to(gl.int16)


@gluon.jit
def scales(scale_zero):
    """The float16 scales of words of scale and zero, as float32."""
    return scale_zero.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def turns_apart(y, BLOCKS: gl.constexpr, COLUMNS: gl.constexpr):
    """Of [16 BLOCKS, COLUMNS] the first and the last eight rows of each block: two [8 BLOCKS, COLUMNS]. Rows r and
    r + 8 are one thread's, so no data moves."""
    apart = y.reshape([BLOCKS, 2, 8, COLUMNS]).permute([0, 2, 3, 1])
    first, last = apart.split()
    return first.reshape([8 * BLOCKS, COLUMNS]), last.reshape([8 * BLOCKS, COLUMNS])


@gluon.jit
def silu(x):
    return x * gl.inline_asm_elementwise(SIGMOID, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def rows_of(pairs, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """Scale and zero of every row [BLOCK_N], a slice of LAYOUT; no data moves."""
    # [tile of rows, w, r, half] -> [(tile of rows, w, half, r)]
    rows = pairs.reshape([BLOCK_N // 16, 8, 2]).permute([0, 2, 1]).reshape([BLOCK_N])
    return gl.convert_layout(rows, gl.SliceLayout(1, LAYOUT), assert_trivial=True)


@gluon.jit
def left_operand(half, pairs, BLOCK_N: gl.constexpr, MMA: gl.constexpr, dtype: gl.constexpr, SCALED: gl.constexpr):
    """The left operand [BLOCK_N, 64] of `dtype` from half the words of a tile, [BLOCK_N, 8] int32, times their scales
    if SCALED; no data moves."""
    rows = rows_of(pairs, BLOCK_N, gl.DotOperandLayout(0, MMA, 1))
    offset = gl.expand_dims(offsets(rows, dtype), 1)
    if SCALED:
        scale = rows.to(gl.int16)
        if dtype == gl.bfloat16:
            scale = scale.to(gl.float16, bitcast=True).to(dtype).to(gl.int16, bitcast=True)
        w = unpack_scaled(half, offset, gl.expand_dims(scale, 1), dtype)
    else:
        w = unpack(half, offset, dtype)
    joined = gl.join(gl.join(w[0], w[1]), gl.join(w[2], w[3]))  # [BLOCK_N, 8, e, i % 2, i // 2]
    joined = joined.permute([0, 4, 3, 1, 2]).reshape([BLOCK_N, 64])
    return gl.convert_layout(joined, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.constexpr_function
def bases(start, end):
    """[start, 0], [2 start, 0] ... below end."""
    found = []
    while start < end:
        found.append([start, 0])
        start *= 2
    return found


@gluon.constexpr_function
def word_layout(block_n, warps):
    """Of [(tile of rows, w, a, r, t), 4 int32]: 16 bytes a thread, a warp reading what lies together."""
    rows = block_n * 4
    registers = [[0, 1], [0, 2], [32, 0], *bases(64 * warps, rows)]
    return gl.DistributedLinearLayout(registers, bases(1, 32), bases(64, 64 * warps), [], [rows, 4])


@gluon.constexpr_function
def pair_layout(block_n, warps):
    """Of [(tile of rows, w, r), half]: a thread has its two rows; lanes that differ in t have the same."""
    rows = block_n // 2
    registers = [[0, 1], *bases(8 * warps, rows)]
    return gl.DistributedLinearLayout(registers, [[0, 0], [0, 0], *bases(1, 8)], bases(8, 8 * warps), [], [rows, 2])


@gluon.jit
def word_places(words_ptr, first_tile, tile, tiles, tile_rows, RAGGED: gl.constexpr, BLOCK_N: gl.constexpr):
    """Pointers to the int32 [BLOCK_N * 4, 4] of a tile of inputs; what follows the last rows is the last tile of rows
    again. The next tile of inputs is WORDS further."""
    LAYOUT: gl.constexpr = word_layout(BLOCK_N, gl.num_warps())
    p = gl.arange(0, BLOCK_N * 4, layout=gl.SliceLayout(1, LAYOUT))
    rows = first_tile + p // 256
    if RAGGED:
        rows = gl.minimum(rows, tile_rows - 1)
    first = ((rows * tiles + tile) * 2 + p // 32 % 2) * 128 + p // 64 % 4 * 32 + p % 32
    inner = gl.arange(0, 4, layout=gl.SliceLayout(0, LAYOUT))
    return words_ptr + (first.to(gl.int64) * 4)[:, None] + inner[None, :]


@gluon.jit
def pair_places(scale_zero_ptr, first_tile, tile, tiles, tile_rows, RAGGED: gl.constexpr, BLOCK_N: gl.constexpr):
    """Pointers to the scales and zeros int32 [BLOCK_N / 2, 2] that belong to the words of `word_places`. Those of the
    next tile of inputs are PAIRS further."""
    LAYOUT: gl.constexpr = pair_layout(BLOCK_N, gl.num_warps())
    q = gl.arange(0, BLOCK_N // 2, layout=gl.SliceLayout(1, LAYOUT))
    rows = first_tile + q // 32
    if RAGGED:
        rows = gl.minimum(rows, tile_rows - 1)
    first = (rows * tiles + tile) * 64 + q % 32 * 2
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, LAYOUT))
    return scale_zero_ptr + first[:, None] + half[None, :]


@gluon.jit
def halves(words, BLOCK_N: gl.constexpr, MMA: gl.constexpr):
    """Two [BLOCK_N, 8] int32: inputs 0 to 63 and 64 to 127 of a tile."""
    # [tile of rows, w, a, r, t, half, h] -> [(tile of rows, w, half, r), (a, t), h]
    words = words.reshape([BLOCK_N // 16, 2, 8, 4, 2, 2]).permute([0, 4, 2, 1, 3, 5])
    first, second = words.reshape([BLOCK_N, 8, 2]).split()
    LAYOUT: gl.constexpr = gl.DotOperandLayout(0, MMA, 1)
    return gl.convert_layout(first, LAYOUT, assert_trivial=True), gl.convert_layout(second, LAYOUT, assert_trivial=True)
