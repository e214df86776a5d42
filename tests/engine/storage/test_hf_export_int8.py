"""w8a8 out as compressed-tensors and as LMDeploy's smooth_quant, and in again: by the real library, and bit by bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from engine.config import Recipe
from engine.kernels import reference
from engine.models import names
from engine.models.batch import packed
from engine.models.decoder import Decoder
from engine.storage.checkpoint import Checkpoint, load_checkpoint
from engine.storage.hf_config import COMPRESSED_TENSORS, HF_AWQ, SMOOTH_QUANT
from engine.storage.hf_export import export_checkpoint
from engine.storage.workspace import Workspace, load_workspace
from tests.engine.storage.test_hf_export import MODEL, PROMPT, distance
from tests.engine.storage.tiny_families import FAMILIES
from tests.engine.storage.tiny_families import PROMPT as FAMILY_PROMPT
from tests.engine.storage.tiny_quantized import int8_config, say
from tests.engine.storage.tiny_workspace import SMALL, check_cuts, make_workspace, random_tensors

W8A8 = Recipe(weights="w8a8")
FORMS = (COMPRESSED_TENSORS, SMOOTH_QUANT)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A workspace of two ranks, both exports of it, and its tensors."""
    root = tmp_path_factory.mktemp("exports")
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in names.model_tensors(MODEL).items():
        drawn = torch.randn(shape, generator=generator)
        drawn = 1 + 0.3 * drawn if "norm" in name else drawn * (0.5 if len(shape) == 1 else 1.5 * shape[-1] ** -0.5)
        if names.split_name(name)[1].removesuffix(".weight") in names.LINEARS:
            tensors[name], tensors[f"{name}_scale"] = reference.quantize_rows(drawn)
        else:
            tensors[name] = drawn.half()
    workspace = make_workspace(root / "w", MODEL, W8A8, 2, tensors)
    for form in FORMS:
        export_checkpoint(Workspace(workspace), root / form, form=form)
    return root, tensors


def ours(root):
    return load_workspace(root / "w", device="cpu", dtype=torch.float32)(packed([PROMPT]), None)


def transformers(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0]


def as_the_library_rounds(x, maxima=None):
    """compressed-tensors takes a scale of absmax / 127.5 for a token, and -128 too."""
    wide = x.float()
    scales = (wide.abs().amax(-1) / 127.5).clamp(min=torch.finfo(torch.float32).eps)
    return (wide / scales.unsqueeze(-1)).round().clamp(-128, 127).to(torch.int8), scales


def test_transformers_with_compressed_tensors_gives_our_logits(built, monkeypatch):
    """By itself, weights and tokens in 8 bits. Its tokens' scales are absmax / 127.5 where ours are absmax / 127: with
    its rule in our engine the logits are equal, and with ours they are as near as two roundings are."""
    root, _ = built
    theirs = transformers(root / COMPRESSED_TENSORS)
    assert 1e-3 < distance(theirs, ours(root)) < 0.1
    monkeypatch.setattr(reference, "quantize_rows", as_the_library_rounds)
    assert distance(theirs, ours(root)) < 1e-5


def test_the_weights_that_transformers_reads_are_ours(built):
    root, tensors = built
    floats = {name: tensor.float() for name, tensor in tensors.items() if not name.endswith("_scale")}
    for name in [name for name in tensors if name.endswith("_scale")]:
        floats[name.removesuffix("_scale")] *= tensors[name][:, None]
    expected = Decoder(MODEL, floats, device="cpu", dtype=torch.float32)(packed([PROMPT]), None)
    dequantized = CompressedTensorsConfig(dequantize=True)
    assert distance(transformers(root / COMPRESSED_TENSORS, quantization_config=dequantized), expected) < 1e-5
    assert distance(ours(root), expected) > 1e-3  # 8-bit tokens are another thing


@pytest.mark.parametrize("form", FORMS)
def test_an_export_read_again_has_the_very_tensors(built, form):
    root, tensors = built
    checkpoint = Checkpoint(root / form, allow_quantized=True)
    assert checkpoint.recipe == W8A8 and str(checkpoint.quantization).endswith("8 bits, a scale a row")
    assert set(checkpoint.names()) == set(tensors)
    for name in tensors:
        assert torch.equal(checkpoint.tensor(name), tensors[name]), name
    expected = ours(root)
    assert torch.equal(load_checkpoint(root / form, allow_quantized=True)(packed([PROMPT]), None), expected)
    with pytest.raises(ValueError, match=r"is quantized already \(.*, 8 bits, a scale a row\).*weights=as_is"):
        Checkpoint(root / form)


def test_lmdeploys_own_folder_says_nothing_and_is_seen_all_the_same(built, tmp_path):
    root, tensors = built
    shutil.copytree(root / SMOOTH_QUANT, tmp_path / "w8")
    config = json.loads((tmp_path / "w8/config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "smooth_quant", "quant_dtype": "int8"}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}
    (tmp_path / "w8/config.json").write_text(json.dumps(config))
    stored = load_file(tmp_path / "w8/model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.scale"].shape == (96, 1)
    checkpoint = Checkpoint(tmp_path / "w8", allow_quantized=True)
    assert checkpoint.recipe == W8A8
    assert torch.equal(
        checkpoint.tensor("model.layers.1.mlp.up_proj.weight"), tensors["model.layers.1.mlp.up_proj.weight"]
    )
    with pytest.raises(ValueError, match=r"is quantized already \(smooth_quant, 8 bits"):
        Checkpoint(tmp_path / "w8")


@pytest.mark.parametrize("form", FORMS)
def test_rotated_inputs_are_in_no_form(tmp_path, form):
    recipe = Recipe(weights="w8a8", rotate_down=8)
    folder = make_workspace(tmp_path / "a", SMALL, recipe, 1, random_tensors(SMALL, recipe))
    with pytest.raises(ValueError, match=r"rotated by blocks of 8 channels.*Build .* weights\.rotate_down=0"):
        export_checkpoint(Workspace(folder), tmp_path / "out", form=form)
    assert not (tmp_path / "out").exists()


def test_forms_go_with_weights(tmp_path):
    int8 = Workspace(make_workspace(tmp_path / "a", SMALL, W8A8, 1, random_tensors(SMALL, W8A8)))
    with pytest.raises(ValueError, match="is w8a8, which is not written as hf-awq: w4a16 as hf-awq or compressed-ten"):
        export_checkpoint(int8, tmp_path / "out", form=HF_AWQ)
    int4 = Recipe(weights="w4a16", group_size=32)
    packed_weights = Workspace(make_workspace(tmp_path / "b", SMALL, int4, 1, random_tensors(SMALL, int4)))
    with pytest.raises(ValueError, match="is w4a16, which is not written as smooth-quant"):
        export_checkpoint(packed_weights, tmp_path / "out", form=SMOOTH_QUANT)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "family",
    [one for one in FAMILIES if one.name in ("internlm2", "qwen-logn", "baichuan2", "internlm3-biases", "qwen3")],
    ids=lambda family: family.name,
)
def test_an_int8_checkpoint_of_every_packing_is_its_dequantized_one(tmp_path, family):
    """Stored names and matrices as the family has them, quantized here by hand."""
    family.write(tmp_path / "int8", torch.float16)
    tensors = load_file(tmp_path / "int8/model.safetensors")
    dense = {}
    for name in [name for name in tensors if name.endswith(".weight") and (".layers." in name or ".h." in name)]:
        if tensors[name].dim() == 2:
            codes, scales = reference.quantize_rows(tensors[name])
            dense[name] = codes.float() * scales[:, None]
            tensors |= {name: codes, f"{name}_scale": scales[:, None].contiguous()}
    save_file(tensors, tmp_path / "int8/model.safetensors")
    say(tmp_path / "int8", int8_config())
    checkpoint = Checkpoint(tmp_path / "int8", allow_quantized=True)
    whole = dict(checkpoint.weights())
    for name in [name for name in whole if name.endswith("_scale")]:
        whole[name.removesuffix("_scale")] = whole[name.removesuffix("_scale")].float() * whole[name][:, None]
    family.write(tmp_path / "dense", torch.float16)
    plain = load_file(tmp_path / "dense/model.safetensors")
    save_file({name: dense.get(name, tensor) for name, tensor in plain.items()}, tmp_path / "dense/model.safetensors")
    expected = Checkpoint(tmp_path / "dense")
    for name in expected.names():
        assert torch.equal(whole[name].float(), expected.tensor(name).float()), name
    one, two = (make_workspace(tmp_path / f"w{tp}", checkpoint.config, W8A8, tp, checkpoint.weights()) for tp in (1, 2))
    check_cuts(one, two, tmp_path)
    batch = packed([FAMILY_PROMPT])
    expected_logits = load_checkpoint(tmp_path / "int8", allow_quantized=True)(batch, None)
    assert torch.equal(load_workspace(two, device="cpu", dtype=torch.float32)(batch, None), expected_logits)


def spoil(tensors, name, value):
    tensors[name] = tensors[name].clone()
    tensors[name].flatten()[0] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5])
def test_scales_that_are_none_are_refused_by_name_when_they_are_written(built, tmp_path, value):
    root, _ = built
    shutil.copytree(root / COMPRESSED_TENSORS, tmp_path / "bad")
    tensors = load_file(tmp_path / "bad/model.safetensors")
    spoil(tensors, "model.layers.1.self_attn.o_proj.weight_scale", value)
    save_file(tensors, tmp_path / "bad/model.safetensors")
    checkpoint = Checkpoint(tmp_path / "bad", allow_quantized=True)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj\.weight_scale holds values that are negative"):
        make_workspace(tmp_path / "w", checkpoint.config, W8A8, 1, checkpoint.weights())
