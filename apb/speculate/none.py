"""Plain decoding."""

from __future__ import annotations

from dataclasses import dataclass

from apb.speculate.base import DrafterConfig, DraftTarget


@dataclass(kw_only=True, slots=True)
class NoDrafterConfig(DrafterConfig):
    """One token a step."""

    max_nodes: int = 1

    def build_drafter(self, target: DraftTarget) -> None:
        return None
