"""Whatever a pattern allows is of its format: drawn evenly from the grammar, and judged by libraries of the format."""

import datetime
import ipaddress
import random
import re
import uuid
from urllib.parse import urlsplit

import pytest

from engine.config import Grammar
from engine.runtime.grammar import Grammars
from server.schema_formats import FORMATS

pytest.importorskip("xgrammar", reason="xgrammar is not installed")

JUDGES = {
    "date": datetime.date.fromisoformat,
    "time": lambda text: datetime.time.fromisoformat(text).tzinfo or 1 / 0,
    "date-time": lambda text: datetime.datetime.fromisoformat(text).tzinfo or 1 / 0,
    "duration": lambda text: re.fullmatch(r"P(\d+W|(\d+D)?(T(\d+H)?(\d+M)?(\d+S)?)?)", text) or 1 / 0,
    "email": lambda text: re.fullmatch(r"[^@ .]+(\.[^@ .]+)*@[^@ .]+(\.[^@ .]+)+", text) or 1 / 0,
    "hostname": lambda text: all(
        re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)", part) or 1 / 0 for part in text.split(".")
    ),
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
    "uuid": uuid.UUID,
    "uri": lambda text: urlsplit(text).hostname or 1 / 0,
    "json-pointer": lambda text: (re.fullmatch(r"(/([^/~]|~[01])*)*", text) and text[:1] in ("", "/")) or 1 / 0,
}


class Bytes:
    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_is_of_the_format(name: str) -> None:
    known = Grammars(Bytes(), vocab_size=300, eos_token_ids=(299,))
    found = set()
    for seed in range(40):
        constraint = known.constraint(Grammar(kind="regex", text=FORMATS[name]))
        draw, answer = random.Random(seed), []
        while True:
            mask = constraint.allowed(answer)
            allowed = [32 * word + bit for word, bits in enumerate(mask) for bit in range(32) if bits >> bit & 1]
            if (token := draw.choice(allowed)) == 299:
                break
            answer.append(token)
        text = bytes(answer).decode()
        assert re.fullmatch(FORMATS[name], text)
        assert not re.search(r'[\x00-\x1f"\\]', text)
        JUDGES[name](text)
        found.add(text)
    assert len(found) > 10


def test_the_calendar_is_known() -> None:
    date = re.compile(FORMATS["date"])
    for text in ("2023-01-31", "2023-02-28", "2023-04-30", "1999-12-31"):
        assert date.fullmatch(text)
    for text in ("2023-02-29", "2023-04-31", "2023-13-01", "2023-00-10", "2023-01-00", "0000-01-01"):
        assert not date.fullmatch(text)
    assert not re.fullmatch(FORMATS["ipv4"], "82.033.53.141")
