"""Log-probabilities as OpenAI shows them, in step with the text that is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from engine.runtime.event import Event, TokenLogprob


class Vocabulary(Protocol):
    """What is needed of a tokenizer."""

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes: ...


class LogprobQueue:
    """The entries of one answer. Text is held back where it may begin a stop string or a character is not whole, and so
    are the entries of its tokens; those of a stop string and of an end token are never shown."""

    def __init__(self, vocabulary: Vocabulary, *, skip_special: bool) -> None:
        self._vocabulary = vocabulary
        self._skip_special = skip_special
        self._waiting: list[TokenLogprob] = []
        self._ahead = 0

    def take(self, event: Event) -> list[TokenLogprob]:
        """The entries of the tokens that begin within the text that has been sent up to and with `event`."""
        self._waiting += event.logprobs
        self._ahead += len(event.text.encode(errors="surrogatepass"))
        shown: list[TokenLogprob] = []
        while self._waiting and (self._ahead > 0 or event.finish_reason == "length"):
            entry = self._waiting.pop(0)
            size = len(self._vocabulary.token_bytes(entry.token_id, skip_special=self._skip_special))
            self._ahead -= size
            shown.append(entry)
        if not self._waiting:
            # A leading space that was taken off, or U+FFFD for a byte, makes text and bytes differ.
            self._ahead = 0
        return shown


def chat_logprobs(entries: Sequence[TokenLogprob], vocabulary: Vocabulary) -> dict[str, Any]:
    def shown(token_id: int, logprob: float) -> dict[str, Any]:
        written = vocabulary.token_bytes(token_id, skip_special=False)
        return {"token": written.decode(errors="replace"), "logprob": logprob, "bytes": list(written)}

    content = [
        {
            **shown(entry.token_id, entry.logprob),
            "top_logprobs": [shown(token_id, logprob) for token_id, logprob in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(entries: Sequence[TokenLogprob], vocabulary: Vocabulary, *, offset: int) -> dict[str, Any]:
    """`offset` is how many characters of the answer came before. The drawn token is always among the top ones."""
    texts = [vocabulary.token_bytes(entry.token_id, skip_special=False).decode(errors="replace") for entry in entries]
    offsets = [offset + sum(len(text) for text in texts[:index]) for index in range(len(texts))]
    tops: list[dict[str, float]] = []
    for entry in entries:
        ranked = [*entry.top]
        if entry.token_id not in (token_id for token_id, _ in ranked):
            ranked.append((entry.token_id, entry.logprob))
        named: dict[str, float] = {}
        for token_id, logprob in ranked:
            text = vocabulary.token_bytes(token_id, skip_special=False)
            # Tokens that are pieces of characters would share the name U+FFFD.
            named.setdefault(_name(text), logprob)
        tops.append(named)
    return {
        "tokens": texts,
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _name(written: bytes) -> str:
    try:
        return written.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)
