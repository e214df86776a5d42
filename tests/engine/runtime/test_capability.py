from dataclasses import replace

import pytest
import torch

from engine.config import EngineConfig, ModelConfig, Recipe
from engine.models.cache import page_bytes
from engine.models.decoder import Decoder
from engine.runtime import capability, share
from engine.runtime.capability import Device, check_capability, computing_dtype, probe_device, weight_bytes
from engine.runtime.engine import Engine
from engine.storage.workspace import Workspace
from tests.tiny_artifact import SESSION_LEN, write_tiny_artifact

MODEL = ModelConfig(
    family="llama",
    vocab_size=1000,
    hidden_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=256,
    norm_eps=1e-5,
    dtype="bfloat16",
)
OPTIONS = EngineConfig(device="cuda", cache_block_seq_len=16, cache_max_entry_count=0.5)
FP16 = Recipe()


def device(free_bytes=1 << 40, **changes):
    return replace(Device(name="a card", bfloat16=True, int8=True, free_bytes=free_bytes), **changes)


def check(recipe=FP16, options=OPTIONS, on=None, session_len=64, model=MODEL):
    check_capability(model, recipe, options, on or device(), session_len=session_len)


def test_a_card_without_bfloat16_is_told_so_and_what_would_run():
    old = device(bfloat16=False)
    with pytest.raises(ValueError, match=r"a card does not compute in bfloat16.*dtype=auto.*dtype=float16 would run"):
        check(on=old)
    with pytest.raises(ValueError, match="dtype=bfloat16 asks"):
        check(on=old, options=replace(OPTIONS, dtype="bfloat16"))
    check(on=old, options=replace(OPTIONS, dtype="float16"))
    check(on=old, model=replace(MODEL, dtype="float16"))
    check(on=device())


def test_a_card_without_int8_products_cannot_run_w8a8():
    with pytest.raises(ValueError, match=r"int8.*weights=w4a16"):
        check(Recipe(weights="w8a8"), on=device(int8=False))
    check(Recipe(weights="w8a8"))
    check(Recipe(kv="kv8"), on=device(int8=False))


def test_memory_must_hold_the_weights_and_one_sequence_to_the_byte():
    weights = weight_bytes(MODEL, FP16, torch.bfloat16)
    sequence = 4 * page_bytes(MODEL, page_len=16, dtype=torch.bfloat16, quantized=False)
    check(on=device(weights + 2 * sequence))
    with pytest.raises(ValueError, match=r"free.*weights \(fp16, computed in bfloat16\).*session_len 64"):
        check(on=device(weights + 2 * sequence - 2))
    pages = replace(OPTIONS, cache_max_entry_count=4)
    check(on=device(weights + sequence), options=pages)
    with pytest.raises(ValueError, match="MiB free"):
        check(on=device(weights + sequence - 1), options=pages)
    with pytest.raises(ValueError, match="MiB free"):
        check(on=device(), options=replace(OPTIONS, cache_max_entry_count=3))


def test_what_is_proposed_runs():
    weights = weight_bytes(MODEL, FP16, torch.bfloat16)
    page = page_bytes(MODEL, page_len=16, dtype=torch.bfloat16, quantized=False)
    tight = device(weights + 6 * page)
    with pytest.raises(ValueError, match=r"session_len=48, or cache_max_entry_count=0.9, or an artifact with kv=kv8\."):
        check(on=tight)
    check(on=tight, session_len=48)
    check(on=tight, options=replace(OPTIONS, cache_max_entry_count=0.9))
    check(Recipe(kv="kv8"), on=tight)
    wide = replace(OPTIONS, dtype="float32")
    with pytest.raises(ValueError, match=r"What would run: dtype=bfloat16\."):
        check(on=device(weights + 10 * page), options=wide)
    with pytest.raises(ValueError, match="No setting of this artifact would run here"):
        check(on=device(weights // 2))


def test_scales_of_every_token_are_counted():
    weights = weight_bytes(MODEL, FP16, torch.bfloat16)
    pages = replace(OPTIONS, cache_max_entry_count=4)
    size = {
        by_token: 4 * page_bytes(MODEL, page_len=16, dtype=torch.bfloat16, quantized=True, per_token=by_token)
        for by_token in (False, True)
    }
    assert size[True] - size[False] == 4 * MODEL.num_layers * MODEL.num_kv_heads * 16 * 8
    for granularity in ("tensor", "channel", "token"):
        recipe, least = Recipe(kv="kv8", kv_granularity=granularity), weights + size[granularity == "token"]
        check(recipe, on=device(least), options=pages)
        with pytest.raises(ValueError, match="MiB free"):
            check(recipe, on=device(least - 1), options=pages)


def test_an_amount_of_memory_must_be_there_and_hold_one_sequence():
    weights = weight_bytes(MODEL, FP16, torch.bfloat16)
    sequence = 4 * page_bytes(MODEL, page_len=16, dtype=torch.bfloat16, quantized=False)
    small = replace(OPTIONS, cache_max_entry_count="1MiB")
    assert sequence < 2**20
    check(on=device(weights + 2**20), options=small)
    with pytest.raises(ValueError, match=r"the KV cache 1 MiB \(cache_max_entry_count=1MiB\)\. What would run: cache"):
        check(on=device(weights + 2**20 - 2**12), options=small)
    with pytest.raises(ValueError, match=r"session_len 4096 takes 2 MiB.*What would run: session_len=2048, or"):
        check(on=device(), options=small, session_len=4096)


def test_what_is_left_open_is_checked_at_its_default():
    weights = weight_bytes(MODEL, FP16, torch.bfloat16)
    sequence = page_bytes(MODEL, page_len=64, dtype=torch.bfloat16, quantized=False)
    check(on=device(weights + 2 * sequence), options=EngineConfig(device="cuda"))
    with pytest.raises(ValueError, match=r"cache_max_entry_count=0\.5 gives"):
        check(on=device(weights + 2 * sequence - 2), options=EngineConfig(device="cuda"))


def test_four_bits_count_what_is_packed_and_what_is_unpacked():
    dense = weight_bytes(MODEL, FP16, torch.float16)
    packed = weight_bytes(MODEL, Recipe(weights="w4a16", group_size=32), torch.float16)
    linears = MODEL.num_layers * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 256)
    assert packed - dense == linears // 2 + linears // 32 * 5 // 2


def test_int8_linears_count_a_byte_a_weight_and_their_scales_whatever_computes():
    linears = MODEL.num_layers * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 256)
    outputs = MODEL.num_layers * (128 + 64 + 64 + 128 + 256 + 256 + 128)
    for dtype in (torch.float16, torch.float32):
        dense = weight_bytes(MODEL, FP16, dtype)
        assert (
            weight_bytes(MODEL, Recipe(weights="w8a8"), dtype) == dense - linears * (dtype.itemsize - 1) + outputs * 4
        )


def test_devices_that_are_not_here_are_refused():
    assert probe_device("cpu").bfloat16 and probe_device("cpu").free_bytes > 0
    with pytest.raises(ValueError, match="is no device"):
        probe_device("tpu9")
    with pytest.raises(ValueError, match="not supported; cpu and cuda"):
        probe_device("meta")
    with pytest.raises(ValueError, match=r"cuda:99 is not on this machine"):
        probe_device("cuda:99")


def test_auto_is_float32_on_a_cpu_and_the_weights_own_type_on_a_card():
    assert computing_dtype(MODEL, EngineConfig()) == "float32"
    assert computing_dtype(MODEL, OPTIONS) == "bfloat16"
    assert computing_dtype(MODEL, EngineConfig(dtype="float16")) == "float16"


def test_the_engine_asks_before_it_reads_a_weight(tmp_path, monkeypatch):
    write_tiny_artifact(tmp_path)
    config = Workspace(tmp_path).config
    # What is counted is what a model holds.
    model = Decoder(config, Workspace(tmp_path).weights(), device="cpu", dtype=torch.float32)
    held = [model._embedding, model._head.weight, model._norm]
    for layer in model.layers:
        held += [layer._attention_norm, layer._mlp_norm]
        held += [linear.weight for linear in (layer._qkv, layer._output, layer._gate_up, layer._down)]
    assert sum(tensor.nbytes for tensor in held) == weight_bytes(config, FP16, torch.float32)

    monkeypatch.setattr(share, "probe_device", lambda text: device(1000))
    monkeypatch.setattr(share, "Decoder", lambda *args, **options: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=rf"session_len {SESSION_LEN}"):
        Engine.from_workspace(tmp_path, EngineConfig())
    assert capability.MIB == 2**20


def test_packed_weights_count_once_where_the_device_multiplies_them_as_they_are():
    recipe = Recipe(weights="w4a16", group_size=8)
    packed = weight_bytes(MODEL, recipe, torch.float16, int4=(torch.float16,))
    assert packed < weight_bytes(MODEL, FP16, torch.float16) < weight_bytes(MODEL, recipe, torch.float16)
    assert weight_bytes(MODEL, recipe, torch.float32, int4=(torch.float16,)) == weight_bytes(
        MODEL, recipe, torch.float32
    )
