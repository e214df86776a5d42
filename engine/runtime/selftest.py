"""Goldens: what an engine said to a few prompts, recorded in few numbers, and replayed to see that it still says it.

A golden holds a prompt's ids, the greedy answer, and sketches: of the logits after the prompt, and of what every layer
computes on the way there, so that a difference names the first tensor that is not what it was. A sketch of a tensor is
its root mean square and its products with NUM_SIGNS fixed random sign vectors (Achlioptas 2003): each product has the
tensor's root mean square as its standard deviation, so a deviation is told as a share of the tensor's own size. A hash
would tell rounding noise from a wrong weight no better than a coin.

Greedy tokens are compared exactly where the device class is the recorded one and its instruction set is the one in use,
and not at all elsewhere: two nearly equal logits may change places there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config import Recipe, Sampling
from engine.models import names
from engine.models.batch import Batch, packed
from engine.models.cache import KVCache, KVScales, PerToken
from engine.models.decoder import Decoder
from engine.models.rope import rope_tables
from engine.runtime.engine import Engine
from engine.storage.json_file import read_object

NUM_SIGNS = 16
NUM_TOP = 8
PAGE_LEN = 64
FLOAT_TOLERANCE, KV8_TOLERANCE, W8A8_TOLERANCE = 1e-3, 2e-2, 1e-1
"""Largest deviation of a product as a share of the tensor's root mean square. In float32 another order of summation
deviates by 1e-5. Int8 turns that into a whole step where a value lies at a rounding border; where the inputs of linears
are int8, one such step moves others over theirs, and a few layers on, deviations are as large as the noise of rounding
itself (4% were seen on the demo between two instruction sets). A wrong weight is told from that all the same."""

# What is observed in a layer, in the order of the forward pass, and what may be wrong if it is the first to deviate.
CAUSES = {
    "self_attn.q_proj": "input_layernorm.weight, or mlp.down_proj of the layer before (the embedding, if none)",
    "self_attn.k": "self_attn.k_proj, or the rotary embedding (rope_theta)",
    "self_attn.v": "self_attn.v_proj",
    "self_attn.o_proj": "self_attn.q_proj, the attention or the KV cache",
    "mlp.gate_proj": "self_attn.o_proj or post_attention_layernorm.weight",
    "mlp.down_proj": "mlp.gate_proj or mlp.up_proj",
}
LOGITS = "lm_head"

Sketch = list[float]
"""The root mean square, then NUM_SIGNS products, with six significant digits. What is not finite is the largest
float32, because JSON has no NaN."""


def tolerance_of(recipe: Recipe) -> float:
    """The tolerance of what is computed under a recipe: wider where the cache, or what linears read, is int8."""
    if recipe.weights == "w8a8":
        return W8A8_TOLERANCE
    return KV8_TOLERANCE if recipe.kv == "kv8" else FLOAT_TOLERANCE


def record(
    engine: Engine,
    model: Decoder,
    kv_scales: KVScales | PerToken | None,
    prompts: Mapping[str, Sequence[int]],
    *,
    num_tokens: int,
) -> list[dict[str, Any]]:
    """A golden for every prompt (its rendered text and its ids): JSON values only. `model` is the engine's own."""
    texts, prompt_ids = list(prompts), [list(ids) for ids in prompts.values()]
    answers = engine.generate(prompt_ids, Sampling(temperature=0.0, max_new_tokens=num_tokens))
    goldens = []
    for text, ids, answer, logits in zip(texts, prompt_ids, answers, _last_logits(engine, prompt_ids), strict=True):
        top = logits.topk(min(NUM_TOP, len(logits)))
        goldens.append(
            {
                "prompt": text,
                "token_ids": ids,
                "answer_ids": list(answer.token_ids),
                "top_ids": top.indices.tolist(),
                "top_logits": [_rounded(value) for value in top.values.tolist()],
                "logits": sketch(logits),
                "trace": trace(model, ids, kv_scales),
            }
        )
    return goldens


def replay(engine: Engine, goldens: Sequence[Mapping[str, Any]], *, tolerance: float, exact: bool) -> list[str]:
    """What the engine says otherwise than recorded, a sentence each; empty if it passes.

    `exact` compares greedy answers too: for the device class that the goldens are of.
    """
    prompt_ids = [list(golden["token_ids"]) for golden in goldens]
    found: list[str] = []
    for golden, logits in zip(goldens, _last_logits(engine, prompt_ids), strict=True):
        if deviation := _beyond(golden["logits"], sketch(logits), tolerance):
            found.append(f"The logits after {golden['prompt']!r} {deviation}.")
    if exact:
        lengths = [Sampling(temperature=0.0, max_new_tokens=len(golden["answer_ids"])) for golden in goldens]
        answers = engine.generate(prompt_ids, lengths)
        for golden, answer in zip(goldens, answers, strict=True):
            if list(answer.token_ids) != list(golden["answer_ids"]):
                found.append(
                    f"The greedy answer to {golden['prompt']!r} is {list(answer.token_ids)}, recorded was "
                    f"{list(golden['answer_ids'])}."
                )
    return found


def check_goldens(engine: Engine, path: Path, *, artifact_id: str, waived: bool) -> str:
    """What the self-test of an engine that is about to serve an artifact did, in one line.

    The logits of every prompt that fits into the engine's session_len are replayed. Greedy answers are not compared: a
    server computes with the best instruction set that there is, and in steps of other sizes than an evaluation.
    ValueError where they deviate and that is not `waived`, and for a file that is no goldens of this artifact.
    """
    content = read_object(path)
    try:
        if content["artifact"] != artifact_id:
            raise ValueError(f"{path} holds the goldens of another artifact: evaluate this one again.")
        prompts = [golden for golden in content["prompts"] if len(golden["token_ids"]) <= engine.session_len]
        found = replay(engine, prompts, tolerance=float(content["tolerance"]), exact=False)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): evaluate the artifact again.") from error
    if not prompts:
        return f"skipped: none of the goldens fits into session_len {engine.session_len}"
    if not found:
        return f"passed: {len(prompts)} of {len(content['prompts'])} goldens replayed"
    said = f"{len(found)} of {len(prompts)} goldens are not what this engine computes. {found[0]}"
    if waived:
        return f"FAILED, and served on a waiver: {said}"
    raise ValueError(
        f"The self-test failed: {said} The artifact's bytes are as they were, so look at what changed on this machine "
        'since its evaluation (torch, the processor, this program), or evaluate it again here; waiver="reason" serves '
        "it all the same."
    )


def locate_difference(
    model: Decoder, kv_scales: KVScales | PerToken | None, golden: Mapping[str, Any], *, tolerance: float
) -> str | None:
    """A sentence that names the first layer and tensor which a prompt of a golden computes otherwise; None if none."""
    return first_difference(golden["trace"], trace(model, golden["token_ids"], kv_scales), tolerance)


def first_difference(recorded: Mapping[str, Sketch], here: Mapping[str, Sketch], tolerance: float) -> str | None:
    """A sentence that names the first entry of two traces that differs, and what may cause it; None if none does."""
    for name, expected in recorded.items():
        if name not in here:
            return f"{name} was recorded, but this model has no such tensor."
        if deviation := _beyond(expected, here[name], tolerance):
            layer, module = names.split_name(name)
            what = name if layer is None or module in ("self_attn.k", "self_attn.v") else f"the input of {name}"
            last = "model.norm, lm_head or mlp.down_proj of the last layer"
            cause = last if layer is None else f"{CAUSES[module]} (model.layers.{layer})"
            return f"{what} {deviation}: everything before it is as recorded, so look at {cause}."
    return None


@torch.inference_mode()
def trace(model: Decoder, token_ids: Sequence[int], kv_scales: KVScales | PerToken | None) -> dict[str, Sketch]:
    """Sketches of what the last token of a prompt computes, by name and in order, through a KV cache of its own."""
    batch, num_pages = _whole(token_ids, model.device)
    cache = KVCache(
        model.config, num_pages=num_pages, page_len=PAGE_LEN, device=model.device, dtype=model.dtype, scales=kv_scales
    )
    rope = rope_tables(model.config, batch)
    sketches: dict[str, Sketch] = {}
    hidden = model.embed(batch.token_ids)
    for number, layer in enumerate(model.layers):

        def observe(module: str, value: Tensor, number: int = number) -> None:
            if module in CAUSES:
                sketches[names.layer_name(number, module)] = sketch(value[-1])

        hidden = layer(hidden, batch, cache.layers[number], rope, observe)
    sketches[LOGITS] = sketch(model.head(hidden[-1:])[0])
    return sketches


def sketch(values: Tensor) -> Sketch:
    """The sketch of a tensor. Matrices are multiplied by a sign vector from either side, which costs no memory."""
    rows = values.detach().to("cpu", torch.float32)
    rows = rows.reshape(len(rows), -1) if rows.dim() > 1 else rows.reshape(1, -1)
    left, right = _signs("rows", len(rows)), _signs("columns", rows.shape[1])
    products = ((left @ rows) * right).double().sum(1) / math.sqrt(rows.numel())
    size = float(rows.double().square().mean().sqrt())
    return [_rounded(value) for value in (size, *products.tolist())]


def deviation(recorded: Sketch, here: Sketch) -> float:
    """The largest difference of two sketches as a share of the recorded root mean square."""
    largest = max(abs(a - b) for a, b in zip(recorded, here, strict=True))
    return largest / recorded[0] if recorded[0] > 0 else (0.0 if largest == 0 else math.inf)


def _beyond(recorded: Sketch, here: Sketch, tolerance: float) -> str | None:
    share = deviation(recorded, here)
    return f"deviates by {share:.2%} of its size (tolerance {tolerance:.2%})" if share > tolerance else None


def _last_logits(engine: Engine, prompt_ids: Sequence[list[int]]) -> list[Tensor]:
    last: dict[int, Tensor] = {}

    def on_logits(item: int, start: int, logits: Tensor) -> None:
        last[item] = logits[-1]

    engine.score(prompt_ids, on_logits)
    return [last[item] for item in range(len(prompt_ids))]


def _whole(token_ids: Sequence[int], device: torch.device) -> tuple[Batch, int]:
    """One sequence from its first token, in pages 0, 1, ... of a cache."""
    count, num_pages = len(token_ids), -(-len(token_ids) // PAGE_LEN)
    batch = dataclasses.replace(
        packed([list(token_ids)], device=device),
        page_table=torch.arange(num_pages, dtype=torch.int32, device=device)[None],
        slots=torch.arange(count, device=device),
    )
    return batch, num_pages


def _signs(seed: str, length: int) -> Tensor:
    """NUM_SIGNS vectors of +1 and -1, float32 [NUM_SIGNS, length], the same on every machine."""
    stream = hashlib.shake_256(f"ingot {seed}".encode()).digest(-(-NUM_SIGNS * length // 8))
    bits = np.unpackbits(np.frombuffer(stream, dtype=np.uint8))[: NUM_SIGNS * length]
    return torch.from_numpy(bits.reshape(NUM_SIGNS, length)).float() * 2 - 1


def _rounded(value: float) -> float:
    return float(f"{value:.6g}") if math.isfinite(value) else torch.finfo(torch.float32).max
