"""What ranks run in tests: one prefill and its query, and what it left behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from apb.attention.base import BackendConfig
from apb.attention.sdpa import SdpaConfig
from apb.comm import Communicator
from apb.cost import NOMINAL_CPU, Rates
from apb.engine import Engine
from apb.methods.base import MethodConfig
from apb.methods.placement import Placement
from apb.methods.plan import AnchorForm, PrefillPlan
from apb.prompts.base import PromptTokens
from models import apb_model, compressor_target_of
from plans import make_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One prompt under one method, and the tokens that follow the context."""

    model: str
    method: MethodConfig
    prompt: PromptTokens
    new_ids: tuple[int, ...]
    num_blocks: int | None = None
    placement: Placement = Placement.sharded
    backend: BackendConfig = field(default_factory=SdpaConfig)
    seed: int = 0
    rates: Rates = NOMINAL_CPU
    """What plans expect of the machine."""
    anchor_form: AnchorForm | None = None
    """Instead of the plan's, for the same blocks."""

    def plan(self, world_size: int) -> PrefillPlan:
        plan = make_plan(
            self.method,
            self.prompt,
            world_size=world_size,
            num_blocks=self.num_blocks,
            shape=apb_model(self.model).shape,
            rates=self.rates,
        )
        return plan if self.anchor_form is None else replace(plan, anchor_form=self.anchor_form)


class Outcome(NamedTuple):
    """What one rank has after a case."""

    positions_S: Tensor
    """Cached by prefill."""
    kv_L2KSD: Tensor
    logits_TV: Tensor
    """Empty where the rank has handed its shard over."""


def run_cases(comm: Communicator, cases: Sequence[Case]) -> list[Outcome]:
    return [_run_case(comm, case) for case in cases]


def make_engine(comm: Communicator, case: Case) -> Engine:
    """A prefilled engine with room for the new tokens."""
    model = apb_model(case.model)
    method = case.method.build(seed=case.seed)
    method.attach(compressor_target_of(case.model))
    engine = Engine(
        model=model,
        method=method,
        backend=case.backend.build(model.attention_target),
        comm=comm,
    )
    prefill(engine, case, room=len(case.new_ids))
    return engine


def prefill(engine: Engine, case: Case, *, room: int) -> None:
    plan = case.plan(engine.comm.world_size)
    engine.prefill(case.prompt, plan, room=room, placement=case.placement)


def _run_case(comm: Communicator, case: Case) -> Outcome:
    engine = make_engine(comm, case)
    positions_S, kv_L2KSD = _cached(engine)
    return Outcome(positions_S, kv_L2KSD, _read(engine, case, [len(case.new_ids)]))


def _read(engine: Engine, case: Case, lengths: Sequence[int]) -> Tensor:
    """Logits of the new tokens, read in passes of those lengths and then forgotten."""
    passes = torch.tensor(case.new_ids).split(list(lengths))
    hidden_TM = torch.cat([engine.extend(ids.tolist()) for ids in passes])
    engine.rewind(len(case.new_ids))
    return apb_model(case.model).logits(hidden_TM) if hidden_TM.numel() else torch.empty(0, 0)


def _cached(engine: Engine) -> tuple[Tensor, Tensor]:
    """Positions and KV in this rank's cache; none where it has handed them over."""
    layers, kv_heads, head_dim, _ = engine.model.cache_shape
    cache = engine._cache
    if cache is None:
        return torch.empty(0, dtype=torch.int64), torch.empty(layers, 2, kv_heads, 0, head_dim)
    kv_L2KSD = torch.stack([torch.stack(cache.view(layer_idx)) for layer_idx in range(layers)])
    return cache.positions_S.clone(), kv_L2KSD


def run_splits(
    comm: Communicator, cases: Sequence[Case], splits: Sequence[Sequence[int]]
) -> list[list[Tensor]]:
    """Per case and split, the logits of the new tokens read in passes of those lengths."""
    results = []
    for case in cases:
        engine = make_engine(comm, case)
        results.append([_read(engine, case, lengths) for lengths in splits])
    return results


def run_rewound(comm: Communicator, case: Case) -> tuple[Tensor, Tensor]:
    """Hidden states of the new tokens, and again after other tokens were read and forgotten."""
    engine = make_engine(comm, case)
    first_TM = engine.extend(case.new_ids)
    engine.rewind(len(case.new_ids))
    engine.extend(case.new_ids[::-1])
    engine.rewind(len(case.new_ids))
    return first_TM, engine.extend(case.new_ids)
