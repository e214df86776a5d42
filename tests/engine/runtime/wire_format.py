"""Protobuf messages as lists of fields, without knowing what they mean."""

import struct

Field = tuple[int, int, int | bytes]
"""Number, wire type, value: an integer (type 0), 8 or 4 bytes (1, 5), or bytes with a length (2)."""


def split(message: bytes) -> list[Field]:
    fields: list[Field] = []
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        match key & 7:
            case 0:
                value, place = _varint(message, place)
                fields.append((key >> 3, 0, value))
                continue
            case 2:
                length, place = _varint(message, place)
            case kind:
                length = {1: 8, 5: 4}[kind]
        fields.append((key >> 3, key & 7, message[place : place + length]))
        place += length
    return fields


def join(fields: list[Field]) -> bytes:
    parts = []
    for number, kind, value in fields:
        parts.append(_of_varint(number << 3 | kind))
        if isinstance(value, int):
            parts.append(_of_varint(value))
        else:
            parts += [_of_varint(len(value)), value] if kind == 2 else [value]
    return b"".join(parts)


def float32(value: float) -> bytes:
    return struct.pack("<f", value)


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (message[place] & 127) << shift
        place, shift = place + 1, shift + 7
        if message[place - 1] < 128:
            return value, place


def _of_varint(value: int) -> bytes:
    value &= 2**64 - 1
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])
