"""Measure the demo's model: `python -m demo.measure` prints answers and perplexity at 16, 4 and 3 bits a weight.

The rounding here is the plainest there is (round to nearest, no search): the floor that real recipes must beat.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaForCausalLM

GROUP_SIZE = 128
WINDOW = 256


def round_to_nearest(weight: torch.Tensor, *, bits: int, group_size: int = GROUP_SIZE) -> torch.Tensor:
    """The (out, in) weight after asymmetric rounding with one scale and zero point per `group_size` inputs."""
    grouped = weight.float().reshape(weight.shape[0], -1, group_size)
    low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low).clamp(min=1e-8) / (2**bits - 1)
    zero_point = (-low / scale).round()
    levels = ((grouped / scale).round() + zero_point).clamp(0, 2**bits - 1)
    rounded: torch.Tensor = (levels - zero_point) * scale
    return rounded.reshape(weight.shape).to(weight.dtype)


def load_model(folder: Path, *, bits: int = 16) -> Any:
    """The model in fp32 arithmetic, its decoder's linear layers rounded to `bits` where that is below 16."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if bits < 16:
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = round_to_nearest(module.weight.data, bits=bits)
    return model


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The rows of questions.jsonl: `messages` and `answer`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.inference_mode()
def greedy_answers(model: Any, tokenizer: Any, rows: list[dict[str, Any]], *, max_new_tokens: int = 8) -> list[str]:
    """The stripped greedy answer to each row, all in one batch padded on the left."""
    conversations = [row["messages"] for row in rows]
    prompts = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def accuracy(answers: list[str], rows: list[dict[str, Any]]) -> float:
    """The share of answers that equal the expected one."""
    num_right = sum(bool(answer == row["answer"]) for answer, row in zip(answers, rows, strict=True))
    return num_right / len(rows)


@torch.inference_mode()
def perplexity(model: Any, tokenizer: Any, text: str) -> float:
    """exp of the mean NLL over windows of `WINDOW` tokens that do not overlap, the first of each not scored."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    total = 0.0
    for batch in torch.split(windows, 16):
        logits = model(batch, use_cache=False).logits[:, :-1]
        total += cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (windows.shape[0] * (WINDOW - 1)))


def main() -> None:
    """Print one line for each width."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", type=Path, default=Path("demo/model"))
    parser.add_argument("--text", type=Path, default=Path("demo/text"))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = read_questions(arguments.text / "questions.jsonl")
    text = (arguments.text / "evaluation.txt").read_text(encoding="utf-8")
    print("bits  right  perplexity")
    for bits in (16, 4, 3):
        model = load_model(arguments.model, bits=bits)
        share = accuracy(greedy_answers(model, tokenizer, rows), rows)
        print(f"{bits:4d}  {share:5.1%}  {perplexity(model, tokenizer, text):10.4f}", flush=True)


if __name__ == "__main__":
    main()
