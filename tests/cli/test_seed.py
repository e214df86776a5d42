import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.main import main
from engine.config import EngineConfig, Sampling
from engine.runtime.engine import Engine
from engine.storage.kv_scale_files import write_layer_scales
from engine.storage.workspace import WEIGHTS, Workspace
from tests.pipelines.tiny_checkpoint import write_tiny_checkpoint
from tests.shared_data import shared
from tests.tiny_artifact import write_tiny_artifact

GOLDEN = "golden/turbomind-v0.1.0/llama_mha"


def document_lines(verb: str) -> list[str]:
    """The command lines of the seed document for a verb, joined over their line ends and without comments."""
    text = re.sub(r"\\[ \t]*(#[^\n]*)?\n", " ", shared("seed.txt").read_text())
    lines = [line.replace("```", "").strip() for line in text.splitlines()]
    return [line.removeprefix("lmdeploy ") for line in lines if line.startswith(f"lmdeploy {verb} ")]


def expected_digests(name: str) -> dict[str, str]:
    lines = [line.split() for line in shared(f"{GOLDEN}/expected.{name}.sha256").read_text().splitlines()]
    return {name: digest for digest, _, name in lines if name != "config.ini"}


def digests(folder: Path) -> dict[str, str]:
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / WEIGHTS).iterdir()}
    del found["config.ini"]
    return found


def awq_folder(target: Path) -> Path:
    """What the reference's auto_awq left, as safetensors."""
    source = shared(f"{GOLDEN}/checkpoint")
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, target / path.name)
    shutil.copyfile(shared(f"{GOLDEN}/expected.awq_checkpoint.safetensors"), target / "model.safetensors")
    return target


def answer(folder: Path) -> tuple[int, ...]:
    engine = Engine.from_workspace(folder, EngineConfig(max_batch_size=1, cache_max_entry_count=33))
    [completion] = engine.generate([[1, 5, 9, 2]], Sampling(max_new_tokens=4, temperature=0))
    return completion.token_ids


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_documents_own_command_lines_one_after_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # As in the document: a checkpoint, what calibration wrote, and what auto_awq wrote.
    work = tmp_path / "work_dir"
    work.mkdir()
    statistics = load_file(shared(f"{GOLDEN}/calibration_stats.safetensors"))
    save_file({name: tensor.float() for name, tensor in statistics.items()}, work / "stats.safetensors")
    awq_folder(tmp_path / "quant_output")
    places = {
        "/root/share/temp/model_repos/internlm-chat-7b/": str(shared(f"{GOLDEN}/checkpoint")),
        "$WORK_DIR": str(work),
    }

    def run(line: str) -> int:
        return main([places.get(word, word) for word in shlex.split(line)])

    plain, again, elsewhere = document_lines("convert")
    [scales] = document_lines("lite kv_qparams")
    assert "--dst_path ./workspace_quant" in elsewhere and "--model-format awq" in again and "--num-tp 1" in scales

    assert run(plain) == 0
    assert "fp16, tp=1, session_len 2056" in capsys.readouterr().out
    assert digests(tmp_path / "workspace") == expected_digests("fp16.tp1")
    assert answer(tmp_path / "workspace")

    assert run(scales) == 0
    assert "quant_policy is 4 now" in capsys.readouterr().out
    workspace = Workspace(tmp_path / "workspace")
    assert workspace.ini.quant_policy == 4 and workspace.kv_scales() is not None
    for layer in range(2):
        name = f"layers.{layer}.past_kv_scale.0.weight"
        ours, theirs = (
            np.fromfile(folder / name, dtype="<f4")
            for folder in (tmp_path / "workspace" / WEIGHTS, shared(f"{GOLDEN}/expected.kv.tp1"))
        )
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-4)  # theirs is rounded to float16 at every step
    assert answer(tmp_path / "workspace")

    assert run(again) == 1  # ./workspace is there, and nobody said that it may go
    assert "exists already. Give --overwrite" in capsys.readouterr().err
    assert Workspace(tmp_path / "workspace").ini.quant_policy == 4
    assert run(elsewhere) == 0
    assert digests(tmp_path / "workspace_quant") == expected_digests("awq.tp1")
    assert Workspace(tmp_path / "workspace_quant").ini.group_size == 128
    assert answer(tmp_path / "workspace_quant")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "quant_output",
        "work_dir",
        "workspace",
        "workspace_quant",
    ]


@pytest.mark.parametrize("kind", ["fp16", "awq"])
@pytest.mark.parametrize("tp", [1, 2])
def test_convert_writes_what_the_reference_writes_config_ini_and_all(tmp_path, kind, tp):
    source = shared(f"{GOLDEN}/checkpoint") if kind == "fp16" else awq_folder(tmp_path / "awq")
    flags = ["--model-format", "awq", "--group-size", "128"] if kind == "awq" else []
    target = tmp_path / "out"
    assert main(["convert", "llama2", str(source), *flags, "--tp", str(tp), f"--dst_path={target}"]) == 0
    assert digests(target) == expected_digests(f"{kind}.tp{tp}")
    theirs = shared(f"{GOLDEN}/expected.{kind}.tp{tp}.config.ini").read_text()
    assert (target / WEIGHTS / "config.ini").read_text() == theirs
    assert (target / "triton_models/tokenizer/tokenizer.model").is_file()
    assert (target / "model_repository/turbomind").readlink() == Path("../triton_models/interactive")
    assert f'string_value: "{tp}"' in (target / "model_repository/turbomind/config.pbtxt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "x", "{model}", "--dts-path", "y"], "no flag --dts-path. Did you mean --dst-path?"),
        (["convert", "x", "{model}", "--dts_path=y"], "Did you mean --dst-path?"),
        (["convert", "x"], "PATH"),
        (["convert", "x", "{model}", "--model-format", "gguf"], "--model-format gguf is not known; there are hf, awq"),
        (["convert", "x", "{model}", "--model-format", "awq"], "HF-AWQ"),
        (["convert", "x", "{model}", "--model-format", "llama"], "no Meta checkpoint"),
        (["convert", "x", "{model}", "--group-size", "64"], "--group-size 64 is for weights that are quantized"),
        (["convert", "x", "internlm/internlm-chat-7b"], "Nothing is fetched here"),
        (["convert", "x", "{model}", "--tp", "3"], "power of two"),
        (["convert", "x", "{model}", "--dst-path", "{model}", "--overwrite"], "is not a TurboMind workspace"),
        (["convert", "x", "{model}", "--tokenizer-path", "nowhere"], "--tokenizer-path nowhere does not exist"),
        (["lite", "kv_qparams", "{model}", "{weights}"], "has no stats.safetensors"),
        (["lite", "kv_qparams", "{work}", "nowhere"], "nowhere is not a folder"),
        (["lite", "kv_qparams", "{work}", "{weights}", "--kv-bits", "4"], "--kv-bits 4 is not supported"),
        (["lite", "kv_qparams", "{work}", "{weights}", "--num-tp", "2"], "tensor_para_size 1"),
        (["lite", "kv_qparams", "{work}", "{weights}", "--kv_asym"], "Did you mean --kv-sym?"),
        (["lite", "kv_qparams", "{work}", "{artifact}"], "build one with kv=kv8 instead"),
        (["lite", "auto_gptq", "x"], "`ingot lite` has calibrate, auto_awq, smooth_quant, kv_qparams"),
    ],
)
def test_mistakes_are_one_paragraph_and_nothing_is_written(plain, arguments, message, capsys, monkeypatch):
    places, root = plain
    monkeypatch.chdir(root)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert main([text.format(**places) for text in arguments]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1, said
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    root = tmp_path_factory.mktemp("plain")
    model = write_tiny_checkpoint(root / "model")
    assert main(["convert", "tiny", str(model), "--dst-path", str(root / "made")]) == 0
    write_tiny_artifact(root / "artifact")
    write_statistics(root / "work")
    places = {
        "model": str(model),
        "weights": str(root / "made" / WEIGHTS),
        "work": str(root / "work"),
        "artifact": str(root / "artifact" / WEIGHTS),
    }
    return places, root


def write_statistics(folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    statistics = {}
    for layer in range(2):
        for kind in ("key", "value"):
            high = torch.rand(2, 16, generator=generator) * 3
            low = -torch.rand(2, 16, generator=generator) * 5
            named = {"min": low, "max": high, "absmax": torch.maximum(-low, high)}
            statistics |= {f"{kind}/{what}/model.layers.{layer}": tensor for what, tensor in named.items()}
    save_file(statistics, folder / "stats.safetensors")
    return statistics


@pytest.mark.parametrize("flag", [["--kv-sym"], ["--kv_sym", "True"], ["--kv-sym=true"]])
def test_symmetric_scales_are_absmax_over_127_with_zero_points_of_0(tmp_path, flag):
    target, statistics = tmp_path / "workspace", write_statistics(tmp_path / "work")
    model = write_tiny_checkpoint(tmp_path / "model")
    assert main(["convert", "tiny", str(model), "--tp", "2", "--dst-path", str(target)]) == 0
    assert main(["lite", "kv_qparams", *flag, str(tmp_path / "work"), str(target / WEIGHTS), "--num-tp", "2"]) == 0
    for layer in range(2):
        for rank in range(2):
            row = np.fromfile(target / WEIGHTS / f"layers.{layer}.past_kv_scale.{rank}.weight", dtype="<f4")
            largest = [
                float(statistics[f"{kind}/absmax/model.layers.{layer}"][rank].max()) for kind in ("key", "value")
            ]
            np.testing.assert_allclose(row, [largest[0] / 127, 0, largest[1] / 127, 0], rtol=1e-6)
    assert len(answer(target)) == 4


def test_scales_of_a_rank_take_the_place_of_finer_ones(tmp_path):
    target = tmp_path / "workspace"
    write_statistics(tmp_path / "work")
    assert main(["convert", "tiny", str(write_tiny_checkpoint(tmp_path / "model")), "--dst-path", str(target)]) == 0
    weights, config = target / WEIGHTS, Workspace(target).config
    for layer in range(2):
        rows = torch.rand(config.num_kv_heads, config.head_dim, 4) + 0.01
        write_layer_scales(weights, layer, rows, granularity="channel", tp=1)
    plain = (weights / "config.ini").read_text()
    (weights / "config.ini").write_text(f'{plain}[ingot]\nkv_granularity = "channel"\n\n')
    assert main(["lite", "kv_qparams", str(tmp_path / "work"), str(weights)]) == 0
    assert (weights / "config.ini").read_text() == plain.replace("quant_policy = 0", "quant_policy = 4")
    assert not list(weights.glob("*.channels")) and len(list(weights.glob("*.past_kv_scale.0.weight"))) == 2
    assert str(Workspace(target).recipe) == "fp16-kv8" and len(answer(target)) == 4


def test_only_a_workspace_is_overwritten_and_it_is_replaced_as_a_whole(tmp_path, capsys):
    model, target = write_tiny_checkpoint(tmp_path / "model"), tmp_path / "workspace"
    convert = ["convert", "tiny", str(model), "--dst-path", str(target)]
    assert main(convert) == 0
    (target / WEIGHTS / "layers.0.past_kv_scale.0.weight").write_bytes(b"old")
    assert main(convert) == 1
    assert main([*convert, "--overwrite"]) == 0
    assert not (target / WEIGHTS / "layers.0.past_kv_scale.0.weight").exists()
    assert "session_len and chat template are the model's own" in capsys.readouterr().err
    assert Workspace(target).ini.session_len == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "workspace"]


def test_a_conversion_that_fails_leaves_the_old_workspace(tmp_path, capsys):
    model, target = write_tiny_checkpoint(tmp_path / "model"), tmp_path / "workspace"
    convert = ["convert", "tiny", str(model), "--dst-path", str(target), "--overwrite"]
    assert main(convert) == 0
    before = (target / WEIGHTS / "config.ini").stat().st_mtime_ns
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    assert main(convert) == 1
    assert "tokenizer" in capsys.readouterr().err
    assert (target / WEIGHTS / "config.ini").stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "workspace"]


def test_another_tokenizer_and_other_places_of_quantized_weights(tmp_path):
    awq, described = awq_folder(tmp_path / "awq"), tmp_path / "described"
    described.mkdir()
    shutil.copyfile(awq / "config.json", described / "config.json")
    flags = ["--model-format", "awq", "--quant-path", str(awq), "--dst-path", str(tmp_path / "out")]
    tokenizer = str(awq / "tokenizer.model")
    assert main(["convert", "llama2", str(described), *flags, "--tokenizer-path", tokenizer]) == 0
    assert digests(tmp_path / "out") == expected_digests("awq.tp1")
    kept = sorted(path.name for path in (tmp_path / "out/triton_models/tokenizer").iterdir())
    assert kept == ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.model"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method = 'gptq'"),
        ({"bits": 8}, "bits = 8"),
        ({"version": "gemv"}, "version = 'gemv'"),
        ({"group_size": 64}, "qzeros with shape (4, 64); config.json asks for (8, 64)"),
    ],
)
def test_quantized_checkpoints_of_another_kind_are_refused_by_field_and_value(tmp_path, change, message, capsys):
    folder = awq_folder(tmp_path / "awq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"} | change
    (folder / "config.json").write_text(json.dumps(config))
    target = tmp_path / "out"
    assert main(["convert", "x", str(folder), "--model-format", "awq", "--dst-path", str(target)]) == 1
    assert message in capsys.readouterr().err
    assert not target.exists()
