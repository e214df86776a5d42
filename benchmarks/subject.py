"""What is measured: a named shape with random weights, an artifact of the store, or a plain workspace folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from benchmarks.options import option
from benchmarks.rows import ROOT
from benchmarks.shapes import SHAPES, shape
from engine.config import HEADS, KVGranularity, Recipe

if TYPE_CHECKING:
    import torch

    from engine.config import EngineConfig, ModelConfig
    from engine.runtime.engine import Engine
    from engine.runtime.tokenizer import Tokenizer

# Of an int8 KV cache, the default of a build among them.
GRANULARITIES = get_args(KVGranularity)
DEFAULT_GRANULARITY = "channel"
# The token budget of a step where `num_tokens_per_iter` is left open: a GPU is not busy with the engine's 512.
GPU_TOKENS_PER_STEP = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeOptions:
    """What a model of a named shape is made of; an artifact and a folder have their own."""

    weights: str = option("fp16", "recipe of a shape's weights", choices=("fp16", "w8a8", "w4a16"))
    head: str = option("fp16", "output matrix of a shape's w4a16", choices=HEADS)
    group_size: int = option(128, "inputs that share an int4 scale", least=1)
    granularity: str = option("channel", "what has a scale of its own in an int8 cache", choices=GRANULARITIES)
    rotate_down: int = option(8, "channels in which w8a8 rotates the inputs of down_proj; 0: it does not", least=0)

    def recipe(self, kv: str) -> Recipe:
        """The recipe that these options say, with this KV cache."""
        return Recipe(
            weights=self.weights,
            kv=kv,
            group_size=self.group_size if self.weights == "w4a16" else 0,
            head=self.head,
            kv_granularity=self.granularity if kv == "kv8" else "tensor",  # type: ignore[arg-type]  # its choices
            rotate_down=self.rotate_down if self.weights == "w8a8" else 0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions(RecipeOptions):
    """The options that say which model is measured and where, whatever its KV cache is."""

    artifact: str | None = option(None, "an artifact of the store: an id, a unique prefix or a name")
    folder: str | None = option(None, "instead: a workspace folder")
    shape: str | None = option(None, "instead: random weights of a model's shape", choices=tuple(SHAPES))
    seed: int = option(0, "of the random weights and of the requests", least=0)
    device: str = option("auto", "cpu, cuda or cuda:N; auto takes a GPU where there is one")
    tp: int = option(1, "tensor-parallel ranks: so many GPUs, or processes on the CPU", least=1)
    dtype: str = option("auto", "computing type", choices=("auto", "float16", "bfloat16", "float32"))
    store: str | None = option(None, "another store than this checkout's")


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectOptions(ModelOptions):
    """What most benchmarks of a model take."""

    kv: str = option("kv16", "KV cache of a shape: as computed, or int8", choices=("kv16", "kv8"))


class DoesNotFit(ValueError):
    """A GPU has not the memory for an engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to be measured. `folder` is None for random weights, which are made on the device."""

    name: str
    config: ModelConfig
    recipe: Recipe
    tp: int
    device: str
    dtype: torch.dtype
    seed: int
    folder: Path | None = None
    artifact_id: str | None = None
    deterministic: bool = False

    @property
    def engine_name(self) -> str:
        """What a row says of the engine."""
        return "ingot-deterministic" if self.deterministic else "ingot"

    @property
    def devices(self) -> int:
        """How many devices compute and read at once: ranks on a CPU share it."""
        return self.tp if self.device.startswith("cuda") else 1

    @property
    def columns(self) -> dict[str, object]:
        """What a row says about the model."""
        return {
            "model": self.name,
            "artifact": (self.artifact_id or "")[:12],
            "recipe": str(self.recipe),
            "group_size": self.recipe.group_size,
            "tp": self.tp,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def engine(self, *, session_len: int, max_batch_size: int, **options: object) -> Engine:
        """The engine of the model, ready for requests, with prefix caching off: a repeated prompt costs its time.

        `options` are fields of EngineConfig; 0 leaves one open. DoesNotFit where a GPU is full before it is made.
        """
        import torch

        from engine.config import EngineConfig

        config = EngineConfig(
            device=self.device,
            dtype=str(self.dtype).removeprefix("torch."),  # type: ignore[arg-type]  # one of Dtype
            session_len=session_len,
            max_batch_size=max_batch_size,
            prefix_caching=False,
            tp=self.tp,
            deterministic=self.deterministic,
            **options,  # type: ignore[arg-type]  # EngineConfig checks them
        )
        try:
            return self._engine(config, session_len)
        except torch.cuda.OutOfMemoryError as error:
            raise DoesNotFit(
                f"{self.device} ({torch.cuda.get_device_name(self.device)}) has not the memory for this: ask for fewer "
                "sequences at once, shorter ones, or kv=kv8."
            ) from error

    def _engine(self, config: EngineConfig, session_len: int) -> Engine:
        from benchmarks.random_rank import random_share
        from engine.runtime.capability import check_capability, probe_device
        from engine.runtime.engine import Engine
        from engine.runtime.rank_processes import RankProcesses, ended_by_errors
        from engine.runtime.share import check_ranks
        from engine.storage.rank_cuts import rank_config
        from engine.storage.turbomind_files import check_fits

        if self.folder is not None:
            return Engine.from_workspace(self.folder, config)
        if self.tp > 1:
            check_ranks(config)
            check_fits(self.config, self.recipe, self.tp)
        if self.device == "cpu":  # which would swap, or end the process; a GPU says that it is full
            probed = probe_device(self.device)
            free = replace(probed, free_bytes=probed.free_bytes // self.tp)
            part = rank_config(self.config, self.recipe, self.tp)
            check_capability(part, self.recipe, config, free, session_len=session_len)
        others = None
        if self.tp > 1:
            task = {"shape": self.name, "recipe": self.recipe.fields(), "config": asdict(config), "seed": self.seed}
            others = RankProcesses(self.tp, task, module="benchmarks.random_rank")
        with ended_by_errors(others):
            share = random_share(self.config, self.recipe, config, 0, seed=self.seed)
            return Engine(
                share.model,
                self.tokenizer(),
                config,
                session_len=session_len,
                kv_scales=share.kv_scales,
                others=others,
            )

    def tokenizer(self) -> Tokenizer:
        from benchmarks.random_workspace import write_tokenizer
        from engine.runtime.tokenizer import Tokenizer
        from engine.storage.workspace import TOKENIZER

        if self.folder is not None:
            return Tokenizer(self.folder / TOKENIZER)
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(Path(folder), self.config.vocab_size)
            return Tokenizer(Path(folder))


def find_subject(options: ModelOptions) -> Subject:
    """The model that the options name. ValueError where they name none or two, or give options that it fixes itself."""
    named = [name for name in ("artifact", "folder", "shape") if getattr(options, name) is not None]
    if len(named) != 1:
        raise ValueError(
            "say what to measure: artifact=ID, folder=WORKSPACE or shape=NAME, one of them. "
            f"{' and '.join(named) or 'None of them'} {'were' if named else 'was'} given."
        )
    if options.shape is None:
        own = [each for each in fields(options) if each.name in (*(one.name for one in fields(RecipeOptions)), "kv")]
        for name, default in ((each.name, each.default) for each in own):
            if getattr(options, name) != default:
                raise ValueError(f"{name}={getattr(options, name)} goes with shape=NAME: {named[0]} has its own.")
    import torch

    from engine.config import EngineConfig
    from engine.runtime.capability import computing_dtype

    device = find_device(options.device)
    engine = EngineConfig(device=device, dtype=options.dtype)  # type: ignore[arg-type]  # checked by its choices
    if options.shape is not None:
        config = shape(options.shape)
        return Subject(
            name=options.shape,
            config=config,
            recipe=options.recipe(getattr(options, "kv", "kv16")),
            tp=options.tp,
            device=device,
            dtype=getattr(torch, computing_dtype(config, engine)),
            seed=options.seed,
        )
    return _stored(options, device, engine)


def find_device(asked: str) -> str:
    """The device that is asked for, `auto` being a GPU where there is one; ValueError where it is not there."""
    import torch

    from engine.runtime.capability import probe_device

    device = ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked
    probe_device(device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # events and graphs belong to the current one
    return device


def _stored(options: ModelOptions, device: str, engine: object) -> Subject:
    import torch

    from engine.runtime.capability import computing_dtype
    from engine.storage.artifacts import MANIFEST, read_manifest, verify
    from engine.storage.workspace import Workspace

    if options.artifact is not None:
        folder = artifact_folder(options.artifact, options.store)
        artifact_id: str | None = verify(folder).id
        name = options.artifact
    else:
        folder = Path(options.folder or "").expanduser().absolute()
        if not folder.is_dir():
            raise ValueError(f"folder={options.folder} is not a folder.")
        artifact_id = read_manifest(folder).id if (folder / MANIFEST).is_file() else None
        name = folder.name
    workspace = Workspace(folder)
    return Subject(
        name=workspace.ini.model_name or name,
        config=workspace.config,
        recipe=workspace.recipe,
        tp=options.tp,
        device=device,
        dtype=getattr(torch, computing_dtype(workspace.config, engine)),  # type: ignore[arg-type]
        seed=options.seed,
        folder=folder,
        artifact_id=artifact_id,
    )


def artifact_folder(name: str, store: str | None) -> Path:
    """Where an artifact lies, as the `ingot` command answers, which knows the store; ValueError in its words."""
    command = [sys.executable, "-m", "cli.main", "artifacts", *(["--store", store] if store else []), "path", name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    if answer.returncode:
        raise ValueError(answer.stderr.strip().removeprefix("ingot: ") or f"artifact={name} cannot be found.")
    return Path(answer.stdout.strip())


def tokens_per_step(device: str, asked: int) -> int:
    """`num_tokens_per_iter` of a benchmark: what was asked for, else 8192 on a GPU, and the engine's on a CPU."""
    return asked or (GPU_TOKENS_PER_STEP if device.startswith("cuda") else 0)


def with_kv(subject: Subject, kv: str, granularity: str) -> Subject:
    """The same model with another KV cache."""
    finest = granularity if kv == "kv8" else "tensor"
    recipe = replace(subject.recipe, kv=kv, kv_granularity=finest)  # type: ignore[arg-type]  # one of GRANULARITIES
    return replace(subject, recipe=recipe)
