from dataclasses import replace

import pytest
import torch

from engine.config import Recipe
from engine.kernels.reference import unpack_int4
from engine.models import names
from engine.models.batch import packed
from engine.models.cache import KVScales
from engine.models.decoder import Decoder
from engine.storage.artifacts import read_manifest, verify, write_manifest
from engine.storage.checkpoint import Checkpoint
from engine.storage.kv_scale_files import covering_row, rank_file, runs_file, write_kv_scales
from engine.storage.rank_cuts import ffn_share, rank_config, rank_cut
from engine.storage.reshard import reshard, reshard_artifact
from engine.storage.triton_repository import repository_files, write_repository
from engine.storage.workspace import WEIGHTS, Workspace
from tests.engine.storage.tiny_workspace import SMALL, make_workspace, random_tensors
from tests.shared_data import shared

FP16 = Recipe()
W8A8 = Recipe(weights="w8a8")
LLAMA2_7B = replace(
    SMALL,
    hidden_size=4096,
    num_layers=1,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    intermediate_size=11008,
)
# Heads of 24 and groups of 32: rows of o_proj end within groups and tiles at every tp above 1.
CROOKED = replace(SMALL, hidden_size=96, num_kv_heads=4, head_dim=24, intermediate_size=160, qkv_bias=True, o_bias=True)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def int4(group_size, kv="kv16"):
    return Recipe(weights="w4a16", group_size=group_size, kv=kv)


CASES = {
    "fp16": (replace(SMALL, num_kv_heads=4), FP16),
    "fp16 with a width that no tp divides": (replace(SMALL, num_kv_heads=4, intermediate_size=97), FP16),
    "bf16": (replace(CROOKED, dtype="bfloat16"), FP16),
    "int4, three groups on four ranks": (replace(SMALL, num_kv_heads=4, intermediate_size=96), int4(32)),
    "int4, heads that end within groups": (CROOKED, int4(32)),
    "int4, groups smaller than tiles": (replace(CROOKED, intermediate_size=112), int4(16)),
    "int8 with a width that no tp divides": (replace(CROOKED, intermediate_size=97), W8A8),
    "int8 beside bf16": (replace(CROOKED, dtype="bfloat16"), W8A8),
}


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_every_tensor_is_equal_and_every_byte(tmp_path, case):
    config, recipe = CASES[case]
    tensors = random_tensors(config, recipe)
    made = {tp: make_workspace(tmp_path / f"made{tp}", config, recipe, tp, tensors) for tp in (1, 2, 4)}
    for source, target in ((1, 4), (4, 2), (2, 1)):
        folder = tmp_path / f"from{source}to{target}"
        reshard(made[source], folder, target)
        workspace = Workspace(folder)
        assert workspace.tp == target and workspace.ini.inter_size == config.intermediate_size
        assert contents(folder) == contents(made[target])
        for name in workspace.names():
            assert torch.equal(workspace.tensor(name), tensors[name]), name


def products(linears, tensors, x):
    """x through a linear whose tensors have any layout, in float64."""
    if f"{linears}.weight" in tensors:
        weight = tensors[f"{linears}.weight"].double()
        weight = weight * tensors.get(f"{linears}.weight_scale", torch.ones(len(weight))).double()[:, None]
    else:
        weight = unpack_int4(*(tensors[f"{linears}.{kind}"] for kind in names.QUANTIZED)).double()
    out = x @ weight.t()
    return out + tensors[f"{linears}.bias"].double() if f"{linears}.bias" in tensors else out


@pytest.mark.parametrize(("tp", "stored"), [(1, 2), (2, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("case", CASES)
def test_ranks_side_by_side_are_the_whole_model(tmp_path, case, tp, stored):
    config, recipe = CASES[case]
    config = replace(config, num_layers=1)
    tensors = random_tensors(config, recipe)
    workspace = Workspace(make_workspace(tmp_path, config, recipe, stored, tensors))
    ranks = [workspace.rank_weights(rank, tp) for rank in range(tp)]
    shape = rank_config(config, recipe, tp)
    torch.manual_seed(0)
    x = torch.randn(3, config.hidden_size).double()
    for layer in range(config.num_layers):
        of_layer = f"model.layers.{layer}."
        for module in names.LINEARS:
            expected_shape = names.linear_shape(shape, module)
            for weights in ranks:
                name = of_layer + module
                if recipe in (FP16, W8A8):
                    assert weights[f"{name}.weight"].shape == expected_shape
                else:
                    assert weights[f"{name}.qweight"].shape == (expected_shape[1], expected_shape[0] // 8)
        for module in (*names.QKV, *names.GATE_UP):
            outs = [products(of_layer + module, weights, x) for weights in ranks]
            joined, whole = torch.cat(outs, dim=1), products(of_layer + module, tensors, x)
            torch.testing.assert_close(joined[:, : whole.shape[1]], whole, rtol=1e-12, atol=1e-9)
            assert not joined[:, whole.shape[1] :].any()
        for module in (names.OUTPUT, names.DOWN):
            inputs = names.linear_shape(config, module)[1]
            full = torch.randn(3, inputs).double()
            width = names.linear_shape(shape, module)[1]
            padded = torch.nn.functional.pad(full, (0, width * tp - inputs))
            partial = [
                products(of_layer + module, weights, share)
                for weights, share in zip(ranks, padded.chunk(tp, dim=1), strict=True)
            ]
            whole = products(of_layer + module, tensors, full)
            if recipe == W8A8 and f"{of_layer}{module}.bias" in tensors:  # all ranks add it, to the sum of all
                whole = whole + (tp - 1) * tensors[f"{of_layer}{module}.bias"].double()
            torch.testing.assert_close(sum(partial), whole, rtol=1e-12, atol=1e-9)
    for weights in ranks:
        assert torch.equal(weights[names.EMBEDDING], tensors[names.EMBEDDING])
    heads = torch.cat([weights[names.HEAD] for weights in ranks])
    assert torch.equal(heads[: config.vocab_size], tensors[names.HEAD]) and not heads[config.vocab_size :].any()


def test_a_rank_is_a_model_of_its_own_that_the_engine_takes(tmp_path):
    """Attention of each rank over its heads, o_proj and down_proj summed: the layers of the whole model."""
    config, recipe = CASES["int4, three groups on four ranks"]
    tensors = random_tensors(config, recipe)
    workspace = Workspace(make_workspace(tmp_path, config, recipe, 1, tensors))
    one = {"device": "cpu", "dtype": torch.float64}
    shape = rank_config(config, recipe, 4)
    ranks = [Decoder(shape, workspace.rank_weights(rank, 4), **one).layers[0] for rank in range(4)]
    whole = Decoder(config, workspace.weights(), **one).layers[0]
    x = torch.randn(5, config.intermediate_size).double()
    padded = torch.nn.functional.pad(x, (0, 4 * shape.intermediate_size - config.intermediate_size))
    parts = [rank._down.forward(share) for rank, share in zip(ranks, padded.chunk(4, 1), strict=True)]
    torch.testing.assert_close(sum(parts), whole._down.forward(x))


def test_a_rank_that_is_none_and_heads_that_cannot_be_dealt_are_refused(tmp_path):
    workspace = Workspace(make_workspace(tmp_path, SMALL, FP16, 1, random_tensors(SMALL, FP16)))
    with pytest.raises(ValueError, match="rank 2 is not one of 2 ranks"):
        workspace.rank_weights(2, 2)
    with pytest.raises(ValueError, match="2 key/value heads cannot be dealt to 4 ranks"):
        workspace.rank_weights(0, 4)
    with pytest.raises(ValueError, match="2 key/value heads cannot be dealt to 4 ranks"):
        reshard(tmp_path, tmp_path / "out", 4)
    assert not (tmp_path / "out").exists()


def test_llama2_7b_has_22_groups_a_rank_at_tp_4_and_minimind2_6_at_tp_2():
    assert LLAMA2_7B.intermediate_size == 86 * 128
    assert ffn_share(LLAMA2_7B, int4(128), 4) == 22 * 128 and ffn_share(LLAMA2_7B, int4(128), 2) == 43 * 128
    minimind = Checkpoint(shared("data/models/minimind2-small-llama")).config
    assert minimind.intermediate_size == 11 * 128
    assert ffn_share(minimind, int4(128), 2) == 6 * 128 and ffn_share(minimind, int4(128), 1) == 11 * 128
    # Where the reference can cut, there is no padding and groups stay whole.
    for tp in (1, 2):
        assert rank_cut(LLAMA2_7B, int4(128), (names.OUTPUT,), tp).group_size == 128
        assert ffn_share(LLAMA2_7B, int4(128), tp) * tp == 11008


def test_llama2_7b_at_tp_4_by_one_matrix_of_its_real_width(tmp_path):
    """down_proj's 86 groups over four ranks, gate and up cut at the same borders; heads are few to keep it small."""
    config = replace(LLAMA2_7B, hidden_size=512, num_heads=4, num_kv_heads=4)
    tensors = random_tensors(config, int4(128))
    workspace = Workspace(make_workspace(tmp_path / "a", config, int4(128), 4, tensors))
    weights = tmp_path / "a" / WEIGHTS
    for rank in range(4):
        down = (weights / f"layers.0.feed_forward.w2.{rank}.scales_zeros").stat().st_size
        assert down == 22 * 512 * 4
        assert (weights / f"layers.0.feed_forward.w13.{rank}.qweight").stat().st_size == 512 * 2 * 22 * 128 // 2
    last = torch.from_file(str(weights / "layers.0.feed_forward.w2.3.scales_zeros"), size=22 * 512, dtype=torch.int32)
    assert set(last.view(22, 512)[20:].flatten().tolist()) == {0x5400}
    for name, tensor in tensors.items():
        assert torch.equal(workspace.tensor(name), tensor), name


def test_minimind2_at_tp_2_gives_the_logits_of_tp_1(tmp_path):
    config = replace(Checkpoint(shared("data/models/minimind2-small-llama")).config, num_layers=1, vocab_size=64)
    config = replace(config, tie_word_embeddings=False)
    tensors = random_tensors(config, int4(128))
    tensors |= {name: tensor / 64 for name, tensor in tensors.items() if name.endswith("scales")}
    make_workspace(tmp_path / "one", config, int4(128), 1, tensors)
    reshard(tmp_path / "one", tmp_path / "two", 2)
    assert (tmp_path / "two" / WEIGHTS / "layers.0.feed_forward.w2.0.scales_zeros").stat().st_size == 6 * 512 * 4
    logits = []
    for folder in ("one", "two"):
        workspace = Workspace(tmp_path / folder)
        model = Decoder(workspace.config, workspace.weights(), device="cpu", dtype=torch.float32)
        logits.append(model(packed([[1, 5, 9, 2]]), None))
    assert torch.equal(*logits)


ROWS = [[0.5, -0.25, 2.0, 1.0], [0.25, 0.5, 1.0, -3.0], [0.5, 0.0, 0.5, 0.0], [1.0, 0.0, 4.0, 0.0]]


def kv_workspace(folder, config, tp, rows):
    tensors = random_tensors(config, FP16)
    make_workspace(folder, config, Recipe(kv="kv8"), tp, tensors)
    for layer in range(config.num_layers):
        write_kv_scales(folder / WEIGHTS, layer, rows)
    return folder


def equal(one: KVScales, other: KVScales) -> bool:
    return torch.equal(one.key, other.key) and torch.equal(one.value, other.value)


def test_a_merge_keeps_the_scales_of_every_rank_and_a_split_gives_them_back(tmp_path):
    config = replace(SMALL, num_heads=4, num_kv_heads=4)
    four = kv_workspace(tmp_path / "four", config, 4, ROWS)
    scales = Workspace(four).kv_scales()
    reshard(four, tmp_path / "one", 1)
    assert (tmp_path / "one" / WEIGHTS / runs_file(1)).stat().st_size == 64
    reshard(tmp_path / "one", tmp_path / "two", 2)
    for tp, folder in ((1, "one"), (2, "two")):
        workspace = Workspace(tmp_path / folder)
        assert equal(workspace.kv_scales(), scales)
        ranks = [workspace.rank_kv_scales(rank, 2) for rank in range(2)]
        assert torch.equal(torch.cat([rank.key for rank in ranks], 1), scales.key)
        assert workspace.tp == tp
    reshard(tmp_path / "two", tmp_path / "again", 4)
    assert contents(tmp_path / "again") == contents(four)


def test_a_split_repeats_the_scales_and_merging_them_again_leaves_no_extra_file(tmp_path):
    config = replace(SMALL, num_heads=4, num_kv_heads=4)
    one = kv_workspace(tmp_path / "one", config, 1, ROWS[:1])
    reshard(one, tmp_path / "four", 4)
    assert not (tmp_path / "four" / WEIGHTS / runs_file(0)).exists()
    files = [(tmp_path / "four" / WEIGHTS / rank_file(0, rank)).read_bytes() for rank in range(4)]
    assert set(files) == {(one / WEIGHTS / rank_file(0, 0)).read_bytes()}
    reshard(tmp_path / "four", tmp_path / "back", 1)
    assert contents(tmp_path / "back") == contents(one)


def test_the_pair_of_merged_ranks_represents_what_theirs_do():
    row = covering_row(torch.tensor(ROWS[:2]))
    for at in (0, 2):
        lows = [other[at + 1] - 127.5 * other[at] for other in ROWS[:2]]
        highs = [other[at + 1] + 127.5 * other[at] for other in ROWS[:2]]
        assert row[at + 1] - 127.5 * row[at] == pytest.approx(min(lows))
        assert row[at + 1] + 127.5 * row[at] == pytest.approx(max(highs))
    # Symmetric scales stay symmetric.
    assert covering_row(torch.tensor(ROWS[2:])) == [1.0, 0.0, 4.0, 0.0]


@pytest.mark.parametrize("size", [0, 8, 48])
def test_an_extension_file_of_a_wrong_size_is_refused(tmp_path, size):
    kv_workspace(tmp_path, SMALL, 1, ROWS[:1])
    (tmp_path / WEIGHTS / runs_file(1)).write_bytes(b"\0" * size)
    with pytest.raises(ValueError, match=r"past_kv_scale\.ranks has .* bytes"):
        Workspace(tmp_path).kv_scales()


def test_an_artifact_gets_a_new_id_and_keeps_its_provenance(tmp_path):
    folder = kv_workspace(tmp_path / "a", SMALL, 1, ROWS[:1])
    (folder / "triton_models/tokenizer").mkdir()
    (folder / "triton_models/tokenizer/tokenizer.json").write_text("{}")
    write_repository(folder, model_name="x", tp=1)
    told = {
        "recipe": Recipe(kv="kv8"),
        "sources": {"config.json": "ab" * 32},
        "calibration": {"declared": "cd" * 32, "blocks": "12" * 32},
        "chat_template": "ef" * 32,
    }
    old = write_manifest(folder, **told, tp=1)
    new = reshard_artifact(folder, tmp_path / "b", 2)
    manifest, before = verify(tmp_path / "b", new), read_manifest(folder)
    assert new != old and manifest.tp == 2
    for field in told:
        assert getattr(manifest, field) == getattr(before, field)
    assert (tmp_path / "b/triton_models/tokenizer/tokenizer.json").stat().st_ino != (
        folder / "triton_models/tokenizer/tokenizer.json"
    ).stat().st_ino
    for name, content in repository_files(model_name="x", tp=2).items():
        assert (tmp_path / "b" / name).read_bytes() == content
    back = reshard_artifact(tmp_path / "b", tmp_path / "c", 1)
    assert back == old


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_files_of_a_rank_are_read_without_the_others_and_are_what_is_cut_from_all(tmp_path, case, tp):
    config, recipe = CASES[case]
    config = replace(config, qkv_bias=True, o_bias=True)
    tensors = random_tensors(config, recipe)
    cut = Workspace(make_workspace(tmp_path / "one", config, recipe, 1, tensors))
    straight = Workspace(make_workspace(tmp_path / "ranks", config, recipe, tp, tensors))
    for rank in range(tp):
        expected, weights = cut.rank_weights(rank, tp), straight.rank_weights(rank, tp)
        assert list(weights) == list(expected)
        for name in expected:
            assert torch.equal(weights[name], expected[name]), name
    for path in (tmp_path / "ranks" / WEIGHTS).glob("layers.*.0.*"):
        path.write_bytes(b"")
    weights = straight.rank_weights(1, tp)
    assert all(len(weights[name]) for name in weights)
