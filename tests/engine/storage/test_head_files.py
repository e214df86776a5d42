from dataclasses import replace

import pytest
import torch

from engine.config import Recipe
from engine.kernels.reference import unpack_int4
from engine.models.batch import packed
from engine.models.linear import DenseLinear, Int4Linear, Int8Linear, PackedInt4Linear
from engine.storage.head_files import head_of_rank, head_problem, head_tensors
from engine.storage.reshard import reshard
from engine.storage.turbomind_files import file_bytes
from engine.storage.workspace import WEIGHTS, Workspace, load_workspace
from tests.engine.storage.tiny_workspace import SMALL, make_workspace, random_tensors

INT4 = Recipe(weights="w4a16", group_size=32, head="int4")
INT8 = replace(INT4, head="int8")


@pytest.mark.parametrize("recipe", [INT4, INT8], ids=str)
@pytest.mark.parametrize("tp", [1, 2])
def test_what_is_written_is_read(tmp_path, recipe, tp):
    tensors = random_tensors(SMALL, recipe)
    folder = make_workspace(tmp_path, SMALL, recipe, tp, tensors)
    workspace = Workspace(folder)
    assert workspace.recipe == recipe
    assert set(workspace.names()) == set(tensors)
    for name in head_tensors(SMALL, recipe):
        assert torch.equal(workspace.tensor(name), tensors[name]), name
    sizes = {path.name: path.stat().st_size for path in (folder / WEIGHTS).glob("*weight*")}
    assert {name: size for name, size in file_bytes(SMALL, recipe, tp).items() if "output" in name}.items() <= {
        **sizes,
        **{path.name: path.stat().st_size for path in (folder / WEIGHTS).glob("output.*")},
    }.items()


@pytest.mark.parametrize("recipe", [INT4, INT8], ids=str)
def test_another_tp_changes_no_bit_of_it(tmp_path, recipe):
    tensors = random_tensors(SMALL, recipe)
    make_workspace(tmp_path / "one", SMALL, recipe, 1, tensors)
    reshard(tmp_path / "one", tmp_path / "two", 2)
    reshard(tmp_path / "two", tmp_path / "again", 1)
    files = [{p.name: p.read_bytes() for p in (tmp_path / name / WEIGHTS).iterdir()} for name in ("one", "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [(INT4, (Int4Linear, PackedInt4Linear)), (INT8, Int8Linear), (replace(INT4, head="fp16"), DenseLinear)],
    ids=str,
)
def test_the_engine_computes_with_it(tmp_path, recipe, kind):
    tensors = random_tensors(SMALL, recipe)
    model = load_workspace(make_workspace(tmp_path, SMALL, recipe, 2, tensors), device="cpu", dtype=torch.float32)
    assert isinstance(model._head, kind)
    hidden = torch.randn(3, SMALL.hidden_size, generator=torch.Generator().manual_seed(1))
    normed = hidden * (hidden.square().mean(-1, keepdim=True) + SMALL.norm_eps).rsqrt()
    normed = normed * tensors["model.norm.weight"].float()
    if recipe.head == "int4":
        weight = unpack_int4(*(tensors[f"lm_head.{part}"] for part in ("qweight", "qzeros", "scales")))[:37]
        expected = normed @ weight.float().t()
    elif recipe.head == "int8":
        scales = normed.abs().amax(-1, keepdim=True) / 127
        rows = (normed / scales).round()
        expected = (rows @ tensors["lm_head.weight"].float().t()) * scales * tensors["lm_head.weight_scale"]
    else:
        expected = normed @ tensors["lm_head.weight"].float().t()
    assert model.head(hidden).shape == (3, 37)
    torch.testing.assert_close(model.head(hidden), expected, rtol=1e-4, atol=1e-3)
    assert model(packed([[1, 2, 3]]), None).shape == (3, 37)


@pytest.mark.parametrize("recipe", [INT4, INT8], ids=str)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_ranks_have_whole_words_and_all_of_the_vocabulary(tmp_path, recipe, tp):
    tensors = random_tensors(SMALL, recipe)
    for name in head_tensors(SMALL, recipe):
        kind = name.rpartition(".")[2]
        pieces = [head_of_rank(tensors[name], kind, SMALL, rank=rank, tp=tp) for rank in range(tp)]
        assert len({piece.shape for piece in pieces}) == 1
        whole = torch.cat(pieces, dim=0 if recipe.head == "int8" else 1)
        there = 37 if recipe.head == "int8" or kind == "scales" else 5  # words of 8
        expected = tensors[name][:there] if recipe.head == "int8" else tensors[name][:, :there]
        assert torch.equal(whole[:there] if recipe.head == "int8" else whole[:, :there], expected)


def test_a_rank_of_a_workspace_has_its_share(tmp_path):
    tensors = random_tensors(SMALL, INT4)
    workspace = Workspace(make_workspace(tmp_path, SMALL, INT4, 1, tensors))
    parts = ("qweight", "qzeros", "scales")
    whole = unpack_int4(*(tensors[f"lm_head.{part}"] for part in parts))[:37]
    ranks = [workspace.rank_weights(rank, 2) for rank in range(2)]
    halves = [unpack_int4(*(rank[f"lm_head.{part}"] for part in parts)) for rank in ranks]
    assert len(halves[0]) == 24 and torch.equal(torch.cat(halves)[:37], whole)


@pytest.mark.parametrize(
    ("config", "recipe", "message"),
    [
        (SMALL, Recipe(head="int8"), "head=int8 goes with w4a16 weights, not with fp16"),
        (replace(SMALL, hidden_size=80), INT4, "hidden_size 80 is no multiple of 32 and of group_size 32"),
    ],
)
def test_what_does_not_go_together(config, recipe, message):
    assert head_problem(config, recipe) == message
    assert head_problem(config, replace(recipe, head="fp16")) is None


def test_a_head_that_is_none_is_no_recipe():
    with pytest.raises(ValueError, match="head is 'int2', not one of fp16, int8, int4"):
        replace(INT4, head="int2")


def test_damaged_heads_are_named(tmp_path):
    tensors = random_tensors(SMALL, INT8)
    folder = make_workspace(tmp_path, SMALL, INT8, 1, tensors)
    scales = folder / WEIGHTS / "output.weight_scale"
    scales.write_bytes(b"\xff" * scales.stat().st_size)
    with pytest.raises(ValueError, match=r"output\.\*: output\.weight_scale holds values that are negative or not fin"):
        Workspace(folder).tensor("lm_head.weight_scale")
    scales.unlink()
    with pytest.raises(FileNotFoundError, match=r"output\.weight_scale is missing"):
        Workspace(folder)
    ini = folder / WEIGHTS / "config.ini"
    ini.write_text(ini.read_text().replace('head = "int8"', 'head = "int3"'))
    with pytest.raises(ValueError, match=r"\[ingot\] head = \"int3\" must be one of int8, int4"):
        Workspace(folder)


def test_a_head_of_another_type_than_its_recipe_is_refused(tmp_path):
    tensors = random_tensors(SMALL, INT8)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float()
    with pytest.raises(ValueError, match=r"lm_head.weight is torch.float32; a head of int8 has torch.int8"):
        make_workspace(tmp_path, SMALL, INT8, 1, tensors)
