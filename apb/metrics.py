"""What a request cost on one rank: phase times and peak memory."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from apb.trace.recorder import OFF, Scope, Trace
from apb.trace.records import Phase


@dataclass(slots=True)
class Timeline:
    """Seconds spent per named phase since the request began."""

    device: torch.device
    started: float = field(default_factory=time.perf_counter)
    trace: Trace = OFF
    """Is told of the phases as well."""
    phases_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextlib.contextmanager
    def phase(self, phase: Phase) -> Iterator[Scope]:
        begin = self.elapsed_s()
        try:
            with self.trace.span(phase) as scope:
                yield scope
        finally:
            self.phases_s[phase] += self.elapsed_s() - begin

    def elapsed_s(self) -> float:
        """Seconds since the request began, once the device has finished what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.started


class PeakMemory:
    """Peak memory of this process between `reset` and `read`, in bytes.

    On CUDA that is what the allocator handed out. On the CPU it is the resident set, which counts
    the interpreter, the libraries and memory-mapped weights as well.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        # Linux forgets the high-water mark when 5 is written here; others keep the process's.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def usable_cores() -> int:
    """Cores that this process may run on: of a container or a job's share, not of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_per_rank(num_ranks: int) -> int:
    """A rank's share of those cores, where all of them are on this machine."""
    return max(1, usable_cores() // num_ranks)


def used_memory(device: torch.device) -> int:
    """Bytes that are in use now: of CUDA's allocator, or the resident set (0 where nobody says)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def free_memory(device: torch.device) -> int:
    """Bytes that the device has left: CUDA's own figure, or what the kernel says is available.

    What CUDA's allocator keeps of earlier requests counts as free, though to CUDA it is in use.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
