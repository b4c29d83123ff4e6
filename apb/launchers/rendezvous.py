"""A namespace of its own for every gang that torchrun starts on one and the same store.

torchrun's agent keeps its store over restarts, and gloo then finds the addresses of ranks that are
gone (pytorch issues 55967, 74666). Nothing in the environment tells one round from the next on all
nodes: an agent counts only the restarts that its own ranks caused. So the ranks agree on a name.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from typing import Any, Protocol

from apb.errors import EngineDeadError

_POLL_S = 0.05


class Store(Protocol):
    """What is used of torch.distributed's key-value store."""

    def set(self, key: str, value: str, /) -> object: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def check(self, keys: list[str], /) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


def fresh_prefix(store: Store, rank: int, world_size: int, *, timeout_s: float) -> str:
    """A prefix for keys that no earlier gang has used, the same on every rank.

    Rank 0 offers one and accepts it with the marks that the ranks left under it. A rank that saw an
    earlier gang's offer does not find its mark there and looks again.

    Raises:
        EngineDeadError: a rank has not come up in time.
    """
    if rank == 0:
        return _offer(store, world_size, timeout_s)
    mark = uuid.uuid4().hex

    def accepted() -> str | None:
        offer = _read(store, "apb/offer")
        if offer is None:
            return None
        store.set(f"{offer}/mark{rank}", json.dumps(mark))
        marks = _read(store, f"{offer}/accepted")
        return offer if marks is not None and marks[rank - 1] == mark else None

    return _poll(accepted, timeout_s, lambda: "rank 0")


def _offer(store: Store, world_size: int, timeout_s: float) -> str:
    offer = f"apb/{uuid.uuid4().hex}"
    store.set("apb/offer", json.dumps(offer))
    keys = [f"{offer}/mark{rank}" for rank in range(1, world_size)]

    def accept() -> str | None:
        if not store.check(keys):
            return None
        marks = [json.loads(mark) for mark in store.multi_get(keys)]
        store.set(f"{offer}/accepted", json.dumps(marks))
        return offer

    def missing() -> str:
        absent = [str(rank) for rank, key in enumerate(keys, start=1) if not store.check([key])]
        return f"rank {', '.join(absent)}"

    return _poll(accept, timeout_s, missing)


def _read(store: Store, key: str) -> Any:
    return json.loads(store.multi_get([key])[0]) if store.check([key]) else None


def _poll(attempt: Callable[[], str | None], timeout_s: float, missing: Callable[[], str]) -> str:
    deadline = time.monotonic() + timeout_s
    while (found := attempt()) is None:
        if time.monotonic() > deadline:
            raise EngineDeadError(
                f"{missing()} has not come up within supervision.start_s={timeout_s:g}"
            )
        time.sleep(_POLL_S)
    return found
