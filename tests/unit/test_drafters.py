"""Guarantees of drafters: what they continue, what they learn, a broken one does no harm."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from apb.errors import InputError
from apb.plugins import PLUGINS
from apb.speculate.base import Drafter, DrafterConfig, Verified
from apb.speculate.control import ControllerKind, MeasuredController, StepReport
from apb.speculate.hybrid import HybridConfig
from apb.speculate.lookup import LookupConfig
from apb.speculate.recycling import RecyclingConfig
from apb.speculate.speculator import Speculator
from apb.speculate.suffix import SuffixConfig
from apb.speculate.tree import DraftTree, TreeBuilder

PROMPT = [5, 6, 7, 8, 9, 1, 6, 7, 3, 2, 6, 7, 3]


def drafted(drafter: Drafter, last: int, max_nodes: int = 16) -> DraftTree:
    builder = TreeBuilder(last, max_nodes=max_nodes)
    drafter.extend_tree(builder, source=1)
    return builder.build()


def begun(config: DrafterConfig, new_ids: Sequence[int]) -> Drafter:
    drafter = config.build_drafter()
    assert drafter is not None
    drafter.begin(PROMPT)
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
    drafter.observe([30, 7], Verified(tree, (0, 1), 7, torch.empty(0), logits_NV))
    assert drafted(drafter, 7, max_nodes=4).tokens == (7, 30, 33, 31)


def test_hybrid_fills_up_with_recycled_tokens() -> None:
    tree = drafted(begun(HybridConfig(factor=1.0), [4, 6, 7]), 7)
    assert set(tree.sources) == {0, 1, 2}
    assert tree.sources == tuple(sorted(tree.sources))


@pytest.mark.parametrize("name", sorted(set(PLUGINS["drafter"]) - {"none"}))
def test_budget_is_kept(name: str) -> None:
    drafter = begun(PLUGINS["drafter"][name](), [6, 7])
    for max_nodes in (1, 2, 5, 64):
        assert len(drafted(drafter, 7, max_nodes)) <= max_nodes


def test_a_million_tokens_are_indexed_within_bounds() -> None:
    """Text of few words with long repeats, the hard case; a loose bound on a shared machine."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 2000, (100_000,), generator=generator).tolist()
    started = time.process_time()
    drafter = SuffixConfig().build_drafter()
    drafter.begin(words * 10)
    assert time.process_time() - started < 20
    drafter.observe(words[50:60], None)
    assert words[60] in drafted(drafter, words[59]).tokens[1:]


class _Failing(Drafter):
    def __init__(self, where: str) -> None:
        self._where = where

    def begin(self, prompt_ids: Sequence[int]) -> None:
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

    def build_drafter(self) -> Drafter:
        return _Failing(self.where)


@pytest.mark.parametrize("where", ["begin", "extend_tree", "observe"])
def test_a_drafter_that_fails_is_dropped_with_a_warning(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    speculator = Speculator(_FailingConfig(where=where))
    speculator.begin(PROMPT)
    with caplog.at_level(logging.WARNING):
        speculator.first(5)
        assert speculator.propose(5, room=9) == DraftTree.of_root(5)
    assert ["without it" in record.message for record in caplog.records] == [True]
    assert speculator.propose(6, room=9) == DraftTree.of_root(6)


def feed(controller: MeasuredController, accepted: int, per_node_s: float, steps: int) -> None:
    """Steps whose trees hold a path of that many nodes first."""
    for _ in range(steps):
        allowed = controller.max_nodes()
        path = range(min(allowed, accepted + 1))
        seconds = 1.0 + per_node_s * allowed
        controller.update(StepReport(allowed, allowed, path, seconds))


@pytest.mark.parametrize(
    ("accepted", "per_node_s", "expected"), [(0, 0.1, 1), (31, 0.01, 32), (3, 0.1, 4)]
)
def test_measured_controller_finds_the_best_size_and_follows_a_change(
    accepted: int, per_node_s: float, expected: int
) -> None:
    controller = MeasuredController(32)
    feed(controller, 31, 0.0, 40)
    feed(controller, accepted, per_node_s, 160)
    sizes = [controller.max_nodes() for _ in range(16)]
    assert sizes.count(expected) >= 14


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


def test_controllers_can_be_named() -> None:
    assert {kind.value for kind in ControllerKind} == {"fixed", "measured"}
