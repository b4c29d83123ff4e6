"""Ranks that watch each other: one of them tells the cause, whoever else has found it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from torch._C._distributed_c10d import HashStore

from apb.errors import RankFailure
from apb.heartbeat import Pulse, Stage, private_slot
from apb.launchers import watch as watching
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


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("is_here", [True, False])
def test_only_processes_of_this_machine_are_looked_for_and_killed(
    is_here: bool, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines may share a host name: cloned ones, or containers that are told theirs."""
    store, config = HashStore(), SupervisionConfig()
    here = watching.process_space()
    monkeypatch.setattr(watching, "_UNWIND_S", 0)
    monkeypatch.setattr("os._exit", lambda _: None)
    slot = private_slot()
    ours, theirs = Pulse(), Pulse(slot)
    slot[1] = process.pid
    for pulse in (ours, theirs):
        pulse.enter(Stage.PREFILL)
    watch = StoreWatch(store, ours, rank=0, world_size=2, config=config)
    monkeypatch.setattr(watching, "process_space", lambda: here if is_here else "elsewhere")
    other = StoreWatch(store, theirs, rank=1, world_size=2, config=config)
    for it in (other, watch):
        it._stopping.set()
        it._thread.join()
    assert watch._judge() is None
    watch._obey(RankFailure(1, watch._host, "prefill, layer 1", "made no progress"))
    if not is_here:
        assert process.poll() is None
        process.kill()
    assert process.wait(5) == -signal.SIGKILL
    failure = watch._judge()
    assert (failure is not None and failure.reason == "ended without a word") == is_here
