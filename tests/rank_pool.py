"""Ranks for tests: gloo processes that outlive a test, because starting them costs seconds.

They fork from a server that has imported torch and apb and done nothing else, so that four pools
cost the imports once; like with `spawn`, nothing of the test process is inherited.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from apb.comm import Communicator
from poison import poisoned_empty

COLLECTIVE_TIMEOUT_S = 30.0
_REPORT_S = 1.0
"""How long the other ranks may take to report once one has failed; then they are killed."""

_PRELOAD = ["apb.config", "apb.engine", "apb.hf.model", "transformers.models.llama.modeling_llama"]


class RankPool:
    """`world_size` ranks on the CPU, one torch thread each. A world of one runs in this process."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._gang: _Gang | None = None

    def run(self, program: Callable[..., Any], *args: Any) -> list[Any]:
        """``program(comm, *args)`` on every rank; the results in rank order.

        `program` is an importable top-level function; arguments and results travel as pickles. If
        ranks fail, the error of the one that failed first is raised, with its traceback as a note,
        and the next call gets fresh ranks.
        """
        if self.world_size == 1:
            return [program(Communicator(0, 1, torch.device("cpu")), *args)]
        if self._gang is None:
            self._gang = _Gang(self.world_size)
        try:
            replies = self._gang.run(pickle.dumps((program, args)))
            failed = [(rank, r) for rank, r in enumerate(replies) if r.error is not None]
        except BaseException:
            self.close()
            raise
        if failed:
            self.close()
            rank, first = min(failed, key=lambda item: item[1].finished_at)
            assert first.error is not None
            first.error.add_note(f"on rank {rank} of {self.world_size}:\n{first.trace}")
            raise first.error
        return [reply.value for reply in replies]

    def close(self) -> None:
        """End the ranks; the next `run` starts new ones."""
        if self._gang is not None:
            self._gang.kill()
            self._gang = None


class _Reply(NamedTuple):
    """One rank's result, or its error, at a time on the machine's monotonic clock."""

    value: Any = None
    error: BaseException | None = None
    trace: str = ""
    finished_at: float = 0.0


class _Gang:
    """The processes behind a pool, until the first failure."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self._folder = tempfile.mkdtemp(prefix="apb-ranks-")
        self._ranks: list[tuple[BaseProcess, Connection]] = []
        init_method = (Path(self._folder) / "rendezvous").as_uri()
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, init_method, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def run(self, request: bytes) -> list[_Reply]:
        """Every rank's reply; once one rank has failed, those that hang count as waiting for it."""
        for _, connection in self._ranks:
            connection.send_bytes(request)
        replies: dict[int, _Reply] = {}
        while len(replies) < len(self._ranks):
            failed = any(reply.error is not None for reply in replies.values())
            missing = [rank for rank in range(len(self._ranks)) if rank not in replies]
            connections = [self._ranks[rank][1] for rank in missing]
            ready = wait(connections, timeout=_REPORT_S if failed else None)
            if not ready:
                break
            for rank, connection in zip(missing, connections, strict=True):
                if connection in ready:
                    replies[rank] = self._receive(rank)
        hung = _Reply(error=RuntimeError("still waiting for the others"), finished_at=float("inf"))
        return [replies.get(rank, hung) for rank in range(len(self._ranks))]

    def _receive(self, rank: int) -> _Reply:
        process, connection = self._ranks[rank]
        try:
            reply: _Reply = pickle.loads(connection.recv_bytes())
        except EOFError:
            process.join()
            error = RuntimeError(f"rank {rank} ended with exit code {process.exitcode}")
            return _Reply(error=error, finished_at=time.monotonic())
        return reply

    def kill(self) -> None:
        for process, connection in self._ranks:
            process.kill()
            process.join()
            connection.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _serve(rank: int, world_size: int, init_method: str, connection: Connection) -> None:
    """A rank's life: run what is sent until the pool goes away."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    comm = Communicator(rank, world_size, torch.device("cpu"))
    with poisoned_empty():
        while True:
            try:
                request = connection.recv_bytes()
            except EOFError:
                return
            connection.send_bytes(_portable(_run(comm, request)))


def _run(comm: Communicator, request: bytes) -> _Reply:
    try:
        program, args = pickle.loads(request)
        return _Reply(value=program(comm, *args), finished_at=time.monotonic())
    except BaseException as error:
        return _Reply(None, error, traceback.format_exc(), time.monotonic())


def _portable(reply: _Reply) -> bytes:
    """The reply as bytes that can be read back, whatever the value or the error was."""
    try:
        data = pickle.dumps(reply)
        pickle.loads(data)
    except Exception as error:
        cause = reply.error if reply.error is not None else error
        stand_in = RuntimeError(f"{type(cause).__name__}: {cause}")
        return pickle.dumps(reply._replace(value=None, error=stand_in))
    return data


def same_on_all_ranks(results: Sequence[Any]) -> Any:
    """The one value that every rank returned."""
    assert all(result == results[0] for result in results), results
    return results[0]
