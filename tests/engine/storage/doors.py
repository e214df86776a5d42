"""What is opened, and how far, when damaged checkpoints and workspaces are looked at in a process of their own."""

from pathlib import Path

import torch

from engine.models.batch import packed
from engine.models.decoder import Decoder
from engine.storage.artifacts import read_manifest, verify
from engine.storage.checkpoint import Checkpoint
from engine.storage.workspace import Workspace

TOKENS = 3


def checkpoint(folder: Path) -> None:
    opened = Checkpoint(folder, allow_bin=True, allow_quantized=True)
    run(Decoder(opened.config, opened.weights(), device="cpu", dtype=torch.float32))


def awq_checkpoint(folder: Path) -> None:
    opened = Checkpoint(folder, allow_quantized=True, unsaid_awq=True)
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.qweight"):
        opened.tensor(name)


def workspace(folder: Path) -> None:
    opened = Workspace(folder)
    opened.kv_scales()
    run(Decoder(opened.config, opened.weights(), device="cpu", dtype=torch.float32))


def artifact(folder: Path) -> None:
    str(read_manifest(folder).recipe)
    verify(folder)


def run(model: Decoder) -> None:
    """One sequence of a few tokens through the model, without a cache."""
    model(packed([[0] * TOKENS]), None)
