import pytest
import torch

from engine.models.cache import KVCache, KVScales, page_bytes
from tests.engine.models.tiny import tiny_config


def scales(scale=0.1, zero=0.0, *, layers=2, kv_heads=2):
    pairs = torch.tensor([scale, zero]).expand(layers, kv_heads, 2).clone()
    return KVScales(key=pairs, value=pairs.clone())


def stored_bytes(cache):
    return sum(x.numel() * x.element_size() for pages in cache.layers for x in (pages.key, pages.value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float_pages(dtype):
    cache = KVCache(tiny_config(), num_pages=3, page_len=4, device="cpu", dtype=dtype)
    assert len(cache.layers) == 2
    assert cache.layers[0].key.shape == cache.layers[1].value.shape == (3, 2, 4, 8)
    assert cache.layers[0].key.dtype == dtype and cache.layers[0].key_scale is None
    assert stored_bytes(cache) == 3 * page_bytes(tiny_config(), page_len=4, dtype=dtype, quantized=False)


def test_int8_pages_exactly_when_scales_are_given():
    given = scales()
    given.key[1, 1] = torch.tensor([0.5, -2.0])
    given.value[0, 1] = torch.tensor([0.25, 3.0])
    cache = KVCache(tiny_config(), num_pages=3, page_len=4, device="cpu", dtype=torch.float32, scales=given)
    assert cache.layers[0].value.dtype == torch.uint8
    assert cache.layers[1].key_scale.tolist() == pytest.approx([0.1, 0.5])
    assert cache.layers[1].key_zero.tolist() == [0.0, -2.0]
    assert cache.layers[0].value_scale.tolist() == pytest.approx([0.1, 0.25])
    assert cache.layers[0].value_zero.tolist() == [0.0, 3.0]
    assert stored_bytes(cache) == 3 * page_bytes(tiny_config(), page_len=4, dtype=torch.float32, quantized=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (scales(layers=3), "key are torch.float32 .3, 2, 2."),
        (scales(kv_heads=1), "this model needs"),
        (scales(0.0), "not positive"),
        (scales(float("nan")), "not positive"),
        (scales(0.1, float("inf")), "not finite"),
    ],
)
def test_scales_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        KVCache(tiny_config(), num_pages=1, page_len=4, device="cpu", dtype=torch.float32, scales=wrong)
