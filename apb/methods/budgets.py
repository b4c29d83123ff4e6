"""How passing lengths are spread over a model's layers: some need more of a block than others."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apb.errors import InputError

_STEEPNESS = 20
"""Of PyramidKV: the last layer has this part of the mean."""
_EVEN_PART = 0.5
"""Of the budget, where the rest follows an audit: a layer that lost nothing keeps so much."""


class LayerBudgets(ABC):
    """Says which share of the passing tokens of all layers each layer gets."""

    @abstractmethod
    def weights(self, num_layers: int) -> tuple[float, ...]:
        """One per layer, above 0.

        Raises:
            InputError: made for another number of layers.
        """


class UniformBudgets(LayerBudgets):
    """The same in every layer (paper)."""

    def weights(self, num_layers: int) -> tuple[float, ...]:
        return (1.0,) * num_layers


class PyramidBudgets(LayerBudgets):
    """Many in early layers, few in late ones, falling evenly between.

    PyramidKV (Cai et al. 2024, https://arxiv.org/abs/2406.02069, section 4.2): attention is spread
    widely at the bottom of a model and gathers on few tokens towards its top.
    """

    def weights(self, num_layers: int) -> tuple[float, ...]:
        last = 1 / _STEEPNESS
        fall = 2 * (1 - last) / max(1, num_layers - 1)
        return tuple(2 - last - fall * layer_idx for layer_idx in range(num_layers))


@dataclass(frozen=True, slots=True)
class AuditedBudgets(LayerBudgets):
    """More where an audit found more attention mass lost; layers between audited ones in line."""

    source: str
    lost_mass: tuple[tuple[int, float], ...]
    """Layer and what of its attention probability was not seen, ascending by layer."""

    @classmethod
    def read(cls, path: Path) -> AuditedBudgets:
        """The audit in a result of ``audit=true output=FILE``.

        Raises:
            InputError: no such file, or no audit in it.
        """
        try:
            findings: Any = json.loads(path.read_text(encoding="utf-8"))["metrics"]["audit"]
            lost = {int(found["layer"]): 1 - float(found["recovered_mass"]) for found in findings}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"method.layer_budgets={path} is neither uniform nor pyramid nor a result with an "
                "audit: make one with audit=true output=FILE"
            ) from error
        if not lost:
            raise InputError(
                f"method.layer_budgets={path} is a result without an audit: make it again with "
                "audit=true and method=apb"
            )
        return cls(
            str(path), tuple((layer, max(0.0, mass)) for layer, mass in sorted(lost.items()))
        )

    def weights(self, num_layers: int) -> tuple[float, ...]:
        last, _ = self.lost_mass[-1]
        if last >= num_layers:
            raise InputError(
                f"method.layer_budgets={self.source} audits layer {last} of a model with more than "
                f"the {num_layers} layers of this one: audit this model"
            )
        lost = [self._lost(layer_idx) for layer_idx in range(num_layers)]
        mean = sum(lost) / num_layers
        if mean == 0:
            return (1.0,) * num_layers
        return tuple(_EVEN_PART + (1 - _EVEN_PART) * mass / mean for mass in lost)

    def _lost(self, layer_idx: int) -> float:
        """Linear between audited layers, constant beyond them."""
        place = bisect_left(self.lost_mass, (layer_idx, 0.0))
        if place == len(self.lost_mass):
            return self.lost_mass[-1][1]
        right, after = self.lost_mass[place]
        if place == 0 or right == layer_idx:
            return after
        left, before = self.lost_mass[place - 1]
        return before + (after - before) * (layer_idx - left) / (right - left)


def layer_budgets(name: str) -> LayerBudgets:
    """What ``method.layer_budgets`` names: `uniform`, `pyramid` or a file.

    Raises:
        InputError: none of these.
    """
    if name == "uniform":
        return UniformBudgets()
    if name == "pyramid":
        return PyramidBudgets()
    return AuditedBudgets.read(Path(name).expanduser())


def spread(length: int, weights: Sequence[float], available: int) -> tuple[int, ...]:
    """Passing length per layer: by the weights, `length` on average and `available` at most.

    What does not fit into a layer goes to the others, so that the sum is exact.
    """
    assert 0 <= length <= available, "no layer can pass on more than there is"
    lengths, remaining = [available] * len(weights), length * len(weights)
    unfilled = [*range(len(weights))]
    while True:
        per_weight = remaining / sum(weights[layer_idx] for layer_idx in unfilled)
        full = [idx for idx in unfilled if weights[idx] * per_weight >= available]
        if not full:
            break
        remaining -= available * len(full)
        unfilled = [idx for idx in unfilled if idx not in full]
        if not unfilled:
            return tuple(lengths)
    reached, handed_out = 0.0, 0
    for layer_idx in unfilled:
        reached += weights[layer_idx] * per_weight
        lengths[layer_idx] = round(reached) - handed_out
        handed_out = round(reached)
    return tuple(lengths)
