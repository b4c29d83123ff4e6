"""The keys and values of an EAGLE head: the beginning of a text, its end, and a tree of drafts.

Letters: T rows of a pass, S slots in use, H query heads, K key/value heads, G = H / K, D head dim,
N drafted rows.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apb.speculate.eagle_head import Attend, HeadShape


class Window(NamedTuple):
    """What a row sees of the text: its first tokens, and the last ones up to itself.

    Published heads are trained on 2K to 4K tokens and draft badly with more before them; sinks and
    a window keep what they can do (StreamingLLM, Xiao et al. 2023,
    https://arxiv.org/abs/2309.17453). Both count positions, so that distances stay those that a
    head has seen, also where the tokens between were read on other ranks.
    """

    sinks: int
    length: int

    def shows(self, positions: Tensor, to: Tensor | int) -> Tensor:
        """Which positions a row at `to` sees, later ones left out of account."""
        return (positions < self.sinks) | (positions > to - self.length)


class WindowedCache:
    """Rows of the text in order of position, then those of the tree that is being drafted.

    Rows that no later one sees are dropped when the cache is full, many at once; until then masks
    hide them, so that what is seen does not depend on it.
    """

    def __init__(
        self,
        shape: HeadShape,
        window: Window,
        *,
        max_drafted: int,
        device: torch.device,
        dtype: torch.dtype,
        slack: int = 256,
    ) -> None:
        """`max_drafted` rows of a tree and `slack` rows of text fit beside a full window."""
        self.window = window
        self._slack = slack
        self._text_slots = window.sinks + window.length + slack
        num_slots = self._text_slots + max_drafted
        sizes = (shape.num_layers, 2, shape.num_kv_heads, num_slots, shape.head_dim)
        self._kv_LXKSD = torch.zeros(sizes, device=device, dtype=dtype)
        self._positions_S = torch.zeros(num_slots, device=device, dtype=torch.int64)
        self._length = 0

    @property
    def dtype(self) -> torch.dtype:
        return self._kv_LXKSD.dtype

    @property
    def positions(self) -> list[int]:
        """Of the rows of the text that are held."""
        held: list[int] = self._positions_S[: self._length].tolist()
        return held

    @property
    def max_rows(self) -> int:
        """Of one pass over the text."""
        return self._slack

    def clear(self) -> None:
        self._length = 0

    def extend(self, positions_T: Tensor) -> Attend:
        """For a pass over further rows of the text, in place of any drafted ones."""
        num_rows = len(positions_T)
        assert num_rows <= self.max_rows
        if self._length + num_rows > self._text_slots:
            self._drop_unseen(positions_T[0])
        start, self._length = self._length, self._length + num_rows
        self._positions_S[start : self._length] = positions_T
        positions_S = self._positions_S[: self._length]
        at_T1 = positions_T[:, None]
        visible_TS = self.window.shows(positions_S, at_T1) & (positions_S <= at_T1)
        return partial(self._attend, start, visible_TS)

    def draft(self, position: int, visible_TN: Tensor) -> Attend:
        """For a pass over the last T of N drafted rows, all at one position.

        `visible_TN` says which drafted rows they see; what they see of the text is the window.
        """
        num_rows, num_drafted = visible_TN.shape
        shown_S = self.window.shows(self._positions_S[: self._length], position)
        visible_TS = torch.cat((shown_S.expand(num_rows, -1), visible_TN), dim=1)
        return partial(self._attend, self._length + num_drafted - num_rows, visible_TS)

    def _drop_unseen(self, position: Tensor) -> None:
        """Rows that none from that position on sees."""
        seen_S = self.window.shows(self._positions_S[: self._length], position).nonzero().flatten()
        self._length = len(seen_S)
        self._positions_S[: self._length] = self._positions_S[seen_S]
        self._kv_LXKSD[..., : self._length, :] = self._kv_LXKSD[..., seen_S, :]

    def _attend(
        self,
        start: int,
        visible_TS: Tensor,
        layer_idx: int,
        q_HTD: Tensor,
        k_KTD: Tensor,
        v_KTD: Tensor,
    ) -> Tensor:
        """Queries may be those of the last rows alone."""
        num_slots, num_rows = visible_TS.shape[1], q_HTD.shape[1]
        kv_XKSD = self._kv_LXKSD[layer_idx, :, :, :num_slots]
        kv_XKSD[0, :, start:] = k_KTD
        kv_XKSD[1, :, start:] = v_KTD
        # The heads of a group as rows of one head, so that keys are not repeated.
        num_groups = len(q_HTD) // len(k_KTD)
        q_KRD = q_HTD.unflatten(0, (-1, num_groups)).flatten(1, 2)
        k_1KSD, v_1KSD = kv_XKSD[:, None]
        out_1KRD = F.scaled_dot_product_attention(
            q_KRD[None], k_1KSD, v_1KSD, attn_mask=visible_TS[-num_rows:].repeat(num_groups, 1)
        )
        out_HTD: Tensor = out_1KRD[0].unflatten(1, (num_groups, num_rows)).flatten(0, 1)
        return out_HTD
