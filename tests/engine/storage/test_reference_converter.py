"""The second converter is trusted because it makes the files that v0.1.0 itself made, byte for byte."""

import hashlib
import shutil

import pytest
from safetensors.torch import load_file

from tests.engine.storage.reference_converter import convert, kv_scales
from tests.shared_data import shared

GOLDEN = "golden/turbomind-v0.1.0/llama_mha"
LLAMA2 = {"model_name": "llama2", "session_len": 4104, "ids": (1, 2)}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", ["fp16", "awq"])
def test_it_makes_the_files_of_the_real_reference(tmp_path, kind, tp):
    folder = shared(f"{GOLDEN}/checkpoint")
    if kind == "awq":
        shutil.copyfile(folder / "config.json", tmp_path / "config.json")
        shutil.copyfile(shared(f"{GOLDEN}/expected.awq_checkpoint.safetensors"), tmp_path / "model.safetensors")
        folder = tmp_path
    lines = [line.split() for line in shared(f"{GOLDEN}/expected.{kind}.tp{tp}.sha256").read_text().splitlines()]
    for as_reference in (True, False):  # right and as it was are the same here
        made = convert(folder, "hf", **LLAMA2, tp=tp, group_size=128 if kind == "awq" else 0, as_reference=as_reference)
        assert made["config.ini"] == shared(f"{GOLDEN}/expected.{kind}.tp{tp}.config.ini").read_bytes()
        found = {name: (hashlib.sha256(content).hexdigest(), len(content)) for name, content in made.items()}
        assert found == {name: (digest, int(size)) for digest, size, name in lines}


@pytest.mark.parametrize("tp", [1, 2])
def test_it_makes_the_kv_scales_of_the_real_reference(tp):
    ranges = load_file(shared(f"{GOLDEN}/calibration_stats.safetensors"))
    expected = {path.name: path.read_bytes() for path in shared(f"{GOLDEN}/expected.kv.tp{tp}").iterdir()}
    assert kv_scales(ranges, 2, tp=tp, symmetric=False) == expected
    assert {len(content) for content in kv_scales(ranges, 2, tp=tp, symmetric=True).values()} == {8}
