"""Query compression: what the question's tokens score highest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from apb.compress.base import BlockView, Compressor, ObservationConfig, observed_rows


class QueryCompressor(Compressor):
    """Keeps the keys with the highest mean query-key score over the question's tokens.

    The training-free score of Spava (https://arxiv.org/abs/2601.21444): no softmax, mean over the
    question and the query heads of a group, max-pooled. The mean of dot products is the dot product
    with the mean, so the question costs one vector per KV head. Without a question the block's last
    `window` rows stand in.
    """

    needs_query = True

    def __init__(self, *, window: int, kernel: int) -> None:
        self._window, self.pool = window, kernel

    def score(self, block: BlockView) -> Tensor:
        num_kv_heads = block.k_KSD.shape[0]
        query_KND = (
            observed_rows(block, self._window).unflatten(0, (num_kv_heads, -1)).flatten(1, 2)
        )
        mean_KD1 = query_KND.float().mean(dim=1)[..., None]
        scores_KS: Tensor = (block.k_KSD.float() @ mean_KD1)[..., 0]
        return scores_KS


@dataclass(kw_only=True, slots=True)
class QueryConfig(ObservationConfig):
    """Config of `QueryCompressor`."""

    def build(self, *, seed: int) -> QueryCompressor:
        return QueryCompressor(window=self.window, kernel=self.kernel)
