import json
import os
import shutil

import pytest

from pipelines import sources
from pipelines.sources import Memory, folder_digest, identity, measure, model_files, text_digest, tree_digest

CHECKPOINT = {
    "config.json": "{}",
    "model-00001-of-00002.safetensors": "1",
    "model-00002-of-00002.safetensors": "2",
    "model.safetensors.index.json": "{}",
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
}


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name, content in CHECKPOINT.items():
        (folder / name).write_text(content)
    for name in ("README.md", "modeling_x.py", "pytorch_model.bin"):
        (folder / name).write_text("x")
    return folder


def test_a_checkpoint_is_its_files_and_nothing_else(checkpoint):
    assert [path.name for path in model_files(checkpoint)] == sorted(CHECKPOINT)
    before = folder_digest(checkpoint)
    (checkpoint / "README.md").write_text("another")
    os.utime(checkpoint / "config.json")
    assert folder_digest(checkpoint) == before
    assert folder_digest(shutil.copytree(checkpoint, checkpoint.parent / "copy")) == before


def test_pickled_weights_are_part_of_it_only_where_they_may_be_read(checkpoint):
    allowed = {path.name for path in model_files(checkpoint, allow_bin=True)}
    assert allowed == {*CHECKPOINT, "pytorch_model.bin"}
    record = {"kind": "folder", "allow_bin": True}
    before, without = measure(record, checkpoint), measure({"kind": "folder"}, checkpoint)
    (checkpoint / "pytorch_model.bin").write_text("another")
    assert measure(record, checkpoint) != before
    assert measure({"kind": "folder"}, checkpoint) == without
    (checkpoint / "config.json").rename(checkpoint / "params.json")  # as Meta's checkpoints have it
    assert "params.json" in {path.name for path in model_files(checkpoint, allow_bin=True)}
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        model_files(checkpoint)


@pytest.mark.parametrize("name", sorted(CHECKPOINT))
def test_one_byte_of_any_file_changes_the_digest(checkpoint, name):
    before = folder_digest(checkpoint)
    (checkpoint / name).write_text(CHECKPOINT[name] + " ")
    assert folder_digest(checkpoint) != before


def test_a_renamed_file_changes_the_digest(checkpoint):
    before = folder_digest(checkpoint)
    (checkpoint / "tokenizer_config.json").rename(checkpoint / "tokenizer_x.json")
    assert folder_digest(checkpoint) != before


def test_what_is_no_checkpoint_or_no_text_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        folder_digest(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no text"):
        text_digest(tmp_path)
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(ValueError, match=r"a\.csv is not a text source"):
        text_digest(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match="is empty or does not exist"):
        tree_digest(tmp_path / "none")


def test_text_is_one_file_or_a_folder_of_them(tmp_path):
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "b.jsonl").write_text("{}\n")
    one = text_digest(tmp_path / "a.txt")
    assert one == sources.sha256_file(tmp_path / "a.txt")
    both = text_digest(tmp_path)
    (tmp_path / "b.jsonl").write_text("{ }\n")
    assert text_digest(tmp_path) not in (one, both)


def test_identity_names_content_or_commit():
    assert identity({"kind": "folder", "digest": "ab"}) == "sha256:ab"
    assert identity({"kind": "hub", "repo": "o/n", "revision": "c1"}) == "hub:o/n@c1"
    assert identity({"kind": "dataset", "name": "ptb", "digest": "ab", "split": "train"}) == "sha256:ab"
    assert identity({"kind": "dataset", "name": "c4", "revision": "c1"}) == "dataset:c4@c1"


def test_memory_hashes_a_file_once_and_again_when_it_changed(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one")
    os.utime(path, ns=(0, 0))
    hashed = []
    real = sources.sha256_file
    monkeypatch.setattr(sources, "sha256_file", lambda p: hashed.append(p) or real(p))
    monkeypatch.setattr(sources, "_age", lambda status: 3600.0)
    for _ in range(2):
        memory = Memory(tmp_path / "memory.json")
        first = memory.sha256(path)
        memory.save()
    assert len(hashed) == 1
    path.write_text("two")
    os.utime(path, ns=(0, 0))  # same size, same time: the time of the inode's change tells
    assert Memory(tmp_path / "memory.json").sha256(path) != first
    assert len(hashed) == 2


def test_memory_does_not_trust_a_file_that_was_just_written(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    memory = Memory(tmp_path / "memory.json")
    memory.sha256(tmp_path / "a.txt")
    memory.save()
    assert json.loads((tmp_path / "memory.json").read_text()) == {}


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"/x": [1]}'])
def test_a_damaged_memory_is_an_empty_one(tmp_path, content):
    (tmp_path / "memory.json").write_text(content)
    (tmp_path / "a.txt").write_text("one")
    assert Memory(tmp_path / "memory.json").sha256(tmp_path / "a.txt") == sources.sha256_file(tmp_path / "a.txt")


def test_memory_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    Memory(tmp_path / "file/memory.json").save()
