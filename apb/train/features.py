"""The target's states on lessons, computed once and memory-mapped while a head is trained.

Letters: N lessons, L tokens of each, M hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from apb.attention.base import AttentionBackend, LayerInputs, Segment
from apb.errors import InputError
from apb.hf.model import CausalLM
from apb.train.lessons import Lesson

_TOKENS, _SPANS, _STATES, _ABOUT = "tokens.i32", "spans.i32", "states.bf16", "features.json"
_ROWS = 4096
"""Rows of one forward pass."""


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """What a folder of features is of; another one's are not used."""

    model: str
    tokenizer_hash: str
    data: tuple[str, ...]
    generations: tuple[str, ...]
    lessons: int
    length: int
    hidden_size: int
    seed: int


class Features(NamedTuple):
    """Some lessons. Shorter ones are padded at their end."""

    tokens_NL: Tensor
    """int64."""
    drafted_NL: Tensor
    """Whether a token is to be drafted; padding and what stands before an answer are not."""
    states_NLM: Tensor
    """The target's after its final norm, fp32."""


class FeatureFolder:
    """Lessons and the target's states, in files that grow lesson by lesson."""

    def __init__(self, folder: Path, spec: FeatureSpec) -> None:
        """Open or begin it.

        Raises:
            InputError: it holds features of something else.
        """
        folder.mkdir(parents=True, exist_ok=True)
        about = folder / _ABOUT
        wanted = json.loads(json.dumps(asdict(spec)))
        if about.exists():
            if json.loads(about.read_text()) != wanted:
                raise InputError(f"{folder} holds features of other settings: choose another work=")
        else:
            about.write_text(json.dumps(wanted))
        self._folder, self.spec = folder, spec
        self._lesson_bytes = {
            folder / _TOKENS: 4 * spec.length,
            folder / _SPANS: 4 * 2,
            folder / _STATES: 2 * spec.length * spec.hidden_size,
        }

    def __len__(self) -> int:
        """Whole lessons in both files."""
        sizes = [
            path.stat().st_size // num_bytes if path.exists() else 0
            for path, num_bytes in self._lesson_bytes.items()
        ]
        return min(sizes)

    def append(self, tokens_NL: Tensor, spans_N2: Tensor, states_NLM: Tensor) -> None:
        """More lessons behind those that are there; what a crash left half written is dropped.

        `spans_N2` are the places from and up to which tokens are to be drafted.
        """
        done = len(self)
        values = (
            tokens_NL.to(torch.int32),
            spans_N2.to(torch.int32),
            states_NLM.to(torch.bfloat16).view(torch.int16),
        )
        for (path, num_bytes), value in zip(self._lesson_bytes.items(), values, strict=True):
            path.touch()
            with path.open("r+b") as file:
                file.truncate(done * num_bytes)
                file.seek(0, 2)
                file.write(value.contiguous().numpy().tobytes())

    def read(self, lessons: Sequence[int]) -> Features:
        spec, picked = self.spec, list(lessons)
        tokens_NL = self._mapped(_TOKENS, np.int32, spec.length)[picked]
        spans_N2 = self._mapped(_SPANS, np.int32, 2)[picked]
        states_NLM = self._mapped(_STATES, np.int16, spec.length, spec.hidden_size)[picked]
        places_L = torch.arange(spec.length)
        first_N1, stop_N1 = torch.from_numpy(spans_N2).split(1, dim=1)
        return Features(
            torch.from_numpy(tokens_NL).long(),
            (places_L >= first_N1) & (places_L < stop_N1),
            torch.from_numpy(states_NLM).view(torch.bfloat16).float(),
        )

    def _mapped(self, name: str, dtype: Any, *shape: int) -> NDArray[Any]:
        path = self._folder / name
        mapped: NDArray[Any] = np.memmap(path, dtype=dtype, mode="r", shape=(len(self), *shape))
        return mapped


def compute_features(
    folder: FeatureFolder, model: CausalLM, backend: AttentionBackend, lessons: Iterator[Lesson]
) -> None:
    """Run the target over the lessons that are missing.

    A lesson longer than the folder's is run from its beginning, and its end is kept.
    """
    spec = folder.spec
    missing = islice(lessons, len(folder), spec.lessons)
    bar = tqdm(total=spec.lessons, initial=len(folder), desc="features", disable=None)
    for batch in _batches(missing):
        tokens_NL = torch.zeros(len(batch), spec.length, dtype=torch.int64)
        states_NLM = torch.zeros(len(batch), spec.length, spec.hidden_size)
        spans = []
        for row, (lesson, states_TM) in enumerate(
            zip(batch, _states(model, backend, batch), strict=True)
        ):
            kept = lesson.ids[-spec.length :]
            tokens_NL[row, : len(kept)] = torch.tensor(kept)
            states_NLM[row, : len(kept)] = states_TM[-spec.length :]
            spans.append((max(0, lesson.first - len(lesson.ids) + len(kept)), len(kept)))
        folder.append(tokens_NL, torch.tensor(spans), states_NLM)
        bar.update(len(batch))
    bar.close()
    if len(folder) < spec.lessons:
        raise InputError(
            f"data= and generations= fill {len(folder)} lessons of {spec.length} tokens, fewer "
            f"than lessons={spec.lessons}: give more text or ask for fewer"
        )


def _batches(lessons: Iterator[Lesson]) -> Iterator[list[Lesson]]:
    """As many as fit one forward pass."""
    batch: list[Lesson] = []
    for lesson in lessons:
        if batch and sum(len(other.ids) for other in batch) + len(lesson.ids) > _ROWS:
            yield batch
            batch = []
        batch.append(lesson)
    if batch:
        yield batch


def _states(
    model: CausalLM, backend: AttentionBackend, batch: Sequence[Lesson]
) -> Sequence[Tensor]:
    """Lessons side by side in one pass, each causal in itself."""
    lengths = [len(lesson.ids) for lesson in batch]
    stops = list(accumulate(lengths))
    spans = [slice(stop - length, stop) for length, stop in zip(lengths, stops, strict=True)]

    def attend(layer: LayerInputs) -> Tensor:
        segments = [
            Segment(s.start, s.stop, layer.k_KTD[:, s], layer.v_KTD[:, s], causal=True)
            for s in spans
        ]
        return backend.attend(layer.q_HTD, segments, scale=layer.scale).out_THD

    positions_T = torch.cat([torch.arange(length) for length in lengths]).to(model.device)
    ids = [token_id for lesson in batch for token_id in lesson.ids]
    states: Sequence[Tensor] = model.forward(ids, positions_T, attend).cpu().split(lengths)
    return states
