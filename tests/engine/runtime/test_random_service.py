"""An engine with the demo's model that is never at rest: random lengths, options, owners and aborts lose no page."""

import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from engine.config import EngineConfig, Sampling
from engine.runtime.engine import Engine
from pipelines.convert import Conversion, convert

DEMO = Path(__file__).resolve().parents[3] / "demo" / "model"
SESSION_LEN = 512
# Fewer pages than 16 long sequences need: some have to give way.
CONFIG = EngineConfig(max_batch_size=16, num_tokens_per_iter=128, cache_max_entry_count=160, cache_block_seq_len=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "workspace"
    convert(Conversion(name="demo", source=DEMO, target=path))
    return path


def random_sampling(rng: random.Random) -> Sampling:
    return Sampling(
        max_new_tokens=rng.choice([1, 5, 30, 100, 600]),
        temperature=rng.choice([0, 0.7, 1, 2]),
        top_k=rng.choice([0, 1, 40]),
        top_p=rng.choice([0.1, 0.9, 1]),
        min_p=rng.choice([0, 0, 0.2]),
        repetition_penalty=rng.choice([1, 1, 0.8, 1.5]),
        presence_penalty=rng.choice([0, 0, 2, -2]),
        frequency_penalty=rng.choice([0, 0, 2, -2]),
        logit_bias=rng.choice([(), (), ((30, 5.0), (200, -100.0))]),
        seed=rng.choice([None, 7]),
        stop=rng.choice([(), (), ("pigeon", " in the")]),
        stop_token_ids=rng.choice([(), (), (50, 60)]),
        ignore_eos=rng.random() < 0.5,
        skip_special_tokens=rng.random() < 0.8,
        logprobs=rng.choice([None, None, 0, 5]),
    )


def service(folder: Path, seed: int, *, seconds: float, most: float, config: EngineConfig = CONFIG) -> Counter[str]:
    """How many requests ended in which way, in so many seconds or after `most` of them; every page is free again."""
    rng = random.Random(seed)
    engine = Engine.from_workspace(folder, config)
    memory, unfinished, ended = 0, set(), Counter()
    shared = [rng.choices(range(3, 1000), k=400) for _ in range(4)]
    until = time.monotonic() + seconds
    while engine.has_work() or (time.monotonic() < until and ended.total() < most):
        open_ = time.monotonic() < until and ended.total() < most
        for _ in range(rng.choice([0, 0, 1, 3]) if open_ and len(unfinished) < 60 else 0):
            length = rng.choice([1, 10, 50, 200, 400])
            prompt = rng.choice(shared)[:length] if rng.random() < 0.5 else rng.choices(range(3, 1000), k=length)
            owner, priority = rng.choice("aaaabc"), rng.choice([0, 0, 5])
            unfinished.add(engine.add(prompt, random_sampling(rng), owner=owner, priority=priority))
        if unfinished and rng.random() < 0.05:
            engine.abort(rng.choice(sorted(unfinished)))
        for event in engine.step():
            assert event.request_id in unfinished, "news of a request that has ended, or never was"
            if event.finish_reason is not None:
                unfinished.remove(event.request_id)
                ended[event.finish_reason] += 1
        engine.check()
        if not memory and ended.total() >= 200:
            memory = psutil.Process().memory_info().rss
    assert not unfinished
    figures = engine.figures()
    ended["preempted"] = int(figures.pop("preemptions"))
    assert figures == {"running": 0, "waiting": 0, "cache_usage": 0}
    if memory:
        assert psutil.Process().memory_info().rss - memory < 256 << 20, "memory that grows with the requests"
    return ended


def test_random_service_of_the_demo_loses_no_page(folder: Path) -> None:
    ended = service(folder, 1, seconds=60, most=40)
    assert ended.keys() == {"stop", "length", "abort", "preempted"}
    assert ended.total() >= 40


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_random_service_of_the_demo_for_twenty_minutes_soak(folder: Path, soak_row: dict[str, int]) -> None:
    """`count` is the requests that ended."""
    soak_row["failures"] = 1
    ended = service(folder, 2, seconds=1200, most=float("inf"))
    print(dict(ended))
    soak_row |= {"count": ended.total() - ended["preempted"], "failures": 0}


@pytest.mark.gpu
@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_service_on_a_gpu_for_eight_minutes_soak(folder: Path, soak_row: dict[str, int]) -> None:
    """`count` is the requests that ended."""
    soak_row["failures"] = 1
    ended = service(folder, 3, seconds=480, most=float("inf"), config=replace(CONFIG, device="cuda"))
    print(dict(ended))
    soak_row |= {"count": ended.total() - ended["preempted"], "failures": 0}
