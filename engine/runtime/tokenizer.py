"""Text to token ids and back, from the files of a folder; no code from the folder is ever run."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.runtime.added_tokens import LARGEST_ID
from engine.runtime.chat_template import ChatTemplate, read_chat_template
from engine.runtime.rank_file import QWEN_FILE, RankVocabulary, is_rank_file
from engine.runtime.vocabulary import JsonVocabulary, SentencePieceVocabulary
from engine.storage.json_file import read_object
from engine.wording import shown

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class Tokenizer:
    """The tokenizer of a folder: `tokenizer.json`, else `tokenizer.model`, else `qwen.tiktoken`; ValueError without.

    Ids are those of Hugging Face's AutoTokenizer: what tokenizer.json says about BOS holds, and `add_bos_token` and
    `add_eos_token` of tokenizer_config.json count for the other files alone. A tokenizer.model is read as what it is,
    a SentencePiece model or Llama 3's ranks.
    """

    def __init__(self, folder: Path, *, chat_template: str | None = None, end_ids: Sequence[int] = ()) -> None:
        """`chat_template` takes the place of the folder's own; at `end_ids` an answer ends as well."""
        self.folder = folder
        settings = _read_json(folder / "tokenizer_config.json")
        self._vocabulary = _read_vocabulary(folder, settings)
        named = _special_tokens(settings, _read_json(folder / "special_tokens_map.json"))
        self.special_tokens = self._vocabulary.own_tokens | named
        self.vocab_size = self._vocabulary.size
        self.bos_token_id = self._token_id("bos_token")
        self.eos_token_ids = tuple(dict.fromkeys([*self._end_ids(), *end_ids]))
        self.chat_template = read_chat_template(folder, settings) if chat_template is None else chat_template
        self._bytes: dict[int, bytes] = {}
        self._texts = {skip_special: TokenTexts(self, skip_special) for skip_special in (False, True)}

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Ids of `text`; special tokens written in it become their ids. `add_special` adds BOS where the model does."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, or bytes read with errors="surrogateescape"
            raise ValueError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from error
        return self._vocabulary.encode(text, add_special)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`. An id outside the vocabulary is empty; a byte that is not UTF-8 is U+FFFD."""
        decoder = IncrementalDecoder(self, skip_special=skip_special)
        return decoder.push(ids) + decoder.flush()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """`messages` rendered by the model's chat template; ValueError when it has none or refuses them."""
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Ids of the rendered messages. The template writes BOS itself, so none is added."""
        text = self.chat(messages, add_generation_prompt=add_generation_prompt, tools=tools)
        return self.encode(text, add_special=False)

    def token_id(self, text: str) -> int | None:
        """The id of a special or added token (or of a vocabulary entry, as it is spelled there); None for no token."""
        return self._vocabulary.token_id(text)

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """The bytes of one token; empty for an id outside the vocabulary and, with `skip_special`, a special one."""
        if skip_special and token_id in self._vocabulary.special_ids:
            return b""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._vocabulary.to_bytes(token_id)
        return found

    def texts(self, *, skip_special: bool = True) -> TokenTexts:
        return self._texts[skip_special]

    @property
    def leading_spaces(self) -> int:
        """How many spaces that the encoder put before the text are taken off again."""
        return self._vocabulary.leading_spaces

    @cached_property
    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise ValueError(
                "this model has no chat template: it completes text but does not chat; "
                "name one when it is built (model.template=chatml, ...), or put chat_template.jinja into its checkpoint"
            )
        return ChatTemplate(self.chat_template, source=str(self.folder), special_tokens=self.special_tokens)

    def _token_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._vocabulary.token_id(token)

    def _end_ids(self) -> list[int]:
        """What the generation config (else the model config) ends at, and the tokenizer's own EOS."""
        found: list[int] = []
        for name in ("generation_config.json", "config.json"):
            entry = _read_json(self.folder / name).get("eos_token_id")
            if entry is not None:
                found += entry if isinstance(entry, list) else [entry]
                if not all(type(token_id) is int and -1 <= token_id <= LARGEST_ID for token_id in found):
                    raise ValueError(
                        f"{self.folder / name} has eos_token_id = {shown(entry)}: it takes an id or a list of ids"
                    )
                break
        own = self._token_id("eos_token")
        return found if own is None else [*found, own]


class TokenTexts(dict[int, str | None]):
    """The text of each token by itself, put in when it is first asked for; None where it has a part of a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special

    def __missing__(self, token_id: int) -> str | None:
        try:
            text = self._tokenizer.token_bytes(token_id, skip_special=self._skip_special).decode()
        except UnicodeDecodeError:
            text = None
        self[token_id] = text
        return text


class IncrementalDecoder:
    """Text of a growing list of ids, piece by piece: the pieces joined are `Tokenizer.decode` of all the ids.

    A character is held back until its last byte has come. With `prompt_ids` the text continues that prompt, so that
    a SentencePiece word keeps its leading space. Each token costs its own bytes, however long the text is.
    """

    def __init__(self, tokenizer: Tokenizer, *, prompt_ids: Sequence[int] = (), skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._texts = tokenizer.texts(skip_special=skip_special)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        begun = any(tokenizer.token_bytes(token_id, skip_special=skip_special) for token_id in prompt_ids)
        self._strip = 0 if begun else tokenizer.leading_spaces
        self._plain = not self._strip  # a token's text is what it has by itself

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` finish."""
        token_bytes = self._tokenizer.token_bytes
        joined = b"".join([token_bytes(token_id, skip_special=self._skip_special) for token_id in ids])
        text = self._stripped(self._utf8.decode(joined))
        self._plain = not self._strip and not self._utf8.getstate()[0]
        return text

    def push_token(self, token_id: int) -> str:
        """`push` of one id, quicker where it has whole characters, as most have."""
        text = self._texts[token_id] if self._plain else None
        return self.push([token_id]) if text is None else text

    def flush(self) -> str:
        """What is left when no more ids come: U+FFFD for an unfinished character, else nothing."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if not text.startswith(" "):
                self._strip = 0
                break
            text, self._strip = text[1:], self._strip - 1
        return text


def _read_vocabulary(
    folder: Path, settings: Mapping[str, Any]
) -> JsonVocabulary | SentencePieceVocabulary | RankVocabulary:
    if (file := folder / "tokenizer.json").is_file():
        return JsonVocabulary(file, settings)
    if (file := folder / "tokenizer.model").is_file():
        return RankVocabulary(file, settings) if is_rank_file(file) else SentencePieceVocabulary(file, settings)
    if (file := folder / QWEN_FILE).is_file():
        return RankVocabulary(file, settings)
    other = ", ".join(sorted(path.name for path in folder.glob("*.tiktoken")))
    raise ValueError(
        f"{folder} has neither tokenizer.json nor tokenizer.model nor {QWEN_FILE}: copy the one of the model's "
        f"checkpoint there{f' (how {other} splits text is known to its remote code alone)' if other else ''}"
    )


def _read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; empty when the file does not exist."""
    return read_object(file) if file.is_file() else {}


def _special_tokens(settings: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in NAMED_TOKENS:
        entry = settings.get(name) or special_map.get(name)
        content = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(content, str):
            found[name] = content
    return found
