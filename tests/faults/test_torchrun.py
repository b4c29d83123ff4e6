"""Faults under torchrun, by the command line: named once, ended at once, restarted where asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from faults.leftovers import Leftovers, left_since
from faults.scenarios import NAMED_WITHIN_S, OVERRIDES, SCENARIOS, TORCHRUN, WORLD_SIZE, Scenario

pytestmark = pytest.mark.faults
ASK = [
    *("-m", "apb.run", "+model=tiny", "prompt=text", "decode.max_tokens=6"),
    *("decode.ignore_eos=true", "prompt.query=Who kept bees?", "output=result.json"),
    "prompt.document=" + "The mill stood by the river, and the miller kept bees. " * 20,
]
SILENCE_S = 5.0
SILENCE = [f"supervision.heartbeat_s={SILENCE_S}"]
ENDS_WITHIN_S = 10.0
"""After the failure was named: torchrun ends what is left, and Python takes its time."""


class Run(NamedTuple):
    """A run of torchrun that has ended, with the times at which lines came."""

    code: int
    ended_at: float
    lines: list[tuple[float, str]]

    def first(self, words: str) -> tuple[float, str]:
        """The first line with these words."""
        found = next((line for line in self.lines if words in line[1]), None)
        assert found is not None, "".join(text for _, text in self.lines)
        return found


def torchrun(folder: Path, faults: str, *, restarts: int = 0) -> Run:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={WORLD_SIZE}"]
    process = subprocess.Popen(
        [*command, f"--max-restarts={restarts}", *ASK, *OVERRIDES, *SILENCE],
        cwd=folder,
        env={**os.environ, "APB_FAULTS": faults, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(90, process.kill)
    watchdog.start()
    assert process.stderr is not None
    lines = [(time.monotonic(), line) for line in process.stderr]
    process.stderr.close()
    code = process.wait()
    watchdog.cancel()
    watchdog.join()
    return Run(code, time.monotonic(), lines)


def check(run: Run, scenario: Scenario) -> None:
    """The culprit is named, in time, once and before any victim."""
    happened_at, _ = run.first("APB_FAULTS: ")
    named_at, sentence = run.first("apb: ")
    # A stopped rank says no more what it does: that nothing is heard of it has a budget of its own.
    budget_s = SILENCE_S if scenario.kind == "stop" else scenario.budget_s
    assert named_at - happened_at < budget_s + NAMED_WITHIN_S
    assert sentence.startswith(f"apb: rank {scenario.rank} on ")
    # Of a rank that is gone only the last heartbeat is known, half a second old.
    gone = scenario.kind in ("kill", "exit0", "stop")
    assert ("(last heard of in " if gone else f"({scenario.place or scenario.stage}") in sentence
    words = {"kill": "ended without a word", "stop": "has not been heard of"}
    assert words.get(scenario.kind, scenario.words) in sentence
    assert len([text for _, text in run.lines if text.startswith("apb: ")]) == 1
    if scenario.kind == "hang":
        run.first(f"stack of rank {scenario.rank}")


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(it, id=it.name, marks=() if it.name == "kill-prefill" else pytest.mark.faults)
        for it in SCENARIOS
        if it.name in TORCHRUN
    ],
)
def test_a_fault_is_named_and_ends_the_run(
    scenario: Scenario, tmp_path: Path, before: Leftovers
) -> None:
    run = torchrun(tmp_path, scenario.text(request=1))
    check(run, scenario)
    assert run.code == 1
    assert run.ended_at - run.first("apb: ")[0] < ENDS_WITHIN_S
    assert not (tmp_path / "result.json").exists()
    assert left_since(before) == []


@pytest.mark.parametrize("name", ["kill-prefill", "hang-prefill"])
def test_torchrun_restarts_the_ranks_and_gets_the_answer(name: str, tmp_path: Path) -> None:
    assert torchrun(tmp_path, "").code == 0
    expected = json.loads((tmp_path / "result.json").read_text())["token_ids"]
    (tmp_path / "result.json").unlink()
    scenario = next(it for it in SCENARIOS if it.name == name)
    run = torchrun(tmp_path, scenario.text(request=1), restarts=1)
    check(run, scenario)
    assert run.code == 0
    assert json.loads((tmp_path / "result.json").read_text())["token_ids"] == expected
