"""What config.ini says about running a workspace, and options over it."""

import pytest
import torch

from engine.config import EngineConfig, Recipe
from engine.models.cache import page_bytes
from engine.runtime.engine import Engine
from engine.storage.config_ini import weight_type_of, write_config_ini
from engine.storage.ini_edit import write_with_value
from engine.storage.kv_scale_files import write_kv_scales, write_layer_scales
from engine.storage.workspace import CONFIG_INI, WEIGHTS, Workspace
from tests.tiny_artifact import write_tiny_artifact


@pytest.fixture
def folder(tmp_path):
    write_tiny_artifact(tmp_path)
    return tmp_path


def write_ini(folder, **extra):
    path, config = folder / WEIGHTS / CONFIG_INI, Workspace(folder).config
    write_config_ini(
        path,
        config,
        model_name="tiny",
        recipe=Recipe(),
        tp=1,
        session_len=128,
        weight_type=weight_type_of(config, Recipe()),
        extra=extra,
    )


def running(folder, **options):
    scheduler = Engine.from_workspace(folder, EngineConfig(**options))._scheduler
    pages = scheduler.pages
    return scheduler._max_batch_size, pages.page_len, pages.num_pages, scheduler._num_tokens_per_iter


def test_what_config_ini_says_holds_unless_an_option_says_otherwise(folder):
    assert running(folder, cache_max_entry_count=7) == (64, 128, 7, 512), "what a converter writes"
    write_ini(folder, max_batch_size=3, cache_block_seq_len=8, cache_max_entry_count=21, num_tokens_per_iter=5)
    assert running(folder) == (3, 8, 21, 5)
    assert running(folder, max_batch_size=2, cache_block_seq_len=16, cache_max_entry_count=9) == (2, 16, 9, 5)
    page = page_bytes(Workspace(folder).config, page_len=8, dtype=torch.float32, quantized=False)
    assert running(folder, cache_max_entry_count="1MB") == (3, 8, 10**6 // page, 5)


def test_a_share_on_a_cpu_ends_where_all_sequences_fit(folder):
    write_ini(folder, max_batch_size=3, cache_block_seq_len=16)
    assert running(folder) == (3, 16, 3 * 8, 512)


def test_a_zero_of_config_ini_is_the_default(folder):
    write_ini(folder, max_batch_size=0, num_tokens_per_iter=0, cache_max_entry_count=5)
    assert running(folder) == (64, 128, 5, 512)


def test_what_a_model_computes_with_can_be_said_in_both_places(folder):
    write_ini(folder, rope_scaling_factor=2.0, use_logn_attn=1, max_position_embeddings=64)

    def model(**options):
        config = Engine.from_workspace(folder, EngineConfig(**options))._model_config
        return config.rope_scaling and config.rope_scaling.factor, config.logn, config.max_position_embeddings

    assert model() == (2.0, True, 64)
    assert model(rope_scaling_factor=0, use_logn_attn=False) == (None, False, 64)
    assert model(rope_scaling_factor=4, max_position_embeddings=32) == (4.0, True, 32)


def test_scales_that_config_ini_does_not_use_can_be_used(folder):
    def stored(**options):
        return Engine.from_workspace(folder, EngineConfig(**options))._runner._cache.layers[0].key.dtype

    with pytest.raises(ValueError, match=r"quant_policy is 4.*no KV scales"):
        stored(quant_policy=4)
    write_kv_scales(folder / WEIGHTS, 0, [(0.05, 0.0, 0.05, 0.0)])
    assert stored() == torch.float32
    with pytest.raises(FileNotFoundError, match=r"layers\.1\.past_kv_scale\.0\.weight"):
        stored(quant_policy=4)
    write_kv_scales(folder / WEIGHTS, 1, [(0.05, 0.0, 0.05, 0.0)])
    assert stored(quant_policy=4) == torch.uint8


def test_a_key_of_ours_says_what_the_scales_are_and_quant_policy_whether_they_are_used(folder):
    ini = folder / WEIGHTS / CONFIG_INI
    plain, config = ini.read_text(), Workspace(folder).config
    rows = torch.rand(config.num_kv_heads, config.head_dim, 4, generator=torch.Generator().manual_seed(0)) + 0.01

    def pages(granularity, policy, **options):
        ini.write_text(f'{plain}[ingot]\nkv_granularity = "{granularity}"\n\n')
        write_with_value(ini, ini, "quant_policy", policy)
        return Engine.from_workspace(folder, EngineConfig(**options))._runner._cache.layers[1]

    with pytest.raises(FileNotFoundError, match=r"layers\.0\.past_kv_scale\.channels is missing"):
        pages("channel", 4)
    for layer in range(config.num_layers):
        write_layer_scales(folder / WEIGHTS, layer, rows, granularity="channel", tp=1)
    for policy, options in ((4, {}), (0, {"quant_policy": 4})):
        assert torch.equal(pages("channel", policy, **options).key_scale, rows[..., 0])
        by_token = pages("token", policy, **options)
        assert by_token.key_scale is None and by_token.key_steps.dtype == torch.float16
        tensor = pages("tensor", policy, **options)
        assert float(tensor.value_scale.max()) == float(tensor.value_scale.min()) >= float(rows[..., 2].max())
    for granularity in ("channel", "token"):
        assert pages(granularity, 4, quant_policy=0).key.dtype == torch.float32


def test_an_amount_that_is_not_free_is_refused_before_weights_are_read(folder):
    with pytest.raises(ValueError, match=r"cpu has .* KV cache \d+ MiB \(cache_max_entry_count=900000GB\)\. What"):
        Engine.from_workspace(folder, EngineConfig(cache_max_entry_count="900000GB"))
