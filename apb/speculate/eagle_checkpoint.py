"""Loading EAGLE heads of all published layouts: what they are is told by their tensors.

Letters: E width of the target's states, M hidden size of the head, C tokens that the head scores,
V the target's vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from apb.errors import InputError
from apb.rotary import Rotary
from apb.speculate.eagle3_head import Eagle3Head, Eagle3Norms
from apb.speculate.eagle_head import Eagle2Head, EagleHead, HeadShape
from apb.speculate.eagle_layouts import HeadFiles
from apb.speculate.eagle_options import (
    HeadOptions,
    HeadSettings,
    RopeSource,
    TargetFacts,
    chosen_options,
)
from apb.speculate.eagle_rotary import own_rotary

_BESIDE_THE_HEAD = frozenset(
    {"embed_tokens.weight", "lm_head.weight", "d2t", "t2d", "hot_token_id"}
)
_FIRST_LAYER = "layers.0.self_attn."


@dataclass(frozen=True, slots=True, eq=False)
class EagleCheckpoint:
    """A head, and what else its folder holds.

    Attributes:
        embedding_VM: its own input embedding, which may be a copy of the target's.
        lm_head_CM: its own LM head; without one the target's is used.
        ids_C: the target's ids of the tokens that the head scores; None for all, in order.
    """

    head: EagleHead
    options: HeadOptions
    embedding_VM: Tensor | None
    lm_head_CM: Tensor | None
    ids_C: Tensor | None

    @classmethod
    def read(
        cls, folder: str | Path, target: TargetFacts, settings: HeadSettings | None = None
    ) -> EagleCheckpoint:
        """The head in a folder of any known layout, on the CPU in the dtype it is stored in.

        Raises:
            InputError: a file is missing or damaged, it is no EAGLE head, or is one for another
                target.
        """
        files = HeadFiles.read(folder)
        return _Reader(files, target, settings or HeadSettings()).checkpoint()


class _Reader:
    """One checkpoint against one target."""

    def __init__(self, files: HeadFiles, target: TargetFacts, settings: HeadSettings) -> None:
        self._files, self._target, self._settings = files, target, settings
        self._folder, self._tensors = files.folder, files.tensors
        hidden_size, self._state_size = files.shape("fc.weight")
        self._is_eagle3 = files.shape(_FIRST_LAYER + "q_proj.weight")[1] == 2 * hidden_size
        self._hidden_size = hidden_size

    def checkpoint(self) -> EagleCheckpoint:
        self._check_target()
        shape = self._shape()
        num_states = len(shape.state_sizes) if self._is_eagle3 else 0
        options = chosen_options(self._files, self._target, self._settings, num_states)
        with torch.device("meta"):
            head = self._head(shape, options)
        self._fill(head)
        head.rotary = self._rotary(shape, options)
        ids_C = self._ids()
        embedding_VM, lm_head_CM = self._table("embed_tokens.weight"), self._table("lm_head.weight")
        self._check_tables(embedding_VM, lm_head_CM, ids_C)
        return EagleCheckpoint(head, options, embedding_VM, lm_head_CM, ids_C)

    def _check_target(self) -> None:
        config, target = self._files.config, self._target
        theirs = config.get("tokenizer_hash")
        if theirs is not None and target.tokenizer_hash not in (None, theirs):
            raise InputError(
                f"{self._folder} was trained with another tokenizer (hash {str(theirs)[:12]}, this "
                f"model's is {str(target.tokenizer_hash)[:12]}): choose a head made for this model"
            )
        sizes = (
            ("vocabulary", self._files.layer_config.get("vocab_size"), target.vocab_size),
            ("hidden size", config.get("target_hidden_size"), target.hidden_size),
        )
        for what, given, wanted in sizes:
            if given is not None and given != wanted:
                raise InputError(
                    f"{self._folder} was trained for a model with {what} {given}, and this one has "
                    f"{wanted}: choose a head made for this model"
                )

    def _shape(self) -> HeadShape:
        config, tensors = self._files.layer_config, self._tensors
        if config.get("hidden_act", "silu") != "silu":
            raise InputError(
                f"{self._folder} uses activation {config['hidden_act']!r}, and apb runs heads with "
                "'silu' alone"
            )
        num_heads, num_kv_heads, head_dim = self._head_sizes()
        layers = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
        return HeadShape(
            hidden_size=self._hidden_size,
            intermediate_size=self._files.shape("layers.0.mlp.up_proj.weight")[0],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            state_sizes=self._state_sizes(),
            num_layers=len(layers),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            fc_bias="fc.bias" in tensors,
            qkv_bias=_FIRST_LAYER + "q_proj.bias" in tensors,
            o_bias=_FIRST_LAYER + "o_proj.bias" in tensors,
            mlp_bias="layers.0.mlp.up_proj.bias" in tensors,
            qk_norm=_FIRST_LAYER + "q_norm.weight" in tensors,
        )

    def _head_sizes(self) -> tuple[int, int, int]:
        """Query heads, key/value heads, and what each of them holds."""
        config = self._files.layer_config
        q_size = self._files.shape(_FIRST_LAYER + "q_proj.weight")[0]
        num_heads = config.get("num_attention_heads")
        num_kv_heads = config.get("num_key_value_heads") or num_heads
        if (
            isinstance(num_heads, int)
            and isinstance(num_kv_heads, int)
            and min(num_heads, num_kv_heads) > 0
            and num_heads % num_kv_heads == 0
            and q_size % (2 * num_heads) == 0
        ):
            return num_heads, num_kv_heads, q_size // num_heads
        raise InputError(
            f"{self._folder}: {q_size} rows of {_FIRST_LAYER}q_proj.weight do not split into "
            f"num_attention_heads={num_heads} and num_key_value_heads={num_kv_heads}"
        )

    def _state_sizes(self) -> tuple[int, ...]:
        """EAGLE-1/2: one state beside an embedding of the same size; EAGLE-3: some layers' states.

        Raises:
            InputError: it reads states of another width than the target's.
        """
        size = self._target.hidden_size
        count, rest = divmod(self._state_size, size)
        if rest or (not self._is_eagle3 and (count != 2 or self._hidden_size != size)):
            raise InputError(
                f"{self._folder} was trained for another model: tensor fc.weight is "
                f"{[self._hidden_size, self._state_size]}, which does not fit hidden size {size}"
            )
        return (size,) * (count if self._is_eagle3 else 1)

    def _head(self, shape: HeadShape, options: HeadOptions) -> EagleHead:
        rotary = self._target.rotary
        if not self._is_eagle3:
            return Eagle2Head(shape, rotary)
        norms = Eagle3Norms(
            each_state="fc_norm.0.weight" in self._tensors,
            all_states="input_norm.weight" in self._tensors,
            residual=options.norm_before_residual.value,
            output=options.norm_output.value,
        )
        return Eagle3Head(shape, rotary, norms)

    def _fill(self, head: EagleHead) -> None:
        """Put the tensors into the head, all of them and none else."""
        wanted = {name: list(tensor.shape) for name, tensor in head.state_dict().items()}
        for name, shape in wanted.items():
            if name not in self._tensors:
                raise InputError(f"{self._folder} has no tensor {name} {shape}")
            found = list(self._tensors[name].shape)
            if found != shape:
                raise InputError(f"{self._folder}: tensor {name} is {found} instead of {shape}")
        unknown = sorted(set(self._tensors) - set(wanted) - _BESIDE_THE_HEAD)
        if unknown:
            family = "EAGLE-3" if self._is_eagle3 else "EAGLE-2"
            raise InputError(
                f"{self._folder} looks like an {family} head but has tensor {unknown[0]}, which "
                "apb does not know: choose another head"
            )
        head.load_state_dict({name: self._tensors[name] for name in wanted}, assign=True)

    def _rotary(self, shape: HeadShape, options: HeadOptions) -> Rotary:
        if options.rope.value is RopeSource.own:
            return own_rotary(self._files.layer_config, shape.head_dim)
        rotary = self._target.rotary
        if 2 * len(rotary.inv_freq_F) != shape.head_dim:
            raise InputError(
                f"{self._folder} has heads of size {shape.head_dim}, and the model's rotary "
                f"embedding is for {2 * len(rotary.inv_freq_F)}: set drafter.rope=own"
            )
        return rotary

    def _table(self, name: str) -> Tensor | None:
        """A matrix with a row for each token."""
        tensor = self._tensors.get(name)
        if tensor is not None and self._files.shape(name)[1] != self._hidden_size:
            raise InputError(
                f"{self._folder}: tensor {name} is {list(tensor.shape)}, and the head has hidden "
                f"size {self._hidden_size}"
            )
        return tensor

    def _ids(self) -> Tensor | None:
        """The target's ids of the head's own, in range and distinct; None where they are equal."""
        ids_C = self._tensors.get("hot_token_id")
        if ids_C is None and (offsets_C := self._tensors.get("d2t")) is not None:
            ids_C = offsets_C.long().flatten()
            ids_C = ids_C + torch.arange(len(ids_C))
        if ids_C is None:
            return None
        ids_C, vocab_size = ids_C.long(), self._target.vocab_size
        in_order_C = ids_C.unique()
        if int(in_order_C[0]) < 0 or int(in_order_C[-1]) >= vocab_size:
            raise InputError(
                f"{self._folder} maps its tokens to ids from {int(in_order_C[0])} to "
                f"{int(in_order_C[-1])}, outside 0 to {vocab_size - 1}, the model's vocabulary"
            )
        if len(in_order_C) < len(ids_C):
            raise InputError(
                f"{self._folder} maps {len(ids_C)} tokens to {len(in_order_C)} ids: its d2t is "
                "damaged"
            )
        is_used_V = self._tensors.get("t2d")
        if is_used_V is not None and not torch.equal(is_used_V.nonzero().flatten(), in_order_C):
            raise InputError(
                f"{self._folder} contradicts itself: its t2d marks {int(is_used_V.sum())} ids, not "
                f"the {len(ids_C)} of its d2t"
            )
        return None if torch.equal(ids_C, torch.arange(vocab_size)) else ids_C

    def _check_tables(
        self, embedding_VM: Tensor | None, lm_head_CM: Tensor | None, ids_C: Tensor | None
    ) -> None:
        vocab_size = self._target.vocab_size
        num_scored = vocab_size if ids_C is None else len(ids_C)
        tables = (
            ("embed_tokens.weight", embedding_VM, vocab_size),
            ("lm_head.weight", lm_head_CM, num_scored),
        )
        for name, table, num_rows in tables:
            if table is None and self._hidden_size != self._target.hidden_size:
                raise InputError(
                    f"{self._folder} has no tensor {name}, and the model's cannot stand in: its "
                    f"hidden size is {self._target.hidden_size}, the head's {self._hidden_size}"
                )
            if table is not None and len(table) != num_rows:
                raise InputError(
                    f"{self._folder}: tensor {name} has {len(table)} rows instead of {num_rows}, "
                    "one per token"
                )
