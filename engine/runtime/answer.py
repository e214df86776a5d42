"""The text side of a request: tokens in, text that may be shown out, cut at the first stop string."""

from __future__ import annotations

from engine.runtime.tokenizer import IncrementalDecoder


class Answer:
    """Turns the tokens of one answer into text and holds back what may be the beginning of a stop string.

    The pieces that `push` and `finish` return, joined, are the text of the answer up to the earliest stop string.
    `stopped` is True once one was found; no text follows then.
    """

    def __init__(self, decoder: IncrementalDecoder, *, stop: tuple[str, ...] = ()) -> None:
        self.stopped = False
        self._decoder = decoder
        self._stop = stop
        self._held = ""

    def push(self, token_id: int) -> str:
        text = self._decoder.push_token(token_id)
        return self._advance(text) if self._stop else text

    def finish(self) -> str:
        """The rest of the text, when no token follows."""
        piece = self._advance(self._decoder.flush()) + self._held
        self._held = ""
        return piece

    def _advance(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        ends = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            self._held = ""
            return text[: min(ends)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
