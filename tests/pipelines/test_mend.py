import os
import time

import pytest

from pipelines import mend as mending
from pipelines.mend import mend

LOCK = """schema: '2.0'
stages:
  compose:
    cmd: python -m pipelines.compose
    outs:
    - path: build/slices
      hash: md5
      md5: 0123456789abcdef0123456789abcdef.dir
      size: 10
  shard@a:
    cmd: python -m pipelines.shard
    deps:
    - path: pipelines/shard.py
      hash: md5
      md5: 0123456789abcdef0123456789abcdef
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    write(tmp_path / ".dvc/tmp/rwlock", '{"write": {}, "read": {}}')
    write(tmp_path / "dvc.lock", LOCK)
    return tmp_path


def write(path, text, *, age=60):
    path.write_text(text)
    os.utime(path, (time.time() - age, time.time() - age))


def test_whole_files_stay(project):
    assert mend(project) == []
    assert (project / "dvc.lock").read_text() == LOCK


def test_nothing_there_is_nothing_to_do(tmp_path):
    assert mend(tmp_path) == []


@pytest.mark.parametrize("content", ["", '{"write": {"/a', "null"])
def test_a_half_written_rwlock_is_removed(project, content):
    write(project / ".dvc/tmp/rwlock", content)
    assert mend(project) == [".dvc/tmp/rwlock was left half-written by a dvc that was killed, and was removed."]
    assert not (project / ".dvc/tmp/rwlock").exists() and (project / "dvc.lock").exists()


def test_a_lock_that_was_cut_anywhere_is_removed_or_still_says_only_what_it_said(project):
    removed = 0
    for length in range(len(LOCK)):
        write(project / "dvc.lock", LOCK[:length])
        removed += bool(mend(project))
    assert removed > len(LOCK) / 3


def test_a_file_that_is_being_written_is_waited_for(project, monkeypatch):
    write(project / "dvc.lock", "stages:\n  a:\n    cmd", age=0)
    monkeypatch.setattr(mending.time, "sleep", lambda seconds: write(project / "dvc.lock", LOCK))
    assert mend(project) == []
    assert (project / "dvc.lock").exists()
