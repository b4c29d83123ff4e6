"""The sizes of a Hugging Face model, for planning."""

from __future__ import annotations

from transformers import PreTrainedConfig

from apb.cost import ModelShape


def model_shape(config: PreTrainedConfig) -> ModelShape:
    """What the cost model needs of a configuration."""
    heads = config.num_attention_heads
    return ModelShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        num_embeddings=1 if config.tie_word_embeddings else 2,
    )
