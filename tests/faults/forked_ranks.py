"""Local ranks that fork from a server with everything imported: a gang is up in a second."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, cast

from apb.launchers.processes import RankProcess
from apb.listening import LOOPBACK, listen_on

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext

_PRELOAD = ["apb.worker", "transformers.models.llama.modeling_llama"]


class _Forked:
    """What the launcher uses of `subprocess.Popen`."""

    def __init__(self, process: BaseProcess) -> None:
        assert process.pid is not None
        self._process, self.pid = process, process.pid
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._process.exitcode
            if self._code is not None:
                self._process.close()  # which has open files, other than a Popen that has ended
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("a forked rank", timeout or 0.0)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            self._process.kill()

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


def start_forked_rank(rank: int, world_size: int, gpu: int) -> RankProcess:
    """As `start_rank`, with the variables of this process."""
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    ours, theirs = context.Pipe()
    environment = {
        **{name: value for name, value in os.environ.items() if name.startswith("APB_")},
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "APB_GPU": str(gpu),
    }
    listen_on(LOOPBACK, environment)
    process = context.Process(target=_live, args=(environment, theirs), daemon=True)
    process.start()
    theirs.close()
    return RankProcess(cast("subprocess.Popen[bytes]", _Forked(process)), ours)


def _live(environment: dict[str, str], connection: Connection) -> None:
    import torch

    from apb.worker import main

    os.setsid()
    torch.set_num_threads(1)
    os.environ.update(
        environment,
        APB_CONNECTION=str(os.dup(connection.fileno())),
        APB_DRIVER=str(os.getppid()),
    )
    connection.close()
    os._exit(main())
