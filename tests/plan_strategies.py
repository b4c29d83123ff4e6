"""Hypothesis strategies: any prompt, any method's settings, and the plan they make."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import strategies as st

from apb.compress.knorm import KnormConfig
from apb.layout import LayoutPolicy
from apb.methods.apb import ApbConfig
from apb.methods.base import MethodConfig
from apb.methods.full import FullConfig
from apb.methods.plan import AnchorForm, PrefillPlan
from apb.methods.ring import RingConfig
from apb.methods.star import StarConfig
from apb.methods.ulysses import UlyssesConfig
from apb.methods.zigzag import ZigzagConfig
from apb.prompts.base import PromptTokens
from plans import SHAPE, make_plan

QUERY = 10_000
"""Token ids say what they are: context token i is i and query token i is QUERY + i."""


def make_prompt(prefix_len: int, document_len: int, query_len: int) -> PromptTokens:
    context = tuple(range(prefix_len + document_len))
    query = tuple(range(QUERY, QUERY + query_len))
    return PromptTokens(context[:prefix_len], context[prefix_len:], query)


PROMPTS = st.builds(make_prompt, st.integers(0, 30), st.integers(1, 150), st.integers(0, 40))
SHARES = st.floats(0.0, 1.0)
_POLICIES, _FORMS = st.sampled_from(LayoutPolicy), st.sampled_from(AnchorForm)
EXACT: st.SearchStrategy[MethodConfig] = st.sampled_from(
    [FullConfig(), RingConfig(), ZigzagConfig(), UlyssesConfig()]
)
APPROXIMATE: st.SearchStrategy[MethodConfig] = st.builds(
    StarConfig, min_block_len=st.just(1), layout=_POLICIES, anchor=_FORMS
) | st.builds(
    ApbConfig,
    compressor=st.just(KnormConfig()),
    min_block_len=st.just(1),
    layout=_POLICIES,
    anchor=_FORMS,
    anchor_len=SHARES,
    passing_len=SHARES,
)


class Planned(NamedTuple):
    """What a method's settings make of a prompt."""

    config: MethodConfig
    prompt: PromptTokens
    plan: PrefillPlan


@st.composite
def planned(
    draw: st.DrawFn, configs: st.SearchStrategy[MethodConfig] = EXACT | APPROXIMATE
) -> Planned:
    """Plans for any number of ranks and blocks that the method takes."""
    config, prompt = draw(configs), draw(PROMPTS)
    takes_blocks = not isinstance(config, FullConfig | UlyssesConfig)
    most_ranks = SHAPE.num_heads if isinstance(config, UlyssesConfig) else 8
    world_size = draw(st.integers(1, most_ranks))
    policy = getattr(config, "layout", None)
    if policy is LayoutPolicy.zigzag or isinstance(config, ZigzagConfig):
        counts = st.integers(1, 3).map(lambda turns: 2 * world_size * turns)
    else:
        counts = st.integers(world_size, 20)
    num_blocks = draw(st.none() | counts) if takes_blocks else None
    plan = make_plan(config, prompt, world_size=world_size, num_blocks=num_blocks)
    return Planned(config, prompt, plan)
