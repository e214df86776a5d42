"""The process in which llm-compressor quantizes: `python -m benchmarks.peer_quantization_process JOB.json`.

It runs under the Python of that tool's own environment, so it imports nothing of this project. JOB has a checkpoint, a
file of token blocks, a method, a group size, and where to write; one line of JSON, after MARK, says what it took. The
clock runs while `oneshot` does: the model is in memory before, and is written after.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

MARK = "RESULT "


def main() -> int:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import torch

    torch.set_num_threads(job["threads"])
    import llmcompressor
    from datasets import Dataset
    from llmcompressor.pipelines.cache import IntermediatesCache
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    if not torch.cuda.is_available():
        # Its AWQ pins memory for a GPU whether there is one or not, which torch refuses; nothing else is changed.
        IntermediatesCache.pin_memory = lambda *_, **__: None
    model = AutoModelForCausalLM.from_pretrained(job["checkpoint"], dtype=torch.float32)
    blocks = load_file(job["blocks"])["tokens"]
    data = Dataset.from_dict({"input_ids": blocks.tolist(), "attention_mask": torch.ones_like(blocks).tolist()})
    begun, spent = time.perf_counter(), time.process_time()
    llmcompressor.oneshot(
        model=model,
        dataset=data,
        recipe=_recipe(job["method"], job["group_size"]),
        max_seq_length=blocks.shape[1],
        num_calibration_samples=len(blocks),
        shuffle_calibration_samples=False,
        batch_size=job["batch"],
    )
    took = {"seconds": time.perf_counter() - begun, "processor_seconds": time.process_time() - spent}
    model.save_pretrained(job["out"], save_compressed=True)
    # Saved beside the checkpoint's own torch_dtype is the dtype that it was loaded in, which is another one here.
    config = Path(job["out"], "config.json")
    fields = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**fields, "torch_dtype": "float32", "dtype": "float32"}), encoding="utf-8")
    print(MARK + json.dumps(took | {"tool": f"llmcompressor {llmcompressor.__version__}"}), flush=True)
    return 0


def _recipe(method: str, group_size: int) -> list[Any]:
    """The tool's own defaults, but for the scheme: 4 bits, asymmetric, groups; the output matrix is left alone."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": group_size}
    asked = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    rounding = GPTQModifier(**asked) if "gptq" in method else QuantizationModifier(**asked)
    return [AWQModifier(), rounding] if "awq" in method else [rounding]


if __name__ == "__main__":
    sys.exit(main())
