"""Where a decoder is within each of its layers, told to a trace by the modules themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from apb.attention.base import LayerInputs
from apb.methods.base import Attend
from apb.trace.recorder import Trace
from apb.trace.records import Phase


@contextmanager
def layers_traced(base_model: Any, attend: Attend, trace: Trace) -> Iterator[Attend]:
    """`attend` as to be called by a Hugging Face decoder, which is watched meanwhile."""
    laps = _Laps(attend, trace)
    with ExitStack() as hooks:
        for layer in base_model.layers:
            for hook in (
                layer.register_forward_pre_hook(laps.entering),
                layer.self_attn.register_forward_hook(laps.projected),
                layer.register_forward_hook(laps.leaving),
            ):
                hooks.callback(hook.remove)
        yield laps.attend


class _Laps:
    """A layer's parts in the order in which they run, each from the end of the last one."""

    def __init__(self, attend: Attend, trace: Trace) -> None:
        self._attend, self._trace = attend, trace
        self._since: Any = None
        self._layer = -1

    def entering(self, *_: Any) -> None:
        self._since = self._trace.mark()

    def attend(self, layer: LayerInputs) -> Tensor:
        self._layer = layer.layer_idx
        self._lap(Phase.PROJECTIONS)
        out_THD = self._attend(layer)
        self._lap(Phase.ATTENTION)
        return out_THD

    def projected(self, *_: Any) -> None:
        self._lap(Phase.OUTPUT)

    def leaving(self, *_: Any) -> None:
        self._lap(Phase.MLP)

    def _lap(self, phase: Phase) -> None:
        now = self._trace.mark()
        self._trace.add(phase, self._layer, self._since, now)
        self._since = now
