"""Workspaces, written and read. One file over 300 lines: the golden cases and the properties share their builders."""

import hashlib
import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from engine.config import ModelConfig, Recipe
from engine.kernels.reference import unpack_int4
from engine.models import names
from engine.models.batch import packed
from engine.storage.checkpoint import Checkpoint, load_checkpoint
from engine.storage.kv_scale_files import write_kv_scales
from engine.storage.workspace import WEIGHTS, Workspace, load_workspace, write_weights
from tests.engine.storage.tiny_workspace import SMALL, make_workspace, random_tensors
from tests.shared_data import shared

GOLDEN = "golden/turbomind-v0.1.0/llama_mha"
FP16 = Recipe()
W8A8 = Recipe(weights="w8a8")


def _int4(group_size, kv="kv16"):
    return Recipe(weights="w4a16", group_size=group_size, kv=kv)


def _digests(folder):
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size) for path in folder.iterdir()
    }


def _expected(name):
    lines = [line.split() for line in shared(f"{GOLDEN}/expected.{name}.sha256").read_text().splitlines()]
    return {name: (digest, int(size)) for digest, size, name in lines}


def _golden_awq():
    tensors = {}
    with safe_open(shared(f"{GOLDEN}/expected.awq_checkpoint.safetensors"), "pt") as file:
        for name in file.keys():  # noqa: SIM118  (not a dictionary)
            tensors[name] = file.get_tensor(name)
    return tensors


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", ["fp16", "awq"])
def test_weight_files_are_the_references_byte_for_byte(tmp_path, kind, tp):
    checkpoint = Checkpoint(shared(f"{GOLDEN}/checkpoint"))
    tensor, recipe = (checkpoint.tensor, FP16) if kind == "fp16" else (_golden_awq().__getitem__, _int4(128))
    entries = write_weights(tmp_path, checkpoint.config, tensor, recipe=recipe, tp=tp)
    expected = _expected(f"{kind}.tp{tp}")
    del expected["config.ini"]
    assert _digests(tmp_path) == expected
    assert {entry.path: (entry.sha256, entry.size) for entry in entries} == expected


@pytest.mark.parametrize("tp", [1, 2])
def test_kv_scale_files_are_the_references_byte_for_byte(tmp_path, tp):
    golden = shared(f"{GOLDEN}/expected.kv.tp{tp}")
    for layer in range(2):
        files = [golden / f"layers.{layer}.past_kv_scale.{rank}.weight" for rank in range(tp)]
        write_kv_scales(tmp_path, layer, [struct.unpack("<4f", file.read_bytes()) for file in files])
    assert _digests(tmp_path) == _digests(golden)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", ["fp16", "awq"])
def test_the_golden_workspace_reads_back_as_the_checkpoint(tmp_path, kind, tp):
    checkpoint = Checkpoint(shared(f"{GOLDEN}/checkpoint"))
    awq = _golden_awq() if kind == "awq" else {name: checkpoint.tensor(name) for name in checkpoint.names()}
    make_workspace(tmp_path, checkpoint.config, FP16 if kind == "fp16" else _int4(128), tp, awq)
    workspace = Workspace(tmp_path)
    assert replace(workspace.config, family=checkpoint.config.family) == checkpoint.config
    assert set(workspace.names()) == set(awq)
    for name, tensor in workspace.weights().items():
        assert torch.equal(tensor, awq[name].half() if name.endswith("scales") else awq[name]), name


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", ["fp16", "awq"])
def test_the_golden_workspace_gives_the_references_logits(tmp_path, kind, tp):
    checkpoint = Checkpoint(shared(f"{GOLDEN}/checkpoint"))
    tensors = _golden_awq() if kind == "awq" else {name: checkpoint.tensor(name) for name in checkpoint.names()}
    make_workspace(tmp_path, checkpoint.config, FP16 if kind == "fp16" else _int4(128), tp, tensors)
    prompt = json.loads(shared(f"{GOLDEN}/reference.{kind}.json").read_text())["prompt"]
    expected = torch.from_numpy(np.load(shared(f"{GOLDEN}/reference.{kind}.logits.npy"))).view(len(prompt), -1)
    logits = load_workspace(tmp_path, device="cpu", dtype=torch.float32)(packed([prompt]), None)
    # The scales of the quantized reference were float32, where the files hold fp16.
    assert (logits - expected).abs().max() <= (1e-4 if kind == "fp16" else 2e-3) * expected.abs().max()


def test_layers_are_asked_for_one_after_the_other(tmp_path):
    tensors, asked = random_tensors(SMALL, FP16), []

    def ask(name):
        asked.append(name)
        return tensors[name]

    write_weights(tmp_path, SMALL, ask, recipe=FP16, tp=1)
    layers = [names.split_name(name)[0] for name in asked if names.split_name(name)[0] is not None]
    assert layers == sorted(layers) and len(asked) == len(tensors)


@st.composite
def _cases(draw):
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    heads = kv_heads * draw(st.sampled_from([1, 2]))
    head_dim = draw(st.sampled_from([8, 16, 32, 48]))
    config = ModelConfig(
        family="llama",
        vocab_size=draw(st.integers(3, 40)),
        hidden_size=heads * head_dim,
        num_layers=draw(st.integers(1, 2)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=draw(st.sampled_from([32, 64, 96, 172])),
        norm_eps=1e-6,
        **dict.fromkeys(("qkv_bias", "o_bias"), draw(st.booleans())),
        qk_norm=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float16", "bfloat16"])),
    )
    recipe = draw(st.sampled_from([FP16, W8A8, _int4(8), _int4(16), _int4(32), _int4(48), _int4(96)]))
    return config, recipe, draw(st.sampled_from([1, 2, 4]))


def _fits(config, recipe, tp):
    """What the format asks for, written down a second time."""
    if config.num_kv_heads % tp or config.num_heads % tp:
        return False
    hidden, inner = config.hidden_size, config.intermediate_size
    if not recipe.group_size:
        return True
    return all(size % recipe.group_size == 0 for size in (hidden, inner)) and hidden % 32 == 0 and inner % 8 == 0


@given(case=_cases(), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_any_workspace_reads_back_bit_equal_or_is_refused_before_a_byte(tmp_path_factory, case, seed):
    config, recipe, tp = case
    folder = tmp_path_factory.mktemp("workspace")
    if not _fits(config, recipe, tp):
        with pytest.raises(ValueError, match="does not fit this model"):
            write_weights(folder / "weights", config, {}.__getitem__, recipe=recipe, tp=tp)
        assert not (folder / "weights").exists()
        return
    assume(recipe.weights != "w4a16" or config.dtype == "float16")
    tensors = random_tensors(config, recipe, seed)
    workspace = Workspace(make_workspace(folder, config, recipe, tp, tensors))
    assert (workspace.config, workspace.recipe, workspace.tp) == (config, recipe, tp)
    weights = workspace.weights()
    assert set(weights) == set(tensors) and len(weights) == len(tensors)
    # In an order that is not the files', so that nothing rests on the part read last.
    for name in sorted(tensors, key=lambda name: hashlib.sha256(name.encode()).digest()):
        assert torch.equal(weights[name], tensors[name]), name


def test_dequantized_weights_are_bit_equal_at_every_tp(tmp_path):
    config = replace(SMALL, intermediate_size=128)
    tensors = random_tensors(config, _int4(32))
    module = "model.layers.1.self_attn.q_proj."
    expected = unpack_int4(*(tensors[module + kind] for kind in names.QUANTIZED))
    for tp in (1, 2):
        workspace = Workspace(make_workspace(tmp_path / str(tp), config, _int4(32), tp, tensors))
        assert torch.equal(unpack_int4(*(workspace.tensor(module + kind) for kind in names.QUANTIZED)), expected)


def test_float32_is_stored_as_fp16_and_overflow_is_refused_by_name(tmp_path):
    tensors = {name: tensor.float() for name, tensor in random_tensors(SMALL, FP16).items()}
    config = replace(SMALL, dtype="float32")
    workspace = Workspace(make_workspace(tmp_path / "a", config, FP16, 1, tensors))
    assert workspace.config.dtype == "float16"
    assert torch.equal(workspace.tensor(names.EMBEDDING), tensors[names.EMBEDDING].half())
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e6
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight.*1e\+06"):
        write_weights(tmp_path / "b", config, tensors.__getitem__, recipe=FP16, tp=1)


def test_a_tied_model_gets_its_output_matrix_from_the_embedding(tmp_path):
    tensors = random_tensors(SMALL, FP16)
    del tensors[names.HEAD]
    workspace = Workspace(make_workspace(tmp_path, replace(SMALL, tie_word_embeddings=True), FP16, 2, tensors))
    assert torch.equal(workspace.tensor(names.HEAD), tensors[names.EMBEDDING])


def test_tensors_of_a_wrong_shape_are_refused_by_name(tmp_path):
    tensors = random_tensors(SMALL, FP16)
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].t()
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj\.weight has shape \(96, 64\).*\(64, 96\)"):
        write_weights(tmp_path, SMALL, tensors.__getitem__, recipe=FP16, tp=1)


@pytest.mark.parametrize(
    ("change", "recipe", "tp", "words"),
    [
        ({}, FP16, 3, "power of two, not 3.*tp that fits: 1, 2"),
        ({}, FP16, 4, "2 key/value heads cannot be dealt to 4 ranks.*: 1, 2"),
        ({}, FP16, 8, "4 attention heads"),
        ({}, _int4(128), 1, r"group_size 128 does not divide the 64 input features of .*q_proj.*fits tp=1: 16, 32"),
        ({"intermediate_size": 168}, _int4(32), 1, r"does not divide the 168 input features of .*down_proj"),
        (
            {"intermediate_size": 172},
            _int4(4),
            1,
            r"gate_proj has 172 output features, and 8 .*tp that fits: none; .*fp16 fits tp: 1, 2$",
        ),
        ({"hidden_size": 48, "head_dim": 12}, _int4(12), 1, "hidden_size is 48, and int4 tiles need a multiple of 32"),
        ({"num_heads": 16, "num_kv_heads": 2, "head_dim": 4}, _int4(32), 2, r"k_proj has 4 output features per rank"),
        ({"head_dim": 15}, FP16, 1, "head_dim 15 is odd"),
        ({}, Recipe(weights="w4a16", group_size=32, rotate_down=8), 1, "rotate_down=8 goes with w8a8 weights"),
        (
            {"intermediate_size": 100},
            Recipe(weights="w8a8", rotate_down=8),
            1,
            r"100 is no multiple of the 8 channels.*weights\.rotate_down=0",
        ),
        ({}, Recipe(weights="w3a16"), 1, "cannot hold w3a16.*fp16, w4a16, w8a8"),
        ({}, W8A8, 4, "2 key/value heads cannot be dealt to 4 ranks.*: 1, 2$"),
    ],
)
def test_what_does_not_fit_says_what_would(tmp_path, change, recipe, tp, words):
    with pytest.raises(ValueError, match=words):
        write_weights(tmp_path / "out", replace(SMALL, **change), {}.__getitem__, recipe=recipe, tp=tp)
    assert not (tmp_path / "out").exists()


def test_stories15m_fits_groups_of_its_own():
    config = Checkpoint(shared("data/models/stories15M-llama")).config
    with pytest.raises(ValueError, match="fits tp=1: 16, 24, 32, 48, 96"):
        write_weights(shared("data"), config, {}.__getitem__, recipe=_int4(128), tp=1)


@pytest.mark.parametrize("damage", [b"", b"x" * 10])
def test_a_file_of_a_wrong_size_is_named_with_both_sizes(tmp_path, damage):
    make_workspace(tmp_path, SMALL, FP16, 2, random_tensors(SMALL, FP16))
    path = tmp_path / WEIGHTS / "layers.1.attention.w_qkv.1.weight"
    size = path.stat().st_size
    path.write_bytes(damage)
    with pytest.raises(ValueError, match=rf"{path} has {len(damage)} bytes where {size}"):
        Workspace(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=str(path)):
        Workspace(tmp_path)


def test_a_folder_without_config_ini_is_no_workspace(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not a TurboMind workspace.*config\.ini"):
        Workspace(tmp_path)


def test_kv_scales_are_per_head_and_missing_ones_are_an_error(tmp_path):
    recipe = Recipe(kv="kv8")
    workspace = Workspace(make_workspace(tmp_path, SMALL, recipe, 2, random_tensors(SMALL, FP16)))
    with pytest.raises(FileNotFoundError, match=r"layers\.0\.past_kv_scale\.0"):
        workspace.kv_scales()
    for layer in range(2):
        rows = [[1 + layer + rank / 4, -0.5, 2.0, rank] for rank in range(2)]
        write_kv_scales(tmp_path / WEIGHTS, layer, rows)
    scales = workspace.kv_scales()
    assert scales.key.dtype == torch.float32
    assert scales.key.shape == (2, 2, SMALL.head_dim, 2)
    assert all(torch.equal(x, x[:, :, :1].expand_as(x)) for x in (scales.key, scales.value))
    assert scales.key[:, :, 0].tolist() == [[[1.0, -0.5], [1.25, -0.5]], [[2.0, -0.5], [2.25, -0.5]]]
    assert scales.value[:, :, 0].tolist() == [[[2.0, 0.0], [2.0, 1.0]]] * 2
    (tmp_path / WEIGHTS / "layers.1.past_kv_scale.1.weight").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="8 bytes where 16"):
        workspace.kv_scales()
    assert Workspace(make_workspace(tmp_path / "kv16", SMALL, FP16, 1, random_tensors(SMALL, FP16))).kv_scales() is None


@pytest.mark.parametrize("row", [[0.0, 0, 1, 0], [1, 0, -1, 0], [1, float("nan"), 1, 0], [1, 0, 1]])
def test_kv_scales_that_cannot_be_are_refused(tmp_path, row):
    with pytest.raises(ValueError, match="layer 3, rank 0"):
        write_kv_scales(tmp_path, 3, [row])


def test_damaged_int4_zero_points_are_refused(tmp_path):
    make_workspace(tmp_path, SMALL, _int4(32), 1, random_tensors(SMALL, _int4(32)))
    path = tmp_path / WEIGHTS / "layers.0.feed_forward.w13.0.scales_zeros"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(ValueError, match=r"layers\.0\.feed_forward\.w13.*zero point"):
        Workspace(tmp_path).tensor("model.layers.0.mlp.up_proj.qweight")


def test_an_unknown_tensor_is_an_error(tmp_path):
    workspace = Workspace(make_workspace(tmp_path, SMALL, FP16, 1, random_tensors(SMALL, FP16)))
    for name in ("model.layers.0.self_attn.q_proj.qweight", "model.layers.0.x.weight", "attention_norm.weight"):
        assert name not in workspace.weights()
        with pytest.raises(ValueError, match="has no tensor"):
            workspace.tensor(name)


def test_int8_files_lie_as_products_read_them_with_a_scale_an_output(tmp_path):
    tensors = random_tensors(SMALL, W8A8)
    folder = make_workspace(tmp_path, SMALL, W8A8, 2, tensors) / WEIGHTS
    down = tensors["model.layers.1.mlp.down_proj.weight"]
    for rank, piece in enumerate(down.chunk(2, dim=1)):
        assert (folder / f"layers.1.feed_forward.w2.{rank}.weight").read_bytes() == piece.numpy().tobytes()
        scales = tensors["model.layers.1.mlp.down_proj.weight_scale"].numpy().tobytes()
        assert (folder / f"layers.1.feed_forward.w2.{rank}.weight_scale").read_bytes() == scales
    assert (folder / "layers.0.attention.w_qkv.0.weight").stat().st_size == 64 * (32 + 16 + 16)
    assert (folder / "layers.0.attention.w_qkv.0.weight_scale").stat().st_size == 4 * (32 + 16 + 16)


def test_weights_that_are_not_int8_and_scales_that_are_none_are_refused(tmp_path):
    tensors = random_tensors(SMALL, W8A8)
    name = "model.layers.1.mlp.up_proj"
    with pytest.raises(ValueError, match=rf"{name}\.weight is torch\.float16; w8a8 weights are int8"):
        floats = tensors | {f"{name}.weight": tensors[f"{name}.weight"].half()}
        write_weights(tmp_path / "a", SMALL, floats.__getitem__, recipe=W8A8, tp=1)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"{name}\.weight_scale holds values"):
            bad = tensors | {f"{name}.weight_scale": torch.full((96,), value, dtype=torch.float64)}
            write_weights(tmp_path / "b", SMALL, bad.__getitem__, recipe=W8A8, tp=1)
    folder = make_workspace(tmp_path / "c", SMALL, W8A8, 1, tensors)
    file = folder / WEIGHTS / "layers.1.feed_forward.w3.0.weight_scale"
    for value in (float("nan"), -1.0):
        file.write_bytes(torch.full((96,), value).numpy().tobytes())
        with pytest.raises(ValueError, match=r"w3\.\*: weight_scale holds values that are negative or not finite"):
            Workspace(folder).tensor(f"{name}.weight")


@pytest.mark.parametrize("recipe", [FP16, W8A8, _int4(32)], ids=str)
def test_the_loaded_model_is_the_same_at_every_tp(tmp_path, recipe):
    tensors = random_tensors(SMALL, recipe)
    models = []
    for tp in (1, 2) if recipe in (FP16, W8A8) else (1,):
        folder = make_workspace(tmp_path / str(tp), SMALL, recipe, tp, tensors)
        models.append(load_workspace(folder, device="cpu", dtype=torch.float32))
    ids = torch.arange(5)
    for model in models:
        assert torch.equal(model.embed(ids), tensors[names.EMBEDDING][:5].float())
        assert model.layers[1]._down.forward(torch.ones(1, 96)).shape == (1, 64)
    if len(models) == 2:
        ones = torch.ones(1, 64)
        assert torch.equal(*(model.layers[0]._qkv.forward(ones) for model in models))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_real_grouped_query_model_gives_the_checkpoints_logits(tmp_path, tp):
    checkpoint = Checkpoint(shared("data/models/stories260K-llama"))
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    make_workspace(tmp_path, checkpoint.config, FP16, tp, tensors)
    batch = packed([[1, 403, 5, 80]])
    expected = load_checkpoint(checkpoint.folder, device="cpu", dtype=torch.float32)(batch, None)
    assert torch.equal(load_workspace(tmp_path, device="cpu", dtype=torch.float32)(batch, None), expected)
