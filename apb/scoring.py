"""How likely given tokens are after a prefill, and how far that is from exact attention.

Shape letters: T rows, M model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apb.comm import Kind, Tag
from apb.engine import Engine
from apb.errors import NotFiniteError
from apb.methods.decode import OWNER
from apb.output import Divergence, Likelihood

_LOGIT_ROWS = 256
"""Rows whose logits are held at once: 256 rows of 128K logits are 128 MiB."""


def logprobs(engine: Engine, token_ids: Sequence[int], targets: Sequence[int]) -> list[float]:
    """Log-probability of ``targets[i]`` after ``token_ids[i]``; `prefill` has run with room.

    Raises:
        NotFiniteError: the logits are not finite, on every rank.
    """
    return likelihood(engine, engine.extend(token_ids), targets).logprobs


def likelihood(engine: Engine, hidden_TM: Tensor, targets: Sequence[int]) -> Likelihood:
    """How likely each target is where `Engine.extend` gave ``hidden_TM``.

    Raises:
        NotFiniteError: the logits are not finite, on every rank.
    """
    values: Any = []
    if engine.is_owner:
        values = _chosen(engine, hidden_TM, targets)
    return Likelihood(*_agreed(engine, values))


def divergence(
    engine: Engine, own_TM: Tensor, exact_TM: Tensor, targets: Sequence[int]
) -> Divergence:
    """Two readings of the same rows compared, from what `Engine.extend` gave for each.

    Raises:
        NotFiniteError: the logits are not finite, on every rank.
    """
    values: Any = []
    if engine.is_owner:
        own = _chosen(engine, own_TM, targets)
        exact = _chosen(engine, exact_TM, targets)
        values = own and exact and [own.logprobs, exact.logprobs, _kl(engine, own_TM, exact_TM)]
    return Divergence(*_agreed(engine, values))


def _chosen(engine: Engine, hidden_TM: Tensor, targets: Sequence[int]) -> Likelihood | None:
    """None where logits are not finite."""
    targets_T = torch.tensor(targets, dtype=torch.int64, device=hidden_TM.device)
    found = Likelihood([], [])
    for rows_TM, wanted_T in zip(
        hidden_TM.split(_LOGIT_ROWS), targets_T.split(_LOGIT_ROWS), strict=True
    ):
        logits_TV = engine.model.logits(rows_TM)
        if not logits_TV.isfinite().all():
            return None
        chosen_T = logits_TV.log_softmax(dim=-1).gather(1, wanted_T[:, None])[:, 0]
        found.logprobs.extend(chosen_T.tolist())
        found.is_best.extend((logits_TV.argmax(dim=-1) == wanted_T).tolist())
    return found


def _kl(engine: Engine, own_TM: Tensor, exact_TM: Tensor) -> list[float]:
    values: list[float] = []
    for rows_TM, exact_rows_TM in zip(
        own_TM.split(_LOGIT_ROWS), exact_TM.split(_LOGIT_ROWS), strict=True
    ):
        own_TV = engine.model.logits(rows_TM).log_softmax(dim=-1)
        exact_TV = engine.model.logits(exact_rows_TM).log_softmax(dim=-1)
        values += (exact_TV.exp() * (exact_TV - own_TV)).sum(dim=-1).tolist()
    return values


def _agreed(engine: Engine, values: Any) -> Any:
    """The owner's values on every rank."""
    tag = Tag(engine.step, 0, Kind.CONTROL)
    found = engine.comm.all_gather_json(values, tag)[OWNER]
    if found is None:
        raise NotFiniteError.at(engine.next_position - 1)
    return found
