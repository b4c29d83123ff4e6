"""Key-value stores in which ranks meet and leave word for each other."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

_STORE_TIMEOUT = timedelta(seconds=30)


def agent_keeps_store() -> bool:
    """Whether torchrun's agent keeps the store; otherwise rank 0 does, once the ranks meet."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def open_store(prefix: str = "") -> Store:
    """A connection of its own to the store that the environment names, to keys with that prefix."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=_STORE_TIMEOUT)
    return PrefixStore(prefix, store) if prefix else store


def host_store(address: str) -> Store:
    """A store for ranks to meet in, on a free port of that address of this machine and no other."""
    family, *_ = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.create_server((address, 0), family=family)
    port: int = listener.getsockname()[1]
    # Without a socket of ours it would listen on every address of the machine.
    return TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def reach_store(address: str, port: int) -> Store:
    """The store that another rank hosts."""
    return TCPStore(address, port, is_master=False)
