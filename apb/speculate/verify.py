"""Which drafted tokens the target would have emitted itself."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from torch import Tensor

from apb.sampling import Sampler
from apb.speculate.tree import DraftTree


class VerifierKind(Enum):
    """`auto`: the exact one for what the drafter proposes."""

    auto = "auto"
    onehot = "onehot"


class Walk(NamedTuple):
    """Accepted nodes, the root first, and the token behind the last of them.

    The token is None where the logits of the last node are not finite.
    """

    path: tuple[int, ...]
    token_id: int | None


def accept(tree: DraftTree, logits_NV: Tensor, sampler: Sampler) -> Walk:
    """Follow the target's own tokens through the tree as far as it holds them.

    At each node the target's token is chosen as in plain decoding, with one draw where it is
    sampled; a child that holds it is accepted. That is the one-hot sequential test of EAGLE (accept
    child x with probability p(x), else set p(x) to 0 and renormalise) with the draws made at once:
    both accept x with probability p(x), so the answer has the target's distribution for any set of
    children that does not depend on the draws. Beyond that, it is the very answer of plain decoding
    with the same seed.
    """
    path = [0]
    while True:
        node = path[-1]
        logits_V = logits_NV[node]
        if not bool(logits_V.isfinite().all()):
            return Walk(tuple(path), None)
        token_id = sampler(logits_V)
        child = next((c for c in tree.children(node) if tree.tokens[c] == token_id), None)
        if child is None:
            return Walk(tuple(path), token_id)
        path.append(child)
