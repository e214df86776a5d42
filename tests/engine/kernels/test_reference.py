"""Every op against float64 arithmetic written out, and each comparison is shown to refuse a wrong answer.
(Above 300 lines, as the reference is.)
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from engine.kernels import reference as ops
from engine.models.cache import KVPages


@dataclass(frozen=True)
class Queries:
    query_starts: Tensor
    context_lens: Tensor
    page_table: Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention_by_loops(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None) -> Tensor:
    """query [T, heads, D] are the last positions of key, value [L, kv_heads, D]; float64."""
    query, key, value = query.double(), key.double(), value.double()
    tokens, heads, _ = query.shape
    group = heads // key.shape[1]
    out = torch.zeros_like(query)
    for t in range(tokens):
        end = len(key) - tokens + t + 1
        seen = range(0 if window is None else max(0, end - window), end)
        for head in range(heads):
            scores = [float(query[t, head] @ key[s, head // group]) * scale for s in seen]
            top = max(scores)
            weights = [math.exp(score - top) for score in scores]
            for weight, s in zip(weights, seen, strict=True):
                out[t, head] += weight / sum(weights) * value[s, head // group]
    return out


def test_rms_norm_against_float64():
    x, weight = normal(5, 48) * 3, normal(48, seed=1)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 0.1).sqrt() * weight.double()
    assert (ops.rms_norm(x, weight, 0.1) - exact).abs().max() < 1e-5
    eps_outside = x.double() / (x.double().pow(2).mean(-1, keepdim=True).sqrt() + 0.1) * weight.double()
    assert (eps_outside - exact).abs().max() > 1e-3


def test_rms_norm_of_float16_sums_in_float32():
    x = torch.full((1, 64), 300.0, dtype=torch.float16)  # its square does not fit in float16
    assert torch.equal(ops.rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-5), torch.ones_like(x))


def test_silu_and_mul_takes_the_gate_from_the_first_half():
    gate_up = normal(3, 10)
    gate, up = gate_up.double().chunk(2, dim=-1)
    exact = gate / (1 + (-gate).exp()) * up
    assert (ops.silu_and_mul(gate_up) - exact).abs().max() < 1e-6
    assert (ops.silu_and_mul(torch.cat((up, gate), dim=-1).float()) - exact).abs().max() > 1e-2


@pytest.mark.parametrize("head_dim", [2, 8, 48])
def test_apply_rope_against_complex_rotation(head_dim):
    q, k = normal(4, 6, head_dim), normal(4, 2, head_dim, seed=1)
    angles = normal(4, head_dim // 2, seed=2) * 10
    turned = ops.apply_rope(q, k, angles.cos(), angles.sin())
    for x, y in zip((q, k), turned, strict=True):
        first, second = x.double().chunk(2, dim=-1)
        rotated = torch.complex(first, second) * torch.exp(1j * angles.double())[:, None]
        assert (y - torch.cat((rotated.real, rotated.imag), dim=-1)).abs().max() < 1e-5
    backwards = ops.apply_rope(q, k, angles.cos(), -angles.sin())
    assert (backwards[0] - turned[0]).abs().max() > 1e-2


def test_apply_rope_scales_queries_alone():
    q, k = normal(4, 6, 8), normal(4, 2, 8, seed=1)
    angles, scale = normal(4, 4, seed=2), torch.tensor([1.0, 1.5, 2.0, 0.5])
    plain = ops.apply_rope(q, k, angles.cos(), angles.sin())
    scaled = ops.apply_rope(q, k, angles.cos(), angles.sin(), scale)
    assert torch.allclose(scaled[0], plain[0] * scale[:, None, None], atol=1e-6) and torch.equal(scaled[1], plain[1])
    assert not torch.allclose(scaled[0], plain[0], atol=1e-2)


def test_quantize_kv_rounds_half_to_even_and_clamps():
    scale, zero = torch.tensor(0.5), torch.tensor(1.0)
    x = torch.tensor([1.0, 1.25, 1.75, 0.75, 1e9, -1e9, 64.75, -63.0])
    expected = torch.tensor([128, 128, 130, 128, 255, 0, 255, 0], dtype=torch.uint8)
    assert torch.equal(ops.quantize_kv(x, scale, zero), expected)
    assert torch.equal(
        ops.dequantize_kv(expected, scale, zero), torch.tensor([1.0, 1.0, 2.0, 1.0, 64.5, -63.0, 64.5, -63.0])
    )


def test_kv_round_trip_errs_by_half_a_step_at_most():
    x = normal(1000)
    low, high = x.min(), x.max()
    scale, zero = (high - low) / 255, (high + low) / 2
    error = (ops.dequantize_kv(ops.quantize_kv(x, scale, zero), scale, zero) - x).abs()
    assert 0 < error.max() <= scale * 0.5001


def filled_pages(contexts, kv_heads, head_dim, page_len, *, scales=None):
    """Pages in random places, junk elsewhere; contexts are [(key, value)] of [L, kv_heads, D]. Also the page table."""
    needed = [-(-len(key) // page_len) for key, _ in contexts]
    num_pages = sum(needed) + 3
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(7)).tolist()
    shape = (num_pages, kv_heads, page_len, head_dim)
    if scales is None:
        pages = KVPages(key=torch.full(shape, 1e4), value=torch.full(shape, 1e4))
    elif scales == "token":
        junk = [torch.full(shape, 255, dtype=torch.uint8) for _ in range(2)]
        steps = [torch.full((*shape[:3], 2), 1e4, dtype=torch.float16) for _ in range(2)]
        pages = KVPages(key=junk[0], value=junk[1], key_steps=steps[0], value_steps=steps[1])
    else:
        junk = [torch.full(shape, 255, dtype=torch.uint8) for _ in range(2)]
        pages = KVPages(
            key=junk[0],
            value=junk[1],
            key_scale=scales[0],
            key_zero=scales[1],
            value_scale=scales[2],
            value_zero=scales[3],
        )
    table = torch.full((len(contexts), max(needed) + 1), -1, dtype=torch.int32)
    for row, (key, value) in enumerate(contexts):
        for p in range(needed[row]):
            table[row, p] = order.pop()
        places = torch.arange(len(key))
        slots = table[row, places // page_len].long() * page_len + places % page_len
        ops.write_kv(key, value, pages, slots)
    return pages, table


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page_len"), [(4, 4, 8, 4), (6, 2, 6, 5), (8, 1, 2, 16)])
def test_paged_attention_of_a_mixed_batch(heads, kv_heads, head_dim, page_len):
    contexts = [
        (normal(length, kv_heads, head_dim, seed=i), normal(length, kv_heads, head_dim, seed=50 + i))
        for i, length in enumerate((9, 1, 17, 4, 12))
    ]
    tokens = [1, 1, 5, 4, 1]
    query = normal(sum(tokens), heads, head_dim, seed=99)
    starts = torch.tensor([0, *torch.tensor(tokens).cumsum(0).tolist()], dtype=torch.int32)
    pages, table = filled_pages(contexts, kv_heads, head_dim, page_len)
    lens = torch.tensor([len(key) for key, _ in contexts], dtype=torch.int32)
    out = ops.paged_attention(query, pages, Queries(starts, lens, table), 0.3)
    for b, (key, value) in enumerate(contexts):
        rows = slice(int(starts[b]), int(starts[b + 1]))
        assert (out[rows] - attention_by_loops(query[rows], key, value, 0.3)).abs().max() < 1e-5
        alone = Queries(torch.tensor([0, tokens[b]], dtype=torch.int32), lens[b : b + 1], table[b : b + 1])
        assert (ops.paged_attention(query[rows], pages, alone, 0.3) - out[rows]).abs().max() < 1e-6
    one_short = Queries(starts[:2], lens[:1] - 1, table[:1])
    assert (ops.paged_attention(query[:1], pages, one_short, 0.3) - out[:1]).norm() > 1e-3


@pytest.mark.parametrize("window", [1, 3, 8, 100])
def test_a_token_sees_its_window(window):
    contexts = [(normal(n, 2, 4, seed=n), normal(n, 2, 4, seed=50 + n)) for n in (9, 17, 5)]
    tokens = [1, 11, 5]
    query = normal(sum(tokens), 4, 4, seed=99)
    starts = torch.tensor([0, 1, 12, 17], dtype=torch.int32)
    pages, table = filled_pages(contexts, 2, 4, 4)
    batch = Queries(starts, torch.tensor([9, 17, 5], dtype=torch.int32), table)
    out = ops.paged_attention(query, pages, batch, 0.3, window)
    for b, (key, value) in enumerate(contexts):
        rows = slice(int(starts[b]), int(starts[b + 1]))
        assert (out[rows] - attention_by_loops(query[rows], key, value, 0.3, window)).abs().max() < 1e-5
        if window < 5:
            assert (out[rows] - attention_by_loops(query[rows], key, value, 0.3, window + 1)).abs().max() > 1e-3


@pytest.mark.parametrize("window", [1, 7, ops.QUERY_BLOCK, ops.QUERY_BLOCK + 5])
def test_windows_across_query_blocks(window):
    length = 2 * ops.QUERY_BLOCK + 9
    q, k, v = normal(length, 2, 4), normal(length, 1, 4, seed=1), normal(length, 1, 4, seed=2)
    out = ops.causal_attention(q, k, v, torch.tensor([0, length]), 0.5, window)
    scores = torch.einsum("thd,sd->hts", q.double(), k[:, 0].double()) * 0.5
    distance = torch.arange(length)[:, None] - torch.arange(length)
    scores = scores.masked_fill((distance < 0) | (distance >= window), -math.inf)
    exact = torch.einsum("hts,sd->thd", scores.softmax(-1), v[:, 0].double())
    assert (out - exact).abs().max() < 1e-5


@pytest.mark.parametrize("gathered_floats", [1, 8 * 100, 1 << 18])
def test_paged_attention_of_many_decoding_sequences(gathered_floats, monkeypatch):
    monkeypatch.setattr(ops, "GATHERED_FLOATS", gathered_floats)
    lengths = [1 + (i * 37) % 41 for i in range(15)]
    contexts = [(normal(n, 2, 4, seed=i), normal(n, 2, 4, seed=100 + i)) for i, n in enumerate(lengths)]
    pages, table = filled_pages(contexts, 2, 4, 8)
    query = normal(len(lengths), 4, 4, seed=3)
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32)
    batch = Queries(starts, torch.tensor(lengths, dtype=torch.int32), table)
    out = ops.paged_attention(query, pages, batch, 0.5)
    for b, (key, value) in enumerate(contexts):
        assert (out[b : b + 1] - attention_by_loops(query[b : b + 1], key, value, 0.5)).abs().max() < 1e-5


def rounded(x, scale, zero):
    """What is read of x once it is stored in bytes."""
    return ((((x - zero) / scale) + 128).round().clamp(0, 255) - 128) * scale + zero


def test_paged_attention_reads_int8_pages_dequantized():
    scales = [normal(2, 4, seed=40 + i) for i in range(4)]
    scales[0], scales[2] = scales[0].abs() * 0.05 + 0.01, scales[2].abs() * 0.05 + 0.01
    contexts = [(normal(n, 2, 4, seed=n), normal(n, 2, 4, seed=20 + n)) for n in (7, 3)]
    pages, table = filled_pages(contexts, 2, 4, 4, scales=scales)
    query = normal(4, 4, 4, seed=3)
    batch = Queries(torch.tensor([0, 1, 4]), torch.tensor([7, 3]), table)
    out = ops.paged_attention(query, pages, batch, 0.5)
    for b, (key, value) in enumerate(contexts):
        stored = [rounded(key, *scales[:2]), rounded(value, *scales[2:])]
        rows = slice(0, 1) if b == 0 else slice(1, 4)
        assert (out[rows] - attention_by_loops(query[rows], *stored, 0.5)).abs().max() < 1e-5
        assert (out[rows] - attention_by_loops(query[rows], key, value, 0.5)).abs().max() > 1e-3


def test_paged_attention_reads_each_token_by_its_own_steps():
    contexts = [(normal(n, 2, 6, seed=n), normal(n, 2, 6, seed=20 + n)) for n in (7, 3)]
    contexts[0][0][3] *= 50  # a token far beyond the others costs them nothing
    pages, table = filled_pages(contexts, 2, 6, 4, scales="token")
    query = normal(4, 4, 6, seed=3) / 8
    batch = Queries(torch.tensor([0, 1, 4]), torch.tensor([7, 3]), table)
    out = ops.paged_attention(query, pages, batch, 0.5)
    for b, (key, value) in enumerate(contexts):
        steps = [ops.token_steps(x).float().split(1, dim=-1) for x in (key, value)]
        stored = [rounded(x, *pair) for x, pair in zip((key, value), steps, strict=True)]
        rows = slice(0, 1) if b == 0 else slice(1, 4)
        assert (out[rows] - attention_by_loops(query[rows], *stored, 0.5)).abs().max() < 1e-5
        assert (out[rows] - attention_by_loops(query[rows], key, value, 0.5)).abs().max() > 1e-5
        assert (stored[0][:3] - key[:3]).abs().max() < 0.02


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1.0, 300.0, 5e4])
@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0])
def test_token_steps_cost_half_a_step_and_what_float16_rounds(size, offset):
    x = normal(200, 3, 16, seed=8).clamp(-1, 1) * size + offset * min(size, 100.0)
    scale, zero = ops.token_steps(x).float().split(1, dim=-1)
    read = ops.dequantize_kv(ops.quantize_kv(x, scale, zero), scale, zero)
    reach = torch.maximum(x.amax(-1, keepdim=True) - zero, zero - x.amin(-1, keepdim=True))
    # Half a step, and at the ends what float16 takes from 127.5 of them: 2^-11 of each, 2^-8 near SMALLEST_STEP.
    assert ((read - x).abs() <= scale * (0.57 if size >= 1 else 1.01)).all()
    assert (scale <= torch.clamp(reach / 127.5 * 1.004, min=ops.SMALLEST_STEP)).all()


def test_token_steps_of_rows_without_a_range():
    x = torch.tensor([0.0, 0.1, -3.3, 1e-9, 6e4])[:, None].expand(5, 8)
    steps = ops.token_steps(x)
    scale, zero = steps.float().split(1, dim=-1)
    assert steps.dtype == torch.float16 and (scale > 0).all()
    read = ops.dequantize_kv(ops.quantize_kv(x, scale, zero), scale, zero)
    assert ((read - x).abs() <= torch.clamp(x.abs() * 2**-18, min=ops.SMALLEST_STEP / 2)).all()
    assert read[0].tolist() == [0.0] * 8


def test_nan_and_infinity_in_the_cache_are_defined_and_finite():
    """They are cut off where the bytes end; NaN counts as 0. So no page poisons a later owner's scores."""
    x = torch.tensor([[1.0, math.nan, -2.0, 0.5], [math.inf, 1.0, -1.0, 0.0], [-math.inf, math.nan, math.inf, 1.0]])
    static = ops.dequantize_kv(ops.quantize_kv(x, torch.tensor(0.5), torch.tensor(1.0)), 0.5, 1.0)
    assert static.tolist() == [[1.0, 0.0, -2.0, 0.5], [64.5, 1.0, -1.0, 0.0], [-63.0, 0.0, 64.5, 1.0]]
    scale, zero = ops.token_steps(x).float().split(1, dim=-1)
    read = ops.dequantize_kv(ops.quantize_kv(x, scale, zero), scale, zero)
    assert read.isfinite().all()
    assert (read[0] - torch.tensor([1.0, 0.0, -2.0, 0.5])).abs().max() < 0.01
    assert read[1, 0] == pytest.approx(65504, rel=5e-3) and read[2, 0] == pytest.approx(-65504, rel=5e-3)


def test_causal_attention_across_query_blocks():
    lengths = [ops.QUERY_BLOCK + 9, 1, 3]
    total = sum(lengths)
    q, k, v = normal(total, 4, 4), normal(total, 2, 4, seed=1), normal(total, 2, 4, seed=2)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    out = ops.causal_attention(q, k, v, starts, 0.5)
    for first, last in pairwise(starts):
        head = torch.arange(4) // 2
        scores = torch.einsum("thd,shd->hts", q[first:last].double(), k[first:last][:, head].double()) * 0.5
        scores += torch.full(scores.shape[1:], -math.inf, dtype=torch.float64).triu(1)
        exact = torch.einsum("hts,shd->thd", scores.softmax(-1), v[first:last][:, head].double())
        assert (out[first:last] - exact).abs().max() < 1e-5
    assert (ops.causal_attention(q, k, v, torch.tensor([0, total]), 0.5) - out).abs().max() > 1e-2


def test_unpack_int4_against_loops():
    generator = torch.Generator().manual_seed(5)
    inner, outer, group = 12, 16, 4
    q = torch.randint(0, 16, (inner, outer), generator=generator)
    z = torch.randint(0, 16, (inner // group, outer), generator=generator)
    scales = (torch.rand(inner // group, outer, generator=generator) + 0.01).half()
    column_of_nibble = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(values: Tensor) -> Tensor:
        rows = []
        for row in values.tolist():
            words = []
            for c in range(0, len(row), 8):
                word = sum(row[c + column_of_nibble[p]] << (4 * p) for p in range(8))
                words.append(word - (1 << 32) if word >= 1 << 31 else word)
            rows.append(words)
        return torch.tensor(rows, dtype=torch.int32)

    dense = ops.unpack_int4(pack(q), pack(z), scales)
    assert dense.shape == (outer, inner) and dense.dtype == torch.float32
    for m in range(outer):
        for k in range(inner):
            expected = (int(q[k, m]) - int(z[k // group, m])) * float(scales[k // group, m])
            assert float(dense[m, k]) == expected
