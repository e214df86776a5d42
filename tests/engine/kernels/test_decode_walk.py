"""The walking form of decode attention against the reference: under Triton's interpreter here, compiled on a GPU."""

import re

import numpy as np
import pytest
import torch

from engine.kernels import reference
from engine.kernels.ops import split_heads
from tests.engine.kernels.paged import DEVICE, error, on_device, paged_case

pytest.importorskip("triton", reason="Triton is not installed")
from engine.kernels import decode_attention as forms
from engine.kernels.page_rows import NUMBERS
from engine.kernels.splits import buffers
from tests.engine.kernels.test_paged_kernels import TOLERANCES, check_pages

ON_GPU = DEVICE == "cuda"
STORED = ("plain", "channels", "tokens")
# Query heads a KV head, KV heads, head_dim, page_len, window, dtype; tokens of the sequences; block, warps, programs a
# multiprocessor.
CASES = [
    # One token; exactly a block; one more than a page; none at all (a padded row).
    ((1, 2, 64, 16, None, torch.float16), (1, 16, 17, 0, 40), (16, 1, 3)),
    # Pages smaller than a block, a window that begins within one, and a program for every block.
    ((1, 3, 96, 4, 7, torch.float32), (33, 5, 16), (16, 2, 11)),
    # One program for everything, blocks as long as pages.
    ((1, 1, 128, 32, None, torch.float16), (31, 32, 65), (32, 4, 1)),
    # Rows of tokens that are not all used: more threads than a block has values.
    ((1, 2, 16, 64, 33, torch.bfloat16), (70, 1), (16, 4, 2)),
    # Four and eight heads a KV head, cut and not.
    ((4, 2, 64, 32, None, torch.float16), (1, 32, 0, 70), (32, 2, 3)),
    ((8, 1, 96, 4, 7, torch.float32), (33, 5, 16), (16, 2, 9)),
    ((3, 2, 24, 64, None, torch.float16), (40, 64), (64, 2, 1)),
]


def walk(block, warps, each):
    return {"form": "walk", "block": block, "stages": 3, "warps": warps, "each": each}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(("shape", "lens", "form"), CASES)
def test_attention_is_the_reference(stored, shape, lens, form):
    group, kv_heads, head_dim, page_len, window, dtype = shape
    heads = group * kv_heads
    case = paged_case(stored, kv_heads, head_dim, page_len, dtype, lens=lens, new=[0] * len(lens))
    query = torch.randn(len(lens), heads, head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    scale, there = head_dim**-0.5, on_device(case)
    asked = query.to(DEVICE), there.pages, there.context_lens, there.page_table, scale, window
    for _ in range(2):  # counts of arrivals are 0 again afterwards
        out = forms.decode_attention(*asked, config=walk(*form))
        assert error(out, forms.decode_attention(*asked, splits=1)) < TOLERANCES[dtype]
        some = [row for row, length in enumerate(lens) if length]
        case.query_starts = torch.arange(len(some) + 1, dtype=torch.int32)
        expected = reference.paged_attention(query[some], case.pages, _rows(case, some), scale, window)
        assert error(out[some], expected) < TOLERANCES[dtype]
        assert not out[[row for row, length in enumerate(lens) if not length]].any()  # a row of padding
    assert not buffers(out.device)[1].any()


def _rows(case, some):
    """A case of some of its sequences, each with one query."""
    chosen = on_device(case)
    for name in ("query_starts", "context_lens", "page_table"):
        setattr(chosen, name, getattr(case, name))
    chosen.context_lens, chosen.page_table = case.context_lens[some], case.page_table[some]
    chosen.decodes = len(some)
    return chosen


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(("shape", "lens", "form"), CASES[:3] + CASES[4:])
def test_rotation_inside_is_rotation_before(stored, shape, lens, form, monkeypatch):
    group, kv_heads, head_dim, page_len, window, dtype = shape
    heads = group * kv_heads
    more = window is not None  # head norms and a scale of the query
    lens = [length for length in lens if length]
    case = paged_case(stored, kv_heads, head_dim, page_len, dtype, lens=lens, new=[1] * len(lens))
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(len(lens), (heads + 2 * kv_heads) * head_dim, generator=generator).to(dtype)
    angles = torch.randn(len(lens), head_dim // 2, generator=generator)
    query_scale = torch.rand(len(lens), generator=generator) + 0.5 if more else None
    norms = tuple(torch.randn(head_dim, generator=generator).to(dtype) for _ in range(2)) if more else None
    there = on_device(case)
    query, key, value = split_heads(qkv, heads, head_dim)
    if norms:
        query, key = (reference.rms_norm(x, w, 1e-5) for x, w in zip((query, key), norms, strict=True))
    query, key = reference.apply_rope(query, key, angles.cos(), angles.sin(), query_scale)
    reference.write_kv(key, value, case.pages, case.slots)
    expected = reference.paged_attention(query, case.pages, case, head_dim**-0.5, window)
    monkeypatch.setattr(forms, "config_for", lambda *_: walk(*form) | {"turns": 1})
    assert forms.turns_inside(len(lens), heads, there.pages, torch.device(DEVICE))
    out = forms.rope_decode_attention(
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
    )
    assert error(out, expected) < TOLERANCES[dtype] * (2 if stored == "plain" else 4)
    check_pages(there.pages, case.pages, stored, dtype)


def test_a_row_of_padding_writes_nothing(monkeypatch):
    case = on_device(paged_case("plain", 2, 16, 16, torch.float32, lens=[3, 5], new=[0, 0]))
    case.context_lens[1] = 0
    before = case.pages.key.clone()
    monkeypatch.setattr(forms, "config_for", lambda *_: walk(16, 1, 2) | {"turns": 1})
    qkv, angles = torch.randn(2, 96, device=DEVICE), torch.randn(2, 8, device=DEVICE)
    slots = torch.tensor([int(case.page_table[0, 0]) * 16 + 2, 0], device=DEVICE)
    rope = qkv, angles.cos(), angles.sin(), None, None, 1e-5
    out = forms.rope_decode_attention(*rope, case.pages, slots, case.context_lens, case.page_table, 2, 0.25)
    changed = (case.pages.key != before).any(dim=-1).any(dim=1).nonzero().tolist()
    assert changed == [[int(case.page_table[0, 0]), 2]]
    assert not out[1].any() and out[0].any()


def test_a_form_that_cannot_take_the_batch_is_not_used():
    assert forms.walks(walk(16, 1, 2), forms.MOST_WALKED)
    assert not forms.walks(walk(16, 1, 2), forms.MOST_WALKED + 1)
    assert not forms.walks({"block": 16, "stages": 3, "warps": 1}, 1)


def test_the_assembly_makes_numbers_of_bytes():
    """Read line by line; the interpreter takes the other way."""
    word = 0xFE8001B2
    registers = {"$4": word}
    for op, text in re.findall(r"(\S+) ([^;]+);", NUMBERS.value.replace("{\n", "", 1)):
        target, *sources = (part.strip() for part in re.findall(r"\{[^}]*\}|[^,]+", text))
        if op == "prmt.b32":
            given = registers[sources[0]].to_bytes(4, "little") + int(sources[1], 16).to_bytes(4, "little")
            picked = bytes(given[int(sources[2], 16) >> (4 * place) & 7] for place in range(4))
            registers[target] = int.from_bytes(picked, "little")
        elif op == "mov.b32":
            low, high = target.strip("{}").replace(" ", "").split(",")
            registers[low], registers[high] = registers[sources[0]] & 0xFFFF, registers[sources[0]] >> 16
        elif op == "cvt.f32.f16":
            registers[target] = float(np.uint16(registers[sources[0]]).view(np.float16))
        else:
            assert op == ".reg", op
    assert [registers[f"${place}"] - 1024 for place in range(4)] == list(word.to_bytes(4, "little"))
