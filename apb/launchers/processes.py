"""Ranks as processes of this machine.

They are plain subprocesses and not multiprocessing children, so that notebooks and scripts without
a ``__main__`` guard work. Driver and ranks exchange JSON over socket pairs, of which long requests
only name the file; the ranks meet through a file, so that two gangs never compete for a port, and
show their progress in another one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Container, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from apb.errors import EngineDeadError, RankFailure, RequestError
from apb.heartbeat import Beat, Board
from apb.launchers.gang import Ranks
from apb.launchers.process_state import is_stopped
from apb.listening import LOOPBACK, listen_on
from apb.metrics import threads_per_rank

_EXIT_S = 5.0
_STACK_S = 1.0
_INLINE_BYTES = 2**12
"""What a connection takes on every system while nobody reads it."""


class RankProcess(NamedTuple):
    """A rank's process, the leader of a process group, and the driver's end of its connection."""

    process: subprocess.Popen[bytes]
    connection: Connection


class RankProcesses(Ranks):
    """Processes in process groups of their own."""

    def __init__(self, gpus: Sequence[int]) -> None:
        """One for each of the numbers, which say what GPU of this machine it has."""
        self.world_size = world_size = len(gpus)
        self._folder = tempfile.mkdtemp(prefix="apb-")
        self._posts = 0
        self._board = Board(Path(self._folder) / "board", world_size, create=True)
        self._ranks: list[RankProcess] = []
        self._finalizer = weakref.finalize(self, _end, self._ranks, self._board, self._folder)
        for rank, gpu in enumerate(gpus):
            self._ranks.append(start_rank(rank, world_size, gpu))

    @property
    def greeting(self) -> dict[str, Any]:
        return {"folder": self._folder}

    def post(self, encoded: bytes, ranks: Sequence[int]) -> None:
        self._posts += 1
        messages = dict.fromkeys(ranks, encoded)
        if len(encoded) > _INLINE_BYTES:  # a rank that is stopped must not keep the driver waiting
            messages = self._filed(encoded, ranks)
        for rank, message in messages.items():
            with suppress(OSError):
                self._ranks[rank].connection.send_bytes(message)

    def _filed(self, encoded: bytes, ranks: Sequence[int]) -> dict[int, bytes]:
        """Messages that say where the message is: under a name for each rank, which removes it."""
        path = Path(self._folder) / f"message-{self._posts}"
        try:
            path.write_bytes(encoded)
            for rank in ranks:
                os.link(path, f"{path}-{rank}")
        except OSError as error:
            raise RequestError(
                f"cannot write the request ({len(encoded)} bytes) to {self._folder}: "
                f"{error.strerror}: make room there or set TMPDIR to another folder"
            ) from error
        finally:
            path.unlink(missing_ok=True)
        return {rank: json.dumps({"file": f"{path}-{rank}"}).encode() for rank in ranks}

    def ready(self, timeout_s: float, *, besides: Container[int] = ()) -> list[int]:
        connections = {
            rank: it.connection for rank, it in enumerate(self._ranks) if rank not in besides
        }
        try:
            found = wait(connections.values(), timeout_s)
        except (OSError, ValueError):
            raise EngineDeadError("the engine was closed") from None
        return [rank for rank, connection in connections.items() if connection in found]

    def receive(self, rank: int) -> bytes | None:
        try:
            return self._ranks[rank].connection.recv_bytes()
        except (EOFError, OSError):
            return None

    @property
    def ended(self) -> list[int]:
        return [rank for rank, it in enumerate(self._ranks) if it.process.poll() is not None]

    def beats(self) -> list[Beat]:
        return self._board.read()

    def host(self, rank: int) -> str:
        return socket.gethostname()

    def is_stopped(self, rank: int) -> bool:
        return is_stopped(self._ranks[rank].process.pid)

    def stack_of(self, rank: int) -> str:
        process, path = self._ranks[rank].process, Path(self._folder) / f"stack-{rank}"
        if not path.exists():
            return ""
        process.send_signal(signal.SIGUSR1)
        text, deadline = "", time.monotonic() + _STACK_S
        while time.monotonic() < deadline and (not text or text != path.read_text()):
            text = path.read_text()
            time.sleep(_STACK_S / 20)
        return text.strip()

    def death(self, rank: int, request: int) -> RankFailure:
        code: int | None = None
        with suppress(subprocess.TimeoutExpired):
            code = self._ranks[rank].process.wait(_EXIT_S)
        reason = f"ended without a word (exit code {code})"
        if code is not None and code < 0:
            reason = f"was killed by {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                reason += ", as the system does when memory runs out"
        beat = self.beats()[rank]
        had_request = beat.request == request
        return RankFailure(rank, self.host(rank), beat.place, reason, code, had_request=had_request)

    def wait(self) -> None:
        for it in self._ranks:
            try:
                it.process.wait(_EXIT_S)
            except subprocess.TimeoutExpired:
                return

    def end(self) -> None:
        self._finalizer()


def start_rank(rank: int, world_size: int, gpu: int) -> RankProcess:
    """A rank of this machine; `gpu` is the number of its GPU, if it has one."""
    ours, theirs = Pipe()
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "APB_GPU": str(gpu),
        "APB_CONNECTION": str(theirs.fileno()),
        "APB_DRIVER": str(os.getpid()),
    }
    environment.setdefault("OMP_NUM_THREADS", str(threads_per_rank(world_size)))
    # The ranks are all here, and a host name that does not resolve must not keep them apart.
    listen_on(LOOPBACK, environment)
    process = subprocess.Popen(
        [sys.executable, "-m", "apb.worker"],
        env=environment,
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        start_new_session=True,  # Ctrl-C is the driver's to handle
    )
    theirs.close()
    return RankProcess(process, ours)


def _end(ranks: Sequence[RankProcess], board: Board, folder: str) -> None:
    for process, connection in ranks:
        process.kill()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # and whatever the rank has started
        connection.close()
    for process, _ in ranks:
        process.wait()
    board.close()
    shutil.rmtree(folder, ignore_errors=True)
