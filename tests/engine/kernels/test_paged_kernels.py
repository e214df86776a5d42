"""Kernels over pages against the reference: under Triton's interpreter here, compiled where there is a GPU."""

import pytest
import torch

from engine.kernels import invariant, reference
from engine.kernels.ops import split_heads
from tests.engine.kernels.paged import DEVICE, error, on_device, paged_case

pytest.importorskip("triton", reason="Triton is not installed")
from engine.kernels.decode_attention import decode_attention, rope_decode_attention
from engine.kernels.prefill_attention import prefill_attention
from engine.kernels.rope_write_kv import rope_write_kv

ON_GPU = DEVICE == "cuda"
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
STORED = ("plain", "channels", "tokens")
# heads, KV heads, head_dim, page_len, window, dtype: every value at least once; the rest where it is quick.
FEW = [
    (4, 4, 16, 4, None, torch.float32),
    (6, 2, 24, 32, 7, torch.float16),
]
MANY = [
    (4, 4, 128, 64, None, torch.float16),
    (6, 2, 80, 4, 33, torch.float32),
    (8, 1, 128, 128, None, torch.bfloat16),
    (32, 8, 128, 64, 33, torch.float16),
    (5, 5, 96, 64, 33, torch.bfloat16),
    (4, 4, 16, 64, None, torch.float32),
    (14, 2, 64, 128, None, torch.float16),
]
CASES = [pytest.param(*case, marks=pytest.mark.gpu) for case in MANY] if ON_GPU else FEW
DECODES = {"lens": [1, 5, 39], "new": [1, 1, 1]}
MIXED = {"lens": [9, 37, 12], "new": [1, 3, 12]}
if ON_GPU:
    DECODES = {"lens": [1, 5, 70, 33, 1000, 513], "new": [1] * 6}
    MIXED = {"lens": [9, 1, 700, 333, 400], "new": [1, 1, 3, 333, 150]}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page_len", "window", "dtype"), CASES)
def test_decode_attention(stored, heads, kv_heads, head_dim, page_len, window, dtype):
    case = paged_case(stored, kv_heads, head_dim, page_len, dtype, **DECODES)
    query = torch.randn(len(DECODES["lens"]), heads, head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    scale = head_dim**-0.5
    expected = reference.paged_attention(query, case.pages, case, scale, window)
    there = on_device(case)
    for splits in (1, 4):
        out = decode_attention(
            query.to(DEVICE), there.pages, there.context_lens, there.page_table, scale, window, splits=splits
        )
        assert error(out, expected) < TOLERANCES[dtype], splits


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page_len", "window", "dtype"), CASES)
def test_prefill_attention(stored, heads, kv_heads, head_dim, page_len, window, dtype):
    case = paged_case(stored, kv_heads, head_dim, page_len, dtype, **MIXED)
    query = torch.randn(sum(MIXED["new"]), heads, head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    scale = head_dim**-0.5
    expected = reference.paged_attention(query, case.pages, case, scale, window)[case.decodes :]
    there = on_device(case)
    out = prefill_attention(
        query.to(DEVICE),
        there.pages,
        there.query_starts,
        there.context_lens,
        there.page_table,
        there.blocks,
        scale,
        window,
    )
    assert error(out[case.decodes :], expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page_len", "window", "dtype"), CASES)
def test_rope_decode_attention(splits, stored, heads, kv_heads, head_dim, page_len, window, dtype):
    more = window is not None  # half of the cases: head norms and a scale of the query
    case = paged_case(stored, kv_heads, head_dim, page_len, dtype, **DECODES)
    generator, tokens = torch.Generator().manual_seed(2), len(DECODES["lens"])
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, generator=generator).to(dtype)
    angles = torch.randn(tokens, head_dim // 2, generator=generator)
    query_scale = torch.rand(tokens, generator=generator) + 0.5 if more else None
    norms = tuple(torch.randn(head_dim, generator=generator).to(dtype) for _ in range(2)) if more else None
    there = on_device(case)
    query, key, value = split_heads(qkv, heads, head_dim)
    if norms:
        query, key = (reference.rms_norm(x, w, 1e-5) for x, w in zip((query, key), norms, strict=True))
    query, key = reference.apply_rope(query, key, angles.cos(), angles.sin(), query_scale)
    reference.write_kv(key, value, case.pages, case.slots)
    expected = reference.paged_attention(query, case.pages, case, head_dim**-0.5, window)
    out = rope_decode_attention(
        qkv.to(DEVICE),
        angles.cos().to(DEVICE),
        angles.sin().to(DEVICE),
        None if query_scale is None else query_scale.to(DEVICE),
        None if norms is None else (norms[0].to(DEVICE), norms[1].to(DEVICE)),
        1e-5,
        there.pages,
        there.slots,
        there.context_lens,
        there.page_table,
        heads,
        head_dim**-0.5,
        window,
        splits=splits,
    )
    assert error(out, expected) < TOLERANCES[dtype] * (2 if stored == "plain" else 4)
    check_pages(there.pages, case.pages, stored, dtype)


@pytest.mark.parametrize("attention", ["kernel", "torch"])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page_len", "window", "dtype"), CASES)
def test_a_token_attends_to_the_same_bits_however_many_come_with_it(
    attention, stored, heads, kv_heads, head_dim, page_len, window, dtype
):
    """A whole sequence, a piece of it, and its last token alone, each beside another sequence."""
    length = 70
    case = paged_case(stored, kv_heads, head_dim, page_len, dtype, lens=[length, 3], new=[0, 0])
    dense = torch.randn(length, heads, head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)

    def attended(new, end):
        case.query_starts = torch.tensor([0, new, new + 1], dtype=torch.int32)
        case.context_lens[0] = end
        blocks = [(0, first) for first in range(0, new, reference.QUERY_BLOCK)]
        case.blocks = torch.tensor([*blocks, (1, 0)], dtype=torch.int32)
        there, scale = on_device(case), head_dim**-0.5
        query = torch.cat([dense[end - new : end], dense[:1]]).to(DEVICE)
        if attention == "torch":
            return invariant.paged_attention(query, there.pages, there, scale, window)[:new]
        starts = there.query_starts
        lens, table = there.context_lens, there.page_table
        return prefill_attention(query, there.pages, starts, lens, table, there.blocks, scale, window)[:new]

    whole = attended(length, length)
    assert not whole.isnan().any() and len(whole.unique(dim=0)) == length
    assert torch.equal(attended(9, 44), whole[35:44])
    assert torch.equal(attended(1, length), whole[-1:])


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page_len", "window", "dtype"), CASES)
def test_rope_write_kv(stored, heads, kv_heads, head_dim, page_len, window, dtype):
    more = window is not None  # half of the cases: head norms and a scale of the query
    case = paged_case(stored, kv_heads, head_dim, page_len, dtype, **MIXED)
    generator = torch.Generator().manual_seed(2)
    tokens = sum(MIXED["new"])
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, generator=generator).to(dtype)
    angles = torch.randn(tokens, head_dim // 2, generator=generator)
    query_scale = torch.rand(tokens, generator=generator) + 0.5 if more else None
    norms = tuple(torch.randn(head_dim, generator=generator).to(dtype) for _ in range(2)) if more else None
    there = on_device(case)
    query, key, value = split_heads(qkv, heads, head_dim)
    if norms:
        query, key = (reference.rms_norm(x, w, 1e-5) for x, w in zip((query, key), norms, strict=True))
    query, key = reference.apply_rope(query, key, angles.cos(), angles.sin(), query_scale)
    reference.write_kv(key, value, case.pages, case.slots)
    out = rope_write_kv(
        qkv.to(DEVICE),
        angles.cos().to(DEVICE),
        angles.sin().to(DEVICE),
        None if query_scale is None else query_scale.to(DEVICE),
        None if norms is None else (norms[0].to(DEVICE), norms[1].to(DEVICE)),
        1e-5,
        there.pages,
        there.slots,
        heads,
    )
    assert error(out, query) < TOLERANCES[dtype]
    check_pages(there.pages, case.pages, stored, dtype)


def check_pages(found, pages, stored, dtype):
    for name in ("key", "value"):
        written, expected = getattr(found, name).cpu().float(), getattr(pages, name).float()
        if stored == "plain":
            assert error(written, expected) < TOLERANCES[dtype], name
        else:  # a value on the border of two bytes may go either way
            assert (written - expected).abs().max() <= 1, name
            assert (written != expected).float().mean() < 0.01, name
    if stored == "tokens":
        for name in ("key_steps", "value_steps"):
            torch.testing.assert_close(getattr(found, name).cpu(), getattr(pages, name), rtol=2e-3, atol=1e-3)
