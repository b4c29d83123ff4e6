"""Distilling an EAGLE-2 head from a target's states.

Letters: B lessons, T places of each, M hidden size, C tokens that are scored.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from apb.errors import InputError
from apb.files import written_whole
from apb.packed import has_fast_bf16
from apb.speculate.eagle_head import EagleHead
from apb.train.features import FeatureFolder, Features
from apb.train.unroll import drafted_rows, drafted_states, step_loss

_STATE = "training.pt"
_BATCH_HELD_OUT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a head is trained.

    Attributes:
        steps: of the optimiser, which is AdamW with a warm-up and a cosine decay.
        batch: lessons of a step.
        unroll: steps of drafting that a text is trained on.
        decay: weight of each further step of drafting.
        state_weight: of the distance of states beside the cross-entropy.
        held_out: lessons that are kept for the figures.
    """

    steps: int = 1000
    batch: int = 4
    learning_rate: float = 1e-3
    warm_up: int = 50
    unroll: int = 3
    decay: float = 0.8
    state_weight: float = 1.0
    held_out: int = 32
    save_every: int = 50
    seed: int = 0


class Teacher(NamedTuple):
    """What a head learns from."""

    embedding_VM: Tensor
    rows_CM: Tensor
    """Of the LM head, those that the head is to score."""
    ids_C: Tensor
    """Their target ids."""

    @classmethod
    def of(cls, embedding_VM: Tensor, head_VM: Tensor, ids_C: Tensor) -> Teacher:
        """Of a target's weights, on their device in fp32."""
        ids_C = ids_C.to(head_VM.device)
        return cls(embedding_VM.float().detach(), head_VM[ids_C].float().detach(), ids_C)

    @property
    def scored(self) -> str:
        """A digest that tells these ids from others."""
        return hashlib.sha256(self.ids_C.cpu().numpy().tobytes()).hexdigest()


class HeldOut(NamedTuple):
    """How well a head does on lessons it has not seen."""

    agreement: tuple[float, ...]
    """Share of drafts, step by step, whose likeliest token is the target's, given the true text
    before the draft.
    """

    @property
    def acceptance_length(self) -> float:
        """Tokens a step that a chain of as many drafts would yield, the target's own included."""
        length, accepted = 1.0, 1.0
        for share in self.agreement:
            accepted *= share
            length += accepted
        return length


class EagleTrainer:
    """Trains a head on features; goes on where an interrupted run of the same settings stopped."""

    def __init__(
        self, head: EagleHead, teacher: Teacher, features: FeatureFolder, recipe: Recipe, work: Path
    ) -> None:
        """Raises InputError where `work` holds the state of another recipe, head or vocabulary."""
        if len(features) <= recipe.held_out:
            raise InputError(
                f"lessons={len(features)} leave none beside held_out={recipe.held_out}"
            )
        self.head, self._teacher, self._features = head, teacher, features
        self._recipe, self._path = recipe, work / _STATE
        self._optimizer = torch.optim.AdamW(
            head.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
        )
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._rate)
        self._device = self._teacher.rows_CM.device
        self._half = has_fast_bf16(self._device)
        self._step, self.seconds = 0, 0.0
        if self._path.exists():
            self._resume()

    def train(self) -> None:
        """All steps that are left."""
        recipe, started = self._recipe, time.perf_counter() - self.seconds
        bar = tqdm(total=recipe.steps, initial=self._step, desc="training", disable=None)
        for batch in self._batches():
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
                loss, shown = self._loss(self._read(batch))
            self._optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
            self._optimizer.step()
            self._scheduler.step()
            self._step += 1
            self.seconds = time.perf_counter() - started
            bar.set_postfix_str(shown)
            bar.update()
            if self._step % recipe.save_every == 0 or self._step == recipe.steps:
                self._save()
        bar.close()

    def _read(self, lessons: Sequence[int]) -> Features:
        return Features(*(value.to(self._device) for value in self._features.read(lessons)))

    def _loss(self, lessons: Features) -> tuple[Tensor, str]:
        recipe, rows_CM = self._recipe, self._teacher.rows_CM
        wanted_BTM = lessons.states_NLM[:, 1:]
        total = wanted_BTM.new_zeros(())
        parts = []
        for depth, drafted_BTM in enumerate(self._drafts(lessons, recipe.unroll)):
            rows_BT = drafted_rows(lessons.drafted_NL, depth)
            loss = step_loss(drafted_BTM[rows_BT], wanted_BTM[rows_BT], rows_CM)
            weight = recipe.decay**depth
            total = total + weight * (loss.tokens + recipe.state_weight * loss.states)
            parts.append(f"{loss.tokens.item():.2f}+{loss.states.item():.2f}")
        return total, " ".join(parts)

    def _drafts(self, lessons: Features, steps: int) -> Iterator[Tensor]:
        embeds_BTM = self._teacher.embedding_VM[lessons.tokens_NL[:, 1:]]
        return drafted_states(self.head, embeds_BTM, lessons.states_NLM[:, :-1], steps)

    def _batches(self) -> Iterator[list[int]]:
        """Lessons of the steps that are left; each epoch in an order of its own."""
        recipe, count = self._recipe, len(self._features) - self._recipe.held_out
        first = self._step * recipe.batch
        lessons = self._lessons(first, count)
        for _ in range(self._step, recipe.steps):
            yield [recipe.held_out + next(lessons) for _ in range(recipe.batch)]

    def _lessons(self, first: int, count: int) -> Iterator[int]:
        """Of `count` lessons, endlessly, beginning with the `first` that has not been taken."""
        for epoch in itertools.count(first // count):
            generator = torch.Generator().manual_seed(self._recipe.seed + epoch)
            order: list[int] = torch.randperm(count, generator=generator).tolist()
            yield from order[first % count :]
            first = 0

    def _rate(self, step: int) -> float:
        recipe = self._recipe
        if step < recipe.warm_up:
            return (step + 1) / recipe.warm_up
        done = (step - recipe.warm_up) / max(1, recipe.steps - recipe.warm_up)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    @torch.inference_mode()
    def held_out(self, head_VM: Tensor, depth: int) -> HeldOut:
        """Agreement with the target's likeliest tokens, over its whole vocabulary `head_VM`."""
        hits, counts = [0] * depth, [0] * depth
        for start in range(0, self._recipe.held_out, _BATCH_HELD_OUT):
            stop = min(start + _BATCH_HELD_OUT, self._recipe.held_out)
            lessons = self._read(range(start, stop))
            for step, drafted_BTM in enumerate(self._drafts(lessons, depth)):
                rows_BT = drafted_rows(lessons.drafted_NL, step)
                wanted_R = (lessons.states_NLM[:, 1:][rows_BT] @ head_VM.T).argmax(-1)
                best_R = (drafted_BTM[rows_BT] @ self._teacher.rows_CM.T).argmax(-1)
                hits[step] += int((self._teacher.ids_C[best_R] == wanted_R).sum())
                counts[step] += len(wanted_R)
        return HeldOut(tuple(hit / count for hit, count in zip(hits, counts, strict=True)))

    def _settings(self) -> dict[str, Any]:
        shape = asdict(self.head.shape)
        return {"recipe": asdict(self._recipe), "head": shape, "scored": self._teacher.scored}

    def _save(self) -> None:
        state = {
            "settings": self._settings(),
            "step": self._step,
            "seconds": self.seconds,
            "head": self.head.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        with written_whole(self._path) as scratch:
            torch.save(state, scratch)

    def _resume(self) -> None:
        state = torch.load(self._path, map_location=self._device, weights_only=True)
        if state.get("settings") != self._settings():
            raise InputError(
                f"{self._path} was left by a run with other settings: go on with those, or choose "
                "another work="
            )
        self.head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._step, self.seconds = state["step"], state["seconds"]
        self._scheduler.last_epoch = self._step
