"""What a method is: a plan for a prompt, and one layer's attention under that plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from apb.attention.base import AttentionBackend, LayerInputs
from apb.comm import Communicator
from apb.compress.base import CompressorTarget
from apb.cost import ModelShape, Workload
from apb.methods.audit import Auditor
from apb.methods.plan import PlanRequest, PrefillPlan, RankRows
from apb.trace.recorder import OFF, Trace

Attend = Callable[[LayerInputs], Tensor]
"""One layer's attention as the model calls it: all rows in, ``out_THD`` back."""


class KVSink(Protocol):
    """Where a method puts the keys and values of the rank's blocks, layer by layer."""

    def write(self, layer_idx: int, k_KTD: Tensor, v_KTD: Tensor) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillContext:
    """What a method needs while one prefill runs on this rank."""

    plan: PrefillPlan
    rows: RankRows
    cache: KVSink
    comm: Communicator
    backend: AttentionBackend
    step: int
    auditor: Auditor | None = None
    trace: Trace = OFF


class AttentionMethod(ABC):
    """How one prefill is spread over blocks and ranks.

    Whatever the method, afterwards every context token is cached on exactly one rank at its true
    position and nothing else is cached, so decode never asks which method ran.
    """

    def attach(self, target: CompressorTarget) -> None:  # noqa: B027
        """Get ready for a model, before its weights are loaded.

        Raises:
            InputError: the method's compressor does not fit it.
        """

    @abstractmethod
    def plan(self, request: PlanRequest) -> PrefillPlan:
        """Who runs what, from lengths alone; the same on every rank.

        Raises:
            InputError: the settings do not fit the prompt, the model or the number of ranks.
        """

    @abstractmethod
    def workload(self, plan: PrefillPlan, shape: ModelShape, rank: int) -> Workload:
        """What a rank does in one layer of the plan."""

    def workloads(self, plan: PrefillPlan, shape: ModelShape) -> list[Workload]:
        """Of every rank."""
        return [self.workload(plan, shape, rank) for rank in range(plan.layout.world_size)]

    @abstractmethod
    def begin(self, context: PrefillContext) -> Attend:
        """The attention of one prefill: stores the context's KV in the cache as it goes."""


@dataclass(kw_only=True, slots=True)
class MethodConfig(ABC):
    """Config of a method."""

    @abstractmethod
    def build(self, *, seed: int) -> AttentionMethod: ...
