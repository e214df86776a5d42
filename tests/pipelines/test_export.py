"""The stage export. (Above 300 lines: every case starts from one exported artifact.)"""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.config import EngineConfig, Sampling
from engine.models.batch import packed
from engine.models.linear import DenseLinear
from engine.runtime.engine import Engine
from engine.runtime.tokenizer import Tokenizer
from engine.storage import artifacts
from engine.storage.artifacts import ArtifactError, read_manifest, verify
from engine.storage.checkpoint import Checkpoint, load_checkpoint
from engine.storage.triton_repository import repository_files, verify_deployed
from engine.storage.workspace import TOKENIZER, WEIGHTS, Workspace, load_workspace
from pipelines.calibrate import calibrate
from pipelines.quant.kv import fine_scales, layer_scales
from pipelines.quant.stream import side_by_side
from pipelines.template_files import read_template
from pipelines.written_weights import DIGESTS
from tests.cli.test_seed_checkpoints import meta_folder
from tests.pipelines.stage import FP16, W4A16, Build
from tests.pipelines.tiny_checkpoint import TEXT, write_tiny_checkpoint


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return Build(tmp_path / "out", write_tiny_checkpoint(tmp_path / "model"), tmp_path / "text.txt")


def test_the_artifact_is_whole_and_its_id_is_printed(build, tmp_path, capsys):
    artifact = build.artifact(FP16, "kv16")
    printed = capsys.readouterr().out.strip()
    manifest = verify(artifact, printed)
    assert manifest.calibration is None and manifest.chat_template is not None
    assert set(manifest.sources) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    names = {entry.path for entry in manifest.files}
    assert {f"{TOKENIZER}/tokenizer.json", f"{TOKENIZER}/config.json", f"{WEIGHTS}/config.ini"} <= names
    assert set(repository_files(model_name="tiny", tp=1)) <= names
    assert verify_deployed(artifact, model_name="tiny", tp=1) == printed
    assert not any("safetensors" in name or "past_kv" in name for name in names)
    batch = packed([[3, 4, 5, 6, 7]])
    served = load_workspace(artifact, device="cpu", dtype=torch.float32)(batch, None)
    assert torch.equal(served, load_checkpoint(tmp_path / "model")(batch, None))
    assert Workspace(artifact).ini.session_len == 64 and Workspace(artifact).ini.model_name == "tiny"


def test_a_second_build_gives_the_same_id(build, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    other = Build(tmp_path / "elsewhere", tmp_path / "model", tmp_path / "text.txt")
    for weights, kv in ((W4A16, "kv8"), (FP16, "kv8")):
        assert read_manifest(build.artifact(weights, kv)).id == read_manifest(other.artifact(weights, kv)).id


def test_weight_files_are_links_so_that_kv_costs_no_bytes(build):
    calibrated = build.calibrate()
    quantized = build.quantize(FP16, calibrated)
    sharded = build.shard(FP16, quantized)
    inputs = {"shard": sharded, "quantize": quantized, "calibrate": calibrated}
    folders = [build.export(FP16, kv, **inputs) / WEIGHTS for kv in ("kv16", "kv8")]
    for path in (path for path in sharded.iterdir() if path.name != DIGESTS):
        assert {(folder / path.name).stat().st_ino for folder in folders} == {path.stat().st_ino}
    assert (folders[1] / "layers.1.past_kv_scale.0.weight").stat().st_size == 16


def test_weight_files_are_not_read_again_and_one_that_changed_since_is_found(build, monkeypatch):
    calibrated = build.calibrate()
    quantized = build.quantize(FP16, calibrated)
    sharded = build.shard(FP16, quantized)
    hashed = []
    inputs = {"shard": sharded, "quantize": quantized, "calibrate": calibrated}
    with monkeypatch.context() as patched:
        patched.setattr(artifacts, "hash_file", lambda path, **_: hashed.append(path.name) or ("0" * 64, ""))
        build.export(FP16, "kv16", **inputs)
    assert "config.ini" in hashed and not {path.name for path in sharded.iterdir()} & set(hashed)
    changed = sharded / "layers.1.feed_forward.w2.0.weight"
    changed.write_bytes(bytes(changed.stat().st_size))
    with pytest.raises(ArtifactError, match=r"layers\.1\.feed_forward\.w2\.0\.weight has changed"):
        verify(build.export(FP16, "kv16", **inputs))
    changed.write_bytes(b"short")
    with pytest.raises(ArtifactError, match=r"w2\.0\.weight is not as it was written, 12288 bytes long"):
        build.export(FP16, "kv16", **inputs)


def test_what_was_calibrated_names_its_calibration(build):
    expected = {"declared": "0" * 64}
    about = json.loads((build.calibrate() / "calibration.json").read_text())
    expected |= {"blocks": about["blocks"], "tokenizer": about["tokenizer"]}
    assert read_manifest(build.artifact(FP16, "kv8")).calibration == expected
    assert read_manifest(build.artifact(W4A16, "kv16")).calibration == expected
    assert read_manifest(build.artifact(FP16, "kv16")).calibration is None


def test_an_int8_cache_has_scales_for_every_rank_of_any_tp(build):
    artifact = build.artifact(FP16, "kv8", tp=2)
    statistics = load_file(build.root / "calibrate/stats.safetensors")
    scales = Workspace(artifact).kv_scales()
    for layer in range(2):
        for head in range(2):  # one KV head a rank
            expected = layer_scales(statistics, layer, tp=2)[head]
            got = torch.cat([scales.key[layer, head, 0], scales.value[layer, head, 0]])
            assert torch.equal(got, torch.tensor(expected))


def test_symmetric_scales_are_written_with_zero_points_and_the_engine_runs_on_them(build):
    artifact = build.artifact(W4A16, "kv8", tp=2, symmetric=True)
    smoothing = load_file(build.root / "quantize-w4a16/smoothing.safetensors")
    statistics = load_file(build.root / "calibrate/stats.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}"
        divisor = smoothing.get(f"{name}.self_attn.v_proj", torch.ones(32)).view(2, 16)
        for rank in range(2):
            row = np.fromfile(artifact / WEIGHTS / f"layers.{layer}.past_kv_scale.{rank}.weight", dtype="<f4")
            key = float(statistics[f"key/absmax/{name}"][rank].max())
            value = float((statistics[f"value/absmax/{name}"] / divisor)[rank].max())
            np.testing.assert_allclose(row, [key / 127, 0, value / 127, 0], rtol=1e-6)
    engine = Engine.from_workspace(artifact, EngineConfig(max_batch_size=1))
    [answer] = engine.generate([[3, 4, 5]], Sampling(max_new_tokens=3, temperature=0))
    assert len(answer.token_ids) == 3


@pytest.mark.parametrize("granularity", ["head", "channel", "token"])
def test_finer_scales_are_served_and_a_second_build_gives_the_same_id(build, granularity, tmp_path):
    artifact = build.artifact(W4A16, "kv8", tp=2, granularity=granularity)
    smoothing = load_file(build.root / "quantize-w4a16/smoothing.safetensors")
    statistics = load_file(build.root / "calibrate/stats.safetensors")
    workspace, manifest = Workspace(artifact), verify(artifact)
    assert manifest.recipe == workspace.recipe and str(manifest.recipe) == f"w4a16-kv8-{granularity}"
    scales = workspace.kv_scales()
    for layer in range(2) if granularity != "token" else ():
        divisor = smoothing.get(f"model.layers.{layer}.self_attn.v_proj")
        expected = fine_scales(statistics, layer, granularity, smoothing=divisor)
        assert torch.equal(torch.cat([scales.key[layer], scales.value[layer]], dim=-1), expected)
    names = {entry.path.rpartition(".past_kv_scale.")[2] for entry in manifest.files if "past_kv" in entry.path}
    ranks = {"0.weight", "1.weight"}  # one KV head a rank: what its file says is the head's own pair
    assert names == {"head": ranks, "channel": ranks | {"channels"}, "token": set()}[granularity]
    engine = Engine.from_workspace(artifact, EngineConfig(max_batch_size=1))
    assert engine._runner._cache.layers[0].key.dtype == torch.uint8
    assert (engine._runner._cache.layers[0].key_steps is not None) == (granularity == "token")
    [answer] = engine.generate([[3, 4, 5]], Sampling(max_new_tokens=3, temperature=0))
    assert len(answer.token_ids) == 3
    other = Build(tmp_path / "elsewhere", tmp_path / "model", tmp_path / "text.txt")
    assert read_manifest(other.artifact(W4A16, "kv8", tp=2, granularity=granularity)).id == manifest.id


def test_scales_of_the_smoothed_model_match_a_fresh_calibration_of_it(build, tmp_path):
    """w4a16-kv8 divides V's recorded range; calibrating the model whose v_proj is divided finds the same scales."""
    generator = torch.Generator().manual_seed(5)
    uneven = {  # values of very different size, so that a scale is worth its while
        f"model.layers.{layer}.self_attn.v_proj.weight": torch.randn(32, 64, generator=generator)
        * torch.linspace(-5, 0, 32).exp2()[torch.randperm(32, generator=generator)].unsqueeze(1)
        for layer in range(2)
    }
    shutil.rmtree(tmp_path / "model")
    build = Build(tmp_path / "out", write_tiny_checkpoint(tmp_path / "model", replace=uneven), tmp_path / "text.txt")
    artifact = build.artifact(W4A16 | {"activation_exponents": [0.0, 0.3]}, "kv8")
    smoothing = load_file(build.root / "quantize-w4a16/smoothing.safetensors")
    source = Checkpoint(tmp_path / "model")
    divided = {}
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.v_proj"
        scale = smoothing[name]
        divided[f"{name}.weight"] = source.tensor(f"{name}.weight").float() / scale[:, None]
        repeated = scale.view(2, 1, 16).expand(-1, 2, -1).flatten()
        output = f"model.layers.{layer}.self_attn.o_proj.weight"
        divided[output] = source.tensor(output).float() * repeated
    weights = {name: source.tensor(name).float() for name in source.names()} | divided
    smoothed = Checkpoint(write_tiny_checkpoint(tmp_path / "smoothed", dtype=torch.float32, replace=weights))
    blocks = load_file(build.root / "calibrate/blocks.safetensors")["tokens"]
    with side_by_side(1) as workers:
        fresh = calibrate(smoothed, blocks, workers)
    scales = Workspace(artifact).kv_scales()
    recorded = load_file(build.root / "calibrate/stats.safetensors")
    moved = 0
    for layer in range(2):
        expected = torch.tensor(layer_scales(fresh, layer, tp=1)[0])
        torch.testing.assert_close(
            torch.cat([scales.key[layer, 0, 0], scales.value[layer, 0, 0]]), expected, rtol=1e-4, atol=1e-5
        )
        moved += not torch.allclose(torch.tensor(layer_scales(recorded, layer, tp=1)[0]), expected, rtol=1e-2)
    assert moved, "no layer was smoothed: the test shows nothing"


def test_a_checkpoint_without_a_tokenizer_is_refused(build, tmp_path):
    calibrated = build.calibrate()
    quantized = build.quantize(FP16, calibrated)
    sharded = build.shard(FP16, quantized)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).unlink()
    changed = Build(build.root, tmp_path / "model", tmp_path / "text.txt")
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        changed.export(FP16, "kv16", shard=sharded, quantize=quantized, calibrate=calibrated)
    assert not (build.root / "export-fp16-1-kv16").exists()


def test_a_named_template_is_the_artifacts_own(build, tmp_path):
    without = read_manifest(build.artifact(FP16, "kv16"))
    named = Build(tmp_path / "named", tmp_path / "model", tmp_path / "text.txt", template="llama2")
    artifact = named.artifact(FP16, "kv16")
    text = (artifact / TOKENIZER / "chat_template.jinja").read_text()
    assert text == read_template("llama2")
    assert read_manifest(artifact).chat_template == hashlib.sha256(text.encode()).hexdigest() != without.chat_template
    prompt = Tokenizer(artifact / TOKENIZER).chat([{"role": "user", "content": "the cat"}])
    assert prompt == "<s>[INST] the cat [/INST]"
    own = Build(tmp_path / "own", tmp_path / "model", tmp_path / "text.txt", template="own")
    assert read_manifest(own.artifact(FP16, "kv16")).id == without.id


def test_a_model_without_a_template_is_built_for_completion(build, tmp_path):
    settings = tmp_path / "model/tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": None}))
    bare = Build(build.root, tmp_path / "model", tmp_path / "text.txt")
    artifact = bare.artifact(FP16, "kv16")
    assert read_manifest(artifact).chat_template is None
    assert Tokenizer(artifact / TOKENIZER).encode("the cat")
    with pytest.raises(ValueError, match="no chat template: it completes text but does not chat"):
        Tokenizer(artifact / TOKENIZER).chat([{"role": "user", "content": "the cat"}])
    strict = Build(build.root, tmp_path / "model", tmp_path / "text.txt", template="own")
    with pytest.raises(ValueError, match=r"has no chat template, and model\.template=own asks for it"):
        strict.artifact(FP16, "kv16")


def test_pickled_weights_give_the_same_artifact_where_they_may_be_read(build, tmp_path):
    expected = build.artifact(W4A16, "kv8")
    weights = tmp_path / "model/model.safetensors"
    torch.save(load_file(weights), tmp_path / "model/pytorch_model.bin")
    weights.unlink()
    allowed = Build(tmp_path / "pickled", tmp_path / "model", tmp_path / "text.txt", allow_bin=True)
    artifact = allowed.artifact(W4A16, "kv8")
    assert {x.path: x.sha256 for x in read_manifest(artifact).files} == {
        x.path: x.sha256 for x in read_manifest(expected).files
    }
    assert set(read_manifest(artifact).sources) >= {"config.json", "pytorch_model.bin"}
    refused = Build(tmp_path / "refused", tmp_path / "model", tmp_path / "text.txt")
    with pytest.raises(ValueError, match=r"model\.allow_bin=true"):
        refused.calibrate()


def test_keys_of_config_ini_are_written_and_nothing_else_changes(build, tmp_path):
    plain = build.artifact(FP16, "kv8")
    said = {"max_batch_size": 3, "cache_max_entry_count": 20.0, "use_context_fmha": 0, "step_length": 1}
    of_the_model = {"rope_scaling_factor": 2.0, "use_logn_attn": 1, "max_position_embeddings": 32}
    ini = {**said, **of_the_model}
    artifact = Build(tmp_path / "set", tmp_path / "model", tmp_path / "text.txt", ini=ini).artifact(FP16, "kv8")
    before, after = ({x.path: x.sha256 for x in read_manifest(folder).files} for folder in (plain, artifact))
    assert {path for path in before if before[path] != after[path]} == {f"{WEIGHTS}/config.ini"}
    lines = [(folder / WEIGHTS / "config.ini").read_text().splitlines() for folder in (plain, artifact)]
    differ = {line.partition(" = ")[0] for line in set(lines[0]) ^ set(lines[1])}
    assert differ == ini.keys() - {"step_length"}, "session_len stays the checkpoint's"
    workspace = Workspace(artifact)
    assert {key: getattr(workspace.ini, key) for key in ini} == ini
    assert (workspace.config.logn, workspace.config.rope_scaling.factor) == (True, 2.0)


def test_a_scaling_beside_the_models_own_is_refused(build, tmp_path):
    write_tiny_checkpoint(tmp_path / "scaled", rope_scaling={"rope_type": "linear", "factor": 2.0})
    scaled = Build(tmp_path / "set", tmp_path / "scaled", tmp_path / "text.txt", ini={"rope_scaling_factor": 2.0})
    with pytest.raises(ValueError, match=r"rope_scaling_factor is 2\.0, but the model has a scaling of its own"):
        scaled.artifact(FP16, "kv16")
    assert not (tmp_path / "set/export-fp16-1-kv16").exists()


def test_code_of_the_checkpoint_is_never_copied(build, tmp_path):
    (tmp_path / "model" / "modeling_tiny.py").write_text("raise SystemExit")
    artifact = build.artifact(FP16, "kv16")
    assert {path.name for path in artifact.rglob("*.py")} == {"model.py"}  # Triton's, ours
    assert json.loads((artifact / TOKENIZER / "config.json").read_text())["num_hidden_layers"] == 2


def test_a_meta_checkpoint_is_built_like_any_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    folder = meta_folder(tmp_path / "meta")
    artifact = Build(tmp_path / "out", folder, tmp_path / "text.txt", allow_bin=True).artifact(FP16, "kv16")
    manifest = verify(artifact)
    assert set(manifest.sources) == {"consolidated.00.pth", "params.json", "tokenizer.model"}
    assert [path.name for path in (artifact / TOKENIZER).iterdir()] == ["tokenizer.model"]
    assert Workspace(artifact).ini.end_id == 2


@pytest.mark.parametrize("head", ["int8", "int4"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_quantized_head_is_part_of_the_artifact(build, tmp_path, head, tp):
    plain = build.artifact(W4A16, "kv8", tp=tp)
    kept = {p.name: p.read_bytes() for p in (plain / WEIGHTS).iterdir()}
    artifact = build.artifact(W4A16 | {"head": head}, "kv8", tp=tp)
    manifest, workspace = verify(artifact), Workspace(artifact)
    assert str(manifest.recipe) == f"w4a16-{head}head-kv8" and manifest.recipe == workspace.recipe
    assert workspace.ini.ingot.head == head
    changed = {p.name for p in (artifact / WEIGHTS).iterdir() if kept.get(p.name) != p.read_bytes()}
    files = {"int8": {"output.weight", "output.weight_scale"}, "int4": {"output.qweight", "output.scales_zeros"}}[head]
    assert changed == {*files, "config.ini"}
    batch = packed([[3, 4, 5, 6, 7]])
    whole = Checkpoint(tmp_path / "model").tensor("lm_head.weight").float()
    model = load_workspace(artifact, device="cpu", dtype=torch.float32)
    weight = model._head.weight if head == "int8" else None
    logits = model(batch, None)
    assert logits.shape == (5, len(whole)) and (weight is None or weight.dtype == torch.int8)
    model._head = DenseLinear(whole)
    assert 0 < float((logits - model(batch, None)).norm() / model(batch, None).norm()) < 0.2
    [answer] = Engine.from_workspace(artifact, EngineConfig(max_batch_size=1)).generate(
        [[3, 4, 5]], Sampling(max_new_tokens=3, temperature=0)
    )
    assert len(answer.token_ids) == 3
