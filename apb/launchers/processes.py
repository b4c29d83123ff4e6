"""The operating system's side of a local gang: processes, connections, one folder, one end."""

from __future__ import annotations

import os
import shutil
import signal
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
from typing import NamedTuple

from apb.errors import EngineDeadError
from apb.heartbeat import Board

_EXIT_S = 5.0
_STACK_S = 1.0


class RankProcess(NamedTuple):
    """A rank's process, the leader of a process group, and the driver's end of its connection."""

    process: subprocess.Popen[bytes]
    connection: Connection


class RankProcesses:
    """`world_size` processes in process groups of their own. Nothing outlives `end`."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.folder = tempfile.mkdtemp(prefix="apb-")
        self.board = Board(Path(self.folder) / "board", world_size, create=True)
        self._ranks: list[RankProcess] = []
        self._finalizer = weakref.finalize(self, _end, self._ranks, self.board, self.folder)
        for rank in range(world_size):
            self._ranks.append(start_rank(rank, world_size))

    @property
    def ended(self) -> list[int]:
        """Ranks whose process has ended."""
        return [rank for rank, it in enumerate(self._ranks) if it.process.poll() is not None]

    def post(self, rank: int, encoded: bytes) -> None:
        """Send if anyone is there; that a rank is gone shows when its reply is awaited."""
        with suppress(OSError):
            self._ranks[rank].connection.send_bytes(encoded)

    def ready(self, timeout_s: float, *, besides: Container[int] = ()) -> list[int]:
        """Ranks that have said something or have ended, besides those that are known.

        Raises:
            EngineDeadError: another thread has ended them all.
        """
        connections = {
            rank: it.connection for rank, it in enumerate(self._ranks) if rank not in besides
        }
        try:
            found = wait(connections.values(), timeout_s)
        except (OSError, ValueError):
            raise EngineDeadError("the engine was closed") from None
        return [rank for rank, connection in connections.items() if connection in found]

    def receive(self, rank: int) -> bytes | None:
        """What the rank says next; None where it has ended without a word."""
        try:
            return self._ranks[rank].connection.recv_bytes()
        except (EOFError, OSError):
            return None

    def exit_code(self, rank: int) -> int | None:
        """Of a process that is about to end; negative for a signal."""
        with suppress(subprocess.TimeoutExpired):
            return self._ranks[rank].process.wait(_EXIT_S)
        return None

    def stack_of(self, rank: int) -> str:
        """What the main thread of a running process is at; empty where it cannot tell."""
        process, path = self._ranks[rank].process, Path(self.folder) / f"stack-{rank}"
        if not path.exists() or self.is_stopped(rank):
            return ""
        process.send_signal(signal.SIGUSR1)
        text, deadline = "", time.monotonic() + _STACK_S
        while time.monotonic() < deadline and (not text or text != path.read_text()):
            text = path.read_text()
            time.sleep(_STACK_S / 20)
        return text.strip()

    def is_stopped(self, rank: int) -> bool:
        """Whether a signal has stopped the process; False where the system does not say."""
        with suppress(OSError):
            stat = Path(f"/proc/{self._ranks[rank].process.pid}/stat").read_text()
            return stat.rpartition(")")[2].split()[0] in "Tt"
        return False

    def wait(self) -> None:
        """Give processes that were told to exit the time to do so."""
        for it in self._ranks:
            try:
                it.process.wait(_EXIT_S)
            except subprocess.TimeoutExpired:
                return

    def end(self) -> None:
        """Kill what is left; repeating it does no harm."""
        self._finalizer()


def start_rank(rank: int, world_size: int) -> RankProcess:
    ours, theirs = Pipe()
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "APB_CONNECTION": str(theirs.fileno()),
        "APB_DRIVER": str(os.getpid()),
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
