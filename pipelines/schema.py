"""The typed tree of everything that can be declared: what is not in it, or out of range, is refused by name.

Registered in Hydra's ConfigStore as `schema` and named first in conf/config.yaml, so that every file of conf/ and
every override is checked against it. Paths are relative to the project's folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.config import HEADS, ROTATIONS
from pipelines import ini_options
from pipelines.field_checks import commit, digest, one_of
from pipelines.ini_options import Ini
from pipelines.template_files import NAMES, OWN
from pipelines.text_options import Calibration, Text, calibration_problems, text_problems

WEIGHTS = ("fp16", "w8a8", "w4a16", "as_is")
METHODS = ("rtn", "awq", "gptq", "awq+gptq")
KVS = ("kv16", "kv8")
GRANULARITIES = ("tensor", "head", "channel", "token")


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
class Weights:
    """How linear layers are stored. Only the fields that a recipe and its method use enter its slice.

    `bits` is there to be refused by name: a recipe has one number of bits. `search: none` is the reference's formula
    with the fixed exponent `alpha`. With `search: grid` the scales tried are activation^x / weight^y for all x of
    `activation_exponents` and y of `weight_exponents`, and w4a16 has a `method`:
    rtn (rounding to nearest), awq (scales), gptq (rounding with error feedback), awq+gptq (both). w8a8 tries `alphas`,
    and rotates the inputs of down_proj by blocks of `rotate_down` channels (0: not) before they are rounded.
    `head` is the output matrix of w4a16: fp16 (as it is), int8 or int4.
    `clip` searches the ranges of groups; `correction` is the part of the error of the inputs that gptq makes up for.
    """

    name: str = "fp16"
    bits: int = 4
    group_size: int = 128
    search: str = "grid"
    method: str = "awq+gptq"
    symmetric: bool = False
    clip: bool = True
    correction: float = 0.5
    head: str = "fp16"
    alpha: float = 0.5
    activation_exponents: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.4, 0.6])
    alphas: list[float] = field(default_factory=lambda: [0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    rotate_down: int = 8
    weight_exponents: list[float] = field(default_factory=lambda: [0.0, 0.5, 1.0])


@dataclass
class KV:
    """How keys and values are cached: as computed (kv16), or as int8 (kv8).

    `granularity` says what has a scale and a zero point of its own: the KV heads of a rank together (`tensor`:
    TurboMind's), a `head`, a `channel` of a head, or a head of every single token (`token`, which needs no
    calibration). `symmetric` scales have zero point 0.
    """

    name: str = "kv16"
    granularity: str = "channel"
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
    ini: Ini = field(default_factory=Ini)
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
    weights, evaluation = config.weights, config.evaluation
    yield from calibration_problems(config.calibration)
    if evaluation.text.kind == "chat":
        yield "evaluation.text.kind=chat is for calibration: ask what is said in chats by evaluation.questions"
    else:
        yield from text_problems("evaluation.text", evaluation.text)
    yield from one_of("weights.name", weights.name, WEIGHTS)
    if weights.bits not in (4, 8):
        yield f"weights.bits={weights.bits} must be 4: there are kernels and file formats for 4 and 8 bits alone"
    elif weights.name == "w4a16" and weights.bits == 8:
        yield (
            "weights.bits=8 is not w4a16: AWQ stores 4 bits, and 8-bit weights are multiplied with 8-bit activations, "
            "which is another recipe (w8a8)"
        )
    elif weights.name == "w8a8" and weights.bits == 4:
        yield "weights.bits=4 is not w8a8, which has 8-bit weights and activations: 4-bit weights are w4a16"
    yield from one_of("weights.head", weights.head, HEADS)
    if weights.name == "w8a8" and weights.head != "fp16":
        yield f"weights.head={weights.head} is for w4a16: w8a8 leaves the output matrix in 16 bits"
    if weights.rotate_down not in ROTATIONS:
        yield (
            f"weights.rotate_down={weights.rotate_down} must be one of {', '.join(map(str, ROTATIONS))}: there are "
            "kernels for blocks of so many channels"
        )
    yield from one_of("weights.search", weights.search, ("grid", "none"))
    yield from one_of("weights.method", weights.method, METHODS)
    yield from one_of("kv.name", config.kv.name, KVS)
    yield from one_of("kv.granularity", config.kv.granularity, GRANULARITIES)
    if config.kv.symmetric and config.kv.granularity == "token":
        yield "kv.symmetric=true is for scales of calibration; with kv.granularity=token they are each token's own"
    yield from ini_options.problems(config.ini)
    for key, number, least in (
        ("tp", config.tp, 1),
        ("model.session_len", config.model.session_len, 0),
        ("weights.group_size", weights.group_size, 8),
        ("evaluation.sequence_length", evaluation.sequence_length, 2),
        ("evaluation.max_tokens", evaluation.max_tokens, 2),
        ("evaluation.answer_tokens", evaluation.answer_tokens, 1),
    ):
        if number < least:
            yield f"{key}={number} must be at least {least}"
    for key, value in (
        ("alpha", weights.alpha),
        ("correction", weights.correction),
        *(("alphas", alpha) for alpha in weights.alphas),
        *(("activation_exponents", x) for x in weights.activation_exponents),
        *(("weight_exponents", y) for y in weights.weight_exponents),
    ):
        if not 0 <= value <= 1:
            yield f"weights.{key}={value} must be from 0 to 1"
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
        yield from commit("model.revision", model.revision)
        if model.digest:
            yield "model.digest pins a local folder: a hub repository is pinned by model.revision"
    yield from digest("model.digest", model.digest)
    if model.template is not None:
        yield from one_of("model.template", model.template, (OWN, *NAMES))
