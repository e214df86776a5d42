"""Chat templates by name: the files of pipelines/templates/, and the token at which an answer in them ends.

Each is written from the public definition of the format that its models were trained with.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "templates"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.jinja")))
OWN = "own"
"""In place of a name: the checkpoint's, which has to be there."""
# Where a template is not here, an answer ends with the tokenizer's own EOS.
ENDS = {
    "chatml": "<|im_end|>",
    "internlm": "<eoa>",
    "internlm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "qwen": "<|im_end|>",
}


def read_template(name: str) -> str:
    """The text of a named template; ValueError listing the names for one that there is not."""
    if name not in NAMES:
        raise ValueError(f"{name} is no chat template; there are {', '.join(NAMES)}")
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
