"""A tokenizer made in code: one token per UTF-8 byte, for tests and random models."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Sequence
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

CONTROL_TOKENS = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
"""Their ids follow the 256 bytes, in this order."""

_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for turn in messages %}"
    "<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 260 tokens: the 256 bytes under their value, then `CONTROL_TOKENS`.

    Any text comes back exactly. Special tokens, where asked for, are a BOS before the text.
    """
    # No character is in this vocabulary, so each falls back to its bytes.
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    tokenizer = Tokenizer(BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = Sequence([ByteFallback(), Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL_TOKENS])
    bos, eos = CONTROL_TOKENS[:2]
    bos_entry = (bos, tokenizer.token_to_id(bos))
    tokenizer.post_processor = TemplateProcessing(f"{bos} $A", special_tokens=[bos_entry])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        chat_template=_CHAT_TEMPLATE,
    )
