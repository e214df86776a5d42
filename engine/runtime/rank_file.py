"""Byte-pair ranks in a text file, one `base64 rank` a line: `qwen.tiktoken`, and the `tokenizer.model` of Llama 3.

Such a file says neither how text is split before merging nor which special tokens follow the ranks: both are known
here for these two models. tokenizer_config.json (`added_tokens_decoder`) may name special tokens otherwise.
"""

from __future__ import annotations

import binascii
import itertools
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiktoken

from engine.runtime.added_tokens import AddedToken, read_added_tokens

QWEN_FILE = "qwen.tiktoken"
FIRST_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")
# A million spaces in a row overflow the stack of tiktoken's pattern. Llama 3's own tokenizer cuts at this length too.
LONGEST_SPACE = re.compile(r"\s{25000}")
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What a rank file leaves out. `special` follow the ranks in order; `digits` is the longest number kept whole."""

    special: tuple[str, ...]
    digits: int
    named: Mapping[str, str]
    normal_form: bool = False
    begins: bool = False


QWEN = Model(
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))),
    digits=1,
    named={"eos_token": "<|endoftext|>"},
    normal_form=True,
)
LLAMA3 = Model(
    special=(
        *("<|begin_of_text|>", "<|end_of_text|>"),
        *(f"<|reserved_special_token_{i}|>" for i in range(4)),
        *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
        *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
    ),
    digits=3,
    named={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    begins=True,
)


def is_rank_file(file: Path) -> bool:
    """Whether a tokenizer.model begins as a rank file does; a SentencePiece model never does."""
    with file.open("rb") as stream:
        return FIRST_LINE.match(stream.read(1024)) is not None


class RankVocabulary:
    """A rank file with its model's special tokens, which become their ids where the text spells them."""

    leading_spaces = 0

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self._model = QWEN if file.name == QWEN_FILE else LLAMA3
        ranks = read_ranks(file)
        special = dict(zip(self._model.special, itertools.count(len(ranks)), strict=False))
        special = _renamed(special, read_added_tokens(settings, file.parent), file, count=len(ranks))
        self._special = special
        self.special_ids = frozenset(special.values())
        self.size = max(len(ranks) - 1, *special.values()) + 1
        self.own_tokens = {name: token for name, token in self._model.named.items() if token in special}
        self._bytes = {rank: token for token, rank in ranks.items()} | {i: s.encode() for s, i in special.items()}
        self._encoding = tiktoken.Encoding(
            name=file.name,
            pat_str=PATTERN.replace("DIGITS", str(self._model.digits)),
            mergeable_ranks=ranks,
            special_tokens=special,
        )
        begins = settings.get("add_bos_token", self._model.begins) and "bos_token" in self.own_tokens
        self._prefix = [special[self.own_tokens["bos_token"]]] if begins else []

    def encode(self, text: str, add_special: bool) -> list[int]:
        if self._model.normal_form:
            text = unicodedata.normalize("NFC", text)
        ids = [i for part in _parts(text) for i in self._encoding.encode(part, allowed_special="all")]
        return [*self._prefix, *ids] if add_special else ids

    def to_bytes(self, token_id: int) -> bytes:
        return self._bytes.get(token_id, b"")

    def token_id(self, text: str) -> int | None:
        return self._special.get(text)


def read_ranks(file: Path) -> dict[bytes, int]:
    """Token -> rank. ValueError naming the line that is not `base64 rank`, or what is missing among ranks and bytes."""
    ranks: dict[bytes, int] = {}
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                token, rank = line.split()
                ranks[binascii.a2b_base64(token, strict_mode=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                shown = line[:60].decode(errors="replace").rstrip()
                raise ValueError(f"{file}: line {number} is not 'base64 rank': {shown!r}") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{file}: the ranks are not 0 to {len(ranks) - 1}, each once: fetch the file again")
    absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if absent:
        raise ValueError(f"{file}: there is no token for the byte {absent[0]:#04x}: fetch the file again")
    return ranks


def _renamed(special: Mapping[str, int], added: Mapping[int, AddedToken], file: Path, *, count: int) -> dict[str, int]:
    """`special` with what tokenizer_config.json says about them; ValueError where it names an id among the ranks."""
    given = {token_id: token.content for token_id, token in added.items()}
    if given and min(given) < count:
        raise ValueError(
            f"{file.parent}: tokenizer_config.json adds a token with id {min(given)}, which {file.name} has given away"
        )
    kept = {token: i for token, i in special.items() if i not in given and token not in given.values()}
    return kept | {token: i for i, token in given.items()}


def _parts(text: str) -> list[str]:
    """The text, cut after every 25,000 characters of one run of spaces."""
    cuts = [0, *(match.end() for match in LONGEST_SPACE.finditer(text)), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(cuts)]
