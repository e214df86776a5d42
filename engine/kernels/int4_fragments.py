# ruff: noqa: RET505  (a branch of constants: the other is not compiled only if it is an else)
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""4-bit weights from 16-byte loads to the registers of matrix instructions, in Gluon: see Int4Weights for their order.

Two integers of a word are floats after one instruction: under the bits of 1024 (float16) or 128 (bfloat16) a number's
lowest four bits are an integer's. That less 1024 + z is q - z, exactly.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from engine.kernels.activation import SIGMOID

# $4: a word of eight q; $5: 1024 + z twice. The high nibble of a byte makes 1024 + 16 q: a sixteenth is 64 + q.
_FLOAT16 = """{
    .reg .b32 q, w, z, sixteenth;
    mov.b32 sixteenth, 0x2c002c00;
    mov.b32 z, 0x63806380;
    sub.rn.f16x2 z, z, $5;
    lop3.b32 q, $4, 0x000f000f, 0x64006400, 0xea;
    sub.rn.f16x2 $0, q, $5;
    lop3.b32 q, $4, 0x00f000f0, 0x64006400, 0xea;
    fma.rn.f16x2 $1, q, sixteenth, z;
    shr.u32 w, $4, 8;
    lop3.b32 q, w, 0x000f000f, 0x64006400, 0xea;
    sub.rn.f16x2 $2, q, $5;
    lop3.b32 q, w, 0x00f000f0, 0x64006400, 0xea;
    fma.rn.f16x2 $3, q, sixteenth, z;
}"""
# $5: -(128 + z) twice. Eight bits of a bfloat16 are too few for the sixteenths.
_BFLOAT16 = """{
    .reg .b32 q, w, one;
    mov.b32 one, 0x3f803f80;
    lop3.b32 q, $4, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, q, one, $5;
    shr.u32 w, $4, 4;
    lop3.b32 q, w, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $1, q, one, $5;
    shr.u32 w, $4, 8;
    lop3.b32 q, w, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $2, q, one, $5;
    shr.u32 w, $4, 12;
    lop3.b32 q, w, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $3, q, one, $5;
}"""
# $2: two values of 16 bits.
HALVES = gl.constexpr("mov.b32 {$0, $1}, $2;")
# From one tile of inputs to the next.
WORDS, PAIRS = gl.constexpr(1024), gl.constexpr(64)
UNPACK_FLOAT16, UNPACK_BFLOAT16 = gl.constexpr(_FLOAT16), gl.constexpr(_BFLOAT16)
# The same times $6, a scale twice.
_TIMES = "".join(f"    mul.rn.TYPE ${i}, ${i}, $6;\n" for i in range(4)) + "}"
SCALED_FLOAT16 = gl.constexpr(_FLOAT16[:-1] + _TIMES.replace("TYPE", "f16x2"))
SCALED_BFLOAT16 = gl.constexpr(_BFLOAT16[:-1] + _TIMES.replace("TYPE", "bf16x2"))


@gluon.jit
def int16_of(words):
    """int32 [..] as int16 [.., 2]; no data moves.

    A loop is to keep words whole: int16 would be put together again at its end, by an instruction a word that waits
    until all of them have been loaded.
    """
    halves = gl.inline_asm_elementwise(HALVES, "=h,=h,r", [words], dtype=(gl.int16, gl.int16), is_pure=True, pack=1)
    return gl.join(halves[0], halves[1])


@gluon.jit
def unpack(words, offset, dtype: gl.constexpr):
    """q - z of inputs 16i and up, i 0..3, in `dtype`: int16 words and `offsets` of one shape.

    Each int16 is half of a word; two that are neighbours in registers are one operand.
    """
    if dtype == gl.float16:
        return gl.inline_asm_elementwise(
            UNPACK_FLOAT16,
            "=&r,=&r,=&r,=&r,r,r",
            [words, offset],
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        return gl.inline_asm_elementwise(
            UNPACK_BFLOAT16,
            "=&r,=&r,=&r,=&r,r,r",
            [words, offset],
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
            is_pure=True,
            pack=2,
        )


@gluon.jit
def unpack_scaled(words, offset, scale, dtype: gl.constexpr):
    """`unpack`, times a scale of `dtype`, rounded once."""
    if dtype == gl.float16:
        return gl.inline_asm_elementwise(
            SCALED_FLOAT16,
            "=&r,=&r,=&r,=&r,r,r,r",
            [words, offset, scale],
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        return gl.inline_asm_elementwise(
            SCALED_BFLOAT16,
            "=&r,=&r,=&r,=&r,r,r,r",
            [words, offset, scale],
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
            is_pure=True,
            pack=2,
        )


@gluon.jit
def offsets(scale_zero, dtype: gl.constexpr):
    """1024 + z as float16, or -(128 + z) as bfloat16, of words of scale and zero."""
    if dtype == gl.float16:
        bits = scale_zero >> 16
    else:
        bits = ((scale_zero >> 16) & 15) | 0xC300
    return bits.to(gl.int16).to(dtype, bitcast=True)


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
def left_operand(half, pairs, BLOCK_N: gl.constexpr, A: gl.constexpr, dtype: gl.constexpr, SCALED: gl.constexpr):
    """[BLOCK_N, 64] of `dtype` from half the words of a tile, [BLOCK_N, 16] int16, times their scales if SCALED; no
    data moves."""
    rows = rows_of(pairs, BLOCK_N, A)
    offset = gl.expand_dims(offsets(rows, dtype), 1)
    if SCALED:
        scale = rows.to(gl.int16).to(gl.float16, bitcast=True).to(dtype)
        w = unpack_scaled(half, offset, gl.expand_dims(scale, 1), dtype)
    else:
        w = unpack(half, offset, dtype)
    joined = gl.join(gl.join(w[0], w[1]), gl.join(w[2], w[3]))  # [BLOCK_N, 16, i % 2, i // 2]
    joined = joined.permute([0, 3, 2, 1]).reshape([BLOCK_N, 64])
    return gl.convert_layout(joined, A, assert_trivial=True)


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
def halves(words, BLOCK_N: gl.constexpr, A: gl.constexpr):
    """Two [BLOCK_N, 16] int16: inputs 0 to 63 and 64 to 127 of a tile."""
    # [tile of rows, w, a, r, t, half, h] -> [(tile of rows, w, half, r), (a, t), h]
    words = words.reshape([BLOCK_N // 16, 2, 8, 4, 2, 2]).permute([0, 4, 2, 1, 3, 5])
    first, second = words.reshape([BLOCK_N, 8, 2]).split()
    first, second = int16_of(first).reshape([BLOCK_N, 16]), int16_of(second).reshape([BLOCK_N, 16])
    return gl.convert_layout(first, A, assert_trivial=True), gl.convert_layout(second, A, assert_trivial=True)
