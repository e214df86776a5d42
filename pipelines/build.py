"""`ingot build [-m] [OVERRIDE...]`: build one artifact, or a sweep of them, without touching params.yaml or build/.

    ingot build model=llama2_7b weights=w4a16 kv=kv8 tp=2
    ingot build -m weights=fp16,w4a16 kv=kv16,kv8 weights.group_size=64,128
    ingot build --check 3f9c1b2a                # build that artifact again, and compare (pipelines/check.py)

Each job is a copy of the work tree as it lies (not as it was committed), joined to the project's cache and store, in
which `dvc repro` runs: what was built before is not built again. Hydra's own flags (--cfg job, --info, -m) work.
Standard output has one line for each artifact, `ID  VERDICT  KEY`; everything else is on standard error.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine.config import EngineConfig, KVGranularity, Recipe
from pipelines import schema
from pipelines.hydra_errors import paragraph
from pipelines.ini_options import check_overrides
from pipelines.outcomes import SHORT, read_outcome
from pipelines.recipe_fields import UNCALIBRATED, weights_part
from pipelines.report import REPORTS
from pipelines.report import write as write_report
from pipelines.schema import Config
from pipelines.selection import AXES
from pipelines.sources import model_files
from pipelines.text_options import text_parts
from pipelines.units import human_size
from pipelines.verify import broken, locked
from pipelines.worktree import JOBS, cache_folder, isolate, project_root, run_dvc

SPARE_BYTES = 64_000_000
"""Room for logs, DVC's own state and statements, beside what the estimate counts."""
TENTHS = {"w4a16": 3, "w8a8": 6}
"""Of a 16-bit checkpoint, what its quantized tensors take: (4 + 20/32) / 16 at the smallest group, and a half."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when every job came to its end, whatever the verdicts."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(text == "--check" or text.startswith("--check=") for text in arguments):
        from pipelines import check

        return check.main(arguments)
    try:
        check_overrides(arguments)
        root = project_root()
        sweep_jobs(root)
        (root / JOBS).mkdir(parents=True, exist_ok=True)
        report = Path(tempfile.mkdtemp(prefix=f"report-{os.getpid()}-", dir=root / JOBS))
    except (ValueError, OSError) as error:
        print(f"ingot build: {error}", file=sys.stderr)
        return 1
    schema.register()
    program = sys.argv[0]
    sys.argv = [program, *arguments, f"hydra.sweep.dir={_quoted(str(report))}"]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, and let us say it in one paragraph
    try:
        hydra.main(version_base="1.3", config_path=str((root / "conf").resolve()), config_name="config")(_job)()
        lines = [path.read_text(encoding="utf-8") for path in sorted(report.glob("*.txt"))]
    except (HydraException, OmegaConfBaseException) as error:
        print(f"ingot build: {paragraph(error)}", file=sys.stderr)
        return 1
    finally:
        sys.argv = [program, *arguments]
        shutil.rmtree(report, ignore_errors=True)
    print(*lines, sep="", end="")
    return 1 if any(line.startswith("failed") for line in lines) else 0


def sweep_jobs(root: Path) -> None:
    """Remove the folders of jobs whose process was killed."""
    for folder in (root / JOBS).glob("*-*"):
        process = folder.name.split("-")[1]
        if not process.isdigit() or not Path(f"/proc/{process}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def build(root: Path, config: Config, choices: dict[str, str], overrides: Sequence[str]) -> str:
    """Build one artifact in a copy of the project and return its line. ValueError when it does not come to the end."""
    schema.check(config)
    key = "-".join([choices["model"], choices["calibration"], choices["weights"], str(config.tp), choices["kv"]])
    check_device(root, config)
    check_memory(root, config)
    _check_disk(root, key, config)
    folder = Path(tempfile.mkdtemp(prefix=f"job-{os.getpid()}-", dir=root / JOBS))
    try:
        if not isolate(root, folder):
            _say(f"there is no git in {root}, so the folder was copied as it is, without build/, .venv and caches.")
        selection: dict[str, Any] = {axis: [choices[group]] for axis, group in AXES.items() if group != "tp"}
        selection |= {"tps": [config.tp], "evaluation": choices["evaluation"]}
        selection["overrides"] = [*overrides, *absolute_paths(root, config)]
        (folder / "params.yaml").write_text(yaml.safe_dump(selection), encoding="utf-8")
        code = run_dvc(folder, ["repro"], environment={"DVC_SITE_CACHE_DIR": str(folder / ".dvc/tmp/site")})
        if code:
            raise ValueError(
                f"{key} was not built: `dvc repro` stopped with {code}, for the reason above. Nothing half-written is"
                " left, and what was finished is in the cache: mend the cause and build again."
            )
        problems = broken(cache_folder(folder), locked(folder))
        if problems:
            raise ValueError(f"{key} is not whole in the cache (is the disk full?): {'; '.join(problems[:5])}")
        outcome = read_outcome(folder, key)
        _keep_report(folder, root, key, outcome.id)
        return f"{outcome.id}  {outcome.verdict}  {key}\n"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _keep_report(folder: Path, root: Path, key: str, artifact_id: str) -> None:
    """Put the page about an artifact into the project, by its id and as the newest of its key. Without one the artifact
    is built all the same."""
    target = root / REPORTS / key
    page = target / f"{artifact_id[:SHORT]}.html"
    try:
        target.mkdir(parents=True, exist_ok=True)
        if not page.is_file():
            shutil.copyfile(write_report(folder, key), page)
        shutil.copyfile(page, target / "index.html")
    except (ValueError, OSError) as error:
        _say(f"there is no page about {artifact_id[:SHORT]}: {error}")
    else:
        _say(f"what there is to see of {artifact_id[:SHORT]}: {page.relative_to(root)}")


def absolute_paths(root: Path, config: Config) -> list[str]:
    """Overrides that make every relative path of a configuration absolute: a copy has not all that the project has."""
    places = {
        "model.path": config.model.path,
        **{f"{key}.path": text.path for key, text in text_parts(config.calibration).items()},
        "evaluation.text.path": config.evaluation.text.path,
        "evaluation.questions": config.evaluation.questions,
        "store": config.store,
    }
    return [f"{key}={_quoted(str((root / path).resolve()))}" for key, path in places.items() if path is not None]


def check_device(root: Path, config: Config) -> None:
    """ValueError where this machine could not run, and so not measure, what is to be built; no weight is read for it.

    A checkpoint that is not on this machine yet is left to the stages, which ask the same before they read it.
    """
    folder = _checkpoint_folder(root, config)
    if folder is None:
        return
    # Torch takes seconds to import: what is wrong with the configuration is said before.
    from engine.runtime.capability import check_capability, probe_device
    from engine.storage.checkpoint import Checkpoint

    weights, options = config.weights, EngineConfig()
    as_is = weights.name == "as_is"
    checkpoint = Checkpoint(folder, allow_bin=config.model.allow_bin, allow_quantized=as_is)
    group_size = weights.group_size if weights.name == "w4a16" else 0
    head = weights.head if weights.name == "w4a16" else "fp16"
    recipe = checkpoint.recipe if as_is else Recipe(weights=weights.name, group_size=group_size, head=head)
    length = min(config.evaluation.sequence_length, checkpoint.config.max_position_embeddings)
    granularity = config.kv.granularity if config.kv.name == "kv8" else "tensor"
    with_kv = replace(recipe, kv=config.kv.name, kv_granularity=cast(KVGranularity, granularity))
    # The stage that evaluates unpacks 4-bit weights (`toolchain.fix_instruction_set`), whatever a server does here.
    device = replace(probe_device(options.device), int4=())
    # The baseline runs the checkpoint as it lies, with the KV cache as computed.
    for each in (checkpoint.recipe, with_kv):
        check_capability(checkpoint.config, each, options, device, session_len=length)


def check_memory(root: Path, config: Config) -> None:
    """ValueError where calibrating or quantizing would not fit into memory: said before the first of them begins."""
    folder = _checkpoint_folder(root, config)
    if folder is None:
        return
    from engine.storage.checkpoint import Checkpoint
    from pipelines.forecast import check_fits, load_of
    from pipelines.machine import free_memory
    from pipelines.quant.cost import calibration_cost, quantization_cost

    model = Checkpoint(folder, allow_bin=config.model.allow_bin, allow_quantized=True).config
    load = load_of(model, config.calibration.samples, config.calibration.sequence_length, "cpu")
    free = free_memory("cpu")
    check_fits("calibrate", load, lambda some, _: calibration_cost(model, some), {}, device="cpu", free=free)
    if config.weights.name not in UNCALIBRATED:
        weights = weights_part(config.weights)
        check_fits(
            "quantize", load, lambda some, w: quantization_cost(model, w, some), weights, device="cpu", free=free
        )


def _checkpoint_folder(root: Path, config: Config) -> Path | None:
    """Where the checkpoint lies on this machine; None where it does not."""
    model = config.model
    if model.repo:
        from pipelines.hub import cached

        return cached(model.repo, str(model.revision), allow_bin=model.allow_bin)
    folder = root / str(model.path)
    return folder if model.path and folder.is_dir() else None


def estimate(root: Path, config: Config) -> int:
    """The most bytes that a build writes: weight files once for any kv, and the tensors that are quantized for them.

    A checkpoint that is not on this machine yet counts as nothing.
    """
    folder = _checkpoint_folder(root, config)
    if folder is None:
        return SPARE_BYTES
    files = model_files(folder, allow_bin=config.model.allow_bin)
    weights = sum(path.stat().st_size for path in files if path.suffix in (".safetensors", ".bin", ".pth"))
    blocks = config.calibration.samples * config.calibration.sequence_length * 8
    baseline = config.evaluation.max_tokens * 512  # measured: about 390 bytes a token
    quantized = weights * TENTHS.get(config.weights.name, 0) // 10
    return SPARE_BYTES + weights + quantized + blocks + baseline


def _job(config: DictConfig) -> None:
    settings = HydraConfig.get()
    report = Path(settings.sweep.dir)
    number = settings.job.get("num") if settings.mode is not None and settings.mode.name == "MULTIRUN" else 0
    choices = {str(group): str(name) for group, name in settings.runtime.choices.items()}
    axes = {*AXES.values(), "evaluation"}
    overrides = [text for text in settings.overrides.task if text.lstrip("+~").split("=")[0] not in axes]
    try:
        typed = OmegaConf.to_object(config)
        assert isinstance(typed, Config)
        line = build(project_root(), typed, choices, overrides)
    except (ValueError, OSError) as error:
        _say(str(error))
        line = f"failed  {json.dumps(list(settings.overrides.task))}\n"
    (report / f"{number:06d}.txt").write_text(line, encoding="utf-8")


def _check_disk(root: Path, key: str, config: Config) -> None:
    needed, free = estimate(root, config), shutil.disk_usage(root).free
    _say(f"{key}: writes at most {human_size(needed)}, less what the cache has; {human_size(free)} are free.")
    if needed > free:
        raise ValueError(
            f"{key} may write {human_size(needed)}, and {root} has {human_size(free)} free. Free some room (`dvc gc -w`"
            " drops what no selected build uses), or put the cache elsewhere with `dvc cache dir`."
        )


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _say(text: str) -> None:
    print(f"ingot build: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
