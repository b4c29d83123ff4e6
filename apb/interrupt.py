"""Ending a request before it is done, on all ranks at the same place."""

from __future__ import annotations

import time
from collections.abc import Callable

from apb.comm import Communicator, Pending
from apb.errors import RequestError
from apb.methods.decode import OWNER

_CANCELLED, _OVERDUE = 1, 2


class Interrupt:
    """What the owner knows of a request's caller and clock, for all ranks between two layers.

    The owner's word goes out after each layer and is looked at after the next one, so that nobody
    waits for it: a request ends at most two layers late.
    """

    def __init__(
        self,
        comm: Communicator,
        *,
        is_cancelled: Callable[[], bool] = lambda: False,
        timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`is_cancelled` is asked on the owner, until it says so once."""
        self._comm, self._is_cancelled, self._clock = comm, is_cancelled, clock
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else clock() + timeout_s
        self._word = 0
        self._under_way: Pending[int] | None = None

    def is_due(self) -> bool:
        """Whether the request should end. The owner's answer counts."""
        if self._word == 0 and self._comm.rank == OWNER:
            if self._is_cancelled():
                self._word = _CANCELLED
            elif self._deadline is not None and self._clock() >= self._deadline:
                self._word = _OVERDUE
        return self._word != 0

    def after_layer(self, is_last: bool) -> None:
        """Raises RequestError on all ranks after the same layer.

        Once no layer follows, the last word is waited for.
        """
        self.is_due()
        earlier, latest = self._under_way, self._comm.agree(self._word, src=OWNER)
        self._under_way = latest
        if (earlier is None or not earlier.wait()) and not is_last:
            return
        self._under_way = None
        word = latest.wait()
        if word == _CANCELLED:
            raise RequestError("the request was cancelled while its prompt was read")
        if word == _OVERDUE:
            raise self._overdue()

    def check_deadline(self) -> None:
        """After an answer that was cut short: raises RequestError on all ranks if time was up."""
        if self._comm.agree(self._word, src=OWNER).wait() == _OVERDUE:
            raise self._overdue()

    def _overdue(self) -> RequestError:
        return RequestError(
            f"the request took longer than timeout_s={self._timeout_s:g}: raise it, shorten the "
            "document or ask for fewer tokens"
        )
