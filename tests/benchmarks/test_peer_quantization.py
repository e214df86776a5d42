import argparse
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.peer_quantization import Case, Took, judged, quantize_by_peer


def took(tool: str, seconds: float, processors: float) -> Took:
    return Took(tool=tool, seconds=seconds, processor_seconds=processors, out=Path("out"))


@pytest.mark.parametrize(
    ("ours", "perplexities", "misses"),
    [
        ((1.0, 1.0), [7.0, 7.5], []),
        ((1.0, 1.0), [7.6, 7.5], ["perplexity 7.6000"]),
        ((1.1, 0.5), [7.0, 7.5], ["1.1 s (0.5 of processors)"]),
        ((0.5, 1.1), [7.6, 7.5], ["perplexity 7.6000", "0.5 s (1.1 of processors)"]),
    ],
)
def test_what_is_worse_or_takes_more_than_a_third_is_missed(ours, perplexities, misses, capsys) -> None:
    case = Case(checkpoint=Path("c"), blocks=Path("b"), method="awq", group_size=64)
    found = judged("tiny", case, [took("ingot", *ours)], [took("peer", 3.0, 3.0)], perplexities)
    for part, line in zip(misses, found, strict=True):
        assert part in line and line.startswith("tiny, groups of 64, awq")
    assert capsys.readouterr().out.startswith("| tiny | 64 | awq | ")


def test_a_peer_that_fails_is_said_in_its_words(tmp_path: Path) -> None:
    save_file({"tokens": torch.zeros(1, 4, dtype=torch.int32)}, tmp_path / "blocks.safetensors")
    case = Case(checkpoint=tmp_path, blocks=tmp_path / "blocks.safetensors", method="gptq", group_size=64)
    options = argparse.Namespace(threads=1, batch=1)
    with pytest.raises(RuntimeError, match=r"failed at gptq: (.|\n)*No module named 'llmcompressor'"):
        quantize_by_peer(case, tmp_path / "out", Path(sys.executable), options)
