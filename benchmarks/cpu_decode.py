"""`ingot bench cpu_decode`: decode steps of whole models on a CPU, recipes and other engines by turns."""

from __future__ import annotations

import importlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.options import option, read_options
from benchmarks.rows import RESULTS, check_out, provenance, record
from benchmarks.shapes import SHAPES, shape

if TYPE_CHECKING:
    from benchmarks.subject import Subject

ABOUT = """
One decode step of each engine after the other, again and again, so that other work on the machine meets all of them:
the engine with float32 weights, w4a16, w4a16 with an int8 output matrix and w8a8; Hugging Face transformers in float32;
llama.cpp with Q4_0 and Q8_0 weights, through llama-cpp-python. Random weights of a shape; `batch` sequences, `input`
tokens in the cache when the steps begin, greedy. One thread is timed by the processor's clock, several by the wall's.
`times_hf` and `times_fp32` compare the best step of each, the columns `_median` the medians. llama.cpp rounds
activations to int8 in blocks of 32; w4a16 keeps them as they are.
"""
OURS = {
    "fp32": ("fp16", "fp16"),  # a CPU computes fp16 weights in float32
    "w4a16": ("w4a16", "fp16"),
    "w4a16-int8head": ("w4a16", "int8"),
    "w8a8": ("w8a8", "fp16"),
}
LLAMA_CPP = {"llama_cpp_q4_0": "Q4_0", "llama_cpp_q8_0": "Q8_0"}
ENGINES = (*OURS, "hf", *LLAMA_CPP)
SESSION_LEN = 512
SHOWN = (
    "model",
    "engine",
    "batch",
    "threads",
    "clock",
    "turns",
    "step_ms",
    "step_ms_median",
    "tokens_per_second",
    "times_fp32",
    "times_hf",
    "times_hf_median",
    "gb_s",
)

Step = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    shape: str = option("tinyllama_1b", "whose sizes the models have", choices=tuple(SHAPES))
    engines: tuple[str, ...] = option(("fp32", "w4a16", "w4a16-int8head", "w8a8", "hf"), f"of {', '.join(ENGINES)}")
    batch: tuple[int, ...] = option((1, 4, 16), "sequences at once; rows each", least=1)
    input: int = option(16, "tokens of a prompt", least=1)
    seconds: float = option(30.0, "of turns for each batch", least=0)
    group_size: int = option(128, "inputs that share an int4 scale", least=1)
    seed: int = option(0, "of the random weights and prompts", least=0)
    out: Path = option(RESULTS / "cpu_decode.csv", "rows are added to this file; `none` keeps none")


def main(argv: list[str]) -> int:
    options = read_options(Options, argv, prog="ingot bench cpu_decode", about=ABOUT)
    check_out(options.out)
    if unknown := [name for name in options.engines if name not in ENGINES]:
        raise ValueError(f"engines={','.join(unknown)} is not known; there are {', '.join(ENGINES)}.")
    import torch

    from benchmarks.turns import take_turns

    with ExitStack() as stack:
        made = {name: _engine(name, options, stack) for name in options.engines}
        for batch in options.batch:
            prompts = torch.randint(3, shape(options.shape).vocab_size, (batch, options.input)).tolist()
            steps = {name: engine.start(prompts) for name, engine in made.items()}
            with torch.inference_mode():
                found = take_turns(steps, seconds=options.seconds, threads=torch.get_num_threads())
            for name, turns in found.items():
                row: dict[str, object] = {
                    **provenance(),
                    "instructions": torch.backends.cpu.get_cpu_capability(),
                    "threads": torch.get_num_threads(),
                    "model": options.shape,
                    "engine": name,
                    "version": made[name].version,
                    "batch": batch,
                    "input": options.input,
                    "clock": turns.clock,
                    "turns": len(turns.seconds),
                    "step_ms": round(turns.best * 1e3, 2),
                    "step_ms_median": round(turns.median * 1e3, 2),
                    "tokens_per_second": round(batch / turns.best, 2),
                    "weights_mb": round(made[name].weight_bytes / 1e6, 3),
                    "gb_s": round(made[name].weight_bytes / turns.best / 1e9, 2),
                }
                for other in ("fp32", "hf"):
                    if other in found:
                        row[f"times_{other}"] = round(found[other].best / turns.best, 2)
                        row[f"times_{other}_median"] = round(found[other].median / turns.median, 2)
                record(options.out, row, SHOWN)
    return 0


class Ours:
    """Ingot's engine over one recipe."""

    version = "ingot"

    def __init__(self, subject: Subject, *, most: int) -> None:
        from benchmarks.floor import cost
        from benchmarks.generation import enough_pages

        self.weight_bytes = cost(subject.config, subject.recipe, subject.dtype).weight_bytes
        self._engine = subject.engine(
            session_len=SESSION_LEN, max_batch_size=most, cache_max_entry_count=enough_pages(most, SESSION_LEN, 0)
        )
        self._running: list[str] = []

    def start(self, prompts: list[list[int]]) -> Step:
        from engine.config import Sampling

        def begin() -> None:
            for request in self._running:
                self._engine.abort(request)
            while self._engine.has_work():
                self._engine.step()
            sampling = Sampling(temperature=0.0, max_new_tokens=SESSION_LEN, ignore_eos=True)
            self._running = [self._engine.add(prompt, sampling) for prompt in prompts]
            left[0] = SESSION_LEN - len(prompts[0]) - 2
            self._engine.step()

        def step() -> None:
            if left[0] == 0:
                begin()
            left[0] -= 1
            self._engine.step()

        left = [0]
        return step


class Transformers:
    """Hugging Face's model in float32 with its own cache; the loop is ours, so `generate` costs it nothing."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        import torch
        import transformers

        from benchmarks.floor import cost
        from benchmarks.random_checkpoint import write_checkpoint

        write_checkpoint(folder, subject.config, subject.recipe, seed=subject.seed)
        self.version = f"transformers {transformers.__version__}"
        self.weight_bytes = cost(subject.config, subject.recipe, torch.float32).weight_bytes
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def start(self, prompts: list[list[int]]) -> Step:
        import torch

        def steps() -> Iterator[None]:
            while True:
                ids, cache = torch.tensor(prompts), None
                for _ in range(SESSION_LEN - len(prompts[0])):
                    answer: Any = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    ids, cache = answer.logits[:, -1].argmax(-1, keepdim=True), answer.past_key_values
                    yield

        running = steps()
        return lambda: next(running)


class LlamaCpp:
    """llama.cpp's library with as many threads as torch has."""

    def __init__(self, subject: Subject, path: Path, kind: str, *, most: int) -> None:
        import torch

        llama_cpp: Any = importlib.import_module("llama_cpp")
        from benchmarks.random_gguf import write_gguf

        write_gguf(path, subject.config, kind, seed=subject.seed)
        embedding = subject.config.vocab_size * subject.config.hidden_size
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self.weight_bytes = path.stat().st_size - embedding * {"Q4_0": 18, "Q8_0": 34}[kind] // 32
        self._lib = llama_cpp
        self._vocab_size = subject.config.vocab_size
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp does not load {path.name}.")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = SESSION_LEN * most, most
        settings.n_batch = settings.n_ubatch = max(512, 16 * most)
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise ValueError("llama.cpp does not make a context.")

    def start(self, prompts: list[list[int]]) -> Step:
        import numpy as np

        lib = self._lib
        batch = lib.llama_batch_init(sum(map(len, prompts)), 0, 1)

        def decode(columns: list[list[int]], place: int) -> list[list[int]]:
            """Computes one or more tokens of every sequence, the first at `place`; the likeliest token after each."""
            entries = [(s, place + i, token) for s, tokens in enumerate(columns) for i, token in enumerate(tokens)]
            batch.n_tokens = len(entries)
            for at, (sequence, position, token) in enumerate(entries):
                batch.token[at], batch.pos[at] = token, position
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = position == place + len(columns[sequence]) - 1
            if code := lib.llama_decode(self._context, batch):
                raise ValueError(f"llama_decode ended with {code}.")
            drawn = []
            for at in itertools.accumulate(map(len, columns)):
                logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, at - 1), (self._vocab_size,))
                drawn.append([int(logits.argmax())])
            return drawn

        def steps() -> Iterator[None]:
            while True:
                lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
                tokens, place = decode(prompts, 0), len(prompts[0])
                yield
                while place < SESSION_LEN - 1:
                    tokens, place = decode(tokens, place), place + 1
                    yield

        running = steps()
        return lambda: next(running)


def _engine(name: str, options: Options, stack: ExitStack) -> Ours | Transformers | LlamaCpp:
    import torch

    from benchmarks.subject import Subject
    from engine.config import Recipe

    weights, head = OURS.get(name, ("fp16", "fp16"))
    group_size = options.group_size if weights == "w4a16" else 0
    subject = Subject(
        name=options.shape,
        config=shape(options.shape),
        recipe=Recipe(weights=weights, kv="kv16", group_size=group_size, head=head),
        tp=1,
        device="cpu",
        dtype=torch.float32,
        seed=options.seed,
    )
    most = max(options.batch)
    if name in OURS:
        return Ours(subject, most=most)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    try:
        if name == "hf":
            return Transformers(subject, folder / "checkpoint")
        return LlamaCpp(subject, folder / "model.gguf", LLAMA_CPP[name], most=most)
    except ImportError as error:
        raise ValueError(f"engines={name} needs {error.name}, which this Python does not have.") from error
