"""Guarantees of message headers: each field of a message that is not the awaited one is noticed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from apb import comm
from apb.comm import HEADER_BYTES, Communicator, Kind, Tag
from apb.errors import EngineDeadError
from apb.header import header_fields

TAG = Tag(step=5, layer=2, kind=Kind.QUESTION)
X = torch.zeros(2, 3)

Receive = Callable[[Sequence[int]], Tensor]


class Finished:
    """A collective that is over."""

    def wait(self) -> None: ...


@pytest.fixture
def receive(monkeypatch: pytest.MonkeyPatch) -> Receive:
    """What rank 0 of two makes of a gather in which rank 1's message has the given header."""

    def receive(header: Sequence[int]) -> Tensor:
        def gather(received_U: Tensor, sent_U: Tensor, *, async_op: bool) -> Finished:
            rows_2U = received_U.view(2, -1)
            rows_2U[:] = sent_U
            rows_2U[1, :HEADER_BYTES] = torch.tensor(header).view(torch.uint8)
            return Finished()

        monkeypatch.setattr(comm, "_all_gather", gather)
        return Communicator(0, 2, torch.device("cpu")).all_gather(X, TAG).wait()

    return receive


def test_the_awaited_header_is_accepted(receive: Receive) -> None:
    assert torch.equal(receive(header_fields(TAG, 1, X)), torch.stack([X, X]))


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (
            header_fields(TAG._replace(step=4), 1, X),
            "question of step 4, layer 2, rank 1, float32 [2, 3]",
        ),
        (header_fields(TAG._replace(layer=3), 1, X), "question of step 5, layer 3"),
        (header_fields(TAG._replace(kind=Kind.PARTIAL), 1, X), "partial of step 5"),
        (header_fields(TAG, 0, X), "question of step 5, layer 2, rank 0"),
        (header_fields(TAG, 1, X.mT), "float32 [3, 2]"),
        (header_fields(TAG, 1, X.flatten()), "float32 [6]"),
        (header_fields(TAG, 1, X.to(torch.bfloat16)), "bfloat16 [2, 3]"),
        ([0] * (HEADER_BYTES // 8), "bytes that are no apb message"),
    ],
    ids=["step", "layer", "kind", "source", "shape", "dim", "dtype", "magic"],
)
def test_any_other_header_is_an_error_that_names_both_messages(
    receive: Receive, header: Sequence[int], words: str
) -> None:
    with pytest.raises(EngineDeadError) as error:
        receive(header)
    waited, _, received = str(error.value).partition("and received")
    assert "rank 0 waited for question of step 5, layer 2, rank 1, float32 [2, 3]" in waited
    assert words in received


def test_deferred_headers_are_checked_later_and_keep_nothing_else_alive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gather(received_U: Tensor, sent_U: Tensor, *, async_op: bool) -> Finished:
        received_U.view(2, -1)[:] = sent_U  # rank 1's message claims to be rank 0's
        return Finished()

    monkeypatch.setattr(comm, "_all_gather", gather)
    ranks = Communicator(0, 2, torch.device("cpu"), defer_checks=True)
    large = torch.zeros(1000)
    assert torch.equal(ranks.all_gather(large, TAG).wait(), torch.stack([large, large]))
    ((_, headers_RU),) = ranks._unverified
    assert headers_RU.untyped_storage().nbytes() == 2 * HEADER_BYTES
    with pytest.raises(EngineDeadError, match="rank 1"):
        ranks.verify()
    with pytest.raises(EngineDeadError, match="rank 1"):
        ranks.all_gather_json("x", TAG)
