"""The one progress bar of a request."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


class Progress:
    """A bar on rank 0's terminal: layers while the document is read, then tokens."""

    def __init__(self, *, enabled: bool) -> None:
        # None lets tqdm stay silent where stderr is no terminal.
        self._disable: bool | None = None if enabled else True
        self._bar: tqdm[Any] | None = None

    def begin(self, what: str, total: int) -> None:
        self.close()
        self._bar = tqdm(total=total, desc=what, disable=self._disable, leave=False)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None
