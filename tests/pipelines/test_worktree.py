import subprocess

import pytest

from pipelines.worktree import cache_folder, copy_tree, isolate, project_root, tracked_files
from tests.pipelines.built import project_folder


@pytest.fixture
def project(tmp_path, monkeypatch):
    for scope in ("SYSTEM", "GLOBAL"):
        monkeypatch.setenv(f"DVC_{scope}_CONFIG_DIR", str(tmp_path / scope))
    root = tmp_path / "project"
    root.mkdir()
    project_folder(root)
    for name in (".dvc", ".dvc/cache", ".dvc/tmp", "build", ".ingot", "pipelines", "pipelines/__pycache__", ".venv"):
        (root / name).mkdir()
        (root / name / "file").write_text(name)
    (root / ".ingot/sources.json").write_text("{}")
    (root / ".gitignore").write_text("/build/\n/.ingot/\n/.dvc/cache/\n/.dvc/tmp/\n/.venv/\n__pycache__/\n")
    return root


def git(root, *arguments):
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], cwd=root, check=True)


def listed(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_tree_is_copied_as_it_lies_not_as_it_was_committed(project, tmp_path):
    git(project, "init", "-q")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "x")
    (project / "dvc.yaml").write_text("edited")
    (project / "new.txt").write_text("not added")
    (project / "pipelines/file").unlink()
    assert copy_tree(project, tmp_path / "copy")
    assert listed(tmp_path / "copy") == [".dvc/file", ".gitignore", "conf/config.yaml", "dvc.yaml", "new.txt"]
    assert (tmp_path / "copy/dvc.yaml").read_text() == "edited"


def test_without_git_what_a_build_made_stays_behind(project, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert tracked_files(project) is None
    assert not copy_tree(project, tmp_path / "copy")
    assert listed(tmp_path / "copy") == [
        ".dvc/file", ".gitignore", "conf/config.yaml", "dvc.yaml", "pipelines/file"
    ]  # fmt: skip


def test_without_a_git_program_too(project, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert not copy_tree(project, tmp_path / "copy")


def test_an_isolated_copy_shares_the_cache_and_the_memory(project, tmp_path):
    isolate(project, tmp_path / "copy")
    assert cache_folder(tmp_path / "copy") == project / ".dvc/cache"
    assert (tmp_path / "copy/.ingot/sources.json").is_file()
    assert not (tmp_path / "copy/.dvc/cache").exists()


def test_the_cache_is_where_dvc_has_it(project, tmp_path):
    assert cache_folder(project) == project / ".dvc/cache"
    (tmp_path / "GLOBAL").mkdir()
    (tmp_path / "GLOBAL/config").write_text("[cache]\n    dir = /big/shared\n")
    assert str(cache_folder(project)) == "/big/shared"
    (project / ".dvc/config").write_text("[core]\n    autostage = true\n['remote \"x\"']\n    url = s3://%(x)s\n")
    assert str(cache_folder(project)) == "/big/shared"
    (project / ".dvc/config.local").write_text('[cache]\n    dir = "../../elsewhere"\n')
    assert cache_folder(project) == tmp_path / "elsewhere"


def test_the_project_is_the_current_folder_or_the_checkout(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    assert project_root() == project
    monkeypatch.chdir(tmp_path)
    assert (project_root() / "pipelines/worktree.py").is_file()
