"""The store. One file over 300 lines: push, pull, pins and restore are one story told on the same artifacts."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import pytest

from engine.storage.artifacts import ArtifactError, verify
from engine.storage.dvc_cache import directory_listing
from engine.storage.store import Store
from tests.engine.storage.tiny_artifact import make_artifact, make_statement


def _store(tmp_path, name="store", cache="cache"):
    store = Store(tmp_path / name)
    store.init(tmp_path / cache)
    return store


def _put(store, folder, **options):
    artifact_id = make_artifact(folder, **options)
    assert store.put(folder) == artifact_id
    return artifact_id


def _pass(store, artifact_id, tmp_path, **options):
    return store.put_statement(artifact_id, make_statement(tmp_path / "statement", artifact_id, **options))


def _weights(folder):
    return folder / "triton_models/weights/a.weight"


def _dvc(root, *arguments):
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True).stdout


def test_what_is_put_is_there_whole_and_putting_it_again_changes_nothing(tmp_path):
    store = _store(tmp_path)
    artifact_id = _put(store, tmp_path / "a")
    assert store.path(artifact_id) == tmp_path / "store" / artifact_id
    verify(store.path(artifact_id), artifact_id)
    before = _weights(store.path(artifact_id)).stat().st_ino
    assert store.put(tmp_path / "a") == artifact_id
    assert _weights(store.path(artifact_id)).stat().st_ino == before
    assert store.ids() == [artifact_id]
    assert not list((tmp_path / "store").glob(".put-*"))


def test_read_only_files_are_linked_and_others_are_copied(tmp_path):
    store = _store(tmp_path)
    make_artifact(tmp_path / "a")
    _weights(tmp_path / "a").chmod(0o444)
    artifact_id = store.put(tmp_path / "a")
    assert _weights(store.path(artifact_id)).samefile(_weights(tmp_path / "a"))
    ini = "triton_models/weights/config.ini"
    (tmp_path / "a" / ini).write_text("changed by its owner")
    verify(store.path(artifact_id), artifact_id)
    # The cache and the store are one file, so that an artifact costs its bytes once.
    assert (store.path(artifact_id) / ini).stat().st_nlink == 2
    assert (store.path(artifact_id) / ini).stat().st_mode & 0o777 == 0o444


def test_a_damaged_artifact_is_not_taken_in_and_a_damaged_store_is_repaired_by_putting(tmp_path):
    store = _store(tmp_path)
    artifact_id = _put(store, tmp_path / "a")
    damaged = _weights(store.path(artifact_id))
    damaged.chmod(0o644)
    with damaged.open("r+b") as file:
        file.write(b"X")
    with pytest.raises(ArtifactError, match=r"a\.weight has changed"):
        store.put(store.path(artifact_id))
    store.put(tmp_path / "a")
    verify(store.path(artifact_id), artifact_id)
    # The cache shared its file with the store, so that it had the damage too.
    objects = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    names = [(path.parent.name + path.name).removesuffix(".dir") for path in objects]
    assert [hashlib.md5(path.read_bytes()).hexdigest() for path in objects] == names


def test_the_folder_digest_is_dvcs_own_and_a_lost_folder_comes_back_from_the_cache(tmp_path):
    store = _store(tmp_path)
    artifact_id = _put(store, tmp_path / "a")
    built = tmp_path / "project"
    Store(built).init(built / ".dvc/cache")
    shutil.copytree(tmp_path / "a", built / "out")
    _dvc(built, "add", "-q", "out")
    row = next(line for line in (built / "out.dvc").read_text().splitlines() if "md5: " in line)
    pin = (tmp_path / "store" / f"{artifact_id}.dvc").read_text()
    assert row in pin
    assert (built / "out.dvc").read_text().replace("path: out", f"path: {artifact_id}") == pin
    digest = row.removeprefix("- md5: ")
    theirs = built / ".dvc/cache/files/md5" / digest[:2] / digest[2:]
    assert theirs.read_bytes() == (tmp_path / "cache/files/md5" / digest[:2] / digest[2:]).read_bytes()
    shutil.rmtree(tmp_path / "store" / artifact_id)
    verify(store.path(artifact_id), artifact_id)
    assert not _weights(store.path(artifact_id)).is_symlink()


def test_what_the_cache_has_damaged_or_lost_is_said_and_damage_does_not_stay(tmp_path):
    store = _store(tmp_path)
    artifact_id = _put(store, tmp_path / "a")
    for path in (tmp_path / "cache").rglob("*"):
        if path.is_file() and path.stat().st_size == 1200:
            path.chmod(0o644)
            path.write_bytes(b"X" * 1200)
            path.chmod(0o444)
            damaged = path
    shutil.rmtree(tmp_path / "store" / artifact_id)
    with pytest.raises(ArtifactError, match=r"1 damaged files were removed.*a\.weight has changed.*build it again"):
        store.path(artifact_id)
    assert not damaged.exists() and not (tmp_path / "store" / artifact_id).exists()
    store.put(tmp_path / "a")
    verify(store.path(artifact_id), artifact_id)


def test_ids_resolve_by_whole_prefix_and_name(tmp_path):
    store = _store(tmp_path)
    ids = [_put(store, tmp_path / str(number), content=bytes([number])) for number in range(3)]
    store.pin("demo", ids[0])
    store.pin("demo", ids[1])
    store.pin("llama2_7b-w4a16", ids[2][:12])
    assert store.names() == {"demo": ids[1], "llama2_7b-w4a16": ids[2]}
    assert store.resolve("demo") == ids[1]
    assert store.resolve(ids[2]) == store.resolve(ids[2][:4]) == store.resolve(ids[2][:20].upper()) == ids[2]
    assert store.ids() == sorted(ids)
    assert json.loads((tmp_path / "store/names.json").read_text()) == store.names()


def test_what_resolves_to_nothing_or_to_many_says_what_there_is(tmp_path):
    store = _store(tmp_path)
    with pytest.raises(ArtifactError, match="holds no artifacts"):
        store.resolve("abcd")
    artifact_id = _put(store, tmp_path / "a")
    store.pin("demo", artifact_id)
    for text in ("nothing", artifact_id[:3], "0" * 64, "", "../x", artifact_id + "0"):
        with pytest.raises(ArtifactError, match=rf"Known: demo \({artifact_id[:12]}\)"):
            store.resolve(text)
    for number in "12":
        (tmp_path / "store" / f"{artifact_id[:10]}{number * 54}.dvc").write_text("")
    with pytest.raises(ArtifactError, match=f"ambiguous.*{artifact_id[:10]}11.*more digits"):
        store.resolve(artifact_id[:8])


@pytest.mark.parametrize("name", ["abcd", "0123456789", "Demo", "a b", "", "../x", "-x", "x" * 65])
def test_names_that_could_be_something_else_are_refused(tmp_path, name):
    store = _store(tmp_path)
    artifact_id = _put(store, tmp_path / "a")
    with pytest.raises(ArtifactError, match="cannot be the name"):
        store.pin(name, artifact_id)


def test_a_name_cannot_point_at_what_is_not_there(tmp_path):
    store = _store(tmp_path)
    with pytest.raises(ArtifactError):
        store.pin("demo", "0" * 64)
    (tmp_path / "store/names.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"names\.json cannot be read"):
        store.names()


def test_only_what_passed_last_is_servable_without_a_waiver(tmp_path, caplog):
    store = _store(tmp_path)
    artifact_id = _put(store, tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"has no evaluation.*waiver="):
        store.servable(artifact_id)
    with caplog.at_level(logging.WARNING):
        assert store.servable(artifact_id, "a look")["waiver"] == "a look"
    assert "a look" in caplog.text
    for verdict in ("fail", "inconclusive"):
        _pass(store, artifact_id, tmp_path, verdict=verdict)
        with pytest.raises(ArtifactError, match=f"by default on cpu-avx2: {verdict}"):
            store.servable(artifact_id)
        with pytest.raises(ArtifactError):
            store.servable(artifact_id, "  ")
        assert store.servable(artifact_id, "a look")["verdict"] == verdict
    _pass(store, artifact_id, tmp_path)
    assert store.servable(artifact_id) == {
        "id": artifact_id,
        "verdict": "pass",
        "evaluation": "default",
        "device_class": "cpu-avx2",
        "waiver": None,
    }
    path = _pass(store, artifact_id, tmp_path, verdict="fail", device="cuda-sm90")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
    with pytest.raises(ArtifactError, match="on cuda-sm90: fail"):
        store.servable(artifact_id)
    verdicts = [statement["predicate"]["verdict"] for statement in store.evaluations(artifact_id)]
    assert verdicts == ["pass", "fail"]
    assert [file.read_text() for file in store.goldens(artifact_id, "cpu-avx2")] == ["[]"]
    assert store.goldens(artifact_id, "cpu") == []


@pytest.mark.parametrize(
    "change",
    [
        {"_type": "x"},
        {"subject": []},
        {"subject": [{"digest": {"sha256": "0" * 64}}]},
        {"predicate": {"verdict": "good", "device_class": "cpu", "evaluation": "x"}},
        {"predicate": {"verdict": "pass", "device_class": "../cpu", "evaluation": "x"}},
        {"predicate": {"verdict": "pass", "device_class": "cpu"}},
    ],
)
def test_a_statement_of_another_form_or_about_another_artifact_is_refused(tmp_path, change):
    store = _store(tmp_path)
    artifact_id = _put(store, tmp_path / "a")
    folder = make_statement(tmp_path / "s", artifact_id)
    statement = json.loads((folder / "statement.json").read_text())
    (folder / "statement.json").write_text(json.dumps(statement | change))
    with pytest.raises(ArtifactError, match=r"statement\.json"):
        store.put_statement(artifact_id, folder)
    assert store.evaluations(artifact_id) == []


def test_an_empty_machine_gets_an_artifact_from_the_remote_alone(tmp_path):
    store = _store(tmp_path)
    artifact_id = _put(store, tmp_path / "a")
    other = _put(store, tmp_path / "b", content=b"other")
    _pass(store, artifact_id, tmp_path)
    store.pin("demo", artifact_id)
    store.pin("other", other)
    assert store.push(tmp_path / "remote, one", "demo") == artifact_id
    for gone in ("store", "cache", "a"):
        shutil.rmtree(tmp_path / gone)
    fresh = _store(tmp_path, "store2", "cache2")
    (tmp_path / "remote, one/files").rename(tmp_path / "files")
    with pytest.raises(ArtifactError, match="dvc pull"):
        fresh.pull(tmp_path / "remote, one", "demo")
    assert fresh.ids() == []
    (tmp_path / "files").rename(tmp_path / "remote, one/files")
    assert fresh.pull(tmp_path / "remote, one", "demo") == artifact_id
    verify(fresh.path(artifact_id), artifact_id)
    assert fresh.servable("demo")["verdict"] == "pass"
    assert fresh.names() == {"demo": artifact_id} and fresh.ids() == [artifact_id]
    # Again, over damage that DVC does not look for.
    damaged = _weights(fresh.path(artifact_id))
    times = damaged.stat()
    damaged.chmod(0o644)
    damaged.write_bytes(b"X" * times.st_size)
    damaged.chmod(0o444)
    os.utime(damaged, ns=(times.st_atime_ns, times.st_mtime_ns))
    fresh.pull(tmp_path / "remote, one", artifact_id[:6])
    verify(fresh.path(artifact_id), artifact_id)
    with pytest.raises(ArtifactError, match="Known: demo"):
        fresh.pull(tmp_path / "remote, one", "other")


def test_what_is_no_remote_is_refused(tmp_path):
    store = _store(tmp_path)
    artifact_id = _put(store, tmp_path / "a")
    with pytest.raises(ArtifactError, match="is not a remote of a store"):
        store.pull(tmp_path / "nothing", artifact_id)
    for change in (store.push, store.pull):
        with pytest.raises(ArtifactError, match="only local folders"):
            change("s3://bucket/x", artifact_id)


def test_a_name_that_means_something_else_here_stays(tmp_path, caplog):
    store = _store(tmp_path)
    artifact_id = _put(store, tmp_path / "a")
    there, here = store._records, _store(tmp_path, "store2", "cache")
    there.set_names({"demo": artifact_id, "best": artifact_id})
    other = _put(here, tmp_path / "b", content=b"other")
    here.pin("demo", other)
    here.pin("best", other)
    (tmp_path / "remote").mkdir()
    shutil.copytree(tmp_path / "store", tmp_path / "remote" / "ingot")
    here._cache.pull = lambda pin, remote: shutil.copytree(tmp_path / "a", here.root / artifact_id)
    assert here.pull(tmp_path / "remote", "best") == artifact_id
    assert here.names() == {"best": artifact_id, "demo": other}
    assert "the name demo keeps pointing" in caplog.text


def _put_often(root, cache, folder, times):
    store = Store(root)
    store.init(cache)
    for number in range(times):
        store.put(folder)
        store.pin(f"name_{os.getpid()}_{number}", store.put(folder))


def test_processes_and_threads_may_put_the_same_at_once(tmp_path):
    artifact_id = make_artifact(tmp_path / "a")
    arguments = (tmp_path / "store", tmp_path / "cache", tmp_path / "a", 5)
    processes = [get_context("spawn").Process(target=_put_often, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: _put_often(*arguments), range(2)))
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    store = Store(tmp_path / "store")
    verify(store.path(artifact_id), artifact_id)
    assert store.ids() == [artifact_id] and len(store.names()) == 15
    assert not list((tmp_path / "store").glob(".put-*"))


def test_a_store_that_was_not_made_says_so(tmp_path):
    make_artifact(tmp_path / "a")
    with pytest.raises(ArtifactError, match="is not a store yet"):
        Store(tmp_path / "store").put(tmp_path / "a")


def test_the_listing_of_a_folder_sorts_by_path():
    listing, digest = directory_listing({"b": "1" * 32, "a/x": "2" * 32})
    assert json.loads(listing)[0] == {"md5": "2" * 32, "relpath": "a/x"}
    assert digest.endswith(".dir") and len(digest) == 36
