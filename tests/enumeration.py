"""Exact distributions of what random programs do, by taking every course that chance can take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from torch import Tensor

from apb.sampling import Sampler, SamplingParams

T = TypeVar("T", bound=Hashable)


class Course(Sampler):
    """A sampler whose random choices follow a script, and how likely that is.

    Beyond the script each choice is the first possible one.
    """

    def __init__(self, params: SamplingParams, script: Sequence[int]) -> None:
        super().__init__(params)
        self._script = script
        self.chance = 1.0
        self.taken: list[int] = []
        self.options: list[int] = []

    def choose(self, weights: Sequence[float]) -> int:
        """One of the indices with a positive weight, by their shares."""
        possible = [index for index, weight in enumerate(weights) if weight > 0.0]
        place = len(self.taken)
        choice = self._script[place] if place < len(self._script) else 0
        self.taken.append(choice)
        self.options.append(len(possible))
        self.chance *= weights[possible[choice]] / sum(weights)
        return possible[choice]

    def draw(self, probs_V: Tensor) -> int:
        return self.choose(probs_V.tolist())

    def bernoulli(self, chance: float) -> bool:
        assert chance >= 0.0
        return self.choose([min(chance, 1.0), 1.0 - min(chance, 1.0)]) == 0


def distribution(program: Callable[[Course], T], params: SamplingParams) -> dict[T, float]:
    """How likely each result of a program is, which makes all its random choices on the course."""
    found: dict[T, float] = defaultdict(float)
    script: list[int] | None = []
    while script is not None:
        course = Course(params, script)
        found[program(course)] += course.chance
        script = _following(course)
    return dict(found)


def _following(course: Course) -> list[int] | None:
    """The script of the next course: the last choice that has a further option takes it."""
    for place in reversed(range(len(course.taken))):
        if course.taken[place] + 1 < course.options[place]:
            return [*course.taken[:place], course.taken[place] + 1]
    return None
