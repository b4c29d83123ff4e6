"""Training retaining heads by Locret's recipe (arXiv 2410.01805, sections 3.3 and 4.1).

Letters: S tokens of a document, T of them at once, R hidden size of a head, I its inputs, K
key/value heads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from apb.compress.base import BlockView, CompressorTarget
from apb.compress.retaining_file import RetainingHead, RetainingHeads, num_inputs
from apb.compress.retaining_head import activation, head_inputs
from apb.errors import InputError
from apb.files import written_whole
from apb.train.pairs import Reading
from apb.train.reading_pass import ReadingPass
from apb.train.retaining_labels import SHARE, Objective

_STATE = "training.pt"
_CLIP = 0.5
"""Of each element of a gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRecipe:
    """How heads are trained; the defaults are Locret's, with APB's warm-up.

    Attributes:
        steps: of the optimiser, which is AdamW with a linear warm-up and a linear decay to 0.
        updates: steps per reading, each on a part of the document: more where reading is slow.
        hidden: size of the heads' hidden layer.
        loss: `locret` (the paper's) or `top` (is a token among those to be kept?).
    """

    steps: int = 3000
    updates: int = 1
    hidden: int = 1024
    loss: Objective = Objective.locret
    learning_rate: float = 5e-4
    warm_up: int = 300
    save_every: int = 10
    seed: int = 0

    @property
    def num_readings(self) -> int:
        return -(-self.steps // self.updates)

    def settings(self) -> dict[str, int | float | str]:
        """By name."""
        return {**asdict(self), "loss": self.loss.value}

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        rising = (step + 1) / max(1, self.warm_up)
        falling = (self.steps - step) / max(1, self.steps - self.warm_up)
        return self.learning_rate * max(0.0, min(1.0, rising, falling))


class _LayerTrainer:
    """One layer's head and its optimiser.

    The loss is a sum over layers and everything else (AdamW, clipping by value) works on each
    weight alone, so that training layer by layer is training them together.
    """

    def __init__(self, target: CompressorTarget, recipe: HeadRecipe) -> None:
        shape = target.shape
        self._num_layers, self._objective = shape.num_layers, recipe.loss
        self._act = activation(target.hidden_act)
        # Drawn on the CPU: the same for a seed on any device.
        self.fc1 = nn.Linear(num_inputs(shape), recipe.hidden, bias=False).to(target.device)
        self.fc2 = nn.Linear(recipe.hidden, shape.num_kv_heads, bias=False).to(target.device)
        self._weights = [self.fc1.weight, self.fc2.weight]
        self._optimizer = torch.optim.AdamW(self._weights, betas=(0.9, 0.95))

    def step(self, x_TI: Tensor, wanted_KT: Tensor, rate: float) -> float:
        """One step on some neighbouring tokens; returns the loss before it."""
        scores_KT = self.fc2(self._act(self.fc1(x_TI))).mT
        loss = self._objective.loss(scores_KT, wanted_KT, num_layers=self._num_layers)
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(self._weights, _CLIP)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        return loss.item()

    def head(self) -> RetainingHead:
        return RetainingHead(self.fc1.weight.detach(), self.fc2.weight.detach())

    def state(self) -> dict[str, Any]:
        return {"weights": list(self.head()), "optimizer": self._optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for weight, saved in zip(self._weights, state["weights"], strict=True):
                weight.copy_(saved)
        self._optimizer.load_state_dict(state["optimizer"])


class HeadTrainer:
    """Trains the heads of all layers at once from passes of the frozen model.

    An interrupted run of the same settings goes on where it stopped and ends with the same heads.
    """

    def __init__(
        self,
        reading_pass: ReadingPass,
        target: CompressorTarget,
        readings: Sequence[Reading],
        recipe: HeadRecipe,
        *,
        work: Path,
        identity: str,
    ) -> None:
        """`identity` tells the data and the model from others.

        Raises:
            InputError: `work` holds the state of other settings.
        """
        self._pass, self._target, self._readings = reading_pass, target, readings
        self._recipe, self._identity = recipe, identity
        work.mkdir(parents=True, exist_ok=True)
        self._path = work / _STATE
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self._layers = [_LayerTrainer(target, recipe) for _ in range(target.shape.num_layers)]
        self._done, self.seconds = 0, 0.0
        self._loss = 0.0
        if self._path.exists():
            self._resume()

    def train(self) -> None:
        """All readings that are left."""
        recipe, started = self._recipe, time.perf_counter() - self.seconds
        bar = tqdm(total=recipe.num_readings, initial=self._done, desc="training", disable=None)
        for number in range(self._done, recipe.num_readings):
            self._loss = 0.0
            self._pass.run(self._reading(number), self._learn)
            self._done += 1
            self.seconds = time.perf_counter() - started
            bar.set_postfix_str(f"loss {self._loss:.3f}")
            bar.update()
            if self._done % recipe.save_every == 0 or self._done == recipe.num_readings:
                self._save()
        bar.close()

    @property
    def last_loss(self) -> float:
        """Of the last reading: the sum over layers, the mean over its steps."""
        return self._loss

    def heads(self, dtype: torch.dtype) -> RetainingHeads:
        """What has been learnt so far, on the CPU."""
        layers = tuple(
            RetainingHead(*(weight.to("cpu", dtype) for weight in layer.head()))
            for layer in self._layers
        )
        return RetainingHeads(layers, self._target.model, self._target.hidden_act)

    @torch.inference_mode(False)
    def _learn(self, view: BlockView, labels_KS: Tensor) -> None:
        """The steps of one reading in one layer."""
        layer, recipe = self._layers[view.layer_idx], self._recipe
        wanted_KS = recipe.loss.wanted(labels_KS, labels_KS.shape[1] // SHARE)
        with torch.enable_grad():
            for number, rows in self._parts(labels_KS.shape[1]):
                x_TI = head_inputs(view, self._target.rotary, rows)
                # What is made in inference mode cannot be learnt from.
                wanted_KT = wanted_KS[:, rows].clone()
                loss = layer.step(x_TI, wanted_KT, recipe.rate(number))
                self._loss += loss / recipe.updates

    def _parts(self, num_tokens: int) -> Iterator[tuple[int, slice]]:
        """Steps and the rows they are for, in an order that differs from reading to reading."""
        first, count = self._done * self._recipe.updates, self._recipe.updates
        generator = torch.Generator().manual_seed(self._recipe.seed + self._done)
        cuts = [num_tokens * part // count for part in range(count + 1)]
        for offset, part in enumerate(torch.randperm(count, generator=generator).tolist()):
            if first + offset < self._recipe.steps:
                yield first + offset, slice(cuts[part], cuts[part + 1])

    def _reading(self, number: int) -> Reading:
        """Each epoch goes through all readings in an order of its own."""
        epoch, place = divmod(number, len(self._readings))
        generator = torch.Generator().manual_seed(self._recipe.seed + epoch)
        order = torch.randperm(len(self._readings), generator=generator)
        return self._readings[int(order[place])]

    def _settings(self) -> dict[str, Any]:
        return {"identity": self._identity, **self._recipe.settings()}

    def _save(self) -> None:
        state = {
            "settings": self._settings(),
            "done": self._done,
            "seconds": self.seconds,
            "loss": self._loss,
            "layers": [layer.state() for layer in self._layers],
        }
        with written_whole(self._path) as scratch:
            torch.save(state, scratch)

    def _resume(self) -> None:
        state = torch.load(self._path, map_location=self._target.device, weights_only=True)
        if state["settings"] != self._settings():
            raise InputError(
                f"{self._path} was left by a run with other settings: go on with those, or choose "
                "another work="
            )
        for layer, saved in zip(self._layers, state["layers"], strict=True):
            layer.load(saved)
        self._done, self.seconds, self._loss = state["done"], state["seconds"], state["loss"]
