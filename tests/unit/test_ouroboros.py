"""Guarantees of phrases: what the pool learns and forgets, and where phrases hang in a draft."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apb.errors import InputError
from apb.sampling import SamplingParams
from apb.speculate.base import DraftRequest, Verified
from apb.speculate.ouroboros import OuroborosConfig, OuroborosDrafter, PhrasePool
from apb.speculate.tree import DraftTree, TreeBuilder
from models import draft_target

VOCAB = 100

brief = settings(max_examples=60, deadline=None)


def build(prompt_ids: Sequence[int] = (), **settings: Any) -> OuroborosDrafter:
    drafter = OuroborosConfig(**settings).build_drafter(draft_target("llama"))
    drafter.begin(DraftRequest(prompt_ids, SamplingParams()))
    return drafter


def drafted(drafter: OuroborosDrafter, root: int, max_nodes: int = 32) -> DraftTree:
    builder = TreeBuilder(root, max_nodes=max_nodes)
    drafter.extend_tree(builder, source=1)
    return builder.build()


def spelled(tree: DraftTree) -> list[tuple[int, ...]]:
    """The tokens from the root, which is left out, to every other node."""
    paths: list[tuple[int, ...]] = [()]
    nodes = zip(tree.parents, tree.tokens, strict=True)
    for parent, token_id in itertools.islice(nodes, 1, None):
        paths.append((*paths[parent], token_id))
    return paths[1:]


def verified(tree: DraftTree, chosen: Sequence[int], new_ids: Sequence[int]) -> Verified:
    """A step in which the target likes those tokens best, one after each node."""
    logits_NV = torch.nn.functional.one_hot(torch.tensor(chosen), VOCAB).float()
    return Verified(tree, (0,), tuple(new_ids), logits_NV)


def learnt(drafter: OuroborosDrafter, token_id: int) -> list[tuple[int, ...]]:
    return list(drafter._learnt.behind(token_id))


def test_a_full_pool_forgets_the_phrase_that_was_not_seen_for_longest() -> None:
    pool = PhrasePool(capacity=2, length=2)
    for phrase in ([1, 1], [2, 2], [1, 1, 9], [3, 3]):
        pool.add(7, phrase)
    assert pool.behind(7) == [(3, 3), (1, 1)]
    assert pool.behind(8) == ()


def test_the_beginning_of_a_phrase_is_the_phrase_and_one_that_goes_on_replaces_it() -> None:
    pool = PhrasePool(capacity=9, length=4)
    for phrase in ([1, 2], [5], [1, 2, 3], [1], []):
        pool.add(7, phrase)
    assert pool.behind(7) == [(1, 2, 3), (5,)]


phrases = st.lists(st.integers(0, 2), max_size=5)


@brief
@given(added=st.lists(st.tuples(st.integers(0, 1), phrases)), capacity=st.integers(1, 3))
def test_a_pool_holds_the_newest_phrases_none_of_them_the_beginning_of_another(
    added: list[tuple[int, list[int]]], capacity: int
) -> None:
    pool = PhrasePool(capacity=capacity, length=3)
    for token_id, phrase in added:
        pool.add(token_id, phrase)
        known = pool.behind(token_id)
        assert len(known) <= capacity
        assert all(0 < len(old) <= 3 for old in known)
        assert not phrase or list(known[0][: len(phrase)]) == phrase[:3]
        for one, other in itertools.permutations(known, 2):
            assert one != other[: len(one)]


@brief
@given(text=st.lists(st.integers(0, 3), max_size=30), capacity=st.integers(1, 4))
def test_a_text_fills_a_pool_with_its_latest_phrases(text: list[int], capacity: int) -> None:
    pool = PhrasePool(capacity=capacity, length=3)
    pool.add_text(text)
    for token_id in range(4):
        places = [place for place in range(len(text) - 1) if text[place] == token_id]
        whole = [tuple(text[place + 1 : place + 4]) for place in reversed(places)]
        assert list(pool.behind(token_id)) == list(dict.fromkeys(whole))[:capacity]


def test_phrases_are_what_the_target_says_wherever_it_agrees_with_a_draft() -> None:
    """Behind 10 it wants 11, which was rejected; what it says behind it is a phrase all the same.

    0: 10 - 1: 20 (rejected) - 2: 21 (agreed) - 3: 22 (agreed) - 4: 23 (not agreed)
          - 5: 30 (rejected) - 6: 31 (not agreed)
    """
    tree = DraftTree((10, 20, 21, 22, 23, 30, 31), (-1, 0, 1, 2, 3, 0, 5), (0,) + (1,) * 6)
    chosen = [11, 21, 22, 50, 51, 52, 53]
    drafter = build(length=3)
    drafter.observe([10], None)
    drafter.observe([11], verified(tree, chosen, [11]))
    assert learnt(drafter, 20) == [(21, 22, 50)]
    assert learnt(drafter, 21) == [(22, 50)]
    assert learnt(drafter, 10) == [(11,)]  # as it was written
    assert [learnt(drafter, token_id) for token_id in (22, 23, 30, 31)] == [[]] * 4


def test_phrases_of_the_answer_grow_with_it_over_the_end_of_the_prompt() -> None:
    drafter = build([1, 2, 3], length=3)
    for new_ids in ([4], [5, 6], [2]):
        drafter.observe(new_ids, None)
    assert learnt(drafter, 2) == [(3, 4, 5)]
    assert learnt(drafter, 4) == [(5, 6, 2)]
    assert learnt(drafter, 6) == [(2,)]
    drafter.observe([8], None)
    assert learnt(drafter, 2) == [(8,), (3, 4, 5)]


def test_what_was_learnt_comes_before_what_the_prompt_holds() -> None:
    drafter = build([5, 1, 1, 1, 5, 2, 2, 2], length=3, phrases=2)
    drafter.observe([5, 3, 3, 3, 9], None)
    known = [path for path in spelled(drafted(drafter, 5)) if len(path) == 3]
    assert known[:2] == [(3, 3, 3), (2, 2, 2)]
    assert (1, 1, 1) not in known


def test_phrases_hang_behind_the_deepest_node() -> None:
    """The newest phrase ends in 8, behind which two phrases are known, and a third is too many."""
    drafter = build(length=3, phrases=2)
    drafter.observe([8, 40, 8, 41, 42, 43, 8, 44, 45, 46], None)
    drafter.observe([7, 6, 5, 8], None)
    paths = spelled(drafted(drafter, 7))
    longest = {path for path in paths if len(path) == 6}
    assert longest == {(6, 5, 8, 44, 45, 46), (6, 5, 8, 41, 42, 43)}
    assert (6, 5, 8, 40) not in paths


@brief
@given(prompt=st.lists(st.integers(0, 9), min_size=20, max_size=60), max_nodes=st.integers(1, 32))
def test_drafts_keep_to_the_budget_and_smaller_ones_begin_larger_ones(
    prompt: list[int], max_nodes: int
) -> None:
    drafter = build(prompt)
    drafter.observe(prompt[:1], None)
    tree, largest = drafted(drafter, prompt[0], max_nodes), drafted(drafter, prompt[0], 32)
    assert len(tree) == min(max_nodes, len(largest)) <= 32
    assert tree.tokens == largest.tokens[: len(tree)]
    assert tree.parents == largest.parents[: len(tree)]


def test_recycled_tokens_leave_room_for_phrases() -> None:
    """Each token has eight followers, enough for any tree; a third of it is theirs."""
    drafter = build(length=3, phrases=1)
    tree = DraftTree(tuple(range(10)), (-1, *range(9)), (0,) * 10)
    logits_NV = torch.zeros(10, VOCAB)
    logits_NV[:, :8] = 1.0
    drafter.observe([3, 2, 1, 0], Verified(tree, (0,), (3, 2, 1, 0), logits_NV))
    found = drafted(drafter, 3)
    assert (2, 1, 0) in spelled(found)
    assert 1 + 3 < len(found) <= 1 + 3 + 32 // 3 + 3


@pytest.mark.parametrize(("history", "expected"), [(True, [(6, 5, 4)]), (False, [])])
def test_phrases_outlive_a_request_where_that_is_wanted(
    history: bool, expected: list[tuple[int, ...]]
) -> None:
    drafter = build([1, 2, 3], length=3, history=history)
    drafter.observe([7, 6, 5, 4], None)
    drafter.begin(DraftRequest([2, 9], SamplingParams()))
    assert learnt(drafter, 7) == expected
    assert list(drafter._of_prompt.behind(2)) == [(9,)]


@pytest.mark.parametrize("name", ["phrases", "length", "capacity", "width"])
def test_bad_settings_are_named(name: str) -> None:
    wrong: dict[str, Any] = {name: 0}
    with pytest.raises(InputError, match=f"drafter.{name}=0 must be at least 1"):
        OuroborosConfig(**wrong)
