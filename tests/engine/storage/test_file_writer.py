import hashlib
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from engine.storage import file_writer
from engine.storage.file_writer import FileWriter

CONTENTS = {f"file{number}": bytes(range(number, number + 50)) * (number + 1) for number in range(5)}
SIZES = {name: len(content) for name, content in CONTENTS.items()}


def append_all(writer, *, block=37):
    """Every file's blocks, one of each file in turn."""
    for first in range(0, max(SIZES.values()), block):
        for name, content in CONTENTS.items():
            if content[first : first + block]:
                writer.append(name, memoryview(content[first : first + block]))


@pytest.mark.parametrize("flushed", [1, 100, 1 << 30])
def test_files_side_by_side_with_their_digests(tmp_path, monkeypatch, flushed):
    monkeypatch.setattr(file_writer, "FLUSHED_BYTES", flushed)
    threads, told = threading.active_count(), []
    with FileWriter(tmp_path, SIZES, progress=told.append) as writer:
        append_all(writer)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == CONTENTS
    assert [(entry.path, entry.size, entry.sha256) for entry in writer.entries] == [
        (name, len(content), hashlib.sha256(content).hexdigest()) for name, content in CONTENTS.items()
    ]
    assert sum(told) == sum(SIZES.values()) and max(told) == 37
    assert threading.active_count() == threads


class SlowDigest:
    """Hashes nothing before it may."""

    def __init__(self):
        self.may, self.blocks = threading.Event(), 0

    def update(self, block):
        self.may.wait(20)
        self.blocks += 1

    def hexdigest(self):
        return "0" * 64


def test_no_more_than_a_few_blocks_wait_where_one_job_is_slow(tmp_path, monkeypatch):
    slow, appended = SlowDigest(), []
    monkeypatch.setattr(file_writer, "_Begun", partial(file_writer._Begun, digest=slow))

    def append():
        with FileWriter(tmp_path, {"a": 100}) as writer:
            for number in range(100):
                appended.append(number)
                writer.append("a", memoryview(b"x"))

    thread = threading.Thread(target=append)
    thread.start()
    thread.join(0.3)
    assert len(appended) == file_writer.WAITING_BLOCKS + 1 and slow.blocks == 0
    slow.may.set()
    thread.join(20)
    assert slow.blocks == 100


def test_once_it_has_settled_nothing_holds_the_blocks_any_more(tmp_path, monkeypatch):
    slow, block = SlowDigest(), np.zeros(10, dtype=np.uint8)
    monkeypatch.setattr(file_writer, "_Begun", partial(file_writer._Begun, digest=slow))
    free = sys.getrefcount(block)
    with FileWriter(tmp_path, {"a": 40}) as writer:
        for _ in range(4):
            writer.append("a", block.data)
        held = sys.getrefcount(block)
        assert held > free
        threading.Timer(0.1, slow.may.set).start()
        writer.settle()
        assert slow.blocks == 4 and sys.getrefcount(block) == free


def test_a_full_disk_is_an_error_of_whoever_appends(tmp_path):
    (tmp_path / "file4").symlink_to("/dev/full")
    threads = threading.active_count()
    with pytest.raises(OSError, match="No space left"), FileWriter(tmp_path, SIZES) as writer:
        append_all(writer)
    assert threading.active_count() == threads


def test_what_fails_between_the_blocks_is_not_hidden(tmp_path):
    with pytest.raises(RuntimeError), FileWriter(tmp_path, SIZES) as writer:
        writer.append("file0", memoryview(b"x"))
        raise RuntimeError
    assert writer.entries == []


@pytest.mark.parametrize(("sizes", "message"), [({"file4": 249}, "250 bytes instead of 249"), ({"file4": 251}, "251")])
def test_a_file_of_another_size_is_named(tmp_path, sizes, message):
    with pytest.raises(ValueError, match=rf"file4 .*{message}"), FileWriter(tmp_path, SIZES | sizes) as writer:
        append_all(writer)
    with pytest.raises(ValueError, match="file5 has 0 bytes"), FileWriter(tmp_path, SIZES | {"file5": 3}) as writer:
        append_all(writer)


def test_it_is_free_of_torch():
    assert "torch" not in Path(file_writer.__file__).read_text()
