"""Several steps of drafting at once, for all places of a text: what training sees is what a head
will see of itself.

As in HASS (Zhang et al. 2024, https://arxiv.org/abs/2408.15766) and EAGLE-3's training-time test.
At step s, row t stands for a draft that began s tokens earlier: it reads the states that the head
itself has given for its last s tokens, and the target's for those before.

Letters: B texts, T places of each, M hidden size, H query heads, K key/value heads, D head dim,
C tokens that are scored, R rows that count.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apb.speculate.eagle_head import EagleHead


class UnrolledAttention:
    """Attention of all rows of one step over what their drafts have seen."""

    def __init__(self) -> None:
        self._seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, layer_idx: int, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
        groups = q_BHTD.shape[-3] // k_BKTD.shape[-3]
        k_BHTD, v_BHTD = (x.repeat_interleave(groups, dim=-3) for x in (k_BKTD, v_BKTD))
        seen = self._seen.setdefault(layer_idx, [])
        seen.append((k_BHTD, v_BHTD))
        (first_k, first_v), *own = seen
        num_rows, scale = q_BHTD.shape[-2], q_BHTD.shape[-1] ** -0.5
        # The draft that row t belongs to began at row t - len(own), the last that it has from text.
        from_text = torch.ones(num_rows, num_rows, dtype=torch.bool, device=q_BHTD.device)
        scores = (q_BHTD @ first_k.mT * scale).masked_fill(
            ~from_text.tril(-len(own)), float("-inf")
        )
        shifted = [
            (_shift(k, age), _shift(v, age))
            for age, (k, v) in zip(range(len(own))[::-1], own, strict=True)
        ]
        of_own = [(q_BHTD * k).sum(-1, keepdim=True) * scale for k, _ in shifted]
        probs = torch.cat([scores, *of_own], dim=-1).softmax(dim=-1)
        out_BHTD: Tensor = probs[..., :num_rows] @ first_v
        for place, (_, v) in enumerate(shifted, start=num_rows):
            out_BHTD = out_BHTD + probs[..., place : place + 1] * v
        return out_BHTD


def _shift(x_BHTD: Tensor, rows: int) -> Tensor:
    """Row t holds what row ``t - rows`` held; the first rows hold zeros."""
    return x_BHTD if rows == 0 else F.pad(x_BHTD, (0, 0, rows, 0))[..., :-rows, :]


def drafted_states(
    head: EagleHead, embeds_BTM: Tensor, states_BTM: Tensor, steps: int
) -> Iterator[Tensor]:
    """Step by step, the head's states of the token behind each row; row t of step s is of use from
    ``t = s`` on.

    Args:
        head: reads pairs of a token and the state before it.
        embeds_BTM: embeddings of the tokens that follow the rows.
        states_BTM: the target's states of the rows.
        steps: how far drafts go.
    """
    attend = UnrolledAttention()
    positions_T = torch.arange(embeds_BTM.shape[-2], device=embeds_BTM.device)
    for _ in range(steps):
        states_BTM = head(embeds_BTM, states_BTM, positions_T, attend).states_TM
        yield states_BTM
        states_BTM = _shift(states_BTM[:, None], 1)[:, 0]


class StepLoss(NamedTuple):
    """Of one step of drafts, means over its rows."""

    tokens: Tensor
    """Cross-entropy of the head's distribution against the target's."""
    states: Tensor
    """Smooth-L1 distance of the states, as EAGLE has it."""


def step_loss(drafted_RM: Tensor, wanted_RM: Tensor, rows_CM: Tensor) -> StepLoss:
    """How far R drafted states are from the target's.

    `rows_CM` are the rows of the LM head that count; both distributions are over them alone.
    """
    with torch.no_grad():
        probs_RC = (wanted_RM @ rows_CM.T).softmax(dim=-1)
    tokens = F.cross_entropy(drafted_RM @ rows_CM.T, probs_RC)
    return StepLoss(tokens, F.smooth_l1_loss(drafted_RM, wanted_RM))


def drafted_rows(drafted_BL: Tensor, depth: int) -> Tensor:
    """Rows ``[B, T]`` of a step that count, of texts of T + 1 tokens.

    Row t gives the state of token t + 1, which tells the one behind that: that is the one to be
    drafted. Of step s, rows from s on are of use.
    """
    rows_BT = torch.zeros_like(drafted_BL[:, 1:])
    rows_BT[:, depth:-1] = drafted_BL[:, depth + 2 :]
    return rows_BT
