import math

import pytest

from pipelines.outcomes import number, print_table, read_outcome, selected_keys
from tests.pipelines.built import MISS, write_built


def test_an_outcome_is_read_from_what_the_stages_wrote(tmp_path):
    write_built(tmp_path, "m-c-fp16-1-kv16", verdict="fail", gates=[MISS, {**MISS, "verdict": "pass"}])
    assert selected_keys(tmp_path) == ["m-c-fp16-1-kv16"]
    outcome = read_outcome(tmp_path, "m-c-fp16-1-kv16")
    assert (outcome.id, outcome.verdict, outcome.sizes["artifact_bytes"]) == ("a" * 64, "fail", 1_500_000)
    assert outcome.metric("perplexity") == 2.0
    assert math.isnan(outcome.metric("kl_mean")) and math.isnan(outcome.metric("unknown"))
    assert outcome.misses == [MISS]


def test_what_is_not_built_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing has been built"):
        selected_keys(tmp_path)
    write_built(tmp_path, "k")
    (tmp_path / "build/evaluate/k/statement.json").unlink()
    with pytest.raises(FileNotFoundError, match="k is not built to the end"):
        read_outcome(tmp_path, "k")


def test_a_table_keeps_to_120_columns_and_wraps_only_its_last(capsys):
    print_table("title", ["a", "why"], [["w4a16-kv8", "because " * 40], ["fp16", "[bold]as is"]])
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line.rstrip()) <= 120 for line in lines)
    assert len(lines) > 5
    assert any(line.startswith("fp16") and "[bold]as is" in line for line in lines)


def test_figures():
    assert [number(value) for value in (None, math.nan, 1.23456)] == ["-", "-", "1.2346"]
