from dataclasses import replace

import pytest

from engine.config import EngineConfig, ModelConfig, Recipe, RopeScaling
from engine.storage.config_ini import (
    engine_config_of,
    model_config_of,
    read_config_ini,
    weight_type_of,
    write_config_ini,
)
from engine.storage.ini_edit import write_without
from tests.shared_data import shared

GOLDEN = "golden/turbomind-v0.1.0/llama_mha"
CONFIG = ModelConfig(
    family="llama",
    vocab_size=601,
    hidden_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=128,
    intermediate_size=768,
    norm_eps=1e-6,
    bos_token_id=1,
    eos_token_ids=(2,),
)


def _write(path, config=CONFIG, recipe=None, tp=1, **options):
    recipe = recipe or Recipe()
    options = {"model_name": "llama2", "session_len": 4104, **options}
    return write_config_ini(path, config, recipe=recipe, tp=tp, weight_type=weight_type_of(config, recipe), **options)


def _edited(tmp_path, old, new):
    path = tmp_path / "config.ini"
    _write(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(("name", "recipe"), [("fp16", Recipe()), ("awq", Recipe(weights="w4a16", group_size=128))])
def test_the_file_is_the_references_byte_for_byte(tmp_path, name, recipe, tp):
    expected = shared(f"{GOLDEN}/expected.{name}.tp{tp}.config.ini").read_bytes()
    _write(tmp_path / "config.ini", recipe=recipe, tp=tp)
    assert (tmp_path / "config.ini").read_bytes() == expected


def test_what_is_read_is_what_was_written(tmp_path):
    config = ModelConfig(
        family="llama",
        vocab_size=6400,
        hidden_size=96,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=100,
        norm_eps=1e-5,
        rope_theta=1e6,
        max_position_embeddings=32768,
        qkv_bias=True,
        o_bias=True,
        dtype="bfloat16",
    )
    path = tmp_path / "config.ini"
    options = {"extra": {"max_batch_size": 7, "num_tokens_per_iter": 512}, "model_name": "a = b % c"}
    written = _write(path, config, Recipe(kv="kv8"), 2, **options)
    ini = read_config_ini(path)
    assert ini == written
    assert (ini.size_per_head, ini.rotary_embedding, ini.kv_head_num, ini.weight_type) == (16, 16, 2, "bf16")
    assert (ini.quant_policy, ini.max_batch_size, ini.num_tokens_per_iter, ini.start_id) == (4, 7, 512, -1)
    assert model_config_of(ini, path) == config


def test_weight_type_follows_the_source():
    for dtype, expected in (("float16", "fp16"), ("float32", "fp16"), ("bfloat16", "bf16")):
        config = ModelConfig(**{name: getattr(CONFIG, name) for name in CONFIG.__slots__} | {"dtype": dtype})
        assert weight_type_of(config, Recipe()) == expected
        assert weight_type_of(config, Recipe(weights="w4a16", group_size=32)) == "int4"
        assert weight_type_of(config, Recipe(weights="w8a8")) == "int8"


def test_floats_beside_int8_are_fp16_or_said_to_be_bf16(tmp_path):
    path = tmp_path / "config.ini"
    for dtype, said in (("float16", None), ("bfloat16", "bf16"), ("float32", None)):
        ini = _write(path, replace(CONFIG, dtype=dtype), recipe=Recipe(weights="w8a8"))
        assert ini.ingot.float_type == said and read_config_ini(path) == ini
        assert model_config_of(ini, path).dtype == ("float16" if dtype == "float32" else dtype)
        assert ('[ingot]\nfloat_type = "bf16"\n' in path.read_text()) == (said is not None)


def test_what_is_rotated_is_said_and_goes_with_int8_alone(tmp_path):
    path = tmp_path / "config.ini"
    ini = _write(path, CONFIG, recipe=Recipe(weights="w8a8", rotate_down=8))
    assert "[ingot]\nrotate_down = 8\n" in path.read_text() and read_config_ini(path) == ini
    assert model_config_of(ini, path) == replace(CONFIG, rotate_down=8)
    for value, words in (("4", "must be one of 0, 8"), ("true", "must be one of 0, 8"), ("[8]", "must be one of 0, 8")):
        path.write_text(path.read_text().replace("rotate_down = 8", f"rotate_down = {value}"))
        with pytest.raises(ValueError, match=f"rotate_down = .*{words}"):
            read_config_ini(path)
        path.write_text(path.read_text().replace(f"rotate_down = {value}", "rotate_down = 8"))
    path.write_text(path.read_text().replace("weight_type = int8", "weight_type = fp16"))
    with pytest.raises(ValueError, match=r"rotate_down of .* goes with weight_type int8 alone, not with fp16"):
        read_config_ini(path)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("step_length = 1", "step_length = 2", "step_length"),
        ("head_num = 4", "head_nun = 4", "unknown key head_nun"),
        ("norm_eps = 1e-06\n", "", "norm_eps is missing"),
        ("norm_eps = 1e-06", "norm_eps = tiny", "norm_eps = 'tiny'"),
        ("norm_eps = 1e-06", "norm_eps = nan", "norm_eps"),
        ("vocab_size = 601", "vocab_size = 601.5", "whole number"),
        ("vocab_size = 601", "vocab_size = 0", "at least 1"),
        ("tensor_para_size = 1", "tensor_para_size = 3", "power of two"),
        ("quant_policy = 0", "quant_policy = 8", "0 or 4"),
        ("cache_max_entry_count = 0.5", "cache_max_entry_count = 1.5", "whole number of pages"),
        ("cache_max_entry_count = 0.5", "cache_max_entry_count = 4GB", "not a number"),
        ("weight_type = fp16", "weight_type = int3", "fp16 or bf16 or int4 or int8"),
        ("group_size = 0", "group_size = 32", "int4 needs a group_size above 0, the others need 0"),
        ("weight_type = fp16", "weight_type = int4", "group_size"),
        ("kv_head_num = 4", "kv_head_num = 3", "multiple of kv_head_num"),
        ("rotary_embedding = 128", "rotary_embedding = 64", "part of the head"),
        ("head_num = 4", "head_num = 4\nhead_num = 4", "not a TurboMind config.ini"),
        ("[llama]", "[gpt]", r"\[llama\]"),
        ("[llama]\n", "", "not a TurboMind config.ini"),
    ],
)
def test_a_wrong_file_is_refused_naming_file_and_key(tmp_path, old, new, words):
    path = _edited(tmp_path, old, new)
    with pytest.raises(ValueError, match=words) as error:
        read_config_ini(path)
    assert str(path) in str(error.value)


def test_what_can_be_set_is_written_in_its_place(tmp_path):
    said = {"max_batch_size": 3, "step_length": 1, "cache_max_entry_count": 1000, "cache_chunk_size": -1}
    of_the_model = {"max_position_embeddings": 4096, "rope_scaling_factor": 2, "use_logn_attn": 1}
    path = tmp_path / "config.ini"
    ini = _write(path, extra=said | of_the_model)
    assert read_config_ini(path) == ini
    assert {key: getattr(ini, key) for key in said | of_the_model} == said | of_the_model
    plain = tmp_path / "plain.ini"
    _write(plain)
    keys = [[line.partition(" = ")[0] for line in file.read_text().splitlines()] for file in (path, plain)]
    assert keys[0] == keys[1], "the reference's keys in the reference's order"
    scaled = replace(CONFIG, rope_scaling=RopeScaling(kind="turbomind", factor=2.0))
    assert model_config_of(ini, path) == replace(scaled, logn=True, max_position_embeddings=4096)
    assert _write(path, scaled, extra={"rope_scaling_factor": 0}).rope_scaling_factor == 0


def test_a_scaling_beside_the_models_own_is_not_written(tmp_path):
    config = replace(CONFIG, rope_scaling=RopeScaling(kind="linear", factor=4.0))
    with pytest.raises(ValueError, match=r"rope_scaling_factor is 2.*a scaling of its own \(linear\)"):
        _write(tmp_path / "config.ini", config, extra={"rope_scaling_factor": 2})
    assert not (tmp_path / "config.ini").exists()


def test_how_it_is_run(tmp_path):
    path = tmp_path / "config.ini"
    assert engine_config_of(_write(path, recipe=Recipe(kv="kv8"))) == EngineConfig(
        session_len=4104, max_batch_size=64, cache_max_entry_count=0.5, cache_block_seq_len=128, quant_policy=4
    )
    said = {"max_batch_size": 0, "cache_max_entry_count": 40, "cache_block_seq_len": 16, "num_tokens_per_iter": 99}
    assert engine_config_of(_write(path, extra=said)) == EngineConfig(
        session_len=4104, cache_max_entry_count=40, cache_block_seq_len=16, num_tokens_per_iter=99, quant_policy=0
    )


def test_a_cache_of_turbomind_1_is_left_to_the_default(tmp_path):
    path = _edited(tmp_path, "cache_max_entry_count = 0.5\ncache_block_seq_len = 128\n", "cache_max_entry_count = 48\n")
    assert read_config_ini(path).cache_max_entry_count == 0.5, "48 sequences there, not 48 pages"


def test_dynamic_ntk_and_logn_reach_the_model(tmp_path):
    path = _edited(
        tmp_path, "rope_scaling_factor = 0.0\nuse_logn_attn = 0", "rope_scaling_factor = 2.0\nuse_logn_attn = 1"
    )
    config = model_config_of(read_config_ini(path), path)
    assert config == replace(CONFIG, rope_scaling=RopeScaling(kind="turbomind", factor=2.0), logn=True)
    written = _write(tmp_path / "again.ini", config)
    assert (written.rope_scaling_factor, written.use_logn_attn) == (2.0, 1)
    assert (tmp_path / "again.ini").read_bytes() == path.read_bytes()
    # Below 1 the reference's engine does not look at it.
    path = _edited(tmp_path, "rope_scaling_factor = 0.0", "rope_scaling_factor = 0.5")
    assert model_config_of(read_config_ini(path), path) == CONFIG


SAYS_MORE = {
    "hidden_size": {"hidden_size": 768},
    "qk_norm": {"qk_norm": True},
    "sliding_window": {"sliding_window": 4096},
    "linear": {"rope_scaling": RopeScaling(kind="linear", factor=4.0)},
    "dynamic": {"rope_scaling": RopeScaling(kind="dynamic", factor=2.0)},
    "qwen": {"rope_scaling": RopeScaling(kind="qwen"), "logn": True},
    "llama3": {
        "rope_scaling": RopeScaling(
            kind="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        )
    },
    "yarn": {
        "rope_scaling": RopeScaling(
            kind="yarn",
            factor=4.0,
            original_max_position_embeddings=32768,
            attention_factor=1.1386294361119891,
            truncate=False,
        )
    },
    "all": {"hidden_size": 768, "qk_norm": True, "sliding_window": 7, "rope_scaling": RopeScaling(kind="qwen")},
}


@pytest.mark.parametrize("name", SAYS_MORE)
def test_what_turbominds_keys_cannot_say_follows_in_a_section_of_ours(tmp_path, name):
    config = replace(CONFIG, **SAYS_MORE[name])
    path = tmp_path / "config.ini"
    written = _write(path, config)
    assert read_config_ini(path) == written and model_config_of(written, path) == config
    plain = tmp_path / "plain.ini"
    _write(plain, replace(config, hidden_size=512, qk_norm=False, sliding_window=None, rope_scaling=None))
    assert path.read_text().startswith(plain.read_text() + "[ingot]\n") and path.read_text().endswith("\n\n")


def test_the_section_reads_as_it_is_documented(tmp_path):
    config = replace(CONFIG, qk_norm=True, rope_scaling=RopeScaling(kind="linear", factor=4.0))
    _write(tmp_path / "config.ini", config)
    lines = (tmp_path / "config.ini").read_text().split("[ingot]\n")[1]
    assert lines == 'qk_norm = true\nrope_scaling = {"factor": 4.0, "kind": "linear"}\n\n'


@pytest.mark.parametrize("granularity", ["head", "channel", "token"])
def test_scales_that_are_finer_than_turbominds_are_said(tmp_path, granularity):
    path, plain = tmp_path / "config.ini", tmp_path / "plain.ini"
    recipe = Recipe(kv="kv8", kv_granularity=granularity)
    written = _write(path, recipe=recipe)
    assert read_config_ini(path) == written and written.ingot.kv_granularity == granularity
    _write(plain, recipe=Recipe(kv="kv8"))
    assert path.read_text() == f'{plain.read_text()}[ingot]\nkv_granularity = "{granularity}"\n\n'
    # `ingot lite kv_qparams` writes TurboMind's scales and takes the key out again.
    write_without(path, path, "kv_granularity")
    assert path.read_bytes() == plain.read_bytes()
    _write(path, replace(CONFIG, qk_norm=True), recipe=recipe)
    write_without(path, path, "kv_granularity")
    assert path.read_text() == f"{plain.read_text()}[ingot]\nqk_norm = true\n\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("qk_nrom = true", r"unknown key qk_nrom in \[ingot\]"),
        ("qk_norm = True", "qk_norm = 'True' is not JSON"),
        ("qk_norm = 1", "qk_norm = 1 must be true or false"),
        ("sliding_window = 0", "sliding_window = 0 must be a whole number"),
        ('kv_granularity = "page"', 'kv_granularity = "page" must be one of "tensor", "head", "channel", "token"'),
        ("kv_granularity = channel", "kv_granularity = 'channel' is not JSON"),
        ("kv_granularity = [1]", r"kv_granularity = \[1\] must be one of"),
        ("hidden_size = 3.5", "hidden_size = 3.5 must be a whole number"),
        ("rope_scaling = 4", "must be a JSON object"),
        ('float_type = "fp16"', 'float_type = "fp16" may only be "bf16"'),
        ('float_type = "bf16"', "float_type .* goes with weight_type int8 alone; fp16 says"),
        ('rope_scaling = {"factor": 2.0}', "kind None; known kinds: linear"),
        ('rope_scaling = {"kind": "turbomind"}', "kind 'turbomind'"),
        ('rope_scaling = {"kind": "linear", "factor": -1}', "factor = -1"),
        ('rope_scaling = {"kind": "linear", "factor": true}', "factor = True"),
        ('rope_scaling = {"kind": "linear", "faktor": 2}', "unknown number faktor"),
        ('rope_scaling = {"kind": "yarn", "truncate": 1}', "truncate = 1"),
    ],
)
def test_a_wrong_section_is_refused_naming_file_and_key(tmp_path, line, words):
    path = tmp_path / "config.ini"
    _write(path)
    path.write_text(f"{path.read_text()}[ingot]\n{line}\n")
    with pytest.raises(ValueError, match=words) as error:
        read_config_ini(path)
    assert str(path) in str(error.value)


def test_two_scalings_at_once_are_refused(tmp_path):
    path = tmp_path / "config.ini"
    _write(path, replace(CONFIG, rope_scaling=RopeScaling(kind="linear", factor=4.0)))
    path.write_text(path.read_text().replace("rope_scaling_factor = 0.0", "rope_scaling_factor = 2.0"))
    with pytest.raises(ValueError, match=r"rope_scaling_factor 2\.0 does not go with"):
        model_config_of(read_config_ini(path), path)


@pytest.mark.parametrize(
    "options",
    [
        {"extra": {"head_num": 3}},
        {"extra": {"max_batchsize": 3}},
        {"session_len": 0},
        {"model_name": "two\nlines"},
        {"model_name": " x"},
    ],
)
def test_nothing_is_written_for_wrong_values(tmp_path, options):
    with pytest.raises(ValueError, match=r"config\.ini"):
        _write(tmp_path / "config.ini", **options)
    assert not (tmp_path / "config.ini").exists()
