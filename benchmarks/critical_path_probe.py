"""Where the time of a prefill goes on one rank, seen from around its attention method."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from apb.attention.base import AttentionBackend, AttentionPartial, LayerInputs, Segment
from apb.balance import causal_pairs
from apb.comm import Communicator, Pending, Tag
from apb.cost import ModelShape, Rates, Workload
from apb.methods.base import Attend, AttentionMethod, PrefillContext
from apb.methods.plan import PlanRequest, PrefillPlan

T = TypeVar("T")


class Phase(Enum):
    """What a rank does in a layer, in this order.

    `linear`: all that is not attention, such as linear maps, norms and RoPE. `select`: what comes
    before attention: caching, scoring, gathering, packing (`ulysses`: trading rows for heads).
    `local`: attention to the rank's own keys. `unpack`: what lies between attentions and behind
    them: waiting, unpacking (`ulysses`: trading heads for rows). `upstream`: attention to keys that
    came from other ranks, and merging.
    """

    linear = "linear"
    select = "select"
    local = "local"
    unpack = "unpack"
    upstream = "upstream"


class Clock:
    """Points in time of a device's work, taken without waiting for it and read when it is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []

    def tick(self) -> int:
        """Take the time; returns its index among those that `read` returns."""
        if self._device.type != "cuda":
            self._times.append(time.perf_counter())
            return len(self._times) - 1
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)
        return len(self._events) - 1

    def read(self) -> list[float]:
        """All times in seconds, from an arbitrary zero; waits for the device."""
        if self._device.type != "cuda":
            return self._times
        torch.cuda.synchronize(self._device)
        return [self._events[0].elapsed_time(event) / 1000 for event in self._events]


class Mark(NamedTuple):
    """A phase begins."""

    tick: int
    phase: Phase


class Exchange(NamedTuple):
    """Messages that travelled at once."""

    started: int
    """Tick."""
    waited: int
    """Tick."""
    sent_bytes: int
    received_bytes: int


class Transfer(NamedTuple):
    """Seconds that a rank's messages take, and how many of them it has nothing else to do."""

    seconds: float
    exposed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One prefill on one rank. Its end is the last tick; every layer begins with `select`."""

    times: Sequence[float]
    marks: Sequence[Mark]
    exchanges: Sequence[Exchange]
    rows: int = 0
    """That ran through the last layer."""
    head_pairs: int = 0
    """Query-key pairs that all layers attended to, counted for every query head."""

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def phases_s(self, *, num_layers: int) -> dict[Phase, float]:
        """Seconds per phase of a model with so many layers.

        What the recorded model lacks is added at the mean of its layers, each from the beginning of
        its attention to that of the next one's. What happens once, such as embedding, counts once.
        """
        layers = self._layers
        seconds = self._between(0, len(self.marks))
        missing = num_layers - self.num_layers
        if missing:
            assert self.num_layers > 1, "a layer's time takes two layers"
            whole = self._between(layers[0], layers[-1])
            for phase in Phase:
                seconds[phase] += missing * whole[phase] / (self.num_layers - 1)
        return seconds

    def transfer(self, rates: Rates, *, num_layers: int) -> Transfer:
        """What all exchanges take on a link that carries both directions at once.

        An exchange is hidden by what the rank does between starting it and waiting for it.
        """
        seconds = exposed_s = 0.0
        for exchange in self.exchanges:
            busier = max(exchange.sent_bytes, exchange.received_bytes)
            needed_s = busier / rates.link_bytes + rates.latency_s
            seconds += needed_s
            exposed_s += max(0.0, needed_s - self._seconds(exchange.started, exchange.waited))
        scale = num_layers / max(1, self.num_layers)
        return Transfer(seconds * scale, exposed_s * scale)

    @property
    def _layers(self) -> list[int]:
        return [index for index, mark in enumerate(self.marks) if mark.phase is Phase.select]

    def _between(self, start: int, stop: int) -> dict[Phase, float]:
        """Seconds per phase from one mark to another."""
        seconds = dict.fromkeys(Phase, 0.0)
        ticks = [*(mark.tick for mark in self.marks), len(self.times) - 1]
        for index in range(start, stop):
            seconds[self.marks[index].phase] += self._seconds(ticks[index], ticks[index + 1])
        return seconds

    def _seconds(self, begin: int, end: int) -> float:
        return self.times[end] - self.times[begin]


@dataclass(slots=True)
class Probe:
    """Takes the times of one prefill."""

    clock: Clock
    marks: list[Mark] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    rows: int = 0
    head_pairs: int = 0

    def enter(self, phase: Phase) -> None:
        self.marks.append(Mark(self.clock.tick(), phase))

    def finish(self) -> Recording:
        self.clock.tick()
        return Recording(
            times=self.clock.read(),
            marks=self.marks,
            exchanges=self.exchanges,
            rows=self.rows,
            head_pairs=self.head_pairs,
        )


class ProbedMethod(AttentionMethod):
    """A method that runs as ever, under a probe."""

    def __init__(self, method: AttentionMethod, probe: Probe) -> None:
        self._method, self._probe = method, probe

    def plan(self, request: PlanRequest) -> PrefillPlan:
        return self._method.plan(request)

    def workload(self, plan: PrefillPlan, shape: ModelShape, rank: int) -> Workload:
        return self._method.workload(plan, shape, rank)

    def begin(self, context: PrefillContext) -> Attend:
        probed = replace(
            context,
            backend=_ProbedBackend(context.backend, self._probe),
            comm=_ProbedCommunicator(context.comm, self._probe),
        )
        attend = self._method.begin(probed)

        def timed(layer: LayerInputs) -> Tensor:
            self._probe.enter(Phase.select)
            self._probe.rows = layer.q_HTD.shape[1]
            out_THD = attend(layer)
            self._probe.enter(Phase.linear)
            return out_THD

        return timed


class _ProbedBackend(AttentionBackend):
    def __init__(self, backend: AttentionBackend, probe: Probe) -> None:
        self._backend, self._probe = backend, probe

    def attend(
        self,
        q_HTD: Tensor,
        segments: Sequence[Segment],
        *,
        scale: float,
        carry: AttentionPartial | None = None,
    ) -> AttentionPartial:
        self._probe.enter(Phase.local if carry is None else Phase.upstream)
        self._probe.head_pairs += q_HTD.shape[0] * sum(map(_pairs, segments))
        partial = self._backend.attend(q_HTD, segments, scale=scale, carry=carry)
        self._probe.enter(Phase.unpack)
        return partial

    def attend_segment(
        self, q_HTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, *, causal: bool, scale: float
    ) -> AttentionPartial:
        return self._backend.attend_segment(q_HTD, k_KSD, v_KSD, causal=causal, scale=scale)

    def merge(self, packed_RTHE: Tensor) -> AttentionPartial:
        return self._backend.merge(packed_RTHE)

    def select_topk(
        self,
        scores_KS: Tensor,
        k_KSD: Tensor,
        v_KSD: Tensor,
        out_P2KD: Tensor,
        *,
        pool: int,
        excluded: int,
    ) -> Tensor:
        return self._backend.select_topk(
            scores_KS, k_KSD, v_KSD, out_P2KD, pool=pool, excluded=excluded
        )


def _pairs(segment: Segment) -> int:
    rows = segment.stop - segment.start
    return causal_pairs(rows) if segment.causal else rows * segment.k_KSD.shape[1]


class _ProbedCommunicator(Communicator):
    """Hands everything on to another communicator and notes what travels when."""

    def __init__(self, comm: Communicator, probe: Probe) -> None:
        Communicator.__init__(self, comm.rank, comm.world_size, comm.device)
        self._comm, self._probe = comm, probe

    def all_gather(self, x: Tensor, tag: Tag) -> Pending[Tensor]:
        return self._noted(self._comm.all_gather(x, tag), [x])

    def broadcast(self, x: Tensor, tag: Tag, *, src: int) -> Pending[Tensor]:
        return self._noted(self._comm.broadcast(x, tag, src=src), [x] * (src == self.rank))

    def exchange(
        self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], tag: Tag
    ) -> Pending[dict[int, Tensor]]:
        return self._noted(self._comm.exchange(outgoing, incoming, tag), [*outgoing.values()])

    def _noted(self, pending: Pending[T], sent: Sequence[Tensor]) -> Pending[T]:
        clock, started = self._probe.clock, self._probe.clock.tick()
        sent_bytes = sum(x.numel() * x.element_size() for x in sent)

        def finish() -> T:
            waited, before = clock.tick(), self._comm.bytes_received
            result = pending.wait()
            received_bytes = self._comm.bytes_received - before
            if sent_bytes or received_bytes:
                self._probe.exchanges.append(Exchange(started, waited, sent_bytes, received_bytes))
            return result

        return Pending(finish)
