"""The target's states on lessons, computed once and memory-mapped while a head is trained.

Letters: N lessons, L tokens of each, M hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from apb.attention.base import AttentionBackend, LayerInputs, Segment
from apb.errors import InputError
from apb.hf.model import CausalLM

_TOKENS, _STATES, _ABOUT = "tokens.i32", "states.bf16", "features.json"
_ROWS = 4096
"""Rows of one forward pass."""


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """What a folder of features is of; another one's are not used."""

    model: str
    tokenizer_hash: str
    data: tuple[str, ...]
    lessons: int
    length: int
    hidden_size: int
    seed: int


class FeatureFolder:
    """Lessons and the target's states after the final norm, in files that grow lesson by lesson."""

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
            folder / _STATES: 2 * spec.length * spec.hidden_size,
        }

    def __len__(self) -> int:
        """Whole lessons in both files."""
        sizes = [
            path.stat().st_size // num_bytes if path.exists() else 0
            for path, num_bytes in self._lesson_bytes.items()
        ]
        return min(sizes)

    def append(self, tokens_NL: Tensor, states_NLM: Tensor) -> None:
        """More lessons behind those that are there; what a crash left half written is dropped."""
        done = len(self)
        values = (tokens_NL.to(torch.int32), states_NLM.to(torch.bfloat16).view(torch.int16))
        for (path, num_bytes), value in zip(self._lesson_bytes.items(), values, strict=True):
            path.touch()
            with path.open("r+b") as file:
                file.truncate(done * num_bytes)
                file.seek(0, 2)
                file.write(value.contiguous().numpy().tobytes())

    def read(self, lessons: Sequence[int]) -> tuple[Tensor, Tensor]:
        """``tokens_NL`` int64 and ``states_NLM`` fp32 of some lessons."""
        spec, count = self.spec, len(self)
        tokens: NDArray[Any] = np.memmap(
            self._folder / _TOKENS, dtype=np.int32, mode="r", shape=(count, spec.length)
        )
        states: NDArray[Any] = np.memmap(
            self._folder / _STATES,
            dtype=np.int16,
            mode="r",
            shape=(count, spec.length, spec.hidden_size),
        )
        picked = torch.from_numpy(np.array(states[list(lessons)])).view(torch.bfloat16)
        return torch.from_numpy(np.array(tokens[list(lessons)])).long(), picked.float()


def compute_features(
    folder: FeatureFolder, model: CausalLM, backend: AttentionBackend, lessons: Iterator[list[int]]
) -> None:
    """Run the target over the lessons that are missing."""
    spec = folder.spec
    missing = islice(lessons, len(folder), spec.lessons)
    per_pass = max(1, _ROWS // spec.length)
    bar = tqdm(total=spec.lessons, initial=len(folder), desc="features", disable=None)
    while batch := list(islice(missing, per_pass)):
        states_TM = _states(model, backend, batch)
        states_NLM = states_TM.cpu().unflatten(0, (len(batch), spec.length))
        folder.append(torch.tensor(batch), states_NLM)
        bar.update(len(batch))
    bar.close()
    if len(folder) < spec.lessons:
        raise InputError(
            f"data= fills {len(folder)} lessons of {spec.length} tokens, fewer than "
            f"lessons={spec.lessons}: give more text or ask for fewer"
        )


def _states(model: CausalLM, backend: AttentionBackend, batch: Sequence[Sequence[int]]) -> Tensor:
    """Lessons side by side in one pass, each causal in itself."""
    length = len(batch[0])
    spans = [slice(start, start + length) for start in range(0, len(batch) * length, length)]

    def attend(layer: LayerInputs) -> Tensor:
        segments = [
            Segment(s.start, s.stop, layer.k_KTD[:, s], layer.v_KTD[:, s], causal=True)
            for s in spans
        ]
        return backend.attend(layer.q_HTD, segments, scale=layer.scale).out_THD

    positions_T = torch.arange(length, device=model.device).repeat(len(batch))
    return model.forward([token for lesson in batch for token in lesson], positions_T, attend)
