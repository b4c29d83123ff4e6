"""A Hugging Face model as drafters see it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from apb.hf.draft_model import HfDraftModel, load_draft_model
from apb.hf.model import CausalLM
from apb.hf.tokenizer import vocabulary_hash
from apb.speculate.base import MAX_NODES, Needs, Rotary, Tapped


class HfTarget:
    """The target model, its tokenizer and stop tokens: `apb.speculate.base.DraftTarget`."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: frozenset[int],
        drafting: Path | None = None,
    ) -> None:
        self._model, self._tokenizer, self._stop_ids = model, tokenizer, stop_ids
        self._drafting = drafting

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        return self._model.dtype

    @property
    def num_layers(self) -> int:
        return self._model.shape.num_layers

    @cached_property
    def tokenizer_hash(self) -> str:
        return vocabulary_hash(self._tokenizer)

    @property
    def stop_ids(self) -> frozenset[int]:
        return self._stop_ids

    @property
    def drafting(self) -> Path | None:
        return self._drafting

    @property
    def rotary(self) -> Rotary:
        embedding = self._model.hf.base_model.rotary_emb
        return Rotary(embedding.inv_freq, float(embedding.attention_scaling))

    def embedding(self) -> Tensor:
        weight: Tensor = self._model.hf.get_input_embeddings().weight
        return weight

    def head(self) -> Tensor:
        weight: Tensor = self._model.hf.get_output_embeddings().weight
        return weight

    def tap(self, needs: Needs) -> HookTap:
        return HookTap(self._model.hf, needs)

    def load_draft_model(self, name: str, *, sinks: int, window: int, spare: int) -> HfDraftModel:
        return load_draft_model(
            name,
            dtype=self.dtype,
            device=self.device,
            tokenizer_hash=self.tokenizer_hash,
            sinks=sinks,
            window=window,
            spare=spare,
        )


class HookTap:
    """Keeps states by hooks on the model's layers and final norm."""

    def __init__(self, model: Any, needs: Needs) -> None:
        self._first, self._last = needs.first, max(needs.last, MAX_NODES)
        self._rows: Sequence[int] = ()
        self._states: list[Tensor] = []
        for layer_idx in needs.entering:
            model.base_model.layers[layer_idx].register_forward_pre_hook(self._entering)
        if needs.final:
            model.base_model.norm.register_forward_hook(self._final)
        model.base_model.register_forward_pre_hook(self._begin)

    def take(self) -> Tapped:
        states, self._states = self._states, []
        return Tapped(self._rows, torch.cat(states, dim=-1))

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._states = []

    def _entering(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._keep(args[0][0])

    def _final(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._keep(output[0])

    def _keep(self, states_TM: Tensor) -> None:
        num_rows = states_TM.shape[0]
        if num_rows <= self._first + self._last:
            self._rows = range(num_rows)
            self._states.append(states_TM)
            return
        self._rows = [*range(self._first), *range(num_rows - self._last, num_rows)]
        # A copy, so that the states of a long prompt do not stay.
        self._states.append(states_TM[self._rows])
