"""SIGTERM on the command line: what runs may finish, but not for long."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_LOG = logging.getLogger(__name__)
EXIT_CODE = 128 + signal.SIGTERM
_BACKSTOP_S = 5.0
"""How much longer a main thread that is stuck in a collective is waited for."""


class Terminated(BaseException):
    """SIGTERM came and the time to finish is over."""


@contextmanager
def draining(drain_s: float) -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM leaves `drain_s` seconds; then `Terminated` is raised in the main thread.

    Gives what says whether SIGTERM has come, for those who could begin something else.

    Python runs signal handlers in the main thread only, and not while that is stuck in a
    collective: a second thread, which the interpreter wakes in any case, then ends the process.
    """

    is_ending = threading.Event()

    def begin(number: int, frame: FrameType | None) -> None:
        is_ending.set()
        signal.setitimer(signal.ITIMER_REAL, drain_s)
        _LOG.info("SIGTERM: the running request has %g s to finish", drain_s)

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    handlers = {signal.SIGTERM: begin, signal.SIGALRM: end}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    woken_before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_backstop, args=(ours, drain_s + _BACKSTOP_S), daemon=True).start()
    try:
        yield is_ending.is_set
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(woken_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        theirs.close()  # which ends the thread


def _backstop(wakened: socket.socket, after_s: float) -> None:
    """Ends the process that long after SIGTERM, unless the other end is closed before."""
    deadline = None
    with wakened:
        while True:
            try:
                numbers = wakened.recv(16)
            except TimeoutError:
                os._exit(EXIT_CODE)
            if not numbers:
                return
            if deadline is None and signal.SIGTERM in numbers:
                deadline = time.monotonic() + after_s
            if deadline is not None:
                wakened.settimeout(max(0.01, deadline - time.monotonic()))
