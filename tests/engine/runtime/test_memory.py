import torch

from engine.config import EngineConfig
from engine.models.cache import PerToken
from engine.runtime.memory import MemoryReport, free_memory, num_pages_for
from tests.engine.runtime.tiny_model import tiny_model

CONFIG = EngineConfig(cache_max_entry_count=0.5, cache_block_seq_len=4, max_batch_size=3).complete()


def pages(config=CONFIG, *, reserved=0, scales=None):
    model = tiny_model(device="cpu")
    return num_pages_for(
        model, config, session_len=10, scales=scales, room=max(free_memory(model.device) - reserved, 0)
    )


def test_free_memory_is_counted():
    assert free_memory(torch.device("cpu")) > 2**20


def test_on_a_cpu_a_share_ends_where_the_largest_batch_of_full_sessions_fits():
    assert pages() == 3 * 3


def test_what_is_reserved_is_not_given_out():
    free = free_memory(torch.device("cpu"))
    size = EngineConfig(cache_max_entry_count=0.5, cache_block_seq_len=4, max_batch_size=10**12).complete()
    beside = pages(size, reserved=free // 2)
    assert 0.3 < beside / pages(size) < 0.7


def test_scales_of_tokens_make_pages_larger():
    size = EngineConfig(cache_max_entry_count="1MB", cache_block_seq_len=4, max_batch_size=3).complete()
    assert pages(size, scales=PerToken()) < pages(size) * 4


def test_a_report_is_one_line():
    report = MemoryReport(weights=1 << 30, pages=3 << 29, workspace=1 << 28, free=0)
    assert str(report) == "weights 1.00 GiB, KV pages 1.50 GiB, workspace 0.25 GiB, free 0.00 GiB"
