"""What a rank says about its progress: a few integers in memory that others can read at any time.

The rank's main thread only writes them, so that a rank which is wedged in a collective, stopped or
swapped out is as readable as a busy one. What tells is whether the number of marks grows.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

_FIELDS = 8
SLOT_BYTES = 8 * _FIELDS


class Stage(IntEnum):
    """What a rank is busy with."""

    START = 0
    IDLE = 1
    LOAD = 2
    PREFILL = 3
    DECODE = 4
    LEFT = 5


class Beat(NamedTuple):
    """A rank's progress at one moment."""

    marks: int = 0
    """Grows with every sign of progress."""
    pid: int = 0
    request: int = 0
    """Requests taken so far."""
    stage: Stage = Stage.START
    step: int = 0
    """Of a message waited for: its forward pass."""
    layer: int = 0
    """The layer, or while decoding the token, that is under way."""
    waiting: bool = False
    """In a collective: for others, unless they all are."""
    expected_ms: int = 0
    """What a layer or a token is predicted to take; 0 where nobody knows."""

    @classmethod
    def read(cls, slot: Sequence[int]) -> Beat:
        marks, pid, request, stage, step, layer, waiting, expected_ms = slot
        stage = Stage(stage)
        return cls(marks, pid, request, stage, step, layer, bool(waiting), expected_ms)

    @property
    def place(self) -> str:
        """Where the rank is, in words."""
        name = self.stage.name.lower()
        if self.waiting and self.stage is Stage.START:
            return "start, meeting the others"
        if self.waiting:
            return f"{name}, exchange of layer {self.layer}"
        if self.stage is Stage.PREFILL:
            return f"{name}, layer {self.layer}"
        return f"{name}, token {self.layer}" if self.stage is Stage.DECODE else name


def private_slot() -> memoryview:
    """A slot that only this process sees."""
    return memoryview(bytearray(SLOT_BYTES)).cast("q")


class Pulse:
    """A rank's own side of its slot."""

    def __init__(
        self,
        slot: memoryview | None = None,
        *,
        on_mark: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """`on_mark` is told stage, layer or token, and request whenever one begins."""
        self._slot = private_slot() if slot is None else slot
        self._on_mark = on_mark
        self._layer = 0
        self._slot[1] = os.getpid()

    @property
    def beat(self) -> Beat:
        return Beat.read(self._slot)

    def take_request(self) -> None:
        self._slot[2] += 1

    def enter(self, stage: Stage, *, expected_s: float = 0.0) -> None:
        """A stage begins, at its first layer or token."""
        slot = self._slot
        slot[3], slot[6], slot[7] = stage, 0, int(1000 * expected_s)
        self.reach(0)

    def reach(self, layer: int) -> None:
        """A layer or token is under way, and those before it are done."""
        slot = self._slot
        self._layer = slot[5] = layer
        slot[0] += 1
        if self._on_mark is not None:
            self._on_mark(Stage(slot[3]).name.lower(), layer, slot[2])

    def wait(self, step: int, layer: int) -> None:
        """This rank waits for others until `go_on`.

        A control message has the step 0: where the rank is then says more than the message does.
        """
        slot = self._slot
        if self._on_mark is not None and step and slot[3] == Stage.PREFILL:
            self._on_mark("exchange", layer, slot[2])
        if step:
            slot[4], slot[5] = step, layer
        slot[6] = 1
        slot[0] += 1

    def go_on(self) -> None:
        slot = self._slot
        slot[5], slot[6] = self._layer, 0
        slot[0] += 1


class Board:
    """The slots of a gang on one machine, in a file that its processes map."""

    def __init__(self, path: Path, world_size: int, *, create: bool = False) -> None:
        if create:
            path.write_bytes(bytes(SLOT_BYTES * world_size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), SLOT_BYTES * world_size)
        self._slots = memoryview(self._map).cast("q")
        self._world_size = world_size

    def slot(self, rank: int) -> memoryview:
        return self._slots[rank * _FIELDS : (rank + 1) * _FIELDS]

    def close(self) -> None:
        """Give the file back; no slot may be in use."""
        self._slots.release()
        self._map.close()

    def read(self) -> list[Beat]:
        """Every rank's progress, in rank order."""
        return [Beat.read(self.slot(rank).tolist()) for rank in range(self._world_size)]
