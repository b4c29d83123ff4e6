"""Rotary position embedding, in the half-split convention of Llama: put on and taken off.

Letters: T rows, H heads, D head dim, F = D / 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """A model's rotary embedding: angles are positions times `inv_freq_F`."""

    inv_freq_F: Tensor
    scaling: float
    """Factor on sine and cosine."""

    def at(self, positions_T: Tensor, dtype: torch.dtype = torch.float32) -> Rotation:
        """The rotation of rows at some positions; batch dimensions may stand before T."""
        angles_TF = positions_T[..., None] * self.inv_freq_F.to(positions_T.device)
        angles_TD = torch.cat((angles_TF, angles_TF), dim=-1)
        cos_TD, sin_TD = angles_TD.cos() * self.scaling, angles_TD.sin() * self.scaling
        return Rotation(cos_TD.to(dtype), sin_TD.to(dtype), self.scaling)


class Rotation(NamedTuple):
    """What a rotary embedding does to the rows of a pass; sine and cosine are scaled."""

    cos_TD: Tensor
    sin_TD: Tensor
    scaling: float

    def of(self, rows: slice) -> Rotation:
        return Rotation(self.cos_TD[..., rows, :], self.sin_TD[..., rows, :], self.scaling)

    def rotate(self, x_HTD: Tensor) -> Tensor:
        """Queries or keys after RoPE."""
        return x_HTD * self.cos_TD.unsqueeze(-3) + _turned(x_HTD) * self.sin_TD.unsqueeze(-3)

    def unrotate(self, x_HTD: Tensor) -> Tensor:
        """Queries or keys as they were before `rotate`, but for rounding."""
        back_HTD = x_HTD * self.cos_TD.unsqueeze(-3) - _turned(x_HTD) * self.sin_TD.unsqueeze(-3)
        return back_HTD / self.scaling**2


def _turned(x_HTD: Tensor) -> Tensor:
    """Every pair of elements turned by a right angle."""
    first_HTF, second_HTF = x_HTD.chunk(2, dim=-1)
    return torch.cat((-second_HTF, first_HTF), dim=-1)
