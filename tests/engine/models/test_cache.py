import pytest
import torch

from engine.models.cache import KVCache, KVScales, PerToken, page_bytes
from tests.engine.models.tiny import tiny_config


def scales(scale=0.1, zero=0.0, *, layers=2, kv_heads=2, head_dim=8):
    pairs = torch.tensor([scale, zero]).expand(layers, kv_heads, head_dim, 2).clone()
    return KVScales(key=pairs, value=pairs.clone())


def stored_bytes(cache):
    tensors = [x for pages in cache.layers for x in (pages.key, pages.value, pages.key_steps, pages.value_steps)]
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float_pages(dtype):
    cache = KVCache(tiny_config(), num_pages=3, page_len=4, device="cpu", dtype=dtype)
    assert len(cache.layers) == 2
    assert cache.layers[0].key.shape == cache.layers[1].value.shape == (3, 2, 4, 8)
    assert cache.layers[0].key.dtype == dtype and cache.layers[0].key_scale is None
    assert stored_bytes(cache) == 3 * page_bytes(tiny_config(), page_len=4, dtype=dtype, quantized=False)


def test_int8_pages_exactly_when_scales_are_given():
    given = scales()
    given.key[1, 1, 3:] = torch.tensor([0.5, -2.0])
    given.value[0, 1] = torch.tensor([0.25, 3.0])
    cache = KVCache(tiny_config(), num_pages=3, page_len=4, device="cpu", dtype=torch.float32, scales=given)
    assert cache.layers[0].value.dtype == torch.uint8
    assert cache.layers[1].key_scale[1].tolist() == pytest.approx([0.1] * 3 + [0.5] * 5)
    assert cache.layers[1].key_zero.tolist() == [[0.0] * 8, [0.0] * 3 + [-2.0] * 5]
    assert cache.layers[0].value_scale[:, 0].tolist() == pytest.approx([0.1, 0.25])
    assert cache.layers[0].value_zero[:, 7].tolist() == [0.0, 3.0]
    assert stored_bytes(cache) == 3 * page_bytes(tiny_config(), page_len=4, dtype=torch.float32, quantized=True)


def test_a_pair_of_a_head_is_that_of_all_its_channels():
    key, value = torch.rand(2, 2, 2) + 0.1, torch.rand(2, 2, 2) + 0.1
    spread = KVScales.of_heads(key=key, value=value, head_dim=8)
    assert spread.key.shape == spread.value.shape == (2, 2, 8, 2)
    assert all(torch.equal(spread.key[:, :, c], key) and torch.equal(spread.value[:, :, c], value) for c in range(8))


def test_pages_with_a_pair_for_each_token():
    cache = KVCache(tiny_config(), num_pages=3, page_len=4, device="cpu", dtype=torch.float32, scales=PerToken())
    pages = cache.layers[1]
    assert pages.key.dtype == torch.uint8 and pages.key_scale is None
    assert pages.key_steps.shape == pages.value_steps.shape == (3, 2, 4, 2)
    assert pages.key_steps.dtype == torch.float16
    size = page_bytes(tiny_config(), page_len=4, dtype=torch.float32, quantized=True, per_token=True)
    assert stored_bytes(cache) == 3 * size
    assert size == 1.5 * page_bytes(tiny_config(), page_len=4, dtype=torch.float32, quantized=True)  # heads of 8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (scales(layers=3), "key are torch.float32 .3, 2, 8, 2."),
        (scales(head_dim=1), "key are torch.float32 .2, 2, 1, 2."),
        (scales(kv_heads=1), "this model needs"),
        (scales(0.0), "not positive"),
        (scales(float("nan")), "not positive"),
        (scales(0.1, float("inf")), "not finite"),
    ],
)
def test_scales_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        KVCache(tiny_config(), num_pages=1, page_len=4, device="cpu", dtype=torch.float32, scales=wrong)
