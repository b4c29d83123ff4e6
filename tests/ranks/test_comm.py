"""Guarantees of messages between ranks: what is sent arrives, and a rank out of step is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from apb.comm import HEADER_BYTES, Communicator, Kind, Tag
from apb.errors import EngineDeadError
from rank_pool import RankPool

PoolOf = Callable[[int], RankPool]

TAG = Tag(1, 0, Kind.UPSTREAM)
WORLD_SIZES = (1, 2, 3)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
SHAPES = ((), (1,), (7,), (3, 5), (0,), (2, 0, 3), (2, 3, 1, 4))


def sample(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(shape, generator=generator) * 50).abs().to(dtype)


def gather_and_broadcast(
    comm: Communicator, shape: tuple[int, ...], dtype: torch.dtype, src: int
) -> tuple[Tensor, Tensor]:
    mine = sample(comm.rank, shape, dtype)
    gathered = comm.all_gather(mine, TAG)
    template = mine if comm.rank == src else torch.zeros_like(mine)
    spread = comm.broadcast(template, TAG._replace(layer=1), src=src)
    # Waited for in the other order, and once more.
    spread.wait()
    gathered.wait()
    return gathered.wait(), spread.wait()


def gather_values(comm: Communicator, values: list[Any]) -> tuple[list[Any], list[int]]:
    ints = comm.broadcast_ints([10 * comm.rank, -1], TAG, src=comm.world_size - 1)
    return comm.all_gather_json(values[comm.rank], TAG), ints


def bytes_of(comm: Communicator, numel: int) -> list[int]:
    """Bytes received by a gather, then by a broadcast from rank 0, of fp32 numbers."""
    received = []
    for move in (comm.all_gather, lambda x, tag: comm.broadcast(x, tag, src=0)):
        before = comm.bytes_received
        move(torch.zeros(numel), TAG).wait()
        received.append(comm.bytes_received - before)
    return received


def gather_layers(comm: Communicator, tags: list[list[Tag]]) -> str:
    """One gather per tag of this rank's list; the error it ends in."""
    try:
        for tag in tags[comm.rank]:
            comm.all_gather(torch.zeros(4), tag).wait()
    except EngineDeadError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_arrives_unchanged(
    pool_of: PoolOf, dtype: torch.dtype, world_size: int
) -> None:
    src = world_size - 1
    for shape in SHAPES:
        sent = [sample(rank, shape, dtype) for rank in range(world_size)]
        for gathered, spread in pool_of(world_size).run(gather_and_broadcast, shape, dtype, src):
            assert gathered.dtype == spread.dtype == dtype
            assert torch.equal(gathered, torch.stack(sent)), shape
            assert torch.equal(spread, sent[src]), shape


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_values_of_any_length_come_in_rank_order(pool_of: PoolOf, world_size: int) -> None:
    values = [{"a": [1.5, None, "\u00e9\U0001f600" * 40]}, [], "x"][:world_size]
    for received, ints in pool_of(world_size).run(gather_values, values):
        assert received == values
        assert ints == [10 * (world_size - 1), -1]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("numel", "padded"), [(0, 0), (1, 16), (4, 16), (5, 32)])
def test_bytes_received_from_others_are_counted(
    pool_of: PoolOf, numel: int, padded: int, world_size: int
) -> None:
    message = HEADER_BYTES + padded
    for rank, received in enumerate(pool_of(world_size).run(bytes_of, numel)):
        from_owner = message if rank > 0 else 0
        assert received == [(world_size - 1) * message, from_owner]


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (TAG._replace(layer=3), "layer 3"),
        (TAG._replace(step=2), "step 2"),
        (TAG._replace(kind=Kind.PARTIAL), "partial of step 1"),
    ],
    ids=["layer", "step", "kind"],
)
def test_a_skipped_collective_is_an_error_that_names_both_messages(
    pool_of: PoolOf, second: Tag, words: str
) -> None:
    errors = pool_of(2).run(gather_layers, [[TAG, second], [second]])
    for rank, error in enumerate(errors):
        waited, found, received = error.partition("and received")
        assert found, error
        assert f"rank {rank} waited for" in waited
        assert words in (received if rank == 0 else waited)
        assert "upstream of step 1, layer 0" in (waited if rank == 0 else received)
        assert f"rank {1 - rank}" in received
        assert "\n" not in error


def test_ranks_in_step_see_no_error(pool_of: PoolOf) -> None:
    tags = [TAG, TAG._replace(layer=1), TAG._replace(step=2)]
    assert pool_of(2).run(gather_layers, [tags, tags]) == ["no error"] * 2
