"""Guarantees of calibrated drafts: claims count as they came true, trees are as large as pays."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apb.speculate.chances import Chances, best_part
from apb.speculate.control import (
    ConfidenceController,
    ExpectedController,
    LengthController,
    StepReport,
    StepTime,
)
from apb.speculate.tree import Claim, DraftTree, TreeBuilder


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    builder = TreeBuilder(0, max_nodes=24)
    for token_id in range(1, draw(st.integers(1, 23))):
        claim = Claim(draw(st.floats(0.0, 1.0)), draw(st.integers(0, 2)))
        parent = draw(st.integers(0, len(builder) - 1))
        builder.add(parent, token_id, source=draw(st.integers(1, 2)), claim=claim)
    return builder.build()


def chain_of(claims: Sequence[Claim], source: int = 1) -> DraftTree:
    builder = TreeBuilder(0, max_nodes=len(claims) + 1)
    builder.add_path(range(1, len(claims) + 1), source=source, claims=claims)
    return builder.build()


@given(trees(), st.lists(st.integers(1, 23), max_size=4), st.integers(1, 30))
def test_the_best_part_is_a_tree_with_the_best_chances(
    tree: DraftTree, emitted: list[int], size: int
) -> None:
    chances = Chances()
    chances.learn(tree, emitted)
    found = chances.of(tree)
    part = best_part(tree, found, size)
    assert len(part) == min(size, len(tree))
    kept = {node for node, token_id in enumerate(tree.tokens) if token_id in part.tokens}
    assert min(found[node] for node in kept) >= max(
        (found[node] for node in range(len(tree)) if node not in kept), default=0.0
    )
    parents = {
        token_id: part.tokens[parent] if parent >= 0 else None
        for token_id, parent in zip(part.tokens, part.parents, strict=True)
    }
    for node in kept - {0}:
        assert parents[tree.tokens[node]] == tree.tokens[tree.parents[node]]


def test_claims_are_worth_how_often_they_came_true() -> None:
    """Per source, kind and height; what nobody could see, behind a rejection, says nothing."""
    chances = Chances()
    tree = chain_of([Claim(0.9, 1), Claim(0.9, 2)])
    for step in range(200):
        chances.learn(tree, [1, 2] if step % 4 == 0 else [1, 9])
    first, second = chances.of(tree)[1:]
    assert first == pytest.approx(1.0, abs=0.02)
    assert second / first == pytest.approx(0.25, abs=0.1)
    assert chances.of(chain_of([Claim(0.9, 2)], source=2))[1] == pytest.approx(0.9)
    assert chances.of(chain_of([Claim(0.5, 2)]))[1] == pytest.approx(0.5)
    before = chances.of(tree)
    chances.learn(tree, [9, 2])
    assert chances.of(tree)[2] / chances.of(tree)[1] == before[2] / before[1]


def run(controller: LengthController, accepted: int, seconds_of: StepTime, steps: int) -> list[int]:
    """Sizes of the trees of some steps, over chains of which so many nodes are accepted."""
    pool = chain_of([Claim(0.6, length.bit_length()) for length in range(1, 32)])
    sizes = []
    for _ in range(steps):
        allowed = controller.max_nodes()
        tree = controller.choose(pool, allowed)
        kept = min(accepted, len(tree) - 1)
        emitted = [*range(1, kept + 1), kept + 1 if kept < accepted else 99]
        report = StepReport(
            allowed=allowed,
            num_nodes=len(tree),
            path=range(len(emitted)),
            seconds=seconds_of.of(len(tree)),
            draft_s=0.0,
            pool=pool,
            emitted=emitted,
        )
        controller.update(report)
        sizes.append(len(tree))
    return sizes


class Linear(StepTime):
    def __init__(self, per_node: float) -> None:
        self._per_node = per_node

    def of(self, size: int) -> float:
        return 1.0 + self._per_node * size


@pytest.mark.parametrize("before", [0, 31])
@pytest.mark.parametrize(
    ("accepted", "per_node", "sizes"), [(0, 0.1, (1, 2)), (31, 0.01, (30, 32)), (3, 0.3, (4, 5))]
)
def test_expected_controller_finds_the_best_size_and_follows_a_change(
    before: int, accepted: int, per_node: float, sizes: tuple[int, int]
) -> None:
    controller = ExpectedController(32)
    run(controller, before, Linear(0.02), 60)
    found = run(controller, accepted, Linear(per_node), 240)[-80:]
    assert sum(sizes[0] <= size <= sizes[1] for size in found) >= 64


def test_confidence_controller_leaves_out_what_is_unlikely() -> None:
    controller = ConfidenceController(32, least=0.3)
    assert run(controller, 3, Linear(0.0), 1) == [3]  # 0.6 ** 2 is above the threshold
    assert run(controller, 3, Linear(0.0), 100)[-1] == 4


def test_step_time_knows_steps_apart_from_lines() -> None:
    """Flat up to eight nodes and steep beyond, as products over few rows are on a CPU."""
    time = StepTime(32)
    for step in range(300):
        size = 1 + step * 7 % 32
        time.add(size, 1.0 if size <= 8 else 3.0)
    assert time.of(4) == pytest.approx(1.0, rel=0.2)
    assert time.of(20) == pytest.approx(3.0, rel=0.2)


def test_a_hiccup_is_no_step_time() -> None:
    time = StepTime(32)
    for step in range(40):
        time.add(4, 50.0 if step == 20 else 1.0)
    assert time.of(4) < 1.2
