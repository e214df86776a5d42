"""`ingot bench workspace`: a named shape with random weights as a workspace folder, to be served or started cold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.options import option, read_options
from benchmarks.shapes import SHAPES, shape
from benchmarks.subject import RecipeOptions

ABOUT = """
Writes a workspace of random weights, with a tokenizer of bytes and words, a chat template and a manifest, and prints
its artifact id. `ingot serve folder=...` serves it; `ingot bench cold folder=...` starts it cold.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(RecipeOptions):
    shape: str = option("tiny", "the model", choices=tuple(SHAPES))
    kv: str = option("kv16", "KV cache: as computed, or int8", choices=("kv16", "kv8"))
    tp: int = option(1, "tensor-parallel ranks that the folder is written for", least=1)
    seed: int = option(0, "of the random weights", least=0)
    session_len: int = option(0, "longest sequence; 0 is the model's own", least=0)
    out: Path | None = option(None, "the folder, which must not exist")


def main(argv: list[str]) -> int:
    options = read_options(Options, argv, prog="ingot bench workspace", about=ABOUT)
    if options.out is None:
        raise ValueError("say where the workspace goes: out=FOLDER.")
    from benchmarks.random_workspace import write_workspace

    artifact_id = write_workspace(
        options.out,
        options.shape,
        shape(options.shape),
        options.recipe(options.kv),
        tp=options.tp,
        seed=options.seed,
        session_len=options.session_len,
    )
    print(artifact_id)
    return 0
