"""The demo's artifacts are what is committed, and what breaks them on purpose is found and named."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.models import names
from engine.storage.artifacts import read_manifest, write_manifest
from engine.storage.checkpoint import Checkpoint
from engine.storage.kv_scale_files import channels_file
from engine.storage.workspace import WEIGHTS, write_weights
from pipelines.quant.stream import LayerTensors, side_by_side
from pipelines.quant.w4a16 import feedback, method
from pipelines.quant.w4a16.feedback import round_block
from pipelines.quant.w4a16.layer import quantize_by_search
from pipelines.quant.walk import Walk
from pipelines.toolchain import device_class
from tests.pipelines.chain import Chain
from tests.regression.ladder import (
    PROJECT,
    RUNGS,
    built_chain,
    compare,
    compare_tensors,
    key,
    measure,
    read_goldens,
    sketches,
)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return built_chain(tmp_path_factory.mktemp("ladder"))


@pytest.fixture(scope="module")
def goldens() -> tuple[dict[str, Any], bool]:
    found, exact = read_goldens()
    if not exact:
        warnings.warn(
            f"no goldens of the device class {device_class()} are committed: compared by tolerance only, not ids, "
            "files or greedy tokens (record them with `python -m tests.regression.record`)",
            stacklevel=1,
        )
    return found, exact


@pytest.mark.parametrize("rung", RUNGS)
def test_a_rung_is_what_was_recorded(chain: Chain, goldens: tuple[dict[str, Any], bool], rung: str) -> None:
    recorded, exact = goldens
    assert compare(recorded[rung], measure(chain.artifact(key(rung))), exact=exact) == []


def test_a_wrong_rope_base_is_named(chain: Chain, goldens: tuple[dict[str, Any], bool]) -> None:
    rung = "fp16-1-kv16"
    found = compare(goldens[0][rung], measure(chain.artifact(key(rung)), rope_theta=20000.0), exact=False)
    assert found
    assert found[0].startswith("model.layers.0.self_attn.k deviates by")
    assert "rope_theta" in found[0]


def test_swapped_gate_and_up_in_the_engine_are_named(
    chain: Chain, goldens: tuple[dict[str, Any], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    rung = "w4a16-1-kv8"
    folder = chain.artifact(key(rung))
    monkeypatch.setattr(names, "GATE_UP", names.GATE_UP[::-1])
    found = compare(goldens[0][rung], measure(folder), exact=False)
    assert found
    assert found[0].startswith("the input of model.layers.0.mlp.down_proj deviates by")
    assert "mlp.gate_proj or mlp.up_proj (model.layers.0)" in found[0]


def test_swapped_gate_and_up_of_one_layer_on_disk_are_named(
    chain: Chain, goldens: tuple[dict[str, Any], bool], tmp_path: Path
) -> None:
    rung = "fp16-1-kv16"
    folder = tmp_path / "artifact"
    shutil.copytree(chain.artifact(key(rung)), folder)
    checkpoint = Checkpoint(PROJECT / "demo/model")
    swapped = {"model.layers.2.mlp.gate_proj.weight": "model.layers.2.mlp.up_proj.weight"}
    swapped |= {up: gate for gate, up in swapped.items()}

    def tensor(name: str) -> Tensor:
        return checkpoint.tensor(swapped.get(name, name))

    manifest = read_manifest(folder)
    write_weights(folder / WEIGHTS, checkpoint.config, tensor, recipe=manifest.recipe, tp=1)
    _rewrite_manifest(folder)
    here = measure(folder)
    found = compare(goldens[0][rung], here, exact=False)
    assert {message.split()[0] for message in found[:2]} == set(swapped)
    assert any("the input of model.layers.2.mlp.down_proj deviates" in message for message in found[2:])
    # Bytes of the recorded device class name the files as well.
    files = {**goldens[0][rung], "files": measure(chain.artifact(key(rung)))["files"]}
    exact = compare(files, here, exact=True)
    assert any("layers.2.feed_forward." in message and "not what it was" in message for message in exact)


def test_a_changed_rounding_is_named(
    chain: Chain, goldens: tuple[dict[str, Any], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rounded_down(block: Tensor, corner: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
        return round_block(block - scales / 2, corner, scales, zeros)

    recorded = {
        name: sketch
        for name, sketch in goldens[0]["w4a16-1-kv16"]["weights"].items()
        if name.startswith("model.layers.0.")
    }
    # The first layer is enough: building all of them again would take as long as everything else here. That it is what
    # was recorded when rounded right, the rung's own test says.
    monkeypatch.setattr(feedback, "round_block", rounded_down)
    found = compare_tensors(recorded, sketches(_first_layer(chain)))
    named = {message.split(" deviates by ")[0] for message in found}
    assert named == {f"model.layers.0.{module}.weight" for module in names.LINEARS}


def test_wrong_kv_scales_are_named(goldens: tuple[dict[str, Any], bool], chain: Chain, tmp_path: Path) -> None:
    rung = "fp16-1-kv8"
    folder = tmp_path / "artifact"
    shutil.copytree(chain.artifact(key(rung)), folder)
    path = folder / WEIGHTS / channels_file(1)
    scales = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32) * 1.1
    path.write_bytes(scales.numpy().tobytes())
    _rewrite_manifest(folder)
    found = compare(goldens[0][rung], measure(folder), exact=False)
    assert [message.split(" deviates")[0] for message in found[:2]] == [
        f"model.layers.1.self_attn.{kind} (KV scales)" for kind in ("k", "v")
    ]


@torch.inference_mode()
def _first_layer(chain: Chain) -> dict[str, Tensor]:
    """The first layer as the stage `quantize` makes it: norms, and 4-bit weights as what the engine multiplies by."""
    checkpoint, wanted = Checkpoint(PROJECT / "demo/model"), chain.slices["quantize/demo-demo_text-w4a16"]["weights"]
    blocks = load_file(chain.root / "build/calibrate/demo-demo_text/blocks.safetensors")["tokens"]
    tensors = LayerTensors(checkpoint, 0)
    with side_by_side() as workers:
        here = Walk(checkpoint, blocks, workers, drift=True, device="cpu").layer(0, tensors)
        quantized = quantize_by_search(tensors, here.inputs, checkpoint.config, method(wanted), workers)
    return {names.layer_name(0, name): tensor for name, tensor in quantized.dense().items()}


def _rewrite_manifest(folder: Path) -> None:
    manifest = read_manifest(folder)
    write_manifest(
        folder,
        recipe=manifest.recipe,
        sources=manifest.sources,
        calibration=manifest.calibration,
        chat_template=manifest.chat_template,
        tp=manifest.tp,
    )
