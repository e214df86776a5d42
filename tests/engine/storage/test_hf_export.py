import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig

from engine.config import Recipe
from engine.models import names
from engine.storage.hf_awq import export_hf_awq
from engine.storage.workspace import Workspace
from tests.engine.storage.tiny_workspace import SMALL, make_workspace, random_tensors

INT4 = Recipe(weights="w4a16", group_size=32)


def _stored(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("shard_bytes", [1, 1 << 30])
def test_the_checkpoint_holds_the_tensors_that_were_packed(tmp_path, tp, shard_bytes):
    config = replace(SMALL, intermediate_size=128)
    tensors = random_tensors(config, INT4)
    workspace = Workspace(make_workspace(tmp_path / "w", config, INT4, tp, tensors))
    export_hf_awq(workspace, tmp_path / "out", shard_bytes=shard_bytes)
    stored = _stored(tmp_path / "out")
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensors[name]) for name in tensors)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    if shard_bytes == 1:
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(tensors)
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / "out" / file, "pt") as opened:
                assert name in opened.keys()  # noqa: SIM118
        assert files[1] == "model-00001-of-00003.safetensors"
    else:
        assert files == ["config.json", "model.safetensors"]


def test_the_config_says_how_it_is_quantized_and_transformers_reads_it(tmp_path):
    config = replace(SMALL, rope_theta=5e5, max_position_embeddings=512)
    workspace = Workspace(make_workspace(tmp_path / "w", config, INT4, 1, random_tensors(config, INT4)))
    export_hf_awq(workspace, tmp_path / "out")
    read = AutoConfig.from_pretrained(tmp_path / "out")
    assert read.quantization_config == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    assert (read.model_type, read.head_dim, read.num_key_value_heads, read.vocab_size) == ("llama", 16, 2, 37)
    assert (read.rope_parameters or {}).get("rope_theta", getattr(read, "rope_theta", None)) == 5e5
    assert (read.rms_norm_eps, read.max_position_embeddings, read.eos_token_id) == (1e-5, 512, 2)
    assert read.tie_word_embeddings is False


def test_equal_embedding_and_output_become_tied_and_the_tokenizer_comes_along(tmp_path):
    tensors = random_tensors(SMALL, INT4)
    tensors[names.HEAD] = tensors[names.EMBEDDING]
    folder = make_workspace(tmp_path / "w", SMALL, INT4, 1, tensors)
    (folder / "triton_models/tokenizer").mkdir()
    for name in ("tokenizer.json", "config.json", "modeling.py", "model.safetensors.index.json"):
        (folder / "triton_models/tokenizer" / name).write_text("{}")
    export_hf_awq(Workspace(folder), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True
    assert names.HEAD not in _stored(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_two_exports_are_equal_byte_for_byte(tmp_path):
    folder = make_workspace(tmp_path / "w", SMALL, INT4, 1, random_tensors(SMALL, INT4))
    for name in ("a", "b"):
        export_hf_awq(Workspace(folder), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_other_weights_and_an_existing_folder_are_refused(tmp_path):
    dense = Workspace(make_workspace(tmp_path / "d", SMALL, Recipe(), 1, random_tensors(SMALL, Recipe())))
    with pytest.raises(ValueError, match="only w4a16"):
        export_hf_awq(dense, tmp_path / "out")
    folder = make_workspace(tmp_path / "w", SMALL, INT4, 1, random_tensors(SMALL, INT4))
    with pytest.raises(FileExistsError):
        export_hf_awq(Workspace(folder), tmp_path)
    damaged = folder / "triton_models/weights/layers.1.feed_forward.w2.0.scales_zeros"
    workspace = Workspace(folder)
    damaged.write_bytes(b"\xff" * damaged.stat().st_size)
    with pytest.raises(ValueError):
        export_hf_awq(workspace, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
