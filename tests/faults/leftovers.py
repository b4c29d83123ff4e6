"""What a gang may leave on a machine: processes, sockets, shared memory, files."""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil

_SHARED = ("torch", "nccl", "gloo", "psm", "apb")
"""How names of shared memory begin that a rank could have made."""
_SETTLE_S = 3.0
"""How long the system may take to reap what was killed."""


class Leftovers(NamedTuple):
    """A picture of this process and of what belongs to apb around it.

    Other gangs on the machine have other folders: `before` gives each test one of its own.
    """

    processes: frozenset[int]
    threads: int
    open_files: int
    folders: frozenset[Path]
    shared_memory: frozenset[Path]

    @classmethod
    def now(cls) -> Leftovers:
        this = psutil.Process()
        return cls(
            frozenset(child.pid for child in this.children(recursive=True)),
            this.num_threads(),
            this.num_fds(),
            frozenset(Path(tempfile.gettempdir()).glob("apb-*")),
            frozenset(path for path in Path("/dev/shm").glob("*") if path.name.startswith(_SHARED)),
        )

    def since(self, before: Leftovers) -> list[str]:
        """One line for everything that was not there before."""
        found = [f"process {pid}" for pid in self.processes - before.processes]
        found += map(str, self.folders - before.folders)
        found += map(str, self.shared_memory - before.shared_memory)
        if self.open_files > before.open_files:
            found.append(f"{self.open_files - before.open_files} open files or sockets")
        if self.threads > before.threads:
            found.append(f"{self.threads - before.threads} threads")
        return found


def left_since(before: Leftovers) -> list[str]:
    """What is still left over after a moment."""
    gc.collect()  # an exception keeps the frames that it went through
    deadline = time.monotonic() + _SETTLE_S
    while (found := Leftovers.now().since(before)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found
