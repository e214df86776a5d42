"""`ingot build --check`: an artifact is built again from what the store knows of it, and compared tensor by tensor."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.storage.artifacts import read_manifest
from engine.storage.store import Store
from pipelines import build, check
from pipelines.code import Code
from pipelines.difference import Difference, model_differences, tensor_differences
from pipelines.provenance import STAGES, stage_keys
from pipelines.toolchain import toolchain
from pipelines.worktree import JOBS, copy_tree
from tests.pipelines.chain import Chain, tiny_rows
from tests.pipelines.stage import W4A16, Build
from tests.pipelines.tiny_checkpoint import TEXT, write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
KEY = "tiny-c-w4a16-1-kv8"


class Published:
    """A copy of the project, and a store with an artifact that it has built; `record` is how, as publish keeps it."""

    def __init__(self, root):
        copy_tree(ROOT, root / "project")
        (root / "text.txt").write_text(TEXT)
        checkpoint = write_tiny_checkpoint(root / "model")
        chain = Chain(root / "chain", tiny_rows(checkpoint, root / "text.txt", [("w4a16", "kv8")]), project=root)
        self.root, self.store = root / "project", Store(root / "project/store")
        self.store.init(root / "cache")
        self.id = self.store.put(chain.artifact(KEY))
        slices = {stage: chain.slices[f"{stage}/{key}"] for stage, key in stage_keys(KEY).items()}
        code = Code(ROOT).digests("export") | Code(ROOT).digests("quantize", "w4a16")
        self.record = {"format": 1, "key": KEY, "slices": slices, "code": code, "toolchain": toolchain()}
        self.places = json.loads((root / "chain/build/paths.json").read_text())

    def check(self, monkeypatch, change=lambda record: None):
        """The exit code of `ingot build --check` on the project, with the record changed."""
        record = copy.deepcopy(self.record)
        change(record)
        self.store.put_provenance(self.id, record, self.places)
        monkeypatch.chdir(self.root)
        return build.main(["--check", self.id[:8]])


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return Published(tmp_path_factory.mktemp("check"))


def test_what_is_built_again_is_equal(published, monkeypatch, capfd):
    assert published.check(monkeypatch) == 0
    assert capfd.readouterr().out == f"equal {published.id}\n"
    assert not list((published.root / JOBS).iterdir())


def test_the_first_tensor_that_differs_is_named(published, monkeypatch, capfd):
    def other_weights(record):
        record["slices"]["quantize"]["weights"]["activation_exponents"] = [1.0]
        record["slices"]["quantize"]["weights"]["weight_exponents"] = [1.0]
        record["code"]["pipelines/quant/w4a16/awq.py"] = "0" * 64

    assert published.check(monkeypatch, other_weights) == 1
    said = capfd.readouterr().out
    assert said.startswith(f"different {published.id}: ")
    assert "the first tensor that differs is model.layers.0." in said
    assert "(triton_models/weights/layers.0." in said and "in its worst value" in said
    assert said.endswith("Code has changed since it was built: pipelines/quant/w4a16/awq.py.\n")


def test_what_was_built_elsewhere_is_compared_by_error(published, monkeypatch, capfd):
    def elsewhere(record):
        record["toolchain"]["torch"] = "1.0"
        record["slices"]["calibrate"]["toolchain"]["torch"] = "1.0"
        record["slices"]["quantize"]["weights"]["clip"] = False

    assert published.check(monkeypatch, elsewhere) == 0
    said = capfd.readouterr().out
    assert said.startswith(f"near {published.id}: ")
    assert f"It was built elsewhere (here: torch {toolchain()['torch']} instead of 1.0): errors count" in said


def test_an_artifact_of_which_nothing_is_known_is_said(published, monkeypatch, capsys):
    shutil.rmtree(published.store.root / "provenance", ignore_errors=True)
    monkeypatch.chdir(published.root)
    assert build.main(["--check", published.id]) == 1
    assert f"How {published.id[:12]} was built is not recorded" in capsys.readouterr().err
    assert build.main(["--check", "nothing"]) == 1
    assert "no artifact is named 'nothing'" in capsys.readouterr().err


def test_without_a_record_the_instance_of_that_id_is_found(published, tmp_path):
    shutil.rmtree(published.store.root / "provenance", ignore_errors=True)
    for stage in STAGES:
        folder = tmp_path / "build/slices" / stage
        folder.mkdir(parents=True)
        (folder / f"{stage_keys(KEY)[stage]}.json").write_text(json.dumps(published.record["slices"][stage]))
    for name in ("calibrate", "quantize-w4a16", "shard", "export"):
        path = tmp_path / f"build/slices/code/{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    (tmp_path / "build/publish").mkdir()
    for key, artifact in (("other-c-fp16-1-kv16", "0" * 64), (KEY, published.id)):
        (tmp_path / f"build/publish/{key}.json").write_text(json.dumps({"id": artifact}))
    found = check.how_it_was_built(tmp_path, published.store, published.id)
    assert found["key"] == KEY and found["slices"] == published.record["slices"]


def test_a_source_that_is_gone_is_named(published, monkeypatch, capfd):
    def elsewhere(record):
        record["slices"]["calibrate"]["model"]["digest"] = "0" * 64

    assert published.check(monkeypatch, elsewhere) == 1
    said = capfd.readouterr().err
    assert "The source sha256:000" in said and "calibrate stopped with 1" in said and "Traceback" not in said


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Two artifacts of one quantized model: as it is, and with `quantize`'s tensors changed by `change`."""
    root = tmp_path_factory.mktemp("difference")
    (root / "text.txt").write_text(TEXT)
    checkpoint = write_tiny_checkpoint(root / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        stages = Build(root / "out", checkpoint, root / "text.txt")
        calibrated = stages.calibrate()
        quantized = stages.quantize(W4A16, calibrated)

        def exported(name, change=lambda tensors: None):
            patch.chdir(root)
            tensors = load_file(quantized / "weights.safetensors")
            change(tensors)
            changed = root / f"changed-{name}"
            shutil.copytree(quantized, changed)
            save_file(tensors, changed / "weights.safetensors")
            inputs = {"quantize": changed, "calibrate": calibrated}
            inputs["shard"] = stages.shard(W4A16, changed)
            return stages.export(W4A16, "kv8", **inputs).rename(root / name)

        yield exported


def test_differences_are_named_with_their_file_and_size(artifacts):
    def flip(tensors):
        tensors["model.layers.1.mlp.down_proj.qweight"][5, 3] ^= 1

    def norm(tensors):
        tensors["model.layers.0.input_layernorm.weight"][7] *= 2

    whole, flipped, scaled = artifacts("whole"), artifacts("flipped", flip), artifacts("scaled", norm)
    assert list(tensor_differences(whole, whole)) == []
    (only,) = tensor_differences(whole, flipped)
    assert only.tensor == "model.layers.1.mlp.down_proj"
    assert only.file == "triton_models/weights/layers.1.feed_forward.w2.0.qweight"
    scale = load_file(whole.parent / "changed-whole/weights.safetensors")["model.layers.1.mlp.down_proj.scales"]
    assert only.max_error in scale[5 // 32].tolist() and 0 < only.relative_error < 0.05
    (only,) = tensor_differences(whole, scaled)
    assert only.tensor == "model.layers.0.input_layernorm.weight"
    assert only.file == "triton_models/weights/layers.0.attention_norm.weight"
    # The rows of v are other ones too, and o has the norms of v's rows.
    modules = [found.tensor.rpartition(".")[2] for found in model_differences(whole, scaled)]
    assert modules == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_scales_that_cancel_out_are_no_difference_of_the_model(artifacts):
    def rescale(tensors):
        layer = "model.layers.0"
        tensors[f"{layer}.post_attention_layernorm.weight"] *= 2
        for module in ("gate_proj", "up_proj"):
            tensors[f"{layer}.mlp.{module}.scales"] /= 2
        tensors[f"{layer}.self_attn.v_proj.scales"] *= 4
        tensors[f"{layer}.self_attn.o_proj.scales"] /= 4

    one, other = artifacts("one"), artifacts("other", rescale)
    assert len(list(tensor_differences(one, other))) == 5
    assert all(found.relative_error < 1e-6 for found in model_differences(one, other))
    assert read_manifest(one).id != read_manifest(other).id


def test_what_is_near_depends_on_what_it_is():
    found = {"tensor": "t", "file": "f", "max_error": 1.0, "relative_error": 0.2}
    assert Difference(**found, tolerance=0.35).is_near and not Difference(**found, tolerance=1e-3).is_near
    assert torch.finfo(torch.float16).eps < 1e-3


@pytest.mark.parametrize("head", ["int8", "int4"])
def test_an_output_matrix_that_differs_is_one_tensor_whatever_it_is_stored_in(tmp_path, monkeypatch, head):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    stages = Build(tmp_path / "out", write_tiny_checkpoint(tmp_path / "model"), tmp_path / "text.txt")
    weights, folders = W4A16 | {"method": "rtn", "head": head}, []
    calibrated = stages.calibrate()
    quantized = stages.quantize(weights, calibrated)
    for change in (0, 1):
        tensors = load_file(quantized / "head.safetensors")
        kind = "lm_head.qweight" if head == "int4" else "lm_head.weight"
        tensors[kind][3, 5] ^= change
        save_file(tensors, quantized / "head.safetensors")
        sharded = stages.shard(weights, quantized)
        made = stages.export(weights, "kv16", shard=sharded, quantize=quantized, calibrate=calibrated)
        folders.append(made.rename(tmp_path / str(change)))
    for differences in (tensor_differences, model_differences):
        (only,) = differences(*folders)
        assert only.tensor == "lm_head" and "/output." in only.file and 0 < only.relative_error < 0.05
