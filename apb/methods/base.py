"""What a method is: a plan for a prompt, and one layer's attention under that plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from apb.attention.base import AttentionBackend, LayerInputs
from apb.cache import KVCacheShard
from apb.comm import Communicator
from apb.methods.plan import PrefillPlan, RankRows
from apb.prompts.base import PromptTokens

Attend = Callable[[LayerInputs], Tensor]
"""One layer's attention as the model calls it: all rows in, ``out_THD`` back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillContext:
    """What a method needs while one prefill runs on this rank."""

    plan: PrefillPlan
    rows: RankRows
    cache: KVCacheShard
    comm: Communicator
    backend: AttentionBackend
    step: int


class AttentionMethod(ABC):
    """How one prefill is spread over blocks and ranks.

    Whatever the method, afterwards every context token is cached on exactly one rank at its true
    position and nothing else is cached, so decode never asks which method ran.
    """

    @abstractmethod
    def plan(self, prompt: PromptTokens, *, world_size: int, num_blocks: int | None) -> PrefillPlan:
        """Who runs what, from the prompt's lengths alone; the same on every rank.

        Raises:
            InputError: the settings do not fit the prompt or the number of ranks.
        """

    @abstractmethod
    def begin(self, context: PrefillContext) -> Attend:
        """The attention of one prefill: stores the context's KV in the cache as it goes."""


@dataclass(kw_only=True, slots=True)
class MethodConfig(ABC):
    """Config of a method."""

    @abstractmethod
    def build(self, *, seed: int) -> AttentionMethod: ...
