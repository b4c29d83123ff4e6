"""The network of EAGLE-3 heads, in the forms that those who train them have given it.

Letters: T rows of a pass, M hidden size of the head, E width of the target's states that it reads,
W = 2 M.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apb.rotary import Rotary
from apb.speculate.eagle_head import (
    ALL_ROWS,
    Attend,
    DecoderLayer,
    EagleHead,
    HeadOutput,
    HeadShape,
    Pass,
    PlainLayer,
    rms_norm,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Eagle3Norms:
    """Where an EAGLE-3 head norms, which differs among those who train them.

    Attributes:
        each_state: the target's states one by one before `fc` (EAGLE-3.1).
        all_states: the target's states side by side before `fc`.
        residual: the residual stream starts from the normed state.
        output: the state that is fed back is the one after the final norm (EAGLE-3.1).
    """

    each_state: bool = False
    all_states: bool = False
    residual: bool = False
    output: bool = False


class FirstEagle3Layer(DecoderLayer):
    """Attention reads embedding and state side by side, each normed."""

    def __init__(self, shape: HeadShape, *, normed_residual: bool) -> None:
        super().__init__(shape, 0, width=2 * shape.hidden_size)
        self._normed_residual = normed_residual
        self.input_layernorm, self.hidden_norm = rms_norm(shape), rms_norm(shape)

    def forward(self, embeds_TM: Tensor, states_TM: Tensor, this: Pass) -> Tensor:
        normed_TM = self.hidden_norm(states_TM)
        x_TW = torch.cat((self.input_layernorm(embeds_TM), normed_TM), dim=-1)
        return self.run(x_TW, normed_TM if self._normed_residual else states_TM, this)


class Eagle3Head(EagleHead):
    """EAGLE-3 (Li et al. 2025, https://arxiv.org/abs/2503.01840): reads states that enter some
    layers of the target, mixed by `fc`; its own states need not resemble them.
    """

    def __init__(self, shape: HeadShape, rotary: Rotary, norms: Eagle3Norms) -> None:
        super().__init__(shape, rotary)
        self.norms = norms
        state_size = sum(shape.state_sizes)
        if norms.each_state:
            self.fc_norm = nn.ModuleList(rms_norm(shape, size) for size in shape.state_sizes)
        if norms.all_states:
            self.input_norm = rms_norm(shape, state_size)
        self.fc = nn.Linear(state_size, shape.hidden_size, bias=shape.fc_bias)
        first = FirstEagle3Layer(shape, normed_residual=norms.residual)
        later = (PlainLayer(shape, layer_idx) for layer_idx in range(1, shape.num_layers))
        self.layers = nn.ModuleList([first, *later])
        self.norm = rms_norm(shape)

    def combined(self, states_TE: Tensor) -> Tensor:
        if self.norms.each_state:
            parts = states_TE.split(self.shape.state_sizes, dim=-1)
            normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
            states_TE = torch.cat(normed, dim=-1)
        if self.norms.all_states:
            states_TE = self.input_norm(states_TE)
        states_TM: Tensor = self.fc(states_TE)
        return states_TM

    def forward(
        self,
        embeds_TM: Tensor,
        states_TM: Tensor,
        positions_T: Tensor,
        attend: Attend,
        wanted: slice = ALL_ROWS,
    ) -> HeadOutput:
        this = self._pass(positions_T, attend, wanted, states_TM.dtype)
        first, *later = self.layers
        x_TM = first(embeds_TM, states_TM, this)
        for layer in later:
            x_TM = layer(x_TM, this)
        normed_TM = self.norm(x_TM)
        return HeadOutput(normed_TM, normed_TM if self.norms.output else x_TM)
