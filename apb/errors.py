"""The errors a caller can tell apart.

Every message is one sentence: the value, the limit, the setting to change.
"""

from __future__ import annotations

from typing import NamedTuple


class RankFailure(NamedTuple):
    """The first cause of a gang's end."""

    rank: int | None
    """None where no rank is to blame, as when the network between them fails."""
    host: str
    place: str
    """Stage and layer or token, in words."""
    reason: str
    exit_code: int | None = None
    """Of the process if it had ended by itself; negative for the signal that killed it."""
    stack: str = ""
    """Of the main thread, where it could still be asked, or the traceback of what it raised."""
    had_request: bool = True
    """False where the rank had not taken the request that was lost with it: it did no harm."""

    @property
    def sentence(self) -> str:
        who = "the ranks" if self.rank is None else f"rank {self.rank} on {self.host}"
        return f"{who} {self.reason} ({self.place})"


class ApbError(Exception):
    """Base of every error that `apb` raises on purpose."""

    exit_code = 1


class InputError(ApbError, ValueError):
    """The request or the configuration is wrong; the engine has done nothing and is usable."""

    exit_code = 2


class RequestError(ApbError):
    """One request failed while it ran; the engine is still usable."""


class NotFiniteError(RequestError):
    """Logits came out as NaN or infinite; `RequestError` to callers."""

    @classmethod
    def at(cls, position: int) -> NotFiniteError:
        return cls(
            f"the logits at position {position} are not finite: the model overflowed, so try "
            "dtype=float32 or check its weights"
        )


class EngineDeadError(ApbError):
    """The ranks are gone: the message is the first cause, and `failure` its parts if known."""

    def __init__(self, message: str, failure: RankFailure | None = None) -> None:
        super().__init__(message)
        self.failure = failure
        self.is_told = False
        """Whether it has been printed already, once for all ranks."""

    @classmethod
    def of(cls, failure: RankFailure) -> EngineDeadError:
        """With the stack as a note, which Python shows below the message."""
        error = cls(failure.sentence, failure)
        if failure.stack:
            error.add_note(failure.stack)
        return error


class PeerLostError(EngineDeadError):
    """A message to or from another rank failed: seldom the cause, mostly its first victim."""
