"""`python -m apb.plan +model=NAME [context_len=N] [world_size=R] [hardware=NAME] [any setting]`

What a document would take, before any rank runs: seconds, bytes and memory of every method, on
which settings it fits, and from which length `apb` pays. No weights are read and, for the named
models, nothing is downloaded.

context_len=N      a document's tokens: all methods, and every rank of the one that is set; without
                   it, lengths from 8K to 10M and ranks from 1 to 1024
hardware=NAME      instead of this machine's rates: a100, a800, h100, h200, b200 or cpu
gpus_per_node=G    ranks beyond G are on other nodes (8)
link=BYTES         a rank receives per second between nodes, instead of the hardware's network
plot=FILE.svg      seconds to the first token against length
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from apb.arguments import whole_number
from apb.calibration import known_rates
from apb.config import RunConfig, compose_config, plugin_name
from apb.cost import CostModel, ModelShape
from apb.errors import ApbError, InputError
from apb.estimate import Estimate
from apb.hardware import HARDWARE
from apb.hf.model import choose_dtype, load_config
from apb.hf.shape import model_shape
from apb.methods.base import AttentionMethod
from apb.methods.plan import PlanRequest
from apb.plan_report import EXACT, Outlook, document_lines, overview_lines, plot_outlook
from apb.plugins import PLUGINS
from apb.worker import choose_device

_QUERY_LEN = 32
"""Tokens of a question with its template, as an example."""
_WORDS = ("context_len", "hardware", "gpus_per_node", "link", "plot")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is asked for beside the configuration."""

    context_len: int | None = None
    hardware: str | None = None
    gpus_per_node: int | None = None
    link: int | None = None
    plot: Path | None = None

    @classmethod
    def of(cls, values: dict[str, str]) -> Options:
        """Raises InputError for what is no number, or unknown hardware."""
        numbers = {
            key: whole_number(key, value)
            for key, value in values.items()
            if key not in ("hardware", "plot")
        }
        hardware = values.get("hardware")
        if hardware is not None and hardware not in HARDWARE:
            raise InputError(f"hardware={hardware} must be one of {', '.join(HARDWARE)}")
        if hardware is None and {"gpus_per_node", "link"} & set(numbers):
            raise InputError("gpus_per_node= and link= change named hardware: add hardware=NAME")
        plot = Path(values["plot"]) if "plot" in values else None
        if plot is not None and plot.suffix != ".svg":
            raise InputError(f"plot={plot} must end in .svg")
        return cls(hardware=hardware, plot=plot, **numbers)


class Prospects(Outlook):
    """Estimates of a configuration's methods."""

    def __init__(self, overrides: Sequence[str], options: Options) -> None:
        """Raises InputError where the settings do not fit, or the model's shape is not known."""
        config = compose_config(overrides)
        self.config, self._options = config, options
        self._known: dict[tuple[str, int, int], Estimate] = {}
        device = choose_device(config.device, 0)
        named = options.hardware not in (None, "cpu")
        self.dtype = (
            torch.bfloat16
            if named and config.dtype == "auto"
            else choose_dtype(config.dtype, device)
        )
        self.shape = _shape(config)
        self.chosen = plugin_name("method", config.method)
        others = [word for word in overrides if not word.lstrip("+").startswith("method")]
        self.methods: dict[str, AttentionMethod] = {}
        for name in dict.fromkeys((*EXACT, "star", "apb", self.chosen)):
            settings = config.method
            if name in EXACT and name != self.chosen:
                settings = PLUGINS["method"][name]()
            elif name != self.chosen:
                settings = compose_config([*others, f"method={name}"]).method
            self.methods[name] = settings.build(seed=config.seed)

    def costs(self, world_size: int) -> CostModel:
        options = self._options
        if options.hardware is None:
            rates = known_rates(choose_device(self.config.device, 0), self.dtype)
        else:
            hardware = HARDWARE[options.hardware]
            if options.gpus_per_node is not None:
                hardware = replace(hardware, gpus_per_node=options.gpus_per_node)
            if options.link is not None:
                hardware = replace(hardware, net_link=float(options.link))
            rates = hardware.rates(options.hardware, world_size)
        return CostModel(shape=self.shape, rates=rates, itemsize=self.dtype.itemsize)

    @property
    def memory(self) -> float | None:
        hardware = self._options.hardware
        return None if hardware is None else HARDWARE[hardware].memory

    def request(self, context_len: int, world_size: int) -> PlanRequest:
        return PlanRequest(
            context_len=context_len,
            query_len=_QUERY_LEN,
            world_size=world_size,
            num_blocks=self.config.num_blocks,
            costs=self.costs(world_size),
        )

    def estimate(self, name: str, context_len: int, world_size: int) -> Estimate:
        key = (name, context_len, world_size)
        if key not in self._known:  # balancing many ranks takes seconds
            self._known[key] = self._estimated(*key)
        return self._known[key]

    def _estimated(self, name: str, context_len: int, world_size: int) -> Estimate:
        request = self.request(context_len, world_size)
        if name != self.chosen:
            request = replace(request, num_blocks=None)
        method: AttentionMethod = self.methods[name]
        return Estimate.of(method, request, chunk_len=self.config.runtime.chunk_len)


def _shape(config: RunConfig) -> ModelShape:
    """From the model's configuration file in `conf/`, or else from its checkpoint."""
    if config.model.shape is None:
        return model_shape(load_config(config.model))
    try:
        return ModelShape(**config.model.shape)
    except TypeError as error:
        fields = ", ".join(ModelShape._fields)
        raise InputError(f"model.shape needs exactly the fields {fields}") from error


def plan_lines(overrides: Sequence[str], options: Options) -> list[str]:
    """Lines of plain text.

    Raises:
        InputError: the settings do not fit, or the model's shape is not known.
    """
    prospects = Prospects(overrides, options)
    given = prospects.config.world_size
    world_size = given or (1 if options.hardware is None else 8)
    lines = (
        overview_lines(prospects, world_size)
        if options.context_len is None
        else document_lines(prospects, options.context_len, world_size)
    )
    if options.plot is not None:
        lines.append(f"plot in {plot_outlook(prospects, world_size, options.plot)}")
    return lines


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    if {"-h", "--help"}.intersection(arguments):
        print(__doc__)  # noqa: T201
        return 0
    try:
        values: dict[str, str] = {}
        overrides = []
        for argument in arguments:
            key, equals, value = argument.partition("=")
            if equals and key in _WORDS:
                values[key] = value
            else:
                overrides.append(argument)
        print("\n".join(plan_lines(overrides, Options.of(values))))  # noqa: T201
    except ApbError as error:
        print(f"apb.plan: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
