"""Every file that `convert` writes, against those of a converter written a second time from the format's facts.

Where v0.1.0 is right, ours are its bytes; where it is wrong, the difference is exactly what docs/formats.md says.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.models.batch import packed
from engine.storage.checkpoint import load_checkpoint
from engine.storage.workspace import WEIGHTS, Workspace, load_workspace
from pipelines.convert import Conversion, convert
from pipelines.kv_qparams import write_kv_qparams
from tests.engine.storage import reference_converter
from tests.engine.storage.stored_families import NAMED, ROWS, write_stored
from tests.engine.storage.tiny_quantized import quantize_folder
from tests.pipelines.stage import FP16, Build
from tests.pipelines.tiny_checkpoint import TEXT

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
KINDS = ("fp16", "bf16", "fp32", "awq128", "awq64", "awq32")
# What a plain run takes: every family once for its own sake, each tp, type, group size and form of KV scales often.
THIN = [
    ("llama1", "fp32", 1), ("llama2", "awq128", 4), ("llama3", "bf16", 4), ("llama3.1", "fp16", 2),
    ("codellama", "awq32", 2), ("internlm", "fp16", 2), ("internlm", "awq128", 2), ("internlm-20b", "bf16", 1),
    ("qwen", "bf16", 2), ("qwen", "fp16", 1), ("qwen", "awq128", 4), ("baichuan", "awq64", 2),
    ("baichuan2", "fp16", 4), ("baichuan2", "awq128", 1), ("yi", "fp16", 4), ("mistral", "fp16", 2),
    ("mistral-v0.3", "bf16", 2), ("meta", "fp16", 2), ("meta", "bf16", 4), ("internlm2", "fp16", 2),
    ("internlm3", "bf16", 2), ("qwen2", "fp16", 2), ("qwen3", "bf16", 4),
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prepared(folder: Path, row, kind, **changes) -> tuple[Path, int]:
    """The checkpoint of a cell of the grid, and its group size."""
    group_size = int(kind.removeprefix("awq")) if kind.startswith("awq") else 0
    write_stored(folder, row, DTYPES.get(kind, torch.float16), **changes)
    if group_size:
        quantize_folder(folder, group_size=group_size)
    return folder, group_size


def converted(checkpoint: Path, target: Path, row, *, tp, group_size=0) -> dict[str, bytes]:
    """What ours writes into the folder of weights."""
    form = "llama" if row.is_meta else "awq" if group_size else "hf"
    before = {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    asked = Conversion(name=row.template, source=checkpoint, target=target, model_format=form, tp=tp, allow_bin=True)
    convert(replace(asked, overwrite=target.exists()))
    # v0.1.0 leaves a tokenizer.json in the checkpoint's folder.
    assert {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()} == before
    return {path.name: path.read_bytes() for path in (target / WEIGHTS).iterdir()}


def expected(checkpoint: Path, row, *, tp, group_size=0, as_reference=False) -> dict[str, bytes]:
    return reference_converter.convert(
        checkpoint,
        row.reader,
        model_name=row.template,
        session_len=row.session_len,
        ids=row.ids,
        tp=tp,
        group_size=group_size,
        as_reference=as_reference,
        ingot=row.ingot,
    )


def different(ours: dict[str, bytes], theirs: dict[str, bytes]) -> set[str]:
    """Names of the files that differ, and keys of config.ini instead of its name."""
    names = {name for name in ours | theirs if ours.get(name) != theirs.get(name)}
    if "config.ini" in names:
        llama = [ini["config.ini"].decode().partition("[ingot]")[0].splitlines() for ini in (ours, theirs)]
        names = names - {"config.ini"} | {line.partition(" = ")[0] for line in {*llama[0]} ^ {*llama[1]}}
    return names


def mistakes(row, kind, ours: dict[str, bytes]) -> set[str]:
    """The files and keys that v0.1.0 writes wrongly; zeros are zeros in any type."""
    wrong = set(row.differs)
    if (row.reader == "qwen" and kind in ("fp16", "fp32")) or (row.is_meta and kind == "bf16"):
        return wrong | {name for name in ours if any(ours[name]) and name != "config.ini"} | {"weight_type"}
    if kind in ("awq64", "awq32"):
        wrong |= {name for name in ours if re.search(r"w_qkv\.\d\.(qweight|scales_zeros)", name)}
    return wrong


def check_cell(folder: Path, row, kind, tps) -> None:
    checkpoint, group_size = prepared(folder / "model", row, kind)
    ranges = kv_ranges(folder / "work", row)
    for tp in tps:
        ours = converted(checkpoint, folder / "made", row, tp=tp, group_size=group_size)
        right = expected(checkpoint, row, tp=tp, group_size=group_size)
        assert different(ours, right) == set() and ours["config.ini"] == right["config.ini"]
        if row.known:
            theirs = expected(checkpoint, row, tp=tp, group_size=group_size, as_reference=True)
            assert different(ours, theirs) == mistakes(row, kind, ours)
        for symmetric in (False, True):
            check_kv(folder / "work", folder / "made" / WEIGHTS, ranges, ours, tp=tp, symmetric=symmetric)


def kv_ranges(folder: Path, row) -> dict[str, torch.Tensor]:
    heads = row.config.get("num_key_value_heads", 4)
    generator = torch.Generator().manual_seed(1)
    ranges = {}
    for kind in ("key", "value"):
        low, high = (torch.randn(heads, 128, generator=generator) for _ in range(2))
        named = {"min": low.half().float(), "max": (low + high.abs()).half().float()}
        named["absmax"] = torch.maximum(named["min"].abs(), named["max"].abs())
        ranges |= {f"{kind}/{what}/model.layers.0": tensor for what, tensor in named.items()}
    folder.mkdir()
    save_file(ranges, folder / "stats.safetensors")
    return ranges


def check_kv(work: Path, weights: Path, ranges, before: dict[str, bytes], *, tp, symmetric) -> None:
    write_kv_qparams(work, weights, symmetric=symmetric, tp=tp)
    found = {path.name: path.read_bytes() for path in weights.iterdir()}
    scales = reference_converter.kv_scales(ranges, 1, tp=tp, symmetric=symmetric, as_reference=False)
    ini = before["config.ini"].replace(b"quant_policy = 0", b"quant_policy = 4")
    assert found == before | scales | {"config.ini": ini}
    theirs = reference_converter.kv_scales(ranges, 1, tp=tp, symmetric=symmetric)
    for name, content in scales.items():
        row, rounded = (torch.frombuffer(bytearray(values), dtype=torch.float32) for values in (content, theirs[name]))
        # v0.1.0 rounds to fp16 at every step, and leaves the zero points of symmetric ones out.
        torch.testing.assert_close(row[[0, 2]] if symmetric else row, rounded, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("name", "kind", "tp"), THIN)
def test_every_file_is_the_references_or_right_where_it_is_wrong(tmp_path, name, kind, tp):
    check_cell(tmp_path, NAMED[name], kind, [tp])


@pytest.mark.soak
def test_every_file_over_the_whole_grid(tmp_path, soak_row):
    for row in ROWS:
        for kind in KINDS:
            if not (row.is_meta and kind.startswith("awq")):  # v0.1.0 quantizes no checkpoint of Meta's
                soak_row["count"] += 3
                soak_row["failures"] += 1
                check_cell(tmp_path / "cell", row, kind, (1, 2, 4))
                soak_row["failures"] -= 1
                shutil.rmtree(tmp_path / "cell")


@pytest.mark.parametrize(("name", "kind", "session_len"), [("qwen", "bf16", 8192), ("baichuan2", "awq128", 4096)])
def test_the_stages_of_a_build_write_the_same_files(tmp_path, monkeypatch, name, kind, session_len):
    row = replace(NAMED[name], template="tiny", session_len=session_len)
    checkpoint, group_size = prepared(tmp_path / "model", row, kind)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    build = Build(tmp_path / "out", checkpoint, tmp_path / "text.txt")
    artifact = build.artifact({"name": "as_is"} if group_size else FP16, "kv8", tp=2)
    ranges = load_file(build.root / "calibrate/stats.safetensors")
    right = expected(checkpoint, row, tp=2, group_size=group_size)
    right |= reference_converter.kv_scales(ranges, 1, tp=2, symmetric=False, as_reference=False)
    right["config.ini"] = right["config.ini"].replace(b"quant_policy = 0", b"quant_policy = 4")
    assert {path.name: path.read_bytes() for path in (artifact / WEIGHTS).iterdir()} == right


def test_the_thin_grid_has_every_family():
    assert {name for name, _, _ in THIN} == set(NAMED)
    assert {kind for _, kind, _ in THIN} == set(KINDS) and {tp for _, _, tp in THIN} == {1, 2, 4}


def logits(decoder) -> torch.Tensor:
    return decoder(packed([[3, 1, 4, 1, 5, 9, 2, 6]]), None)


@pytest.mark.parametrize("kind", ["fp16", "awq128"])
@pytest.mark.parametrize(
    ("shape", "tp"),
    [
        ({"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}, 4),
        ({"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 96}, 2),
    ],
    ids=["64", "96"],
)
def test_heads_that_are_not_of_128_are_written_as_they_are(tmp_path, shape, tp, kind):
    """v0.1.0 takes hidden / 128 for the number of heads, says nothing, and what it writes is another model."""
    size = shape.get("head_dim", 256 // shape["num_attention_heads"])
    row = replace(NAMED["llama2"], config=NAMED["llama2"].config | shape)
    row = replace(row, ingot={} if "head_dim" not in shape else {"hidden_size": 256})
    checkpoint, group_size = prepared(tmp_path / "model", row, kind)
    ours = converted(checkpoint, tmp_path / "made", row, tp=tp, group_size=group_size)
    assert ours == expected(checkpoint, row, tp=tp, group_size=group_size)
    theirs = expected(checkpoint, row, tp=tp, group_size=group_size, as_reference=True)
    turned = {name for name in ours if re.search(r"w_qkv\.\d\.(weight|qweight|scales_zeros)", name)}
    assert different(ours, theirs) >= turned | {"head_num", "size_per_head", "rotary_embedding"}
    assert Workspace(tmp_path / "made").config.head_dim == size
    source = load_checkpoint(checkpoint, allow_quantized=True)
    assert torch.equal(logits(load_workspace(tmp_path / "made", device="cpu", dtype=torch.float32)), logits(source))


@pytest.mark.parametrize(("inner", "tp"), [(384, 2), (640, 4)])
def test_groups_that_tp_does_not_divide_are_cut_at_their_borders(tmp_path, inner, tp):
    """v0.1.0 fails in the middle of it, with the old workspace gone."""
    row = replace(NAMED["llama2"], config=NAMED["llama2"].config | {"intermediate_size": inner})
    checkpoint, group_size = prepared(tmp_path / "model", row, "awq128")
    ours = converted(checkpoint, tmp_path / "made", row, tp=tp, group_size=group_size)
    assert ours == expected(checkpoint, row, tp=tp, group_size=group_size)


def test_a_tied_head_is_written_out(tmp_path):
    row = NAMED["llama2"]
    checkpoint, _ = prepared(tmp_path / "model", row, "fp16", tie_word_embeddings=True)
    ours = converted(checkpoint, tmp_path / "made", row, tp=2)
    assert different(ours, expected(checkpoint, row, tp=2, as_reference=True)) == {"output.weight"}
    assert ours["output.weight"] == ours["tok_embeddings.weight"]


def test_fewer_kv_heads_than_ranks_are_refused(tmp_path):
    row = NAMED["llama3"]
    checkpoint, _ = prepared(tmp_path / "model", row, "fp16", num_key_value_heads=2)
    theirs = expected(checkpoint, row, tp=4, as_reference=True)
    half_a_head = 64
    assert len(theirs["layers.0.attention.w_qkv.3.weight"]) == 1024 * (256 + 2 * half_a_head) * 2
    with pytest.raises(ValueError, match="2 key/value heads cannot be dealt to 4 ranks"):
        converted(checkpoint, tmp_path / "made", row, tp=4)
    assert not (tmp_path / "made").exists()


def test_what_auto_awq_left_is_read(tmp_path):
    """Pickled shards, scales in float32, statistics beside them, and no quantization_config."""
    row = NAMED["qwen"]
    checkpoint, group_size = prepared(tmp_path / "model", row, "awq128")
    ours = converted(checkpoint, tmp_path / "made", row, tp=2, group_size=group_size)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors = {name: tensor.float() if name.endswith("scales") else tensor for name, tensor in tensors.items()}
    (checkpoint / "model.safetensors").unlink()
    index = {}
    for at in range(2):
        shard = dict(list(tensors.items())[at::2])
        torch.save(shard, checkpoint / f"pytorch_model-{at}.bin")
        index |= dict.fromkeys(shard, f"pytorch_model-{at}.bin")
    (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    torch.save({"absmax": {}}, checkpoint / "inputs_stats.pth")
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    asked = Conversion(name=row.template, source=checkpoint, target=tmp_path / "again", model_format="awq", tp=2)
    with pytest.raises(ValueError, match=r"is a pickled file: with --allow-bin"):
        convert(asked)
    convert(replace(asked, allow_bin=True))
    assert {path.name: path.read_bytes() for path in (tmp_path / "again" / WEIGHTS).iterdir()} == ours
