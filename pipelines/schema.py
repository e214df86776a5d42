"""The typed tree of everything that can be declared: what is not in it, or out of range, is refused by name.

Registered in Hydra's ConfigStore as `schema` and named first in conf/config.yaml, so that every file of conf/ and
every override is checked against it. Paths are relative to the project's folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipelines.template_files import NAMES, OWN

WEIGHTS = ("fp16", "w4a16", "as_is")
KVS = ("kv16", "kv8")
TEXT_KINDS = ("text", "wikitext2", "ptb", "c4", "pileval")


@dataclass
class Model:
    """A checkpoint: a local folder (`path`), or a hub repository at one commit (`repo`, `revision`).

    `digest` pins a local folder's content, which then need not be here. `session_len` 0 is the checkpoint's own.
    `template` names a chat template of pipelines/templates/, or is `own`: the checkpoint's has to be there; null takes
    what there is. Pickled weights (.bin, .pth) are read only with `allow_bin`, as weights alone, without running code.
    """

    name: str = ""
    path: str | None = None
    repo: str | None = None
    revision: str | None = None
    digest: str | None = None
    session_len: int = 0
    template: str | None = None
    allow_bin: bool = False


@dataclass
class Text:
    """A text: .txt or .jsonl file(s) at `path` (`kind: text`), or a named data set, from a local copy at `path`
    or from the hub (`repo`, `revision`, `subset`, `split`). `column` is the field that holds the text."""

    kind: str = "text"
    path: str | None = None
    digest: str | None = None
    repo: str | None = None
    revision: str | None = None
    subset: str | None = None
    split: str | None = None
    column: str = "text"


@dataclass
class Calibration(Text):
    """What the observers see: `samples` blocks of `sequence_length` tokens, at `random` by `seed`, or the `first`."""

    name: str = ""
    samples: int = 128
    sequence_length: int = 2048
    sampling: str = "random"
    seed: int = 42


@dataclass
class Weights:
    """How linear layers are stored. Only the fields that a recipe uses enter its slice.

    `bits` is there to be refused by name: a recipe has one number of bits.
    `search: none` smooths by the fixed exponent `alpha`; `grid` tries `activation_steps` x `weight_steps` exponents.
    """

    name: str = "fp16"
    bits: int = 4
    group_size: int = 128
    search: str = "grid"
    alpha: float = 0.5
    activation_steps: int = 20
    weight_steps: int = 3


@dataclass
class KV:
    """How keys and values are cached: as computed (kv16), or as int8 (kv8)."""

    name: str = "kv16"
    symmetric: bool = False


@dataclass
class Gates:
    """The bounds that an artifact must hold against the baseline; null is no bound."""

    perplexity_ratio_max: float | None = 1.05
    kl_mean_max: float | None = 0.05
    kl_p99_max: float | None = 1.0
    top1_agreement_min: float | None = 0.9
    answer_flips_max: float | None = None


@dataclass
class Evaluation:
    """What is measured: at most `max_tokens` tokens of `text` in windows of `sequence_length`, and `questions`.

    `questions` is a .jsonl file of {"messages" or "prompt", "answer"}, answered greedily with at most `answer_tokens`.
    A gate passes or fails when the whole interval at `confidence` is on one side of its bound.
    """

    name: str = ""
    text: Text = field(default_factory=Text)
    sequence_length: int = 2048
    max_tokens: int = 32768
    questions: str | None = None
    questions_digest: str | None = None
    answer_tokens: int = 16
    confidence: float = 0.95
    gates: Gates = field(default_factory=Gates)


@dataclass
class Config:
    """One artifact: what it is made of, how, and where it is put."""

    model: Model = field(default_factory=Model)
    calibration: Calibration = field(default_factory=Calibration)
    weights: Weights = field(default_factory=Weights)
    kv: KV = field(default_factory=KV)
    evaluation: Evaluation = field(default_factory=Evaluation)
    tp: int = 1
    store: str = "store"


def register() -> None:
    """Make the tree known to Hydra under the name that conf/config.yaml gives first."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


def check(config: Config) -> None:
    """ValueError that names every value out of range, what is allowed, and the way out."""
    problems = list(_problems(config))
    if problems:
        raise ValueError("The configuration is not valid: " + "; ".join(problems) + ".")


def _problems(config: Config) -> Iterator[str]:
    yield from _model_problems(config.model)
    calibration, weights, evaluation = config.calibration, config.weights, config.evaluation
    yield from _text_problems("calibration", calibration)
    yield from _text_problems("evaluation.text", evaluation.text)
    yield from _one_of("calibration.sampling", calibration.sampling, ("random", "first"))
    yield from _one_of("weights.name", weights.name, WEIGHTS)
    if weights.bits not in (4, 8):
        yield f"weights.bits={weights.bits} must be 4: there are kernels and file formats for 4 and 8 bits alone"
    elif weights.name == "w4a16" and weights.bits == 8:
        yield (
            "weights.bits=8 is not w4a16: AWQ stores 4 bits, and 8-bit weights are multiplied with 8-bit activations, "
            "which is another recipe (w8a8)"
        )
    yield from _one_of("weights.search", weights.search, ("grid", "none"))
    yield from _one_of("kv.name", config.kv.name, KVS)
    for key, number, least in (
        ("tp", config.tp, 1),
        ("model.session_len", config.model.session_len, 0),
        ("calibration.samples", calibration.samples, 1),
        ("calibration.sequence_length", calibration.sequence_length, 2),
        ("calibration.seed", calibration.seed, 0),
        ("weights.group_size", weights.group_size, 8),
        ("weights.activation_steps", weights.activation_steps, 1),
        ("weights.weight_steps", weights.weight_steps, 1),
        ("evaluation.sequence_length", evaluation.sequence_length, 2),
        ("evaluation.max_tokens", evaluation.max_tokens, 2),
        ("evaluation.answer_tokens", evaluation.answer_tokens, 1),
    ):
        if number < least:
            yield f"{key}={number} must be at least {least}"
    if not 0 <= weights.alpha <= 1:
        yield f"weights.alpha={weights.alpha} must be from 0 to 1"
    if not 0.5 <= evaluation.confidence < 1:
        yield f"evaluation.confidence={evaluation.confidence} must be from 0.5 to below 1"
    for name, bound in vars(evaluation.gates).items():
        if bound is not None and not 0 <= bound <= (1 if name in ("top1_agreement_min", "answer_flips_max") else 1e9):
            yield f"evaluation.gates.{name}={bound} must not be below 0, and a share not above 1"
    if evaluation.gates.answer_flips_max is not None and not (evaluation.questions or evaluation.questions_digest):
        yield "evaluation.gates.answer_flips_max needs evaluation.questions; without questions set it to null"


def _model_problems(model: Model) -> Iterator[str]:
    if not model.name:
        yield "model.name is empty: say what config.ini is to call the model"
    if model.repo and model.path:
        yield "model.path and model.repo are both given: give a local folder or a hub repository"
    elif not model.repo and not model.path and not model.digest:
        yield "model has no source: give model.path=FOLDER, or model.repo=ORG/NAME with model.revision=COMMIT"
    elif model.repo:
        yield from _commit("model.revision", model.revision)
        if model.digest:
            yield "model.digest pins a local folder: a hub repository is pinned by model.revision"
    yield from _digest("model.digest", model.digest)
    if model.template is not None:
        yield from _one_of("model.template", model.template, (OWN, *NAMES))


def _text_problems(key: str, text: Text) -> Iterator[str]:
    yield from _one_of(f"{key}.kind", text.kind, TEXT_KINDS)
    yield from _digest(f"{key}.digest", text.digest)
    if text.kind == "text":
        if not text.path and not text.digest:
            yield f"{key} has no source: give {key}.path=FILE (.txt, .jsonl, or a folder of them)"
    elif not text.path and not text.digest:
        if not text.repo:
            yield f"{key}.kind={text.kind} has no pinned hub copy: give {key}.path=COPY, a local copy of the data set"
        else:
            yield from _commit(f"{key}.revision", text.revision)


def _one_of(key: str, value: Any, allowed: tuple[str, ...]) -> Iterator[str]:
    if value not in allowed:
        yield f"{key}={value} must be one of {', '.join(allowed)}"


def _digest(key: str, value: str | None) -> Iterator[str]:
    if value is not None and not re.fullmatch(r"[0-9a-f]{64}", value):
        yield f"{key}={value} must be a SHA-256 (64 hexadecimal digits)"


def _commit(key: str, value: str | None) -> Iterator[str]:
    if value is None or not re.fullmatch(r"[0-9a-f]{40}", value):
        yield f"{key}={value} must be a commit (40 hexadecimal digits): a branch or tag can change under a build"
