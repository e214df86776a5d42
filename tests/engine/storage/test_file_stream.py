"""Files that are streamed: the same tensors as mapped ones, and the digests of what was read."""

import hashlib
from dataclasses import replace

import pytest
import torch

from engine.config import Recipe
from engine.storage import file_stream
from engine.storage.file_stream import FileStream
from engine.storage.workspace import Workspace, weight_paths
from tests.engine.storage.tiny_workspace import SMALL, make_workspace, random_tensors

INT4 = Recipe(weights="w4a16", group_size=32)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(file_stream, "PIECE", 1000)
    generator = torch.Generator().manual_seed(1)
    for number in range(12):
        values = torch.randint(0, 256, (number * 700,), generator=generator, dtype=torch.uint8)
        (tmp_path / str(number)).write_bytes(values.numpy().tobytes())
    return tmp_path


def order_of(folder):
    return [(str(number), (folder / str(number)).stat().st_size) for number in range(12)]


@pytest.mark.parametrize("ahead", [0, 5000, 1 << 30])
@pytest.mark.parametrize("asked", [range(12), (11, 3, 0, 5), range(11, -1, -1)], ids=["in order", "some", "backwards"])
def test_files_come_whole_in_any_order_and_are_hashed(folder, ahead, asked):
    stream = FileStream(folder, order_of(folder), DEVICE, ahead=ahead)
    asked = [str(number) for number in asked]
    for name in asked:
        assert stream.take(name, torch.uint8).cpu().numpy().tobytes() == (folder / name).read_bytes()
    digests = stream.close()
    assert set(asked) <= set(digests)
    assert all(digest == hashlib.sha256((folder / name).read_bytes()).hexdigest() for name, digest in digests.items())


def test_no_more_is_read_ahead_than_may_lie_there(folder):
    stream = FileStream(folder, order_of(folder), DEVICE, ahead=2200)
    assert sorted(stream._read) == ["0", "1", "2"]
    stream.take("1", torch.uint8)
    assert sorted(stream._read) == ["0", "2"], "3 is 2100 bytes long"
    stream.take("2", torch.uint8)
    assert sorted(stream._read) == ["0", "3"]
    stream.close()


def test_what_cannot_be_read_is_said_where_it_is_asked_for(folder):
    order = order_of(folder)
    (folder / "4").unlink()
    (folder / "link").symlink_to(folder / "5")
    stream = FileStream(folder, order, DEVICE)
    with pytest.raises(FileNotFoundError):
        stream.take("4", torch.uint8)
    with pytest.raises(OSError, match="link"):
        stream.take("link", torch.uint8)
    with pytest.raises(ValueError, match=r"3 has 2100 bytes, no whole number of torch\.int64"):
        stream.take("3", torch.int64)
    assert "4" not in stream.close()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    "recipe",
    [Recipe(), Recipe(weights="w8a8"), INT4, replace(INT4, head="int8")],
    ids=str,
)
def test_a_streamed_workspace_has_the_tensors_of_a_mapped_one(tmp_path, recipe, tp):
    folder = make_workspace(tmp_path, SMALL, recipe, tp, random_tensors(SMALL, recipe))
    workspace = Workspace(folder)
    mapped = dict(workspace.weights())
    with workspace.stream(DEVICE) as digests:
        streamed = dict(workspace.weights())
    assert streamed.keys() == mapped.keys()
    assert all(torch.equal(streamed[name].cpu(), mapped[name]) for name in mapped)
    expected = {path: hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in weight_paths(folder)}
    assert digests == expected
    assert dict(workspace.weights()).keys() == mapped.keys(), "mapped again"


def test_a_rank_streams_its_own_files(tmp_path):
    folder = make_workspace(tmp_path, SMALL, Recipe(), 2, random_tensors(SMALL, Recipe()))
    workspace = Workspace(folder)
    mapped = dict(workspace.rank_weights(1, 2))
    with workspace.stream(DEVICE, rank=1, tp=2) as digests:
        streamed = dict(workspace.rank_weights(1, 2))
    assert all(torch.equal(streamed[name].cpu(), mapped[name]) for name in mapped)
    assert not any(".0.weight" in path for path in digests)
    assert any(".1.weight" in path for path in digests)
