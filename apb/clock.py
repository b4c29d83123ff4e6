"""How far the clocks of other machines are from rank 0's, with a bound that holds.

In a gather no rank has everything before all ranks have begun. So a rank's time after it is later
than rank 0's time before it, and its time before it is earlier than rank 0's after it, whatever the
network does. That leaves an interval for the difference of the clocks as wide as the two stays in
the gather; a few gathers narrow it down.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from apb.comm import Communicator, Kind, Tag
from apb.methods.decode import OWNER

_ROUNDS = 8


class Reading(NamedTuple):
    """One rank's monotonic clock around a few gathers, in nanoseconds."""

    machine: str
    """Ranks with the same share a clock."""
    stays_ns: list[list[int]]
    """Before and after each gather; none where all ranks share a clock."""


class Offset(NamedTuple):
    """What a rank's clock shows beyond rank 0's at that moment, and the bound of its error."""

    at_ns: int
    """On the rank's clock."""
    offset_ns: int
    error_ns: int

    @classmethod
    def between(cls, theirs: Reading, owner: Reading) -> Offset:
        if theirs.machine == owner.machine:
            return cls(0, 0, 0)
        pairs = list(zip(theirs.stays_ns, owner.stays_ns, strict=True))
        low = max(before - owner_after for (before, _), (_, owner_after) in pairs)
        high = min(after - owner_before for (_, after), (owner_before, _) in pairs)
        # Clocks that are adjusted meanwhile can leave less than nothing between the two.
        return cls(theirs.stays_ns[-1][1], (low + high) // 2, abs(high - low + 1) // 2)


class Alignment(NamedTuple):
    """From a rank's clock to rank 0's, by offsets at the request's beginning and end."""

    first: Offset
    last: Offset

    @property
    def error_ns(self) -> int:
        return max(self.first.error_ns, self.last.error_ns)

    def owner_time(self, time_ns: int) -> int:
        """Between the two readings clocks are taken to drift evenly."""
        span_ns = self.last.at_ns - self.first.at_ns
        drift_ns = self.last.offset_ns - self.first.offset_ns
        since_ns = time_ns - self.first.at_ns
        return time_ns - self.first.offset_ns - (drift_ns * since_ns // span_ns if span_ns else 0)


def read_clocks(comm: Communicator) -> list[Reading]:
    """Every rank's reading, in rank order. On all ranks."""
    machines = comm.all_gather_json(machine(), Tag(0, 0, Kind.REPORT))
    stays_ns = []
    if len(set(machines)) > 1:
        value = torch.zeros(1, dtype=torch.int64, device=comm.device)
        for _ in range(_ROUNDS):
            before = time.perf_counter_ns()
            comm.all_gather(value, Tag(0, 0, Kind.REPORT)).wait().tolist()
            stays_ns.append([before, time.perf_counter_ns()])
        comm.verify()
    gathered = comm.all_gather_json(stays_ns, Tag(0, 0, Kind.REPORT))
    return [Reading(name, stays) for name, stays in zip(machines, gathered, strict=True)]


def machine() -> str:
    """What has this process's monotonic clock: a boot of a kernel, and there a time namespace."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        parts = [boot, os.readlink("/proc/self/ns/time")]
    return " ".join(parts)


def align(first: Sequence[Reading], last: Sequence[Reading]) -> list[Alignment]:
    """Every rank's clock with rank 0's."""
    return [
        Alignment(*(Offset.between(readings[rank], readings[OWNER]) for readings in (first, last)))
        for rank in range(len(first))
    ]
