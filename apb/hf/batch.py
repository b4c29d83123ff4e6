"""Answers to many prompts at once by transformers' own `generate`, as data to train on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from apb.hf.model import CausalLM


class BatchGenerator:
    """A model that answers prompts side by side, each with all of it in view.

    It takes the model over: its attention is transformers' own from now on.
    """

    def __init__(self, model: CausalLM, stop_ids: Iterable[int]) -> None:
        self._model: Any = model.hf
        self._model.set_attn_implementation("sdpa")
        self._stop_ids = sorted(stop_ids)

    @torch.inference_mode()
    def answers(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: float, seed: int
    ) -> list[list[int]]:
        """Up to `max_tokens` ids each, with the stop token that ended them; greedy at 0."""
        longest = max(map(len, prompts))
        pad = self._stop_ids[0]
        rows = [[pad] * (longest - len(ids)) + list(ids) for ids in prompts]
        shown = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        sampled = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
        config = GenerationConfig(
            max_new_tokens=max_tokens,
            pad_token_id=pad,
            eos_token_id=self._stop_ids,
            **{"do_sample": False, **sampled},
        )
        torch.manual_seed(seed)
        output = self._model.generate(
            input_ids=torch.tensor(rows, device=self._model.device),
            attention_mask=torch.tensor(shown, device=self._model.device),
            generation_config=config,
        )
        return [self._until_stop(ids) for ids in output[:, longest:].tolist()]

    def _until_stop(self, ids: list[int]) -> list[int]:
        ends = (place for place, token_id in enumerate(ids) if token_id in self._stop_ids)
        return ids[: next(ends, len(ids) - 1) + 1]
