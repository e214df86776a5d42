"""Damaged workspaces and manifests end in an error that names the file: no crash, no hang, no memory beyond its own."""

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

from engine.config import ModelConfig, Recipe, RopeScaling
from engine.storage.kv_scale_files import runs_file, write_kv_scales, write_layer_scales
from engine.storage.workspace import WEIGHTS
from tests.confined import Confined, DamagedFolder
from tests.damage import ODD_NUMBERS, ODD_TEXTS, Damage, damaged_bytes, damaged_json, damaged_value, encode, hold
from tests.engine.storage.tiny_artifact import make_artifact
from tests.engine.storage.tiny_workspace import SMALL, make_workspace, random_tensors

FEW, MANY = 60, 2000
INI = f"{WEIGHTS}/config.ini"
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=1.1)
MODEL = replace(SMALL, hidden_size=32, num_layers=1, head_dim=8, intermediate_size=32, max_position_embeddings=64)
Format = Callable[[Path], tuple[str, dict[str, bytes], Damage]]
DOORS = "tests.engine.storage.doors"


@pytest.fixture(scope="module")
def confined() -> Iterator[Confined]:
    process = Confined()
    yield process
    process.close()


def files_of(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return dict(sorted(found.items()))


def workspace_files(folder: Path, config: ModelConfig, recipe: Recipe, tp: int) -> dict[str, bytes]:
    make_workspace(folder, config, recipe, tp, random_tensors(config, recipe))
    if recipe.kv_granularity == "channel":
        rows = torch.tensor([0.1, 0.0, 0.2, 1.0]).expand(config.num_kv_heads, config.head_dim, 4)
        write_layer_scales(folder / WEIGHTS, 0, rows, granularity="channel", tp=tp)
    elif recipe.kv == "kv8":
        write_kv_scales(folder / WEIGHTS, 0, [[0.1, 0.0, 0.2, 1.0]] * tp)
    return files_of(folder)


@st.composite
def changed_ini(draw: st.DrawFn, valid: bytes, scaling: dict[str, object]) -> bytes:
    """A config.ini with lines changed: values, keys, sections, order."""
    lines = valid.decode().splitlines()
    texts = [str(number) for number in ODD_NUMBERS] + ODD_TEXTS + ["1_0", "0x10", "1e3", "१", "%(x)s", "9" * 5000]
    keys = [
        "rope_scaling",
        "hidden_size",
        "qk_norm",
        "sliding_window",
        "kv_granularity",
        "nothing",
        "[",
        "=",
        "; x",
        "Head_num",
    ]
    for _ in range(draw(st.integers(1, 3))):
        index = draw(st.integers(0, len(lines) - 1))
        key, _, value = lines[index].partition(" = ")
        odd = draw(st.one_of(st.sampled_from(texts), st.integers().map(str), st.floats().map(str), st.text(max_size=8)))
        match draw(st.sampled_from(["value"] * 5 + ["number", "ours", "scaling", "remove", "double", "key", "swap"])):
            case "value" if value:
                lines[index] = f"{key} = {odd}"
            case "number" if value.isdigit():
                lines[index] = (
                    f"{key} = {int(value) * draw(st.sampled_from([2, 3, 1024, 10**9])) + draw(st.integers(-1, 1))}"
                )
            case "ours":
                lines += ["[ingot]"] * ("[ingot]" not in lines) + [f"{draw(st.sampled_from(keys))} = {odd}"]
            case "scaling":
                text = encode(draw(damaged_value(scaling))).decode()
                lines = [line for line in lines if not line.startswith("rope_scaling = ")]
                lines += ["[ingot]"] * ("[ingot]" not in lines) + [f"rope_scaling = {text}"]
            case "remove" if len(lines) > 1:
                del lines[index]
            case "double":
                lines.insert(index, lines[index])
            case "key":
                lines[index] = f"{draw(st.sampled_from(keys))} = {value}"
            case "swap":
                lines[index], lines[0] = lines[0], lines[index]
    return "\n".join(lines).encode(errors="surrogatepass") + b"\n"


def ini_damage(folder: Path) -> tuple[str, dict[str, bytes], Damage]:
    files = workspace_files(folder / "plain", MODEL, Recipe(), 1)
    scaled = workspace_files(folder / "scaled", replace(MODEL, rope_scaling=YARN, qk_norm=True, logn=True), Recipe(), 1)
    int4 = workspace_files(folder / "int4", MODEL, Recipe(weights="w4a16", group_size=32), 2)
    int8 = workspace_files(folder / "int8", replace(MODEL, dtype="bfloat16"), Recipe(weights="w8a8"), 2)
    kinds = st.sampled_from([files, scaled, int4, int8])
    scaling = {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 16}

    def of_kind(kind: dict[str, bytes]) -> Damage:
        damaged = st.one_of(*[changed_ini(kind[INI], scaling)] * 3, damaged_bytes(kind[INI]))
        return damaged.map(lambda text: kind | {INI: text})

    return f"{DOORS}:workspace", files, kinds.flatmap(of_kind)


def size_damage(folder: Path) -> tuple[str, dict[str, bytes], Damage]:
    """Weight files and KV scales of a wrong size, missing, or exchanged; bytes within are any weights."""
    files = workspace_files(folder / "a", MODEL, Recipe(weights="w4a16", kv="kv8", group_size=32), 2)
    files[f"{WEIGHTS}/{runs_file(0)}"] = struct.pack("<8f", *[0.1, 0.0, 0.2, 1.0] * 2)
    return any_size(files)


def channel_damage(folder: Path) -> tuple[str, dict[str, bytes], Damage]:
    """The same where KV scales are of channels."""
    return any_size(workspace_files(folder / "a", MODEL, Recipe(kv="kv8", kv_granularity="channel"), 2))


def any_size(files: dict[str, bytes]) -> tuple[str, dict[str, bytes], Damage]:
    names = [name for name in files if name != INI]

    def sized(name: str) -> Damage:
        content = files[name]
        sizes = [content[:-1], content + b"\0", b"", content * 2, content[: len(content) // 2], content[16:]]
        return st.one_of(
            st.sampled_from([None, *sizes]),
            damaged_bytes(content),
            st.sampled_from(names).map(lambda other: files[other]),
        ).map(lambda changed: {name: changed})

    return f"{DOORS}:workspace", files, st.sampled_from(names).flatmap(sized)


def manifest_damage(folder: Path) -> tuple[str, dict[str, bytes], Damage]:
    (folder / "artifact").mkdir()
    make_artifact(folder / "artifact")
    files = files_of(folder / "artifact")
    content = json.loads(files["manifest.json"])
    canonical = damaged_value(content).map(
        lambda value: (
            json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
            + b"\n"
        )
    )
    damaged = st.one_of(canonical, canonical, damaged_json(content), damaged_bytes(files["manifest.json"]))
    return f"{DOORS}:artifact", files, damaged.map(lambda text: {"manifest.json": text})


FORMATS: dict[str, Format] = {
    "config.ini": ini_damage,
    "sizes": size_damage,
    "channels": channel_damage,
    "manifest": manifest_damage,
}


def look(confined: Confined, tmp_path: Path, name: str, *, count: int, random: bool) -> dict[str, int]:
    door, files, damage = FORMATS[name](tmp_path)
    folder = DamagedFolder(confined, door, files)
    try:
        return hold(folder, damage, count=count, random=random)
    finally:
        folder.close()


def test_what_claims_more_than_there_is_is_refused_before_memory_is_taken(confined: Confined, tmp_path: Path) -> None:
    files = workspace_files(tmp_path, MODEL, Recipe(weights="w4a16", group_size=32), 2)
    folder = DamagedFolder(confined, f"{DOORS}:workspace", files)
    lines = dict(line.split(" = ") for line in files[INI].decode().splitlines() if " = " in line)
    most = 2**31 - 1
    for changed in (
        *({key: most} for key in ("num_layer", "vocab_size", "inter_size", "head_num", "group_size")),
        {"tensor_para_size": 1 << 30, "head_num": 1 << 30, "kv_head_num": 1 << 30},
        {"inter_size": (most // 32) * 32, "head_num": 1 << 29, "kv_head_num": 1, "group_size": 3},
    ):
        text = "\n".join(["[llama]", *(f"{key} = {value}" for key, value in (lines | changed).items())])
        assert folder.check({INI: text.encode()}) == "refused"
    folder.close()


@pytest.mark.parametrize("name", FORMATS)
def test_damage_ends_in_an_error_that_names_the_file(confined: Confined, tmp_path: Path, name: str) -> None:
    assert look(confined, tmp_path, name, count=FEW, random=False)["refused"] > FEW // 4


@pytest.mark.soak
@pytest.mark.parametrize("name", FORMATS)
def test_damage_soak(confined: Confined, tmp_path: Path, name: str, soak_row: dict[str, int]) -> None:
    soak_row["failures"] = 1
    outcomes = look(confined, tmp_path, name, count=MANY, random=True)
    soak_row |= {"count": sum(outcomes.values()), "failures": 0}
