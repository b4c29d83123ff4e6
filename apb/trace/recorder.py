"""One rank's side of a trace: what it does and when, written down while a request runs.

Nothing here locks, communicates or waits for a device. Times are marks of a clock, which become
nanoseconds only in the end: on a GPU a mark is a CUDA event in the stream, so that phases have the
times at which the device worked on them, not those at which they were queued.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, Self

import torch

from apb.trace.records import Message, Phase, Sample, Span

MAX_RECORDS = 20_000
"""Of spans, and of messages. What comes later is left out, so that a trace stays readable."""
_SAMPLE_NS = 50_000_000
"""Memory is looked at no more often: asking the kernel takes a fifth of a millisecond."""


class Clock(Protocol):
    """Where marks come from."""

    def mark(self) -> Any:
        """Now."""

    def read(self, mark: Any) -> int:
        """A mark in nanoseconds of this machine's monotonic clock."""


class HostClock:
    """The monotonic clock itself, which on Linux all processes of a machine share."""

    def mark(self) -> int:
        return time.perf_counter_ns()

    def read(self, mark: int) -> int:
        return mark


class DeviceClock:
    """The current stream of a GPU, set by the host's clock while the device is idle."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)
        before = time.perf_counter_ns()
        self._origin = self.mark()
        self._origin.synchronize()
        self._origin_ns = (before + time.perf_counter_ns()) // 2

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self, mark: torch.cuda.Event) -> int:
        """The device has to have passed the mark."""
        since_ms: float = self._origin.elapsed_time(mark)
        return self._origin_ns + round(1e6 * since_ms)


def clock_of(device: torch.device) -> Clock:
    return DeviceClock(device) if device.type == "cuda" else HostClock()


class Scope(AbstractContextManager["Scope"]):
    """A phase under way. This one is of a trace that is off."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def tell(self, **detail: int) -> None:
        """Something about the phase."""


_NOTHING = Scope()


class Records(NamedTuple):
    """What one rank has recorded of a request."""

    begin_ns: int
    spans: list[Span]
    messages: list[Message]
    samples: list[Sample]


class Trace:
    """The trace that is off: it records nothing."""

    is_on = False

    def begin(self) -> None:
        """A request begins; what was recorded before is forgotten."""

    def mark(self) -> Any:
        """Now."""

    def span(self, phase: Phase, layer: int = -1) -> Scope:
        """A phase, for as long as the context lasts."""
        return _NOTHING

    def add(self, phase: Phase, layer: int, begin: Any, end: Any, **detail: int) -> None:
        """A phase that is over."""

    def waited(self, kind: str, step: int, layer: int, posted: Any, begin: Any) -> None:
        """This rank has a message that was posted then and waited for from then until now."""

    def received(self, nbytes: int, sources: Sequence[int]) -> None:
        """What the message just waited for has brought from other ranks."""

    def sample(self) -> None:
        """Look at memory and bytes, unless that was done just before."""

    def records(self) -> Records:
        """Everything since `begin`; on a GPU this waits for it."""
        return Records(0, [], [], [])


OFF = Trace()


class Recorder(Trace):
    """The trace that is on."""

    is_on = True

    def __init__(self, device: torch.device, gauges: Callable[[], tuple[int, int]]) -> None:
        """`gauges` tells the memory in use and the bytes received so far."""
        self._device, self._gauges = device, gauges
        self.begin()

    def begin(self) -> None:
        self._clock = clock_of(self._device)
        self._begin_ns = time.perf_counter_ns()
        self._spans: list[tuple[Phase, int, Any, Any, dict[str, int]]] = []
        self._messages: list[list[Any]] = []
        self._last: list[Any] = []
        self._samples: list[tuple[Any, int, int]] = []
        self._sampled_ns = 0

    def mark(self) -> Any:
        return self._clock.mark()

    def span(self, phase: Phase, layer: int = -1) -> Scope:
        return _Recorded(self, phase, layer)

    def add(self, phase: Phase, layer: int, begin: Any, end: Any, **detail: int) -> None:
        if len(self._spans) < MAX_RECORDS:
            self._spans.append((phase, layer, begin, end, detail))

    def waited(self, kind: str, step: int, layer: int, posted: Any, begin: Any) -> None:
        self._last = [kind, step, layer, posted, begin, self.mark(), 0, []]
        if len(self._messages) < MAX_RECORDS:
            self._messages.append(self._last)

    def received(self, nbytes: int, sources: Sequence[int]) -> None:
        self._last[-2] += nbytes
        self._last[-1] += sources

    def sample(self) -> None:
        now = time.perf_counter_ns()
        if now - self._sampled_ns > _SAMPLE_NS and len(self._samples) < MAX_RECORDS:
            self._sampled_ns = now
            self._samples.append((self.mark(), *self._gauges()))

    def records(self) -> Records:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        read = self._clock.read
        return Records(
            self._begin_ns,
            [
                Span(phase, layer, read(begin), read(end), detail)
                for phase, layer, begin, end, detail in self._spans
            ],
            [
                Message(kind, step, layer, read(posted), read(begin), read(end), *rest)
                for kind, step, layer, posted, begin, end, *rest in self._messages
            ],
            [Sample(read(at), *figures) for at, *figures in self._samples],
        )


class _Recorded(Scope):
    """A phase under way that will be recorded."""

    __slots__ = ("_begin", "_detail", "_layer", "_phase", "_trace")

    def __init__(self, trace: Recorder, phase: Phase, layer: int) -> None:
        self._trace, self._phase, self._layer = trace, phase, layer
        self._detail: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._begin = self._trace.mark()
        return self

    def __exit__(self, *_: object) -> None:
        end = self._trace.mark()
        self._trace.add(self._phase, self._layer, self._begin, end, **self._detail)

    def tell(self, **detail: int) -> None:
        self._detail.update(detail)
