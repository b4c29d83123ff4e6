"""Inside torchrun: this process is a rank already, and every rank makes the same calls."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

from apb.agreement import from_owner, together
from apb.config import RunConfig
from apb.errors import EngineDeadError, InputError, RequestError
from apb.heartbeat import Stage
from apb.launchers.base import Session
from apb.launchers.rendezvous import fresh_prefix
from apb.launchers.watch import StoreWatch
from apb.listening import LOOPBACK, listen_on
from apb.runner import RequestRunner
from apb.stores import agent_keeps_store, open_store
from apb.worker import begin_pulse, choose_device, join_group

T = TypeVar("T")


class TorchrunSession(Session):
    """One rank of a gang that torchrun, Slurm or the caller has started."""

    def __init__(self, config: RunConfig) -> None:
        if config.on_rank_loss == "degrade":
            raise InputError(
                "on_rank_loss=degrade needs ranks that apb starts itself (launcher=local or ray): "
                "torchrun starts all of them again or none (--max-restarts)"
            )
        if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
            raise InputError(
                "launcher=torchrun needs RANK and WORLD_SIZE in the environment: start with "
                "torchrun, or choose launcher=local"
            )
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if config.world_size not in (None, world_size):
            raise InputError(
                f"world_size={config.world_size} but torchrun started {world_size} ranks: "
                "drop world_size or change --nproc-per-node"
            )
        self.world_size = world_size
        self._failure: EngineDeadError | None = None
        self._watch: StoreWatch | None = None
        self._leave: Callable[[], None] = lambda: None
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        pulse, injector = begin_pulse(rank, restarts=restarts)
        device = _device_of_this_machine(config, rank)
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size) and sys.platform == "linux":
            # All ranks are here, so that none has to listen beyond this machine.
            listen_on(LOOPBACK, os.environ)
        watching = partial(
            StoreWatch, pulse=pulse, rank=rank, world_size=world_size, config=config.supervision
        )
        join = partial(join_group, rank, world_size, device, pulse=pulse, injector=injector)
        try:
            with _meeting(rank):
                if world_size > 1 and agent_keeps_store():
                    start_s = config.supervision.start_s
                    prefix = fresh_prefix(open_store(), rank, world_size, timeout_s=start_s)
                    self._watch = watching(open_store(f"{prefix}/watch"))
                    self._comm, self._leave = join(store=open_store(f"{prefix}/group"))
                else:
                    self._comm, self._leave = join()
                    if world_size > 1 and "MASTER_ADDR" in os.environ:
                        self._watch = watching(open_store("apb/watch"))
            # A model folder may be missing on one machine alone, which rank 0 has to say.
            read = partial(RequestRunner, config, self._comm, pulse)
            self._runner = together(self._comm, "start", read)
        except BaseException:
            self.close()
            raise
        pulse.enter(Stage.IDLE)

    def call(self, op: str, **arguments: Any) -> Generator[dict[str, Any], None, None]:
        if self._failure is not None:
            raise self._failure
        try:
            yield from self._runner.handle(op, arguments)
        except (InputError, RequestError, GeneratorExit):
            raise
        except BaseException as error:
            self._leave = lambda: None  # in the middle of a request there is no orderly way out
            if self._watch is None or not isinstance(error, Exception):
                raise
            self._failure = self._watch.explain(error)
            raise self._failure from error

    def failure(self) -> EngineDeadError | None:
        return self._failure

    def shared(self, values: Iterator[T]) -> Iterator[T]:
        """The owner's values; what the other ranks pass is not looked at."""
        while True:
            mine = next(values, None) if self._runner.is_owner else None
            value: T | None = from_owner(self._comm, mine)
            if value is None:
                return
            yield value

    def close(self) -> None:
        if self._watch is not None:
            self._watch.stop()
        self._leave()
        self._watch, self._leave = None, lambda: None


@contextmanager
def _meeting(rank: int) -> Iterator[None]:
    """What goes wrong while ranks meet, in one sentence."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise EngineDeadError(
            f"rank {rank} on {socket.gethostname()} could not meet the others ({reason}): another "
            "may have said why; where host names do not lead to the right network, set "
            "GLOO_SOCKET_IFNAME and, for GPUs, NCCL_SOCKET_IFNAME to the interface"
        ) from error


def _device_of_this_machine(config: RunConfig, rank: int) -> torch.device:
    """As `choose_device`; what another machine than rank 0's lacks its first rank says."""
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    try:
        return choose_device(config.device, local_rank)
    except InputError as error:
        if rank and local_rank == 0:
            print(f"apb: rank {rank}: {error}", file=sys.stderr, flush=True)  # noqa: T201
        raise
