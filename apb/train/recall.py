"""How many of the tokens that answers look at a compressor keeps.

Letters: S tokens of the document, K key/value heads, P kept tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from apb.attention.selection import max_pool, top_tokens
from apb.compress.base import BlockView, Compressor, CompressorConfig, CompressorTarget
from apb.compress.knorm import KnormConfig
from apb.compress.query import QueryConfig
from apb.compress.random import RandomConfig
from apb.compress.retaining_file import RetainingHeads
from apb.compress.retaining_head import RetainingHeadConfig
from apb.compress.window import WindowConfig
from apb.train.pairs import Reading
from apb.train.reading_pass import ReadingPass
from apb.train.retaining_labels import SHARE

HEADS = "retaining_head"


class Recall(NamedTuple):
    """Of one compressor over held-out documents."""

    per_layer: tuple[float, ...]
    mean: float
    error: float
    """Standard error of the mean over documents."""


class RecallMeter:
    """Compares compressors on the same documents: what share of the true top tokens they keep."""

    def __init__(self, compressors: Mapping[str, Compressor]) -> None:
        self._compressors = compressors
        self._shares: dict[str, list[list[float]]] = {name: [] for name in compressors}

    def observe(self, view: BlockView, labels_KS: Tensor) -> None:
        """One layer of one document; layers come in order."""
        budget = labels_KS.shape[1] // SHARE
        is_wanted_KS = torch.zeros_like(labels_KS).scatter_(1, top_tokens(labels_KS, budget), 1.0)
        for name, compressor in self._compressors.items():
            kept_KP = top_tokens(max_pool(compressor.score(view), compressor.pool), budget)
            shares = self._shares[name]
            if view.layer_idx == 0:
                shares.append([])
            shares[-1].append(is_wanted_KS.gather(1, kept_KP).mean().item())

    def recalls(self) -> dict[str, Recall]:
        """By compressor; the mean is over layers, KV heads and documents."""
        return {name: _recall(torch.tensor(shares)) for name, shares in self._shares.items()}


def _recall(shares_NL: Tensor) -> Recall:
    """Of N documents and L layers."""
    means_N = shares_NL.mean(dim=1)
    error = means_N.std().item() / len(means_N) ** 0.5 if len(means_N) > 1 else 0.0
    return Recall(tuple(shares_NL.mean(dim=0).tolist()), means_N.mean().item(), error)


def compare(
    reading_pass: ReadingPass,
    target: CompressorTarget,
    heads: RetainingHeads,
    readings: Sequence[Reading],
) -> dict[str, Recall]:
    """Trained heads and the compressors that need no training, on documents not learnt from."""
    meter = RecallMeter({**_trained(heads, target), **_untrained(target)})
    for reading in tqdm(readings, desc="comparing", disable=None):
        reading_pass.run(reading, meter.observe)
    return meter.recalls()


def _trained(heads: RetainingHeads, target: CompressorTarget) -> dict[str, Compressor]:
    found: dict[str, Compressor] = {}
    for kernel in (5, 1):
        compressor = RetainingHeadConfig(kernel=kernel).build(seed=0)
        compressor.use(heads, target)
        found[_named(HEADS, kernel)] = compressor
    return found


def _untrained(target: CompressorTarget) -> dict[str, Compressor]:
    configs: dict[str, CompressorConfig] = {}
    for kernel in (5, 1):
        configs[_named("query", kernel)] = QueryConfig(kernel=kernel)
        configs[_named("window", kernel)] = WindowConfig(kernel=kernel)
    configs |= {"knorm": KnormConfig(), "random": RandomConfig()}
    found = {name: config.build(seed=0) for name, config in configs.items()}
    for compressor in found.values():
        compressor.attach(target)
    return found


def _named(name: str, kernel: int) -> str:
    return name if kernel > 1 else f"{name} kernel=1"


def figures(recalls: Mapping[str, Recall]) -> str:
    """One line of plain text."""
    means = ", ".join(f"{name} {recall.mean:.3f}" for name, recall in recalls.items())
    return f"held-out recall of the top 1/{SHARE} of tokens, mean over layers: {means}"


def recall_card(
    model: str, about: Sequence[str], recalls: Mapping[str, Recall], *, num_pairs: int
) -> str:
    """The model card, with a table by layer and compressor."""
    rows = [
        ["layer", *(f"`{name}`" for name in recalls)],
        ["---"] * (len(recalls) + 1),
        ["all", *(f"{recall.mean:.3f} +- {recall.error:.3f}" for recall in recalls.values())],
    ]
    for layer in range(len(recalls[HEADS].per_layer)):
        shares = [f"{recall.per_layer[layer]:.2f}" for recall in recalls.values()]
        rows.append([str(layer), *shares])
    lines = [
        f"# Retaining heads for {model}",
        "",
        *(f"* {line}" for line in about),
        f"* {num_pairs} held-out pairs: of the 1/{SHARE} of a document's tokens that have the "
        "highest labels, the share that is among as many kept ones, mean over KV heads and "
        "documents, with its standard error over documents",
        "",
        *(f"| {' | '.join(cells)} |" for cells in rows),
        "",
    ]
    return "\n".join(lines)
