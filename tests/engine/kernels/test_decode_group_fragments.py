"""Decode attention of groups by matrix instructions: as plain Python here (see gluon_on_cpu), compiled where there is a
GPU."""

import pytest
import torch

from tests.engine.kernels.paged import DEVICE, error, on_device, paged_case

# isort: split
from engine.kernels import decode_attention as forms
from engine.kernels import decode_group_fragments, reference, tuning
from engine.kernels.decode_attention import LOG2E, decode_attention, rope_decode_attention
from engine.kernels.decode_fragments import MOST_TOKENS_OF_BYTES as MOST
from engine.kernels.device import Device, facts
from tests.engine.kernels import gluon_on_cpu

ON_GPU = DEVICE == "cuda"
STORED = ("plain", "channels", "tokens")
LENS = [1, 15, 16, 17, 63, 64, 65, 272, 0, 500]
TOLERANCES = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
CARD = Device("card", (9, 0), 132)


@pytest.fixture(scope="module")
def kernels():
    if ON_GPU:
        return decode_group_fragments
    names = (
        "load_order",
        "page_fragments",
        "decode_joins",
        "decode_fragments",
        "group_operands",
        "decode_group_fragments",
    )
    return gluon_on_cpu.kernels(*names, language=gluon_on_cpu.EachWarp)[-1]


def config(block, warps):
    return {"form": "fragments", "block": block, "warps": warps, "asks": 1}


def made(stored, lens, kv_heads, group, head_dim, page_len, dtype):
    """The queries of a group are of unlike magnitudes."""
    case = paged_case(stored, kv_heads, head_dim, page_len, dtype, lens=lens, new=[min(length, 1) for length in lens])
    case.query_starts = torch.arange(len(lens) + 1, dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    key, value = (torch.randn(len(case.slots), kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2))
    reference.write_kv(key, value, case.pages, case.slots)
    query = torch.randn(len(lens), kv_heads, group, head_dim, generator=generator)
    query *= torch.tensor([1, 4, 0.01, 2, 1, 3, 0.3, 0])[:group, None]
    return case, query.to(dtype).flatten(1, 2)


def attended(kernels, case, query, config, splits=1):
    there, out = on_device(case), torch.full_like(query, float("nan")).to(DEVICE)
    scale = query.shape[2] ** -0.5 * LOG2E
    kernels.run(query.to(DEVICE), there.pages, there.context_lens, there.page_table, scale, out, config, splits)
    return out.cpu()


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(
    ("group", "head_dim", "page_len", "block", "warps", "splits", "dtype"),
    [
        (4, 128, 64, 16, 1, 1, torch.float16),
        (7, 64, 32, 32, 2, 1, torch.bfloat16),
        (8, 64, 64, 16, 4, 3, torch.float16),
        (2, 64, 64, 16, 1, 12, torch.float16),
    ],
)
def test_attention_is_that_of_the_reference(kernels, stored, group, head_dim, page_len, block, warps, splits, dtype):
    case, query = made(stored, LENS, 2, group, head_dim, page_len, dtype)
    expected = reference.paged_attention(query, case.pages, case, head_dim**-0.5)
    out = attended(kernels, case, query, config(block, warps), splits)
    for b, length in enumerate(LENS):
        if length:
            for head in range(2 * group):
                assert error(out[b, head], expected[b, head]) < 2 * TOLERANCES[dtype], (length, head)
        else:
            assert not out[b].any()


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("stored", STORED)
def test_what_lies_past_a_context_changes_nothing(kernels, stored, splits):
    """Other tokens of the last page, of another sequence before, and other sequences of the batch: not a bit."""
    case, query = made(stored, [5, 37], 2, 4, 64, 64, torch.float16)
    before = attended(kernels, case, query, config(16, 2), splits)
    for pages in (case.pages.key, case.pages.value):
        last = pages[case.page_table[0, 0].long()]
        last[:, 5:] = float("nan") if stored == "plain" else 255
    case.page_table = case.page_table.flip(0)[1:]
    case.context_lens = case.context_lens[:1]
    assert torch.equal(attended(kernels, case, query[:1], config(16, 2), splits), before[:1])


@pytest.mark.parametrize("stored", STORED)
def test_scores_may_grow_and_be_far_apart(kernels, stored):
    """The greatest scores come late, of each head in another block, and leave nothing of what was before."""
    case, query = made(stored, [120], 1, 4, 64, 64, torch.float16)
    query *= 20.0
    page, place = case.page_table[0].long(), torch.tensor([30, 50, 70, 119])
    last = page[place // 64] * 64 + place % 64
    reference.write_kv(query[0].clamp(-3, 3)[:, None], torch.randn(4, 1, 64).half(), case.pages, last)
    expected = reference.paged_attention(query, case.pages, case, 64**-0.5)
    for warps in (1, 4):
        assert error(attended(kernels, case, query, config(16, warps)), expected) < 5e-3


def test_scales_may_be_small(kernels):
    case, query = made("channels", [40], 2, 4, 64, 64, torch.float16)
    case.pages.key_scale.mul_(1e-7)
    case.pages.value_scale.mul_(1e-3)
    expected = reference.paged_attention(query, case.pages, case, 64**-0.5)
    assert error(attended(kernels, case, query, config(16, 2)), expected) < 1e-3


def test_where_this_form_runs():
    case, query = made("channels", [3], 2, 4, 64, 64, torch.float16)
    runs = decode_group_fragments.runs
    assert runs(config(16, 1), query, case.pages, MOST, CARD)
    assert not runs(config(16, 1), query, case.pages, MOST + 1, CARD)
    assert runs(config(16, 4), query, case.pages, 4 * MOST, CARD)
    assert not runs({"block": 16, "stages": 3, "warps": 1}, query, case.pages, MOST, CARD)
    assert not runs(config(128, 1), query, case.pages, MOST, CARD)
    assert not runs(config(16, 1), query.float(), case.pages, MOST, CARD)
    assert not runs(config(16, 1), query[:, :2], case.pages, MOST, CARD)
    assert not runs(config(16, 1), query.repeat(1, 4, 1), case.pages, MOST, CARD)
    assert not runs(config(16, 1), query, case.pages, MOST, Device("card", (7, 5), 132))


@pytest.mark.parametrize("splits", [1, 2])
def test_the_other_form_does_what_this_one_does_not(splits):
    """Windows; where there is no GPU whose instructions these are, everything."""
    case, query = made("channels", [40, 3], 2, 4, 64, 64, torch.float16)
    there, scale = on_device(case), 64**-0.5
    expected = reference.paged_attention(query, case.pages, case, scale, 9)
    given = there.pages, there.context_lens, there.page_table, scale, 9, splits
    assert error(decode_attention(query.to(DEVICE), *given, config=config(16, 2)), expected) < 2e-3


def test_queries_are_rotated_before(kernels, monkeypatch):
    """Where a table asks for this form, rotation and the write of K and V are a kernel of their own."""
    case, query = made("channels", [40, 3, 17], 2, 4, 64, 64, torch.float16)
    there = on_device(case)
    qkv = torch.cat([query.flatten(1), torch.randn(3, 2 * 2 * 64).half()], 1).to(DEVICE)
    angles = torch.rand(3, 32, device=DEVICE)
    rope = angles.cos(), angles.sin(), None, None, 1e-5
    slots = there.slots.to(DEVICE)
    given = there.context_lens, there.page_table, 8, 64**-0.5
    expected = rope_decode_attention(qkv, *rope, there.pages, slots, *given)
    asked, parts = [], []
    run = kernels.run
    monkeypatch.setattr(tuning, "lookup", lambda *key, uneven: asked.append(key) or {**config(16, 2), "parts": 3})
    monkeypatch.setattr(forms, "facts", lambda device: CARD if not ON_GPU else facts(device))
    monkeypatch.setattr(forms, "_fragments", lambda kind: kernels)
    monkeypatch.setattr(kernels, "run", lambda *given: parts.append(given[-1]) or run(*given))
    out = rope_decode_attention(qkv, *rope, there.pages, slots, *given)
    assert asked and parts == [3] and error(out, expected) < 2e-3
    monkeypatch.setattr(tuning, "lookup", lambda *key, uneven: {**config(16, 2), "parts": 2} if uneven else {})
    out = rope_decode_attention(qkv, *rope, there.pages, slots, *given, uneven=True)
    assert parts == [3, 2] and error(out, expected) < 2e-3


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="there is no GPU")
@pytest.mark.parametrize(("group", "kv_heads"), [(4, 8), (7, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", STORED)
def test_every_configuration_over_unequal_contexts(stored, dtype, group, kv_heads):
    lens = torch.randint(1, 2000, (128,), generator=torch.Generator().manual_seed(3)).tolist() + LENS
    case, query = made(stored, lens, kv_heads, group, 128, 64, dtype)
    there, scale = on_device(case), 128**-0.5
    there.query_starts = case.query_starts.to(DEVICE)
    query = query.to(DEVICE)
    expected = reference.paged_attention(query, there.pages, there, scale)
    for tried in decode_group_fragments.candidates():
        for splits in (None,) if "parts" in tried else (1, 4):
            assert decode_group_fragments.runs(tried, query, there.pages, MOST, facts(query.device))
            given = there.pages, there.context_lens, there.page_table, scale
            out = decode_attention(query, *given, splits=splits, config=tried)
            worst = max(error(a, b) for a, b, length in zip(out, expected, lens, strict=True) if length)
            assert worst < TOLERANCES[dtype], (tried, splits)
            assert torch.equal(out, decode_attention(query, *given, splits=splits, config=tried)), (tried, splits)
