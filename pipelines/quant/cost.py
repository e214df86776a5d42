"""What calibrating and quantizing a model take: memory at the worst moment, arithmetic and disk, before it is done.

Formulas of what `stream`, `walk` and the recipes hold at once; each is checked against measured peaks by
`benchmarks/forecast.py`. The time is arithmetic at the rate that this machine shows, so it is rough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.config import ModelConfig
from engine.models import names
from pipelines.quant.pairs import ATTENTION_OUT, MLP_IN, PAIRS

STEP_SECONDS = {"cpu": 60e-6, "cuda": 3e-6}
"""One column of error feedback, or one of the smallest operations, takes this long whatever its size (a GPU rounds a
whole block of columns in one go)."""
START_SECONDS = {"cpu": 0.0, "cuda": 4.0}
"""Until kernels are compiled and libraries loaded."""
SMOOTHING_ROWS = 2048  # of inputs on which w8a8 compares exponents
HEAD_ROWS = 8192  # of the output matrix, at a time
KEPT = 128_000_000  # bytes of down_proj's inputs that are kept until it is quantized; more are computed twice
LIBRARIES = 60_000_000
"""What the libraries take when they compute for the first time, above what they take when they are loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What goes through the model: `samples` blocks of `length` tokens, by `workers` side by side, of a type of
    `element` bytes (4 on a CPU, the checkpoint's own on a GPU). Factors are taken in a type of `wide` bytes. `device`
    is cpu or cuda."""

    samples: int
    length: int
    workers: int = 1
    element: int = 4
    wide: int = 8
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.samples * self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Bytes of memory by what takes them (above the loaded libraries, at the worst moment), floating-point operations
    of products in the type of the hidden states and in float32, steps one after the other, bytes of the output, and
    bytes kept beside it while it runs."""

    memory: Mapping[str, int]
    operations: float
    float_operations: float
    steps: float
    disk: int
    kept: int

    @property
    def peak(self) -> int:
        """Bytes of memory in all."""
        return sum(self.memory.values())

    def seconds(self, load: Load, rate: float, float_rate: float) -> float:
        """How long it takes at these operations a second, in the type of the hidden states and in float32."""
        computing = self.operations / rate + self.float_operations / float_rate
        return START_SECONDS[load.device] + computing + self.steps * STEP_SECONDS[load.device]


def calibration_cost(config: ModelConfig, load: Load) -> Cost:
    """The cost of the stage `calibrate`."""
    size = _Sizes.of(config)
    hidden = load.tokens * config.hidden_size * load.element
    statistics = 5 * 4 * (size.inputs + 2 * size.kv)
    return Cost(
        memory={
            "hidden states": hidden,
            "one layer": size.layer * load.element + size.stacked * load.element,
            "samples under way": load.workers * (size.sample(load) + 2 * statistics),
            "statistics": config.num_layers * statistics,
            "libraries": LIBRARIES,
        },
        operations=config.num_layers * _forward(config, size, load),
        float_operations=0.0,
        steps=config.num_layers * load.samples * 100.0,
        disk=config.num_layers * statistics + 4 * load.tokens,
        kept=config.num_layers * statistics + 2 * hidden,
    )


def quantization_cost(config: ModelConfig, weights: Mapping[str, Any], load: Load) -> Cost:
    """The cost of the stage `quantize` with the slice's part `weights`, of a recipe that computes."""
    size = _Sizes.of(config)
    bits = 8 if weights["name"] == "w8a8" else 4
    out = config.num_layers * (size.layer * bits // 8 + size.layer * 5 // 2 // weights.get("group_size", 128))
    head = config.vocab_size * config.hidden_size if weights.get("head", "fp16") != "fp16" else 0
    matrix = {"output matrix": 2 * head + 24 * HEAD_ROWS * config.hidden_size} if head else {}
    out += head
    if weights.get("search") == "none" or weights.get("method") == "rtn":
        # Linear by linear; the reference's formula scales a copy of the layer first.
        held = 3 * size.layer // 2 if weights.get("method") == "rtn" else 5 * size.layer
        return Cost(
            memory={"one layer": held + 12 * size.largest, "libraries": LIBRARIES, **matrix},
            operations=0.0,
            float_operations=config.num_layers * size.layer * 64.0,
            steps=config.num_layers * 1000.0,
            disk=out,
            kept=out,
        )
    if bits == 8:
        return _smoothing_cost(config, weights, load, size, out)
    drift, feedback = bool(weights.get("correction")), "gptq" in weights["method"]
    streams = 2 if drift else 1
    inner = load.tokens * config.intermediate_size * load.element
    kept = min(KEPT, inner)
    # Gate and up are two thirds of the MLP, which is most of a layer.
    again = 0.5 * (1 - kept / inner)
    hidden = load.tokens * config.hidden_size * load.element
    attended = load.tokens * size.query * load.element
    tried = 1 + len(weights.get("activation_exponents", ())) * len(weights.get("weight_exponents", ()))
    # Memory at the worst of the moments: what attention gave out, and what the search holds beside it.
    worst, grams_operations, operations, steps = (0, 0), 0.0, 0.0, 0.0
    for pair in PAIRS:
        inputs = names.linear_shape(config, pair.after[0])[1]
        outputs = sum(names.linear_shape(config, module)[0] for module in pair.after)
        square, weight = inputs * inputs, inputs * outputs
        grams = (1 + load.workers) * streams * 4 * square
        held = (streams + 1) * 4 * square  # the sums and the mean of the Gram matrix
        factor = 2 * load.wide * square if feedback or drift else 0
        rounding = (load.workers + bool(factor)) * 4 * square + load.workers * 13 * weight + 12 * weight
        # o_proj's inputs are kept until those of gate and up are made of them.
        moments = [
            (attended if pair in (ATTENTION_OUT, MLP_IN) else 0, grams),
            (attended if pair is ATTENTION_OUT else 0, held + max(factor, rounding)),
        ]
        worst = max(worst, *moments, key=sum)
        grams_operations += streams * 2.0 * load.tokens * square
        operations += (8.0 / 3) * square * inputs
        operations += (tried + 2) * 2.0 * weight * (inputs / 2 if feedback else inputs)
        if weights["clip"]:
            operations += 2 * 7 * 2.0 * weight * weights["group_size"]
        steps += (tried + 2) * inputs * 5.0 if feedback else 0.0
    return Cost(
        memory={
            "hidden states": streams * hidden + worst[0],
            "one layer": size.layer * (7 + (load.element if load.element != 4 else 0))
            + size.stacked * load.element
            + (streams - 1) * (size.layer + size.stacked) * load.element,
            "search": worst[1],
            "samples under way": load.workers * size.sample(load) + kept,
            "libraries": LIBRARIES,
            **matrix,
        },
        operations=config.num_layers * (grams_operations + (streams + again) * _forward(config, size, load)),
        float_operations=config.num_layers * operations,
        steps=config.num_layers * (steps + load.samples * 200.0),
        disk=out,
        kept=out + 2 * streams * hidden,
    )


def _smoothing_cost(config: ModelConfig, weights: Mapping[str, Any], load: Load, size: _Sizes, out: int) -> Cost:
    """W8A8 with a search: one stream, and some rows of every input on which exponents are compared."""
    hidden = load.tokens * config.hidden_size * load.element
    rows = max(load.samples, SMOOTHING_ROWS)
    tried = 1 + len(weights.get("alphas", ()))
    return Cost(
        memory={
            "hidden states": hidden,
            "one layer": size.layer * (7 + load.element) + size.stacked * load.element,
            "search": load.workers * (12 * size.largest * 2 + 12 * rows * config.intermediate_size),
            "samples under way": load.workers * size.sample(load),
            "libraries": LIBRARIES,
        },
        operations=config.num_layers * _forward(config, size, load),
        float_operations=config.num_layers * tried * 2.0 * rows * size.layer,
        steps=config.num_layers * (tried * 100.0 + load.samples * 100.0),
        disk=out,
        kept=out + 2 * hidden,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """Numbers of values: of a layer, of its linears that are stacked, of its largest linear, of all inputs of linears,
    of queries and of keys a token, and what one token is within a layer."""

    layer: int
    stacked: int
    largest: int
    inputs: int
    query: int
    kv: int
    token: int

    @classmethod
    def of(cls, config: ModelConfig) -> _Sizes:
        shapes = {module: names.linear_shape(config, module) for module in names.LINEARS}
        count = {module: math.prod(shape) for module, shape in shapes.items()}
        query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        intermediate = shapes[names.DOWN][1]
        return cls(
            layer=sum(math.prod(shape) for shape in names.layer_tensors(config).values()),
            stacked=sum(count[module] for module in (*names.QKV, *names.GATE_UP)),
            largest=max(count.values()),
            inputs=sum(shape[1] for shape in shapes.values()),
            query=query,
            kv=kv,
            token=4 * config.hidden_size + 3 * (query + 2 * kv) + 5 * intermediate,
        )

    def sample(self, load: Load) -> int:
        """Bytes that one sample takes on its way through a layer."""
        return load.length * self.token * 4


def _forward(config: ModelConfig, size: _Sizes, load: Load) -> float:
    """Operations of all tokens through one layer."""
    return 2.0 * size.layer * load.tokens + 2.0 * load.tokens * load.length * size.query
