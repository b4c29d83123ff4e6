"""Inside torchrun: this process is a rank already, and every rank makes the same calls."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

from apb.config import RunConfig
from apb.errors import InputError
from apb.launchers.base import Session
from apb.runner import RequestRunner
from apb.worker import choose_device, join_group


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
        comm, self._leave = join_group(rank, world_size, device)
        self._runner = RequestRunner(config, comm)

    def call(self, op: str, **arguments: Any) -> Generator[dict[str, Any], None, None]:
        return self._runner.handle(op, arguments)

    def close(self) -> None:
        self._leave()
        self._leave = lambda: None
