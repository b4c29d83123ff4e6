"""A rank inside a Ray actor: its life is `run`, the other methods are its mail and its pulse."""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import os
import platform
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from apb.heartbeat import private_slot
from apb.launchers.process_state import is_stopped
from apb.listening import listen_on

PASSED_ON = (
    *("APB_HOME", "APB_FAULTS", "APB_LOG_*", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_*"),
    *("NCCL_*", "GLOO_*", "TORCH_*", "PYTORCH_*", "TRITON_*", "TQDM_*", "OMP_NUM_THREADS"),
    *("CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_MAX_CONNECTIONS"),
)
"""Variables of the driver that ranks get. A list of what is let through, not of what is held back:
keys and tokens stay where they are."""
INBOX, OUTBOX, PULSE = "inbox", "outbox", "pulse"
"""Concurrency groups of the actor's methods."""
_SIOCGIFADDR = 0x8915


class Mailbox:
    """A channel between threads of one process; the far end is the driver, by `post` and `take`."""

    def __init__(self) -> None:
        self._inbox: Queue[bytes] = Queue()
        self._outbox: Queue[bytes] = Queue()

    def send_bytes(self, buf: bytes, /) -> None:
        self._outbox.put(buf)

    def recv_bytes(self) -> bytes:
        return self._inbox.get()

    def poll(self) -> bool:
        return not self._inbox.empty()

    def post(self, message: bytes) -> None:
        self._inbox.put(message)

    def take(self, *, wait: bool) -> list[bytes]:
        """All that was sent; waits for at least one message if told so."""
        messages = [self._outbox.get()] if wait else []
        try:
            while True:
                messages.append(self._outbox.get_nowait())
        except Empty:
            return messages


class RankActor:
    """One rank. `run` occupies it for its whole life; mail and questions come in beside that.

    Args:
        environment: variables for this process, where the node has not set them otherwise.
        folder: the driver's working directory, used where the node has it too.
    """

    def __init__(self, environment: Mapping[str, str], folder: str) -> None:
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        if os.path.isdir(folder):
            os.chdir(folder)
        self._mailbox = Mailbox()
        self._slot = private_slot()
        self._thread: int | None = None
        self._store: Any = None  # of rank 0, which hosts it

    def facts(self) -> dict[str, str]:
        """Versions of what has to be the same on every node."""
        return installed_versions()

    def host_store(self, address: str) -> int:
        """Open the store that ranks meet in, on that address of this node; returns its port."""
        from apb.stores import host_store

        self._store = host_store(address)
        port: int = self._store.port
        return port

    def run(
        self,
        rank: int,
        world_size: int,
        *,
        local_rank: int,
        local_world_size: int,
        address: str,
        store: tuple[str, int],
    ) -> list[bytes]:
        """Serve requests until told to end; returns what nobody has taken, such as an error.

        Args:
            local_rank: counts the ranks of this node, `local_world_size` in all.
            address: of this node, where its peers reach it.
            store: address and port of the store.
        """
        from apb.stores import reach_store
        from apb.worker import receive, serve

        self._thread = threading.get_ident()
        _as_nice_as_its_parent()
        if (interface := interface_of(address)) is not None:
            listen_on(interface, os.environ)
        os.environ["LOCAL_RANK"] = str(local_rank)
        os.environ["LOCAL_WORLD_SIZE"] = str(local_world_size)
        serve(
            self._mailbox,
            receive(self._mailbox),
            rank,
            world_size,
            store=self._store or reach_store(*store),
            local_rank=_gpu_of_this_actor(local_rank),
            slot=self._slot,
            host=address,
        )
        return self._mailbox.take(wait=False)

    def post(self, message: bytes) -> None:
        """Hand the rank a message of the driver."""
        self._mailbox.post(message)

    def take(self) -> list[bytes]:
        """What the rank says; waits until it says something."""
        return self._mailbox.take(wait=True)

    def beat(self) -> list[int]:
        """The rank's heartbeat, as `Beat.read` takes it."""
        return self._slot.tolist()

    def stack(self) -> str:
        """What the rank's own thread is at."""
        frame = sys._current_frames().get(self._thread or 0)
        return "".join(traceback.format_stack(frame)).rstrip() if frame else ""

    def is_stopped(self, pid: int) -> bool:
        """Whether a signal has stopped another process of this node."""
        return is_stopped(pid)


def _as_nice_as_its_parent() -> None:
    """Undo what Ray adds to the niceness of its processes, which yield to all others, if allowed.

    Of every thread: Linux counts them apart, and those that carry mail must not starve beside
    ranks that compute.
    """
    niceness = os.getpriority(os.PRIO_PROCESS, os.getppid())
    tasks = Path("/proc/self/task")
    threads = [int(task.name) for task in tasks.iterdir()] if tasks.exists() else [0]
    for thread in threads:
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, thread, niceness)


def _gpu_of_this_actor(local_rank: int) -> int:
    import ray

    assigned = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    if not assigned:
        return local_rank
    return gpu_index(assigned[0], os.environ.get("CUDA_VISIBLE_DEVICES"))


def installed_versions() -> dict[str, str]:
    """Of Python and of the packages whose mixture would go wrong silently."""
    packages = {name: version(name) for name in ("apb", "torch", "transformers")}
    return {"python": platform.python_version(), **packages}


def passed_on(environment: Mapping[str, str], more: Sequence[str] = ()) -> dict[str, str]:
    """The variables that ranks get: those of `PASSED_ON` and of `more`."""
    return {
        name: value
        for name, value in environment.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in (*PASSED_ON, *more))
    }


def gpu_index(assigned: str, visible: str | None) -> int:
    """torch's index of the GPU that Ray has assigned, where every GPU of the node stays visible.

    Ray names GPUs as the node's own `CUDA_VISIBLE_DEVICES` does: by number or UUID.
    """
    if not visible:
        return int(assigned)
    return [name.strip() for name in visible.split(",")].index(assigned)


def interface_of(address: str) -> str | None:
    """The network interface with that IPv4 address; None where there is none (Linux only)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return None
