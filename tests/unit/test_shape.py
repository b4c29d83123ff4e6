"""The cost model's parameters are those of the models that transformers builds."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from apb.hf.shape import model_shape


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_as_often_as_they_exist(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.tie_weights()
    matrices = {id(weight): weight.numel() for weight in model.parameters() if weight.dim() == 2}
    shape = model_shape(config)
    assert shape.num_parameters == sum(matrices.values())
    embedding = shape.vocab_size * shape.hidden_size
    assert shape.num_parameters - shape.read_parameters == (0 if tied else embedding)
