"""Measuring one request on one rank and putting all ranks' figures together."""

from __future__ import annotations

import os
import platform
import re
import socket
import time
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from apb.clock import align, read_clocks
from apb.comm import Communicator, Kind, Tag
from apb.methods.placement import Placement
from apb.methods.plan import PrefillPlan
from apb.metrics import PeakMemory, Timeline, used_memory
from apb.output import LayerFinding, RankLayout, RequestMetrics
from apb.prompts.base import PromptTokens
from apb.speculate.speculator import SpeculationStats, Speculator
from apb.trace.recorder import OFF, Recorder, Trace
from apb.trace.records import AttendedLayer, RankTrace, RunTrace


def new_trace(comm: Communicator, *, enabled: bool) -> Trace:
    """What a rank's phases and messages are told to."""
    if not enabled:
        return OFF
    return Recorder(comm.device, lambda: (used_memory(comm.device), comm.bytes_received))


class RequestMeter:
    """Times, bytes and memory from its creation on."""

    def __init__(self, comm: Communicator, *, prepared_s: float, trace: Trace = OFF) -> None:
        """`prepared_s` seconds of the request have passed already; loading is not among them."""
        self._comm, self._trace = comm, trace
        self._clocks = read_clocks(comm) if trace.is_on else []
        self._memory = PeakMemory(comm.device)
        self._memory.reset()
        self._bytes_before = comm.bytes_received
        started = time.perf_counter() - prepared_s
        self.timeline = Timeline(comm.device, started=started, trace=trace)
        self.ttft_s = 0.0

    def first_token(self) -> None:
        self.ttft_s = self.ttft_s or self.timeline.elapsed_s()

    def local(self, speculator: Speculator | None) -> dict[str, float]:
        """This rank's figures, to be gathered; the owner's include those of its drafts."""
        phases_s = self.timeline.phases_s
        stats = SpeculationStats() if speculator is None else speculator.stats
        return {
            "prefill_s": phases_s["prefill"],
            "decode_s": phases_s["decode"],
            "ttft_s": self.ttft_s,
            "bytes": self._comm.bytes_received - self._bytes_before,
            "peak_memory": self._memory.read(),
            "acceptance_length": stats.acceptance_length,
            "tree_nodes": stats.nodes / stats.steps if stats.steps else 1.0,
            "draft_s": stats.draft_s,
        }

    def run_trace(self, attended: list[AttendedLayer], tokens: list[str]) -> RunTrace | None:
        """What all ranks have recorded, on one clock; None where no trace is on. On all ranks.

        `attended` is this rank's, `tokens` are the answer's.
        """
        if not self._trace.is_on:
            return None
        begin_ns, spans, messages, samples = self._trace.records()
        mine = RankTrace(
            socket.gethostname(),
            os.getpid(),
            device_name(self._comm.device),
            0,
            begin_ns,
            spans,
            messages,
            samples,
            attended,
        )
        alignments = align(self._clocks, read_clocks(self._comm))
        gathered = self._comm.all_gather_json(mine, Tag(0, 0, Kind.REPORT))
        ranks = [
            RankTrace.from_json(part).retimed(to.owner_time)._replace(clock_error_ns=to.error_ns)
            for part, to in zip(gathered, alignments, strict=True)
        ]
        return RunTrace.of(ranks, tokens)

    def metrics(
        self,
        prompt: PromptTokens,
        plan: PrefillPlan,
        ranks: Sequence[Mapping[str, float]],
        *,
        model: str,
        method: str,
        backend: str,
        drafter: str,
        placement: Placement,
        audit: list[LayerFinding],
        dtype: torch.dtype,
        generated: int,
    ) -> RequestMetrics:
        """All ranks' figures, times of rank 0; `ranks` holds every rank's `local`, in order."""
        decode_s = ranks[0]["decode_s"]
        return RequestMetrics(
            context_tokens=plan.layout.context_len,
            query_tokens=len(prompt.query_ids),
            generated_tokens=generated,
            model=model,
            method=plan.method or method,
            backend=backend,
            drafter=drafter,
            placement=placement.value,
            audit=audit,
            num_blocks=len(plan.layout.blocks),
            layout=[rank_layout(plan, rank) for rank in range(plan.layout.world_size)],
            prefill_s=ranks[0]["prefill_s"],
            ttft_s=ranks[0]["ttft_s"],
            decode_s=decode_s,
            tokens_per_s=(generated - 1) / decode_s if generated > 1 else 0.0,
            bytes_exchanged=[int(rank["bytes"]) for rank in ranks],
            peak_memory_bytes=[int(rank["peak_memory"]) for rank in ranks],
            acceptance_length=ranks[0]["acceptance_length"],
            tree_nodes=ranks[0]["tree_nodes"],
            draft_s=ranks[0]["draft_s"],
            versions=installed_versions(),
            device=device_name(self._comm.device),
            dtype=str(dtype).removeprefix("torch."),
            notes=list(plan.notes),
        )


def installed_versions() -> dict[str, str]:
    """Of what results depend on."""
    return {name: _version(name) for name in ("apb", "torch", "transformers")}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # apb itself, run from a checkout that is not installed
        return "not installed"


def rank_layout(plan: PrefillPlan, rank: int) -> RankLayout:
    return RankLayout(
        blocks=[[block.start, block.stop] for block in plan.layout.owned_by(rank)],
        tokens_run=plan.num_rows(rank),
        tokens_cached=plan.layout.tokens_on(rank),
    )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({processor_name()}, threads per rank: {torch.get_num_threads()})"


@cache
def processor_name() -> str:
    """As the processor calls itself, or its instruction set where that cannot be read."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()
