import dataclasses

import pytest

from engine.config import COUNTS, SWITCHES, EngineConfig
from server.config import UNMEASURED, ServeConfig


def test_every_option_of_the_engine_can_be_said_when_serving():
    options = {each.name for each in dataclasses.fields(EngineConfig)}
    # Where an answer ends follows from the chat template, not from a user.
    assert options - {"end_ids"} <= {each.name for each in dataclasses.fields(ServeConfig)}
    assert set(UNMEASURED) == set(SWITCHES)


@pytest.mark.parametrize("name", COUNTS)
def test_a_number_is_null_or_from_1_on(name):
    assert getattr(ServeConfig(**{name: 3}).engine_config(), name) == 3
    assert getattr(ServeConfig().engine_config(), name) == 0
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=rf"serve\.{name} is {wrong}, but must be null \(what the artifact says\)"):
            ServeConfig(**{name: wrong})


def test_what_the_engine_refuses_is_refused_by_its_name_here():
    for name, value in (("quant_policy", 3), ("dtype", "int8"), ("cache_max_entry_count", "4 gigabytes")):
        with pytest.raises(ValueError, match=rf"^serve\.{name} is {value!r}, but must be"):
            ServeConfig(**{name: value})


def test_what_changes_the_numbers_is_told_from_what_does_not():
    assert ServeConfig(max_batch_size=2, cache_max_entry_count="1GB", session_len=9).unmeasured == []
    assert ServeConfig(quant_policy=0, use_logn_attn=False).unmeasured == ["quant_policy", "use_logn_attn"]
