"""Turning generated tokens into text, piece by piece, and finding where it has to stop."""

from __future__ import annotations

from collections.abc import Sequence

from apb.prompts.base import Tokenizer

_INCOMPLETE = "\ufffd"


class AnswerText:
    """The text of an answer as its tokens arrive.

    Pieces end at character boundaries, and text that may be the beginning of a stop string is held
    back until it is known not to be.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), stop_ids: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stop, self._stop_ids = tuple(stop), frozenset(stop_ids)
        self._tokens: list[int] = []
        self._prefix = 0  # tokens before it are not needed to decode what follows
        self._read = 0  # tokens before it are part of the text
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add a token; return the text that became certain. A stop id or string sets `stopped`."""
        if token_id in self._stop_ids:
            self.stopped = True
            return self.finish()
        self._tokens.append(token_id)
        known = self._decode(self._prefix, self._read)
        text = self._decode(self._prefix, len(self._tokens))
        if text.endswith(_INCOMPLETE):
            return ""
        self._prefix, self._read = self._read, len(self._tokens)
        return self._release(text[len(known) :])

    def finish(self) -> str:
        """The text still held back, once no more tokens come."""
        rest = self._decode(self._prefix, len(self._tokens))
        rest = rest[len(self._decode(self._prefix, self._read)) :]
        self._read = self._prefix = len(self._tokens)
        piece = self._release(rest)
        self.text += self._held  # nothing follows that could complete a stop string
        piece, self._held = piece + self._held, ""
        return piece

    def token_texts(self) -> list[str]:
        """Each token as text of its own; a stop token is not among them."""
        return [self._decode(index, index + 1) for index in range(len(self._tokens))]

    def _decode(self, start: int, stop: int) -> str:
        return str(self._tokenizer.decode(self._tokens[start:stop], skip_special_tokens=True))

    def _release(self, piece: str) -> str:
        text, self._held = self._held + piece, ""
        found = [text.find(stop) for stop in self._stop if stop in text]
        if found:
            self.stopped = True
            text = text[: min(found)]
            self._prefix = self._read = len(self._tokens)
        else:
            held = max((_overlap(text, stop) for stop in self._stop), default=0)
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` could begin."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
