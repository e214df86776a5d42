from pathlib import Path

import pytest
import torch

from cli.main import main
from engine.config import Recipe
from engine.storage.artifacts import write_manifest
from engine.storage.checkpoint import Checkpoint
from engine.storage.store import Store
from engine.storage.triton_repository import LINKS
from engine.storage.workspace import Workspace
from tests.engine.storage.tiny_workspace import SMALL, make_workspace, random_tensors
from tests.tiny_artifact import write_tiny_artifact


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A store with one artifact in it, and its id."""
    root = tmp_path_factory.mktemp("built")
    artifact_id = write_tiny_artifact(root / "artifact")
    store = Store(root / "store")
    store.init(root / "cache")
    assert store.put(root / "artifact") == artifact_id
    return root / "store", artifact_id


def run(store: Path, *arguments: str) -> int:
    return main(["artifacts", "--store", str(store), *arguments])


def test_from_list_to_export(built: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, artifact_id = built
    assert run(store, "pin", "tiny", artifact_id[:8]) == 0
    assert run(store, "list") == 0
    listed = capsys.readouterr().out.splitlines()[-1].split()
    assert listed == [artifact_id[:12], "fp16", "1", "0.2", "MiB", "not", "evaluated", "tiny"]
    assert run(store, "show", "tiny") == 0
    assert artifact_id in capsys.readouterr().out
    assert run(store, "path", "tiny") == 0
    assert capsys.readouterr().out.strip() == str(store / artifact_id)
    assert run(store, "verify", "tiny") == 0
    assert "all as they were written" in capsys.readouterr().out
    target = tmp_path / "copy"
    assert run(store, "export", "tiny", str(target)) == 0
    config = target / "triton_models/weights/config.ini"
    assert config.stat().st_nlink == 1
    links = {"model_repository/turbomind": "../triton_models/interactive", **LINKS}
    assert {name: (target / name).readlink().as_posix() for name in links} == links
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]
    assert run(store, "export", "tiny", str(target)) == 1
    assert "exists already" in capsys.readouterr().err


def test_a_machine_that_knows_only_the_remote(
    built: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, artifact_id = built
    monkeypatch.setattr("cli.artifacts.project_cache", lambda: tmp_path / "cache")
    assert run(store, "pin", "tiny", artifact_id) == 0
    assert run(store, "push", str(tmp_path / "remote"), "tiny") == 0
    capsys.readouterr()
    assert run(tmp_path / "store", "pull", str(tmp_path / "remote"), "tiny") == 0
    assert capsys.readouterr().out.strip() == artifact_id
    assert run(tmp_path / "store", "verify", "tiny") == 0


@pytest.mark.parametrize("asked", [["tp=2"], ["2"], ["--tp", "2"]])
def test_reshard_puts_a_new_artifact_without_an_evaluation_into_the_store(
    built: tuple[Path, str], asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    store, artifact_id = built
    assert run(store, "reshard", artifact_id[:8], *asked) == 0
    said = capsys.readouterr()
    new = said.out.strip()
    assert new != artifact_id and "has no evaluation yet" in said.err and "waiver" in said.err
    assert run(store, "verify", new) == 0
    assert (store / new / "triton_models/weights/layers.1.feed_forward.w2.1.weight").is_file()
    assert Store(store).evaluations(new) == []
    capsys.readouterr()
    assert run(store, "reshard", new, "tp=1") == 0
    assert capsys.readouterr().out.strip() == artifact_id  # the same bytes again, and the same id
    assert run(store, "reshard", artifact_id, "tp=1") == 0
    assert "tp=1 already" in capsys.readouterr().err
    assert not list(store.glob(".put-*"))


@pytest.mark.parametrize("form", ["hf-awq", "compressed-tensors"])
def test_export_as_a_hugging_face_checkpoint(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, source = Recipe(weights="w4a16", group_size=32), tmp_path / "source"
    make_workspace(source, SMALL, recipe, 1, random_tensors(SMALL, recipe))
    artifact_id = write_manifest(source, recipe=recipe, sources={}, calibration=None, chat_template=None, tp=1)
    store = Store(tmp_path / "store")
    store.init(tmp_path / "cache")
    store.put(source)
    assert run(tmp_path / "store", "export", artifact_id[:8], str(tmp_path / "out"), "--format", form) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    checkpoint = Checkpoint(tmp_path / "out", allow_quantized=True)
    name = "model.layers.1.mlp.down_proj.qweight"
    assert torch.equal(checkpoint.tensor(name), Workspace(source).tensor(name))
    assert run(tmp_path / "store", "export", artifact_id, str(tmp_path / "out"), "--format", form) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "{id}", "nowhere", "--format", "gguf"], "invalid choice: 'gguf'"),
        (
            ["export", "{id}", "nowhere", "--format", "hf-awq"],
            "is fp16, which is not written as hf-awq: w4a16 as",
        ),
        (["show", "dead"], "no artifact 'dead'"),
        (["verify", "tiny; rm -rf /"], "ingot: "),
        (["lst"], "invalid choice: 'lst'"),
        ([], "required"),
        (["list", "--wibble"], "--wibble"),
        (["pull", "/nowhere", "tiny"], "ingot: "),
        (["reshard", "{id}"], "say for how many ranks, once"),
        (["reshard", "{id}", "tp=two"], "say for how many ranks, once"),
        (["reshard", "{id}", "tp=2", "--tp", "2"], "say for how many ranks, once"),
        (["reshard", "{id}", "tp=4"], "2 key/value heads cannot be dealt to 4 ranks"),
    ],
)
def test_mistakes_are_one_paragraph(
    built: tuple[Path, str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(built[0], *(text.format(id=built[1]) for text in arguments)) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
