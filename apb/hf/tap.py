"""States of forward passes, kept for drafters that read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apb.speculate.base import MAX_NODES, Needs, Tapped


class PassTap:
    """Keeps states of one pass after the other; whoever runs the model tells it of them."""

    def __init__(self, needs: Needs) -> None:
        self._needs = needs
        self._first, self._last = needs.first, max(needs.last, MAX_NODES)
        self._positions_T = torch.empty(0, dtype=torch.int64)
        self._rows: Sequence[int] = ()
        self._states: list[Tensor] = []

    def take(self) -> Tapped:
        states, self._states = self._states, []
        return Tapped(self._rows, torch.cat(states, dim=-1))

    def begin(self, positions_T: Tensor) -> None:
        """A new pass, over tokens at those positions of the text."""
        self._positions_T, self._states = positions_T, []

    def entering(self, layer_idx: int, states_TM: Tensor) -> None:
        """States before a layer."""
        if layer_idx in self._needs.entering:
            self._keep(states_TM)

    def final(self, states_TM: Tensor) -> None:
        """States after the final norm."""
        if self._needs.final:
            self._keep(states_TM)

    def _keep(self, states_TM: Tensor) -> None:
        num_rows = states_TM.shape[0]
        if num_rows <= self._first + self._last:
            self._rows = range(num_rows)
            self._states.append(states_TM)
            return
        if not self._states:
            self._rows = self._kept(num_rows)
        # A copy, so that the states of a long prompt do not stay.
        self._states.append(states_TM[self._rows])

    def _kept(self, num_rows: int) -> list[int]:
        """The beginning by position: a copy of the anchor may stand before the first block."""
        last = num_rows - self._last
        first = (self._positions_T[:last] < self._first).nonzero().flatten()
        return [*first.tolist(), *range(last, num_rows)]


def watch(base_model: Any, taps: Iterable[PassTap]) -> None:
    """Let the modules of a Hugging Face decoder tell of their states; `taps` may change later."""

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        for tap in taps:
            tap.begin(kwargs["position_ids"][0])

    def entering(module: Any, args: tuple[Tensor, ...]) -> None:
        for tap in taps:
            tap.entering(module.self_attn.layer_idx, args[0][0])

    def final(module: nn.Module, args: Any, output: Tensor) -> None:
        for tap in taps:
            tap.final(output[0])

    base_model.register_forward_pre_hook(begin, with_kwargs=True)
    for layer in base_model.layers:
        layer.register_forward_pre_hook(entering)
    base_model.norm.register_forward_hook(final)
