"""Text to token ids and back, from the files of a folder; no code from the folder is ever run."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from engine.runtime import token_bytes
from engine.runtime.chat_template import ChatTemplate, read_chat_template
from engine.runtime.rank_file import QWEN_FILE, RankVocabulary, is_rank_file

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
PLACEHOLDER = re.compile(r"\[.+\]|<.+>")
# Protobuf merges a repeated message, the last value wins: ModelProto.normalizer_spec.add_dummy_prefix = false.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


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

    def chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """`messages` rendered by the model's chat template; ValueError when it has none or refuses them."""
        return self._template.render(messages, add_generation_prompt=add_generation_prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of the rendered messages. The template writes BOS itself, so none is added."""
        return self.encode(self.chat(messages, add_generation_prompt=add_generation_prompt), add_special=False)

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
                break
        own = self._token_id("eos_token")
        return found if own is None else [*found, own]


class IncrementalDecoder:
    """Text of a growing list of ids, piece by piece: the pieces joined are `Tokenizer.decode` of all the ids.

    A character is held back until its last byte has come. With `prompt_ids` the text continues that prompt, so that
    a SentencePiece word keeps its leading space. Each token costs its own bytes, however long the text is.
    """

    def __init__(self, tokenizer: Tokenizer, *, prompt_ids: Sequence[int] = (), skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        begun = any(tokenizer.token_bytes(token_id, skip_special=skip_special) for token_id in prompt_ids)
        self._strip = 0 if begun else tokenizer.leading_spaces

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` finish."""
        token_bytes = self._tokenizer.token_bytes
        joined = b"".join(token_bytes(token_id, skip_special=self._skip_special) for token_id in ids)
        return self._stripped(self._utf8.decode(joined))

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


class JsonVocabulary:
    """A tokenizer.json, with added tokens that only tokenizer_config.json names.

    Such a token may have the id of a placeholder in the vocabulary (InternLM2's `<|im_end|>` is [UNUSED_TOKEN_145]).
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        try:
            text = file.read_text(encoding="utf-8")
            content = json.loads(text)
            if _name_placeholders(content, settings.get("added_tokens_decoder", {})):
                text = json.dumps(content)
            self._backend = tokenizers.Tokenizer.from_str(text)
            decoder = content.get("decoder")
        except Exception as error:  # the library raises bare Exception for a file that it cannot read
            raise ValueError(f"{file} is not a readable tokenizer: {error}") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        known = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        for token_id, entry in sorted(settings.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
            self._add(file, int(token_id), entry, known)
        self._rule = token_bytes.piece_rule(decoder, source=str(file))
        self.leading_spaces = self._rule.strip
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.size = self._backend.get_vocab_size()
        self.own_tokens: dict[str, str] = {}

    def encode(self, text: str, add_special: bool) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=add_special).ids)

    def to_bytes(self, token_id: int) -> bytes:
        piece = self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        return b"" if piece is None else self._rule.to_bytes(piece)

    def token_id(self, piece: str) -> int | None:
        return self._backend.token_to_id(piece)

    def _add(self, file: Path, token_id: int, entry: Mapping[str, Any], known: set[str]) -> None:
        content = entry["content"]
        if content not in known:
            flags = {name: bool(entry.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "special")}
            token = tokenizers.AddedToken(content, normalized=entry.get("normalized", False), **flags)
            self._backend.add_tokens([token])
        if (found := self._backend.token_to_id(content)) != token_id:
            raise ValueError(
                f"{file.parent}: tokenizer_config.json says that {content!r} has id {token_id}, tokenizer.json {found}"
            )


class SentencePieceVocabulary:
    """A tokenizer.model alone. Control pieces and added tokens written in the text become their ids."""

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self._first = _load_sentencepiece(file)
        self._rest = self._first
        if not settings.get("legacy", True):
            # After a special token the text goes on; the older rule starts a new word there.
            self._rest = _load_sentencepiece(file, NO_DUMMY_PREFIX)
        count = self._first.get_piece_size()
        pieces = {i: self._first.id_to_piece(i) for i in range(count)}
        special = {i for i in pieces if self._first.is_control(i) or self._first.is_unknown(i)}
        self._added: dict[int, str] = {}
        for key, entry in settings.get("added_tokens_decoder", {}).items():
            self._added[int(key)] = entry["content"]
            if entry.get("special"):
                special.add(int(key))
        self.special_ids = frozenset(special)
        self.size = max([count - 1, *self._added]) + 1
        self._pieces = pieces | self._added
        self._ids = {piece: i for i, piece in self._pieces.items()}
        prefixed = "".join(self._first.encode("a", out_type=str)).startswith("\u2581")
        self._rule = token_bytes.sentencepiece([("\u2581", " ")], byte_fallback=True, strip=int(prefixed))
        self.leading_spaces = self._rule.strip
        own = {"bos_token": self._first.bos_id(), "eos_token": self._first.eos_id()}
        self.own_tokens = {name: pieces[i] for name, i in own.items() if i >= 0}
        self._prefix = [own["bos_token"]] if settings.get("add_bos_token", True) and own["bos_token"] >= 0 else []
        self._suffix = [own["eos_token"]] if settings.get("add_eos_token", False) and own["eos_token"] >= 0 else []
        marks = sorted({self._pieces[i] for i in special} | set(self._added.values()), key=len, reverse=True)
        self._split: Callable[[str], list[str]] = re.compile(f"({'|'.join(map(re.escape, marks))})").split

    def encode(self, text: str, add_special: bool) -> list[int]:
        ids: list[int] = []
        processor = self._first
        for index, part in enumerate(self._split(text)):
            if index % 2:
                ids.append(self._ids[part])
                processor = self._rest
            elif part:
                ids += processor.encode(part)
        return [*self._prefix, *ids, *self._suffix] if add_special else ids

    def to_bytes(self, token_id: int) -> bytes:
        piece = self._pieces.get(token_id)
        return b"" if piece is None else self._rule.to_bytes(piece)

    def token_id(self, piece: str) -> int | None:
        return self._ids.get(piece)


def _name_placeholders(content: dict[str, Any], added: Mapping[str, Mapping[str, Any]]) -> bool:
    """Give placeholders in the vocabulary of a tokenizer.json the names that `added` has for their ids; whether any."""
    vocabulary = content["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        return False
    named = {entry["content"] for entry in content.get("added_tokens", ())}
    wanted = {int(i): entry["content"] for i, entry in added.items()}
    absent = {i: token for i, token in wanted.items() if token not in vocabulary and token not in named}
    pieces = (
        [piece for piece, i in vocabulary.items() if i in absent and PLACEHOLDER.fullmatch(piece)] if absent else []
    )
    for piece in pieces:
        token_id = vocabulary.pop(piece)
        vocabulary[absent[token_id]] = token_id
    return bool(pieces)


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


def _load_sentencepiece(file: Path, appended: bytes = b"") -> Any:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes() + appended)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{file} is not a SentencePiece model: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; empty when the file does not exist."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object")
    return content


def _special_tokens(settings: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in NAMED_TOKENS:
        entry = settings.get(name) or special_map.get(name)
        content = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(content, str):
            found[name] = content
    return found
