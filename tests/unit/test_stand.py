"""Guarantees of the STAND drafter: what it learns, how it draws, and that its answers are exact."""

from __future__ import annotations

import itertools
import math
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apb.errors import InputError
from apb.sampling import Sampler, SamplingParams, filtered_probs, new_generator
from apb.speculate.base import DrafterConfig, DraftRequest, DraftTarget, Verified
from apb.speculate.control import ControllerKind
from apb.speculate.speculator import Speculator
from apb.speculate.stand import StandConfig, StandDrafter, best_slots
from apb.speculate.tree import DraftTree, ProposalKind, TreeBuilder
from apb.speculate.verify import OneHotVerifier, RecursiveVerifier, Verifier, VerifierKind
from enumeration import Course, distribution
from models import draft_target

VOCAB = 4
PROMPT = (3, 1, 2)
GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, seed=7)
DRAWS = 2000


def begun(params: SamplingParams, *, width: int = 10, max_order: int = 3) -> StandDrafter:
    drafter = StandDrafter(width=width, max_order=max_order)
    drafter.begin(DraftRequest(PROMPT, params))
    return drafter


def verified(tree: DraftTree, probs: Sequence[Sequence[float]]) -> Verified:
    """A step that accepted nothing, with those probabilities at temperature 1."""
    return Verified(tree, (0,), (0,), torch.tensor(probs).log())


def informed(params: SamplingParams, *, vocab: int = VOCAB, drafter: StandDrafter) -> StandDrafter:
    """Knows something of what follows each token."""
    drafter.begin(DraftRequest(PROMPT, params))
    generator = torch.Generator().manual_seed(0)
    for token_id in range(vocab):
        drafter.observe([token_id], None)
        logits_NV = torch.randn(1, vocab, generator=generator)
        drafter.observe([0], Verified(DraftTree.of_root(token_id), (0,), (0,), logits_NV))
    return drafter


def drafted(drafter: StandDrafter, max_nodes: int) -> DraftTree:
    builder = TreeBuilder(0, max_nodes=max_nodes)
    drafter.extend_tree(builder, source=1)
    return builder.build()


def test_distributions_of_all_nodes_are_averaged_and_the_longest_ngram_counts() -> None:
    drafter = begun(SamplingParams(temperature=1.0))
    drafter.observe([0], None)
    tree = DraftTree((0, 1, 3, 3), (-1, 0, 1, 0), (0, 1, 1, 1))
    rows = [[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1]]
    drafter.observe([2], verified(tree, rows))
    for node, context in enumerate([(1, 2, 0), (2, 0, 1), (0, 1, 3), (2, 0, 3)]):
        assert drafter.followers(context) == pytest.approx(dict(enumerate(rows[node])))
    drafter.observe([0], None)
    drafter.observe([0], verified(DraftTree.of_root(0), [[0.4, 0.3, 0.2, 0.1]]))
    mean = {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25}
    assert drafter.followers((3, 3, 0)) == pytest.approx(mean)
    assert drafter.followers((3, 2, 0)) == pytest.approx(mean)
    assert drafter.followers((0, 2, 0)) == pytest.approx({0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1})
    drafter.observe([2, 0], None)
    drafter.observe([0], verified(DraftTree.of_root(0), [[0.1, 0.6, 0.2, 0.1]]))
    third = {0: 0.6 / 3, 1: 1.1 / 3, 2: 0.7 / 3, 3: 0.6 / 3}
    assert drafter.followers((0,)) == pytest.approx(third)
    assert drafter.followers((2,)) == {}


def test_a_request_begins_with_an_empty_table() -> None:
    drafter = informed(SAMPLED, drafter=begun(SAMPLED))
    assert len(drafted(drafter, 9)) == 9
    drafter.begin(DraftRequest(PROMPT, SAMPLED))
    assert len(drafted(drafter, 9)) == 1


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0, top_p=0.7),
        SamplingParams(temperature=1.0, top_k=2),
        SamplingParams(temperature=1.0, top_k=5),
    ],
    ids=str,
)
def test_what_is_learned_is_the_distribution_that_is_sampled_from(params: SamplingParams) -> None:
    drafter = begun(params, width=VOCAB)
    logits_V = torch.tensor([0.5, 2.0, -1.0, 1.0])
    drafter.observe([0], Verified(DraftTree.of_root(2), (0,), (0,), logits_V[None]))
    found = drafter.followers((2,))
    expected_V = filtered_probs(logits_V, params)
    assert set(found) == set(expected_V.nonzero().flatten().tolist())
    for token_id, prob in found.items():
        assert prob / sum(found.values()) == pytest.approx(float(expected_V[token_id]), abs=1e-6)


def test_the_widest_memory_keeps_the_likeliest() -> None:
    drafter = begun(SamplingParams(temperature=1.0), width=2)
    drafter.observe([0], verified(DraftTree.of_root(2), [[0.1, 0.2, 0.3, 0.4]]))
    assert drafter.followers((2,)) == pytest.approx({3: 0.4, 2: 0.3})
    drafter.observe([2], None)
    drafter.observe([0], verified(DraftTree.of_root(2), [[0.5, 0.3, 0.1, 0.1]]))
    assert drafter.followers((2,)) == pytest.approx({0: 0.25, 3: 0.2})


def test_greedy_drafts_are_the_likeliest_paths() -> None:
    drafter = begun(GREEDY)
    drafter.observe([0], None)
    rows = [[0.1, 0.6, 0.25, 0.05], [0.1, 0.1, 0.1, 0.7], [0.3, 0.3, 0.2, 0.2]]
    tree = DraftTree((0, 1, 2), (-1, 0, 0), (0, 1, 1))
    drafter.observe([0], verified(tree, rows))
    tree = drafted(drafter, 5)
    assert tree.proposals == {}
    # 1: 0.6, then 3 behind it: 0.42, 2: 0.25, 0: 0.1; (0) itself is known, 0 0 1 comes to less.
    assert (tree.tokens, tree.parents) == ((0, 1, 3, 2, 0), (-1, 0, 1, 0, 0))


def test_draws_follow_the_probabilities_without_replacement() -> None:
    drafter = begun(SAMPLED)
    probs = [0.5, 0.3, 0.15, 0.05]
    found = Counter(tuple(drafter.draw_order(torch.tensor(probs))) for _ in range(DRAWS))
    for order in itertools.permutations(range(VOCAB)):
        expected, left = 1.0, 1.0
        for index in order:
            expected *= probs[index] / left
            left = max(left - probs[index], 1e-9)
        assert abs(found[order] - DRAWS * expected) <= 5 * math.sqrt(DRAWS * expected)


@settings(max_examples=25, deadline=None)
@given(small=st.integers(1, 30), large=st.integers(1, 30), seed=st.integers(0, 99))
def test_a_smaller_budget_gives_the_same_tree_cut_short(small: int, large: int, seed: int) -> None:
    """So its shape depends on nothing that is drawn behind, and sizes can be compared by it."""
    params = SamplingParams(temperature=1.0, seed=seed)
    trees = [
        drafted(informed(params, drafter=begun(params)), max_nodes)
        for max_nodes in sorted((small, large))
    ]
    short, long = trees
    assert long.tokens[: len(short)] == short.tokens
    assert long.parents[: len(short)] == short.parents
    for node, proposal in short.proposals.items():
        assert long.proposals[node].first(len(proposal.drawn)).drawn == proposal.drawn


def test_the_shape_is_fixed_before_anything_is_drawn() -> None:
    shapes, tokens = set(), set()
    for seed in range(30):
        params = SamplingParams(temperature=1.0, seed=seed)
        tree = drafted(informed(params, drafter=begun(params)), 20)
        assert len(tree) == 20
        assert {proposal.kind for proposal in tree.proposals.values()} == {
            ProposalKind.without_replacement
        }
        shapes.add(tree.parents)
        tokens.add(tree.tokens)
    assert len(shapes) == 1
    assert len(tokens) == 30


def test_slots_come_in_the_order_of_their_worth() -> None:
    """Per draw 0.6, and 0.35 of that for each one before it below the same node."""
    best = [(0,), (0, 0), (0, 0, 0), (1,), (0, 0, 0, 0)]
    assert list(best_slots(5, width=10)) == best
    assert list(best_slots(5, width=1)) == [(0,) * depth for depth in range(1, 6)]


@settings(max_examples=40, deadline=None)
@given(count=st.integers(0, 63), width=st.integers(1, 10))
def test_slots_come_after_what_they_hang_from(count: int, width: int) -> None:
    slots = list(best_slots(count, width=width))
    assert len(set(slots)) == len(slots) == count
    for place, slot in enumerate(slots):
        *above, rank = slot
        assert rank < width
        assert not above or tuple(above) in slots[:place]
        assert rank == 0 or (*above, rank - 1) in slots[:place]


def test_drafts_are_not_drawn_with_the_numbers_that_test_them() -> None:
    """With the same numbers the two agree in three of four seeds."""
    agreed, num_seeds = 0, 400
    for seed in range(num_seeds):
        params = SamplingParams(temperature=1.0, seed=seed)
        drawn = begun(params).draw_order(torch.tensor([0.5, 0.5]))
        agreed += Sampler(params).bernoulli(0.5) == bool(drawn[0])
    assert abs(agreed - num_seeds / 2) <= 5 * math.sqrt(num_seeds / 4)


def test_a_seed_repeats_the_drafts() -> None:
    first, again, other, fresh = (
        drafted(informed(params, drafter=begun(params)), 16)
        for params in (
            SAMPLED,
            SAMPLED,
            SamplingParams(temperature=0.8, seed=8),
            SamplingParams(temperature=0.8),
        )
    )
    assert first.tokens == again.tokens
    assert len({first.tokens, other.tokens, fresh.tokens}) == 3
    for seed in (0, 7, 2**40):
        streams = [new_generator(seed, stream=stream) for stream in ("", "stand", "other")]
        drawn = {tuple(torch.rand(4, generator=stream).tolist()) for stream in streams}
        assert len(drawn) == 3


class EnumeratedStand(StandDrafter):
    """Draws on the course."""

    course: Course

    def draw_order(self, probs_K: Tensor) -> list[int]:
        weights, order = probs_K.tolist(), list[int]()
        while any(weights):
            order.append(self.course.choose(weights))
            weights[order[-1]] = 0.0
        return order


def target_logits(prefix: tuple[int, ...]) -> Tensor:
    seed = sum((token_id + 2) * 31**place for place, token_id in enumerate(prefix))
    return torch.randn(3, generator=torch.Generator().manual_seed(seed)) * 1.5


@pytest.mark.parametrize(
    "verifier", [RecursiveVerifier(), OneHotVerifier()], ids=lambda one: type(one).__name__
)
def test_answers_have_exactly_the_distribution_of_plain_sampling(verifier: Verifier) -> None:
    """The very drafter, enumerated: its shape must not depend on what it draws (E8)."""
    params = SamplingParams(temperature=0.9, top_p=0.95)
    drafter = EnumeratedStand(width=3, max_order=2)
    informed(params, vocab=3, drafter=drafter)

    def step(course: Course) -> tuple[int, ...]:
        drafter.course = course
        tree = drafted(drafter, 4)
        spelled: list[tuple[int, ...]] = [()]
        for token_id, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True):
            spelled.append((*spelled[parent], token_id))
        logits_NV = torch.stack([target_logits(prefix) for prefix in spelled])
        walk = verifier.walk(tree, logits_NV, course)
        assert walk.token_id is not None
        return (*spelled[walk.path[-1]], walk.token_id)

    found: dict[tuple[int, ...], float] = defaultdict(float)
    for answer, chance in distribution(step, params).items():
        completed = [(answer[:2], chance)]
        if len(answer) == 1:
            probs = filtered_probs(target_logits(answer), params).tolist()
            completed = [((*answer, second), chance * p) for second, p in enumerate(probs)]
        for whole, share in completed:
            found[whole] += share
    for first, second in itertools.product(range(3), repeat=2):
        expected = filtered_probs(target_logits(()), params)[first]
        expected = expected * filtered_probs(target_logits((first,)), params)[second]
        assert abs(found[first, second] - float(expected)) < 1e-6


def answer_of(speed: random.Random, params: SamplingParams, config: DrafterConfig) -> list[int]:
    """Of a toy target whose steps take that long."""
    speculator, sampler = Speculator(config, draft_target("llama")), Sampler(params)
    speculator.begin(PROMPT, params)
    answer = [0]
    speculator.first(0)
    while len(answer) < 80:
        tree = speculator.propose(answer[-1], room=99)
        logits_NV = torch.stack([target_logits((token_id,)) for token_id in tree.tokens])
        walk = speculator.verifier.walk(tree, logits_NV, sampler)
        assert walk.token_id is not None
        new_ids = (*(tree.tokens[node] for node in walk.path[1:]), walk.token_id)
        seconds = len(tree) ** speed.uniform(0.0, 2.0)
        verified = Verified(tree, walk.path, new_ids, logits_NV)
        speculator.observe(verified, started=time.perf_counter() - seconds)
        answer += new_ids
    return answer[:80]


@pytest.mark.parametrize("verifier", [VerifierKind.auto, VerifierKind.onehot])
def test_a_seed_repeats_the_answer_however_long_steps_take(verifier: VerifierKind) -> None:
    """Sizes of trees follow what was measured, unless that would change a seeded answer."""
    config = StandConfig(verifier=verifier, controller=ControllerKind.measured)
    params = SamplingParams(temperature=1.0, seed=3)
    first, *others = (answer_of(random.Random(run), params, config) for run in range(4))
    assert others == [first] * 3


class SlowStand(StandDrafter):
    """Prepares until it is told to stop, and writes down what it is asked."""

    def __init__(self, prepare: Callable[[], object]) -> None:
        super().__init__(width=10, max_order=3)
        self._prepare, self.asked = prepare, list[str]()

    def begin(self, request: DraftRequest) -> None:
        self._prepare()
        super().begin(request)
        self.asked.append("begin")

    def observe(self, new_ids: Sequence[int], verified: Verified | None) -> None:
        self.asked.append(f"observe {new_ids}")

    def extend_tree(self, tree: TreeBuilder, *, source: int) -> None:
        self.asked.append("extend_tree")


@dataclass(kw_only=True, slots=True)
class SlowConfig(DrafterConfig):
    drafter: SlowStand

    def build_drafter(self, target: DraftTarget) -> SlowStand:
        return self.drafter


def test_seeded_answers_wait_for_the_drafter() -> None:
    drafter = SlowStand(lambda: time.sleep(0.2))
    speculator = Speculator(SlowConfig(drafter=drafter), draft_target("llama"))
    speculator.begin(PROMPT, SAMPLED)
    speculator.first(5)
    speculator.propose(5, room=9)
    assert drafter.asked == ["begin", "observe [5]", "extend_tree"]


def test_a_drafter_that_was_late_hears_all_before_it_drafts() -> None:
    prepared = threading.Event()
    drafter = SlowStand(lambda: prepared.wait(60))
    speculator = Speculator(SlowConfig(drafter=drafter), draft_target("llama"))
    speculator.begin(PROMPT, GREEDY)
    speculator.first(5)
    assert len(speculator.propose(5, room=9)) == 1
    prepared.set()
    speculator.wait()
    speculator.propose(5, room=9)
    assert drafter.asked == ["begin", "observe [5]", "extend_tree"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"width": 0}, r"drafter\.width=0"),
        ({"max_order": 0}, r"drafter\.max_order=0"),
        ({"verifier": VerifierKind.kseq}, r"drafter\.verifier=kseq is not exact"),
        ({"verifier": VerifierKind.chain}, r"drafter\.verifier=chain is not exact"),
    ],
)
def test_bad_settings_are_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        StandConfig(**values)
