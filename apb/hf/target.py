"""A Hugging Face model as drafters see it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from apb.hf.draft_model import HfDraftModel, load_draft_model
from apb.hf.model import CausalLM
from apb.hf.tap import PassTap
from apb.hf.tokenizer import vocabulary_hash
from apb.model_config import ModelConfig
from apb.rotary import Rotary
from apb.speculate.base import Needs


class HfTarget:
    """The target model, its tokenizer and stop tokens: `apb.speculate.base.DraftTarget`."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: frozenset[int],
        drafting: Path | None = None,
        named: Callable[[str], ModelConfig] = lambda name: ModelConfig(name=name, path=name),
    ) -> None:
        """`drafting` holds what apb ships for the model; `named` finds draft models."""
        self._model, self._tokenizer, self._stop_ids = model, tokenizer, stop_ids
        self._drafting, self._named = drafting, named

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

    def tap(self, needs: Needs) -> PassTap:
        return self._model.tap(needs)

    def load_draft_model(self, name: str, *, sinks: int, window: int, spare: int) -> HfDraftModel:
        return load_draft_model(
            self._named(name),
            dtype=self.dtype,
            device=self.device,
            tokenizer_hash=self.tokenizer_hash,
            sinks=sinks,
            window=window,
            spare=spare,
        )
