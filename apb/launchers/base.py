"""What `LLM` needs of the ranks, wherever they run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

from apb.errors import EngineDeadError

T = TypeVar("T")


class Session(ABC):
    """A gang of ranks that takes one request at a time."""

    has_worked = False
    """Whether the ranks have got as far as reading a document, or have ended some request."""
    world_size: int
    """Of the gang as it was first asked for."""

    @abstractmethod
    def call(self, op: str, **arguments: Any) -> Generator[dict[str, Any], None, None]:
        """Send a request (see `RequestRunner.handle`) and yield its replies.

        Closing the iterator early cancels the request.

        Raises:
            InputError, RequestError: the request failed; the ranks go on.
            EngineDeadError: the ranks are gone.
        """

    def failure(self) -> EngineDeadError | None:
        """Why the ranks are gone, where that shows without asking them."""
        return None

    def shared(self, values: Iterator[T]) -> Iterator[T]:
        """JSON values, the same for every process that makes calls."""
        return values

    @abstractmethod
    def close(self) -> None:
        """End the ranks; repeating it does no harm."""
