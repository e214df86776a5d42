"""From a checkpoint that is quantized already to an artifact, without quantizing again."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig, Recipe, Sampling
from engine.kernels.reference import unpack_int4
from engine.models.batch import packed
from engine.runtime.engine import Engine
from engine.storage.artifacts import read_manifest
from engine.storage.checkpoint import load_checkpoint
from engine.storage.workspace import Workspace, load_workspace
from tests.engine.storage.tiny_quantized import quantize_folder
from tests.pipelines.chain import Chain, tiny_rows
from tests.pipelines.stage import FP16, W4A16, Build, bytes_of
from tests.pipelines.tiny_checkpoint import TEXT, write_tiny_checkpoint

AS_IS = {"name": "as_is"}
FORMS = [
    ("awq", False, torch.float16),
    ("compressed-tensors", False, torch.bfloat16),
    ("compressed-tensors", True, None),
]
BATCH = packed([list(range(3, 40))])


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    write_tiny_checkpoint(tmp_path / "model", attention_bias=True)
    return tmp_path


def build(root):
    return Build(root / "out", root / "model", root / "text.txt")


@pytest.mark.parametrize(("form", "symmetric", "dtype"), FORMS)
def test_the_artifact_has_the_very_numbers_of_the_checkpoint(root, form, symmetric, dtype):
    values = quantize_folder(root / "model", form=form, symmetric=symmetric, dtype=dtype or torch.float16)
    artifact = build(root).artifact(AS_IS, "kv8", tp=2)
    assert read_manifest(artifact).recipe == Recipe(weights="w4a16", kv="kv8", group_size=32)
    workspace = Workspace(artifact)
    for name, value in values.items():
        module = name.removesuffix(".weight")
        parts = [workspace.tensor(f"{module}.{kind}") for kind in ("qweight", "qzeros", "scales")]
        assert torch.equal(unpack_int4(*parts), value), name
    expected = load_checkpoint(root / "model", allow_quantized=True)(BATCH, None)
    assert torch.equal(load_workspace(artifact, device="cpu", dtype=torch.float32)(BATCH, None), expected)
    engine = Engine.from_workspace(artifact, EngineConfig(max_batch_size=1))
    [answer] = engine.generate([[3, 4, 5]], Sampling(max_new_tokens=3, temperature=0))
    assert len(answer.token_ids) == 3


def test_the_cache_is_calibrated_on_the_quantized_model(root):
    """The same weights written out dense give the same statistics."""
    values = quantize_folder(root / "model")
    seen = load_file(build(root).calibrate() / "stats.safetensors")
    folder = write_tiny_checkpoint(root / "dense", dtype=torch.float32, replace=values, attention_bias=True)
    stored = load_file(root / "model/model.safetensors")
    kept = {name: tensor.float() for name, tensor in stored.items() if tensor.dtype is torch.float16}
    dense = {name: kept.get(name, values.get(name)) for name in load_file(folder / "model.safetensors")}
    save_file(dense, folder / "model.safetensors")
    expected = load_file(Build(root / "other", folder, root / "text.txt").calibrate() / "stats.safetensors")
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], expected[name]) for name in seen)


def test_the_quantized_checkpoint_is_its_own_baseline_and_the_statement_says_so(root):
    quantize_folder(root / "model")
    chain = Chain(root / "chain", tiny_rows(root / "model", root / "text.txt", [("as_is", "kv16")]), project=root)
    folder = chain.evaluation("tiny-c-as_is-1-kv16", "e")
    predicate = json.loads((folder / "statement.json").read_text())["predicate"]
    assert predicate["baseline"] == {"weights": "w4a16"}
    assert predicate["recipe"] == {"weights": "w4a16", "kv": "kv16", "group_size": 32}
    assert predicate["metrics"]["perplexity_ratio"]["value"] == pytest.approx(1, abs=1e-6)


def test_two_runs_give_equal_bytes_and_only_a_report_is_written(root):
    quantize_folder(root / "model")
    stages = build(root)
    first, again = (bytes_of(stages.quantize(AS_IS, root)) for _ in range(2))
    assert first == again and first.keys() == {"report.json", "source.json"}
    assert json.loads(first["report.json"]) == {
        "format": "awq",
        "group_size": 32,
        "largest_relative_error": 0.0,
        "rounded_scales": 0,
        "scales": 2 * (2 * (64 + 32 + 32 + 64 + 96 + 96) + 3 * 64),
    }


def scales_of(root, value):
    tensors = load_file(root / "model/model.safetensors")
    name = "model.layers.1.mlp.up_proj.scales"
    tensors[name] = tensors[name].float()
    tensors[name][0, 0] = value
    save_file(tensors, root / "model/model.safetensors")


def test_scales_that_float16_does_not_hold_are_counted_and_infinite_ones_refused(root):
    quantize_folder(root / "model")
    scales_of(root, 1.5 * 2**-24)
    report = json.loads((build(root).quantize(AS_IS, root) / "report.json").read_text())
    assert (report["rounded_scales"], report["largest_relative_error"]) == (1, pytest.approx(1 / 3))
    scales_of(root, 1e6)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.scales has scales that are not finite in float16"):
        build(root).quantize(AS_IS, root)


def test_a_group_size_that_does_not_fit_int4_files_is_refused(root):
    write_tiny_checkpoint(root / "narrow", hidden_size=48, num_attention_heads=3, num_key_value_heads=3)
    quantize_folder(root / "narrow", group_size=16)
    stages = Build(root / "out", root / "narrow", root / "text.txt")
    with pytest.raises(ValueError, match="hidden_size is 48"):
        stages.quantize(AS_IS, root)


def test_weights_and_checkpoint_that_do_not_go_together_are_one_paragraph(root):
    with pytest.raises(ValueError, match=r"model is not quantized .*weights=as_is takes over what a checkpoint has"):
        build(root).quantize(AS_IS, root)
    quantize_folder(root / "model")
    for weights in (FP16, W4A16):
        with pytest.raises(ValueError, match=r"model is quantized already .* weights=\w+ starts from unquantized"):
            build(root).quantize(weights, root)
