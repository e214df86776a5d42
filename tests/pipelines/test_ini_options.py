import pytest

from engine.storage.ini_keys import KEYS, RUNTIME_KEYS
from pipelines.ini_options import FIXED, Ini, check_overrides, problems, written


def test_every_key_of_config_ini_can_be_set_or_says_why_not():
    settable = set(Ini.__dataclass_fields__)
    assert settable == set(RUNTIME_KEYS)
    assert not settable & FIXED.keys()
    assert settable | FIXED.keys() == set(KEYS)


def test_only_what_is_set_is_written():
    assert written(Ini()) == {}
    assert written(Ini(max_batch_size=8, use_logn_attn=0)) == {"max_batch_size": 8, "use_logn_attn": 0}
    for same in (1000, 1000.0):
        assert str(written(Ini(cache_max_entry_count=same))) == "{'cache_max_entry_count': 1000.0}"


GOOD = {
    "max_batch_size": (0, 1, 128),
    "max_context_token_num": (1, 4),
    "step_length": (1,),
    "cache_max_entry_count": (0.01, 0.99, 1, 1000),
    "cache_block_seq_len": (1, 64),
    "cache_chunk_size": (-1, 0, 8),
    "use_context_fmha": (0, 1),
    "max_position_embeddings": (1, 32768),
    "rope_scaling_factor": (0.0, 1.0, 2.5),
    "use_logn_attn": (0, 1),
    "num_tokens_per_iter": (0, 4096),
    "extra_tokens_per_iter": (0,),
    "max_prefill_iters": (1,),
}
BAD = {
    "max_batch_size": (-1,),
    "max_context_token_num": (-1,),
    "step_length": (0, 2),
    "cache_max_entry_count": (0, -0.5, 1.5, float("inf"), float("nan")),
    "cache_block_seq_len": (0,),
    "cache_chunk_size": (-2,),
    "use_context_fmha": (2,),
    "max_position_embeddings": (0, -1),
    "rope_scaling_factor": (-1.0, 0.5, float("inf"), float("nan")),
    "use_logn_attn": (2,),
    "num_tokens_per_iter": (-1,),
    "extra_tokens_per_iter": (-1,),
    "max_prefill_iters": (-1,),
}


@pytest.mark.parametrize("key", RUNTIME_KEYS)
def test_ranges(key):
    for value in GOOD[key]:
        assert list(problems(Ini(**{key: value}))) == []
    for value in BAD[key]:
        [said] = problems(Ini(**{key: value}))
        assert said.startswith(f"ini.{key}") and "must be" in said and not said.endswith(".")


def test_an_amount_of_memory_is_for_serving():
    [said] = problems(Ini(cache_max_entry_count="4GB"))
    assert (
        said.startswith("ini.cache_max_entry_count=4GB must be a share") and "serve.cache_max_entry_count=4GB" in said
    )


@pytest.mark.parametrize("prefix", ["", "+", "++", "~"])
@pytest.mark.parametrize("key", FIXED)
def test_a_fixed_key_is_refused_with_the_reason(key, prefix):
    for path in (key, f"ini.{key}"):
        with pytest.raises(ValueError, match=f"^{path} cannot be set: {FIXED[key]}\\.$"):
            check_overrides(["weights=fp16", f"{prefix}{path}=3"])


def test_a_key_in_the_wrong_place_and_a_typo_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"^max_batch_size is a key of config\.ini: set ini\.max_batch_size\.$"):
        check_overrides(["max_batch_size=3"])
    with pytest.raises(ValueError, match=r"has no key max_batchsize\. Those that can be set: max_batch_size, "):
        check_overrides(["+ini.max_batchsize=3"])


def test_other_overrides_are_not_looked_at():
    check_overrides(
        ["ini.max_batch_size=3", "tp=2", "model.session_len=9", "-m", "--cfg", "job", "weights.group_size=64"]
    )
