"""GGUF files: loading them, and converting them to a Hugging Face model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from transformers.utils.import_utils import is_accelerate_available, is_gguf_available

from apb.errors import InputError


def check_gguf_support() -> None:
    """Raises InputError where the packages that read GGUF are missing."""
    if not (is_gguf_available() and is_accelerate_available()):
        raise InputError("reading a GGUF file needs two more packages: pip install gguf accelerate")


def convert_gguf(gguf_path: Path, out_dir: Path) -> None:
    """Leaves the model in bfloat16 and its tokenizer in `out_dir`, for `from_pretrained`."""
    check_gguf_support()
    logging.disable_progress_bar()
    load_gguf_tokenizer(gguf_path).save_pretrained(out_dir)
    loaded = load_gguf_model(gguf_path, torch.float32)
    # A model that came from GGUF refuses to be saved; a new one takes its weights.
    model: Any = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(out_dir)


def load_gguf_model(gguf_path: Path, dtype: torch.dtype) -> Any:
    """The causal LM in a GGUF file, its weights unpacked to `dtype`."""
    check_gguf_support()
    # Older releases always unpack and have no such setting; newer ones may keep the weights packed.
    unpack: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf_path.parent, gguf_file=gguf_path.name, dtype=dtype, **unpack
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return loaded


def load_gguf_tokenizer(gguf_path: Path) -> Any:
    """The tokenizer in a GGUF file, with SmolLM's split of digits, which transformers drops."""
    check_gguf_support()
    from gguf import GGUFReader

    tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    split = GGUFReader(gguf_path).get_field("tokenizer.ggml.pre")
    if split is not None and split.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    return tokenizer
