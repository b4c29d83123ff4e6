"""Guarantees of messages between ranks: what is sent arrives, and a rank out of step is noticed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from apb.comm import HEADER_BYTES, Communicator, Kind, Tag
from apb.errors import EngineDeadError
from rank_pool import RankPool

PoolOf = Callable[[int], RankPool]
Routes = dict[tuple[int, int], tuple[tuple[int, ...], torch.dtype]]
"""Who sends what to whom."""

TAG = Tag(1, 0, Kind.UPSTREAM)
WORLD_SIZES = (1, 2, 3)
FLOAT = torch.float32
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


def exchange(comm: Communicator, rounds: list[Routes]) -> tuple[list[dict[int, Tensor]], int]:
    """What arrives in each round, all of them under way at once; and the bytes that came."""
    before = comm.bytes_received
    pending = []
    for step, routes in enumerate(rounds):
        outgoing = {
            target: sample(10 * source + target + step, shape, dtype)
            for (source, target), (shape, dtype) in routes.items()
            if source == comm.rank
        }
        incoming = {
            source: torch.empty(shape, dtype=dtype, device="meta")
            for (source, target), (shape, dtype) in routes.items()
            if target == comm.rank
        }
        pending.append(comm.exchange(outgoing, incoming, TAG._replace(step=step)))
    arrived = [round_.wait() for round_ in reversed(pending)]
    assert [round_.wait() for round_ in pending] == arrived[::-1], "waiting again changes nothing"
    return arrived[::-1], comm.bytes_received - before


def exchange_tagged(comm: Communicator, tags: list[Tag], shapes: list[tuple[int, ...]]) -> str:
    """Two ranks that send each other what the other does not wait for; the error it ends in."""
    other = 1 - comm.rank
    mine, theirs = torch.zeros(shapes[comm.rank]), torch.zeros(shapes[comm.rank], device="meta")
    try:
        comm.exchange({other: mine}, {other: theirs}, tags[comm.rank]).wait()
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


ROUTES: dict[str, list[Routes]] = {
    "nothing": [{}, {}],
    "ring": [{(0, 1): ((3, 5), FLOAT), (1, 2): ((7,), FLOAT), (2, 0): ((1, 2), FLOAT)}],
    "everyone_to_everyone": [
        {
            (source, target): ((source + 1, 2 * target + 1), DTYPES[source + target])
            for source in range(3)
            for target in range(3)
            if source != target
        }
    ],
    "one_only_sends_and_one_only_receives": [
        {(0, 1): ((4,), FLOAT), (0, 2): ((2, 3), torch.uint8), (1, 2): ((), torch.int64)}
    ],
    "one_stands_aside": [{(2, 0): ((5,), FLOAT)}],
    "without_elements": [{(0, 1): ((0, 3), FLOAT), (1, 0): ((2, 0), FLOAT)}],
    "several_under_way": [{(0, 1): ((n,), FLOAT), (2, 1): ((1, n), FLOAT)} for n in (9, 1, 20)],
}


@pytest.mark.parametrize("rounds", ROUTES.values(), ids=ROUTES)
def test_exchange_brings_each_rank_what_was_sent_to_it_and_nothing_else(
    pool_of: PoolOf, rounds: list[Routes]
) -> None:
    for rank, (arrived, num_bytes) in enumerate(pool_of(3).run(exchange, rounds)):
        expected_bytes = 0
        for step, (routes, found) in enumerate(zip(rounds, arrived, strict=True)):
            expected = {
                source: sample(10 * source + target + step, shape, dtype)
                for (source, target), (shape, dtype) in routes.items()
                if target == rank
            }
            assert found.keys() == expected.keys()
            for source, x in expected.items():
                assert found[source].dtype == x.dtype
                assert torch.equal(found[source], x)
                payload = x.numel() * x.element_size()
                expected_bytes += HEADER_BYTES + math.ceil(payload / 16) * 16
        assert num_bytes == expected_bytes


def test_exchange_of_nothing_needs_no_other_rank(pool_of: PoolOf) -> None:
    assert pool_of(1).run(exchange, [{}]) == [([{}], 0)]


@pytest.mark.parametrize(
    ("second", "shape", "words"),
    [
        (TAG._replace(layer=3), (4,), "layer 3"),
        (TAG._replace(step=2), (4,), "step 2"),
        (TAG._replace(kind=Kind.RING), (4,), "ring of step 1"),
        (TAG, (2, 2), "float32 [2, 2]"),
    ],
    ids=["layer", "step", "kind", "shape"],
)
def test_an_exchanged_message_that_was_not_waited_for_is_an_error_that_names_both(
    pool_of: PoolOf, second: Tag, shape: tuple[int, ...], words: str
) -> None:
    errors = pool_of(2).run(exchange_tagged, [TAG, second], [(4,), shape])
    for rank, error in enumerate(errors):
        waited, found, received = error.partition("and received")
        assert found, error
        assert f"rank {rank} waited for" in waited
        assert words in (received if rank == 0 else waited)
        assert "upstream of step 1, layer 0" in (waited if rank == 0 else received)
        assert "float32 [4]" in (waited if rank == 0 else received)
        assert f"rank {1 - rank}" in received
        assert "\n" not in error


def test_ranks_in_step_see_no_error(pool_of: PoolOf) -> None:
    tags = [TAG, TAG._replace(layer=1), TAG._replace(step=2)]
    assert pool_of(2).run(gather_layers, [tags, tags]) == ["no error"] * 2
