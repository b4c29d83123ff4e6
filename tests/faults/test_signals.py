"""Signals to the command line: what runs ends in order, and nothing stays behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from faults.leftovers import Leftovers, left_since

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]
START_S = 120
"""On a busy machine three interpreters take their time to import torch."""
ASK = [
    *(sys.executable, "-m", "apb.run", "+model=tiny", "device=cpu", "world_size=2"),
    *("prompt.context_len=900", "decode.max_tokens=8", "decode.ignore_eos=true", "drafter=none"),
]
SLOW_TOKENS = "rank=0,stage=decode,kind=slow,seconds={}"


@contextmanager
def answering(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str, seconds: float
) -> Iterator[subprocess.Popen[str]]:
    """The command while it decodes, each token taking that long."""
    monkeypatch.setenv("APB_FAULTS", SLOW_TOKENS.format(seconds))
    process = subprocess.Popen(
        [*ASK, *overrides], cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    watchdog = threading.Timer(START_S, process.kill)
    watchdog.start()
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "APB_FAULTS: slow" in line:
                break
        assert process.poll() is None, f"the command was not answering within {START_S} s"
        yield process
    finally:
        process.kill()
        process.communicate()
        watchdog.cancel()
        watchdog.join()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, text = process.communicate()
    return process.returncode, text


def test_ctrl_c_once_ends_the_command_and_its_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: Leftovers
) -> None:
    with answering(tmp_path, monkeypatch, seconds=1.0) as process:
        process.send_signal(signal.SIGINT)
        code, text = ended(process)
    assert code == 130
    assert "Traceback" not in text
    assert left_since(before) == []


def test_sigterm_lets_a_short_request_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: Leftovers
) -> None:
    with answering(tmp_path, monkeypatch, "output=result.json", seconds=0.3) as process:
        process.send_signal(signal.SIGTERM)
        code, text = ended(process)
    assert code == 0, text
    assert "SIGTERM: the running request has 20 s to finish" in text
    assert (tmp_path / "result.json").exists()
    assert left_since(before) == []


def test_sigterm_ends_a_long_request_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: Leftovers
) -> None:
    with answering(tmp_path, monkeypatch, "supervision.drain_s=1", seconds=20) as process:
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code, text = ended(process)
    assert code == 143
    assert "apb: ended by SIGTERM before there was an answer" in text
    assert time.monotonic() - begin < 10
    assert left_since(before) == []


def test_a_killed_command_takes_even_stopped_ranks_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: Leftovers
) -> None:
    with answering(tmp_path, monkeypatch, seconds=20) as process:
        ranks = psutil.Process(process.pid).children()
        assert len(ranks) == 2
        ranks[1].suspend()
        process.kill()
        _, alive = psutil.wait_procs(ranks, timeout=5)
    assert alive == []
    assert left_since(before) == []
