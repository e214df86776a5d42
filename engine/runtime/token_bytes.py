"""The bytes that a token stands for. Text is these bytes joined and read as UTF-8, which makes streaming exact."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Piece = Callable[[str], bytes]
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
READABLE = "ByteLevel, Metaspace, or a Sequence of Replace, ByteFallback, Fuse and Strip"


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceRule:
    """`to_bytes` reads one vocabulary entry; `strip` spaces are then taken from the start of the whole text."""

    to_bytes: Piece
    strip: int = 0


def byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of the byte-level BPE (Radford et al. 2019): printable Latin-1 stands for itself, the
    68 other bytes, in order, for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


def byte_level() -> PieceRule:
    alphabet = byte_level_alphabet()

    def to_bytes(piece: str) -> bytes:
        try:
            return bytes(alphabet[character] for character in piece)
        except KeyError:
            return piece.encode()  # an added token is plain text, not in the alphabet

    return PieceRule(to_bytes=to_bytes)


def sentencepiece(replacements: list[tuple[str, str]], *, byte_fallback: bool, strip: int) -> PieceRule:
    """Replace strings in order; `<0x0A>` is the byte 10 where `byte_fallback` is on."""

    def to_bytes(piece: str) -> bytes:
        for old, new in replacements:
            piece = piece.replace(old, new)
        match = BYTE_PIECE.fullmatch(piece) if byte_fallback else None
        return bytes([int(match[1], 16)]) if match else piece.encode()

    return PieceRule(to_bytes=to_bytes, strip=strip)


def piece_rule(decoder: dict[str, Any] | None, *, source: str) -> PieceRule:
    """The rule that the `decoder` section of a tokenizer.json describes; ValueError for one that it cannot express."""
    steps = (decoder.get("decoders", []) if decoder["type"] == "Sequence" else [decoder]) if decoder else []
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return byte_level()
    if kinds == ["Metaspace"]:
        prefixed = steps[0].get("prepend_scheme", "always") != "never" and steps[0].get("add_prefix_space", True)
        return sentencepiece([(steps[0]["replacement"], " ")], byte_fallback=False, strip=int(prefixed))
    replacements: list[tuple[str, str]] = []
    byte_fallback, fused, strip = False, False, 0
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not byte_fallback:
                replacements.append((old, new))
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if fused:
                strip = start
            case _:
                raise ValueError(f"{source}: cannot read the token decoder {step!r}; known are {READABLE}")
    if not fused:
        raise ValueError(f"{source}: cannot read the token decoder {kinds or None}; known are {READABLE}")
    return sentencepiece(replacements, byte_fallback=byte_fallback, strip=strip)
