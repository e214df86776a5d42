"""Decode attention by matrix instructions: as plain Python here (see gluon_on_cpu), compiled where there is a GPU."""

import random
import sys

import pytest
import torch

from tests.engine.kernels.paged import DEVICE, error, on_device, paged_case

# isort: split
from engine.kernels import decode_attention as forms
from engine.kernels import decode_fragments, reference
from engine.kernels.decode_attention import LOG2E, decode_attention
from engine.kernels.decode_fragments import MOST_TOKENS_OF_BYTES as MOST
from engine.kernels.device import Device, facts
from engine.kernels.splits import buffers
from tests.engine.kernels import gluon_on_cpu

ON_GPU = DEVICE == "cuda"
STORED = ("plain", "channels", "tokens")
LENS = [1, 15, 16, 17, 63, 64, 65, 272, 0, 1000]
TOLERANCES = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
CARD = Device("card", (9, 0), 132)


@pytest.fixture(scope="module")
def kernels():
    if ON_GPU:
        return decode_fragments
    return gluon_on_cpu.kernels("load_order", "page_fragments", "decode_joins", "decode_fragments")[-1]


def config(block, asks=2):
    return {"form": "fragments", "block": block, "warps": 1, "asks": asks}


def made(stored, lens, heads, head_dim, page_len, dtype):
    case = paged_case(stored, heads, head_dim, page_len, dtype, lens=lens, new=[min(length, 1) for length in lens])
    case.query_starts = torch.arange(len(lens) + 1, dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    key, value = (torch.randn(len(case.slots), heads, head_dim, generator=generator).to(dtype) for _ in range(2))
    reference.write_kv(key, value, case.pages, case.slots)
    query = torch.randn(len(lens), heads, head_dim, generator=generator).to(dtype)
    return case, query


def attended(kernels, case, query, config, parts=1):
    there, out = on_device(case), torch.full_like(query, float("nan")).to(DEVICE)
    scale = query.shape[2] ** -0.5 * LOG2E
    kernels.run(query.to(DEVICE), there.pages, there.context_lens, there.page_table, scale, out, config, parts)
    assert not buffers(out.device)[1].any()
    return out


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(
    ("head_dim", "page_len", "block", "parts", "dtype"),
    [
        (128, 64, 16, 1, torch.float16),
        (64, 32, 32, 1, torch.bfloat16),
        (128, 64, 16, 4, torch.float16),
        (64, 64, 16, 3, torch.float16),
        (64, 32, 16, 32, torch.bfloat16),
    ],
)
def test_attention_is_that_of_the_reference(kernels, stored, head_dim, page_len, block, parts, dtype):
    """Parts: more than there are blocks, as many, fewer; some of one block, and some of none."""
    case, query = made(stored, LENS, 4 if ON_GPU else 1, head_dim, page_len, dtype)
    expected = reference.paged_attention(query, case.pages, case, head_dim**-0.5)
    out = attended(kernels, case, query, config(block), parts).cpu()
    for b, length in enumerate(LENS):
        if length:
            assert error(out[b], expected[b]) < TOLERANCES[dtype], length
        else:
            assert not out[b].any()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("stored", STORED)
def test_what_lies_past_a_context_changes_nothing(kernels, stored, parts):
    """Other tokens of the last page, of another sequence before, and other sequences of the batch: not a bit."""
    case, query = made(stored, [20, 37], 2, 64, 64, torch.float16)
    before = attended(kernels, case, query, config(16), parts)
    for pages in (case.pages.key, case.pages.value):
        last = pages[case.page_table[0, 0].long()]
        last[:, 20:] = float("nan") if stored == "plain" else 255
    case.page_table = case.page_table.flip(0)[1:]
    case.context_lens = case.context_lens[:1]
    assert torch.equal(attended(kernels, case, query[:1], config(16), parts), before[:1])


@pytest.mark.parametrize("stored", STORED)
def test_parts_join_in_their_order(kernels, stored):
    """Whichever arrives last: not a bit. On a GPU ten runs say so, elsewhere three orders of programs."""
    case, query = made(stored, [272, 40, 17, 3], 8 if ON_GPU else 1, 64, 64, torch.float16)
    before = attended(kernels, case, query, config(16), 4)
    if ON_GPU:
        assert all(torch.equal(attended(kernels, case, query, config(16), 4), before) for _ in range(9))
        return
    gl, shuffled = kernels.gl, random.Random(0)
    orders = (iter, lambda programs: shuffled.sample(programs, len(programs)))
    given = gl.order
    try:
        for gl.order in orders:
            assert torch.equal(attended(kernels, case, query, config(16), 4), before)
    finally:
        gl.order = given


@pytest.mark.parametrize("stored", STORED)
def test_scores_may_be_far_apart_and_scales_small(kernels, stored):
    """The greatest score comes last and leaves nothing of the others; then a query of which float16 holds nothing."""
    case, query = made(stored, [40], 2, 64, 64, torch.float16)
    query *= 30.0
    expected = reference.paged_attention(query, case.pages, case, 64**-0.5)
    for parts in (1, 2):
        assert error(attended(kernels, case, query, config(16), parts), expected) < 5e-3
    if stored == "channels":
        case.pages.key_scale.mul_(1e-7)
        case.pages.value_scale.mul_(1e-3)
        expected = reference.paged_attention(query, case.pages, case, 64**-0.5)
        assert error(attended(kernels, case, query, config(16)), expected) < 1e-3


def test_where_this_form_runs():
    case, query = made("channels", [3], 2, 64, 64, torch.float16)
    assert decode_fragments.runs(config(16), query, case.pages, MOST, CARD)
    assert not decode_fragments.runs(config(16), query, case.pages, MOST + 1, CARD)
    assert not decode_fragments.runs({"block": 16, "stages": 3, "warps": 1}, query, case.pages, MOST, CARD)
    assert not decode_fragments.runs(config(128), query, case.pages, MOST, CARD)
    assert not decode_fragments.runs(config(16), query.float(), case.pages, MOST, CARD)
    assert not decode_fragments.runs(config(16), query.repeat(1, 2, 1), case.pages, MOST, CARD)
    assert not decode_fragments.runs(config(16), query, case.pages, MOST, Device("card", (7, 5), 132))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("window", [None, 9])
def test_the_other_form_does_what_this_one_does_not(splits, window):
    case, query = made("channels", [40, 3], 2, 64, 64, torch.float16)
    there, scale = on_device(case), 64**-0.5
    expected = reference.paged_attention(query, case.pages, case, scale, window)
    given = there.pages, there.context_lens, there.page_table, scale, window, splits
    assert error(decode_attention(query.to(DEVICE), *given, config=config(16)), expected) < 2e-3


def test_parts_are_as_asked_or_as_configured_or_as_the_batch_needs(kernels, monkeypatch):
    case, query = made("channels", [40, 3], 2, 64, 64, torch.float16)
    there, seen, run = on_device(case), [], kernels.run
    given = query.to(DEVICE), there.pages, there.context_lens, there.page_table, 64**-0.5
    monkeypatch.setattr(forms, "facts", lambda device: CARD)
    monkeypatch.setattr(forms, "_fragments", lambda kind: kernels)
    monkeypatch.setattr(kernels, "run", lambda *given: seen.append(given[-1]) or run(*given))
    expected = reference.paged_attention(query, case.pages, case, 64**-0.5)
    for splits, more in ((None, {}), (None, {"parts": 2}), (4, {"parts": 2})):
        assert error(decode_attention(*given, splits=splits, config={**config(16), **more}), expected) < 2e-3
    monkeypatch.setattr(forms, "TILES", 3)  # more heads than there are counters: no parts
    assert error(decode_attention(*given, config={**config(16), "parts": 2}), expected) < 2e-3
    assert seen == [forms.MOST_SPLITS, 2, 4, 1]


def test_unequal_contexts_may_have_a_row_of_their_own(monkeypatch):
    whole, cut = {"block": 16}, {"parts": 4}
    rows = {
        ("decode_one_channels", 64): [(32, 128, whole), (16, 128, whole)],
        ("decode_one_channels_uneven", 64): [(32, 128, cut)],
    }
    monkeypatch.setattr(forms.tuning, "table", lambda device: rows)
    monkeypatch.setattr(forms.tuning, "lookup", forms.tuning.lookup.__wrapped__)  # which remembers other tables
    given = CARD, "one", "channels", 32, 128
    assert forms.config_for(*given, 64) == {"block": 16}
    assert forms.config_for(*given, 64, uneven=True) == {"parts": 4}
    assert forms.config_for(*given, 32, uneven=True) == forms.config_for(*given, 32)
    few = CARD, "one", "channels", 16, 128, 64
    assert forms.config_for(*few, uneven=True) == whole, "a shape that was tuned takes no row of another"
    pages = made("channels", [40], 32, 128, 64, torch.float16)[0].pages
    assert forms.minds_lengths(pages, 32, 64) and not forms.minds_lengths(pages, 32, 32)
    assert not forms.minds_lengths(pages, 64, 64), "two query heads a KV head are a group"


def test_a_triton_whose_gluon_is_another_one_runs_the_other_form(monkeypatch):
    case, query = made("channels", [40, 3], 2, 64, 64, torch.float16)
    there, scale = on_device(case), 64**-0.5
    monkeypatch.setitem(sys.modules, "engine.kernels.decode_fragments", None)
    forms._fragments.cache_clear()
    try:
        assert not any("form" in tried for tried in forms.candidates("one"))
        given = there.pages, there.context_lens, there.page_table, scale
        out = decode_attention(query.to(DEVICE), *given, splits=1, config=config(16))
    finally:
        forms._fragments.cache_clear()
    assert error(out, reference.paged_attention(query, case.pages, case, scale)) < 2e-3


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", STORED)
def test_every_configuration_over_unequal_contexts(stored, dtype):
    lens = torch.randint(1, 2000, (256,), generator=torch.Generator().manual_seed(3)).tolist() + LENS
    case, query = made(stored, lens, 8, 128, 64, dtype)
    there, scale = on_device(case), 128**-0.5
    there.query_starts = case.query_starts.to(DEVICE)
    query = query.to(DEVICE)
    expected = reference.paged_attention(query, there.pages, there, scale)
    for tried in decode_fragments.candidates():
        assert decode_fragments.runs(tried, query, there.pages, MOST, facts(query.device))
        given = there.pages, there.context_lens, there.page_table, scale
        splits = None if "parts" in tried else 1
        out = decode_attention(query, *given, splits=splits, config=tried)
        worst = max(error(a, b) for a, b, length in zip(out, expected, lens, strict=True) if length)
        assert worst < TOLERANCES[dtype], tried
        for _ in range(9 if "parts" in tried else 1):
            assert torch.equal(out, decode_attention(query, *given, splits=splits, config=tried)), tried
