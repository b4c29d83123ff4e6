"""Fixtures of all tests: pools of ranks, seeds, and poison in memory that apb leaves unwritten."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings

from poison import poisoned_empty
from rank_pool import RankPool
from triton_interpreter import use_interpreter

_GPUS = "CUDA_VISIBLE_DEVICES"
_VISIBLE_GPUS = pytest.StashKey[str | None]()


def pytest_configure(config: pytest.Config) -> None:
    if torch.cuda.is_available():
        torch.cuda.init()  # this process sees its GPUs; programs that tests start do not
        config.stash[_VISIBLE_GPUS] = os.environ.get(_GPUS)
        os.environ[_GPUS] = ""
    else:
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


@pytest.fixture
def gpus(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that the test starts see the machine's GPUs."""
    monkeypatch.delenv(_GPUS)
    visible = pytestconfig.stash[_VISIBLE_GPUS]
    if visible is not None:
        monkeypatch.setenv(_GPUS, visible)


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
