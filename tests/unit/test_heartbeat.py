"""Progress as others read it: places in words, counts that move, one board for processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from apb.heartbeat import Beat, Board, Pulse, Stage

BUSY = """
import sys
from pathlib import Path
from apb.heartbeat import Board, Pulse, Stage

pulse = Pulse(Board(Path(sys.argv[1]), 3).slot(1))
pulse.take_request()
pulse.enter(Stage.PREFILL, expected_s=0.25)
pulse.reach(7)
"""


def test_another_process_reads_what_a_rank_has_written(tmp_path: Path) -> None:
    board = Board(tmp_path / "board", 3, create=True)
    assert board.read() == [Beat()] * 3
    subprocess.run([sys.executable, "-c", BUSY, str(tmp_path / "board")], check=True)
    first, busy, last = board.read()
    assert first == last == Beat()
    assert busy.pid > 0
    assert busy._replace(pid=0) == Beat(
        marks=2, request=1, stage=Stage.PREFILL, layer=7, expected_ms=250
    )


def test_every_mark_moves_the_count_and_the_place_is_in_words() -> None:
    pulse, places = Pulse(), list[str]()
    marks: list[Callable[[], None]] = [
        lambda: pulse.enter(Stage.START),
        lambda: pulse.wait(0, 0),
        lambda: pulse.enter(Stage.LOAD),
        lambda: pulse.enter(Stage.PREFILL),
        lambda: pulse.reach(3),
        lambda: pulse.wait(1, 2),
        lambda: pulse.go_on(),
        lambda: pulse.enter(Stage.DECODE),
        lambda: pulse.reach(1),
        lambda: pulse.enter(Stage.IDLE),
    ]
    for count, mark in enumerate(marks, start=1):
        mark()
        assert pulse.beat.marks == count
        places.append(pulse.beat.place)
    assert places == [
        *("start", "start, meeting the others", "load"),
        *("prefill, layer 0", "prefill, layer 3", "prefill, exchange of layer 2"),
        *("prefill, layer 3", "decode, token 0", "decode, token 1", "idle"),
    ]


def test_marks_are_told_with_stage_layer_and_request() -> None:
    told: list[tuple[str, int, int]] = []
    pulse = Pulse(on_mark=lambda stage, layer, request: told.append((stage, layer, request)))
    pulse.take_request()
    pulse.enter(Stage.PREFILL)
    pulse.wait(1, 0)
    pulse.go_on()
    pulse.wait(0, 0)  # an agreement between passes is no exchange
    pulse.go_on()
    pulse.reach(1)
    pulse.enter(Stage.DECODE)
    pulse.wait(2, 0)  # nor is a message of a decoding step
    assert told == [("prefill", 0, 1), ("exchange", 0, 1), ("prefill", 1, 1), ("decode", 0, 1)]
