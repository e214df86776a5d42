"""The chat template of a model: its checkpoint's own, or one that the model's entry in conf/ names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.runtime.tokenizer import Tokenizer
from pipelines.template_files import ENDS, NAMES, OWN, read_template


def open_tokenizer(folder: Path, template: str | None) -> Tokenizer:
    """The tokenizer of a checkpoint, with a named template in place of its own; None takes what there is.

    ValueError where the checkpoint has to have a template and has none, or where the named one does not fit it: the
    tokens that it writes have to be known to the tokenizer.
    """
    tokenizer = Tokenizer(folder)
    if template is None:
        return tokenizer
    if template == OWN:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{folder} has no chat template, and model.template={OWN} asks for it: name one of {', '.join(NAMES)}, "
                "or set model.template=null for a model that only completes text"
            )
        return tokenizer
    text, end = read_template(template), ENDS.get(template)
    end_id = tokenizer.token_id(end) if end else None
    if end and end_id is None:
        raise ValueError(
            f"model.template={template} ends an answer with {end}, which is no token of {folder}: name another template"
        )
    tokenizer = Tokenizer(folder, chat_template=text, end_ids=() if end_id is None else (end_id,))
    try:
        tokenizer.chat([{"role": "user", "content": "?"}])
    except ValueError as error:
        raise ValueError(f"model.template={template} does not fit the tokenizer of {folder}: {error}") from error
    return tokenizer


def write_template(tokenizer: Tokenizer, folder: Path) -> None:
    """Make the chat template and the end tokens of `tokenizer` those of the tokenizer files in `folder`."""
    (folder / "chat_template.jinja").write_text(str(tokenizer.chat_template), encoding="utf-8")
    if (folder / "tokenizer_config.json").is_file():
        settings = _read(folder / "tokenizer_config.json")
        settings.pop("chat_template", None)  # one template, in one place
        _write(folder / "tokenizer_config.json", settings)
    generation = _read(folder / "generation_config.json")
    _write(folder / "generation_config.json", generation | {"eos_token_id": list(tokenizer.eos_token_ids)})


def _read(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file. What is broken the tokenizer has refused before."""
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
