"""An artifact of three small files, for tests of storage that do not care what is in it."""

import json

from engine.config import Recipe
from engine.storage.artifacts import write_manifest

DIGEST = "12" * 32


def make_artifact(folder, *, content=b"some weights" * 100, only_manifest=False, **options):
    """Write the artifact (or only its manifest anew) and return its id."""
    if not only_manifest:
        for name, raw in {
            "triton_models/weights/a.weight": content,
            "triton_models/weights/config.ini": b"[llama]\nvocab_size = 3\n",
            "triton_models/tokenizer/tokenizer.json": b'{"model": 1}',
        }.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(raw)
    settings = {
        "recipe": Recipe(weights="w4a16", group_size=32),
        "sources": {"config.json": DIGEST},
        "calibration": None,
        "chat_template": None,
        "tp": 1,
    }
    return write_manifest(folder, **(settings | options))


def make_statement(folder, artifact_id, *, verdict="pass", device="cpu-avx2", evaluation="default"):
    """Write statement.json and goldens.json of an evaluation that nobody made; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "x", "digest": {"sha256": artifact_id}}],
        "predicateType": "https://example.org/evaluation/v1",
        "predicate": {"verdict": verdict, "device_class": device, "evaluation": evaluation},
    }
    (folder / "statement.json").write_text(json.dumps(statement))
    (folder / "goldens.json").write_text("[]")
    return folder
