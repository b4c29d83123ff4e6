"""Guarantees of the replayed ranks behind `benchmarks.critical_path`."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from apb.comm import HEADER_BYTES, Kind, Tag
from apb.cost import NOMINAL_CPU
from benchmarks.critical_path_check import GATE_SCENE
from benchmarks.critical_path_probe import Exchange, Mark, Phase, Recording
from benchmarks.critical_path_replay import Messages, ReplayCommunicator, draw_messages
from benchmarks.critical_path_runs import Bench, Case
from benchmarks.critical_path_variants import VARIANTS

CONTEXT = 1200
CPU = torch.device("cpu")
TAG = Tag(1, 0, Kind.UPSTREAM)


@cache
def bench(*overrides: str) -> Bench:
    return Bench(replace(GATE_SCENE, overrides=overrides))


def case(name: str, *overrides: str) -> Case:
    return bench(*overrides).case(VARIANTS[name], CONTEXT)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_replayed_rank_does_what_the_plan_says(name: str) -> None:
    planned = case(name)
    for rank in range(GATE_SCENE.ranks):
        work = planned.method.workload(planned.plan, GATE_SCENE.shape, rank)
        done = bench().replay(planned, rank, repeat=0).work
        assert (done.rows, done.head_pairs) == (work.rows, work.head_pairs)
        headers = done.received_bytes - work.received * torch.float32.itemsize
        assert headers % HEADER_BYTES == 0
        assert work.messages <= headers // HEADER_BYTES < GATE_SCENE.ranks * max(1, work.messages)


def received_bytes(*overrides: str) -> int:
    return bench(*overrides).replay(case("apb", *overrides), 2, repeat=0).work.received_bytes


def test_question_and_encoded_messages_are_replayed() -> None:
    shape, question_len = GATE_SCENE.shape, GATE_SCENE.question_len
    vectors = shape.num_heads * question_len * shape.head_dim * torch.float32.itemsize
    asked = received_bytes("method/compressor=query")
    assert asked == received_bytes() + HEADER_BYTES + vectors
    assert 0 < received_bytes("method.wire=int8") < received_bytes() / 2


def test_made_up_messages_have_the_shape_asked_for_and_are_finite() -> None:
    comm = ReplayCommunicator(1, 3, CPU)
    like = torch.empty((5, 7), dtype=torch.bfloat16, device="meta")
    asked = {0: like, 2: like}
    received = comm.exchange({0: torch.ones(3)}, asked, TAG).wait()
    assert all(x.shape == (5, 7) and x.dtype is torch.bfloat16 for x in received.values())
    assert all(bool(x.isfinite().all()) and bool(x.any()) for x in received.values())
    assert not received[0].equal(received[2])
    assert comm.exchange({}, asked, TAG).wait()[0].equal(received[0])
    assert comm.bytes_received == 4 * (HEADER_BYTES + 80)


@pytest.mark.parametrize("name", ["apb", "ulysses", "ring"])
def test_nothing_is_drawn_while_a_rank_runs(name: str) -> None:
    own, drawn = Bench(GATE_SCENE), Messages()
    planned = own.case(VARIANTS[name], CONTEXT)
    comm = ReplayCommunicator(2, GATE_SCENE.ranks, CPU, drawn)
    draw_messages(comm, planned.method, planned.plan, GATE_SCENE.shape, torch.float32)
    own.replay(planned, 2, repeat=0)
    assert drawn.keys() == own.messages.keys() != set()


def test_made_up_collectives_keep_what_is_this_rank_s() -> None:
    comm, x = ReplayCommunicator(1, 3, CPU), torch.arange(4.0)
    assert comm.all_gather(x, TAG).wait().shape == (3, 4)
    assert comm.all_gather(x, TAG).wait()[1].equal(x)
    assert comm.broadcast(x, TAG, src=1).wait().equal(x)
    assert not comm.broadcast(x, TAG, src=0).wait().equal(x)


def recording(*, waited: int = 3) -> Recording:
    """Two layers: 1 s once, then per layer 2 s before attention, 3 s of it and 4 s linear."""
    phases = [Phase.linear, *[Phase.select, Phase.local, Phase.linear] * 2]
    marks = [Mark(tick, phase) for tick, phase in enumerate(phases)]
    exchange = Exchange(started=2, waited=waited, sent_bytes=100, received_bytes=300)
    return Recording(times=[0, 1, 3, 6, 10, 12, 15, 20], marks=marks, exchanges=[exchange])


def test_missing_layers_are_added_and_what_happens_once_is_not() -> None:
    once, per_layer, last = 1.0, 4.0, 5.0
    assert recording().phases_s(num_layers=2)[Phase.linear] == once + per_layer + last
    seconds = recording().phases_s(num_layers=12)
    assert seconds[Phase.linear] == once + 11 * per_layer + last
    assert (seconds[Phase.select], seconds[Phase.local]) == (12 * 2.0, 12 * 3.0)
    assert (seconds[Phase.unpack], seconds[Phase.upstream]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("link_bytes", "latency_s", "waited", "expected"),
    [
        (100.0, 0.0, 3, (3.0, 0.0)),  # 300 bytes in the 3 s of local attention
        (100.0, 0.5, 3, (3.5, 0.5)),
        (100.0, 0.5, 2, (3.5, 3.5)),  # waited for at once
        (50.0, 0.0, 3, (6.0, 3.0)),
    ],
)
def test_transfer_is_exposed_as_far_as_nothing_hides_it(
    link_bytes: float, latency_s: float, waited: int, expected: tuple[float, float]
) -> None:
    rates = replace(NOMINAL_CPU, link_bytes=link_bytes, latency_s=latency_s)
    assert recording(waited=waited).transfer(rates, num_layers=2) == expected
    assert recording(waited=waited).transfer(rates, num_layers=20) == tuple(
        10 * seconds for seconds in expected
    )


def test_exchange_without_overlap_is_exposed() -> None:
    slow = replace(GATE_SCENE, rates=replace(NOMINAL_CPU, latency_s=100.0))
    for overlap in ("true", "false"):
        own = Bench(replace(slow, overrides=(f"method.overlap={overlap}",)))
        run = own.replay(own.case(VARIANTS["apb-even"], CONTEXT), 2, repeat=0)
        assert run.transfer_s == pytest.approx(200.0, rel=0.01)
        hidden_s = run.transfer_s - run.exposed_s
        assert (hidden_s > run.phases_s["local"] / 2) is (overlap == "true")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("full", [0]), ("ulysses", [2]), ("ring", [0, 2]), ("star", [0, 1, 2])],
)
def test_ranks_worth_running_have_work_and_one_stands_for_all_that_are_alike(
    name: str, expected: list[int]
) -> None:
    assert case(name).ranks_worth_running() == expected
