"""The seed document's command lines of `lite`, from a checkpoint to a served int4 workspace with an int8 cache."""

import json
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.main import main
from engine.config import EngineConfig, Sampling
from engine.models.batch import packed
from engine.runtime.engine import Engine
from engine.storage.checkpoint import Checkpoint, load_checkpoint
from engine.storage.workspace import WEIGHTS, Workspace
from pipelines import sources
from tests.cli.test_seed import GOLDEN, document_lines
from tests.pipelines.tiny_checkpoint import TEXT, write_tiny_checkpoint
from tests.shared_data import shared

FEW = ["--calib-samples", "6", "--calib-seqlen", "64"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def answer(folder):
    engine = Engine.from_workspace(folder, EngineConfig(max_batch_size=1, cache_max_entry_count=33))
    [completion] = engine.generate([[1, 5, 9, 2]], Sampling(max_new_tokens=4, temperature=0))
    return completion.token_ids


def test_the_documents_own_command_lines_one_after_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, work = shared(f"{GOLDEN}/checkpoint"), tmp_path / "work_dir"
    places = {
        "$HF_MODEL": str(model),
        "/root/share/temp/model_repos/internlm-chat-7b/": str(model),
        "$WORK_DIR": str(work),
        "workspace/triton_models/weights/": str(tmp_path / "workspace_quant" / WEIGHTS),
        "ptb": "ptb",
    }

    def words(line):
        said = [places.get(word, word) for word in shlex.split(line, comments=True)]
        for flag, fewer in zip(FEW[::2], FEW[1::2], strict=True):  # on a machine without a GPU
            if flag in said:
                said[said.index(flag) + 1] = fewer
        return said + (["--calib-path", str(shared("data/text/ptb.valid.txt"))] if "ptb" in said else [])

    [calibrate] = document_lines("lite calibrate")
    with_flags, underscores, from_the_hub = document_lines("lite auto_awq")
    [scales] = document_lines("lite kv_qparams")
    convert = document_lines("convert")[-1]

    assert main(words(calibrate)) == 0
    assert "calibrated on 6 blocks of 64 tokens" in capsys.readouterr().out
    measured = (work / "stats.safetensors").stat().st_mtime_ns

    assert main(words(with_flags)) == 0
    assert "quantized on the calibration that was there, 4 bits in groups of 128" in capsys.readouterr().out
    assert (work / "stats.safetensors").stat().st_mtime_ns == measured
    assert Checkpoint(work, allow_quantized=True).recipe.group_size == 128

    # The second one names another folder, where nothing is calibrated yet, and no data: the first one's calibration.
    shutil.copytree(work, tmp_path / "quant_output")
    for path in (tmp_path / "quant_output").glob("model*"):
        path.unlink()
    assert "--w_bits 4" in underscores and main(words(underscores)) == 0
    assert (tmp_path / "quant_output/model.safetensors").read_bytes() == (work / "model.safetensors").read_bytes()

    assert main(words(from_the_hub)) == 1
    assert "Nothing is fetched here: download the checkpoint first" in capsys.readouterr().err

    assert main(words(convert)) == 0
    assert main(words(scales)) == 0
    said = capsys.readouterr()
    assert "quant_policy is 4 now" in said.out and "do not fit" not in said.err
    workspace = Workspace(tmp_path / "workspace_quant")
    assert workspace.recipe.weights == "w4a16" and workspace.kv_scales() is not None
    assert len(answer(tmp_path / "workspace_quant")) > 0
    left = ["internlm-chat-7b-4bit", "quant_output", "work_dir", "workspace_quant"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left[1:]
    assert not [path for path in work.iterdir() if path.name.startswith(".")]


def write_references_calibration(model, work):
    """A work folder with the statistics that the reference recorded."""
    work.mkdir()
    statistics = load_file(shared(f"{GOLDEN}/calibration_stats.safetensors"))
    save_file({name: tensor.float() for name, tensor in statistics.items()}, work / "stats.safetensors")
    save_file({"tokens": torch.zeros(1, 2, dtype=torch.int32)}, work / "blocks.safetensors")
    (work / "calibration.json").write_text(json.dumps({"model": sources.folder_digest(model)}))


def test_the_references_formula_gives_the_references_checkpoint(tmp_path):
    model, work = shared(f"{GOLDEN}/checkpoint"), tmp_path / "work"
    write_references_calibration(model, work)
    assert main(["lite", "auto_awq", str(model), "--method", "reference", "--work-dir", str(work)]) == 0
    ours, theirs = (
        load_file(work / "model.safetensors"),
        load_file(shared(f"{GOLDEN}/expected.awq_checkpoint.safetensors")),
    )
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor.to(ours[name].dtype)), name


def test_the_documents_line_makes_an_int8_checkpoint_that_converts_and_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    [line] = document_lines("lite smooth_quant")
    words = shlex.split(line)
    assert words[-2:] == ["--work-dir", "./internlm-chat-7b-w8"]
    assert main(words) == 1  # the document's own model is on the hub
    assert "Nothing is fetched here: download the checkpoint first" in capsys.readouterr().err
    words[words.index("internlm/internlm-chat-7b")] = str(shared(f"{GOLDEN}/checkpoint"))
    assert main([*words, *FEW]) == 1
    assert "--calib-dataset ptb has no copy on the hub that is no program: give its" in capsys.readouterr().err
    data = ["--calib-dataset", "ptb", "--calib-path", str(shared("data/text/ptb.valid.txt"))]
    assert main([*words, *FEW, *data]) == 0
    assert "calibrated and quantized, 8-bit weights and activations" in capsys.readouterr().out
    assert main([*words, "--method", "reference"]) == 0
    assert "quantized on the calibration that was there" in capsys.readouterr().out
    folder = tmp_path / "internlm-chat-7b-w8"
    assert Checkpoint(folder, allow_quantized=True).recipe.weights == "w8a8"
    assert not [path for path in folder.iterdir() if path.suffix == ".py" or path.name.startswith(".")]
    # As LMDeploy left it: with no word about it in config.json.
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["convert", "llama2", str(folder), "--tp", "2", "--dst-path", "made"]) == 0
    assert "made: int8, tp=2" in capsys.readouterr().out
    assert Workspace(tmp_path / "made").recipe.weights == "w8a8" and len(answer(tmp_path / "made")) > 0


def test_the_references_smoothing_gives_the_references_checkpoint(tmp_path):
    model, work = shared(f"{GOLDEN}/checkpoint"), tmp_path / "work"
    write_references_calibration(model, work)
    assert main(["lite", "smooth_quant", str(model), "--method", "reference", "--work-dir", str(work)]) == 0
    ours, theirs = (
        load_file(work / "model.safetensors"),
        load_file(shared(f"{GOLDEN}/expected.w8a8_checkpoint.safetensors")),
    )
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def test_an_unknown_smoothing_is_one_paragraph(tmp_path, capsys):
    model = write_tiny_checkpoint(tmp_path / "model")
    arguments = ["lite", "smooth_quant", str(model), "--work-dir", str(tmp_path / "w"), "--method", "alpha"]
    assert main(arguments) == 1
    assert capsys.readouterr().err == "ingot: --method alpha is not known; there are searched, reference\n"
    assert not (tmp_path / "w").exists()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("lite")
    (root / "text.txt").write_text(TEXT)
    write_tiny_checkpoint(root / "model")
    return root


def lite(verb, root, work, *flags, data=("--calib-dataset", "text")):
    path = ("--calib-path", str(root / "text.txt")) if data else ()
    return main(["lite", verb, str(root / "model"), "--work-dir", str(work), *data, *path, *flags])


def test_what_is_written_and_that_it_is_the_same_again(places, tmp_path):
    flags = ["--w-group-size", "32", *FEW[:2], "--calib-seqlen", "32"]
    for work in (tmp_path / "a", tmp_path / "b"):
        assert lite("auto_awq", places, work, *flags) == 0
    first, again = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab")
    assert first == again
    assert set(first) == {
        *("stats.safetensors", "blocks.safetensors", "calibration.json", "smoothing.safetensors", "report.json"),
        *("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"),
    }
    about = json.loads(first["calibration.json"])
    assert about["model"] == sources.folder_digest(places / "model") and about["asked"]["samples"] == 6
    said = json.loads(first["config.json"])["quantization_config"]
    assert (said["quant_method"], said["bits"], said["group_size"]) == ("awq", 4, 32)
    plain, quantized = (load_checkpoint(folder, allow_quantized=True) for folder in (places / "model", tmp_path / "a"))
    ids = packed(load_file(tmp_path / "a/blocks.safetensors")["tokens"][:1].tolist())
    with torch.inference_mode():
        one, two = plain(ids, None), quantized(ids, None)
    assert 0 < float((one - two).norm() / one.norm()) < 0.6  # a random model of 0.1 M weights


def test_a_calibration_is_used_again_only_for_the_same_model_and_data(places, tmp_path, capsys):
    flags = ["--w-group-size", "32", *FEW[:2], "--calib-seqlen", "32"]
    work = tmp_path / "work"
    assert lite("calibrate", places, work, *flags[2:]) == 0
    for more, expected in (
        (flags, "quantized on the calibration that was there"),
        ([*flags[:2], "--calib-samples", "5", *flags[4:]], "calibrated and quantized"),
    ):
        capsys.readouterr()
        assert lite("auto_awq", places, work, *more) == 0
        assert expected in capsys.readouterr().out
    assert lite("auto_awq", places, work, *flags[:2], "--method", "gptq", data=()) == 0
    assert "quantized on the calibration that was there" in capsys.readouterr().out
    other = write_tiny_checkpoint(tmp_path / "other", rms_norm_eps=1e-6)
    asked = ["--calib-dataset", "text", "--calib-path", str(places / "text.txt"), *flags]
    assert main(["lite", "auto_awq", "--model", str(other), "--work-dir", str(work), *asked]) == 0
    assert "calibrated and quantized" in capsys.readouterr().out


def test_conversations_of_ones_own(places, tmp_path, capsys):
    rows = [{"messages": [{"role": "user", "content": TEXT[:200]}]} for _ in range(20)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--calib-dataset", "chat", "--calib-path", str(tmp_path / "chat.jsonl"), *FEW[:2], "--calib-seqlen=16"]
    assert main(["lite", "calibrate", str(places / "model"), "--work_dir", str(tmp_path / "w"), *asked]) == 0
    assert json.loads((tmp_path / "w/calibration.json").read_text())["template"]


@pytest.mark.parametrize(
    ("verb", "flags", "message"),
    [
        ("auto_awq", ["--w-bits", "8"], "--w-bits 8 is not supported: AWQ weights have 4 bits"),
        ("auto_awq", ["--w-group-size", "48"], "48"),
        ("auto_awq", ["--method", "best"], "--method best is not known; there are rtn, awq, gptq, awq+gptq, reference"),
        (
            "auto_awq",
            ["--method", "reference", "--w-sym", "--w-group-size", "32"],
            "--w-sym does not go with --method ref",
        ),
        ("auto_awq", ["--wgroup-size", "32"], "Did you mean --w-group-size?"),
        ("calibrate", ["--calib-seqlen", "65"], "--calib-seqlen=65 is longer than the 64 positions"),
        ("calibrate", ["--calib-seqlen", "1"], "--calib-seqlen 1 must be at least 2"),
        ("calibrate", ["--calib-samples", "100000", "--calib-seqlen", "32"], "Lower --calib-samples to"),
        ("calibrate", ["--calib-dataset", "mmlu"], "--calib-dataset mmlu is not known; there are wikitext2, ptb, c4"),
        ("calibrate", ["--calib-dataset", "ptb", "--calib-path", "nowhere"], "--calib-path nowhere does not exist"),
        (
            "calibrate",
            ["--device", "tpu"],
            "--device tpu is not known: give cpu, cuda, or cuda:N",
        ),
        ("calibrate", ["--model", "x"], "give the folder of the checkpoint once"),
        ("calibrate", ["--work-dir", "{model}"], "is the model's own folder: name another"),
        ("calibrate", ["--work-dir", "{other}"], "holds something else, a checkpoint or a file"),
    ],
)
def test_mistakes_are_one_paragraph_and_nothing_is_written(places, tmp_path, verb, flags, message, capsys):
    shutil.copytree(places / "model", tmp_path / "other")
    named = {"model": places / "model", "other": tmp_path / "other"}
    before = sorted((path, path.stat().st_mtime_ns) for path in places.rglob("*"))
    assert lite(verb, places, tmp_path / "work", *(flag.format(**named) for flag in flags)) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1, said
    assert sorted((path, path.stat().st_mtime_ns) for path in places.rglob("*")) == before
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--calib-dataset", "ptb"], "--calib-dataset ptb has no copy on the hub that is no program: give its file"),
        (["--calib-dataset", "chat"], "--calib-dataset chat is your own: give its file or folder with --calib-path"),
        (["--calib-path", "a.txt"], "--calib-path a.txt goes with --calib-dataset: say which set it is a copy of"),
    ],
)
def test_data_that_is_not_said_whole(places, tmp_path, asked, message, capsys):
    assert main(["lite", "calibrate", str(places / "model"), "--work-dir", str(tmp_path / "w"), *asked]) == 1
    assert message in capsys.readouterr().err


def test_a_failure_leaves_the_folder_as_it_was(places, tmp_path, capsys):
    work = tmp_path / "work"
    assert lite("calibrate", places, work, *FEW[:2], "--calib-seqlen", "32") == 0
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    bad = {"model.layers.1.mlp.up_proj.weight": torch.full((96, 64), float("inf"))}
    broken = write_tiny_checkpoint(tmp_path / "broken", replace=bad)
    asked = ["--calib-dataset", "text", "--calib-path", str(places / "text.txt"), *FEW[:2], "--calib-seqlen", "32"]
    assert main(["lite", "calibrate", str(broken), "--work-dir", str(work), *asked]) == 1
    assert "model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in work.iterdir()} == before
