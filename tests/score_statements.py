"""What compressors score, token by token: plain statements that share no code with `apb.compress`
but its record of a block. Each gives the scores of one KV head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from apb.compress.base import BlockView
from apb.rotary import Rotary


def groups_of(block: BlockView) -> int:
    return block.q_HSD.shape[0] // block.k_KSD.shape[0]


def pooled(scores: list[float], kernel: int) -> list[float]:
    reach = kernel // 2
    return [max(scores[max(0, i - reach) : i + reach + 1]) for i in range(len(scores))]


def query_scores(block: BlockView, head: int, rows_HWD: Tensor, kernel: int) -> list[float]:
    """Mean of q.k over the rows and the heads of the group."""
    scores = []
    for key_D in block.k_KSD[head]:
        products = [
            float(row_D @ key_D)
            for q_head in range(head * groups_of(block), (head + 1) * groups_of(block))
            for row_D in rows_HWD[q_head]
        ]
        scores.append(sum(products) / len(products))
    return pooled(scores, kernel)


def window_scores(block: BlockView, head: int, window: int, kernel: int) -> list[float]:
    """Mean attention that a token gets from the last rows, each of which sees no later token."""
    num_tokens = block.k_KSD.shape[1]
    rows = range(max(0, num_tokens - window), num_tokens)
    scores = [0.0] * num_tokens
    for q_head in range(head * groups_of(block), (head + 1) * groups_of(block)):
        for row in rows:
            keys = block.k_KSD[head, : row + 1]
            weights = [math.exp(float(block.q_HSD[q_head, row] @ k) * block.scale) for k in keys]
            for token, weight in enumerate(weights):
                scores[token] += weight / sum(weights) / (len(rows) * groups_of(block))
    return pooled(scores, kernel)


def cosine(a_D: Tensor, b_D: Tensor) -> float:
    return float(a_D @ b_D / (a_D.norm() * b_D.norm()))


def keydiff_scores(block: BlockView, head: int) -> list[float]:
    """How little a key looks like the mean direction."""
    keys_SD = block.k_KSD[head]
    mean_D = torch.stack([key_D / key_D.norm() for key_D in keys_SD]).mean(dim=0)
    return [-cosine(key_D, mean_D) for key_D in keys_SD]


def tova_scores(block: BlockView, head: int) -> list[float]:
    """Mean attention of the last row over the heads of all KV heads, whichever is asked for."""
    num_heads, num_tokens, _ = block.q_HSD.shape
    scores = [0.0] * num_tokens
    for q_head, q_SD in enumerate(block.q_HSD):
        keys_SD = block.k_KSD[q_head // groups_of(block)]
        weights = [math.exp(float(q_SD[-1] @ key_D) * block.scale) for key_D in keys_SD]
        for token, weight in enumerate(weights):
            scores[token] += weight / sum(weights) / num_heads
    return scores


def deviations(x_LD: list[Tensor], reference_LD: list[Tensor]) -> list[float]:
    """Softmax over the tokens of the deviation of their channels, scaled by the reference."""
    low_D, high_D = torch.stack(reference_LD).amin(0), torch.stack(reference_LD).amax(0)
    spreads = []
    for x_D in x_LD:
        scaled = ((x_D - low_D) / (high_D - low_D)).tolist()
        mean = sum(scaled) / len(scaled)
        spreads.append(math.sqrt(sum((x - mean) ** 2 for x in scaled) / (len(scaled) - 1)))
    weights = [math.exp(spread - max(spreads)) for spread in spreads]
    return [weight / sum(weights) for weight in weights]


def lag_scores(block: BlockView, head: int, *, lag: int) -> list[float]:
    """Share of its own partition that each token beats."""
    keys_SD, values_SD = block.k_KSD[head], block.v_KSD[head]
    starts = range(0, len(keys_SD), min(lag, len(keys_SD)))
    places = [range(start, min(start + lag, len(keys_SD))) for start in starts]
    whole = [place for place in places if len(place) == len(places[0])]
    scores = []
    for index, place in enumerate(places):
        reference = whole[index + 1] if index + 1 < len(whole) else whole[max(0, index - 1)]
        both = [
            deviations([x_SD[t] for t in place], [x_SD[t] for t in reference])
            for x_SD in (keys_SD, values_SD)
        ]
        total = [of_key + of_value for of_key, of_value in zip(*both, strict=True)]
        scores += [sum(other < mine for other in total) / len(place) for mine in total]
    return scores


def rotation(position: int, rotary: Rotary) -> Tensor:
    """RoPE at a position as a matrix, scaling included."""
    inv_freq_F, scaling = rotary
    half = len(inv_freq_F)
    matrix_DD = torch.zeros(2 * half, 2 * half, dtype=torch.float64)
    for index, angle in enumerate((inv_freq_F.double() * position).tolist()):
        matrix_DD[index, index] = matrix_DD[index + half, index + half] = math.cos(angle)
        matrix_DD[index, index + half] = -math.sin(angle)
        matrix_DD[index + half, index] = math.sin(angle)
    return matrix_DD * scaling


def expected_attention_scores(
    block: BlockView, head: int, rotary: Rotary, *, future: int, sinks: int, rows: int = 1024
) -> list[float]:
    """Logarithm of a token's expected share of attention, times the norm of its value."""
    num_tokens, groups = block.k_KSD.shape[1], groups_of(block)
    last = block.start + num_tokens
    turns = [rotation(position, rotary) for position in range(last, last + future)]
    mean_turn_DD = torch.stack(turns).mean(dim=0)
    back = [rotation(block.start + row, rotary).inverse() for row in range(num_tokens)]
    shares_S = torch.zeros(num_tokens, dtype=torch.float64)
    for q_SD in block.q_HSD[head * groups : (head + 1) * groups].double():
        typical = [row for row in range(num_tokens) if block.start + row >= sinks]
        typical = typical or list(range(num_tokens))
        chosen = typical[:: math.ceil(len(typical) / rows)]
        before_TD = torch.stack([back[row] @ q_SD[row] for row in chosen])
        mean_D, centred_TD = before_TD.mean(dim=0), before_TD - before_TD.mean(dim=0)
        covariance_DD = sum(x_D.outer(x_D) for x_D in centred_TD) / len(centred_TD)
        mean_D, covariance_DD = mean_turn_DD @ mean_D, mean_turn_DD @ covariance_DD @ mean_turn_DD.T
        keys_SD = block.k_KSD[head].double() * block.scale
        logits_S = torch.stack([k_D @ mean_D + k_D @ covariance_DD @ k_D / 2 for k_D in keys_SD])
        shares_S += logits_S.softmax(dim=0)
    scores: list[float] = (shares_S * block.v_KSD[head].double().norm(dim=-1)).log().tolist()
    return scores


def fused(
    members: Sequence[Sequence[float]], weights: Sequence[float], constant: float
) -> list[float]:
    """Sum of reciprocal ranks."""
    scores = [0.0] * len(members[0])
    for member, weight in zip(members, weights, strict=True):
        order = sorted(range(len(member)), key=lambda token: (-member[token], token))
        for rank, token in enumerate(order, start=1):
            scores[token] += weight / (constant + rank)
    return scores
