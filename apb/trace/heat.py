"""Heat maps: what the answer attended to, and in which layers ranks waited."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from statistics import fmean
from typing import NamedTuple

from apb.trace import svg
from apb.trace.attention import Attended
from apb.trace.timeline import LEFT, shown_ranks

_TOP = 18
_MAX_COLUMNS = 96
_NAMED_COLUMNS = 44
"""Up to so many tokens have room for their text."""
_MEAN_WIDTH, _LAYERS_WIDTH, _SPACE = 110, 176, 22


class _Grid(NamedTuple):
    """Where a heat map is drawn, and what its darkest cell stands for."""

    x: float
    width: float
    """Of a column."""
    height: float
    """Of a row."""
    high: float

    def cells(
        self, columns: Sequence[Sequence[float]], hint: Callable[[int, int], str]
    ) -> list[str]:
        """A cell per value; `hint` gets its column and row."""
        return [
            svg.rect(
                self.x + column * self.width,
                _TOP + row * self.height,
                max(0.5, self.width - 1),
                max(0.5, self.height - 1),
                "heat",
                hint(column, row),
                fill_opacity=min(1.0, value / self.high) ** 0.7 if self.high else 0.0,
            )
            for column, values in enumerate(columns)
            for row, value in enumerate(values)
        ]

    def row_names(self, names: Sequence[str]) -> list[str]:
        every = 1 if self.height >= 10 else -(-10 // int(self.height))
        return [
            svg.text(
                self.x - 8,
                _TOP + row * self.height + self.height / 2 + 4,
                name,
                "label",
                anchor="end",
            )
            for row, name in enumerate(names)
            if row % every == 0
        ]


def attended(found: Attended, tokens: Sequence[str], *, label: str) -> str:
    """Rows are blocks; columns are tokens of the answer and layers, and a bar has the mean."""
    first = sum(block < 0 for block in found.blocks)
    names = [f"block {block}" for block in found.blocks[first:]]
    by_token = [row[first:] for row in found.peaks[: len(tokens)]]
    by_layer = [row[first:] for row in found.layer_peaks]
    height = max(5.0, min(24.0, 440 / len(names)))
    bottom = _TOP + len(names) * height
    starts = range(0, len(by_token), -(-len(by_token) // _MAX_COLUMNS))
    columns = [_each(max, by_token[start : start + starts.step]) for start in starts]
    texts = ["".join(tokens[start : start + starts.step]) for start in starts]
    room = svg.WIDTH - LEFT - _MEAN_WIDTH - _LAYERS_WIDTH - 2 * _SPACE
    grid = _Grid(LEFT, min(28.0, room / len(columns)), height, high=1.0)
    parts = grid.row_names(names)
    parts += grid.cells(
        columns,
        lambda column, row: (
            f"token {starts[column] + 1} “{texts[column]}”, {names[row]}: "
            f"{columns[column][row]:.1%}"
        ),
    )
    if len(columns) <= _NAMED_COLUMNS:
        parts += [
            _slanted(grid.x + (index + 0.5) * grid.width, bottom, words)
            for index, words in enumerate(texts)
        ]
    x = LEFT + len(columns) * grid.width + _SPACE
    layers = grid._replace(x=x, width=_LAYERS_WIDTH / len(by_layer))
    parts += layers.cells(
        by_layer,
        lambda column, row: (
            f"layer {found.layers[column]}, {names[row]}: {by_layer[column][row]:.1%}"
        ),
    )
    parts += [
        svg.text(x + (place + 0.5) * layers.width, bottom + 13, f"{layer}", "tick", anchor="middle")
        for place, layer in enumerate(found.layers)
    ]
    parts.append(svg.text(LEFT, _TOP - 6, "by token of the answer", "tick"))
    parts.append(svg.text(x, _TOP - 6, "by layer", "tick"))
    means = _each(fmean, found.means[: len(tokens)])[first:]
    parts += _mean_bars(names, means, x=x + _LAYERS_WIDTH + _SPACE, height=height)
    return svg.chart(bottom + (76 if len(columns) <= _NAMED_COLUMNS else 20), parts, label=label)


def _each(
    summary: Callable[[Sequence[float]], float], rows: Sequence[Sequence[float]]
) -> list[float]:
    return [summary(column) for column in zip(*rows, strict=True)]


def _mean_bars(
    names: Sequence[str], means: Sequence[float], *, x: float, height: float
) -> list[str]:
    parts = [svg.text(x, _TOP - 6, "mean", "tick")]
    scale = (_MEAN_WIDTH - 44) / (max(means) or 1.0)
    for row, (name, mean) in enumerate(zip(names, means, strict=True)):
        y, hint = _TOP + row * height, f"{name}: {mean:.1%} of the answer's attention"
        parts.append(svg.rect(x, y, max(0.5, scale * mean), max(0.5, height - 1), "heat", hint))
        if height >= 10:
            words = f"{mean:.1%}"
            parts.append(svg.text(x + scale * mean + 4, y + height / 2 + 4, words, "tick"))
    return parts


def _slanted(x: float, y: float, words: str) -> str:
    place = f"translate({x - 3:.1f},{y + 10:.1f}) rotate(60)"
    return svg.element("text", escape(words), class_="tick", transform=place)


def waits(seconds: Sequence[Sequence[float]], *, label: str) -> str:
    """Rows are ranks, columns are layers."""
    shown = shown_ranks(len(seconds))
    rows = [seconds[rank] for rank in shown]
    high = max(max(row) for row in rows)
    height, width = 16.0, (svg.WIDTH - LEFT - 12) / len(rows[0])
    grid = _Grid(LEFT, width, height, high)
    columns = list(zip(*rows, strict=True))
    parts = grid.row_names([f"rank {rank}" for rank in shown])
    parts += grid.cells(
        columns,
        lambda column, row: (
            f"rank {shown[row]}, layer {column}: {svg.amount(columns[column][row], 's')}"
        ),
    )
    bottom = _TOP + len(shown) * height
    every = max(1, len(columns) // 16)
    parts += [
        svg.text(LEFT + (layer + 0.5) * width, bottom + 13, f"{layer}", "tick", anchor="middle")
        for layer in range(0, len(columns), every)
    ]
    words = f"waiting in each layer; the darkest is {svg.amount(high, 's')}"
    parts.append(svg.text(LEFT, _TOP - 6, words, "tick"))
    return svg.chart(bottom + 20, parts, label=label)
