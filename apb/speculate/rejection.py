"""Tests of drawn tokens one after the other, each against what the ones before it left over.

Letters: V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from apb.sampling import Sampler
from apb.speculate.tree import Proposal, ProposalKind


def recursive_rejection(proposal: Proposal, p_V: Tensor, sampler: Sampler) -> int:
    """A token of the distribution p, one of those that were drawn from q where possible.

    With one draw this is the test of Leviathan et al. (2022, https://arxiv.org/abs/2211.17192):
    accept x with probability min(1, p(x) / q(x)), else draw from the residual max(0, p - q),
    normalised. With several the residual takes p's place for the next draw, as in SpecInfer (Miao
    et al. 2023, https://arxiv.org/abs/2305.09781). Draws without replacement come from a q that
    lacks the ones before and is normalised again, as in Recursive Speculative Decoding (Jeon et al.
    2024, https://arxiv.org/abs/2402.14160).
    """
    p_V = p_V.double() / p_V.double().sum()
    q_V = proposal.dense(p_V.numel())
    for token_id in proposal.drawn:
        if sampler.bernoulli(ratio(p_V[token_id], q_V[token_id])):
            return token_id
        p_V = normalised(p_V - q_V, otherwise=p_V)
        if proposal.kind is ProposalKind.without_replacement:
            rest_V = q_V.clone()
            rest_V[token_id] = 0.0
            q_V = normalised(rest_V, otherwise=q_V)
    return sampler.draw(p_V)


def ratio(numerator: Tensor, denominator: Tensor) -> float:
    """0 where the denominator is: a token that cannot be drawn needs no test."""
    return float(numerator) / float(denominator) if float(denominator) > 0.0 else 0.0


def normalised(weights_V: Tensor, *, otherwise: Tensor) -> Tensor:
    """The positive weights as probabilities; where there are none, which only rounding makes
    happen here, the other distribution.
    """
    positive_V = weights_V.clamp(min=0.0)
    total = positive_V.sum()
    return positive_V / total if float(total) > 0.0 else otherwise
