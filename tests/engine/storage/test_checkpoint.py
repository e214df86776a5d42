import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from engine.models import names
from engine.models.batch import packed
from engine.storage.checkpoint import Checkpoint, load_checkpoint
from tests.engine.models.tiny import random_weights, tiny_config

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
    "eos_token_id": 2,
}
UP = "model.layers.1.mlp.up_proj.weight"


def write_checkpoint(folder, weights, *, shards=1, **changes):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    placed = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(weights)}
    for file in set(placed.values()):
        save_file({name: x for name, x in weights.items() if placed[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


@pytest.fixture
def weights():
    return random_weights(tiny_config())


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_by_its_name_and_by_its_layer(tmp_path, weights, shards):
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "model", weights, shards=shards))
    assert checkpoint.config == tiny_config(eos_token_ids=(2,))
    assert checkpoint.names() == list(names.model_tensors(checkpoint.config))
    for name, expected in weights.items():
        assert torch.equal(checkpoint.tensor(name), expected)
    layer = checkpoint.layer(1)
    assert list(layer.keys() - names.layer_tensors(checkpoint.config).keys()) == []
    assert torch.equal(layer["mlp.up_proj.weight"], weights[UP]) and len(layer) == 9
    assert UP in checkpoint.weights() and "model.layers.1.mlp.up_proj.qweight" not in checkpoint.weights()


def test_tensors_come_as_they_are_stored(tmp_path, weights):
    halves = {name: x.to(torch.bfloat16) for name, x in weights.items()}
    folder = write_checkpoint(tmp_path / "model", halves)
    assert Checkpoint(folder).tensor(UP).dtype == torch.bfloat16
    assert load_checkpoint(folder).embed(torch.tensor([1])).dtype == torch.float32


def test_a_tied_head_answers_with_the_embedding(tmp_path, weights):
    del weights[names.HEAD]
    folder = write_checkpoint(tmp_path / "model", weights, tie_word_embeddings=True)
    checkpoint = Checkpoint(folder)
    assert names.HEAD in checkpoint.names()
    assert torch.equal(checkpoint.tensor(names.HEAD), weights[names.EMBEDDING])
    untied = Checkpoint(write_checkpoint(tmp_path / "untied", weights | {names.HEAD: weights[names.EMBEDDING].clone()}))
    batch = packed([[1, 2, 3]])
    assert torch.equal(load_checkpoint(folder)(batch, None), load_checkpoint(untied.folder)(batch, None))


def test_files_are_all_that_the_model_is_made_of(tmp_path, weights):
    folder = write_checkpoint(tmp_path / "model", weights, shards=2)
    for name in ("tokenizer.json", "generation_config.json"):
        (folder / name).write_text("{}")
    for name in ("tokenizer.model", "chat_template.jinja", "README.md", "modeling.py", "leftover.safetensors"):
        (folder / name).write_text("x")
    assert [path.name for path in Checkpoint(folder).files] == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
    ]


def test_end_tokens_of_generation_config(tmp_path, weights):
    folder = write_checkpoint(tmp_path / "model", weights)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert Checkpoint(folder).config.eos_token_ids == (2, 7)


def refused(folder, *parts):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        Checkpoint(folder)
    for part in (str(folder), *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_or_file(tmp_path, weights):
    refused(tmp_path / "absent", "config.json does not exist")
    folder = write_checkpoint(tmp_path / "model", weights)
    (folder / "model.safetensors").rename(folder / "model.h5")
    refused(folder, "none of model.safetensors, model.safetensors.index.json, pytorch_model.bin")


def test_broken_json(tmp_path, weights):
    folder = write_checkpoint(tmp_path / "model", weights)
    (folder / "config.json").write_text('{"architectures": ')
    refused(folder, "config.json is not valid JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, "config.json holds a JSON list")


def test_a_refused_configuration_names_the_folder(tmp_path, weights):
    folder = write_checkpoint(tmp_path / "model", weights, quantization_config={"quant_method": "gptq"})
    refused(folder, "config.json has quantization_config.quant_method = 'gptq'")


def test_a_configuration_of_more_layers_than_tensors_is_refused_at_once(tmp_path, weights):
    refused(write_checkpoint(tmp_path / "model", weights, num_hidden_layers=10**9), "layers", "holds 21 tensors")


def test_a_missing_shard(tmp_path, weights):
    folder = write_checkpoint(tmp_path / "model", weights, shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "model-00002-of-00002.safetensors is missing", "model.")


def test_an_index_that_is_wrong(tmp_path, weights):
    folder = write_checkpoint(tmp_path / "model", weights, shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text("{}")
    refused(folder, "has no weight_map")
    shutil.copy(folder / "model-00001-of-00002.safetensors", tmp_path / "outside.safetensors")
    index.write_text(json.dumps({"weight_map": {UP: "../outside.safetensors"}}))
    refused(folder, "outside the checkpoint's folder")


def test_a_file_cut_off_names_the_first_tensor_that_is_not_whole(tmp_path, weights):
    folder = write_checkpoint(tmp_path / "model", weights)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])
    path.write_bytes(whole[:-1])
    refused(folder, "model.safetensors is cut off", last)
    for length in (0, 7, 100):
        path.write_bytes(whole[:length])
        refused(folder, "model.safetensors is cut off or not a safetensors file")
    for header in (
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, "8"]}},
        {"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": 3, "data_offsets": [0, 8]}},
        {"x": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
        {"x": 3},
        [],
    ):
        raw = json.dumps(header).encode()
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
        refused(folder, "model.safetensors is not a", "safetensors file")
    path.write_bytes((10).to_bytes(8, "little") + b"not json at all")
    refused(folder, "model.safetensors is not a safetensors file")


@pytest.mark.parametrize("shards", [1, 2])
def test_a_missing_tensor(tmp_path, weights, shards):
    del weights[UP]
    refused(write_checkpoint(tmp_path / "model", weights, shards=shards), f"has no tensor {UP}")


def test_a_shard_without_the_tensor_that_the_index_promises(tmp_path, weights):
    folder = write_checkpoint(tmp_path / "model", weights, shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"][UP]
    save_file({n: x for n, x in weights.items() if index["weight_map"][n] == shard.name and n != UP}, shard)
    refused(folder, f"{shard.name} has no tensor {UP}")


def test_a_wrong_shape(tmp_path, weights):
    weights[UP] = weights[UP][:40].clone()
    refused(
        write_checkpoint(tmp_path / "model", weights), f"model.safetensors holds {UP} with shape (40, 32)", "(48, 32)"
    )


def test_a_tensor_of_an_unreadable_type(tmp_path, weights):
    weights[UP] = weights[UP].to(torch.int8)
    refused(write_checkpoint(tmp_path / "model", weights), f"holds {UP} as I8")


def test_tensors_that_the_architecture_does_not_use(tmp_path, weights):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    Checkpoint(write_checkpoint(tmp_path / "old", weights | buffer))
    surplus = {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}
    refused(write_checkpoint(tmp_path / "model", weights | surplus), "self_attn.q_proj.bias", "LlamaForCausalLM")


def test_a_tensor_in_two_shards(tmp_path, weights):
    folder = write_checkpoint(tmp_path / "model", weights, shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    other = next(folder / file for file in set(index["weight_map"].values()) if file != index["weight_map"][UP])
    save_file({n: x for n, x in weights.items() if index["weight_map"][n] == other.name or n == UP}, other)
    refused(folder, f"holds {UP}, and so does")


PEAK = """
import resource, sys
from pathlib import Path
from engine.storage.checkpoint import Checkpoint
checkpoint = Checkpoint(Path(sys.argv[1]))
checkpoint.layer(0)["mlp.up_proj.weight"].float().sum()
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for layer in range(checkpoint.config.num_layers):
    for tensor in checkpoint.layer(layer).values():
        tensor.float().sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
"""


def test_reading_layer_by_layer_keeps_one_layer_in_memory(tmp_path):
    changes = {"intermediate_size": 8192, "hidden_size": 256, "num_hidden_layers": 12}
    config = tiny_config(intermediate_size=8192, hidden_size=256, num_layers=12)
    weights = {name: torch.ones(shape, dtype=torch.float16) for name, shape in names.model_tensors(config).items()}
    folder = write_checkpoint(tmp_path / "model", weights, **changes)
    total = (folder / "model.safetensors").stat().st_size // 1024
    peak = int(subprocess.check_output([sys.executable, "-c", PEAK, str(folder)]))
    assert total > 120_000 and peak < total / 3, (peak, total)
