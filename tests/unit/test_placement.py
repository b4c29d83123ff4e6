"""Guarantees of placement: KV moves to rank 0 where it fits and where that decodes faster."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apb.cost import NOMINAL_CPU, CostModel
from apb.errors import InputError
from apb.layout import SequenceLayout
from apb.methods.placement import Placement, choose_placement
from plans import SHAPE

CONTEXT_LEN, ROOM = 10_000, 50
COSTS = CostModel(shape=SHAPE, rates=NOMINAL_CPU, itemsize=4)
SLOW_NETWORK = replace(COSTS, rates=replace(NOMINAL_CPU, latency_s=1.0))
FAST_NETWORK = replace(COSTS, rates=replace(NOMINAL_CPU, latency_s=0.0))
SPREAD = SequenceLayout.even(CONTEXT_LEN, num_blocks=4, world_size=4)
PLENTY = 2**40
TOKEN_BYTES = COSTS.kv_bytes(1)


def choose(
    wanted: Placement,
    *,
    layout: SequenceLayout = SPREAD,
    costs: CostModel = SLOW_NETWORK,
    free_bytes: int = PLENTY,
    room: int = ROOM,
    weights_loaded: bool = True,
) -> Placement:
    return choose_placement(
        wanted,
        layout,
        costs,
        room=room,
        free_bytes=free_bytes,
        weights_loaded=weights_loaded,
    )


@pytest.mark.parametrize("costs", [SLOW_NETWORK, FAST_NETWORK], ids=["slow", "fast"])
def test_what_is_asked_for_is_done_where_it_fits(costs: CostModel) -> None:
    for wanted in (Placement.sharded, Placement.rank0):
        assert choose(wanted, costs=costs) is wanted
    assert choose(Placement.sharded, costs=costs, free_bytes=0) is Placement.sharded


def test_auto_decides_by_the_time_of_a_step() -> None:
    """Gathering spares the messages and costs reading the other shards."""
    assert choose(Placement.auto, costs=SLOW_NETWORK) is Placement.rank0
    assert choose(Placement.auto, costs=FAST_NETWORK) is Placement.sharded


@given(latency_s=st.floats(0, 1e-3), context_len=st.integers(4, 10**7))
def test_auto_never_takes_the_slower_step(latency_s: float, context_len: int) -> None:
    costs = replace(COSTS, rates=replace(NOMINAL_CPU, latency_s=latency_s))
    layout = SequenceLayout.even(context_len, num_blocks=4, world_size=4)
    sharded_s = costs.step_s(layout.tokens_on(3), world_size=4)
    gathered_s = costs.step_s(context_len, world_size=1)
    chosen = choose(Placement.auto, layout=layout, costs=costs)
    assert {Placement.sharded: sharded_s, Placement.rank0: gathered_s}[chosen] == min(
        sharded_s, gathered_s
    )


def test_auto_stays_sharded_where_memory_is_short() -> None:
    assert choose(Placement.auto, free_bytes=CONTEXT_LEN * TOKEN_BYTES) is Placement.sharded


@given(free_tokens=st.integers(0, 3 * CONTEXT_LEN), weights_loaded=st.booleans())
def test_a_refusal_names_what_would_fit_and_the_setting(
    free_tokens: int, weights_loaded: bool
) -> None:
    """The tokens that it offers fit, and one more does not."""
    free_bytes = free_tokens * TOKEN_BYTES

    def ask(context_len: int) -> None:
        layout = SequenceLayout.even(context_len, num_blocks=4, world_size=4)
        choose(Placement.rank0, layout=layout, free_bytes=free_bytes, weights_loaded=weights_loaded)

    try:
        ask(CONTEXT_LEN)
    except InputError as error:
        refusal = str(error)
    else:
        return
    assert refusal.startswith("decode.placement=rank0 needs ")
    assert f"KV of {CONTEXT_LEN} tokens" in refusal
    assert refusal.endswith(": set decode.placement=sharded")
    assert "\n" not in refusal
    fitting = int(refusal.partition(", enough for ")[2].partition(":")[0])
    if fitting >= 4:
        ask(fitting)
    with pytest.raises(InputError):
        ask(max(4, fitting + 1))


def test_weights_that_are_not_loaded_yet_take_their_part() -> None:
    needed = COSTS.kv_bytes(CONTEXT_LEN + ROOM)
    free_bytes = round(1.2 * needed)
    heavy = replace(SLOW_NETWORK, shape=SHAPE._replace(vocab_size=10**6))
    assert heavy.weight_bytes > needed
    for wanted in (Placement.rank0, Placement.auto):
        assert choose(wanted, costs=heavy, free_bytes=free_bytes) is Placement.rank0
    assert choose(Placement.auto, costs=heavy, free_bytes=free_bytes, weights_loaded=False) is (
        Placement.sharded
    )
    with pytest.raises(InputError, match=r"rank 0 has 0\.0 GiB, enough for 0:"):
        choose(Placement.rank0, costs=heavy, free_bytes=free_bytes, weights_loaded=False)


def test_room_for_the_answer_is_part_of_the_need() -> None:
    free_bytes = round(COSTS.kv_bytes(CONTEXT_LEN) / 0.89)
    assert choose(Placement.rank0, free_bytes=free_bytes, room=1) is Placement.rank0
    with pytest.raises(InputError):
        choose(Placement.rank0, free_bytes=free_bytes, room=CONTEXT_LEN)


@pytest.mark.parametrize("wanted", [Placement.rank0, Placement.auto])
@pytest.mark.parametrize("world_size", [1, 4])
def test_document_that_is_on_rank_0_already_needs_no_move(
    wanted: Placement, world_size: int
) -> None:
    """As after `full`: its memory is taken there whatever is asked for, and the others idle."""
    layout = SequenceLayout.even(CONTEXT_LEN, num_blocks=1, world_size=world_size)
    assert choose(wanted, layout=layout, costs=FAST_NETWORK, free_bytes=0) is Placement.rank0
