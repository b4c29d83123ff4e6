"""A small Hugging Face model that drafts: what it has read lies in a windowed cache.

Letters: L layers, T rows of this pass, P rows read since the last `keep`, S slots of the cache,
H query heads, K key/value heads, G = H / K, D head dim, M hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from apb.attention.base import LayerInputs
from apb.cache import CacheShape
from apb.errors import InputError
from apb.hf.manifest import Share
from apb.hf.model import CausalLM
from apb.hf.tokenizer import load_tokenizer, vocabulary_hash
from apb.model_config import ModelConfig


class DraftCache:
    """KV of the first `sinks` tokens and of the last `window` ones (StreamingLLM,
    https://arxiv.org/abs/2309.17453), keys at their true positions.

    Rows that were just read lie behind the others until `keep` tells which of them stay; they then
    take the places of the oldest in the window. Attention asks for no order, so nothing is moved
    to close gaps.
    """

    def __init__(
        self, shape: CacheShape, *, sinks: int, window: int, spare: int, device: torch.device
    ) -> None:
        self._sinks, self._window = sinks, window
        self._kv_L2KSD = torch.empty(
            (shape.num_layers, 2, shape.num_kv_heads, sinks + window + spare, shape.head_dim),
            dtype=shape.dtype,
            device=device,
        )
        self.clear()

    def clear(self) -> None:
        self._num_seen = 0
        self.num_read = 0
        """Rows that `keep` has not judged yet."""

    @property
    def num_kept(self) -> int:
        return min(self._num_seen, self._sinks + self._window)

    @property
    def room(self) -> int:
        """Rows that may still be read before `keep` has to follow."""
        return self._kv_L2KSD.shape[3] - self.num_kept - self.num_read

    def append(self, layer_idx: int, k_KTD: Tensor, v_KTD: Tensor) -> tuple[Tensor, Tensor]:
        """One layer's keys and values ``[K, S, D]``: kept, read before, and these."""
        start = self.num_kept + self.num_read
        stop = start + k_KTD.shape[1]
        self._kv_L2KSD[layer_idx, 0, :, start:stop] = k_KTD
        self._kv_L2KSD[layer_idx, 1, :, start:stop] = v_KTD
        kv_2KSD = self._kv_L2KSD[layer_idx, :, :, :stop]
        return kv_2KSD[0], kv_2KSD[1]

    def keep(self, rows: Sequence[int]) -> None:
        """Of the rows just read, keep some, in order of position, and forget the others."""
        slots = [self._slot(self._num_seen + i) for i in range(len(rows))]
        sources = [self.num_kept + row for row in rows]
        if slots != sources:
            device = self._kv_L2KSD.device
            kept = self._kv_L2KSD[:, :, :, torch.tensor(sources, dtype=torch.int64, device=device)]
            self._kv_L2KSD[:, :, :, torch.tensor(slots, dtype=torch.int64, device=device)] = kept
        self._num_seen += len(rows)
        self.num_read = 0

    def _slot(self, index: int) -> int:
        """Where the token that is kept as the index-th goes."""
        if index < self._sinks:
            return index
        return self._sinks + (index - self._sinks) % self._window


class HfDraftModel:
    """A causal LM and its cache: `apb.speculate.base.DraftModel`."""

    def __init__(self, model: CausalLM, *, sinks: int, window: int, spare: int) -> None:
        self._model, self._vocab_size = model, model.shape.vocab_size
        self._cache = DraftCache(
            model.cache_shape, sinks=sinks, window=window, spare=spare, device=model.device
        )

    @property
    def head_VM(self) -> Tensor:
        weight: Tensor = self._model.hf.get_output_embeddings().weight
        return weight

    @property
    def room(self) -> int:
        return self._cache.room

    def clear(self) -> None:
        self._cache.clear()

    def read(
        self, token_ids: Sequence[int], positions: Sequence[int], visible_TP: Tensor | None = None
    ) -> Tensor:
        # On a GPU an id without a row would end the process, and the answer with it.
        if max(token_ids) >= self._vocab_size:
            raise ValueError(f"the draft model has no token {max(token_ids)}")
        positions_T = torch.tensor(positions, dtype=torch.int64, device=self._model.device)
        attend = partial(self._attend, self._visible(len(token_ids), visible_TP))
        states_TM = self._model.forward(token_ids, positions_T, attend)
        self._cache.num_read += len(token_ids)
        return states_TM

    def keep(self, rows: Sequence[int]) -> None:
        self._cache.keep(rows)

    def _visible(self, num_rows: int, visible_TP: Tensor | None) -> Tensor | None:
        """What new rows see of the cache and of each other.

        None where the kernel needs no mask: one row that sees everything, or plainly causal rows.
        """
        num_kept = self._cache.num_kept
        num_slots = num_kept + self._cache.num_read + num_rows
        visible_TS = torch.ones(num_rows, num_slots, dtype=torch.bool)
        if visible_TP is not None:
            visible_TS[:, num_kept:] = visible_TP
        elif num_rows == num_slots:
            return None
        else:
            visible_TS.tril_(num_slots - num_rows)
        return None if bool(visible_TS.all()) else visible_TS.to(self._model.device)

    def _attend(self, visible_TS: Tensor | None, layer: LayerInputs) -> Tensor:
        k_KSD, v_KSD = self._cache.append(layer.layer_idx, layer.k_KTD, layer.v_KTD)
        q_KGTD = layer.q_HTD.unflatten(0, (k_KSD.shape[0], -1))
        groups, num_rows = q_KGTD.shape[1:3]
        out_KGTD = F.scaled_dot_product_attention(
            q_KGTD,
            k_KSD[:, None].expand(-1, groups, -1, -1),
            v_KSD[:, None].expand(-1, groups, -1, -1),
            attn_mask=visible_TS,
            is_causal=visible_TS is None and num_rows > 1,
            scale=layer.scale,
        )
        return out_KGTD.flatten(0, 1).transpose(0, 1)


def load_draft_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tokenizer_hash: str,
    sinks: int,
    window: int,
    spare: int,
) -> HfDraftModel:
    """The model, as far as it fits the target.

    Args:
        tokenizer_hash: of the target's vocabulary, which has to be the model's.
        spare: rows that may be read at once when the window is full.

    Raises:
        InputError: not found, not supported, or of another tokenizer.
    """
    try:
        own_hash = vocabulary_hash(load_tokenizer(config))
        if own_hash != tokenizer_hash:
            raise InputError(
                f"its tokenizer is not the target's (vocabulary {own_hash[:12]}, the target's "
                f"{tokenizer_hash[:12]}): choose a smaller model of the target's family"
            )
        # No other rank loads it, and so none shares the check of its files.
        model = CausalLM.load(config, dtype=dtype, device=device, share=Share())
    except InputError as error:
        reason = str(error).replace("model.path", "drafter.model")
        raise InputError(f"drafter.model={config.name}: {reason}") from error
    return HfDraftModel(model, sinks=sinks, window=window, spare=spare)
