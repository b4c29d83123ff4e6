"""An unmodified Hugging Face causal LM that runs packed rows with apb's attention."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any
from weakref import WeakSet

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from apb.attention.base import AttentionTarget, LayerInputs
from apb.cache import CacheShape
from apb.cost import ModelShape
from apb.errors import InputError
from apb.hf import attention
from apb.hf.checkpoint import Checkpoint, check_supported
from apb.hf.chunk import run_in_chunks
from apb.hf.gguf import load_gguf_model
from apb.hf.lean import LeanDecoder
from apb.hf.linear import MIN_ROWS, WideLinears
from apb.hf.manifest import Share
from apb.hf.phases import layers_traced
from apb.hf.shape import model_shape
from apb.hf.tap import PassTap, watch
from apb.methods.base import Attend
from apb.model_config import CHUNK_LEN, ModelConfig
from apb.packed import MAX_ROWS, has_fast_bf16
from apb.speculate.base import Needs
from apb.trace.recorder import OFF, Trace
from apb.trace.records import Phase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device multiplies it fast, float32 otherwise."""
    if name == "auto":
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    return DTYPES[name]


def load_config(config: ModelConfig) -> PreTrainedConfig:
    """The model's configuration, checked; no weight is read.

    Raises:
        InputError: not found, or not supported.
    """
    if config.architecture is None:
        return Checkpoint.find(config).load_config()
    options = dict(config.architecture)
    hf_config = AutoConfig.for_model(options.pop("model_type"), **options)
    check_supported(hf_config)
    return hf_config


class CausalLM:
    """Runs rows of one document through the decoder layers; the LM head only where asked."""

    def __init__(
        self, model: PreTrainedModel, device: torch.device, *, chunk_len: int = CHUNK_LEN
    ) -> None:
        attention.register()
        model.set_attn_implementation(attention.IMPLEMENTATION)
        # nn.Module's `to` as transformers decorates it has no usable type.
        self._model: Any = model.eval().requires_grad_(False)
        self._model.to(device)
        run_in_chunks(self._model, chunk_len)
        self._taps: WeakSet[PassTap] = WeakSet()
        self._is_watched = False
        self._is_lean = LeanDecoder.suits(self._model)
        self._lean: LeanDecoder | None = None
        self._device = device
        self._wide = WideLinears.suit(device)

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        chunk_len: int = CHUNK_LEN,
        share: Share | None = None,
    ) -> CausalLM:
        """Load weights, memory-mapped and so shared by ranks where they have the dtype asked for.

        Args:
            chunk_len: bounds the rows that MLPs and norms work on at once.
            share: of checking the files against `model.sha256`; by default this rank's, where all
                ranks of the machine load the model.

        Raises:
            InputError: unreadable or unfitting weights.
        """
        hf_config = load_config(config)
        if config.architecture is not None:
            return cls(
                _random_model(hf_config, config.weights_seed, dtype), device, chunk_len=chunk_len
            )
        checkpoint = Checkpoint.find(config)
        checkpoint.check_digests(config, share or Share.of_this_rank())
        transformers_logging.disable_progress_bar()
        return cls(_read_weights(checkpoint, dtype), device, chunk_len=chunk_len)

    @property
    def hf(self) -> Any:
        """The Hugging Face model."""
        return self._model

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._model.dtype
        return dtype

    @property
    def cache_shape(self) -> CacheShape:
        shape = self.shape
        return CacheShape(shape.num_layers, shape.num_kv_heads, shape.head_dim, self.dtype)

    @property
    def shape(self) -> ModelShape:
        return model_shape(self._model.config)

    @property
    def attention_target(self) -> AttentionTarget:
        """What an attention backend for this model works on."""
        return AttentionTarget(self.device, self.dtype, self.shape.head_dim)

    @property
    def weight_bytes(self) -> int:
        sizes = (weight.numel() * weight.element_size() for weight in self._model.parameters())
        return sum(sizes)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Sequence[int],
        positions_T: Tensor,
        attend: Attend,
        trace: Trace = OFF,
    ) -> Tensor:
        """Final hidden states ``[T, M]`` of packed rows; `attend` is called once per layer.

        `token_ids` may be empty: the rank then takes part in the layers' exchanges only. `trace`
        is told of the layers' parts, unless a few rows run without the layers' modules.
        """
        if not token_ids:
            return self._forward_nothing(attend, trace)
        if self._is_lean and len(token_ids) <= MAX_ROWS:
            return self._few_rows.forward(token_ids, positions_T, attend, self._taps)
        if trace.is_on:
            with layers_traced(self._model.base_model, attend, trace) as traced:
                return self.forward(token_ids, positions_T, traced)
        ids_1T = torch.tensor([list(token_ids)], dtype=torch.int64, device=self.device)
        wide = self._wide and len(token_ids) >= MIN_ROWS
        with WideLinears() if wide else nullcontext():
            output = self._model.base_model(
                input_ids=ids_1T,
                position_ids=positions_T[None],
                use_cache=False,
                apb_attend=attend,
            )
        hidden_TM: Tensor = output.last_hidden_state[0]
        return hidden_TM

    @property
    def _few_rows(self) -> LeanDecoder:
        """Made when it is first needed, so that a rank that never decodes packs no weights."""
        if self._lean is None:
            self._lean = LeanDecoder(self._model)
        return self._lean

    def tap(self, needs: Needs) -> PassTap:
        """Keep those states of every forward pass from now on."""
        tap = PassTap(needs)
        self._taps.add(tap)  # and let go with its drafter
        if not self._is_watched:
            self._is_watched = True
            watch(self._model.base_model, self._taps)
        return tap

    def _forward_nothing(self, attend: Attend, trace: Trace) -> Tensor:
        """transformers cannot reshape zero rows: a rank without a block only meets the others."""
        config, shape = self._model.config, self.cache_shape
        hidden_TM = torch.empty(0, config.hidden_size, dtype=self.dtype, device=self.device)
        q_HTD = hidden_TM.new_empty(config.num_attention_heads, 0, shape.head_dim)
        kv_KTD = hidden_TM.new_empty(shape.num_kv_heads, 0, shape.head_dim)
        for layer_idx, layer in enumerate(self._model.base_model.layers):
            scale = layer.self_attn.scaling  # of use where a rank attends for others (`ulysses`)
            with trace.span(Phase.ATTENTION, layer_idx):
                attend(LayerInputs(layer_idx, q_HTD, kv_KTD, kv_KTD, scale))
        return hidden_TM

    @torch.inference_mode()
    def logits(self, hidden_TM: Tensor) -> Tensor:
        """Logits ``[T, V]`` in fp32."""
        if self._is_lean and hidden_TM.shape[0] <= MAX_ROWS:
            return self._few_rows.logits(hidden_TM)
        head = self._model.get_output_embeddings()
        logits_TV: Tensor = head(hidden_TM).float()
        return logits_TV


def _read_weights(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The Hugging Face model with all of its weights.

    Raises:
        InputError: unreadable or unfitting weights.
    """
    try:
        if checkpoint.gguf is not None:
            return load_gguf_model(checkpoint.gguf, dtype)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.location,
            **checkpoint.options,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, and by name
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot load {checkpoint.location}: {reason}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"{checkpoint.location} lacks {len(missing)} weights of its own configuration, "
            f"{missing[0]} first: the download is incomplete or of another model"
        )
    if unfitting := sorted(report["mismatched_keys"]):
        name, there, wanted = unfitting[0]
        raise InputError(
            f"{checkpoint.location} has {name} as {tuple(there)} where its own configuration says "
            f"{tuple(wanted)}: the weights are of another model"
        )
    return model


def _random_model(config: PreTrainedConfig, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights, the same on every rank and whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    cast: PreTrainedModel = model.to(dtype)
    return cast
