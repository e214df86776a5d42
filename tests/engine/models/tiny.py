"""Small random models, and steps through the paged cache, for the tests of the engine."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.kernels import ops
from engine.models import names
from engine.models.batch import QUERY_BLOCK, Batch
from engine.models.cache import KVCache
from engine.models.decoder import Decoder
from engine.models.rope_scaling import rope_base


def tiny_config(**changes) -> ModelConfig:
    fields = {
        "family": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "norm_eps": 1e-5,
        "dtype": "float32",
    }
    return ModelConfig(**(fields | changes))


def random_weights(config: ModelConfig, *, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(shape, generator=generator) * (0.5 if len(shape) == 1 else shape[-1] ** -0.5)
        for name, shape in names.model_tensors(config).items()
    }
    if config.tie_word_embeddings:
        weights[names.HEAD] = weights[names.EMBEDDING]
    return weights


def as_int4(weights: dict[str, Tensor], config: ModelConfig, group: int) -> dict[str, Tensor]:
    """Random 4-bit weights for every linear of every layer, of about the size of those given."""
    generator, quantized = torch.Generator().manual_seed(3), dict(weights)
    for layer in range(config.num_layers):
        for module in names.LINEARS:
            name = names.layer_name(layer, module)
            outer, inner = quantized.pop(f"{name}.weight").shape
            for part, rows in (("qweight", inner), ("qzeros", inner // group)):
                words = torch.randint(-(2**31), 2**31, (rows, outer // 8), generator=generator)
                quantized[f"{name}.{part}"] = words.int()
            quantized[f"{name}.scales"] = torch.rand(inner // group, outer, generator=generator).half() / inner**0.5 / 4
    return quantized


def as_int8(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Every linear of every layer with symmetric int8 rows."""
    quantized = dict(weights)
    for layer in range(config.num_layers):
        for module in names.LINEARS:
            name = names.layer_name(layer, module)
            values, scales = ops.quantize_rows(quantized[f"{name}.weight"])
            quantized |= {f"{name}.weight": values, f"{name}.{names.WEIGHT_SCALE}": scales}
    return quantized


def quantized(weights: str, tensors: dict[str, Tensor], config: ModelConfig, group: int = 32) -> dict[str, Tensor]:
    """The tensors as a recipe has them."""
    if weights == "w4a16":
        return as_int4(tensors, config, group)
    return as_int8(tensors, config) if weights == "w8a8" else tensors


class PagedRun:
    """Feeds sequences through a cache, any number of tokens of any of them a step; pages are dealt out of order.

    `limits` are the lengths that the sequences may reach, where the model's rotary base depends on them.
    """

    def __init__(
        self, model: Decoder, sequences: Sequence[Sequence[int]], *, page_len: int = 16, scales=None, limits=None
    ) -> None:
        self.model, self.sequences, self.page_len = model, [list(row) for row in sequences], page_len
        self.cached = [0] * len(sequences)
        self.bases = None if limits is None else [rope_base(model.config, limit) for limit in limits]
        pages = [-(-len(row) // page_len) for row in self.sequences]
        order = torch.randperm(sum(pages) + 1, generator=torch.Generator().manual_seed(1)).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in pages]
        self.cache = KVCache(
            model.config,
            num_pages=sum(pages) + 1,
            page_len=page_len,
            device=model.device,
            dtype=model.dtype,
            scales=scales,
        )
        self.logits: list[list[Tensor]] = [[] for _ in sequences]

    def step(self, amounts: dict[int, int]) -> None:
        """amounts: sequence -> how many of its next tokens; keeps their logits."""
        tokens, positions, slots, starts = [], [], [], [0]
        for row, amount in amounts.items():
            for place in range(self.cached[row], self.cached[row] + amount):
                tokens.append(self.sequences[row][place])
                positions.append(place)
                slots.append(self.tables[row][place // self.page_len] * self.page_len + place % self.page_len)
            self.cached[row] += amount
            starts.append(len(tokens))
        counts = list(amounts.values())
        decodes = next((i for i, count in enumerate(counts) if count > 1), len(counts))
        decodes = 0 if self.model.deterministic else decodes
        blocks = [
            (i, first) for i, count in enumerate(counts) if i >= decodes for first in range(0, count, QUERY_BLOCK)
        ]
        width = max(len(self.tables[row]) for row in amounts)
        tables = [self.tables[row] + [0] * (width - len(self.tables[row])) for row in amounts]

        def there(numbers):
            return torch.tensor(numbers, dtype=torch.int32, device=self.model.device)

        bases = None if self.bases is None else torch.tensor([self.bases[row] for row in amounts]).double()
        batch = Batch(
            token_ids=there(tokens),
            positions=there(positions),
            query_starts=there(starts),
            context_lens=there([self.cached[row] for row in amounts]),
            page_table=there(tables),
            slots=there(slots),
            logits_at=there(range(len(tokens))),
            rope_bases=None if bases is None else bases.to(self.model.device),
            decodes=decodes,
            blocks=there(blocks).view(-1, 2),
            invariant=self.model.deterministic,
        )
        logits = self.model(batch, self.cache)
        for i, row in enumerate(amounts):
            self.logits[row].append(logits[starts[i] : starts[i + 1]])

    def result(self, row: int) -> Tensor:
        return torch.cat(self.logits[row])
