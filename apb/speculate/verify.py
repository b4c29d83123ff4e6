"""Which drafted tokens come out as the target's own.

Letters: N nodes of a tree, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import Enum
from typing import ClassVar, NamedTuple

from torch import Tensor

from apb.errors import InputError
from apb.sampling import Sampler
from apb.speculate.kseq import k_sequential
from apb.speculate.rejection import recursive_rejection
from apb.speculate.tree import DraftTree, Proposal, ProposalKind


class VerifierKind(Enum):
    """`auto`: `onehot` for drafters without chance, else `recursive`, which accepts more."""

    auto = "auto"
    onehot = "onehot"
    recursive = "recursive"
    chain = "chain"
    kseq = "kseq"


class Walk(NamedTuple):
    """Accepted nodes, the root first, and the token behind the last of them.

    The token is None where the logits of the last node are not finite.
    """

    path: tuple[int, ...]
    token_id: int | None


class Verifier(ABC):
    """Chooses token after token along a tree, so that answers have the target's distribution.

    At each node a token is chosen from the distribution of plain sampling; where a child holds it,
    the walk goes on there. Verifiers differ in how they choose at a node with drawn children: the
    better its choice fits what was drawn, the longer the walk.
    """

    accepts: ClassVar[frozenset[ProposalKind]] = frozenset(ProposalKind)
    """Proposals that it is exact for."""
    follows_plain: ClassVar[bool] = False
    """Whether answers are those of plain decoding with the same seed, whatever is drafted."""

    def walk(self, tree: DraftTree, logits_NV: Tensor, sampler: Sampler) -> Walk:
        path = [0]
        while True:
            node = path[-1]
            logits_V = logits_NV[node]
            if not bool(logits_V.isfinite().all()):
                return Walk(tuple(path), None)
            token_id = self._choose(tree.proposals.get(node), logits_V, sampler)
            child = next((c for c in tree.children(node) if tree.tokens[c] == token_id), None)
            if child is None:
                return Walk(tuple(path), token_id)
            path.append(child)

    def _choose(self, proposal: Proposal | None, logits_V: Tensor, sampler: Sampler) -> int:
        if proposal is None or sampler.is_greedy:
            return sampler(logits_V)
        return self.choose(proposal, sampler.probs(logits_V), sampler)

    @abstractmethod
    def choose(self, proposal: Proposal, probs_V: Tensor, sampler: Sampler) -> int:
        """A token of that distribution, if possible one of those that were drawn."""

    def check(self, tree: DraftTree) -> None:  # noqa: B027
        """Raises InputError for trees that it does not take."""


class OneHotVerifier(Verifier):
    """Follows the target's own tokens through the tree as far as it holds them.

    Each token is chosen as in plain decoding, with one draw where it is sampled. That is the
    one-hot sequential test of EAGLE (https://arxiv.org/abs/2401.15077: accept child x with
    probability p(x), else set p(x) to 0 and renormalise) with the draws made at once: both accept x
    with probability p(x), so the answer has the target's distribution for any set of children that
    does not depend on these draws. Beyond that, it is the very answer of plain decoding with the
    same seed.
    """

    follows_plain = True

    def choose(self, proposal: Proposal, probs_V: Tensor, sampler: Sampler) -> int:
        return sampler.draw(probs_V)


class RecursiveVerifier(Verifier):
    """Tests drawn children one after the other; see `recursive_rejection`."""

    def choose(self, proposal: Proposal, probs_V: Tensor, sampler: Sampler) -> int:
        return recursive_rejection(proposal, probs_V, sampler)


class ChainVerifier(RecursiveVerifier):
    """The original test of speculative sampling, for one draw per node."""

    accepts = frozenset({ProposalKind.onehot, ProposalKind.iid})

    def check(self, tree: DraftTree) -> None:
        most = max((len(proposal.drawn) for proposal in tree.proposals.values()), default=1)
        if most > 1:
            raise InputError(
                f"drafter.verifier=chain tests one draw per node, but {most} were drawn; "
                "set drafter.verifier=auto"
            )


class KSeqVerifier(Verifier):
    """Tests drawn children all in the same way; see `k_sequential`."""

    accepts = frozenset({ProposalKind.onehot, ProposalKind.iid})

    def choose(self, proposal: Proposal, probs_V: Tensor, sampler: Sampler) -> int:
        return k_sequential(proposal, probs_V, sampler)


_VERIFIERS: Mapping[VerifierKind, type[Verifier]] = {
    VerifierKind.onehot: OneHotVerifier,
    VerifierKind.recursive: RecursiveVerifier,
    VerifierKind.chain: ChainVerifier,
    VerifierKind.kseq: KSeqVerifier,
}


def build_verifier(kind: VerifierKind, proposed: frozenset[ProposalKind]) -> Verifier:
    """The verifier of a drafter's proposals.

    Raises:
        InputError: answers would not have the target's distribution.
    """
    if kind is VerifierKind.auto:
        by_chance = proposed - {ProposalKind.onehot}
        kind = VerifierKind.recursive if by_chance else VerifierKind.onehot
    refused = proposed - _VERIFIERS[kind].accepts
    if refused:
        exact = [name.name for name, cls in _VERIFIERS.items() if proposed <= cls.accepts]
        raise InputError(
            f"drafter.verifier={kind.name} is not exact for what this drafter proposes "
            f"({', '.join(sorted(one.name for one in refused))}); "
            f"set drafter.verifier to auto, {' or '.join(exact)}"
        )
    return _VERIFIERS[kind]()


def accept(tree: DraftTree, logits_NV: Tensor, sampler: Sampler) -> Walk:
    """What plain decoding would emit, as far as the tree holds it."""
    return OneHotVerifier().walk(tree, logits_NV, sampler)
