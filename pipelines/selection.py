"""What params.yaml selects, as rows: one resolved, typed and checked configuration for each artifact to build."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipelines import schema
from pipelines.hydra_errors import paragraph
from pipelines.ini_options import check_overrides
from pipelines.schema import Config

AXES = {"models": "model", "calibrations": "calibration", "weights": "weights", "kvs": "kv", "tps": "tp"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """params.yaml: the names of what is to be built, on each axis, and overrides for all of it."""

    models: list[str]
    calibrations: list[str]
    weights: list[str]
    kvs: list[str]
    tps: list[int]
    evaluation: str
    overrides: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One artifact to build: its names on the axes, and its resolved configuration."""

    model: str
    calibration: str
    weights: str
    tp: int
    kv: str
    evaluation: str
    config: Config

    @property
    def key(self) -> str:
        """`model-calibration-weights-tp-kv`, as DVC names its stages."""
        return f"{self.model}-{self.calibration}-{self.weights}-{self.tp}-{self.kv}"


def read_selection(path: Path) -> Selection:
    """params.yaml, checked. ValueError names the line that is missing, unknown or not of its type."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    fields = {**dict.fromkeys(AXES, list), "evaluation": str, "overrides": list}
    if not isinstance(content, dict) or set(content) != set(fields):
        found = sorted(content) if isinstance(content, dict) else content
        raise ValueError(f"{path} must hold exactly {', '.join(sorted(fields))}; it holds {found}.")
    for key, kind in fields.items():
        if not isinstance(content[key], kind) or (key in AXES and not content[key]):
            raise ValueError(f"{path}: {key} must be a {kind.__name__} that is not empty, not {content[key]!r}.")
    for key in AXES:
        pattern = r"[1-9][0-9]*" if key == "tps" else r"[a-z0-9_]+"
        for value in content[key]:
            if not re.fullmatch(pattern, str(value)):
                raise ValueError(f"{path}: {key} holds {value!r}; a name has only a-z, 0-9 and _, a tp is a number.")
        if len(set(content[key])) != len(content[key]):
            raise ValueError(f"{path}: {key} names something twice: {content[key]}.")
    for override in content["overrides"]:
        if re.match(rf"[+~]*({'|'.join([*AXES.values(), 'evaluation'])})(=|$)", str(override)):
            raise ValueError(f"{path}: the override {override!r} names an axis; the lists above it choose those.")
    check_overrides(content["overrides"])
    return Selection(**content)


def read_rows(root: Path, selection: Selection) -> list[Row]:
    """Every combination that is selected, composed, typed and checked. ValueError with Hydra's own words on a typo."""
    schema.register()
    rows = []
    with initialize_config_dir(config_dir=str((root / "conf").resolve()), version_base="1.3"):
        lists = [getattr(selection, axis) for axis in AXES]
        for model, calibration, weights, kv, tp in itertools.product(*lists):
            names = {"model": model, "calibration": calibration, "weights": weights, "kv": kv, "tp": tp}
            names["evaluation"] = selection.evaluation
            config = _compose([f"{group}={name}" for group, name in names.items()] + selection.overrides)
            rows.append(Row(**names, config=config))
    return rows


def _compose(overrides: list[str]) -> Config:
    try:
        composed = compose(config_name="config", overrides=overrides)
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ValueError(f"The configuration has no value for {', '.join(missing)} ({' '.join(overrides)}).")
        OmegaConf.resolve(composed)
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"The configuration does not compose ({' '.join(overrides)}): {paragraph(error)}") from error
    assert isinstance(config, Config)
    schema.check(config)
    return config
