"""Log-probabilities of given tokens after a prefill."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from apb.comm import Kind, Tag
from apb.engine import Engine
from apb.errors import NotFiniteError
from apb.methods.decode import OWNER

_LOGIT_ROWS = 256
"""Rows whose logits are held at once: 256 rows of 128K logits are 128 MiB."""


def logprobs(engine: Engine, token_ids: Sequence[int], targets: Sequence[int]) -> list[float]:
    """Log-probability of ``targets[i]`` after ``token_ids[i]``; `prefill` has run with room.

    Raises:
        NotFiniteError: the logits are not finite, on every rank.
    """
    hidden_TM = engine.extend(token_ids)
    values: list[float] = []
    finite = True
    if engine.is_owner:
        targets_T = torch.tensor(targets, dtype=torch.int64, device=hidden_TM.device)
        for rows_TM, wanted_T in zip(
            hidden_TM.split(_LOGIT_ROWS), targets_T.split(_LOGIT_ROWS), strict=True
        ):
            logits_TV = engine.model.logits(rows_TM)
            finite = finite and bool(logits_TV.isfinite().all())
            chosen_T = logits_TV.log_softmax(dim=-1).gather(1, wanted_T[:, None])[:, 0]
            values += chosen_T.tolist()
    tag = Tag(engine.step, 0, Kind.CONTROL)
    found = engine.comm.all_gather_json(values if finite else None, tag)[OWNER]
    if found is None:
        raise NotFiniteError.at(engine.next_position - 1)
    result: list[float] = found
    return result
