from pathlib import Path

import pytest

from benchmarks import rows
from benchmarks.random_workspace import write_workspace
from benchmarks.shapes import shape
from cli.main import main
from engine.config import Recipe
from engine.storage.store import Store

CPU = ("bench", "generation", "device=cpu", "input=3", "output=12")


def test_a_row_a_batch_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.csv"
    shape_of = ("shape=tiny", "weights=w4a16", "group_size=64", "kv=kv8")
    assert main([*CPU, *shape_of, "batch=1,5", "repeats=2", f"out={out}"]) == 0
    first, second = rows.read(out)
    assert (first["batch"], second["batch"]) == ("1", "5")
    for row in (first, second):
        assert (row["model"], row["recipe"], row["group_size"], row["engine"]) == (
            "tiny",
            "w4a16-kv8-channel",
            "64",
            "ingot",
        )
        assert row["commit"] and row["torch"] and row["device"].startswith("cpu")
        seconds, batch = float(row["seconds"]), int(row["batch"])
        assert float(row["tokens_per_second"]) == pytest.approx(12 * batch / seconds, rel=0.01)
        assert 0 < float(row["first_token_ms"]) < 1e3 * seconds
        assert 0 < float(row["step_ms"]) < 1e3 * seconds
        prompts = float(row["prefill_tokens_per_second"])
        assert prompts >= 0.999 * 3 * batch / seconds
        floor = float(row["floor_tokens_per_second"])
        assert float(row["share_of_floor"]) == pytest.approx(float(row["tokens_per_second"]) / floor, rel=0.05)
    assert "batch=5" in capsys.readouterr().out


def test_two_ranks_make_their_own_random_weights(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    asked = ("shape=tiny", "weights=w8a8", "kv=kv8", "tp=2", "batch=1,2")
    assert main([*CPU, *asked, f"out={out}"]) == 0
    found = rows.read(out)
    assert [(row["tp"], row["batch"], row["recipe"]) for row in found] == [
        ("2", batch, "w8a8-kv8-channel") for batch in ("1", "2")
    ]
    assert all(float(row["tokens_per_second"]) > 0 for row in found)


def test_a_folder_is_measured_as_it_is(tmp_path: Path) -> None:
    artifact_id = write_workspace(tmp_path / "w", "small", shape("tiny"), Recipe(kv="kv8"), session_len=64)
    assert main([*CPU, f"folder={tmp_path / 'w'}", "batch=2", f"out={tmp_path / 'rows.csv'}"]) == 0
    [row] = rows.read(tmp_path / "rows.csv")
    assert (row["model"], row["recipe"], row["artifact"]) == ("small", "fp16-kv8", artifact_id[:12])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to measure: artifact=ID, folder=WORKSPACE or shape=NAME, one of them. None of them was given."),
        (["shape=tiny", "folder=/tmp"], "folder and shape were given"),
        (["shape=huge"], "shape is 'huge', but must be one of internlm7b"),
        (["folder=/nowhere/at/all"], "is not a folder"),
        (["folder=/tmp", "kv=kv8"], "kv=kv8 goes with shape=NAME: folder has its own"),
        (["shape=tiny", "weights=w4a16", "group_size=96"], "group_size 96 does not divide"),
        (["shape=tiny", "device=cuda:99"], "is not on this machine"),
        (["shape=tiny", "tp=4"], "its 2 key/value heads cannot be dealt to 4 ranks; tp that fits: 1, 2"),
        (["shape=tiny", "tp=2", "peer=hf"], "tp=2 goes with our engine"),
        (["artifact=abcdef", "store=/nowhere/at/all"], "no artifact 'abcdef'"),
        (["shape=tiny", "btach=1"], "Did you mean batch?"),
    ],
)
def test_a_mistake_is_one_paragraph(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "generation", *arguments, "out=none"]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_an_artifact_is_found_in_its_store_and_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact_id = write_workspace(tmp_path / "w", "small", shape("tiny"), Recipe(), session_len=64)
    store = Store(tmp_path / "store")
    store.init(tmp_path / "cache")
    store.put(tmp_path / "w")
    case = [*CPU, f"artifact={artifact_id[:9]}", f"store={tmp_path / 'store'}", "batch=1"]
    assert main([*case, f"out={tmp_path / 'rows.csv'}"]) == 0
    [row] = rows.read(tmp_path / "rows.csv")
    assert (row["model"], row["artifact"]) == ("small", artifact_id[:12])
    file = store.path(artifact_id) / "triton_models/weights/norm.weight"
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.unlink()
    file.write_bytes(content)
    assert main([*case, "out=none"]) == 1
    assert "norm.weight" in capsys.readouterr().err
