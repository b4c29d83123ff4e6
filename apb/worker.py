"""One rank's life: device, process group, requests, tear-down."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from apb.comm import Communicator
from apb.config import compose_config
from apb.errors import InputError, RequestError
from apb.faults import FaultInjector, FaultyCommunicator, planned_faults
from apb.heartbeat import Beat, Board, Pulse, Stage
from apb.log import configure_logging
from apb.methods.decode import OWNER
from apb.methods.plan import Reduced
from apb.report import device_name
from apb.runner import RequestRunner
from apb.supervision import Report

_PARENT_CHECK_S = 1.0
_LOG = logging.getLogger(__name__)
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


def begin_pulse(
    rank: int, *, restarts: int = 0, slot: memoryview | None = None
) -> tuple[Pulse, FaultInjector | None]:
    """What the rank tells of its progress, and the faults that `APB_FAULTS` wants of it.

    Raises:
        InputError: the faults are not understood.
    """
    faults = planned_faults(os.environ, rank=rank, gang=restarts)
    injector = FaultInjector(faults) if faults else None
    pulse = Pulse(slot, on_mark=None if injector is None else injector.reach)
    pulse.enter(Stage.START)
    return pulse, injector


def join_group(
    rank: int,
    world_size: int,
    device: torch.device,
    *,
    init_method: str = "env://",
    store: Store | None = None,
    pulse: Pulse | None = None,
    injector: FaultInjector | None = None,
) -> tuple[Communicator, Callable[[], None]]:
    """Meet the other ranks; returns how to talk to them and how to leave.

    A process group that the caller has made already is used and left alone. They meet at `store`
    if it is given, else as `init_method` says.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    leave: Callable[[], None] = lambda: None  # noqa: E731
    if pulse is not None and world_size > 1:
        pulse.wait(0, 0)
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
    control = dist.new_group(backend="gloo") if world_size > 1 else None
    if pulse is not None:
        pulse.go_on()
    if rank == 0:
        ranks = "1 rank" if world_size == 1 else f"{world_size} ranks, rank 0"
        _LOG.info("%s on %s", ranks, device_name(device))
    settings: dict[str, Any] = {
        "defer_checks": device.type == "cuda",
        "pulse": pulse,
        "control": control,
    }
    if injector is not None:
        return FaultyCommunicator(rank, world_size, device, injector=injector, **settings), leave
    return Communicator(rank, world_size, device, **settings), leave


def main() -> int:
    """A rank of the local launcher: serve requests from an inherited connection until it closes."""
    connection = Connection(int(os.environ["APB_CONNECTION"]))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        hello = receive(connection)
    except (EOFError, OSError):
        return 1  # the driver is gone, and with it whoever could be told
    folder = Path(hello["folder"])
    board = Board(folder / "board", world_size)
    threading.Thread(target=_follow_driver, args=(folder, board), daemon=True).start()
    stacks = (folder / f"stack-{rank}").open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)
    try:
        return serve(
            connection,
            hello,
            rank,
            world_size,
            init_method=(folder / "rendezvous").as_uri(),
            local_rank=int(os.environ["APB_GPU"]),
            slot=board.slot(rank),
            host=socket.gethostname(),
        )
    except (EOFError, BrokenPipeError):
        _end_all(folder, board)


def _follow_driver(folder: Path, board: Board) -> None:
    """End with the driver, also where it was killed while this rank computes."""
    driver = int(os.environ["APB_DRIVER"])
    while os.getppid() == driver:
        time.sleep(_PARENT_CHECK_S)
    _end_all(folder, board)


def _end_all(folder: Path, board: Board) -> NoReturn:
    """Clear up for all ranks: one that is stopped cannot."""
    shutil.rmtree(folder, ignore_errors=True)
    for beat in board.read():
        if beat.pid not in (0, os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(beat.pid, signal.SIGKILL)
    os._exit(1)


def serve(
    connection: Channel,
    hello: dict[str, Any],
    rank: int,
    world_size: int,
    *,
    init_method: str = "env://",
    store: Store | None = None,
    local_rank: int,
    slot: memoryview,
    host: str,
) -> int:
    """Answer requests until the driver says `exit`; returns the exit code, errors are sent.

    Args:
        hello: the driver's first message.
        slot: where others read this rank's progress.
        host: what this machine is called.

    Raises:
        EOFError, BrokenPipeError: the driver is gone.
    """
    configure_logging(rank, world_size)
    try:
        config = compose_config(hello["overrides"])
        pulse, injector = begin_pulse(rank, restarts=hello["restarts"], slot=slot)
        device = choose_device(config.device, local_rank)
        join = partial(join_group, rank, world_size, device, pulse=pulse, injector=injector)
        comm, leave = join(init_method=init_method, store=store)
        reduced = Reduced(*hello["reduced"]) if hello["reduced"] else None
        runner = RequestRunner(config, comm, pulse, reduced)
        pulse.enter(Stage.IDLE)
        if rank == OWNER:
            _send(connection, {"result": None})
        while (request := receive(connection))["op"] != "exit":
            _handle(runner, request, connection)
        leave()
    except (EOFError, BrokenPipeError):
        raise
    except InputError as error:
        _send(connection, {"error": str(error), "kind": InputError.__name__})
        return error.exit_code
    except Exception as error:
        place = Beat.read(slot).place
        report = Report.of(error, rank=rank, host=host, place=place, at_s=time.time())
        _send(connection, {"report": report})
        return 1
    return 0


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
    return bool(receive(connection)["op"] == "cancel")


def _send(connection: Channel, message: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())


def receive(connection: Channel) -> dict[str, Any]:
    """The driver's next message."""
    message: dict[str, Any] = json.loads(connection.recv_bytes())
    if "file" in message:  # a long one
        path = Path(message["file"])
        message = json.loads(path.read_bytes())
        path.unlink()
    return message


if __name__ == "__main__":
    sys.exit(main())
