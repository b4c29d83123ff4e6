"""The method by prediction: exact attention where it costs little, APB where it does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from apb.compress.base import CompressorTarget
from apb.cost import ModelShape, Workload
from apb.errors import InputError
from apb.layout import LayoutPolicy
from apb.methods.apb import ApbConfig, ApbMethod
from apb.methods.base import Attend, AttentionMethod, PrefillContext
from apb.methods.full import FullConfig
from apb.methods.plan import PlanRequest, PrefillPlan
from apb.methods.ring import RingMethod
from apb.methods.ulysses import UlyssesMethod

_WORTHWHILE = 0.95
"""`apb` has to be predicted faster than this share of the best exact method's time."""


class AutoMethod(AttentionMethod):
    """Exact below the break-even length of the cost model, `apb` above it."""

    def __init__(self, approximate: ApbMethod) -> None:
        self._approximate = approximate
        self._exact: Mapping[str, AttentionMethod] = {
            "full": FullConfig().build(seed=0),
            "zigzag": RingMethod(LayoutPolicy.zigzag),
            "ulysses": UlyssesMethod(),
        }

    def attach(self, target: CompressorTarget) -> None:
        for method in (self._approximate, *self._exact.values()):
            method.attach(target)

    def plan(self, request: PlanRequest) -> PrefillPlan:
        """The chosen method's plan, with its name and the reason in a note."""
        approximate = self._approximate.plan(request)
        approximate_s = self._predicted_s("apb", approximate, request)
        exact = {}
        for name, method in self._exact.items():
            try:
                exact[name] = method.plan(replace(request, num_blocks=None))
            except InputError:  # the method cannot run on so many ranks
                continue
        seconds = {name: self._predicted_s(name, plan, request) for name, plan in exact.items()}
        best = min(seconds, key=lambda name: seconds[name])
        if approximate_s < _WORTHWHILE * seconds[best]:
            name, plan = "apb", approximate
        else:
            name, plan = best, exact[best]
        reason = (
            f"method=auto chose {name}: predicted prefill {seconds[best]:.3g} s with {best}, the "
            f"fastest exact method, and {approximate_s:.3g} s with apb; by "
            f"{request.costs.rates.source}"
        )
        return replace(plan, method=name, notes=(*plan.notes, reason))

    def begin(self, context: PrefillContext) -> Attend:
        return self._chosen(context.plan.method).begin(context)

    def workload(self, plan: PrefillPlan, shape: ModelShape, rank: int) -> Workload:
        return self._chosen(plan.method).workload(plan, shape, rank)

    def workloads(self, plan: PrefillPlan, shape: ModelShape) -> list[Workload]:
        return self._chosen(plan.method).workloads(plan, shape)

    def _chosen(self, name: str | None) -> AttentionMethod:
        return self._approximate if name == "apb" else self._exact[name or "full"]

    def _predicted_s(self, name: str, plan: PrefillPlan, request: PlanRequest) -> float:
        return request.costs.prefill_s(self._chosen(name).workloads(plan, request.costs.shape))


@dataclass(kw_only=True, slots=True)
class AutoConfig(ApbConfig):
    """Config of `AutoMethod`; the fields are those of `apb`, where that is chosen."""

    def build(self, *, seed: int) -> AttentionMethod:
        return AutoMethod(self.build_apb(seed=seed))
