import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import slices, sources
from pipelines.slices import Call, locate, output, read_slice, run_stage, write_json

ROOT = Path(__file__).resolve().parents[2]


def test_a_stage_gets_its_slice_out_and_inputs(tmp_path, capsys):
    write_json(tmp_path / "stage/key.json", {"tp": 2})
    seen = []
    command = ["--slice", str(tmp_path / "stage/key.json"), "--out", "o", "--in", "a=b/c", "--in", "d=e"]
    assert run_stage(seen.append, command) == 0
    assert seen == [Call(slice={"tp": 2}, out=Path("o"), inputs={"a": Path("b/c"), "d": Path("e")})]


@pytest.mark.parametrize("error", [ValueError("hidden_size=7 does not fit"), FileNotFoundError("model.safetensors")])
def test_a_mistake_is_one_paragraph_and_exit_code_1(tmp_path, capsys, error):
    write_json(tmp_path / "shard/key.json", {})

    def work(call):
        raise error

    assert run_stage(work, ["--slice", str(tmp_path / "shard/key.json"), "--out", "o"]) == 1
    assert capsys.readouterr().err == f"shard key: {error}\n"


def test_a_bug_is_not_hidden(tmp_path):
    write_json(tmp_path / "s/k.json", {})
    with pytest.raises(ZeroDivisionError):
        run_stage(lambda call: 1 / 0, ["--slice", str(tmp_path / "s/k.json"), "--out", "o"])


def test_a_slice_of_another_toolchain_is_refused(tmp_path, capsys):
    write_json(tmp_path / "s/k.json", {"toolchain": {"torch": "0.4.1", "device": "cpu-avx2"}})
    assert run_stage(lambda call: None, ["--slice", str(tmp_path / "s/k.json"), "--out", "o"]) == 1
    assert "torch 0.4.1 (here: " in capsys.readouterr().err


def test_unreadable_slices_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="dvc repro compose"):
        read_slice(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"half\.json is not JSON"):
        read_slice(tmp_path / "half.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="not a JSON object"):
        read_slice(tmp_path / "list.json")


def test_output_appears_whole_and_replaces_what_was_there(tmp_path):
    out = tmp_path / "out"
    for content in ("one", "two"):
        with output(out) as folder:
            (folder / content).write_text(content)
            assert not (out / content).exists()
        assert [path.name for path in out.iterdir()] == [content]
    assert list(tmp_path.iterdir()) == [out]


def test_output_leaves_nothing_and_spoils_nothing_when_the_work_fails(tmp_path):
    with output(tmp_path / "out") as folder:
        (folder / "good").write_text("good")
    with pytest.raises(RuntimeError), output(tmp_path / "out") as folder:
        (folder / "bad").write_text("bad")
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "good"]


def test_what_killed_writers_left_is_swept_and_living_ones_are_not(tmp_path):
    process = subprocess.Popen(["sleep", "0"])
    process.wait()
    (tmp_path / f"out.tmp-{process.pid}").mkdir()
    (tmp_path / f"out.tmp-{os.getppid()}").mkdir()
    (tmp_path / "out.tmp-of-a-user").mkdir()
    with output(tmp_path / "out"):
        pass
    kept = ["out", f"out.tmp-{os.getppid()}", "out.tmp-of-a-user"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_write_json_is_sorted_and_whole(tmp_path):
    write_json(tmp_path / "a/b.json", {"b": 1, "a": "é"})
    assert (tmp_path / "a/b.json").read_text(encoding="utf-8") == '{\n  "a": "é",\n  "b": 1\n}\n'
    with pytest.raises(TypeError):
        write_json(tmp_path / "a/b.json", {"b": object()})
    assert json.loads((tmp_path / "a/b.json").read_text(encoding="utf-8")) == {"a": "é", "b": 1}


def test_locate_checks_the_digest_of_what_it_finds(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one\n")
    record = {"kind": "text", "digest": sources.text_digest(text)}
    paths, memory = tmp_path / "paths.json", tmp_path / "memory.json"
    with pytest.raises(FileNotFoundError, match="not on this machine"):
        locate(record, paths=paths, memory=memory)
    write_json(paths, {f"sha256:{record['digest']}": str(text)})
    assert locate(record, paths=paths, memory=memory) == text
    text.write_text("two\n")
    with pytest.raises(ValueError, match=r"text.txt changed since the slices were written"):
        locate(record, paths=paths, memory=memory)
    text.unlink()
    with pytest.raises(FileNotFoundError, match="is gone"):
        locate(record, paths=paths, memory=memory)


def test_link_makes_one_file_of_two_names(tmp_path):
    (tmp_path / "a").write_text("x")
    slices.link(tmp_path / "a", tmp_path / "deep/b")
    assert (tmp_path / "a").stat().st_ino == (tmp_path / "deep/b").stat().st_ino


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death is signalled on Linux only")
def test_a_stage_dies_with_its_parent(tmp_path):
    child = "from pipelines.slices import die_with_parent; import os, time; die_with_parent();"
    child += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT)
    pid = _wait_for(lambda: (tmp_path / "pid").read_text() if (tmp_path / "pid").exists() else "")
    process.kill()
    process.wait()
    _wait_for(lambda: not _alive(int(pid)))


def test_the_module_is_cheap_to_import():
    done = subprocess.run(
        [sys.executable, "-c", "import pipelines.slices, sys; print(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"torch", "hydra", "omegaconf", "dvc", "numpy", "huggingface_hub"} & set(done.stdout.split())


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_for(condition, seconds=10):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")
