"""Guarantees of verifiers: answers have the target's distribution, whatever is drafted (E8).

Exactly: each way in which the drafts and the verifier's choices can fall is taken, by its weight.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apb.errors import InputError
from apb.sampling import Sampler, SamplingParams, filtered_probs
from apb.speculate.tree import DraftTree, Proposal, ProposalKind, TreeBuilder
from apb.speculate.verify import (
    ChainVerifier,
    KSeqVerifier,
    OneHotVerifier,
    RecursiveVerifier,
    Verifier,
    VerifierKind,
    accept,
    build_verifier,
)
from enumeration import Course, distribution

Prefix = tuple[int, ...]
Draft = Callable[[Course], DraftTree]
ONEHOT, IID, WITHOUT = ProposalKind
PLAIN = SamplingParams(temperature=1.0)
WARPED = SamplingParams(temperature=0.7, top_k=3, top_p=0.9)
VERIFIERS = [build_verifier(kind, frozenset()) for kind in VerifierKind if kind.value != "auto"]
PAIRS = [
    pytest.param(verifier, kind, id=f"{type(verifier).__name__}-{kind.name}")
    for verifier in VERIFIERS
    for kind in sorted(verifier.accepts, key=lambda kind: kind.name)
]
DRAWN = [pair for pair in PAIRS if pair.values[1] is not ONEHOT]
VOCAB = 4
SUBSET = (3, 1, 2)
"""Tokens that a drafter with a trimmed head knows, in its own order."""


def logits_of(what: str, prefix: Prefix, size: int = VOCAB) -> Tensor:
    """Of a toy model, which depend on all that came before.

    Its seeds are chosen so that each mistake below shows clearly.
    """
    seed = sum((token_id + 15) * 31**place for place, token_id in enumerate((len(what), *prefix)))
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 1.5


def spelled(tree: DraftTree, node: int) -> Prefix:
    """The tokens from the root, which is left out, to a node."""
    return () if node == 0 else (*spelled(tree, tree.parents[node]), tree.tokens[node])


def emitted(verifier: Verifier, draft: Draft, course: Course) -> Prefix:
    """What a step yields."""
    tree = draft(course)
    logits_NV = torch.stack([logits_of("target", spelled(tree, n)) for n in range(len(tree))])
    walk = verifier.walk(tree, logits_NV, course)
    assert walk.token_id is not None
    return (*(tree.tokens[node] for node in walk.path[1:]), walk.token_id)


def bias(verifier: Verifier, draft: Draft, params: SamplingParams, *, length: int) -> float:
    """The largest error of the probability of any answer of that many tokens.

    Where a step yields fewer, plain sampling goes on; where it yields more, the rest is dropped.
    """

    def target(prefix: Prefix) -> Tensor:
        return filtered_probs(logits_of("target", prefix), params).double()

    after: dict[Prefix, float] = defaultdict(float)
    for answer, chance in distribution(
        lambda course: emitted(verifier, draft, course), params
    ).items():
        after[answer[:length]] += chance
    for short in range(length):
        for prefix in [prefix for prefix in after if len(prefix) == short]:
            chance = after.pop(prefix)
            for token_id, prob in enumerate(target(prefix).tolist()):
                after[*prefix, token_id] += chance * prob
    errors = []
    for answer in itertools.product(range(VOCAB), repeat=length):
        expected = 1.0
        for place, token_id in enumerate(answer):
            expected *= float(target(answer[:place])[token_id])
        errors.append(abs(after[answer] - expected))
    return max(errors)


def draws(course: Course, kind: ProposalKind, q: Sequence[float], count: int) -> list[int]:
    """Indices drawn from q one after the other."""
    weights, drawn = list(q), list[int]()
    for _ in range(count):
        drawn.append(course.choose(weights))
        if kind is WITHOUT:
            weights[drawn[-1]] = 0.0
    return drawn


def propose(
    course: Course, kind: ProposalKind, prefix: Prefix, count: int, subset: Sequence[int] | None
) -> Proposal:
    """Drawn from what a toy drafter takes for likely; its last token never is."""
    size = VOCAB if subset is None else len(subset)
    probs_C = logits_of("drafter", prefix, size).softmax(dim=-1)
    if size > 3:
        probs_C[-1] = 0.0
    probs_C = probs_C / probs_C.sum()
    ids_C = torch.arange(VOCAB) if subset is None else torch.tensor(subset)
    drawn = ids_C[draws(course, kind, probs_C.tolist(), count)].tolist()
    return Proposal(kind, probs_C, tuple(drawn), None if subset is None else ids_C)


def mixed(kind: ProposalKind, counts: tuple[int, int], subset: Sequence[int] | None) -> Draft:
    """Draws below the root and below the first of them, a fixed token below the others."""

    def draft(course: Course) -> DraftTree:
        builder = TreeBuilder(0, max_nodes=12)
        if kind is ONEHOT:
            builder.add_path([1, 2], source=1)
            builder.add_path([3], source=1)
            return builder.build()
        first, *others = builder.add_drawn(
            0, propose(course, kind, (), counts[0], subset), source=1
        )
        prefix = (builder.build().tokens[first],)
        builder.add_drawn(first, propose(course, kind, prefix, counts[1], subset), source=1)
        for other in others:
            builder.add(other, 1, source=2)
        return builder.build()

    return draft


@pytest.mark.parametrize(("verifier", "kind"), PAIRS)
@pytest.mark.parametrize(
    ("params", "subset"),
    [(PLAIN, None), (WARPED, None), (WARPED, SUBSET)],
    ids=["plain", "warped", "warped-subset"],
)
def test_answers_have_exactly_the_distribution_of_plain_sampling(
    verifier: Verifier, kind: ProposalKind, params: SamplingParams, subset: Sequence[int] | None
) -> None:
    counts = (1, 1) if isinstance(verifier, ChainVerifier) else (2, 1)
    assert bias(verifier, mixed(kind, counts, subset), params, length=3) < 1e-6


@pytest.mark.parametrize(("verifier", "kind"), DRAWN)
def test_three_draws_below_one_node_are_exact(verifier: Verifier, kind: ProposalKind) -> None:
    def draft(course: Course) -> DraftTree:
        builder = TreeBuilder(0, max_nodes=12)
        builder.add_drawn(0, propose(course, kind, (), 3, None), source=1)
        return builder.build()

    assert bias(verifier, draft, WARPED, length=1) < 1e-6


@st.composite
def weights(draw: st.DrawFn, size: int, positive: int = 1) -> list[int]:
    """Some may be 0, but not all."""
    found = draw(st.lists(st.integers(0, 5), min_size=size, max_size=size))
    for index in draw(st.permutations(range(size)))[:positive]:
        found[index] = max(found[index], 1)
    return found


@pytest.mark.parametrize(("verifier", "kind"), DRAWN)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_distributions_are_exact(
    verifier: Verifier, kind: ProposalKind, data: st.DataObject
) -> None:
    """With zeros on either side, no overlap, full overlap, subsets in any order, duplicates."""
    vocab = data.draw(st.integers(2, 5))
    count = 1 if isinstance(verifier, ChainVerifier) else data.draw(st.integers(1, 2))
    ids = data.draw(st.permutations(range(vocab)))[: data.draw(st.integers(count, vocab))]
    q = data.draw(weights(len(ids), positive=count))
    p_V = torch.tensor(data.draw(weights(vocab)), dtype=torch.float32)
    p_V, q_C = p_V / p_V.sum(), torch.tensor(q, dtype=torch.float32) / sum(q)

    def chosen(course: Course) -> int:
        drawn = tuple(ids[index] for index in draws(course, kind, q_C.tolist(), count))
        return verifier.choose(Proposal(kind, q_C, drawn, torch.tensor(ids)), p_V, course)

    found = distribution(chosen, PLAIN)
    for token_id, expected in enumerate(p_V.tolist()):
        assert abs(found.get(token_id, 0.0) - expected) < 1e-6


@pytest.mark.parametrize(
    ("verifier", "kind", "count", "expected"),
    [
        (OneHotVerifier, IID, 2, 0.35),
        (OneHotVerifier, WITHOUT, 2, 0.41944444),
        (RecursiveVerifier, IID, 1, 0.6),
        (RecursiveVerifier, IID, 2, 0.72),
        (RecursiveVerifier, WITHOUT, 2, 0.76428571),
        (ChainVerifier, IID, 1, 0.6),
        (KSeqVerifier, IID, 1, 0.6),
        (KSeqVerifier, IID, 2, 0.75),
    ],
)
def test_weighing_what_was_drawn_accepts_more(
    verifier: type[Verifier], kind: ProposalKind, count: int, expected: float
) -> None:
    """By hand: with one draw the overlap of p and q, which is the most that is possible."""
    p_V, q = torch.tensor([0.4, 0.3, 0.2, 0.1]), [0.1, 0.2, 0.3, 0.4]

    def hits(course: Course) -> bool:
        proposal = Proposal(kind, torch.tensor(q), tuple(draws(course, kind, q, count)))
        return verifier().choose(proposal, p_V, course) in proposal.drawn

    assert distribution(hits, PLAIN)[True] == pytest.approx(expected, abs=1e-6)


class Unnormalised(Proposal):
    """Hands out what the whole head said of the subset's tokens, which sums to less than 1."""

    def dense(self, vocab_size: int) -> Tensor:
        q_V = logits_of("drafter", ()).softmax(dim=-1).double()
        q_V[[t for t in range(vocab_size) if t not in SUBSET]] = 0.0
        return q_V


class TrimmedTarget(RecursiveVerifier):
    """Draws what is left over from the subset alone."""

    def choose(self, proposal: Proposal, probs_V: Tensor, sampler: Sampler) -> int:
        known_V = torch.zeros(VOCAB)
        known_V[list(SUBSET)] = 1.0
        return super().choose(proposal, probs_V * known_V, sampler)


def from_subset(course: Course, kind: ProposalKind, count: int) -> Proposal:
    """Drawn from the renormalised subset of what the whole head says."""
    q_V = logits_of("drafter", ()).softmax(dim=-1)
    q_C = q_V[list(SUBSET)] / q_V[list(SUBSET)].sum()
    drawn = tuple(SUBSET[index] for index in draws(course, kind, q_C.tolist(), count))
    return Proposal(kind, q_C, drawn, torch.tensor(SUBSET))


def with_full_q(course: Course) -> Proposal:
    honest = from_subset(course, IID, 2)
    return replace(honest, probs_C=logits_of("drafter", ()).softmax(dim=-1), token_ids_C=None)


def unnormalised(course: Course) -> Proposal:
    honest = from_subset(course, IID, 1)
    return Unnormalised(IID, honest.probs_C, honest.drawn, honest.token_ids_C)


def of_top_k(kind: ProposalKind) -> Callable[[Course], Proposal]:
    q_V = logits_of("drafter", ()).softmax(dim=-1)
    return lambda course: Proposal(kind, q_V, tuple(q_V.topk(2).indices.tolist()))


def deduplicated(course: Course) -> Proposal:
    honest = from_subset(course, IID, 3)
    return replace(honest, drawn=tuple(dict.fromkeys(honest.drawn)))


def likeliest_kept(course: Course) -> Proposal:
    """Pruned after drawing."""
    honest = from_subset(course, WITHOUT, 2)
    best = max(honest.drawn, key=lambda t: float(honest.probs_C[SUBSET.index(t)]))
    return replace(honest, drawn=(best,))


WRONG: dict[str, tuple[Verifier, Callable[[Course], Proposal]]] = {
    "draws from a subset, tested with the whole q": (RecursiveVerifier(), with_full_q),
    "q of the subset not renormalised": (RecursiveVerifier(), unnormalised),
    "top-k children tested as if drawn": (RecursiveVerifier(), of_top_k(WITHOUT)),
    "top-k children tested as if drawn independently": (KSeqVerifier(), of_top_k(IID)),
    "residual of the subset alone": (TrimmedTarget(), lambda c: from_subset(c, WITHOUT, 2)),
    "draws without replacement tested as independent ones": (
        RecursiveVerifier(),
        lambda c: replace(from_subset(c, WITHOUT, 3), kind=IID),
    ),
    "repeated draws left out": (KSeqVerifier(), deduplicated),
    "draws pruned by what they are": (RecursiveVerifier(), likeliest_kept),
}


def below_root(proposed: Callable[[Course], Proposal]) -> Draft:
    def draft(course: Course) -> DraftTree:
        builder = TreeBuilder(0, max_nodes=9)
        builder.add_drawn(0, proposed(course), source=1)
        return builder.build()

    return draft


@pytest.mark.parametrize("name", WRONG)
def test_the_enumeration_finds_what_is_not_exact(name: str) -> None:
    verifier, proposed = WRONG[name]
    assert bias(verifier, below_root(proposed), PLAIN, length=1) > 0.05


def test_any_children_are_exact_for_the_one_hot_test() -> None:
    """Also those that are wrong for the tests that weigh."""
    for name, (_, proposed) in WRONG.items():
        assert bias(OneHotVerifier(), below_root(proposed), PLAIN, length=1) < 1e-6, name


@st.composite
def trees(draw: st.DrawFn, vocab: int = 6) -> DraftTree:
    """With children of all kinds, drawn from anything."""
    builder = TreeBuilder(0, max_nodes=draw(st.integers(1, 16)))
    for _ in range(draw(st.integers(0, 8))):
        parent = draw(st.integers(0, len(builder) - 1))
        kind = draw(st.sampled_from(ProposalKind))
        token_ids = draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=4))
        if kind is ONEHOT:
            builder.add(parent, token_ids[0], source=1)
            continue
        if kind is WITHOUT:
            token_ids = list(dict.fromkeys(token_ids))
        if parent not in builder.build().proposals:
            probs_V = torch.full((vocab,), 1 / vocab)
            builder.add_drawn(parent, Proposal(kind, probs_V, tuple(token_ids)), source=1)
    return builder.build()


@settings(max_examples=60, deadline=None)
@given(tree=trees(), seed=st.integers(0, 999))
def test_greedy_answers_are_the_walk_of_largest_logits(tree: DraftTree, seed: int) -> None:
    logits_NV = torch.randn(len(tree), 6, generator=torch.Generator().manual_seed(seed))
    node, path = 0, [0]
    while True:
        best = int(logits_NV[node].argmax())
        node = next((c for c in tree.children(node) if tree.tokens[c] == best), -1)
        if node < 0:
            break
        path.append(node)
    for verifier in VERIFIERS:
        assert verifier.walk(tree, logits_NV, Sampler(SamplingParams())) == (tuple(path), best)


@settings(max_examples=60, deadline=None)
@given(tree=trees(), seed=st.integers(0, 999))
def test_one_hot_answers_are_those_of_plain_decoding_with_the_same_seed(
    tree: DraftTree, seed: int
) -> None:
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=seed)
    logits_NV = torch.randn(len(tree), 6, generator=torch.Generator().manual_seed(seed))
    walk, plain = accept(tree, logits_NV, Sampler(params)), Sampler(params)
    expected = [plain(logits_NV[node]) for node in walk.path]
    assert [*(tree.tokens[node] for node in walk.path[1:]), walk.token_id] == expected


@settings(max_examples=60, deadline=None)
@given(tree=trees(), room=st.integers(1, 16))
def test_trees_stay_within_their_budget_and_keep_to_one_kind_of_children(
    tree: DraftTree, room: int
) -> None:
    """The tree again, grown under another budget: draws are cut by their number alone."""
    builder = TreeBuilder(0, max_nodes=room)
    nodes: dict[int, int] = {0: 0}
    for node in range(len(tree)):
        if node not in nodes:
            continue
        proposal = tree.proposals.get(node)
        if proposal is None:
            for child in tree.children(node):
                added = builder.add(nodes[node], tree.tokens[child], source=1)
                nodes.update({} if added is None else {child: added})
            continue
        before = builder.room
        found = builder.add_drawn(nodes[node], proposal, source=1)
        nodes.update(zip(tree.children(node), found, strict=False))
        kept = builder.build().proposals.get(nodes[node])
        assert (kept.drawn if kept else ()) == proposal.drawn[:before]
    assert len(builder) <= room


def test_nodes_have_drawn_children_or_others_but_never_both() -> None:
    proposal = Proposal(WITHOUT, torch.tensor([0.5, 0.25, 0.25]), (2, 0, 1))
    builder = TreeBuilder(0, max_nodes=9)
    assert builder.add_drawn(0, proposal.first(2), source=1) == [1, 2]
    assert builder.add(0, 2, source=2) == 1
    assert builder.add(0, 1, source=2) is None
    assert builder.add_drawn(0, proposal, source=1) == [1, 2, 3]
    assert builder.add(1, 4, source=2) == 4
    assert builder.add_drawn(1, proposal, source=1) == []
    tree = builder.build()
    assert (tree.tokens, tree.parents) == ((0, 2, 0, 1, 4), (-1, 0, 0, 0, 1))
    assert set(tree.proposals) == {0}


def test_walks_end_where_logits_are_not_finite() -> None:
    builder = TreeBuilder(0, max_nodes=9)
    builder.add_drawn(0, Proposal(IID, torch.tensor([0.0, 1.0, 0.0]), (1,)), source=1)
    logits_NV = torch.tensor([[-1e9, 0.0, -1e9], [torch.nan, 0.0, 0.0]])
    for verifier in VERIFIERS:
        assert verifier.walk(builder.build(), logits_NV, Sampler(PLAIN)) == ((0, 1), None)


def test_auto_weighs_only_where_something_was_drawn() -> None:
    auto = VerifierKind.auto
    assert type(build_verifier(auto, frozenset({ONEHOT}))) is OneHotVerifier
    assert type(build_verifier(auto, frozenset({ONEHOT, WITHOUT}))) is RecursiveVerifier
    assert type(build_verifier(auto, frozenset())) is OneHotVerifier


@pytest.mark.parametrize("kind", [VerifierKind.chain, VerifierKind.kseq])
def test_verifiers_that_are_not_exact_are_refused(kind: VerifierKind) -> None:
    words = rf"drafter\.verifier={kind.name} is not exact .*\(without_replacement\).* recursive$"
    with pytest.raises(InputError, match=words):
        build_verifier(kind, frozenset({ONEHOT, WITHOUT}))


def test_chains_take_one_draw_per_node() -> None:
    builder = TreeBuilder(0, max_nodes=9)
    builder.add_drawn(0, Proposal(IID, torch.tensor([0.5, 0.5]), (1, 1)), source=1)
    with pytest.raises(InputError, match="one draw per node, but 2 were drawn"):
        ChainVerifier().check(builder.build())
