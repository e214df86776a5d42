import hashlib
import json
import os

import pytest
import yaml

from pipelines import verify
from tests.pipelines.built import project_folder


def put(cache, content):
    md5 = hashlib.md5(content).hexdigest()
    path = cache / "files/md5" / md5[:2] / md5[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return md5, path


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A lock with a folder of two files, a file, an output that is not cached, and a stage that is not selected."""
    monkeypatch.chdir(project_folder(tmp_path))
    cache = tmp_path / ".dvc/cache"
    files = {name: put(cache, name.encode()) for name in ("a", "b", "single")}
    listing = json.dumps([{"md5": files[name][0], "relpath": name} for name in ("a", "b")]).encode()
    folder, path = put(cache, listing)
    path = path.rename(f"{path}.dir")
    stages = {
        "export@k": {"outs": [{"path": "build/export/k", "md5": f"{folder}.dir"}]},
        "other@k": {"outs": [{"path": "build/other/k", "md5": files["single"][0]}]},
        "publish@k": {"outs": [{"path": "build/publish/k.json", "md5": "0" * 32}]},
        "export@old": {"outs": [{"path": "build/export/old", "md5": "1" * 32}]},
    }
    stages = {name: {"cmd": "x", **stage} for name, stage in stages.items()}
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"stages": stages}))
    outs = {"export": ["x"], "other": ["x"], "publish": [{"x": {"cache": False}}]}
    declared = {"stages": {name: {"outs": value} for name, value in outs.items()}}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(declared))
    for name in ("export", "other", "publish"):
        (tmp_path / f"build/slices/{name}").mkdir(parents=True)
        (tmp_path / f"build/slices/{name}/k.json").write_text("{}")
    return {**{name: path for name, (_, path) in files.items()}, "listing": path}


def test_a_whole_cache_is_whole(project, capsys):
    assert verify.main([]) == 0
    assert capsys.readouterr().out == "2 outputs are whole in the cache\n"


@pytest.mark.parametrize(
    ("name", "said"), [("a", "build/export/k/a"), ("single", "build/other/k"), ("listing", "build/export/k:")]
)
@pytest.mark.parametrize("harm", ["absent", "damaged", "truncated"])
def test_what_is_broken_is_named(project, capsys, name, said, harm):
    path = project[name]
    if harm == "absent":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + (b"" if harm == "truncated" else b"?"))
    assert verify.main([]) == 1
    error = capsys.readouterr().err
    assert "1 objects that dvc.lock names are not whole" in error and said in error
    assert ("is absent" if harm == "absent" else "is damaged") in error


def test_nothing_built_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(project_folder(tmp_path))
    assert verify.main([]) == 1
    assert "nothing has been built yet" in capsys.readouterr().err


def test_a_lock_that_a_killed_dvc_cut_off_is_put_away(project, tmp_path, capsys):
    text = (tmp_path / "dvc.lock").read_text()
    (tmp_path / "dvc.lock").write_text(text[: text.index("path:") + 3])
    os.utime(tmp_path / "dvc.lock", (0, 0))
    assert verify.main([]) == 1
    error = capsys.readouterr().err
    assert "dvc.lock was left half-written" in error and "nothing has been built yet" in error
