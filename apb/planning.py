"""From a prompt to who runs what and where KV goes, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

import torch
from torch import Tensor

from apb.agreement import from_owner
from apb.calibration import known_rates
from apb.comm import Communicator
from apb.config import RunConfig, plugin_name
from apb.cost import CostModel, ModelShape, Rates
from apb.engine import Engine
from apb.methods.audit import Auditor
from apb.methods.base import AttentionMethod
from apb.methods.decode import OWNER
from apb.methods.placement import Placement, choose_placement
from apb.methods.plan import PlanRequest, PrefillPlan, RankRows, Reduced
from apb.methods.zigzag import ZigzagConfig
from apb.metrics import free_memory
from apb.output import LayerFinding
from apb.prompts.base import PromptTokens


class Ready(NamedTuple):
    """A request that every rank has checked, with the engine to run it."""

    engine: Engine
    plan: PrefillPlan
    placement: Placement
    prepared_s: float
    """How long the checks took; loading is not among them."""
    findings: list[LayerFinding]
    """Of the audit, once the prefill has run."""
    rows: RankRows | None = None
    """What this rank has run, then."""
    method: AttentionMethod | None = None
    """Whose plan it is, if not the engine's own."""

    def prefilled(self, prompt: PromptTokens, *, room: int, auditor: Auditor | None) -> Ready:
        """With the context in the engine's cache."""
        rows = self.engine.prefill(
            prompt,
            self.plan,
            room=room,
            placement=self.placement,
            method=self.method,
            auditor=auditor,
        )
        return self._replace(rows=rows)

    def scored_rows(self, rows: Sequence[int], *, reread: int) -> Tensor:
        """Final hidden states of rows after the context, whose last tokens may be among them."""
        self.engine.rewind(reread)
        return self.engine.extend(rows)


class Planner:
    """Plans requests by the method's rules and the owner's rates."""

    def __init__(
        self,
        config: RunConfig,
        comm: Communicator,
        method: AttentionMethod,
        *,
        shape: ModelShape,
        dtype: torch.dtype,
        reduced: Reduced | None = None,
    ) -> None:
        """`reduced` where these ranks are what is left of more."""
        self._reduced = reduced
        self._config, self._comm, self._method = config, comm, method
        self._shape, self._dtype = shape, dtype
        self._costs: CostModel | None = None

    def agree_on_costs(self) -> CostModel:
        """The cost model by the owner's rates; the first call asks the owner. On all ranks."""
        if self._costs is None:
            rates = known_rates(self._comm.device, self._dtype)
            self._costs = CostModel(
                shape=self._shape,
                rates=Rates(**from_owner(self._comm, asdict(rates))),
                itemsize=self._dtype.itemsize,
            )
        return self._costs

    def check(self, context_len: int) -> None:
        """Plan a document of that length, so that settings that never fit are refused early.

        Raises:
            InputError: the settings do not fit the model, the ranks or any shorter document.
        """
        self._method.plan(
            PlanRequest(
                context_len=context_len,
                world_size=self._planned_world_size,
                num_blocks=self._config.num_blocks,
                costs=self.agree_on_costs(),
            )
        )

    def plan(self, prompt: PromptTokens) -> PrefillPlan:
        """Raises InputError where the settings do not fit; `agree_on_costs` has run."""
        return self._planned(self._method, prompt, num_blocks=self._config.num_blocks)

    def exact(self, prompt: PromptTokens) -> tuple[AttentionMethod, PrefillPlan]:
        """An exact method that runs any prompt on any number of ranks, and its plan."""
        config = ZigzagConfig()
        method = config.build(seed=0)
        plan = self._planned(method, prompt, num_blocks=None)
        return method, replace(plan, method=plugin_name("method", config))

    def exact_instead(
        self, prompt: PromptTokens, worst: LayerFinding
    ) -> tuple[AttentionMethod, PrefillPlan]:
        """As `exact`, with a note on the finding that made it necessary."""
        method, plan = self.exact(prompt)
        note = (
            f"the audit found an output error of {worst.output_error:.3f} in layer {worst.layer}, "
            f"above audit.max_error={self._config.audit.max_error}, so the document was read again "
            f"with {plan.method}"
        )
        return method, replace(plan, notes=(*plan.notes, note))

    def layer_s(self, plan: PrefillPlan, method: AttentionMethod | None = None) -> float:
        """Predicted seconds of one layer on the slowest rank, by `method`'s plan."""
        assert self._costs is not None, "predict before the ranks agree on costs"
        method = method or self._method
        return max(map(self._costs.layer_s, method.workloads(plan, self._shape)))

    def prefill_s(self, plan: PrefillPlan) -> float:
        """Predicted seconds of all layers: more than scoring a continuation afterwards takes."""
        return self.layer_s(plan) * self._shape.num_layers

    def step_s(self, plan: PrefillPlan, *, query_len: int) -> float:
        """Predicted seconds of the longest decoding step, the first, which reads the query."""
        assert self._costs is not None, "predict before the ranks agree on costs"
        context_len = plan.layout.context_len
        step_s = self._costs.step_s(context_len, world_size=self._comm.world_size)
        # A query's token attends to all of the context, one of the context to half of it.
        return step_s + self.prefill_s(plan) * 2 * query_len / context_len

    def auditor(self, plan: PrefillPlan) -> Auditor | None:
        """Who looks on while the plan runs; None where nobody is asked to."""
        if not self._config.audit.enabled:
            return None
        sample = self._config.audit.sample()
        return Auditor(sample, plan, self._comm, self._shape, seed=self._config.seed)

    def _planned(
        self, method: AttentionMethod, prompt: PromptTokens, *, num_blocks: int | None
    ) -> PrefillPlan:
        assert self._costs is not None, "plan before the ranks agree on costs"
        request = PlanRequest.of(
            prompt,
            world_size=self._planned_world_size,
            num_blocks=num_blocks,
            costs=self._costs,
        )
        plan = method.plan(request)
        return self._reduced.dealt(plan, self._comm.world_size) if self._reduced else plan

    @property
    def _planned_world_size(self) -> int:
        return self._reduced.world_size if self._reduced else self._comm.world_size

    def propose_placement(self, plan: PrefillPlan, *, room: int, weights_loaded: bool) -> Placement:
        """Where the owner wants KV; the other ranks, whose memory does not matter, want anything.

        Raises:
            InputError: the owner cannot hold what it is told to.
        """
        assert self._costs is not None, "placement before the ranks agree on costs"
        wanted = self._config.decode.placement
        if self._comm.rank != OWNER:
            return wanted
        return choose_placement(
            wanted,
            plan.layout,
            self._costs,
            room=room,
            free_bytes=free_memory(self._comm.device),
            weights_loaded=weights_loaded,
        )

    def agree_on_placement(self, proposed: Placement) -> Placement:
        """The owner's proposal. On all ranks."""
        return Placement(from_owner(self._comm, proposed.value))
