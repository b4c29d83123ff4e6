"""Guarantees of scoring: what torch's own distributions say, over any number of rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from apb.comm import Communicator
from apb.compress.knorm import KnormConfig
from apb.config import compose_config
from apb.errors import RequestError
from apb.methods.apb import ApbConfig
from apb.requests import RequestReader
from apb.scoring import divergence, likelihood
from plans import make_plan

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


@pytest.mark.parametrize("as_ids", [False, True])
def test_a_scored_documents_first_token_stays_first_in_the_anchor(as_ids: bool) -> None:
    """It is the attention sink, and the query stands behind it."""
    reader = RequestReader(compose_config(["model=tiny"]), max_positions=2048)
    text = "The miller kept bees. " * 9
    document_ids = [256, *text.encode()]
    read = reader.continuation(document_ids if as_ids else text, "Bees.", "Who kept bees?")
    prompt = read.prompt
    assert [*prompt.context_ids, read.rows[0]] == document_ids
    method = ApbConfig(compressor=KnormConfig(), min_block_len=1)
    anchor = make_plan(method, prompt, world_size=2).anchor
    assert anchor.query_len > 0
    shown = anchor.token_ids(prompt.context_ids, prompt.query_ids)
    assert shown[:2] == [256, *prompt.query_ids[-anchor.query_len :]][:2]


def test_a_scored_document_of_one_token_stays_a_document() -> None:
    reader = RequestReader(compose_config(["model=tiny"]), max_positions=2048)
    for document in ([256], [256, 1], [1]):
        prompt = reader.continuation(document, "Bees.", None).prompt
        assert list(prompt.context_ids) == document[:1]
        assert prompt.document_ids
