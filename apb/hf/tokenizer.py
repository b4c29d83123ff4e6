"""Loading a model's tokenizer and the tokens that end its answers."""

from __future__ import annotations

import hashlib
import json

from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from apb.errors import InputError
from apb.hf.byte_tokenizer import byte_tokenizer
from apb.hf.checkpoint import Checkpoint
from apb.hf.gguf import load_gguf_tokenizer
from apb.model_config import ModelConfig


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer; models with random weights read bytes.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    if config.architecture is not None:
        return byte_tokenizer()
    checkpoint = Checkpoint.find(config)
    tokenizer: PreTrainedTokenizerBase
    try:
        if checkpoint.gguf is not None:
            tokenizer = load_gguf_tokenizer(checkpoint.gguf)
        else:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.location, **checkpoint.options)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"cannot read the tokenizer of {checkpoint.location}: {reason}") from error
    return tokenizer


def stop_ids(
    config: ModelConfig, hf_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """Every token that the model's own files name as an end."""
    named: list[int | list[int] | None] = [hf_config.eos_token_id, tokenizer.eos_token_id]
    checkpoint = None if config.architecture is not None else Checkpoint.find(config)
    if checkpoint is not None and checkpoint.gguf is None:
        try:
            generation = GenerationConfig.from_pretrained(
                checkpoint.location, revision=config.revision or "main"
            )
        except OSError:  # the file is optional
            pass
        else:
            named.append(generation.eos_token_id)
    ids: set[int] = set()
    for value in named:
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(ids)


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """The same for two tokenizers that give the same ids to the same tokens."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()
