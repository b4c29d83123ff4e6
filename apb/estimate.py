"""What a method would take for a document, by the cost model alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from apb.cost import CostModel, Workload
from apb.errors import InputError
from apb.methods.base import AttentionMethod
from apb.methods.plan import PlanRequest, PrefillPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEstimate:
    """One rank's part of a prefill."""

    rows: int
    cached: int
    """Context tokens whose KV it keeps."""
    received_bytes: int
    peak_bytes: int
    prefill_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A method's prefill and decoding steps over what it cached, sharded."""

    plan: PrefillPlan
    ranks: tuple[RankEstimate, ...]
    flops: float
    """Of all ranks: linear maps and attention."""
    tpot_s: float
    """Of a token without drafts."""

    @classmethod
    def of(cls, method: AttentionMethod, request: PlanRequest, *, chunk_len: int) -> Estimate:
        """Plan the request and price the plan.

        Raises:
            InputError: the method cannot run it.
        """
        plan, costs = method.plan(request), request.costs
        works = method.workloads(plan, costs.shape)
        cached = [plan.layout.tokens_on(rank) for rank in range(request.world_size)]
        ranks = tuple(
            RankEstimate(
                rows=work.rows,
                cached=tokens,
                received_bytes=round(costs.received_bytes(work) * costs.shape.num_layers),
                peak_bytes=costs.prefill_bytes(work, cached_tokens=tokens, chunk_len=chunk_len),
                prefill_s=costs.prefill_s([work]),
            )
            for work, tokens in zip(works, cached, strict=True)
        )
        return cls(
            plan=plan,
            ranks=ranks,
            flops=sum(_flops(costs, work) for work in works),
            tpot_s=costs.step_s(max(cached), world_size=request.world_size),
        )

    @property
    def prefill_s(self) -> float:
        return max(rank.prefill_s for rank in self.ranks)

    @property
    def ttft_s(self) -> float:
        """Prefill and the question's pass, which costs about a decoding step."""
        return self.prefill_s + self.tpot_s

    @property
    def peak_bytes(self) -> int:
        """Of the fullest rank."""
        return max(rank.peak_bytes for rank in self.ranks)

    @property
    def received_bytes(self) -> int:
        """The most that a rank receives."""
        return max(rank.received_bytes for rank in self.ranks)

    def rank0_step_s(self, costs: CostModel) -> float:
        """Of a token once rank 0 has all KV."""
        return costs.step_s(self.plan.layout.context_len, world_size=1)

    def rank0_bytes(self, costs: CostModel) -> int:
        """What rank 0 holds then."""
        return costs.weight_bytes + costs.kv_bytes(self.plan.layout.context_len)


def _flops(costs: CostModel, work: Workload) -> float:
    shape = costs.shape
    layer = 2 * work.rows * shape.linear_parameters + 4 * shape.head_dim * work.head_pairs
    return float(shape.num_layers * layer)


_LONGEST = 1 << 24


def break_even(
    approximate: AttentionMethod, exact: Mapping[str, AttentionMethod], request: PlanRequest
) -> int | None:
    """The shortest context, to 1/16 of its length, from which `approximate` is predicted faster
    than every exact method that can run; None where it never is.

    The request's own context length does not matter.
    """

    def wins(context_len: int) -> bool:
        at = replace(request, context_len=context_len)
        # How many blocks `approximate` is to cut is nothing that exact methods could follow.
        alone = replace(at, num_blocks=None)
        seconds = [s for method in exact.values() if (s := _prefill_s(method, alone)) is not None]
        ours = _prefill_s(approximate, at)
        return ours is not None and (not seconds or ours < min(seconds))

    length = 256
    while not wins(length):
        length *= 2
        if length > _LONGEST:
            return None
    step = length // 4
    while step >= length // 16 and step:
        length = length - step if wins(length - step) else length
        step //= 2
    return length


def _prefill_s(method: AttentionMethod, request: PlanRequest) -> float | None:
    try:
        plan = method.plan(request)
    except InputError:
        return None
    return request.costs.prefill_s(method.workloads(plan, request.costs.shape))
