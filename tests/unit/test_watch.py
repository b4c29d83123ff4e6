"""Ranks that watch each other: one of them tells the cause, whoever else has found it."""

from __future__ import annotations

import pytest
from torch._C._distributed_c10d import HashStore

from apb.errors import RankFailure
from apb.heartbeat import Pulse
from apb.launchers.watch import StoreWatch
from apb.supervision import SupervisionConfig


@pytest.fixture
def watches() -> list[StoreWatch]:
    """Of three ranks; their threads have ended, so that nothing ends this process."""
    store, config = HashStore(), SupervisionConfig()
    watches = [
        StoreWatch(store, Pulse(), rank=rank, world_size=3, config=config) for rank in range(3)
    ]
    for watch in watches:
        watch.stop()
    return watches


@pytest.mark.parametrize("others", ["ended without a word", "failed: ValueError"])
def test_the_first_cause_is_printed_once_and_is_everyones(
    watches: list[StoreWatch], others: str, capfd: pytest.CaptureFixture[str]
) -> None:
    first = RankFailure(1, "here", "prefill, layer 1", "ended without a word")
    found = [
        watches[0]._agree(first),
        *(it._agree(first._replace(reason=others)) for it in watches),
    ]
    assert found == [first] * 4
    assert capfd.readouterr().err == f"apb: {first.sentence}\n"
