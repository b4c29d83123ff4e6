"""Guarantees of workloads: what a method says that a rank does is what its attention then does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from torch import Tensor

from apb.attention.base import AttentionBackend, AttentionPartial, LayerInputs
from apb.comm import Communicator, Pending, Tag
from apb.cost import Workload
from apb.methods.base import PrefillContext
from apb.methods.full import FullConfig
from apb.methods.ulysses import UlyssesConfig
from plan_strategies import EXACT, Planned, planned
from plans import SHAPE


class CountingBackend(AttentionBackend):
    """Counts query-key pairs instead of attending."""

    def __init__(self) -> None:
        self.head_pairs = 0

    def attend_segment(
        self, q_HTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, *, causal: bool, scale: float
    ) -> AttentionPartial:
        num_heads, num_rows, _ = q_HTD.shape
        num_keys = k_KSD.shape[1]
        assert num_keys == num_rows or not causal
        pairs = num_rows * (num_rows + 1) // 2 if causal else num_rows * num_keys
        self.head_pairs += num_heads * pairs
        return AttentionPartial(
            torch.zeros_like(q_HTD.transpose(0, 1)), torch.zeros(num_rows, num_heads)
        )


@dataclass(slots=True)
class CountingCommunicator(Communicator):
    """One of several ranks in one process: what it asks for arrives as zeros."""

    received: int = 0
    messages: int = 0

    def exchange(
        self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], tag: Tag
    ) -> Pending[dict[int, Tensor]]:
        self.received += sum(x.numel() for x in incoming.values())
        self.messages += bool(incoming)
        arrived = {rank: torch.zeros_like(x, device="cpu") for rank, x in incoming.items()}
        return Pending(lambda: arrived)


class NoCache:
    """Where keys and values are forgotten."""

    def write(self, layer_idx: int, k_KTD: Tensor, v_KTD: Tensor) -> None: ...


def run_layer(drawn: Planned, rank: int) -> Workload:
    """What a rank is seen to do in one layer."""
    config, prompt, plan = drawn
    comm = CountingCommunicator(rank, plan.layout.world_size, torch.device("cpu"))
    backend = CountingBackend()
    rows = plan.rows(rank, prompt.context_ids, prompt.query_ids)
    context = PrefillContext(
        plan=plan, rows=rows, cache=NoCache(), comm=comm, backend=backend, step=1
    )
    num_rows = len(rows.token_ids)
    q_HTD = torch.randn(SHAPE.num_heads, num_rows, SHAPE.head_dim)
    k_KTD, v_KTD = torch.randn(2, SHAPE.num_kv_heads, num_rows, SHAPE.head_dim)
    config.build(seed=0).begin(context)(LayerInputs(0, q_HTD, k_KTD, v_KTD, 0.25))
    return Workload(num_rows, backend.head_pairs, comm.received, comm.messages)


@settings(deadline=None)
@given(drawn=planned())
def test_every_rank_does_what_its_workload_says(drawn: Planned) -> None:
    config, _, plan = drawn
    for rank in range(plan.layout.world_size):
        seen = run_layer(drawn, rank)
        said = config.build(seed=0).workload(plan, SHAPE, rank)
        if isinstance(config, UlyssesConfig):  # a rank without rows has nothing to trade back
            assert seen.messages <= said.messages
            said = said._replace(messages=seen.messages)
            assert not said.overlaps, "queries have to be there before attention begins"
        assert said._replace(overlaps=True, element_bytes=None) == seen, rank


@given(drawn=planned(EXACT))
def test_exact_methods_share_out_the_whole_of_causal_attention(drawn: Planned) -> None:
    config, prompt, plan = drawn
    method, length = config.build(seed=0), len(prompt.context_ids)
    works = [method.workload(plan, SHAPE, rank) for rank in range(plan.layout.world_size)]
    assert sum(work.rows for work in works) == length
    assert sum(work.head_pairs for work in works) == SHAPE.num_heads * length * (length + 1) // 2
    if isinstance(config, FullConfig) or plan.layout.world_size == 1:
        assert all(work.received == work.messages == 0 for work in works)
