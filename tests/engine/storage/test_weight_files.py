import json
import os
import zipfile

import pytest
import torch

from engine.models import names
from engine.storage.checkpoint import Checkpoint
from engine.storage.weight_files import PickledFile, open_weights
from tests.engine.models.tiny import random_weights, tiny_config
from tests.engine.storage.test_checkpoint import CONFIG


def write_bin(folder, weights, *, shards=1):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    placed = {name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, name in enumerate(weights)}
    for file in set(placed.values()):
        torch.save({name: x for name, x in weights.items() if placed[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pickled_weights_where_they_are_allowed(tmp_path, shards, dtype):
    weights = {name: x.to(dtype) for name, x in random_weights(tiny_config()).items()}
    folder = write_bin(tmp_path / "model", weights, shards=shards)
    checkpoint = Checkpoint(folder, allow_bin=True)
    for name, tensor in weights.items():
        assert torch.equal(checkpoint.tensor(name), tensor) and checkpoint.tensor(name).dtype == dtype
    assert {path.suffix for path in checkpoint.files} == {".bin", ".json"}
    with pytest.raises(ValueError, match=r"pytorch_model.*\.bin holds pickled weights.*model\.allow_bin=true"):
        Checkpoint(folder)


def test_safetensors_go_first(tmp_path):
    from safetensors.torch import save_file

    weights = random_weights(tiny_config())
    folder = write_bin(tmp_path / "model", weights)
    save_file(weights, folder / "model.safetensors")
    assert Checkpoint(folder).tensor(names.EMBEDDING).shape == (64, 32)


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_code_in_a_pickled_file_does_not_run(tmp_path):
    marker = tmp_path / "was-here"
    torch.save({"model.embed_tokens.weight": torch.ones(2), "x": Hostile(str(marker))}, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"a\.bin cannot be read as weights alone"):
        open_weights(tmp_path / "a.bin", allow_bin=True)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [[torch.ones(2)], {"x": 3}, {3: torch.ones(2)}, {"x": {"y": torch.ones(2)}}, {"x": torch.eye(2).to_sparse()}],
)
def test_anything_but_tensors_by_name_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"a\.bin (holds|cannot be read)"):
        PickledFile(tmp_path / "a.bin")


def test_damaged_and_old_files_are_refused_by_name(tmp_path):
    path = tmp_path / "a.bin"
    torch.save({"x": torch.arange(5000.0)}, path)
    whole = path.read_bytes()
    for damaged in (b"", b"PK", whole[:-500], whole[: len(whole) // 2], b"\0" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.bin cannot be read as weights alone") as caught:
            PickledFile(path)
        assert "\n" not in str(caught.value)
    torch.save({"x": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"a\.bin cannot be read"):
        PickledFile(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"cos\nsystem\n.")
    with pytest.raises(ValueError, match=r"a\.bin cannot be read"):
        PickledFile(path)
