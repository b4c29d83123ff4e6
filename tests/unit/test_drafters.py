"""Guarantees of drafters: what they continue, what they learn, a broken one does no harm."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apb.errors import InputError
from apb.plugins import PLUGINS
from apb.sampling import SamplingParams
from apb.speculate.base import Drafter, DrafterConfig, DraftRequest, DraftTarget, Verified
from apb.speculate.control import MeasuredController, StepReport
from apb.speculate.hybrid import HybridConfig, Worth
from apb.speculate.lookup import LookupConfig
from apb.speculate.recycling import RecyclingConfig
from apb.speculate.speculator import Speculator
from apb.speculate.suffix import SuffixConfig
from apb.speculate.tree import Claim, DraftTree, TreeBuilder
from models import draft_target

GREEDY = SamplingParams()
TARGET = draft_target("llama")
PROMPT = [5, 6, 7, 8, 9, 1, 6, 7, 3, 2, 6, 7, 3]


def drafted(drafter: Drafter, last: int, max_nodes: int = 16) -> DraftTree:
    builder = TreeBuilder(last, max_nodes=max_nodes)
    drafter.extend_tree(builder, source=1)
    return builder.build()


def begun(config: DrafterConfig, new_ids: Sequence[int]) -> Drafter:
    drafter = config.build_drafter(TARGET)
    assert drafter is not None
    drafter.begin(DraftRequest(PROMPT, GREEDY))
    drafter.observe(new_ids, None)
    return drafter


def chains(tree: DraftTree) -> set[tuple[int, ...]]:
    """Token by token from the root to each leaf."""
    leaves = set(range(len(tree))) - set(tree.parents)
    spelled = set()
    for node in leaves:
        path: list[int] = []
        while node > 0:
            path.insert(0, tree.tokens[node])
            node = tree.parents[node]
        spelled.add(tuple(path))
    return spelled


def test_lookup_copies_from_the_latest_place() -> None:
    tree = drafted(begun(LookupConfig(length=2), [6, 7]), 7)
    assert chains(tree) == {(3, 6)}


def test_suffix_prefers_what_followed_most_often_and_reaches_as_far_as_the_match_bears() -> None:
    tree = drafted(begun(SuffixConfig(factor=1.0), [4, 6, 7]), 7)
    assert tree.tokens[1] == 3
    assert chains(tree) == {(3, 2), (8, 9)}
    assert chains(drafted(begun(SuffixConfig(min_match=3), [4, 6, 7]), 7)) == {()}


def test_suffix_continues_the_answer_itself() -> None:
    answer = [40, 41, 42, 43, 40, 41]
    assert (42, 43, 40, 41) in chains(drafted(begun(SuffixConfig(), answer), 41))


def test_recycling_proposes_what_the_target_ranked_behind_a_token() -> None:
    drafter = begun(RecyclingConfig(width=2), [7])
    assert {chain[0] for chain in chains(drafted(drafter, 7))} == {3, 8}
    logits_NV = torch.zeros(2, 50)
    logits_NV[0, [30, 31]] = torch.tensor([2.0, 1.0])
    logits_NV[1, [32, 33]] = torch.tensor([1.0, 2.0])
    tree = DraftTree((7, 30), (-1, 0), (0, 1))
    drafter.observe([30, 7], Verified(tree, (0, 1), (30, 7), logits_NV))
    assert drafted(drafter, 7, max_nodes=4).tokens == (7, 30, 33, 31)


def test_hybrid_takes_what_each_drafter_would_have_proposed_alone() -> None:
    alone = [
        chains(drafted(begun(config, [4, 6, 7]), 7))
        for config in (SuffixConfig(factor=1.0), RecyclingConfig())
    ]
    tree = drafted(begun(HybridConfig(factor=1.0), [4, 6, 7]), 7)
    prefixes = {chain[:stop] for chain in chains(tree) for stop in range(len(chain) + 1)}
    assert alone[0] | alone[1] <= prefixes
    assert set(tree.sources) == {0, 1, 2}


def worth_after(rates: dict[bool, float], steps: int) -> list[bool]:
    """Choices over steps of one second that yield so many tokens with and without."""
    now = [0.0]
    worth, choices = Worth(lambda: now[0]), []
    for _ in range(steps):
        choices.append(worth.try_it(True))
        now[0] += 1.0
        worth.emitted(round(100 * rates[choices[-1]]))
    return choices


def test_hybrid_asks_its_head_where_that_has_paid() -> None:
    for better in (False, True):
        choices = worth_after({better: 2.0, not better: 1.0}, 240)
        assert {False, True} <= set(choices[:3])
        assert choices[120:].count(better) == 110  # and tries the other one step in twelve


def test_hybrid_leaves_out_steps_in_which_the_head_may_not_be_asked() -> None:
    now = [0.0]
    worth = Worth(lambda: now[0])
    for may in (True, False, True, False) * 20:
        worth.try_it(may)
        now[0] += 1.0 if may else 1000.0
        worth.emitted(1)
    assert sum(worth._seconds) < 41


def test_repeats_beyond_what_is_sorted_are_continued_in_one_piece() -> None:
    """Of two long repeats that differ late, each token is followed by what really followed it."""
    text = [*range(100, 190), 1, *range(100, 190), 2]
    drafter = SuffixConfig(factor=9.0).build_drafter(TARGET)
    drafter.begin(DraftRequest(text, GREEDY))
    drafter.observe([*range(100, 140)], None)
    tree = drafted(drafter, 139, max_nodes=64)
    assert tree.is_chain
    assert tree.tokens[1:] == tuple(range(140, 172))


@pytest.mark.parametrize("name", ["hybrid", "lookup"])
def test_a_million_tokens_are_indexed_within_bounds(name: str) -> None:
    """Text of few words with long repeats, the hard case; a loose bound on a shared machine."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 2000, (100_000,), generator=generator).tolist()
    started = time.process_time()
    drafter = PLUGINS["drafter"][name]().build_drafter(TARGET)
    drafter.begin(DraftRequest(words * 10, GREEDY))
    assert time.process_time() - started < 20
    drafter.observe(words[50:60], None)
    assert words[60] in drafted(drafter, words[59]).tokens[1:]


class _Failing(Drafter):
    def __init__(self, where: str) -> None:
        self._where = where

    def begin(self, request: DraftRequest) -> None:
        self._fail("begin")

    def extend_tree(self, tree: TreeBuilder, *, source: int) -> None:
        tree.add(0, 3, source=source)
        self._fail("extend_tree")

    def observe(self, new_ids: Sequence[int], verified: Verified | None) -> None:
        self._fail("observe")

    def _fail(self, where: str) -> None:
        if where == self._where:
            raise KeyError("no luck")


@dataclass(kw_only=True, slots=True)
class _FailingConfig(DrafterConfig):
    where: str = "begin"

    def build_drafter(self, target: DraftTarget) -> Drafter:
        return _Failing(self.where)


@pytest.mark.parametrize("where", ["begin", "extend_tree", "observe"])
def test_a_drafter_that_fails_is_dropped_with_a_warning(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    speculator = Speculator(_FailingConfig(where=where), TARGET)
    speculator.begin(PROMPT, GREEDY)
    with caplog.at_level(logging.WARNING):
        for token_id in range(2000):
            speculator.first(token_id)
            assert speculator.propose(token_id, room=9) == DraftTree.of_root(token_id)
            if caplog.records:
                break
            time.sleep(0.01)
    assert ["without it" in record.message for record in caplog.records] == [True]


class _Slow(Drafter):
    """Prepares until it is told to stop, and remembers what it was told."""

    def __init__(self) -> None:
        self.prepared, self.seen = threading.Event(), list[int]()

    def begin(self, request: DraftRequest) -> None:
        assert self.prepared.wait(60)

    def extend_tree(self, tree: TreeBuilder, *, source: int) -> None:
        tree.add(0, 3, source=source)

    def observe(self, new_ids: Sequence[int], verified: Verified | None) -> None:
        self.seen += new_ids


@dataclass(kw_only=True, slots=True)
class _SlowConfig(DrafterConfig):
    drafter: _Slow = field(default_factory=_Slow)

    def build_drafter(self, target: DraftTarget) -> Drafter:
        return self.drafter


def test_decoding_does_not_wait_for_a_drafter_that_prepares() -> None:
    config = _SlowConfig()
    speculator = Speculator(config, TARGET)
    speculator.begin(PROMPT, GREEDY)
    for token_id in (4, 5):
        speculator.first(token_id)
        assert speculator.propose(token_id, room=9) == DraftTree.of_root(token_id)
    config.drafter.prepared.set()
    while len(speculator.propose(5, room=9)) == 1:
        time.sleep(0.01)
    speculator.first(6)
    assert config.drafter.seen == [4, 5, 6]


def report(allowed: int, num_nodes: int, path: Sequence[int], seconds: float) -> StepReport:
    chain = TreeBuilder(0, max_nodes=num_nodes)
    chain.add_path([0] * (num_nodes - 1), source=1)
    return StepReport(allowed, num_nodes, path, seconds, 0.0, chain.build(), [0] * len(path))


def feed(controller: MeasuredController, accepted: int, per_node_s: float, steps: int) -> None:
    """Steps whose trees hold a path of that many nodes first."""
    for _ in range(steps):
        allowed = controller.max_nodes()
        path = range(min(allowed, accepted + 1))
        seconds = 1.0 + per_node_s * allowed
        controller.update(report(allowed, allowed, path, seconds))


@pytest.mark.parametrize(
    ("accepted", "per_node_s", "expected"), [(0, 0.1, 1), (31, 0.01, 32), (3, 0.1, 4)]
)
@pytest.mark.parametrize("before", [0, 31])
def test_measured_controller_finds_the_best_size_and_follows_a_change(
    before: int, accepted: int, per_node_s: float, expected: int
) -> None:
    controller = MeasuredController(32)
    feed(controller, before, 0.1 if before == 0 else 0.0, 80)
    feed(controller, accepted, per_node_s, 120)
    sizes = []
    for _ in range(16):
        sizes.append(controller.max_nodes())
        feed(controller, accepted, per_node_s, 0)
    assert sizes.count(expected) >= 14


@given(data=st.data(), num_nodes=st.integers(2, 40), allowed=st.integers(2, 16))
def test_measured_controller_learns_what_each_smaller_tree_would_have_yielded(
    data: st.DataObject, num_nodes: int, allowed: int
) -> None:
    """Also where several drafters have added nodes, and those sent are picked from among them."""
    pool = TreeBuilder(0, max_nodes=num_nodes)
    for token_id in range(1, num_nodes):  # a token says which node of the pool it is
        share = data.draw(st.sampled_from([0.1, 0.4, 0.5, 1.0]))
        parent = data.draw(st.integers(0, token_id - 1))
        pool.add(parent, token_id, source=data.draw(st.integers(1, 3)), claim=Claim(share))
    drafted, controller = pool.build(), MeasuredController(16)
    end, truth = data.draw(st.integers(0, num_nodes - 1)), set[int]()
    while end >= 0:
        truth.add(end)
        end = drafted.parents[end]
    sent = controller.choose(drafted, allowed)
    path = [node for node, token_id in enumerate(sent.tokens) if token_id in truth]
    controller.max_nodes()
    controller.update(StepReport(allowed, len(sent), path, 1.0, 0.0, drafted, path[1:]))
    for size in (1, 2, 4, 8, 16):
        if size <= allowed:
            smaller = controller.choose(drafted, size)
            assert controller._yields[size].value == len(truth & set(smaller.tokens))


def test_a_quote_is_noticed_within_a_few_steps() -> None:
    controller = MeasuredController(32)
    feed(controller, 0, 0.1, 80)
    feed(controller, 31, 0.1, 24)
    assert controller.max_nodes() == 32


def test_steps_without_a_draft_do_not_turn_drafting_off() -> None:
    controller = MeasuredController(32)
    for _ in range(100):
        controller.update(report(controller.max_nodes(), 1, [0], 1.0))
    assert controller.max_nodes() == 32


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        (SuffixConfig, {"min_match": 0}, "drafter.min_match=0"),
        (SuffixConfig, {"factor": 0.0}, "drafter.factor=0.0"),
        (LookupConfig, {"min_match": 4}, "drafter.min_match=4"),
        (LookupConfig, {"length": 0}, "drafter.length=0"),
        (RecyclingConfig, {"width": 0}, "drafter.width=0"),
        (HybridConfig, {"width": 0}, "drafter.width=0"),
        (HybridConfig, {"max_nodes": 65}, "drafter.max_nodes=65 must lie between 1 and 64"),
        (LookupConfig, {"max_nodes": 0}, "drafter.max_nodes=0"),
    ],
)
def test_bad_settings_are_named(
    config: type[DrafterConfig], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        config(**settings)
