"""The stage `publish`: put an artifact and what is known about it into the store, passing or not. Free of torch.

That is the statement about it, and the slices that it was built of, from which `ingot build --check` builds it again.

The output is a JSON file {id, verdict, statement: SHA-256 of statement.json}.
"""

from __future__ import annotations

from pathlib import Path

from engine.storage.store import Store
from pipelines.provenance import provenance
from pipelines.slices import PATHS, Call, read_slice, run_stage, write_json
from pipelines.sources import sha256_file


def work(call: Call) -> None:
    """Put the inputs `export` and `evaluate` into the store that compose found."""
    paths = read_slice(PATHS)
    store = Store(Path(paths["store"]))
    store.init(Path(paths["cache"]))
    artifact_id = store.put(call.inputs["export"])
    store.put_statement(artifact_id, call.inputs["evaluate"])
    known = {key: path for key, path in paths.items() if key not in ("store", "cache")}
    store.put_provenance(artifact_id, provenance(Path("build/slices"), call.slice["key"]), known)
    statement = call.inputs["evaluate"] / "statement.json"
    verdict = read_slice(statement)["predicate"]["verdict"]
    write_json(call.out, {"id": artifact_id, "verdict": verdict, "statement": sha256_file(statement)})


if __name__ == "__main__":
    raise SystemExit(run_stage(work))
