"""The part of the vocabulary that a drafter scores, as a file and in memory.

Letters: C tokens of that part.
"""

from __future__ import annotations

import io
import logging
import os
import re
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from apb.errors import InputError
from apb.files import written_whole

SUFFIXES = (".safetensors", ".pt")
"""Of frequency lists."""
_KIND, _VERSION = "apb frequency list", "1"
_BUILD = "build one with `python -m apb.frequency build`"
_log = logging.getLogger(__name__)


class _Stored(NamedTuple):
    """What a file holds, in the order of `DraftVocabulary`'s fields."""

    ids: list[int]
    counts_C: Tensor | None = None
    corpus_tokens: int | None = None
    tokenizer_hash: str | None = None
    corpus: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class DraftVocabulary:
    """The target's ids that a drafter's LM head is trimmed to, ranked by how often they occur.

    FR-Spec (Zhao et al. 2025, https://arxiv.org/abs/2502.14856) counts them in a corpus, VocabTrim
    (Goel et al. 2025, https://arxiv.org/abs/2506.22694) in the target's own answers. The target
    keeps its full head, so what is missing costs acceptance and never changes an answer.

    Attributes:
        token_ids_C: distinct, the best ranked first.
        counts_C: occurrences in the corpus, where they are known.
        corpus_tokens: of the whole corpus, whether listed or not.
        tokenizer_hash: `DraftTarget.tokenizer_hash` of the model whose ids these are.
        corpus: what was counted, in words.
    """

    token_ids_C: Tensor
    counts_C: Tensor | None = None
    corpus_tokens: int | None = None
    tokenizer_hash: str | None = None
    corpus: str = ""

    def __post_init__(self) -> None:
        assert self.token_ids_C.dtype == torch.int64
        assert self.token_ids_C.dim() == 1
        assert 0 < len(self) == self.token_ids_C.unique().numel()
        assert self.counts_C is None or self.counts_C.shape == self.token_ids_C.shape

    @classmethod
    def ranked(
        cls,
        counts_V: Tensor,
        size: int,
        *,
        stop_ids: Collection[int],
        weights_V: Tensor | None = None,
        tokenizer_hash: str | None = None,
        corpus: str = "",
    ) -> DraftVocabulary:
        """The `size` most frequent ids, all stop tokens among them; of equals the lower ids.

        `counts_V` has the occurrences of every id of the vocabulary; where a corpus has parts that
        do not weigh what they count, ids are ranked by `weights_V`.
        """
        ranking_V = counts_V if weights_V is None else weights_V
        order_V = ranking_V.argsort(descending=True, stable=True)
        total = int(counts_V.sum())
        everything = cls(order_V, counts_V[order_V], total, tokenizer_hash, corpus)
        return everything.first(size, stop_ids)

    def __len__(self) -> int:
        return self.token_ids_C.numel()

    @property
    def coverage(self) -> float | None:
        """The share of the corpus that is listed tokens."""
        if self.counts_C is None or not self.corpus_tokens:
            return None
        return int(self.counts_C.sum()) / self.corpus_tokens

    def first(self, size: int, stop_ids: Collection[int]) -> DraftVocabulary:
        """Exactly `size` ids: all of `stop_ids`, listed or not, and the most frequent others.

        Raises:
            InputError: there are fewer ids, or more stop tokens than `size`.
        """
        listed = self.with_ids(sorted(stop_ids))
        stop_tensor = torch.tensor(sorted(stop_ids), dtype=torch.int64)
        is_stop_C = torch.isin(listed.token_ids_C, stop_tensor)
        others = size - int(is_stop_C.sum())
        if others < 0 or not 0 < size <= len(listed):
            raise InputError(
                f"a list of {len(listed)} token ids cannot be cut to {size}: choose a size from "
                f"{max(1, size - others)}, which holds the stop tokens, to {len(listed)}"
            )
        kept_C = is_stop_C | ((~is_stop_C).cumsum(0) <= others)
        counts_C = None if listed.counts_C is None else listed.counts_C[kept_C]
        return replace(listed, token_ids_C=listed.token_ids_C[kept_C], counts_C=counts_C)

    def with_ids(self, ids: Iterable[int]) -> DraftVocabulary:
        """Further ids behind the listed ones, in order of appearance and each once.

        How often they occur in the corpus is not known, so that a list that grows has no counts.
        """
        known = set(self.token_ids_C.tolist())
        new = [token_id for token_id in dict.fromkeys(ids) if token_id not in known]
        if not new:
            return self
        token_ids_C = torch.cat([self.token_ids_C, torch.tensor(new, dtype=torch.int64)])
        return replace(self, token_ids_C=token_ids_C, counts_C=None)

    @classmethod
    def read(
        cls, path: str | Path, *, vocab_size: int, tokenizer_hash: str | None = None
    ) -> DraftVocabulary:
        """A list that `write` has written, or any `.pt` of ids as FR-Spec publishes them.

        Raises:
            InputError: it cannot be read, or was made for another vocabulary.
        """
        path = checked_path(path)
        stored = _read_pt(path) if path.suffix == ".pt" else _read_safetensors(path)
        theirs = stored.tokenizer_hash
        if theirs is not None and tokenizer_hash is not None and theirs != tokenizer_hash:
            raise InputError(
                f"{path} was made with another tokenizer (hash {theirs[:12]}, this model's is "
                f"{tokenizer_hash[:12]}): {_BUILD} for this model"
            )
        if not stored.ids:
            raise InputError(f"{path} lists no token ids: {_BUILD}")
        for token_id in stored.ids:
            if not 0 <= token_id < vocab_size:
                raise InputError(
                    f"{path} lists token id {token_id}, outside 0 to {vocab_size - 1}, the "
                    f"model's vocabulary: {_BUILD} for this model"
                )
        return cls(torch.tensor(stored.ids, dtype=torch.int64), *stored[1:])

    def write(self, path: str | Path) -> None:
        """Write the file whole or not at all.

        A `.safetensors` holds everything, a `.pt` the ids alone: the list of integers that FR-Spec
        reads, and SGLang with ``--speculative-token-map``.

        Raises:
            InputError: it is neither, or cannot be written there.
        """
        path = checked_path(path, to_write=True)
        try:
            with written_whole(path) as scratch:
                is_pt = path.suffix == ".pt"
                scratch.write_bytes(self._as_pt() if is_pt else self._as_safetensors())
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from error

    def _as_pt(self) -> bytes:
        buffer = io.BytesIO()
        torch.save(self.token_ids_C.tolist(), buffer)
        return buffer.getvalue()

    def _as_safetensors(self) -> bytes:
        tensors = {"token_ids": self.token_ids_C}
        corpus = self.corpus.encode("utf-8", "replace").decode()  # paths may be anything
        metadata = {"kind": _KIND, "version": _VERSION, "corpus": corpus}
        if self.counts_C is not None:
            tensors["counts"] = self.counts_C
        if self.corpus_tokens is not None:
            metadata["corpus_tokens"] = str(self.corpus_tokens)
        if self.tokenizer_hash is not None:
            metadata["tokenizer_hash"] = self.tokenizer_hash
        return bytes(safetensors.torch.save(tensors, metadata))


def checked_path(name: str | Path, *, to_write: bool = False) -> Path:
    """The path of a frequency list.

    Raises:
        InputError: its name says neither of the two formats, or it cannot be read or written.
    """
    path = Path(name).expanduser()
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"{path} is no name of a frequency list: it has to end in {' or '.join(SUFFIXES)}"
        )
    if not to_write and not (path.is_file() and os.access(path, os.R_OK)):
        raise InputError(f"{path} is no readable file: give another frequency list or {_BUILD}")
    if to_write and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise InputError(
            f"{path} cannot be written: give a file in a folder that exists and can be written to"
        )
    return path


def _read_pt(path: Path) -> _Stored:
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's doubts about the pickle's version
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails with any exception
        raise InputError(
            f"{path} cannot be read as a list of token ids: it is truncated or damaged, or holds "
            f"objects that apb does not unpickle because they could run code; {_BUILD}"
        ) from error
    ids = loaded.tolist() if isinstance(loaded, Tensor) else loaded
    if not isinstance(ids, list) or any(type(token_id) is not int for token_id in ids):
        raise InputError(f"{path} holds something other than a list of token ids: {_BUILD}")
    # FR-Spec's own script lists the BOS token twice and its lists have one entry too many.
    distinct = list(dict.fromkeys(ids))
    if len(distinct) < len(ids):
        _log.warning("%s: %d token ids are listed twice", path, len(ids) - len(distinct))
    return _Stored(distinct)


def _read_safetensors(path: Path) -> _Stored:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            ids_C = file.get_tensor("token_ids") if "token_ids" in names else None
            counts_C = file.get_tensor("counts") if "counts" in names else None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or no safetensors file: {_BUILD}") from error
    if metadata.get("kind") != _KIND or metadata.get("version") != _VERSION:
        raise InputError(
            f"{path} is not a frequency list in version {_VERSION} of apb's format: {_BUILD}"
        )
    num_tokens = metadata.get("corpus_tokens")
    if ids_C is None or not _is_sound(ids_C, counts_C, num_tokens):
        raise InputError(f"{path} is damaged: its ids and counts do not fit; {_BUILD}")
    return _Stored(
        ids_C.tolist(),
        counts_C,
        None if num_tokens is None else int(num_tokens),
        metadata.get("tokenizer_hash"),
        metadata.get("corpus", ""),
    )


def _is_sound(ids_C: Tensor, counts_C: Tensor | None, num_tokens: str | None) -> bool:
    if ids_C.dtype != torch.int64 or ids_C.dim() != 1 or ids_C.unique().numel() < ids_C.numel():
        return False
    if counts_C is not None and (
        counts_C.dtype != torch.int64 or counts_C.shape != ids_C.shape or bool((counts_C < 0).any())
    ):
        return False
    return num_tokens is None or re.fullmatch("[0-9]{1,18}", num_tokens) is not None
