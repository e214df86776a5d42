"""Padded steps, which graphs compute on a GPU, computed kernel by kernel against the same steps without padding."""

import itertools
import random

import pytest
import torch

from engine.config import Sampling
from engine.models.batch import QUERY_BLOCK
from engine.models.cache import KVCache, KVScales, PerToken
from engine.models.decoder import Decoder
from engine.runtime.batch import Size, build_batch
from engine.runtime.cache import PageTable
from engine.runtime.graphs import Graphs, Sizes
from engine.runtime.mixed_steps import blocks_in, mixed_sizes
from engine.runtime.scheduler import Plan, Scheduler
from engine.runtime.sequence import Sequence
from tests.engine.models.tiny import quantized, random_weights, tiny_config
from tests.engine.runtime.test_dynamic_rope import config_of
from tests.engine.runtime.tiny_model import tiny_model

PAGE_LEN, PAGES, MOST = 4, 60, 8


def test_sizes_end_within_the_budget_and_padding_is_bounded():
    for budget, batch in itertools.product((1, 3, 16, 100, 512, 2048, 8192), (1, 4, 64, 100, 256, 300)):
        sizes = mixed_sizes(budget=budget, max_batch_size=batch)
        largest = min(budget, 2048)
        assert sizes == sorted(set(sizes)) and sizes[-1] == Size(largest, min(batch, largest)) and len(sizes) <= 25
        assert all(0 < size.room <= size.tokens for size in sizes)
        for sequences, tokens in itertools.product({1, batch}, range(257, largest + 1)):
            assert next(one for one in sizes if one.tokens >= tokens and one.room >= sequences).tokens - tokens < 256
        for tokens, _, _ in sizes:  # 16 prompts fit whatever their lengths, and more where each has at least 64 tokens
            prompts = max(1, min(16, tokens // 2))
            longest = [tokens - 2 * (prompts - 1)] + [2] * (prompts - 1)
            assert sum(-(-length // QUERY_BLOCK) for length in longest) <= blocks_in(tokens)


def scales_of(config, kv):
    if kv == "kv8":
        shape = (config.num_layers, config.num_kv_heads, config.head_dim)
        pairs = torch.rand(*shape, 2, generator=torch.Generator().manual_seed(2)) / 30 + 0.02
        return KVScales(key=pairs, value=pairs.flip(2).contiguous())
    return PerToken() if kv == "kv8-token" else None


def model_of(weights, config, *, device="cpu", dtype=torch.float32) -> Decoder:
    return Decoder(config, quantized(weights, random_weights(config), config), device=device, dtype=dtype)


class Both:
    """The same plans as they are and padded, each over a cache of its own. `captured` ones are graphs, on a GPU."""

    def __init__(self, model: Decoder, *, scales=None, budget=40, captured=False, tolerance=1e-4) -> None:
        self.model, self.tolerance = model, tolerance
        self.scheduler = Scheduler(PageTable(PAGES, PAGE_LEN), max_batch_size=MOST, num_tokens_per_iter=budget)
        make = lambda pages: KVCache(  # noqa: E731
            model.config, num_pages=pages, page_len=PAGE_LEN, device=model.device, dtype=model.dtype, scales=scales
        )
        sizes = mixed_sizes(budget=budget, max_batch_size=MOST)
        sizes = [Size(tokens, fewer) for tokens, room, _ in sizes for fewer in sorted({min(3, room), room})]
        self.plain, self.padded = make(PAGES), make(PAGES + 1)
        self.drawn = torch.zeros(MOST, dtype=torch.int64, device=model.device)
        self.graphs = Graphs(
            model,
            self.padded,
            self.drawn,
            eos_token_ids=(1,),
            max_batch_size=MOST,
            session_len=64,
            sizes=Sizes([1, 2, MOST], sizes, []),
            captured=captured,
        )
        self.rows: dict[Sequence, int] = {}
        self.steps = 0

    @torch.inference_mode()
    def step(self) -> tuple[bool, bool]:
        """One step: checks logits and pages, and goes on with the likeliest tokens. Returns whether it had prompts, and
        whether sequences that decode were beside them."""
        plan = self.scheduler.schedule()
        drawing = plan.drawing
        rows, before = self.rows, self.drawn.clone()
        batch = build_batch(plan, page_len=PAGE_LEN, device=self.model.device, rows=rows, drawn=before)
        expected = self.model.logits(batch, self.plain)
        self.steps += 1
        step = self.graphs.step_of(plan, rows, self.steps)
        assert step is not None and step.draws == len(drawing)
        counts = [sequence.scheduled for sequence in plan.sequences]
        assert step.graph.room or counts == [1] * len(counts)
        self.graphs.replay(step, self.steps)
        found = self.graphs.logits[: len(drawing)]
        assert found.isfinite().all()
        if drawing:
            assert (found - expected).abs().max() <= self.tolerance * expected.abs().max()
        for ours, theirs in zip(self.padded.layers, self.plain.layers, strict=True):
            for name in ("key", "value"):
                one, other = (getattr(pages, name)[:PAGES].float() for pages in (ours, theirs))
                if ours.key.dtype == torch.uint8:  # a value on the border of two bytes may go either way
                    assert ((one - other).abs() > 1).float().mean() <= self.tolerance, name
                    assert (one != other).float().mean() <= 0.01 + 5 * self.tolerance, name
                else:
                    assert (one - other).norm() <= self.tolerance * other.norm(), name
                assert torch.equal(one == 0, other == 0) or ours.key.dtype == torch.uint8, name
        for row, sequence in enumerate(drawing):
            likeliest = found[row].float().clone()
            likeliest[1] = float("-inf") if sequence.sampling.ignore_eos else likeliest[1]
            assert self.drawn[row] == likeliest.argmax()
        self.rows = {sequence: row for row, sequence in enumerate(drawing)}
        self.scheduler.resolve(self.scheduler.advance(plan), self.drawn[: len(drawing)].tolist())
        for sequence in [one for one in plan.sequences if len(one) == one.limit]:
            self.scheduler.finish(sequence)
        return max(counts) > 1, min(counts) == 1

    def serve(self, lengths: list[int], *, new: int, bases=None) -> set[tuple[bool, bool]]:
        """Sequences of these lengths, one more in every step. Returns the kinds of steps that there were."""
        chooser, kinds = random.Random(4), set()
        waiting = [
            Sequence(
                request_id=str(number),
                tokens=[chooser.randrange(self.model.config.vocab_size) for _ in range(length)],
                limit=length + new,
                sampling=Sampling(temperature=0, ignore_eos=bool(number % 2)),
                rope_base=None if bases is None else bases[number],
            )
            for number, length in enumerate(lengths)
        ]
        while waiting or self.scheduler.has_work():
            if waiting:
                self.scheduler.add(waiting.pop())
            kinds.add(self.step())
        return kinds


LENGTHS = [1, 5, 23, 2, 11, 40, 9]


@pytest.mark.parametrize("kv", ["kv16", "kv8", "kv8-token"])
@pytest.mark.parametrize("weights", ["fp16", "w4a16", "w8a8"])
def test_a_padded_step_computes_what_the_plan_does(weights, kv):
    config = tiny_config(hidden_size=64, intermediate_size=96, head_dim=16, sliding_window=9 if kv == "kv8" else None)
    model = model_of(weights, config)
    both = Both(model, scales=scales_of(config, kv))
    assert both.serve(LENGTHS, new=5) == {(False, True), (True, False), (True, True)}


@pytest.mark.parametrize("budget", [3, 17])
def test_prompts_in_pieces_are_padded_too(budget):
    Both(tiny_model(device="cpu"), budget=budget).serve(LENGTHS, new=4)


def test_every_sequence_keeps_its_rotary_base():
    model = tiny_model(config_of("dynamic"), device="cpu")
    bases = [10000.0 + 3000 * number for number in range(len(LENGTHS))]
    Both(model).serve(LENGTHS, new=4, bases=bases)


def test_a_step_of_nothing_but_padding_touches_the_spare_page_alone():
    """What a graph is captured with."""
    both = Both(tiny_model(config_of("dynamic"), device="cpu"))
    graphs = both.graphs
    with torch.inference_mode():
        for steps in (graphs._decode, graphs._mixed):
            for size in steps.sizes:
                step = steps.step_of(Plan(()), {}, 0, size)
                assert (step.draws, step.graph) == (0, size)
                graphs.replay(step, 0)
                graphs._compute(size, both.model.rehearse)
                assert graphs.logits[: len(steps.batch(size).logits_at)].isfinite().all()
    for pages in both.padded.layers:
        assert not pages.key[:-1].any() and not pages.value[:-1].any()
        assert pages.key[-1, :, 0].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kv", ["kv16", "kv8", "kv8-token"])
@pytest.mark.parametrize("weights", ["fp16", "w4a16", "w8a8"])
def test_a_graph_computes_what_the_plan_does(weights, kv):
    config = tiny_config(hidden_size=256, head_dim=64, num_heads=4, num_kv_heads=2, intermediate_size=512)
    model = model_of(weights, config, device="cuda", dtype=torch.float16)
    both = Both(model, scales=scales_of(config, kv), captured=True, tolerance=0.03)
    assert both.serve(LENGTHS, new=5) == {(False, True), (True, False), (True, True)}
