"""How the commands that ask ranks end: one sentence for each failure, and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from apb.drain import EXIT_CODE, Terminated
from apb.errors import ApbError, EngineDeadError, InputError
from apb.log import configure_logging


def exit_code(name: str, command: Callable[[], int]) -> int:
    """Of a command, after it has run; `name` introduces what it says of its failure.

    Inside torchrun every rank calls this. Where ranks are gone the process ends here.
    """
    rank, world_size = this_rank(), os.environ.get("WORLD_SIZE")
    configure_logging(rank, None if world_size is None else int(world_size))
    try:
        return command()
    except ApbError as error:
        _report(f"{name}: rank {rank}" if rank else name, error, rank)
        if isinstance(error, EngineDeadError) and error.is_told:
            os._exit(error.exit_code)  # an orderly end could wait for ranks that are gone
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Terminated:
        print(f"{name}: ended by SIGTERM before there was an answer", file=sys.stderr)  # noqa: T201
        return EXIT_CODE


def this_rank() -> int:
    """Of torchrun's ranks; 0 outside of it. Rank 0 reads, shows and writes."""
    return int(os.environ.get("RANK", "0"))


def _report(who: str, error: ApbError, rank: int) -> None:
    """One sentence and, of a rank that hung or failed, its stack; each of them once."""
    if isinstance(error, EngineDeadError) and error.is_told:
        return
    # Bad input is found by every rank alike.
    if rank == 0 or not isinstance(error, InputError):
        lines = [f"{who}: {error}", *getattr(error, "__notes__", ())]
        print("\n".join(lines), file=sys.stderr)  # noqa: T201
