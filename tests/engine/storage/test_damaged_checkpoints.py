"""Damaged checkpoints end in an error that names the file: no crash, no hang, no memory beyond the files' own size."""

import io
import json
import struct
from collections.abc import Iterator

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save

from engine.models.layouts import META
from tests.confined import Confined, DamagedFolder
from tests.damage import ODD_NUMBERS, Damage, damaged_bytes, damaged_json, damaged_value, encode, hold
from tests.engine.storage.tiny_configs import CONFIGS, checkpoint_files, tensors_of

FEW, MANY = 60, 2000
LLAMA = CONFIGS["llama"]
DOORS = "tests.engine.storage.doors"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def confined() -> Iterator[Confined]:
    process = Confined()
    yield process
    process.close()


def split(file: bytes) -> tuple[dict[str, object], bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def safetensors_damage() -> tuple[dict[str, bytes], Damage]:
    files = checkpoint_files(LLAMA)
    header, data = split(files["model.safetensors"])

    def joined(text: bytes, length: int | None, data: bytes) -> bytes:
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    lengths = st.sampled_from([None] * 8 + [n for n in ODD_NUMBERS if isinstance(n, int) and 0 <= n < 2**64])
    headers = st.one_of(damaged_value(header).map(encode), damaged_json(header), st.just(encode(header)))
    parts = st.sampled_from([data] * 5 + [data[:-1], data[: len(data) // 2], b"", data + b"\0", data * 2])
    damaged = st.one_of(st.builds(joined, headers, lengths, parts), damaged_bytes(files["model.safetensors"]))
    return files, damaged.map(lambda file: {"model.safetensors": file})


def index_damage() -> tuple[dict[str, bytes], Damage]:
    tensors = tensors_of(LLAMA)
    placed = {name: SHARDS[i % 2] for i, name in enumerate(sorted(tensors))}
    files = {shard: save({name: tensors[name] for name in placed if placed[name] == shard}) for shard in SHARDS}
    index = {"metadata": {"total_size": 0}, "weight_map": placed}
    files |= {"config.json": encode(LLAMA), "model.safetensors.index.json": encode(index)}
    damaged = damaged_json(index).map(lambda file: {"model.safetensors.index.json": file})
    return files, st.one_of(damaged, damaged, st.sampled_from([{name: None} for name in files]))


def config_damage() -> tuple[dict[str, bytes], Damage]:
    files = {name: checkpoint_files(config) for name, config in CONFIGS.items()}

    def of_family(name: str) -> Damage:
        return damaged_json(CONFIGS[name]).map(lambda file: files[name] | {"config.json": file})

    return files["llama"], st.sampled_from(sorted(CONFIGS)).flatmap(of_family)


def generation_damage() -> tuple[dict[str, bytes], Damage]:
    generation = {"eos_token_id": [2, 3], "bos_token_id": 1, "temperature": 0.6}
    files = checkpoint_files(LLAMA) | {"generation_config.json": encode(generation)}
    return files, damaged_json(generation).map(lambda file: {"generation_config.json": file})


def meta_damage() -> tuple[dict[str, bytes], Damage]:
    params = {"dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1}
    params |= {"rope_theta": 5e5, "use_scaled_rope": True, "rope_scaling_factor": 8, "multiple_of": 8}
    config = LLAMA | {"tie_word_embeddings": False}
    files = {"params.json": encode(params), "consolidated.00.safetensors": save(tensors_of(config, META))}
    return files, damaged_json(params).map(lambda file: {"params.json": file})


def pickled_damage() -> tuple[dict[str, bytes], Damage]:
    written = io.BytesIO()
    torch.save(tensors_of(LLAMA), written)
    files = {"config.json": encode(LLAMA), "pytorch_model.bin": written.getvalue()}
    return files, damaged_bytes(written.getvalue()).map(lambda file: {"pytorch_model.bin": file})


def unsaid_awq_damage() -> tuple[dict[str, bytes], Damage]:
    """HF-AWQ whose config.json says nothing about it: the sizes of groups are those of the tensors."""
    config = {name: value for name, value in CONFIGS["awq"].items() if name != "quantization_config"}
    files = checkpoint_files(CONFIGS["awq"]) | {"config.json": encode(config)}
    header, data = split(files["model.safetensors"])
    headers = damaged_value(header).map(encode)
    damaged = headers.map(lambda text: {"model.safetensors": struct.pack("<Q", len(text)) + text + data})
    return files, st.one_of(damaged, damaged, damaged_json(config).map(lambda file: {"config.json": file}))


FORMATS = {
    "safetensors": safetensors_damage,
    "index": index_damage,
    "config": config_damage,
    "generation": generation_damage,
    "meta": meta_damage,
    "pickled": pickled_damage,
    "unsaid awq": unsaid_awq_damage,
}


def look(confined: Confined, name: str, *, count: int, random: bool) -> dict[str, int]:
    files, damage = FORMATS[name]()
    door = "awq_checkpoint" if name == "unsaid awq" else "checkpoint"
    folder = DamagedFolder(confined, f"{DOORS}:{door}", files)
    try:
        return hold(folder, damage, count=count, random=random)
    finally:
        folder.close()


def headed(header: dict[str, object], data: bytes, *, length: int | None = None) -> dict[str, bytes]:
    text = encode(header)
    return {"model.safetensors": struct.pack("<Q", len(text) if length is None else length) + text + data}


def repeated() -> dict[str, bytes]:
    """Pickled weights of which one is a number that is repeated 2^40 times by a stride of 0."""
    written = io.BytesIO()
    torch.save(tensors_of(LLAMA) | {"model.norm.weight": torch.zeros(1).expand(1 << 40)}, written)
    return {"model.safetensors": None, "pytorch_model.bin": written.getvalue()}


def test_what_claims_more_than_there_is_is_refused_before_memory_is_taken(confined: Confined) -> None:
    files = checkpoint_files(LLAMA)
    header, data = split(files["model.safetensors"])
    name = "model.embed_tokens.weight"
    huge = {"dtype": "F32", "shape": [1 << 30, 1 << 30], "data_offsets": [0, 1 << 62]}
    folder = DamagedFolder(confined, f"{DOORS}:checkpoint", files)
    for damaged in (
        headed(header, data, length=1 << 60),
        headed(header, data, length=(1 << 64) - 1),
        headed(header | {name: huge}, data),
        headed(header | {name: huge | {"data_offsets": [0, 3072]}}, data),
        *({"config.json": encode(LLAMA | {field: 2**31 - 1})} for field in ("num_hidden_layers", "vocab_size")),
        {"config.json": encode(LLAMA | {"hidden_size": 1 << 60})},
        repeated(),
    ):
        assert folder.check(damaged) == "refused"
    folder.close()


@pytest.mark.parametrize("name", FORMATS)
def test_damage_ends_in_an_error_that_names_the_file(confined: Confined, name: str) -> None:
    assert look(confined, name, count=FEW, random=False)["refused"] > FEW // 4


@pytest.mark.soak
@pytest.mark.parametrize("name", FORMATS)
def test_damage_soak(confined: Confined, name: str, soak_row: dict[str, int]) -> None:
    soak_row["failures"] = 1
    outcomes = look(confined, name, count=MANY, random=True)
    soak_row |= {"count": sum(outcomes.values()), "failures": 0}
