"""Ring attention over blocks dealt out in zigzag, so that causal attention is balanced."""

from __future__ import annotations

from dataclasses import dataclass

from apb.layout import LayoutPolicy
from apb.methods.base import MethodConfig
from apb.methods.ring import RingMethod


@dataclass(kw_only=True, slots=True)
class ZigzagConfig(MethodConfig):
    """Config of `RingMethod` where rank r owns blocks r and 2R-1-r.

    The layout of Llama 3's context parallelism (https://arxiv.org/abs/2407.21783, section 3.3.2).
    """

    def build(self, *, seed: int) -> RingMethod:
        return RingMethod(LayoutPolicy.zigzag)
