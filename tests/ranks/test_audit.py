"""Guarantees of the audit: it finds what a dense computation on one process finds, on any ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from apb.attention.base import LayerInputs
from apb.attention.sdpa import SdpaBackend
from apb.comm import Communicator
from apb.compress.knorm import KnormConfig
from apb.cost import ModelShape, Workload
from apb.engine import Engine
from apb.layout import LayoutPolicy
from apb.methods.apb import ApbConfig
from apb.methods.audit import Auditor, AuditSample
from apb.methods.base import Attend, AttentionMethod, MethodConfig, PrefillContext
from apb.methods.plan import AnchorForm, PlanRequest, PrefillPlan
from apb.methods.star import StarConfig
from apb.output import LayerFinding
from models import apb_model
from plans import make_plan
from rank_pool import RankPool
from ranks.cases import WORLD_SIZES, make_prompt, max_diff

PoolOf = Callable[[int], RankPool]
MODEL, CONTEXT_LEN = "llama", 90
EVERYTHING = AuditSample(rows=1000, heads=1000, layers=1000)
APB = ApbConfig(compressor=KnormConfig(), min_block_len=1)


class Seen(NamedTuple):
    """One layer on one rank: the inputs and the result of its context rows."""

    positions: tuple[int, ...]
    inputs: LayerInputs
    out_THD: Tensor


@dataclass
class Recording(AttentionMethod):
    """Notes what another method's attention is given and returns."""

    method: AttentionMethod

    def plan(self, request: PlanRequest) -> PrefillPlan:
        return self.method.plan(request)

    def workload(self, plan: PrefillPlan, shape: ModelShape, rank: int) -> Workload:
        return self.method.workload(plan, shape, rank)

    def begin(self, context: PrefillContext) -> Attend:
        attend = self.method.begin(context)
        local = context.rows.local
        self.seen: list[Seen] = []

        def recorded(layer: LayerInputs) -> Tensor:
            out_THD = attend(layer)
            q, k, v = (x[:, local].clone() for x in (layer.q_HTD, layer.k_KTD, layer.v_KTD))
            inputs = LayerInputs(layer.layer_idx, q, k, v, layer.scale)
            self.seen.append(Seen(context.rows.positions[local], inputs, out_THD[local].clone()))
            return out_THD

        return recorded


def audit(
    comm: Communicator, config: MethodConfig, sample: AuditSample, num_blocks: int
) -> tuple[list[LayerFinding], list[Seen]]:
    model = apb_model(MODEL)
    prompt = make_prompt(CONTEXT_LEN, prefix_len=2, query_len=6)
    plan = make_plan(
        config, prompt, world_size=comm.world_size, num_blocks=num_blocks, shape=model.shape
    )
    method = Recording(config.build(seed=0))
    engine = Engine(model=model, method=method, backend=SdpaBackend(), comm=comm)
    auditor = Auditor(sample, plan, comm, model.shape, seed=3)
    engine.prefill(prompt, plan, room=1, auditor=auditor)
    return auditor.findings(), method.seen


def run(
    pool: RankPool, config: MethodConfig, sample: AuditSample, *, num_blocks: int
) -> tuple[list[LayerFinding], list[list[Seen]]]:
    """The findings, which are the same on all ranks, and per layer what every rank has seen."""
    results = pool.run(audit, config, sample, num_blocks)
    findings = [findings for findings, _ in results]
    assert all(found == findings[0] for found in findings)
    return findings[0], [list(layer) for layer in zip(*(seen for _, seen in results), strict=True)]


def dense_finding(config: MethodConfig, ranks: list[Seen], num_blocks: int) -> LayerFinding:
    """The same figures from all rows, keys and values in one place."""
    order = torch.tensor([p for seen in ranks for p in seen.positions]).argsort()
    inputs = [seen.inputs for seen in ranks]
    q_HTD = torch.cat([layer.q_HTD for layer in inputs], dim=1)[:, order]
    k_KTD = torch.cat([layer.k_KTD for layer in inputs], dim=1)[:, order]
    v_KTD = torch.cat([layer.v_KTD for layer in inputs], dim=1)[:, order]
    out_THD = torch.cat([seen.out_THD for seen in ranks])[order]
    prompt = make_prompt(CONTEXT_LEN, prefix_len=2, query_len=6)
    plan = make_plan(config, prompt, world_size=len(ranks), num_blocks=num_blocks)
    masses, errors = [], []
    for row, visible_KT in enumerate(visible_keys(plan, k_KTD)):
        groups = q_HTD.shape[0] // k_KTD.shape[0]
        k_HSD, v_HSD = (x[:, : row + 1].repeat_interleave(groups, 0) for x in (k_KTD, v_KTD))
        scores_HS = (k_HSD @ q_HTD[:, row, :, None])[..., 0] * ranks[0].inputs.scale
        probs_HS = scores_HS.softmax(dim=-1)
        exact_HD = (probs_HS[:, None] @ v_HSD)[:, 0]
        seen_HS = visible_KT[:, : row + 1].repeat_interleave(groups, 0)
        masses.append((probs_HS * seen_HS).sum(dim=-1).mean())
        errors.append((out_THD[row] - exact_HD).norm() / exact_HD.norm())
    return LayerFinding(
        layer=ranks[0].inputs.layer_idx,
        recovered_mass=float(torch.stack(masses).mean()),
        output_error=float(torch.stack(errors).mean()),
    )


def visible_keys(plan: PrefillPlan, k_KTD: Tensor) -> Iterator[Tensor]:
    """Per context row the true keys that it saw, ``[K, T]``, as `knorm` selects them."""
    passed_KT = torch.zeros(k_KTD.shape[:2], dtype=torch.bool)
    for block in plan.layout.blocks:
        seen_KT = passed_KT.clone()
        if block.index:
            seen_KT[:, : plan.anchor.context_len] = True
        seen_KT[:, block.start : block.stop] = True
        yield from [seen_KT] * len(block)
        first = block.start + plan.excluded(block)
        norms_KS = k_KTD[:, first : block.stop].norm(dim=-1)
        kept_KP = (-norms_KS).topk(plan.passing_lens[block.index]).indices + first
        passed_KT.scatter_(1, kept_KP, True)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(
    ("config", "num_blocks"),
    [
        (APB, 4),
        (replace(APB, layout=LayoutPolicy.balanced, anchor=AnchorForm.replicated), 12),
        (replace(APB, layout=LayoutPolicy.zigzag, passing_len=0.5), 24),
        (StarConfig(min_block_len=1), 6),
    ],
    ids=["apb", "apb_balanced_replicated", "apb_zigzag", "star"],
)
def test_findings_equal_a_dense_computation(
    pool_of: PoolOf, config: MethodConfig, num_blocks: int, world_size: int
) -> None:
    findings, layers = run(pool_of(world_size), config, EVERYTHING, num_blocks=num_blocks)
    assert len(findings) == len(layers)
    for finding, ranks in zip(findings, layers, strict=True):
        expected = dense_finding(config, ranks, num_blocks)
        assert finding.layer == expected.layer
        assert finding.recovered_mass == pytest.approx(expected.recovered_mass, abs=1e-4)
        assert finding.output_error == pytest.approx(expected.output_error, abs=1e-4)
        assert 0.1 < finding.recovered_mass < 0.99
        assert finding.output_error > 0.01


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_nothing_is_lost_where_everything_is_passed(pool_of: PoolOf, world_size: int) -> None:
    config = replace(APB, passing_len=1.0, anchor_len=0)
    findings, _ = run(pool_of(world_size), config, EVERYTHING, num_blocks=8)
    for finding in findings:
        assert finding.recovered_mass == pytest.approx(1.0, abs=1e-4)
        assert finding.output_error < 1e-4


def test_a_sample_is_what_it_says_and_changes_no_result(pool_of: PoolOf) -> None:
    sample = AuditSample(rows=7, heads=2, layers=2)
    findings, layers = run(pool_of(2), APB, sample, num_blocks=4)
    _, unsampled = run(pool_of(2), APB, EVERYTHING, num_blocks=4)
    assert [finding.layer for finding in findings] == [0, 2]
    assert max_diff(layers[-1][1].out_THD, unsampled[-1][1].out_THD) == 0.0
