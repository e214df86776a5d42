"""Random weights of a model, made tensor by tensor on the device from a seed: speed does not depend on their values.

Magnitudes are those of a trained model after initialization, so that activations and logits stay finite in float16:
a linear keeps the variance of its input, the two that write to the residual stream share one unit of it over all
layers, and int4 and int8 codes are scaled to the same deviation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from zlib import crc32

import torch
from torch import Tensor

from engine.config import ModelConfig, Recipe
from engine.models import names
from engine.models.cache import KVScales, PerToken
from engine.storage.head_files import head_problem, head_tensors

# Deviation of (code - zero point) with codes uniform in 0..15 and zero points 7 or 8.
INT4_DEVIATION = math.sqrt((16**2 - 1) / 12 + 0.25 + 0.25)
INT8_DEVIATION = math.sqrt((255**2 - 1) / 12)
# Of the parts of a quantized linear; an int8 `weight` has one.
ITEM_BYTES = {"qweight": 4, "qzeros": 4, "scales": 2, names.WEIGHT_SCALE: 4}
KINDS = ("fp16", "w8a8", "w4a16")
# K after rotary and V have a deviation near 1: int8 reaches 5 of them.
KV_REACH = 5.0


class RandomWeights(Mapping[str, Tensor]):
    """The tensors of a model by canonical name, each made anew when it is asked for, the same ones every time on one
    kind of device.

    float16 on `device`; the linears of the layers are in the HF-AWQ layout under w4a16, and int8 with float32 scales
    under w8a8; the output matrix is as `recipe.head` says.
    """

    def __init__(self, config: ModelConfig, recipe: Recipe, *, device: torch.device | str, seed: int = 0) -> None:
        if recipe.weights not in KINDS:
            raise ValueError(f"there are no random weights of the kind {recipe.weights}; there are {', '.join(KINDS)}.")
        self._config = config
        self._recipe = recipe
        self._device = torch.device(device)
        self._seed = seed
        if (problem := head_problem(config, recipe)) is not None:
            raise ValueError(f"{problem}.")
        self._shapes = dict(_stored(config, recipe))

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        generator = torch.Generator(self._device).manual_seed(crc32(f"{self._seed}/{name}".encode()))
        module, _, part = name.rpartition(".")
        if part == "qweight":
            return self._words(shape, generator)
        if part == names.WEIGHT_SCALE:
            return self._near(self._deviation(module) / INT8_DEVIATION, shape, generator, torch.float32)
        if part == "weight" and f"{module}.{names.WEIGHT_SCALE}" in self._shapes:
            return self._bytes(shape, generator)
        if part == "qzeros":
            return (self._words(shape, generator) & 0x11111111) + 0x77777777
        if part == "scales":
            return self._near(self._deviation(module) / INT4_DEVIATION, shape, generator)
        if part == "bias":
            return self._normal(0.1, shape, generator)
        if len(shape) == 1:  # a norm
            return self._near(1.0, shape, generator)
        return self._normal(self._deviation(module), shape, generator)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without making it."""
        return self._shapes[name]

    def _deviation(self, module: str) -> float:
        """The deviation of a weight matrix: 1 / sqrt(inputs), less for what is added to the residual stream."""
        within = names.split_name(module)[1]
        if f"{module}.weight" == names.EMBEDDING:
            return 1.0
        if f"{module}.weight" == names.HEAD:
            return 1 / math.sqrt(self._config.hidden_size)
        deviation = 1 / math.sqrt(names.linear_shape(self._config, within)[1])
        return deviation / math.sqrt(2 * self._config.num_layers) if within in (names.OUTPUT, names.DOWN) else deviation

    def _normal(self, deviation: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if self._device.type != "cpu":
            values = torch.empty(shape, dtype=torch.float16, device=self._device)
            return values.normal_(0.0, deviation, generator=generator)
        # A CPU draws normal numbers slowly: uniform ones of the same deviation, 16 random bits each.
        bits = self._random(shape, torch.int16, generator)
        return bits.to(torch.float16).mul_(deviation * math.sqrt(3.0) / 2**15)

    def _near(
        self, value: float, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float16
    ) -> Tensor:
        """Between 0.75 and 1.25 times `value`."""
        uniform = torch.rand(shape, generator=generator, device=self._device)
        return (value * (0.75 + 0.5 * uniform)).to(dtype)

    def _words(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return self._random(shape, torch.int32, generator)

    def _bytes(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """-127 to 127, as a symmetric code has."""
        return self._random(shape, torch.int8, generator).clamp_(min=-127)

    def _random(self, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Integers of random bits, drawn eight bytes at a time."""
        count = math.prod(shape)
        words = torch.empty(-(-count * dtype.itemsize // 8), dtype=torch.int64, device=self._device)
        return words.random_(-(2**63), None, generator=generator).view(dtype)[:count].view(shape)


def random_kv_scales(config: ModelConfig, recipe: Recipe) -> KVScales | PerToken | None:
    """Scales of a recipe's int8 KV cache that fit the activations of random weights; None for a cache as computed."""
    if recipe.kv != "kv8":
        return None
    if recipe.kv_granularity == "token":
        return PerToken()
    pairs = torch.zeros(config.num_layers, config.num_kv_heads, 2)
    pairs[..., 0] = 2 * KV_REACH / 255
    return KVScales.of_heads(key=pairs, value=pairs, head_dim=config.head_dim)


def weight_bytes(config: ModelConfig, recipe: Recipe, dtype: torch.dtype) -> int:
    """The bytes of all tensors of a model as its recipe keeps them, what is not quantized in `dtype`."""
    shapes = dict(_stored(config, recipe))
    total = 0
    for name, shape in shapes.items():
        module, _, part = name.rpartition(".")
        int8 = part == "weight" and f"{module}.{names.WEIGHT_SCALE}" in shapes
        size = 1 if int8 else ITEM_BYTES.get(part, dtype.itemsize)
        total += math.prod(shape) * size
    return total


def _stored(config: ModelConfig, recipe: Recipe) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor as it is kept, in the order of the forward pass."""
    for name, shape in names.model_tensors(config).items():
        module = name.removesuffix(".weight")
        if name == names.HEAD and recipe.head != "fp16":
            yield from ((part, shape) for part, (_, shape) in head_tensors(config, recipe).items())
            continue
        if name == names.HEAD and config.tie_word_embeddings:
            continue
        if recipe.weights == "fp16" or names.split_name(module)[1] not in names.LINEARS:
            yield name, shape
            continue
        outputs, inputs = shape
        if recipe.weights == "w8a8":
            yield name, shape
            yield f"{module}.{names.WEIGHT_SCALE}", (outputs,)
            continue
        if inputs % recipe.group_size or outputs % 8:
            raise ValueError(
                f"group_size {recipe.group_size} does not divide the {inputs} inputs of {module}, or its {outputs} "
                "outputs are no multiple of 8: choose another group_size."
            )
        groups = inputs // recipe.group_size
        yield f"{module}.qweight", (inputs, outputs // 8)
        yield f"{module}.qzeros", (groups, outputs // 8)
        yield f"{module}.scales", (groups, outputs)
