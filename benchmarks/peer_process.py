"""The process in which another engine answers the cases: `python -m benchmarks.peer_process JOB.json`.

It runs under the Python of that engine, so it imports nothing of this project and nothing but that engine. JOB has the
engine's name, a checkpoint and cases, each a list of [prompt ids, new tokens]; for each case one line of JSON, after
MARK, says what came of it: seconds, tokens, seconds to the first token (a list) and of the decode steps, where they are
known.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

MARK = "RESULT "
WARM_UP_TOKENS = 16
Asked = list[tuple[list[int], int]]


class Peer(Protocol):
    """An engine with its model loaded. `run` answers all requests, greedily and to their full lengths."""

    version: str

    def run(self, requests: Asked) -> dict[str, Any]: ...


class Transformers:
    """Hugging Face's own generation: static batches of at most `at_once`, in the order of the requests, padded on the
    left; a batch ends when its longest answer does."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch
        import transformers

        self.version = transformers.__version__
        self._torch = torch
        self._device = job["device"]
        self._at_once = job["at_once"]
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            job["checkpoint"], dtype=getattr(torch, job["dtype"])
        )
        self._model.to(self._device).eval()
        self._model.generation_config.eos_token_id = None

    def run(self, requests: Asked) -> dict[str, Any]:
        torch = self._torch
        begun = time.perf_counter()
        tokens, first, steps = 0, [], []
        for start in range(0, len(requests), self._at_once):
            batch = requests[start : start + self._at_once]
            longest = max(len(prompt) for prompt, _ in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, (prompt, _) in enumerate(batch):
                ids[row, longest - len(prompt) :] = torch.tensor(prompt)
                mask[row, longest - len(prompt) :] = 1
            times: list[float] = []
            new_tokens = max(count for _, count in batch)
            answer = self._model.generate(
                ids.to(self._device),
                attention_mask=mask.to(self._device),
                do_sample=False,
                max_new_tokens=new_tokens,
                pad_token_id=0,
                stopping_criteria=[self._clock(times)],
            )
            if answer.shape != (len(batch), longest + new_tokens):
                raise ValueError(f"transformers gave {answer.shape[1] - longest} tokens, not {new_tokens}")
            tokens += sum(count for _, count in batch)
            first += [times[0] - begun] * len(batch)
            steps += [after - before for before, after in itertools.pairwise(times)]
        return {"seconds": time.perf_counter() - begun, "tokens": tokens, "first": first, "steps": steps}

    def _clock(self, times: list[float]) -> Any:
        torch = self._torch

        def stop(ids: Any, scores: Any, **_: Any) -> Any:
            if self._device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        return stop


class Vllm:
    """vLLM's offline engine. It shows no steps: the first token is timed in a run that asks for one token each."""

    def __init__(self, job: dict[str, Any]) -> None:
        import vllm

        self.version = vllm.__version__
        self._vllm = vllm
        self._time_first = job["time_first"]
        self._engine = vllm.LLM(
            model=job["checkpoint"],
            dtype=job["dtype"],
            max_model_len=job["session_len"],
            max_num_seqs=job["at_once"],
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
        )

    def run(self, requests: Asked) -> dict[str, Any]:
        first = [self._seconds([(prompt, 1) for prompt, _ in requests])] if self._time_first else []
        seconds = self._seconds(requests)
        return {"seconds": seconds, "tokens": sum(count for _, count in requests), "first": first, "steps": []}

    def _seconds(self, requests: Asked) -> float:
        options = [
            self._vllm.SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=count, detokenize=False)
            for _, count in requests
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        begun = time.perf_counter()
        answers = self._engine.generate(prompts, options, use_tqdm=False)
        seconds = time.perf_counter() - begun
        for answer, (_, count) in zip(answers, requests, strict=True):
            if len(answer.outputs[0].token_ids) != count:
                raise ValueError(f"vllm gave {len(answer.outputs[0].token_ids)} tokens, not {count}")
        return seconds


class LMDeploy:
    """LMDeploy's TurboMind, driven as its own throughput benchmark does: `at_once` workers, each with an instance."""

    def __init__(self, job: dict[str, Any]) -> None:
        import lmdeploy
        from lmdeploy import TurbomindEngineConfig
        from lmdeploy.turbomind import TurboMind

        self.version = lmdeploy.__version__
        self._lmdeploy = lmdeploy
        self._at_once = job["at_once"]
        config = TurbomindEngineConfig(
            model_format="awq" if job["weights"] == "w4a16" else "hf",
            session_len=job["session_len"],
            max_batch_size=job["at_once"],
            quant_policy=8 if job["kv"] == "kv8" else 0,
            enable_prefix_caching=False,
        )
        self._engine = TurboMind.from_pretrained(job["checkpoint"], engine_config=config)

    def run(self, requests: Asked) -> dict[str, Any]:
        return asyncio.run(self._all(requests))

    async def _all(self, requests: Asked) -> dict[str, Any]:
        begun = time.perf_counter()
        waiting = list(enumerate(requests))[::-1]
        first: list[float] = []

        async def worker() -> None:
            instance = self._engine.create_instance()
            while waiting:
                number, (prompt, count) = waiting.pop()
                options = self._lmdeploy.GenerationConfig(max_new_tokens=count, ignore_eos=True, top_k=1)
                came = False
                async for _ in instance.async_stream_infer(
                    number + 1,
                    input_ids=prompt,
                    gen_config=options,
                    sequence_start=True,
                    sequence_end=True,
                    stream_output=True,
                ):
                    if not came:
                        came = True
                        first.append(time.perf_counter() - begun)

        await asyncio.gather(*(worker() for _ in range(min(self._at_once, len(requests)))))
        seconds = time.perf_counter() - begun
        return {"seconds": seconds, "tokens": sum(count for _, count in requests), "first": first, "steps": []}


PEERS: dict[str, Callable[[dict[str, Any]], Peer]] = {"hf": Transformers, "vllm": Vllm, "lmdeploy": LMDeploy}


def main() -> int:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    begun = time.perf_counter()
    peer = PEERS[job["peer"]](job)
    load_seconds = time.perf_counter() - begun
    for case in job["cases"]:
        requests = [(prompt, count) for prompt, count in case]
        peer.run([(prompt, min(count, WARM_UP_TOKENS)) for prompt, count in requests[: job["at_once"]]])
        result = peer.run(requests) | {"version": peer.version, "load_seconds": load_seconds}
        print(MARK + json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
