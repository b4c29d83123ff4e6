"""Fixtures of all tests: pools of ranks, seeds, and poison in memory that apb leaves unwritten."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings

from poison import poisoned_empty
from rank_pool import RankPool
from triton_interpreter import use_interpreter


def pytest_configure() -> None:
    if not torch.cuda.is_available():
        use_interpreter()  # before any test imports a kernel
    settings.register_profile("apb", deadline=None)  # a busy machine is no fault of a test's
    settings.load_profile("apb")
    # Threads that wait for one another cost more than tiny tensors gain, above all beside ranks.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark, reason = "gpu", "needs a CUDA device"
    if torch.cuda.is_available():
        mark, reason = "interpreted", "kernels are compiled here"
    for item in items:
        if item.get_closest_marker(mark):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_empty():
        yield


@pytest.fixture(scope="session")
def pool_of() -> Iterator[Callable[[int], RankPool]]:
    """The session's ranks: ``pool_of(2).run(program, ...)``."""
    pools: dict[int, RankPool] = {}

    def pool_of(world_size: int) -> RankPool:
        return pools.setdefault(world_size, RankPool(world_size))

    yield pool_of
    for pool in pools.values():
        pool.close()
