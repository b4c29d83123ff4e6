"""Guarantees of scoring: what torch's own distributions say, over any number of rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from apb.comm import Communicator
from apb.errors import RequestError
from apb.scoring import divergence, likelihood

VOCAB, HIDDEN = 40, 8
ROWS = 300
"""More than are held at once."""


@pytest.fixture
def head_MV() -> Tensor:
    return torch.randn(HIDDEN, VOCAB)


def engine(head_MV: Tensor) -> Any:
    model = SimpleNamespace(logits=lambda hidden_TM: hidden_TM @ head_MV)
    comm = Communicator(0, 1, torch.device("cpu"))
    return SimpleNamespace(model=model, comm=comm, is_owner=True, step=1, next_position=7)


def test_likelihoods_are_of_the_targets_and_best_ones_are_known(head_MV: Tensor) -> None:
    hidden_TM = torch.randn(ROWS, HIDDEN)
    logits_TV = hidden_TM @ head_MV
    targets = logits_TV.argmax(dim=-1)
    targets[::3] = torch.randint(0, VOCAB, targets[::3].shape)
    found = likelihood(engine(head_MV), hidden_TM, targets.tolist())
    expected = Categorical(logits=logits_TV).log_prob(targets)
    assert torch.allclose(torch.tensor(found.logprobs), expected, atol=1e-5)
    assert found.is_best == (targets == logits_TV.argmax(dim=-1)).tolist()
    assert 0 < found.is_best.count(False) <= ROWS / 3


def test_divergence_is_from_the_exact_to_the_other_distribution(head_MV: Tensor) -> None:
    exact_TM = torch.randn(ROWS, HIDDEN)
    own_TM = exact_TM + 0.3 * torch.randn(ROWS, HIDDEN)
    own, exact = (Categorical(logits=hidden @ head_MV) for hidden in (own_TM, exact_TM))
    targets = torch.randint(0, VOCAB, (ROWS,))
    found = divergence(engine(head_MV), own_TM, exact_TM, targets.tolist())
    assert torch.allclose(torch.tensor(found.kl), kl_divergence(exact, own), atol=1e-5)
    assert torch.allclose(torch.tensor(found.logprobs), own.log_prob(targets), atol=1e-5)
    assert torch.allclose(torch.tensor(found.exact), exact.log_prob(targets), atol=1e-5)


@pytest.mark.parametrize("bad", [0, ROWS - 1])
def test_logits_that_are_not_finite_fail_the_request(head_MV: Tensor, bad: int) -> None:
    good_TM = torch.randn(ROWS, HIDDEN)
    bad_TM = good_TM.clone()
    bad_TM[bad] = torch.nan
    targets = [0] * ROWS
    with pytest.raises(RequestError, match="position 6 are not finite"):
        likelihood(engine(head_MV), bad_TM, targets)
    for pair in ((good_TM, bad_TM), (bad_TM, good_TM)):
        with pytest.raises(RequestError, match="not finite"):
            divergence(engine(head_MV), *pair, targets)
