"""Checkpoints that are quantized already, through the door: their linears are the very numbers that lie in them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import Recipe
from engine.models import names
from engine.models.batch import packed
from engine.models.decoder import Decoder
from engine.storage.checkpoint import Checkpoint, load_checkpoint
from engine.storage.workspace import Workspace, load_workspace
from tests.engine.storage.tiny_families import FAMILIES, PROMPT
from tests.engine.storage.tiny_quantized import awq_config, packed_config, quantize_folder, say
from tests.engine.storage.tiny_workspace import check_cuts, make_workspace
from tests.pipelines.tiny_checkpoint import write_tiny_checkpoint

WHOLE = packed([PROMPT])
# Code Llama and Yi are stored as Llama is; Meta's checkpoints are pickled and never quantized.
LAYOUTS = (
    *("llama", "llama3-scaled-tied", "mistral", "internlm", "internlm2", "internlm3-biases"),
    *("qwen-logn", "qwen2-tied", "qwen3", "baichuan", "baichuan2"),
)
FORMS = [("awq", False), ("compressed-tensors", False), ("compressed-tensors", True)]


@pytest.mark.parametrize("family", [one for one in FAMILIES if one.name in LAYOUTS], ids=lambda family: family.name)
def test_a_quantized_checkpoint_of_every_layout_is_its_dequantized_one(tmp_path, family):
    family.write(tmp_path / "dense", torch.float16)
    for form in ("awq", "compressed-tensors"):
        shutil.copytree(tmp_path / "dense", tmp_path / form)
        values = quantize_folder(tmp_path / form, form=form, group_size=8)
    save_file(load_file(tmp_path / "dense/model.safetensors") | values, tmp_path / "dense/model.safetensors")
    expected = load_checkpoint(tmp_path / "dense")(WHOLE, None)
    for form in ("awq", "compressed-tensors"):
        checkpoint = Checkpoint(tmp_path / form, allow_quantized=True)
        assert checkpoint.recipe == Recipe(weights="w4a16", group_size=8)
        assert torch.equal(load_checkpoint(tmp_path / form, allow_quantized=True)(WHOLE, None), expected)
    folder = make_workspace(tmp_path / "w", checkpoint.config, checkpoint.recipe, 2, checkpoint.weights())
    assert torch.equal(load_workspace(folder, device="cpu", dtype=torch.float32)(WHOLE, None), expected)
    held = Workspace(folder)
    for name in checkpoint.names():
        if name.rpartition(".")[2] in names.QUANTIZED:
            assert torch.equal(held.tensor(name), checkpoint.tensor(name)), name
    whole = make_workspace(tmp_path / "w1", checkpoint.config, checkpoint.recipe, 1, checkpoint.weights())
    check_cuts(whole, folder, tmp_path)


@pytest.mark.parametrize(("form", "symmetric"), FORMS)
def test_a_layer_of_it_runs_and_its_tensors_are_the_canonical_ones(tmp_path, form, symmetric):
    folder = write_tiny_checkpoint(tmp_path / "model")
    values = quantize_folder(folder, form=form, symmetric=symmetric)
    checkpoint = Checkpoint(folder, allow_quantized=True)
    layer = checkpoint.layer(1)
    assert layer["mlp.down_proj.qweight"].shape == (96, 8) and layer["mlp.down_proj.qzeros"].dtype is torch.int32
    assert {name: names.layer_name(1, name) for name in layer} == checkpoint.layer_names(1)
    model = Decoder(checkpoint.config, checkpoint.weights(), device="cpu", dtype=torch.float32)
    x = torch.eye(96)
    assert torch.equal(model.layers[1]._down.forward(x).t(), values["model.layers.1.mlp.down_proj.weight"])


def test_unquantized_weights_are_asked_for_where_nothing_else_was_said(tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "model")
    assert Checkpoint(folder, allow_quantized=True).recipe == Recipe()
    quantize_folder(folder)
    with pytest.raises(ValueError, match=r"model is quantized already \(awq, 4 bits in groups of 32\).*weights=as_is"):
        Checkpoint(folder)


def changed(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("weighted", ["trivial", "ordered", "short"])
def test_an_activation_order_is_refused_unless_it_is_none(tmp_path, weighted):
    folder = write_tiny_checkpoint(tmp_path / "model")
    quantize_folder(folder, form="compressed-tensors")
    say(folder, packed_config(32, weights={"actorder": "group"}))
    order = torch.arange(96, dtype=torch.int32) // 32
    order = {"trivial": order, "ordered": order.flip(0), "short": order[:32]}[weighted]
    changed(folder, lambda tensors: tensors.update({f"{DOWN}.weight_g_idx": order.contiguous()}))
    if weighted == "trivial":
        assert Checkpoint(folder, allow_quantized=True).recipe.group_size == 32
        return
    with pytest.raises(ValueError, match=r"down_proj\.weight_g_idx deals the inputs .*actorder"):
        Checkpoint(folder, allow_quantized=True)


def unquantize(tensors):
    for kind in ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"):
        tensors.pop(f"{DOWN}.{kind}")
    tensors[f"{DOWN}.weight"] = torch.zeros(64, 96)


def quantize_head(tensors):
    tensors.pop("lm_head.weight")
    tensors["lm_head.weight_packed"] = torch.zeros(300, 8, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            unquantize,
            r"has no tensor model\.layers\.0\.mlp\.down_proj\.weight_packed.*it has .*down_proj\.weight: a Tur",
        ),
        (quantize_head, r"has no tensor lm_head\.weight,.*it has lm_head\.weight_packed: .* the output matrix"),
        (lambda t: t.pop(f"{DOWN}.weight_zero_point"), r"has no tensor .*down_proj\.weight_zero_point"),
        (
            lambda t: t.update({f"{DOWN}.weight_shape": torch.tensor([64, 95])}),
            r"weight_shape is \[64, 95\]; .*\[64, 96\]",
        ),
        (
            lambda t: t.update({f"{DOWN}.weight_packed": torch.zeros(64, 24, dtype=torch.int32)}),
            r"down_proj\.weight_packed with shape \(64, 24\); config\.json asks for \(64, 12\)",
        ),
        (
            lambda t: t.update({f"{DOWN}.weight_packed": torch.zeros(64, 12, dtype=torch.int8)}),
            r"down_proj\.weight_packed as I8; weights are read as I32",
        ),
        (lambda t: t.update({f"{DOWN}.input_scale": torch.zeros(1)}), r"holds .*input_scale, which .* does not use"),
        (
            lambda t: t.update({"spare.weight_g_idx": torch.zeros(1, dtype=torch.int32)}),
            r"holds spare\.weight_g_idx, which",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    folder = write_tiny_checkpoint(tmp_path / "model")
    quantize_folder(folder, form="compressed-tensors")
    changed(folder, change)
    with pytest.raises(ValueError, match=message):
        Checkpoint(folder, allow_quantized=True)


def test_groups_that_do_not_come_out_even_and_other_methods_are_refused_with_the_folder(tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "model")
    quantize_folder(folder)
    say(folder, awq_config(40))
    with pytest.raises(ValueError, match=r"model: a linear of 64 inputs .*no whole groups of 40"):
        Checkpoint(folder, allow_quantized=True)
    say(folder, {"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(ValueError, match=r"model: config\.json has quantization_config\.quant_method = 'gptq'"):
        Checkpoint(folder, allow_quantized=True)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"
