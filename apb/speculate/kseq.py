"""The k-sequential test of independently drawn tokens.

Letters: V vocabulary, C the tokens that can be drawn.
"""

from __future__ import annotations

from torch import Tensor, minimum

from apb.sampling import Sampler
from apb.speculate.rejection import normalised, ratio
from apb.speculate.tree import Proposal

_HALVINGS = 40


def k_sequential(proposal: Proposal, p_V: Tensor, sampler: Sampler) -> int:
    """A token of the distribution p, one of k that were drawn independently from q where possible.

    K-SEQ of SpecTr (Sun et al. 2023, https://arxiv.org/abs/2310.15141): each draw x is accepted
    with probability min(1, p(x) / (gamma q(x))), the same for all draws. The smaller gamma, the
    more is accepted; it must not be so small that a token comes out too often.
    """
    p_V = p_V.double() / p_V.double().sum()
    q_V, k = proposal.dense(p_V.numel()), len(proposal.drawn)
    drawable_C = q_V.nonzero().flatten()
    gamma = _smallest_gamma(p_V[drawable_C], q_V[drawable_C], k)
    accepted_V = minimum(q_V, p_V / gamma)
    for token_id in proposal.drawn:
        if sampler.bernoulli(ratio(accepted_V[token_id], q_V[token_id])):
            return token_id
    once = float(accepted_V.sum())
    share = _of_k(once, k) / once if once > 0.0 else 0.0
    return sampler.draw(normalised(p_V - share * accepted_V, otherwise=p_V))


def _smallest_gamma(p_C: Tensor, q_C: Tensor, k: int) -> float:
    """By bisection; from above, where the residual stays a distribution.

    A token comes out by acceptance with probability accepted(x) P(any of k) / P(one), at most
    p(x) P(any of k) / (gamma P(one)), and that must not exceed p(x).
    """
    low, high = 1.0, float(k)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        once = float(minimum(q_C, p_C / middle).sum())
        if _of_k(once, k) <= middle * once:
            high = middle
        else:
            low = middle
    return high


def _of_k(once: float, k: int) -> float:
    """The probability that any of k independent draws is accepted, from that of one."""
    return 1.0 - max(0.0, 1.0 - once) ** k
