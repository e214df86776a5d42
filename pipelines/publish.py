"""The stage `publish`: put an artifact and the statement about it into the store, passing or not. Free of torch.

The output is a JSON file {id, verdict, statement: SHA-256 of statement.json}.
"""

from __future__ import annotations

from pathlib import Path

from engine.storage.store import Store
from pipelines.slices import PATHS, Call, read_slice, run_stage, write_json
from pipelines.sources import sha256_file


def work(call: Call) -> None:
    """Put the inputs `export` and `evaluate` into the store that compose found."""
    paths = read_slice(PATHS)
    store = Store(Path(paths["store"]))
    store.init(Path(paths["cache"]))
    artifact_id = store.put(call.inputs["export"])
    store.put_statement(artifact_id, call.inputs["evaluate"])
    statement = call.inputs["evaluate"] / "statement.json"
    verdict = read_slice(statement)["predicate"]["verdict"]
    write_json(call.out, {"id": artifact_id, "verdict": verdict, "statement": sha256_file(statement)})


if __name__ == "__main__":
    raise SystemExit(run_stage(work))
