"""Guarantees of draft trees: structure, budgets, and answers that no draft can change (E8)."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apb.generation import Outcome, Verdict
from apb.sampling import Sampler, SamplingParams, filtered_probs
from apb.speculate.tree import DraftTree, Follower, TreeBuilder
from apb.speculate.verify import accept

VOCAB = 6


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    tokens = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12))
    parents = [-1, *(draw(st.integers(0, node - 1)) for node in range(1, len(tokens)))]
    return DraftTree(tuple(tokens), tuple(parents), (0,) * len(tokens))


def ancestors(tree: DraftTree, node: int) -> list[int]:
    """The node and all above it."""
    return [] if node < 0 else [node, *ancestors(tree, tree.parents[node])]


def spell(tree: DraftTree, node: int) -> tuple[int, ...]:
    """The tokens from the root, which is left out, to a node."""
    return tuple(tree.tokens[n] for n in reversed(ancestors(tree, node)))[1:]


@given(tree=trees())
def test_nodes_see_their_ancestors_and_stand_as_deep_as_there_are(tree: DraftTree) -> None:
    visible_NN = tree.visible()
    for node in range(len(tree)):
        assert visible_NN[node].nonzero().flatten().tolist() == sorted(ancestors(tree, node))
        assert tree.depths[node] == len(ancestors(tree, node)) - 1
        assert all(tree.parents[child] == node for child in tree.children(node))
    assert sum(len(list(tree.children(node))) for node in range(len(tree))) == len(tree) - 1
    assert tree.is_chain == torch.equal(visible_NN, torch.ones_like(visible_NN).tril())


@given(
    paths=st.lists(st.lists(st.integers(0, 2), max_size=4), max_size=8), max_nodes=st.integers(1, 9)
)
def test_merged_paths_share_their_beginnings_within_the_budget(
    paths: list[list[int]], max_nodes: int
) -> None:
    builder = TreeBuilder(9, max_nodes=max_nodes)
    for path in paths:
        builder.add_path(path, source=1)
    tree = builder.build()
    assert 1 <= len(tree) <= max_nodes
    spelled = [spell(tree, node) for node in range(len(tree))]
    assert len(set(spelled)) == len(tree)
    wanted = {tuple(path[:stop]) for path in paths for stop in range(len(path) + 1)} | {()}
    assert set(spelled) <= wanted
    if len(wanted) <= max_nodes:
        assert set(spelled) == wanted


def test_likeliest_nodes_come_first() -> None:
    shares = {"": [(1, 0.7), (2, 0.3)], "1": [(3, 0.9), (4, 0.1)], "2": [(5, 1.0)]}

    def followers(state: str) -> list[Follower[str]]:
        return [Follower(t, share, state + str(t)) for t, share in shares.get(state, [])]

    builder = TreeBuilder(0, max_nodes=5)
    builder.add_likeliest("", followers, source=2)
    tree = builder.build()
    assert tree.tokens == (0, 1, 3, 2, 5)
    assert tree.parents == (-1, 0, 1, 0, 3)
    assert tree.sources == (0, 2, 2, 2, 2)


@given(
    tree=trees(),
    verdict=st.sampled_from(Verdict),
    token_ids=st.lists(st.integers(0, 99), max_size=12),
    path=st.lists(st.integers(0, 11), max_size=12),
)
def test_outcomes_survive_the_wire(
    tree: DraftTree, verdict: Verdict, token_ids: list[int], path: list[int]
) -> None:
    outcome = Outcome(verdict, tuple(token_ids), tuple(path), tree)
    assert Outcome.unpacked(outcome.packed(12)) == outcome
    assert len(outcome.packed(12)) == len(outcome._replace(path=()).packed(12))


@given(tree=trees(), seed=st.integers(0, 999))
def test_greedy_path_is_the_walk_of_largest_logits(tree: DraftTree, seed: int) -> None:
    logits_NV = torch.randn(len(tree), VOCAB, generator=torch.Generator().manual_seed(seed))
    walk = accept(tree, logits_NV, Sampler(SamplingParams()))
    for node, following in itertools.pairwise(walk.path):
        assert tree.parents[following] == node
        assert tree.tokens[following] == logits_NV[node].argmax()
    assert walk.token_id == logits_NV[walk.path[-1]].argmax()
    children = tree.children(walk.path[-1])
    assert walk.token_id not in [tree.tokens[child] for child in children]


def test_a_walk_ends_where_logits_are_not_finite() -> None:
    tree = DraftTree((0, 1, 2), (-1, 0, 1), (0, 0, 0))
    logits_NV = torch.eye(3).roll(1, dims=1)
    logits_NV[1, 0] = torch.nan
    assert accept(tree, logits_NV, Sampler(SamplingParams())) == ((0, 1), None)
    logits_NV[1, 0], logits_NV[2, 0] = 0.0, torch.inf
    assert accept(tree, logits_NV, Sampler(SamplingParams())) == ((0, 1, 2), None)


Prefix = tuple[int, ...]
Accept = Callable[[DraftTree, Tensor, Sampler], "tuple[int, ...]"]
PARAMS = SamplingParams(temperature=0.8, top_p=0.95, seed=1)


def target_logits(prefix: Prefix) -> Tensor:
    """Of a toy target, which depend on all that came before."""
    return torch.randn(3, generator=torch.Generator().manual_seed(hash(prefix) % 2**31)) * 2


def draft(prefix: Prefix) -> DraftTree:
    """A tree that depends on what came before, as all trees do."""
    first = sum(prefix) % 3
    return DraftTree((prefix[-1], first, (first + 1) % 3, 0), (-1, 0, 0, 1), (0,) * 4)


def step(prefix: Prefix, sampler: Sampler, take: Accept) -> Prefix:
    """What follows a prefix after one step of the target."""
    tree = draft(prefix)
    spelled = [prefix + spell(tree, node) for node in range(len(tree))]
    return take(tree, torch.stack([target_logits(s) for s in spelled]), sampler)


def taken(tree: DraftTree, logits_NV: Tensor, sampler: Sampler) -> Prefix:
    walk = accept(tree, logits_NV, sampler)
    assert walk.token_id is not None
    return (*(tree.tokens[node] for node in walk.path[1:]), walk.token_id)


def trusting(tree: DraftTree, logits_NV: Tensor, sampler: Sampler) -> Prefix:
    """A wrong verifier: the first child is always accepted."""
    child = next(tree.children(0))
    return (tree.tokens[child], sampler(logits_NV[child]))


def distance(take: Accept, draws: int = 4000) -> float:
    """Total variation between the first two tokens by steps over trees and by enumeration."""
    expected: dict[Prefix, float] = {}
    for first, second in itertools.product(range(3), repeat=2):
        chance = filtered_probs(target_logits((0,)), PARAMS)[first]
        chance = chance * filtered_probs(target_logits((0, first)), PARAMS)[second]
        expected[first, second] = float(chance)
    sampler, found = Sampler(PARAMS), Counter[Prefix]()
    for _ in range(draws):
        answer: Prefix = (0,)
        while len(answer) < 3:
            answer += step(answer, sampler, take)
        found[answer[1:3]] += 1
    return sum(abs(found[key] / draws - share) for key, share in expected.items()) / 2


def test_sampled_answers_have_the_distribution_of_plain_sampling() -> None:
    assert distance(taken) < 0.03
    assert distance(trusting) > 0.1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_are_those_of_plain_decoding_with_the_same_seed(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=3)
    plain: Prefix = (0,)
    sampler = Sampler(params)
    while len(plain) < 40:
        plain += (sampler(target_logits(plain)),)
    drafted: Prefix = (0,)
    sampler = Sampler(params)
    while len(drafted) < 40:
        drafted += step(drafted, sampler, taken)
    assert drafted[:40] == plain
