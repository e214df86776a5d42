import dataclasses

import pytest

from benchmarks import attention_cases, attention_forms
from benchmarks.attention_forms import Way, choose, granularities, lengths, line
from benchmarks.shapes import shape
from cli.main import main
from tests.engine.kernels.triton_device import DEVICE

WALK = {"form": "walk", "block": 16, "stages": 3, "warps": 1, "registers": 128, "each": 2}
SPLIT = {"block": 32, "stages": 3, "warps": 4}


def test_it_takes_the_caches_that_the_cases_have() -> None:
    assert attention_forms.CACHES == attention_cases.CACHES


def test_unequal_lengths_are_the_same_every_time() -> None:
    assert lengths(3, 7) == [7, 7, 7]
    lens = lengths(256, 0)
    assert lens == lengths(256, 0) and len(lens) == 256 and 1 <= min(lens) < 100 and max(lens) > 800


def test_a_line_says_the_speed_of_both_forms() -> None:
    ways = [Way("split", SPLIT, 200.0, 210.0), Way("walk", WALK, 100.0, 105.0), Way("walk", WALK, 90.0, 120.0)]
    text = line("256 x 272 kv16", ways, size=400_000_000, copy=4e12)
    assert "split   200.0 us 2.00 TB/s  50% (32/3/4), with rotation   210.0 us" in text
    assert "walk    90.0 us 4.44 TB/s 111% (16/3/1/128/2), with rotation   105.0 us" in text
    assert "walk: none" in line("1 x 512 kv8", ways[:1], size=1, copy=1.0)


def test_the_chosen_way_is_good_at_all_contexts_of_a_batch() -> None:
    other = WALK | {"each": 4}
    short = [Way("split", SPLIT, 9.0, 10.0), Way("walk", WALK, 4.0, 5.0), Way("walk", other, 3.0, 4.0)]
    long = [Way("split", SPLIT, 90.0, 100.0), Way("walk", WALK, 91.0, 101.0), Way("walk", other, 140.0, 150.0)]
    assert choose([short, long]) == (4.0, WALK | {"turns": 1})
    assert choose([long]) == (90.0, SPLIT)
    # What failed in one of the cases is not taken.
    assert choose([short, long[:1]]) == (9.0, SPLIT)


def test_what_scales_of_tokens_cost() -> None:
    best = {(1, 512, "kv16"): 9.0, (1, 512, "kv8"): 4.0, (1, 512, "kv8-token"): 5.0, (64, 272, "kv8"): 1.0}
    assert granularities(best) == ["1 x 512: token takes 1.25 of channel's time"]


@pytest.mark.parametrize("kv", attention_cases.CACHES)
def test_the_forms_of_a_case_agree(kv: str) -> None:
    from benchmarks.attention_ways import WRONG, Case, differ

    config = dataclasses.replace(shape("tiny"), num_layers=1)
    config = dataclasses.replace(config, num_kv_heads=config.num_heads)
    case = Case(config, DEVICE, kv, [1, 65, 30], rotated=1)
    assert case.bytes == 96 * attention_cases.token_bytes(_setting(config), kv) and len(case.caches) == 3
    turned, alone = case.turned(case.proven(), 0), case.alone(case.proven(), 0)
    assert differ(case.turned(WALK, 0), turned) < WRONG
    assert differ(case.alone(WALK, 0), alone) < WRONG
    assert differ(alone, turned) > WRONG  # rotation is seen


def _setting(config):
    import torch

    from benchmarks.kernel_registry import Setting

    return Setting(config=config, tokens=3, context=0, group_size=128, device=DEVICE, dtype=torch.float16)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "attention", "device=cpu"]) == 1
    assert "timed on a GPU" in capsys.readouterr().err
    assert main(["bench", "attention", "caches=kv4"]) == 1
    assert "caches=kv4 is not known; there are kv16, kv8, kv8-token." in capsys.readouterr().err
