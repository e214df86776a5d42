"""Runs stages in this process on a tiny checkpoint, as dvc.yaml does on the real one."""

import json
from pathlib import Path

from pipelines import calibrate, export, quantize, shard, sources
from pipelines.slices import Call

CALIBRATION = {"samples": 6, "sequence_length": 32, "sampling": "random", "seed": 1}
W4A16 = {
    "name": "w4a16",
    "group_size": 32,
    "search": "grid",
    "method": "awq+gptq",
    "symmetric": False,
    "clip": True,
    "correction": 0.5,
    "activation_exponents": [0.0, 0.4],
    "weight_exponents": [0.0, 1.0],
}
FORMULA = {"name": "w4a16", "group_size": 32, "search": "none", "alpha": 0.5}
W8A8 = {"name": "w8a8", "search": "grid", "alphas": [0.3, 0.6]}
FP16 = {"name": "fp16"}


class Build:
    """The stages of one checkpoint and one text; every method runs one and returns its output folder.

    The current folder must be one of the test's own: sources are found by its build/paths.json.
    """

    def __init__(
        self,
        root: Path,
        checkpoint: Path,
        text: Path,
        *,
        allow_bin: bool = False,
        template: str | None = None,
        ini: dict[str, int | float] | None = None,
    ) -> None:
        self.root, self.template, self.ini = root, template, ini
        self.model = {"kind": "folder", "digest": sources.folder_digest(checkpoint, allow_bin=allow_bin)}
        if allow_bin:
            self.model["allow_bin"] = True
        self.text = {"kind": "text", "digest": sources.text_digest(text), "column": "text"}
        paths = {sources.identity(self.model): str(checkpoint), sources.identity(self.text): str(text)}
        Path("build").mkdir(exist_ok=True)
        Path("build/paths.json").write_text(json.dumps(paths))

    def calibrate(self, **changes) -> Path:
        content = {"model": self.model, "calibration": {"text": self.text, **CALIBRATION, **changes}}
        return self._run(calibrate, "calibrate", content)

    def quantize(self, weights, calibrated: Path) -> Path:
        content = {"model": self.model, "weights": weights}
        return self._run(quantize, f"quantize-{weights['name']}", content, calibrate=calibrated)

    def shard(self, weights, quantized: Path, *, tp: int = 1) -> Path:
        content = {
            "model": self.model,
            "weights": {"name": weights["name"], "group_size": weights.get("group_size", 0), **further(weights)},
            "tp": tp,
        }
        return self._run(shard, f"shard-{weights['name']}-{tp}", content, quantize=quantized)

    def export(
        self, weights, kv: str, *, tp: int = 1, granularity: str = "tensor", symmetric: bool = False, **inputs: Path
    ) -> Path:
        recipe = {"weights": weights["name"], "kv": kv, "group_size": weights.get("group_size", 0)} | further(weights)
        recipe["kv_granularity"] = granularity
        finer = "" if granularity == "tensor" else f"-{granularity}"
        content = {
            "model": self.model,
            "name": "tiny",
            "session_len": 0,
            "recipe": recipe,
            "tp": tp,
            "kv": {"name": kv} if kv == "kv16" else {"name": kv, "granularity": granularity, "symmetric": symmetric},
            "calibration": None if (weights["name"], kv) == ("fp16", "kv16") else "0" * 64,
        }
        if self.template:
            content["template"] = self.template
        if self.ini:
            content["ini"] = self.ini
        return self._run(export, f"export-{weights['name']}-{tp}-{kv}{finer}", content, **inputs)

    def artifact(self, weights, kv: str, *, tp: int = 1, granularity: str = "tensor", symmetric: bool = False) -> Path:
        """All four stages."""
        calibrated = self.calibrate()
        quantized = self.quantize(weights, calibrated)
        sharded = self.shard(weights, quantized, tp=tp)
        inputs = {"shard": sharded, "quantize": quantized, "calibrate": calibrated}
        return self.export(weights, kv, tp=tp, granularity=granularity, symmetric=symmetric, **inputs)

    def _run(self, stage, name: str, content, **inputs: Path) -> Path:
        out = self.root / name
        stage.work(Call(slice=content, out=out, inputs=inputs))
        return out


def further(weights) -> dict[str, object]:
    return {name: weights[name] for name in ("head", "rotate_down") if name in weights}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
