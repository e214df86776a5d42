import json

import pytest
import torch
from safetensors.torch import load_file

from engine.config import Recipe
from engine.kernels.reference import quantize_rows, unpack_int4
from engine.storage.checkpoint import Checkpoint
from engine.storage.head_files import head_tensors
from pipelines.quant import w4a16
from pipelines.quant.stream import side_by_side
from pipelines.quant.w4a16.head import quantize_head
from pipelines.quant.walk import Walk
from tests.pipelines.stage import W4A16
from tests.pipelines.tiny_checkpoint import write_tiny_checkpoint

INT4 = W4A16 | {"head": "int4"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return Checkpoint(write_tiny_checkpoint(tmp_path_factory.mktemp("head") / "model"))


@pytest.fixture
def walk(checkpoint):
    """Blocks that stand before the head: a few directions carry most of what it reads."""
    with side_by_side(2) as workers:
        walk = Walk(checkpoint, torch.zeros(4, 32, dtype=torch.int32), workers, drift=True, device="cpu")
        generator = torch.Generator().manual_seed(0)
        mixing = torch.randn(6, 64, generator=generator)
        for sample in range(4):
            walk.stream.hidden[sample] = torch.randn(32, 6, generator=generator) @ mixing
            noise = 0.01 * torch.randn(32, 64, generator=generator)
            walk.unquantized[sample] = walk.stream.hidden[sample] + noise
        yield walk


def read(out, checkpoint):
    """The dequantized head, [vocabulary, hidden]."""
    tensors = load_file(out / "head.safetensors")
    if "lm_head.weight" in tensors:
        return tensors["lm_head.weight"].float() * tensors["lm_head.weight_scale"][:, None]
    whole = unpack_int4(*(tensors[f"lm_head.{part}"] for part in ("qweight", "qzeros", "scales"))).float()
    assert not whole[checkpoint.config.vocab_size :].any()
    return whole[: checkpoint.config.vocab_size]


def error(out, checkpoint, walk):
    weight = checkpoint.tensor("lm_head.weight").float()
    difference = read(out, checkpoint) - weight
    x = torch.cat(walk.stream.hidden)
    norm = checkpoint.tensor("model.norm.weight").float()
    x = x * (x.square().mean(-1, keepdim=True) + checkpoint.config.norm_eps).rsqrt() * norm
    return float((x @ difference.t()).square().sum() / (x @ weight.t()).square().sum())


def test_fp16_is_left_where_it_is(checkpoint, tmp_path):
    quantize_head(checkpoint, W4A16, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_int8_is_rounded_row_by_row(checkpoint, tmp_path):
    quantize_head(checkpoint, W4A16 | {"head": "int8"}, tmp_path)
    tensors = load_file(tmp_path / "head.safetensors")
    codes, scales = quantize_rows(checkpoint.tensor("lm_head.weight").float())
    assert torch.equal(tensors["lm_head.weight"], codes)
    assert torch.equal(tensors["lm_head.weight_scale"], scales)
    assert json.loads((tmp_path / "head.json").read_text()) == {"error": None, "head": "int8"}


def test_int4_is_better_than_rounding_at_what_it_reads(checkpoint, walk, tmp_path):
    for name in ("rounded", "fitted"):
        (tmp_path / name).mkdir()
    quantize_head(checkpoint, INT4, tmp_path / "rounded")
    quantize_head(checkpoint, INT4, tmp_path / "fitted", walk=walk, method=w4a16.method(INT4))
    rounded, fitted = (error(tmp_path / name, checkpoint, walk) for name in ("rounded", "fitted"))
    assert fitted < 0.3 * rounded < 0.01
    assert json.loads((tmp_path / "fitted/head.json").read_text())["error"] < rounded


def test_rows_in_parts_are_rows_at_once(checkpoint, walk, tmp_path, monkeypatch):
    written = []
    for rows in (8192, 32):
        monkeypatch.setattr("pipelines.quant.w4a16.head.ROWS", rows)
        quantize_head(checkpoint, INT4, tmp_path, walk=walk, method=w4a16.method(INT4))
        written.append(load_file(tmp_path / "head.safetensors"))
    planned = head_tensors(checkpoint.config, Recipe(weights="w4a16", group_size=32, head="int4"))
    assert set(written[0]) == set(planned)
    assert all(torch.equal(written[0][name], written[1][name]) for name in planned)


def test_a_tied_head_is_a_matrix_of_its_own(tmp_path):
    tied = Checkpoint(write_tiny_checkpoint(tmp_path / "model", tie_word_embeddings=True))
    quantize_head(tied, INT4, tmp_path)
    embedding = tied.tensor("model.embed_tokens.weight").float()
    assert float((read(tmp_path, tied) - embedding).norm() / embedding.norm()) < 0.15


def test_a_damaged_head_and_damaged_activations_are_named(checkpoint, walk, tmp_path):
    bad = torch.full((checkpoint.config.vocab_size, 64), float("nan"))
    broken = Checkpoint(write_tiny_checkpoint(tmp_path / "model", replace={"lm_head.weight": bad}))
    with pytest.raises(ValueError, match=r"lm_head\.weight of .* has NaN or Inf values"):
        quantize_head(broken, INT4, tmp_path)
    walk.stream.hidden[2][0, 0] = float("inf")
    with pytest.raises(
        ValueError, match=r"Layer 2: the input of lm_head has NaN or Inf values in calibration sample 2"
    ):
        quantize_head(checkpoint, INT4, tmp_path, walk=walk, method=w4a16.method(INT4))
    assert not (tmp_path / "head.safetensors").exists()
