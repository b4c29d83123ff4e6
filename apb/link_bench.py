"""What travels between two ranks of this machine per second, over the transport that a run uses."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from apb.comm import Communicator, Kind, Tag
from apb.errors import ApbError
from apb.listening import LOOPBACK, listen_on
from apb.worker import join_group

T = TypeVar("T")
_RANKS = 2
_LARGE_BYTES, _SMALL_BYTES = 2**24, 2**10
_LARGE_REPEATS, _SMALL_REPEATS = 9, 99
_WARM_UPS = 3
_TIMEOUT_S = 120.0


class LinkRates(NamedTuple):
    """Bytes per second from another rank, and seconds of a small message."""

    link_bytes: float
    latency_s: float


def measure_link(device_type: str) -> LinkRates:
    """The rates between two fresh processes: gloo on the CPU, NCCL on the first two GPUs.

    Raises:
        ApbError: they failed or did not end.
    """
    results = run_ranks(_RANKS, device_type, link_rates)
    return LinkRates(
        min(result.link_bytes for result in results), max(result.latency_s for result in results)
    )


def run_ranks(
    world_size: int,
    device_type: str,
    program: Callable[[Communicator], T],
    *,
    timeout_s: float = _TIMEOUT_S,
) -> list[T]:
    """What `program` returns in fresh processes of this machine, in rank order.

    It is importable, and so is what it returns. On the CPU each rank has one thread.

    Raises:
        ApbError: a rank failed, or was not done in time.
    """
    context = multiprocessing.get_context("spawn")
    folder = tempfile.mkdtemp(prefix="apb-link-")
    init_method = (Path(folder) / "rendezvous").as_uri()
    ranks, connections = [], []
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_rank,
                args=(rank, world_size, device_type, init_method, program, theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            ranks.append(process)
            connections.append(ours)
        return _results(connections, timeout_s)
    finally:
        for process in ranks:
            process.kill()
            process.join()
        shutil.rmtree(folder, ignore_errors=True)


def _results(connections: Sequence[Connection], timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    found: dict[int, Any] = {}
    while len(found) < len(connections):
        waiting = [connection for rank, connection in enumerate(connections) if rank not in found]
        ready = wait(waiting, deadline - time.monotonic())
        if not ready:
            raise ApbError(f"ranks that measure were not done within {timeout_s:.0f} s")
        for rank, connection in enumerate(connections):
            if connection in ready:
                try:
                    found[rank] = connection.recv()
                except EOFError:
                    raise ApbError(
                        f"rank {rank} of a measurement failed; see its error above"
                    ) from None
    return [found[rank] for rank in range(len(connections))]


def _run_rank(
    rank: int,
    world_size: int,
    device_type: str,
    init_method: str,
    program: Callable[[Communicator], object],
    connection: Connection,
) -> None:
    listen_on(LOOPBACK, os.environ)
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if device_type == "cuda" else torch.device("cpu")
    comm, leave = join_group(rank, world_size, device, init_method=init_method)
    connection.send(program(comm))
    leave()


def link_rates(comm: Communicator, *, large_bytes: int = _LARGE_BYTES) -> LinkRates:
    """Exchange messages with the other rank of a pair, both directions at once, as `ring` does."""
    large_s = _exchange_s(comm, large_bytes, _LARGE_REPEATS)
    small_s = _exchange_s(comm, _SMALL_BYTES, _SMALL_REPEATS)
    return LinkRates(large_bytes / large_s, small_s)


def _exchange_s(comm: Communicator, num_bytes: int, repeats: int) -> float:
    """Median of the seconds from asking for a message until it is there."""
    message = torch.ones(num_bytes, dtype=torch.uint8, device=comm.device)
    other = 1 - comm.rank
    seconds = []
    for repeat in range(_WARM_UPS + repeats):
        tag = Tag(1, repeat, Kind.RING)
        begin = time.perf_counter()
        comm.exchange({other: message}, {other: message}, tag).wait()
        if comm.device.type == "cuda":
            torch.cuda.synchronize(comm.device)
        seconds.append(time.perf_counter() - begin)
    comm.verify()
    return statistics.median(seconds[_WARM_UPS:])
