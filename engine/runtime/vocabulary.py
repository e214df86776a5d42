"""The two kinds of tokenizer file that libraries read: text to ids, and ids to the bytes that they stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from engine.runtime import token_bytes
from engine.runtime.added_tokens import AddedToken, read_added_tokens
from engine.runtime.growth import check_growth
from engine.storage.json_file import read_object
from engine.wording import cut, shown

PLACEHOLDER = re.compile(r"\[.+\]|<.+>")
# Protobuf merges a repeated message, the last value wins: ModelProto.normalizer_spec.add_dummy_prefix = false.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class JsonVocabulary:
    """A tokenizer.json, with added tokens that only tokenizer_config.json names.

    Such a token may have the id of a placeholder in the vocabulary (InternLM2's `<|im_end|>` is [UNUSED_TOKEN_145]).
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self._file = file
        content = read_object(file)
        named = read_added_tokens(settings, file.parent)
        check_growth(content, file)
        with native_errors(f"{file} is not a readable tokenizer"):
            renamed = _name_placeholders(content, {token_id: token.content for token_id, token in named.items()})
            text = json.dumps(content) if renamed else file.read_text(encoding="utf-8-sig")
            self._backend = tokenizers.Tokenizer.from_str(text)
            self._backend.no_truncation()
            self._backend.no_padding()
        known = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        for token_id, token in named.items():
            self._add(file, token_id, token, known)
        self._rule = token_bytes.piece_rule(content.get("decoder"), source=str(file))
        self.leading_spaces = self._rule.strip
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.size = self._backend.get_vocab_size()
        self.own_tokens: dict[str, str] = {}

    def encode(self, text: str, add_special: bool) -> list[int]:
        with native_errors(f"{self._file} cannot encode this text"):
            return list(self._backend.encode(text, add_special_tokens=add_special).ids)

    def to_bytes(self, token_id: int) -> bytes:
        piece = self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        return b"" if piece is None else self._rule.to_bytes(piece)

    def token_id(self, piece: str) -> int | None:
        return self._backend.token_to_id(piece)

    def _add(self, file: Path, token_id: int, token: AddedToken, known: set[str]) -> None:
        if token.content not in known:
            with native_errors(f"{file.parent}: {shown(token.content)} cannot be added"):
                self._backend.add_tokens([tokenizers.AddedToken(**asdict(token))])
        if (found := self._backend.token_to_id(token.content)) != token_id:
            raise ValueError(
                f"{file.parent}: tokenizer_config.json says that {shown(token.content)} has id {token_id}, "
                f"tokenizer.json {found}"
            )


class SentencePieceVocabulary:
    """A tokenizer.model alone. Control pieces and added tokens written in the text become their ids."""

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self._file = file
        with native_errors(f"{file} is not a SentencePiece model"):
            self._first = _load_sentencepiece(file)
            self._rest = self._first
            if not settings.get("legacy", True):
                # After a special token the text goes on; the older rule starts a new word there.
                self._rest = _load_sentencepiece(file, NO_DUMMY_PREFIX)
            count = self._first.get_piece_size()
            pieces = {i: self._first.id_to_piece(i) for i in range(count)}
            special = {i for i in pieces if self._first.is_control(i) or self._first.is_unknown(i)}
            prefixed = "".join(self._first.encode("a", out_type=str)).startswith("\u2581")
        added = read_added_tokens(settings, file.parent)
        self._added = {token_id: token.content for token_id, token in added.items()}
        special |= {token_id for token_id, token in added.items() if token.special}
        self.special_ids = frozenset(special)
        self.size = max([count - 1, *self._added]) + 1
        self._pieces = pieces | self._added
        self._ids = {piece: i for i, piece in self._pieces.items()}
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
                with native_errors(f"{self._file} cannot encode this text"):
                    ids += processor.encode(part)
        return [*self._prefix, *ids, *self._suffix] if add_special else ids

    def to_bytes(self, token_id: int) -> bytes:
        piece = self._pieces.get(token_id)
        return b"" if piece is None else self._rule.to_bytes(piece)

    def token_id(self, piece: str) -> int | None:
        return self._ids.get(piece)


def _name_placeholders(content: dict[str, Any], wanted: Mapping[int, str]) -> bool:
    """Give placeholders in the vocabulary of a tokenizer.json the names `wanted` for their ids; whether any."""
    vocabulary = content["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        return False
    named = {entry["content"] for entry in content.get("added_tokens", ())}
    absent = {i: token for i, token in wanted.items() if token not in vocabulary and token not in named}
    pieces = (
        [piece for piece, i in vocabulary.items() if i in absent and PLACEHOLDER.fullmatch(piece)] if absent else []
    )
    for piece in pieces:
        token_id = vocabulary.pop(piece)
        vocabulary[absent[token_id]] = token_id
    return bool(pieces)


@contextmanager
def native_errors(what: str) -> Iterator[None]:
    """Whatever a library's native code raises, panics too, as a ValueError that begins with `what`."""
    try:
        yield
    except BaseException as error:
        # A panic of Rust is no Exception; its class is made by the library and cannot be imported.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{what}: {cut(' '.join(str(error).split())) or type(error).__name__}") from error
        raise


def _load_sentencepiece(file: Path, appended: bytes = b"") -> Any:
    content = file.read_bytes()
    if not content:  # which would make a processor without a model
        raise ValueError("it is empty")
    return sentencepiece.SentencePieceProcessor(model_proto=content + appended)
