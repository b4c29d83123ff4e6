"""Inside torchrun: this process is a rank already, and every rank makes the same calls."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

from apb.agreement import from_owner
from apb.config import RunConfig
from apb.errors import InputError
from apb.launchers.base import Session
from apb.runner import RequestRunner
from apb.worker import choose_device, join_group

T = TypeVar("T")


class TorchrunSession(Session):
    """One rank of a gang that torchrun, Slurm or the caller has started."""

    def __init__(self, config: RunConfig) -> None:
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
        device = choose_device(config.device, int(os.environ.get("LOCAL_RANK", rank)))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size) and sys.platform == "linux":
            # All ranks are here, so that none has to listen beyond this machine.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self._comm, self._leave = join_group(rank, world_size, device)
        self._runner = RequestRunner(config, self._comm)

    def call(self, op: str, **arguments: Any) -> Generator[dict[str, Any], None, None]:
        return self._runner.handle(op, arguments)

    def shared(self, values: Iterator[T]) -> Iterator[T]:
        """The owner's values; what the other ranks pass is not looked at."""
        while True:
            mine = next(values, None) if self._runner.is_owner else None
            value: T | None = from_owner(self._comm, mine)
            if value is None:
                return
            yield value

    def close(self) -> None:
        self._leave()
        self._leave = lambda: None
