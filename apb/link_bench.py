"""What travels between two ranks of this machine per second, over the transport that a run uses."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

import torch

from apb.comm import Communicator, Kind, Tag
from apb.errors import ApbError
from apb.worker import join_group

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
    context = multiprocessing.get_context("spawn")
    folder = tempfile.mkdtemp(prefix="apb-link-")
    init_method = (Path(folder) / "rendezvous").as_uri()
    ranks, connections = [], []
    try:
        for rank in range(_RANKS):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_rank, args=(rank, device_type, init_method, theirs), daemon=True
            )
            process.start()
            theirs.close()
            ranks.append(process)
            connections.append(ours)
        return _slowest(connections)
    finally:
        for process in ranks:
            process.kill()
            process.join()
        shutil.rmtree(folder, ignore_errors=True)


def _slowest(connections: list[Connection]) -> LinkRates:
    """What the ranks report, of the one with the lower rates."""
    results = []
    for _ in range(_RANKS):
        ready = wait(connections, _TIMEOUT_S)
        if not ready:
            raise ApbError(f"the ranks that measure the link did not end within {_TIMEOUT_S:.0f} s")
        connection = ready[0]
        assert isinstance(connection, Connection)
        connections.remove(connection)
        try:
            results.append(LinkRates(*connection.recv()))
        except EOFError:
            raise ApbError("a rank that measures the link failed; see its error above") from None
    return LinkRates(
        min(result.link_bytes for result in results), max(result.latency_s for result in results)
    )


def _run_rank(rank: int, device_type: str, init_method: str, connection: Connection) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if device_type == "cuda" else torch.device("cpu")
    comm, leave = join_group(rank, _RANKS, device, init_method=init_method)
    connection.send(tuple(link_rates(comm)))
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
