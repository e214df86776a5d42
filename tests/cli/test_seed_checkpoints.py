"""`ingot convert` of checkpoints in every form that it takes: the files are those of the plain checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.main import main
from engine.storage.checkpoint import Checkpoint
from engine.storage.hf_export import export_checkpoint
from engine.storage.workspace import TOKENIZER, WEIGHTS, Workspace
from tests.cli.test_seed import GOLDEN, answer, awq_folder, digests, expected_digests
from tests.engine.storage.tiny_families import META_NAMES, renamed
from tests.shared_data import shared

PARAMS = {"dim": 512, "n_layers": 2, "n_heads": 4, "multiple_of": 256, "norm_eps": 1e-6, "vocab_size": -1}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def meta_folder(target: Path) -> Path:
    """The golden checkpoint as Meta would have published it, for one rank: its vocabulary of 601 is dealt to no two."""
    source = shared(f"{GOLDEN}/checkpoint")
    target.mkdir()
    (target / "params.json").write_text(json.dumps(PARAMS))
    shutil.copyfile(source / "tokenizer.model", target / "tokenizer.model")
    tensors = renamed(load_file(source / "model.safetensors"), META_NAMES)
    for name, x in tensors.items():
        if ".wq." in name or ".wk." in name:
            tensors[name] = x.view(-1, 2, 64, 512).transpose(1, 2).reshape(x.shape)
    torch.save(tensors, target / "consolidated.00.pth")
    return target


@pytest.mark.parametrize(("name", "tp"), [("llama2", 1), ("llama", 2)])
def test_a_meta_folder_gives_the_files_of_the_hugging_face_one(tmp_path, name, tp, capsys):
    folder = meta_folder(tmp_path / "meta")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    flags = ["--model-format", "llama", "--allow-bin", "--tp", str(tp), "--dst-path", str(tmp_path / "out")]
    assert main(["convert", name, str(folder), *flags]) == 0
    assert digests(tmp_path / "out") == expected_digests(f"fp16.tp{tp}")
    ini, plain = Workspace(tmp_path / "out").ini, shared(f"{GOLDEN}/expected.fp16.tp{tp}.config.ini").read_text()
    theirs = dict(line.split(" = ") for line in plain.splitlines() if " = " in line)
    kept = {key: str(getattr(ini, key)) for key in ("head_num", "vocab_size", "norm_eps", "start_id", "end_id")}
    assert kept == {key: theirs[key] for key in kept}
    said = "4104, chat template llama2" if name == "llama2" else "2056, no chat template"
    assert f"fp16, tp={tp}, session_len {said}" in capsys.readouterr().out
    assert len(answer(tmp_path / "out")) == 4
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--allow-bin"], "is a Meta checkpoint (params.json, consolidated.*.pth): give --model-format llama"),
        (["--model-format", "llama"], "consolidated.00.pth is a pickled file: with --allow-bin"),
        (["--model-format", "awq", "--allow-bin"], "give --model-format llama"),
        (["--model-format", "llama", "--allow-bin", "--group-size", "128"], "--group-size 128 is for weights that are"),
        (["--model-format", "llama", "--allow-bin", "--tp", "8"], "4 attention heads cannot be dealt to 8 ranks"),
    ],
)
def test_what_is_wrong_about_a_meta_folder_is_said_before_anything_is_written(tmp_path, flags, message, capsys):
    folder = meta_folder(tmp_path / "meta")
    assert main(["convert", "llama2", str(folder), *flags, "--dst-path", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta"]


def test_a_meta_folder_without_its_tokenizer_takes_another(tmp_path, capsys):
    folder = meta_folder(tmp_path / "meta")
    tokenizer = (folder / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    command = ["convert", "llama2", str(folder), "--model-format", "llama", "--allow-bin", "--dst-path"]
    assert main([*command, str(tmp_path / "none")]) == 1
    assert "tokenizer.model" in capsys.readouterr().err and not (tmp_path / "none").exists()
    assert main([*command, str(tmp_path / "out"), "--tokenizer-path", str(tokenizer)]) == 0
    assert digests(tmp_path / "out") == expected_digests("fp16.tp1")


def test_what_auto_awq_left_in_bin_files_needs_its_format_named(tmp_path, capsys):
    folder = awq_folder(tmp_path / "awq")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    torch.save({"absmax": {}}, folder / "inputs_stats.pth")
    command = ["convert", "llama2", str(folder), "--allow-bin", "--dst-path", str(tmp_path / "out")]
    assert main(command) == 1
    assert "(without it `ingot convert --model-format awq` reads HF-AWQ)" in capsys.readouterr().err
    assert main([*command, "--model-format", "awq", "--group-size", "64"]) == 1
    assert "is quantized in groups of 128, not 64" in capsys.readouterr().err
    assert main([*command, "--model-format", "awq", "--group-size", "128"]) == 0
    assert digests(tmp_path / "out") == expected_digests("awq.tp1")


@pytest.mark.parametrize("form", ["hf-awq", "compressed-tensors"])
@pytest.mark.parametrize("named", [True, False])
def test_a_quantized_checkpoint_that_says_so_is_read_as_what_it_is(tmp_path, form, named):
    awq = awq_folder(tmp_path / "awq")
    tensors = load_file(awq / "model.safetensors")
    save_file(
        {name: x.half() if x.is_floating_point() else x for name, x in tensors.items()}, awq / "model.safetensors"
    )
    assert main(["convert", "base", str(awq), "--model-format", "awq", "--dst-path", str(tmp_path / "made")]) == 0
    export_checkpoint(Workspace(tmp_path / "made"), tmp_path / form, form=form)
    assert Checkpoint(tmp_path / form, allow_quantized=True).quantization.method in ("awq", "compressed-tensors")
    flags = ["--model-format", "awq", "--group-size", "128"] if named else []
    target = tmp_path / "again"
    assert main(["convert", "llama2", str(tmp_path / form), *flags, "--tp", "2", "--dst-path", str(target)]) == 0
    assert digests(target) == expected_digests("awq.tp2")
    assert (target / WEIGHTS / "config.ini").read_text() == shared(f"{GOLDEN}/expected.awq.tp2.config.ini").read_text()
    assert (target / TOKENIZER / "chat_template.jinja").is_file()
