"""Where the document's KV is while the answer is decoded."""

from __future__ import annotations

from enum import Enum

from apb.cost import CostModel
from apb.errors import InputError
from apb.layout import SequenceLayout
from apb.methods.decode import OWNER

_MEMORY_SHARE = 0.9
"""Of the free memory; the rest is for activations."""


class Placement(Enum):
    """`sharded`: the shards stay. `rank0`: they move to rank 0. `auto`: what decodes faster."""

    sharded = "sharded"
    rank0 = "rank0"
    auto = "auto"


def choose_placement(
    wanted: Placement,
    layout: SequenceLayout,
    costs: CostModel,
    *,
    room: int,
    free_bytes: int,
    weights_loaded: bool,
) -> Placement:
    """`sharded` or `rank0`; `auto` asks for memory first and then for the time of a step.

    Args:
        room: new tokens that rank 0 must be able to cache.
        free_bytes: memory that rank 0's device has left.
        weights_loaded: whether the weights are among what is used already.

    Raises:
        InputError: `rank0` is asked for and the document's KV does not fit there.
    """
    if wanted is Placement.sharded:
        return wanted
    if layout.tokens_on(OWNER) == layout.context_len:
        return Placement.rank0  # it is there already
    for_kv = int(free_bytes * _MEMORY_SHARE) - (0 if weights_loaded else costs.weight_bytes)
    needed = costs.kv_bytes(layout.context_len + room)
    if needed > for_kv:
        if wanted is Placement.auto:
            return Placement.sharded
        fitting = max(0, for_kv // costs.kv_bytes(1) - room)
        raise InputError(
            f"decode.placement=rank0 needs {needed / 2**30:.1f} GiB for the KV of "
            f"{layout.context_len} tokens and rank 0 has {max(0, for_kv) / 2**30:.1f} GiB, enough "
            f"for {fitting}: set decode.placement=sharded"
        )
    if wanted is Placement.rank0:
        return wanted
    shard = max(map(layout.tokens_on, range(layout.world_size)))
    sharded_s = costs.step_s(shard, world_size=layout.world_size)
    gathered_s = costs.step_s(layout.context_len, world_size=1)
    return Placement.rank0 if gathered_s <= sharded_s else Placement.sharded
