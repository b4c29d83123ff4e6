"""Guarantees of a shard: it hands out what was written, and a pass counts only once committed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apb.cache import CacheShape, KVCacheShard

SHAPE = CacheShape(num_layers=3, num_kv_heads=2, head_dim=4, dtype=torch.float32)
CAPACITY = 24


def make_shard(shape: CacheShape = SHAPE) -> KVCacheShard:
    return KVCacheShard(shape, capacity=CAPACITY, device=torch.device("cpu"))


def rows(num_rows: int, *, seed: int) -> Tensor:
    """One pass's KV for every layer: ``[L, 2, K, T, D]``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (SHAPE.num_layers, 2, SHAPE.num_kv_heads, num_rows, SHAPE.head_dim)
    return torch.randn(shape, generator=generator)


def write(shard: KVCacheShard, kv_L2KTD: Tensor) -> None:
    for layer_idx, (k_KTD, v_KTD) in enumerate(kv_L2KTD):
        shard.write(layer_idx, k_KTD, v_KTD)


def assert_holds(shard: KVCacheShard, passes: Sequence[Tensor], positions: Sequence[int]) -> None:
    expected = torch.cat([rows(0, seed=0), *passes], dim=3)
    assert len(shard) == expected.shape[3]
    assert shard.positions_S.tolist() == list(positions)
    for layer_idx in range(SHAPE.num_layers):
        assert torch.equal(torch.stack(shard.view(layer_idx)), expected[layer_idx])


@given(lengths=st.lists(st.integers(0, 6), max_size=4), start=st.integers(0, 1000))
def test_committed_passes_come_back_in_order(lengths: list[int], start: int) -> None:
    shard = make_shard()
    passes = [rows(length, seed=i) for i, length in enumerate(lengths)]
    positions: list[int] = []
    for kv_L2KTD in passes:
        # Positions need not be neighbours: a rank may own blocks that are not.
        new = [start + 7 * (len(positions) + i) for i in range(kv_L2KTD.shape[3])]
        write(shard, kv_L2KTD)
        shard.commit(torch.tensor(new, dtype=torch.int64))
        positions += new
    assert_holds(shard, passes, positions)


def test_written_rows_are_pending_until_committed() -> None:
    shard = make_shard()
    first, second = rows(5, seed=1), rows(3, seed=2)
    write(shard, first)
    shard.commit(torch.arange(5))
    write(shard, second)
    assert_holds(shard, [first], range(5))
    both = torch.cat([first, second], dim=3)
    for layer_idx in range(SHAPE.num_layers):
        assert torch.equal(torch.stack(shard.view(layer_idx, pending=3)), both[layer_idx])


def test_a_pass_that_fails_half_way_leaves_the_shard_as_it_was() -> None:
    shard = make_shard()
    first, again = rows(5, seed=1), rows(4, seed=3)
    write(shard, first)
    shard.commit(torch.arange(5))
    shard.write(0, *rows(7, seed=2)[0])  # and no other layer, and no commit
    assert_holds(shard, [first], range(5))
    write(shard, again)
    shard.commit(torch.arange(5, 9))
    assert_holds(shard, [first, again], range(9))


@pytest.mark.parametrize("length", [0, 1, 5, 8])
def test_truncated_shard_holds_its_first_tokens_and_takes_more(length: int) -> None:
    shard = make_shard()
    kv_L2KTD, more = rows(8, seed=1), rows(2, seed=2)
    write(shard, kv_L2KTD)
    shard.commit(torch.arange(8))
    shard.truncate(length)
    kept = kv_L2KTD[:, :, :, :length]
    assert_holds(shard, [kept], range(length))
    write(shard, more)
    shard.commit(torch.tensor([90, 91]))
    assert_holds(shard, [kept, more], [*range(length), 90, 91])


def test_views_are_of_the_shard_and_no_copies() -> None:
    shard = make_shard()
    write(shard, rows(3, seed=1))
    keys, _ = shard.view(1, pending=3)
    k_KTD = torch.ones(SHAPE.num_kv_heads, 3, SHAPE.head_dim)
    shard.write(1, k_KTD, k_KTD)
    assert torch.equal(keys, k_KTD)


def test_limits_are_kept() -> None:
    shard = make_shard()
    with pytest.raises(AssertionError, match="cache of 24 tokens cannot hold 25"):
        write(shard, rows(CAPACITY + 1, seed=1))
    write(shard, rows(CAPACITY, seed=1))
    shard.commit(torch.arange(CAPACITY))
    with pytest.raises(AssertionError, match="cannot hold"):
        shard.write(0, *rows(1, seed=1)[0])
    for length in (-1, CAPACITY + 1):
        with pytest.raises(AssertionError):
            shard.truncate(length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_per_token_are_what_the_buffer_takes(dtype: torch.dtype) -> None:
    shape = SHAPE._replace(dtype=dtype)
    shard = make_shard(shape)
    held = sum(x.untyped_storage().nbytes() for x in (shard.view(0)[0],))
    assert shape.bytes_per_token() * CAPACITY == held


@given(kept=st.sets(st.integers(0, 6)))
def test_of_a_pass_only_the_kept_rows_stay(kept: set[int]) -> None:
    """As of a tree, of which one path is committed."""
    shard, first, tree, last = make_shard(), rows(3, seed=1), rows(7, seed=2), rows(2, seed=3)
    write(shard, first)
    shard.commit(torch.arange(3))
    write(shard, tree)
    path = sorted(kept)
    shard.keep(path, torch.arange(3, 3 + len(path)))
    assert_holds(shard, [first, tree[:, :, :, path]], range(3 + len(path)))
    write(shard, last)
    shard.commit(torch.arange(50, 52))
    assert_holds(shard, [first, tree[:, :, :, path], last], [*range(3 + len(path)), 50, 51])
