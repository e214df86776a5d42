"""conf/ + params.yaml + what lies on this machine -> one slice per stage instance. The first stage, run every time.

It reads what DVC cannot see (configuration groups, the content of sources, the toolchain), and writes
`build/slices/<stage>/<key>.json`: sorted keys, digests and never paths, and only what that stage instance needs, so
that DVC reruns exactly what a change concerns. Where sources and the store lie is in `build/paths.json`, on which no
stage depends. Slices, by stage (key):

    calibrate  model-calibration                {model, calibration: {text | parts: {name: {text, weight}}, samples,
                                                 sequence_length, sampling, [seed]}, [template], toolchain}
    quantize   model-calibration-weights        fp16: {model, weights: {name}}
                                                as_is: the same; what the checkpoint has is seen when it is read
                                                w8a8: {model, weights: {name, search, alpha | alphas, [rotate_down]},
                                                 toolchain}
                                                w4a16: {model, weights: {name, group_size, search, alpha |
                                                 method, symmetric and what the method uses}, toolchain}
    shard      model-calibration-weights-tp     {model, weights: {name, group_size, [head], [rotate_down]}, tp}
                                                 (group_size 0: all but w4a16)
    export     ...-tp-kv                        {model, name, session_len, [template], [ini: {key: value}], tp,
                                                 kv: {name, [granularity, [symmetric]]},
                                                 recipe: {weights, kv, group_size, [head], [rotate_down],
                                                 [kv_granularity]},
                                                 calibration: SHA-256 of the calibration part above, or null where
                                                 nothing of it is in the artifact (fp16 or as_is, with kv16
                                                 or scales of every token)}
    baseline   model-evaluation                 {model, [template], evaluation: {text, sequence_length, max_tokens,
                                                 questions: record | null, answer_tokens}, toolchain}
    evaluate   ...-tp-kv                        {evaluation: {name, sequence_length, answer_tokens, gates: {confidence,
                                                 <metric>_max | <metric>_min: bound}}, toolchain}
    publish    ...-tp-kv                        {key, evaluation: name, store: the store's own id}

`model`, `text` and `questions` are source records (see pipelines/sources.py; `slices.locate(record)` answers with the
path). A text's record also has `column`, and for data sets `repo`, `subset`, `split`.
`toolchain` is {torch, transformers, triton, device}. Beside them, `code/<stage>.json` (for quantize
`code/quantize-<weights>.json`) holds the SHA-256 of every file of code that the stage can reach.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines import schema, slices, sources
from pipelines.code import Code
from pipelines.ini_options import written
from pipelines.quantized_source import check_weights
from pipelines.recipe_fields import UNCALIBRATED, weights_part
from pipelines.selection import Row, read_rows, read_selection
from pipelines.text_options import Calibration, Text, text_parts
from pipelines.toolchain import toolchain
from pipelines.worktree import cache_folder

STORE_ID = ".ingot-store"
STAGES = ("calibrate", "shard", "export", "baseline", "evaluate", "publish")  # quantize is there once a recipe


class Sources:
    """The sources that rows name: their records for the slices, and where they lie."""

    def __init__(self, root: Path, memory: sources.Memory) -> None:
        self.root = root
        self.paths: dict[str, str] = {}
        self._memory = memory
        self._records: dict[tuple[Any, ...], dict[str, Any]] = {}

    def model(self, model: schema.Model) -> dict[str, Any]:
        """The record of a checkpoint."""
        allowed = {"allow_bin": True} if model.allow_bin else {}
        if not model.repo:
            return self._local({"kind": "folder", **allowed}, "model", model.path, model.digest)
        from pipelines.hub import cached

        record = {"kind": "hub", "repo": model.repo, "revision": model.revision, **allowed}
        if sources.identity(record) not in self.paths:
            folder = cached(model.repo, str(model.revision), allow_bin=model.allow_bin)
            if folder:
                self.paths[sources.identity(record)] = str(folder)
        return record

    def text(self, key: str, text: Text) -> dict[str, Any]:
        """The record of a text or a named data set, with the options that say how it is read."""
        column = text.column or ("messages" if text.kind == "chat" else "text")
        if text.kind in ("text", "chat"):
            return {**self._local({"kind": text.kind}, key, text.path, text.digest), "column": column}
        record: dict[str, Any] = {"kind": "dataset", "name": text.kind}
        if text.path or text.digest:
            record = self._local(record, key, text.path, text.digest)
        else:
            record |= {"repo": text.repo, "revision": text.revision, "subset": text.subset}
        return {**record, "split": text.split, "column": column}

    def calibration(self, calibration: Calibration) -> dict[str, Any]:
        """The part `calibration` of the slices. ValueError for a text that is two parts: it would be taken twice."""
        texts = {key: self.text(key, text) for key, text in text_parts(calibration).items()}
        options = _fields(calibration, "samples", "sequence_length", "sampling")
        options |= _fields(calibration, "seed") if calibration.sampling in ("random", "first") else {}
        if not calibration.parts:
            return {"text": texts["calibration"], **options}
        found: dict[str, str] = {}
        for key, record in texts.items():
            one = found.setdefault(json.dumps(record, sort_keys=True), key)
            if one != key:
                raise ValueError(
                    f"{one} and {key} are the same text: take one of them out and raise the other's weight."
                )
        parts = zip(calibration.parts.items(), texts.values(), strict=True)
        return {"parts": {name: {"text": text, "weight": part.weight} for (name, part), text in parts}, **options}

    def questions(self, evaluation: schema.Evaluation) -> dict[str, Any] | None:
        """The record of the questions, or None where there are none."""
        if not evaluation.questions and not evaluation.questions_digest:
            return None
        return self._local({"kind": "text"}, "evaluation.questions", evaluation.questions, evaluation.questions_digest)

    def _local(self, record: dict[str, Any], key: str, path: str | None, pinned: str | None) -> dict[str, Any]:
        asked = (record["kind"], path, pinned, sources.pickled(record))
        if asked in self._records:
            return {**record, "digest": self._records[asked]["digest"]}
        place = (self.root / path).resolve() if path else None
        if place is None or not place.exists():
            if not pinned:
                raise FileNotFoundError(
                    f"{key} names {place}, which does not exist. Correct the path, or pin the content by its digest:"
                    " a source that is absent and pinned is enough for what is already built."
                )
            found = pinned
        else:
            found = sources.measure(record, place, self._memory.sha256)
            if pinned and found != pinned:
                raise ValueError(f"{place} has the digest {found}, but {key} is pinned to {pinned}.")
            self.paths[f"sha256:{found}"] = str(place)
        self._records[asked] = {**record, "digest": found}
        return dict(self._records[asked])


def row_slices(row: Row, known: Sources, tools: Mapping[str, str | None], store_id: str) -> dict[str, dict[str, Any]]:
    """The slices of one row, by `stage/key`. Only what a stage instance needs enters its slice."""
    config = row.config
    model, weights, kv = known.model(config.model), weights_part(config.weights), _kv(config.kv)
    if folder := known.paths.get(sources.identity(model)):
        check_weights(Path(folder), weights["name"])
    calibration = known.calibration(config.calibration)
    further: dict[str, Any] = {name: weights[name] for name in ("head", "rotate_down") if name in weights}
    recipe = {"weights": weights["name"], "kv": kv["name"], "group_size": weights.get("group_size", 0), **further}
    if kv["name"] != "kv16":
        recipe["kv_granularity"] = kv["granularity"]
    calibrated = recipe["weights"] not in UNCALIBRATED or kv.get("granularity", "token") != "token"
    measured = {
        "text": known.text("evaluation.text", config.evaluation.text),
        "questions": known.questions(config.evaluation),
        **_fields(config.evaluation, "sequence_length", "max_tokens", "answer_tokens"),
    }
    bounds = {name: bound for name, bound in asdict(config.evaluation.gates).items() if bound is not None}
    gated = _fields(config.evaluation, "name", "sequence_length", "answer_tokens")
    gated["gates"] = {**bounds, "confidence": config.evaluation.confidence}
    quantize = {"model": model, "weights": weights} | (
        {} if weights["name"] in UNCALIBRATED else {"toolchain": dict(tools)}
    )
    template = {} if config.model.template is None else {"template": config.model.template}
    rendered = template if any(text.kind == "chat" for text in text_parts(config.calibration).values()) else {}
    ini = written(config.ini)
    m, c, w, tp = row.model, row.calibration, row.weights, row.tp
    return {
        f"calibrate/{m}-{c}": {"model": model, "calibration": calibration, **rendered, "toolchain": dict(tools)},
        f"quantize/{m}-{c}-{w}": quantize,
        f"shard/{m}-{c}-{w}-{tp}": {
            "model": model,
            "weights": {"name": recipe["weights"], "group_size": recipe["group_size"], **further},
            "tp": config.tp,
        },
        f"export/{row.key}": {
            "model": model,
            "name": config.model.name,
            "session_len": config.model.session_len,
            **template,
            **({"ini": ini} if ini else {}),
            "recipe": recipe,
            "tp": config.tp,
            "kv": kv,
            "calibration": _digest(calibration) if calibrated else None,
        },
        f"baseline/{m}-{row.evaluation}": {
            "model": model,
            "evaluation": measured,
            **template,
            "toolchain": dict(tools),
        },
        f"evaluate/{row.key}": {"evaluation": gated, "toolchain": dict(tools)},
        f"publish/{row.key}": {"key": row.key, "evaluation": config.evaluation.name, "store": store_id},
    }


def all_slices(rows: Sequence[Row], known: Sources, store_id: str) -> dict[str, dict[str, Any]]:
    """The slices of all rows. ValueError when two rows that share a slice do not agree on it."""
    tools = toolchain()
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        for name, content in row_slices(row, known, tools, store_id).items():
            if found.setdefault(name, content) != content:
                raise ValueError(
                    f"{row.key} needs another {name} than a row that shares it: {_difference(found[name], content)}."
                    " An interpolation ties a field of a shared stage to an axis that the stage does not have."
                )
    return found


def all_code(root: Path, rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """The digests of the code that each stage can reach, by `code/stage`; of quantize, for each weights option."""
    code = Code(root)
    found = {f"code/{stage}": code.digests(stage) for stage in STAGES}
    return found | {f"code/quantize-{row.weights}": code.digests("quantize", row.config.weights.name) for row in rows}


def store_identity(store: Path) -> str:
    """The id of the store folder, made with it. With it in publish's slice, a new store is filled again."""
    marker = store / STORE_ID
    if not marker.is_file():
        store.mkdir(parents=True, exist_ok=True)
        temporary = marker.with_name(f"{STORE_ID}.tmp-{uuid.uuid4().hex}")
        temporary.write_text(uuid.uuid4().hex + "\n", encoding="utf-8")
        temporary.replace(marker)
    return marker.read_text(encoding="utf-8").strip()


def write_slices(root: Path) -> dict[str, dict[str, Any]]:
    """Compose everything that params.yaml of this project selects, and write slices and paths. Returns the slices."""
    rows = read_rows(root, read_selection(root / "params.yaml"))
    memory = sources.Memory(root / slices.MEMORY)
    known = Sources(root, memory)
    store = (root / rows[0].config.store).resolve()
    content = all_slices(rows, known, store_identity(store))
    memory.save()
    slices.write_json(root / slices.PATHS, {**known.paths, "store": str(store), "cache": str(cache_folder(root))})
    with slices.output(root / "build/slices") as folder:
        for name, value in {**content, **all_code(root, rows)}.items():
            slices.write_json(folder / f"{name}.json", value)
    return content


def main() -> int:
    """Write the slices of the project in the current folder."""
    slices.die_with_parent()
    try:
        write_slices(Path.cwd())
    except (ValueError, OSError) as error:
        print(f"compose: {error}", file=sys.stderr)
        return 1
    return 0


def _kv(kv: schema.KV) -> dict[str, Any]:
    """The part `kv` of a slice: the fields that it uses."""
    if kv.name == "kv16":
        return {"name": kv.name}
    return _fields(kv, "name", "granularity", *(() if kv.granularity == "token" else ("symmetric",)))


def _fields(value: object, *names: str) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    keys = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
    return ", ".join(f"{key} {json.dumps(one.get(key))} and {json.dumps(other.get(key))}" for key in keys)


if __name__ == "__main__":
    # It has no options: what is asked for stands in conf/ and params.yaml. Given one, it says so.
    argparse.ArgumentParser(prog="python -m pipelines.compose", description=__doc__).parse_args()
    raise SystemExit(main())
