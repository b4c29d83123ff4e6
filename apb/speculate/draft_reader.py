"""What a draft model reads: the text so far, and branches of drafts behind it.

Letters: T rows of a pass, P rows that the model has read and not yet been told to keep, M hidden
size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apb.speculate.base import MAX_NODES, DraftModel


class DraftReader:
    """Keeps a draft model up with a text, so that no token of it is read twice.

    Drafts that turn out to be the text's continuation stay read. A text that goes on by more than
    the window is passed over but for its end.
    """

    SPARE = MAX_NODES
    """Rows that the model needs to have room for, beside those of drafts."""

    def __init__(self, model: DraftModel, *, sinks: int, window: int) -> None:
        self._model, self._sinks, self._window = model, sinks, window
        self._text: list[int] = []
        self._num_kept = 0
        """Tokens of the text that the model has read, or passed over."""
        self._paths: list[tuple[int, ...]] = []
        """Of each row not kept yet, those that it sees; its own is the last."""
        self._children: dict[tuple[int, int], int] = {}
        """Rows of drafts, by their parent's row and their token."""
        self._root = 0

    def begin(self, token_ids: Sequence[int]) -> None:
        """A new text."""
        self._model.clear()
        self._text, self._num_kept = list(token_ids), 0
        self._forget_drafts()
        self._catch_up()

    def advance(self, new_ids: Sequence[int]) -> None:
        """The text goes on, with what was drafted or not."""
        rows = list(self._paths[self._root]) if self._paths else []
        for token_id in new_ids[:-1]:  # the last one is the new root, which is always read
            row = self._children.get((rows[-1], token_id)) if rows else None
            if row is None:
                break
            rows.append(row)
        self._model.keep(rows)
        self._num_kept += len(rows)
        self._text += new_ids
        self._forget_drafts()

    def read_root(self) -> tuple[int, Tensor]:
        """Read what is left of the text: the row of its last token, and the state ``[1, M]``."""
        self._model.keep([])
        self._forget_drafts()
        if len(self._text) - self._num_kept > self.SPARE:
            self._catch_up(but=1)
        left = range(self._num_kept, len(self._text))
        states_TM = self._model.read([self._text[place] for place in left], left)
        self._paths = [tuple(range(row + 1)) for row in range(len(left))]
        self._root = len(left) - 1
        return self._root, states_TM[-1:]

    def read(self, token_ids: Sequence[int], parents: Sequence[int]) -> tuple[range, Tensor]:
        """Read drafts behind the rows of their parents: their own rows, and states ``[T, M]``."""
        rows = range(len(self._paths), len(self._paths) + len(token_ids))
        for row, token_id, parent in zip(rows, token_ids, parents, strict=True):
            self._children[parent, token_id] = row
            self._paths.append((*self._paths[parent], row))
        visible_TP = torch.zeros(len(rows), rows.stop, dtype=torch.bool)
        for visible_P, row in zip(visible_TP, rows, strict=True):
            visible_P[list(self._paths[row])] = True
        positions = [self._num_kept + len(self._paths[row]) - 1 for row in rows]
        return rows, self._model.read(token_ids, positions, visible_TP)

    def _forget_drafts(self) -> None:
        self._paths, self._children = [], {}

    def _catch_up(self, but: int = 0) -> None:
        """Read and keep the text, all but its last tokens."""
        stop = len(self._text) - but
        start = stop - self._window
        if start > max(self._num_kept, self._sinks):
            self._model.clear()
            places = [*range(self._sinks), *range(start, stop)]
        else:
            places = list(range(self._num_kept, stop))
        while places:
            now, places = places[: self._model.room], places[self._model.room :]
            self._model.read([self._text[place] for place in now], now)
            self._model.keep(range(len(now)))
        self._num_kept = stop
