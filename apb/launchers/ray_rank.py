"""A rank inside a Ray actor: its life is `run`, the other methods are its mail and its facts."""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import os
import platform
import socket
import struct
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from queue import Empty, Queue
from typing import Any

PASSED_ON = (
    *("APB_HOME", "APB_FAULTS", "APB_LOG_*", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_*"),
    *("NCCL_*", "GLOO_*", "TORCH_*", "PYTORCH_*", "TRITON_*", "TQDM_*", "OMP_NUM_THREADS"),
    *("CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_MAX_CONNECTIONS"),
)
"""Variables of the driver that ranks get. A list of what is let through, not of what is held back:
keys and tokens stay where they are."""
INBOX, OUTBOX = "inbox", "outbox"
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
    """One rank. `run` occupies it for its whole life, `post` and `take` come in beside that.

    Args:
        rank: of the gang; `local_rank` counts those of its node.
        environment: variables for this process, where the node has not set them otherwise.
        folder: the driver's working directory, used where the node has it too.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        local_rank: int,
        local_world_size: int,
        environment: Mapping[str, str],
        folder: str,
    ) -> None:
        self._rank, self._world_size, self._local_rank = rank, world_size, local_rank
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        os.environ["LOCAL_RANK"] = str(local_rank)
        os.environ["LOCAL_WORLD_SIZE"] = str(local_world_size)
        if os.path.isdir(folder):
            os.chdir(folder)
        self._mailbox = Mailbox()
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

    def run(self, address: str, store: tuple[str, int]) -> list[bytes]:
        """Serve requests until told to end; returns what nobody has taken, such as an error.

        Args:
            address: of this node, where its peers reach it.
            store: address and port of the store.
        """
        from apb.stores import reach_store
        from apb.worker import serve

        with contextlib.suppress(PermissionError):  # Ray's processes yield to all others
            os.setpriority(os.PRIO_PROCESS, 0, 0)
        if (interface := interface_of(address)) is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        serve(
            self._mailbox,
            self._rank,
            self._world_size,
            local_rank=self._gpu_index(),
            store=self._store or reach_store(*store),
        )
        return self._mailbox.take(wait=False)

    def post(self, message: bytes) -> None:
        """Hand the rank a message of the driver."""
        self._mailbox.post(message)

    def take(self) -> list[bytes]:
        """What the rank says; waits until it says something."""
        return self._mailbox.take(wait=True)

    def _gpu_index(self) -> int:
        import ray

        assigned = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        if not assigned:
            return self._local_rank
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
