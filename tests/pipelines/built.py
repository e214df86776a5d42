"""A project folder as it lies after a build, without building: published ids and statements."""

import json


def write_built(root, key, *, verdict="pass", gates=(), artifact="a" * 64, perplexity=2.0):
    """Write what `compose`, `evaluate` and `publish` leave behind for one artifact."""
    predicate = {
        "verdict": verdict,
        "metrics": {"perplexity": {"value": perplexity}, "kl_mean": {"value": None}},
        "gates": list(gates),
        "sizes": {"artifact_bytes": 1_500_000, "kv_bytes_per_token": 512},
    }
    for name, content in (
        (f"slices/publish/{key}.json", {}),
        (f"publish/{key}.json", {"id": artifact, "verdict": verdict}),
        (f"evaluate/{key}/statement.json", {"predicate": predicate}),
    ):
        path = root / "build" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def project_folder(root):
    """Make a folder be taken for a project."""
    (root / "conf").mkdir()
    (root / "conf/config.yaml").write_text("")
    (root / "dvc.yaml").write_text("stages: {}\n")
    return root


MISS = {
    "metric": "kl_mean",
    "value": 0.25,
    "verdict": "fail",
    "why": "the interval 0.2 to 0.3 is wholly beyond the bound, at most 0.05",
}
