"""Ranks as processes of this machine.

They are plain subprocesses and not multiprocessing children, so that notebooks and scripts without
a ``__main__`` guard work. Driver and ranks exchange JSON over socket pairs; the ranks meet through
a file, so that two gangs never compete for a port.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Generator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

from apb.errors import EngineDeadError, InputError, RequestError
from apb.launchers.base import Session

_EXIT_S = 5.0


class LocalSession(Session):
    """A gang of `world_size` subprocesses, killed together as soon as one of them fails."""

    def __init__(self, overrides: Sequence[str], *, world_size: int) -> None:
        self._folder = tempfile.mkdtemp(prefix="apb-")
        self._ranks = [_start_rank(rank, world_size) for rank in range(world_size)]
        self._cause: str | None = None
        self._busy = False
        self._finalizer = weakref.finalize(self, _end, self._ranks, self._folder)
        hello = {
            "overrides": list(overrides),
            "init_method": (Path(self._folder) / "rendezvous").as_uri(),
        }
        self._send(hello)
        try:
            self._next_reply()
        except InputError:
            self._finalizer()
            raise

    def call(self, op: str, **arguments: Any) -> Generator[dict[str, Any], None, None]:
        if self._cause is not None:
            raise EngineDeadError(self._cause)
        self._send({"op": op, "arguments": arguments})
        finished, self._busy = False, True
        try:
            while not finished:
                try:
                    reply = self._next_reply()
                except (InputError, RequestError):
                    finished = True
                    raise
                finished = "result" in reply
                yield reply
        finally:
            if not finished and self._cause is None:
                self._cancel()
            self._busy = False

    def close(self) -> None:
        if self._finalizer.alive and self._cause is None:
            self._cause = "the engine was closed"
            self._send({"op": "exit"})
            for process, _ in () if self._busy else self._ranks:
                try:
                    process.wait(_EXIT_S)
                except subprocess.TimeoutExpired:
                    break  # the finalizer kills what is left
        self._finalizer()

    def _cancel(self) -> None:
        """End a request whose caller has stopped listening, and drop what it still says."""
        _post(self._ranks[0][1], json.dumps({"op": "cancel"}).encode())
        try:
            while "result" not in self._next_reply():
                pass
        except (InputError, RequestError):
            pass
        except KeyboardInterrupt:  # who asks again must not get this request's replies
            self._stop("the engine was stopped while a request was being cancelled")
            raise

    def _send(self, message: dict[str, Any]) -> None:
        encoded = json.dumps(message).encode()
        for _, connection in self._ranks:
            _post(connection, encoded)

    def _next_reply(self) -> dict[str, Any]:
        """Rank 0's next message. The others only speak, or end, when they fail."""
        try:
            ready = wait([connection for _, connection in self._ranks])
        except (OSError, ValueError):  # another thread has closed the session
            raise EngineDeadError(self._cause or "the engine was closed") from None
        # The others first: where one has failed, rank 0 merely reports that it went away.
        return self._read(
            max(rank for rank, (_, connection) in enumerate(self._ranks) if connection in ready)
        )

    def _read(self, rank: int) -> dict[str, Any]:
        try:
            message: dict[str, Any] = json.loads(self._ranks[rank][1].recv_bytes())
        except (EOFError, OSError):
            self._die(f"rank {rank} ended without a word{self._exit_code(rank)}")
        if "error" not in message:
            return message
        if message["kind"] == InputError.__name__:
            raise InputError(message["error"])
        if message["kind"] == RequestError.__name__:
            raise RequestError(message["error"])
        self._die(message["error"])

    def _die(self, cause: str) -> NoReturn:
        self._stop(cause)
        raise EngineDeadError(cause)

    def _stop(self, cause: str) -> None:
        self._cause = cause
        self._finalizer()

    def _exit_code(self, rank: int) -> str:
        try:
            code = self._ranks[rank][0].wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            return ""
        return f" (killed by {signal.Signals(-code).name})" if code < 0 else f" (exit code {code})"


Rank = tuple["subprocess.Popen[bytes]", Connection]


def _start_rank(rank: int, world_size: int) -> Rank:
    ours, theirs = Pipe()
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "APB_CONNECTION": str(theirs.fileno()),
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))
    # The ranks are all here, and a host name that does not resolve must not keep them apart.
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    process = subprocess.Popen(
        [sys.executable, "-m", "apb.worker"],
        env=environment,
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        start_new_session=True,  # Ctrl-C is the driver's to handle
    )
    theirs.close()
    return process, ours


def _post(connection: Connection, encoded: bytes) -> None:
    """Send if anyone is there; that a rank is gone shows when its reply is awaited."""
    try:
        connection.send_bytes(encoded)
    except OSError:
        return


def _end(ranks: Sequence[Rank], folder: str) -> None:
    for process, connection in ranks:
        process.kill()
        process.wait()
        connection.close()
    shutil.rmtree(folder, ignore_errors=True)
