"""How the next token is chosen: the user's parameters and the sampler that obeys them."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, cast

import torch
from torch import Tensor

from apb.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Decoding parameters, with vLLM's names.

    Attributes:
        max_tokens: most tokens to generate.
        temperature: 0 is greedy.
        top_p: smallest probability mass that stays eligible.
        top_k: number of tokens that stay eligible; 0 means all.
        seed: makes sampling reproducible; None draws a fresh seed.
        stop: strings that end the text; they are not part of it.
        stop_token_ids: token ids that end the text besides the model's own.
        ignore_eos: go on past the model's end-of-sequence tokens.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        self._take_plain_values()
        if self.max_tokens < 1:
            raise InputError(f"max_tokens={self.max_tokens} must be at least 1")
        if not 0.0 <= self.temperature < float("inf"):
            raise InputError(
                f"temperature={self.temperature} must be 0 (greedy) or a positive number"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p={self.top_p} must lie above 0 and at most at 1")
        if self.top_k < 0:
            raise InputError(f"top_k={self.top_k} must be 0 (all tokens) or positive")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InputError(f"seed={self.seed} must lie between 0 and 2**63 - 1")
        if "" in self.stop:
            raise InputError("stop contains an empty string, which would end every answer at once")

    def _take_plain_values(self) -> None:
        """What ranks can be sent: numbers of Python, tuples of them and of strings.

        Raises:
            InputError: a field is something else.
        """
        plain: dict[str, Callable[[Any], object]] = {
            "max_tokens": operator.index,
            "temperature": _real,
            "top_p": _real,
            "top_k": operator.index,
            "seed": lambda seed: None if seed is None else operator.index(seed),
            "stop": _texts,
            "stop_token_ids": lambda ids: tuple(map(operator.index, ids or ())),
            "ignore_eos": bool,
        }
        for name, of in plain.items():
            try:
                object.__setattr__(self, name, of(getattr(self, name)))
            except (TypeError, ValueError, OverflowError) as error:
                raise InputError(f"{name} has a value of a wrong type: {error}") from error


def _real(value: object) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"'{type(value).__name__}' object is no number")
    return float(value)


def _texts(value: Iterable[object] | None) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value or ())
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"'{type(text).__name__}' object is no string")
    return cast(tuple[str, ...], texts)


class Sampler:
    """Chooses tokens from logits; one per request, so that a seed gives one sequence."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._generator = new_generator(params.seed)

    def __call__(self, logits_V: Tensor) -> int:
        """The next token. Ties in greedy mode go to the lowest id."""
        if self.is_greedy:
            return int(logits_V.argmax())
        return self.draw(self.probs(logits_V))

    @property
    def is_greedy(self) -> bool:
        return self._params.temperature == 0.0

    def probs(self, logits_V: Tensor) -> Tensor:
        """The distribution that the next token is drawn from; a greedy sampler has none."""
        return filtered_probs(logits_V.float().cpu(), self._params)

    def draw(self, probs_V: Tensor) -> int:
        """A token of that distribution."""
        return int(probs_V.multinomial(1, generator=self._generator))

    def bernoulli(self, chance: float) -> bool:
        """True with that probability; always where it is above 1."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64)) < chance


def new_generator(seed: int | None, *, stream: str = "") -> torch.Generator:
    """Random numbers of a seed, fresh ones without.

    Streams of one seed have nothing to do with each other: what is drafted must not be drawn with
    the numbers that test it.
    """
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    elif not stream:
        generator.manual_seed(seed)
    else:
        # Hashed, because torch's generator looks only at the lower 32 bits of a seed.
        digest = blake2b(f"{stream} {seed}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest))
    return generator


_FIRST_LOOK = 64
"""Tokens among which top-p's are looked for first; few distributions need more."""


def filtered_probs(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """The distribution sampled from: temperature, then top-k, then top-p, renormalised.

    Top-p keeps the smallest set of most likely tokens whose mass reaches `top_p`, at least one. Of
    equally likely tokens those of lower ids come first. Only as much of the vocabulary is sorted as
    can be kept: all of it, for each node of a tree, took longer than the rest of a verification.
    """
    probs_V = tempered(logits_V, params.temperature).softmax(dim=-1)
    if params.top_k:
        ids_C = _likeliest(probs_V, min(params.top_k, len(probs_V)))
        kept_C = probs_V[ids_C] / probs_V[ids_C].sum()
    elif params.top_p < 1.0:
        ids_C = _with_mass(probs_V, params.top_p)
        kept_C = probs_V[ids_C]
    else:
        return probs_V
    if params.top_p < 1.0:
        kept_C = nucleus(kept_C, params.top_p)
    return torch.zeros_like(probs_V).index_copy_(0, ids_C, kept_C / kept_C.sum())


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits in fp32 over a temperature, with the largest of each row moved to 0.

    No temperature is too small or too large for that: the largest logit stays finite.
    """
    fp32 = torch.finfo(torch.float32)
    below = logits.float() - logits.float().amax(dim=-1, keepdim=True)
    return below / min(max(temperature, fp32.tiny), fp32.max)


def nucleus(probs_NC: Tensor, top_p: float) -> Tensor:
    """Probabilities in descending order without those after a mass of `top_p`; the first stays."""
    kept_NC = probs_NC.cumsum(dim=-1) - probs_NC < top_p
    kept_NC[..., 0] = True  # top_p may be less than the smallest number of fp32
    return probs_NC * kept_NC


def _with_mass(probs_V: Tensor, mass: float) -> Tensor:
    """Ids of so many likeliest tokens, in order, that their probabilities reach `mass`, or all."""
    count = _FIRST_LOOK
    while True:
        ids_C = _likeliest(probs_V, min(count, len(probs_V)))
        if len(ids_C) == len(probs_V) or float(probs_V[ids_C].sum()) > mass:
            return ids_C
        count *= 8


def _likeliest(probs_V: Tensor, count: int) -> Tensor:
    """Ids of the likeliest tokens, in order."""
    least = probs_V.topk(count).values[-1]
    ids_C = (probs_V >= least).nonzero().flatten()
    return ids_C[probs_V[ids_C].sort(descending=True, stable=True).indices[:count]]
