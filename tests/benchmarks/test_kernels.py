import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import rows
from benchmarks.kernel_registry import Case, Setting, cases, kernels
from benchmarks.kernel_timing import rotated, seconds_of
from benchmarks.shapes import shape
from cli.main import main

SETTING = Setting(config=shape("tiny"), tokens=5, context=70, group_size=32, device="cpu", dtype=torch.float32)


def test_every_case_runs_and_gives_what_its_bytes_count() -> None:
    """The bytes of a case are those of its tensors: inputs that are read whole, and the output."""
    whole = (
        "add_rms_norm",
        "quantize_rows",
        "rms_norm",
        "rms_norm_int8",
        "silu_and_mul",
        "silu_and_mul_int8",
        "causal_attention",
        "int4_unpack",
    )
    seen = set()
    for kernel in kernels():
        for case in cases(kernel, SETTING):
            seen.add(kernel)
            arguments = case.inputs()
            for run in case.run.values():
                result = run(*arguments)
                if kernel in whole:
                    read = [each for each in arguments if isinstance(each, torch.Tensor) and each.dtype != torch.int32]
                    if kernel == "int4_unpack":
                        read = list(arguments)
                    written = result if isinstance(result, tuple) else (result,)
                    # Scales of rows, one float beside hundreds of bytes, are not counted.
                    total = sum(each.nbytes for each in (*read, *written) if each.dim() > 1 or len(each) == 128)
                    assert total == case.bytes, case
    assert seen == set(kernels())


def test_decode_attention_counts_the_cache_in_its_form() -> None:
    plain, int8, by_token = cases("decode_attention", SETTING)
    tokens, row, item = 5 * 70, 2 * 32, 4
    beside = 2 * 5 * 4 * 32 * item
    assert plain.bytes == 2 * tokens * row * item + beside
    assert int8.bytes == 2 * tokens * row + beside
    assert by_token.bytes == 2 * tokens * (row + 2 * 4) + beside  # a scale and a zero point of two bytes a head
    assert plain.operations == 4 * tokens * 4 * 32


def test_inputs_are_rotated_until_they_fill_the_caches() -> None:
    assert len(rotated(lambda: (torch.zeros(1),), 2**23, "cpu")) == 8
    assert len(rotated(lambda: (torch.zeros(1),), 2**25, "cpu")) == 2
    assert len(rotated(lambda: (torch.zeros(1),), 2**30, "cpu")) == 1


def test_the_time_is_that_of_one_call() -> None:
    seconds, how = seconds_of(lambda pause: time.sleep(pause), [(0.01,), (0.03,)], "cpu", eager=False)
    assert how == "cpu"
    assert 0.019 < seconds < 0.2


def test_rows_of_chosen_kernels(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    assert (
        main(
            [
                "bench",
                "kernels",
                "shape=tiny",
                "kernels=rms_norm,dense_linear",
                "tokens=1,8",
                "device=cpu",
                f"out={out}",
            ]
        )
        == 0
    )
    found = rows.read(out)
    assert [row["kernel"] for row in found] == ["rms_norm"] * 2 + ["dense_linear"] * 8
    for row in found:
        seconds = float(row["microseconds"]) / 1e6
        assert seconds > 0
        assert row["timing"] == "cpu"
    product = found[-1]
    assert product["size"] == "8 of 128x256"
    assert float(product["tflops"]) == pytest.approx(
        2 * 8 * 128 * 256 / (float(product["microseconds"]) / 1e6) / 1e12, abs=6e-4
    )


def test_a_kernel_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "shape=tiny", "kernels=rms_nrom", "device=cpu", "out=none"]) == 1
    assert "kernels=rms_nrom is not known; there are rms_norm" in capsys.readouterr().err


def test_a_case_says_which_implementations_ask_the_host() -> None:
    for case in cases("decode_attention", SETTING):
        assert isinstance(case, Case)
        assert set(case.eager) <= set(case.run)


def test_what_is_timed_is_the_same_operation() -> None:
    """Each case calls Triton's kernel with arguments that give what the reference gives."""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("interpreted_cases.py")
    answer = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    said = answer.stdout.splitlines()
    assert said[-1].startswith("compared")
    assert int(said[-1].split()[1]) >= 20
    assert said[:-1] == []
