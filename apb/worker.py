"""One rank's life: device, process group, requests, tear-down."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from apb.comm import Communicator
from apb.config import compose_config
from apb.errors import ApbError, EngineDeadError, InputError, RequestError
from apb.log import configure_logging
from apb.methods.decode import OWNER
from apb.runner import RequestRunner

_PARENT_CHECK_S = 1.0
_COLLECTIVE_TIMEOUT = timedelta(hours=6)
"""Idle ranks wait out whole prefills; that a peer is gone shows at once, by its connection."""


class Channel(Protocol):
    """What a rank and its driver exchange JSON over; `multiprocessing` connections are some."""

    def send_bytes(self, buf: bytes, /) -> None:
        """Send one message."""

    def recv_bytes(self) -> bytes:
        """The next message; waits for it."""

    def poll(self) -> bool:
        """Whether there is one."""


def choose_device(name: str, local_rank: int) -> torch.device:
    """This rank's device; `auto` is its GPU where there is one.

    Raises:
        InputError: no such GPU.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    available = torch.cuda.device_count()
    if available == 0:
        raise InputError("device=cuda but torch finds no GPU here: set device=cpu")
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    if ranks_here > available:  # asked on every rank, so that all of them fail alike
        raise InputError(
            f"{ranks_here} ranks on this machine but {available} GPUs: start at most {available} "
            "ranks here or set device=cpu"
        )
    return torch.device("cuda", local_rank)


def join_group(
    rank: int,
    world_size: int,
    device: torch.device,
    *,
    init_method: str = "env://",
    store: Any | None = None,
) -> tuple[Communicator, Callable[[], None]]:
    """Meet the other ranks; returns how to talk to them and how to leave.

    They meet in `store` or, without one, where `init_method` says. A process group that the caller
    has made already is used and left alone.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    leave: Callable[[], None] = lambda: None  # noqa: E731
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=None if store is not None else init_method,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=_COLLECTIVE_TIMEOUT,
        )
        leave = dist.destroy_process_group
    deferred = device.type == "cuda"
    return Communicator(rank, world_size, device, defer_checks=deferred), leave


def host_store(address: str) -> Any:
    """A store for ranks to meet in, on a free port of that address of this machine and no other."""
    family, *_ = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.create_server((address, 0), family=family)
    port: int = listener.getsockname()[1]
    # Without a socket of ours it would listen on every address of the machine.
    return TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def reach_store(address: str, port: int) -> Any:
    """The store that another rank hosts."""
    return TCPStore(address, port, is_master=False)


def main() -> int:
    """A rank of the local launcher: serve requests from an inherited connection until it closes."""
    connection = Connection(int(os.environ["APB_CONNECTION"]))
    rank = int(os.environ["RANK"])
    threading.Thread(target=_follow_parent, daemon=True).start()
    return serve(connection, rank, int(os.environ["WORLD_SIZE"]), local_rank=rank)


def serve(
    connection: Channel,
    rank: int,
    world_size: int,
    *,
    local_rank: int,
    store: Any | None = None,
) -> int:
    """Answer requests until the driver says `exit`; returns the exit code, errors are sent."""
    try:
        _serve(connection, rank, world_size, local_rank, store)
    except (EOFError, BrokenPipeError):
        return 1  # the driver is gone, and with it whoever could be told
    except ApbError as error:
        _send(connection, {"error": str(error), "kind": type(error).__name__})
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        cause = f"rank {rank} failed: {type(error).__name__}: {error}"
        _send(connection, {"error": cause, "kind": EngineDeadError.__name__})
        return 1
    return 0


def _follow_parent() -> None:
    """End with the driver, also where it was killed while this rank computes."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os._exit(1)


def _serve(
    connection: Channel, rank: int, world_size: int, local_rank: int, store: Any | None
) -> None:
    hello = _receive(connection)
    configure_logging(rank, world_size)
    config = compose_config(hello["overrides"])
    device = choose_device(config.device, local_rank)
    comm, leave = join_group(
        rank, world_size, device, init_method=hello["init_method"], store=store
    )
    runner = RequestRunner(config, comm)
    if rank == OWNER:
        _send(connection, {"result": None})
    while (request := _receive(connection))["op"] != "exit":
        _handle(runner, request, connection)
    leave()


def _handle(runner: RequestRunner, request: dict[str, Any], connection: Channel) -> None:
    if request["op"] == "cancel":  # it came after its request had ended
        return
    try:
        for reply in runner.handle(
            request["op"], request["arguments"], is_cancelled=lambda: _cancelled(connection)
        ):
            if runner.is_owner:
                _send(connection, reply)
    except (InputError, RequestError) as error:  # the same on every rank
        if runner.is_owner:
            _send(connection, {"error": str(error), "kind": type(error).__name__})


def _cancelled(connection: Channel) -> bool:
    """Whether the driver has written anything: during a request that can only be `cancel`."""
    if not connection.poll():
        return False
    return bool(_receive(connection)["op"] == "cancel")


def _send(connection: Channel, message: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())


def _receive(connection: Channel) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(connection.recv_bytes())
    return message


if __name__ == "__main__":
    sys.exit(main())
