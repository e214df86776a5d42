import importlib.util

import pytest

from benchmarks import rows
from cli.main import main


def test_engines_take_turns_and_each_has_a_row(tmp_path):
    out = tmp_path / "rows.csv"
    arguments = ["shape=tiny", "engines=fp32,w4a16,w8a8,hf", "batch=1,2", "seconds=0", "group_size=32", f"out={out}"]
    assert main(["bench", "cpu_decode", *arguments]) == 0
    found = rows.read(out)
    names = ["fp32", "w4a16", "w8a8", "hf"]
    assert [(row["batch"], row["engine"]) for row in found] == [(batch, name) for batch in "12" for name in names]
    by_name = {row["engine"]: float(row["weights_mb"]) for row in found}
    assert by_name["hf"] == by_name["fp32"] > by_name["w8a8"] > by_name["w4a16"]
    assert by_name["fp32"] == pytest.approx(4e-6 * (2 * (128 * 256 + 128 * 128 + 3 * 128 * 256) + 512 * 128), rel=0.01)
    for row in found:
        assert float(row["tokens_per_second"]) == pytest.approx(
            int(row["batch"]) / float(row["step_ms"]) * 1e3, rel=0.02
        )
        assert float(row["times_hf"]) > 0 and float(row["times_fp32"]) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["engines=fp32,w2"], "engines=w2 is not known; there are fp32, w4a16,"),
        (["engines=llama_cpp_q4_0", "shape=tiny"], "engines=llama_cpp_q4_0 needs llama_cpp"),
    ],
)
def test_what_is_not_there_is_named(capsys, arguments, message):
    if "llama_cpp" in message and importlib.util.find_spec("llama_cpp"):
        pytest.skip("llama-cpp-python is here")
    assert main(["bench", "cpu_decode", *arguments, "out=none"]) == 1
    assert message in capsys.readouterr().err
