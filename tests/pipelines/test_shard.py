import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.written_weights import DIGESTS
from tests.pipelines.stage import FP16, W4A16, Build, bytes_of
from tests.pipelines.tiny_checkpoint import TEXT, write_tiny_checkpoint
from tests.shared_data import shared


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return Build(tmp_path / "out", write_tiny_checkpoint(tmp_path / "model"), tmp_path / "text.txt")


def test_weight_files_and_nothing_else(build):
    names = set(bytes_of(build.shard(FP16, build.quantize(FP16, build.calibrate()), tp=2)))
    assert "layers.1.attention.w_qkv.1.weight" in names and "tok_embeddings.weight" in names
    names.remove(DIGESTS)
    assert all(name.endswith((".weight", ".bias")) for name in names) and not any("past_kv" in name for name in names)


def test_digests_are_those_of_the_bytes_on_disk(build):
    written = bytes_of(build.shard(W4A16, build.quantize(W4A16, build.calibrate()), tp=2))
    kept = {entry["path"]: (entry["size"], entry["sha256"]) for entry in json.loads(written.pop(DIGESTS))}
    assert kept == {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in written.items()}


def test_quantized_tensors_take_the_place_of_the_source(build):
    sharded = bytes_of(build.shard(W4A16, build.quantize(W4A16, build.calibrate())))
    plain = bytes_of(build.shard(FP16, build.quantize(FP16, build.root)))
    assert "layers.0.attention.w_qkv.0.qweight" in sharded
    assert sharded["tok_embeddings.weight"] == plain["tok_embeddings.weight"]
    assert sharded["layers.0.attention_norm.weight"] != plain["layers.0.attention_norm.weight"]


def test_a_tp_that_does_not_fit_leaves_nothing(build):
    quantized = build.quantize(FP16, build.calibrate())
    with pytest.raises(ValueError, match="tp"):
        build.shard(FP16, quantized, tp=4)
    assert not (build.root / "shard-fp16-4").exists()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("weights", ["fp16", "awq"])
def test_golden_files(tmp_path, monkeypatch, weights, tp):
    """From the reference's checkpoint and quantized tensors, every weight file of the reference's converter."""
    golden = shared("golden/turbomind-v0.1.0/llama_mha")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    build = Build(tmp_path / "out", golden / "checkpoint", tmp_path / "text.txt")
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    recipe = FP16
    if weights == "awq":
        recipe = {"name": "w4a16", "group_size": 128}
        tensors = load_file(golden / "expected.awq_checkpoint.safetensors")
        halves = {name: x.half() if x.dtype == torch.float32 else x for name, x in tensors.items()}
        save_file(halves, quantized / "weights.safetensors")
    written = bytes_of(build.shard(recipe, quantized, tp=tp))
    lines = (golden / f"expected.{weights}.tp{tp}.sha256").read_text().splitlines()
    expected = {line.split()[-1]: line.split()[0] for line in lines}
    expected.pop("config.ini", None)
    del written[DIGESTS]
    assert {name: hashlib.sha256(content).hexdigest() for name, content in written.items()} == expected
