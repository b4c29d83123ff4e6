"""Guarantees of the ranks that other tests run on: results by rank, the first failure, poison."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from apb.cache import CacheShape, KVCacheShard
from apb.comm import Communicator
from rank_pool import RankPool


def rank_and_argument(comm: Communicator, argument: str) -> tuple[int, int, str]:
    return comm.rank, comm.world_size, argument


def process_id(comm: Communicator) -> int:
    return os.getpid()


class Cause(Exception):
    """Leaves a file when it is reported, which is after its time was taken."""

    def __reduce__(self) -> tuple[type[Cause], tuple[str]]:
        Path(self.args[0]).touch()
        return Cause, self.args


def fail_on_rank_1_first(comm: Communicator, signal: str) -> None:
    if comm.rank == 1:
        raise Cause(signal)
    while not Path(signal).exists():
        time.sleep(0.01)
    raise ValueError("a consequence")


def leave_rank_0_waiting(comm: Communicator, signal: str) -> None:
    if comm.rank == 1:
        raise Cause(signal)
    dist.barrier()


def die_on_rank_1(comm: Communicator) -> None:
    if comm.rank == 1:
        os._exit(3)


def unpicklable(comm: Communicator) -> object:
    return lambda: None


def unwritten_memory(comm: Communicator) -> tuple[bool, bool]:
    shape = CacheShape(1, 1, 2, torch.float32)
    shard = KVCacheShard(shape, capacity=3, device=comm.device)
    mine = torch.empty(3)
    return bool(shard.view(0, pending=3)[0].isnan().all()), bool(mine.isnan().all())


@pytest.mark.parametrize("world_size", [1, 2])
def test_results_come_in_rank_order_and_ranks_stay_up(world_size: int) -> None:
    pool = RankPool(world_size)
    try:
        expected = [(rank, world_size, "x") for rank in range(world_size)]
        assert pool.run(rank_and_argument, "x") == expected
        ids = pool.run(process_id)
        assert len(set(ids)) == world_size
        assert pool.run(process_id) == ids
    finally:
        pool.close()
    assert pool.run(process_id) != ids or world_size == 1
    pool.close()


def test_first_failure_is_raised_with_its_traceback_and_ranks_are_renewed(tmp_path: Path) -> None:
    pool = RankPool(2)
    try:
        for program in (fail_on_rank_1_first, leave_rank_0_waiting):
            with pytest.raises(Cause) as failure:
                pool.run(program, str(tmp_path / program.__name__))
            (note,) = failure.value.__notes__
            assert note.startswith("on rank 1 of 2")
            assert program.__name__ in note
            assert pool.run(rank_and_argument, "y") == [(0, 2, "y"), (1, 2, "y")]
        with pytest.raises(RuntimeError, match="rank 1 ended with exit code 3"):
            pool.run(die_on_rank_1)
        with pytest.raises(RuntimeError, match="pickle"):
            pool.run(unpicklable)
    finally:
        pool.close()


@pytest.mark.parametrize("world_size", [1, 2])
def test_memory_that_apb_leaves_unwritten_is_nan(world_size: int) -> None:
    pool = RankPool(world_size)
    try:
        for of_apb, of_others in pool.run(unwritten_memory):
            assert of_apb
            assert not of_others
    finally:
        pool.close()
