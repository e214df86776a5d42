"""Train the demo's model from nothing: `python -m demo.train --out demo/model`."""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from demo.tokenizer import VOCABULARY_SIZE, train_tokenizer, write_tokenizer
from demo.world import END_OF_TEXT, TURN_END, TURN_START, make_world, training_documents

MODEL_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.04,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": VOCABULARY_SIZE,
}
CHANNEL_SCALES = (1.0, 2.0, 4.0, 8.0)
GENERATION_CONFIG = {"bos_token_id": 0, "do_sample": False, "eos_token_id": [2, 0], "pad_token_id": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long and how fast to train; the last `long_fraction` of the steps sees few long rows, not many short ones."""

    num_steps: int = 1000
    tokens_per_step: int = 1024
    short_row: int = 128
    long_row: int = 512
    long_fraction: float = 0.15
    peak_rate: float = 1e-3
    warmup_steps: int = 40
    decay_fraction: float = 0.5
    weight_decay: float = 0.1
    answer_weight: float = 3.0
    max_gradient_norm: float = 1.0
    seed: int = 20
    num_threads: int = 2

    def row_length(self, step: int) -> int:
        """Tokens in each row of `step`."""
        return self.long_row if step >= self.num_steps * (1 - self.long_fraction) else self.short_row

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, a plateau, then half a cosine down to zero over the last `decay_fraction` of the steps."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        decay_start = self.num_steps * (1 - self.decay_fraction)
        done = max(0.0, (step - decay_start) / (self.num_steps - decay_start))
        return self.peak_rate * warm * 0.5 * (1 + math.cos(math.pi * done))


def loss_weights(tokenizer: Tokenizer, ids: list[int], schedule: Schedule) -> list[float]:
    """One weight a token: `answer_weight` from after the assistant's header up to and with the end of the turn, else 1.

    Three lets 1000 steps learn what at one takes many more: most tokens of a chat are markers and the question.
    """
    start, end, role = (tokenizer.token_to_id(token) for token in (TURN_START, TURN_END, "assistant"))
    weights, inside = [], False
    for position, token in enumerate(ids):
        weights.append(schedule.answer_weight if inside else 1.0)
        if token == end:
            inside = False
        elif position >= 2 and ids[position - 2 : position] == [start, role]:
            inside = True
    return weights


def batches(
    tokenizer: Tokenizer, documents: list[str], schedule: Schedule
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids (int64) and loss weights (fp32), both (rows, row length + 1), a step.

    Every row starts at a document and cuts its last one off. Odd rows start with `<|endoftext|>` and use it between
    documents; even rows start bare and use a blank line, so that a prompt works with and without a first token.
    Raises ValueError when the documents run out.
    """
    marked, bare = tokenizer.encode(END_OF_TEXT).ids, tokenizer.encode("\n\n").ids
    encoded = iter(tokenizer.encode_batch_fast(documents))
    for step in range(schedule.num_steps):
        length = schedule.row_length(step)
        rows: list[list[int]] = []
        weights: list[list[float]] = []
        for row_index in range(schedule.tokens_per_step // length):
            separator = marked if row_index % 2 else bare
            row = list(marked) if row_index % 2 else []
            while len(row) < length + 1:
                document = next(encoded, None)
                if document is None:
                    raise ValueError(f"the training text ends at step {step} of {schedule.num_steps}")
                row += document.ids + separator
            rows.append(row[: length + 1])
            weights.append(loss_weights(tokenizer, rows[-1], schedule))
        yield torch.tensor(rows), torch.tensor(weights)


def train(tokenizer: Tokenizer, documents: list[str], schedule: Schedule) -> Any:
    """A trained `LlamaForCausalLM` in fp32; the same bytes each time on one machine."""
    torch.set_num_threads(schedule.num_threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(schedule.seed)
    model = LlamaForCausalLM(LlamaConfig.from_dict({**MODEL_CONFIG, "torch_dtype": "float32"}))
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True)
    started, processor_started = time.perf_counter(), time.process_time()
    for step, (ids, weights) in enumerate(batches(tokenizer, documents, schedule)):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)
        logits = model(ids[:, :-1], use_cache=False).logits
        losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        counted = weights[:, 1:].flatten()
        loss = (losses * counted).sum() / counted.sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            wall, processor = time.perf_counter() - started, time.process_time() - processor_started
            print(f"step {step + 1:5d}  loss {loss.item():.4f}  wall {wall:.0f} s  CPU {processor:.0f} s", flush=True)
    spread_channels(model)
    return model.eval()


@torch.no_grad()
def spread_channels(model: Any) -> None:
    """Multiply each norm's gains by `CHANNEL_SCALES` in turn and divide the columns that read them by the same.

    The function stays the same, exactly, for the scales are powers of two. What changes is how well it survives
    rounding: large models grow channels of unequal scale, a model this young does not, and 3 bits cost it nothing.
    """
    scales = torch.tensor(CHANNEL_SCALES).repeat(MODEL_CONFIG["hidden_size"] // len(CHANNEL_SCALES))
    for layer in model.model.layers:
        attention, feed_forward = layer.self_attn, layer.mlp
        layer.input_layernorm.weight *= scales
        layer.post_attention_layernorm.weight *= scales
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            linear.weight /= scales
        for linear in (feed_forward.gate_proj, feed_forward.up_proj):
            linear.weight /= scales


def write_model(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a Hugging Face folder with fp16 weights; files of the same names are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().half().contiguous() for name, weight in model.state_dict().items()}
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    write_tokenizer(tokenizer, folder)
    for name, content in (("config.json", MODEL_CONFIG), ("generation_config.json", GENERATION_CONFIG)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train and write the model folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/model"), help="the folder to write")
    parser.add_argument("--steps", type=int, default=Schedule().num_steps, help="optimizer steps")
    arguments = parser.parse_args()
    documents = training_documents(make_world())
    tokenizer = train_tokenizer(documents)
    try:
        model = train(tokenizer, documents, Schedule(num_steps=arguments.steps))
        write_model(model, tokenizer, arguments.out)
    except (ValueError, OSError) as error:
        parser.exit(1, f"demo.train: {error}\n")


if __name__ == "__main__":
    main()
