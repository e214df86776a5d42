"""Runs the stages of one model in a folder of its own, function by function, each at most once and without DVC."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines import baseline, calibrate, evaluate, export, quantize, shard
from pipelines.compose import Sources, row_slices
from pipelines.schema import KV, Calibration, Config, Evaluation, Gates, Model, Text, Weights
from pipelines.selection import Row
from pipelines.slices import MEMORY, PATHS, Call
from pipelines.sources import Memory
from pipelines.toolchain import toolchain


class Chain:
    """Stage outputs under `root`/build, made when asked for; `slices` by "stage/key", as compose writes them."""

    def __init__(self, root: Path, rows: Sequence[Row], *, project: Path) -> None:
        """`project` is the folder that paths in the rows are relative to."""
        self.root = root
        known = Sources(project, Memory(root / MEMORY))
        self.slices: dict[str, dict[str, Any]] = {}
        for row in rows:
            self.slices |= row_slices(row, known, toolchain(), "no store")
        paths = root / PATHS
        paths.parent.mkdir(parents=True, exist_ok=True)
        paths.write_text(json.dumps(known.paths))

    def artifact(self, key: str) -> Path:
        """The exported artifact of `model-calibration-weights-tp-kv`."""
        model, calibration, weights, tp, _ = key.split("-")
        calibrated = self.run(calibrate, f"{model}-{calibration}")
        quantized = self.run(quantize, f"{model}-{calibration}-{weights}", calibrate=calibrated)
        sharded = self.run(shard, f"{model}-{calibration}-{weights}-{tp}", quantize=quantized)
        return self.run(export, key, shard=sharded, quantize=quantized, calibrate=calibrated)

    def baseline(self, key: str) -> Path:
        """The baseline of `model-evaluation`."""
        return self.run(baseline, key)

    def evaluation(self, key: str, evaluation: str) -> Path:
        """The evaluation of an artifact against the baseline of its model."""
        model, calibration, *_ = key.split("-")
        kept, calibrated = self.baseline(f"{model}-{evaluation}"), self.run(calibrate, f"{model}-{calibration}")
        return self.run(evaluate, key, export=self.artifact(key), baseline=kept, calibrate=calibrated)

    def run(self, stage: Any, key: str, **inputs: Path) -> Path:
        name = stage.__name__.rpartition(".")[2]
        out = self.root / "build" / name / key
        if not out.exists():
            with contextlib.chdir(self.root):
                stage.work(Call(slice=self.slices[f"{name}/{key}"], out=out, inputs=inputs))
        return out


def tiny_rows(
    checkpoint: Path,
    text: Path,
    recipes: Sequence[tuple[str, str]],
    *,
    questions: Path | None = None,
    gates: Mapping[str, float] | None = None,
) -> list[Row]:
    """A row for each (weights, kv) of a tiny checkpoint, calibrated and evaluated on the same few tokens."""
    rows = []
    for weights, kv in recipes:
        config = Config(
            model=Model(name="tiny", path=str(checkpoint)),
            calibration=Calibration(name="c", path=str(text), samples=4, sequence_length=16, sampling="first"),
            weights=Weights(name=weights, group_size=32, activation_exponents=[0.0, 0.4], weight_exponents=[0.0]),
            kv=KV(name=kv),
            evaluation=Evaluation(
                name="e",
                text=Text(path=str(text)),
                sequence_length=24,
                max_tokens=24 * 20,
                questions=None if questions is None else str(questions),
                answer_tokens=4,
                gates=Gates(**(gates or {})),
            ),
        )
        rows.append(Row(model="tiny", calibration="c", weights=weights, tp=1, kv=kv, evaluation="e", config=config))
    return rows
