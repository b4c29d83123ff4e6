"""What ranks are granted before a request's planner calls them stalled."""

from __future__ import annotations

import pytest
import torch

from apb.comm import Communicator
from apb.config import compose_config
from apb.methods.full import FullConfig
from apb.planning import Planner
from apb.prompts.base import PromptTokens
from plans import LLAMA_8B


@pytest.mark.parametrize("query_len", [1, 64, 4096, 65536])
def test_the_first_step_is_granted_what_reading_its_query_takes(query_len: int) -> None:
    """A prefill over the query as well takes as much longer as the query takes to read."""
    context_len = 131072
    planner = Planner(
        compose_config(["model=tiny", "device=cpu"]),
        Communicator(0, 1, torch.device("cpu")),
        FullConfig().build(seed=0),
        shape=LLAMA_8B,
        dtype=torch.bfloat16,
    )
    planner.agree_on_costs()

    def planned_s(num_tokens: int) -> float:
        plan = planner.plan(PromptTokens((), (0,) * num_tokens, ()))
        return planner.prefill_s(plan)

    read_s = planned_s(context_len + query_len) - planned_s(context_len)
    plan = planner.plan(PromptTokens((), (0,) * context_len, ()))
    granted_s = planner.step_s(plan, query_len=query_len)
    plain_s = planner.step_s(plan, query_len=0)
    assert read_s / 2 <= granted_s <= plain_s + 2 * read_s
