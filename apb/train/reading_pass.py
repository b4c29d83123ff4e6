"""A frozen model reads a document and the answer to a question; every layer is looked at once.

Letters: T tokens of the pass, S of the document, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from apb.attention.base import AttentionBackend, LayerInputs, Segment
from apb.compress.base import BlockView
from apb.hf.model import CausalLM
from apb.train.pairs import Reading
from apb.train.retaining_labels import answer_scores

Visit = Callable[[BlockView, Tensor], None]
"""Takes the document's rows in a layer, and the labels ``[K, S]`` of its tokens."""


@dataclass(frozen=True, slots=True)
class ReadingPass:
    """Runs readings through a model, with nothing kept of a layer once the next one runs."""

    model: CausalLM
    backend: AttentionBackend

    def run(self, reading: Reading, visit: Visit) -> None:
        """One causal pass; `visit` is called in every layer, in order."""
        document, query, answer = reading.document, reading.query, reading.answer

        def attend(layer: LayerInputs) -> Tensor:
            q_HTD, k_KTD, v_KTD = layer.q_HTD, layer.k_KTD, layer.v_KTD
            view = BlockView(
                layer.layer_idx,
                1,  # as of a block behind the first: one that an anchor has told of the question
                document.start,
                q_HTD[:, document],
                k_KTD[:, document],
                v_KTD[:, document],
                layer.scale,
                q_HTD[:, query],
            )
            visit(view, answer_scores(q_HTD[:, answer], view.k_KSD, layer.scale))
            everything = Segment(0, q_HTD.shape[1], k_KTD, v_KTD, causal=True)
            return self.backend.attend(q_HTD, [everything], scale=layer.scale).out_THD

        positions_T = torch.arange(len(reading.ids_T), device=self.model.device)
        self.model.forward(reading.ids_T.tolist(), positions_T, attend)
