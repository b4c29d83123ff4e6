"""`python -m apb.plan +model=NAME context_len=N [world_size=R] [any other setting]`

What a prefill would take on every rank, before any rank runs: rows, cache, peak memory and
predicted seconds. No weights are read and, for the named models, nothing is downloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from apb.calibration import known_rates
from apb.config import RunConfig, compose_config, plugin_name
from apb.cost import CostModel, ModelShape
from apb.errors import ApbError, InputError
from apb.hf.model import choose_dtype, load_config
from apb.hf.shape import model_shape
from apb.methods.base import AttentionMethod
from apb.methods.plan import PlanRequest, PrefillPlan
from apb.worker import choose_device

_QUERY_LEN = 32
"""Tokens of a question with its template, as an example."""


def plan_table(config: RunConfig, context_len: int) -> list[str]:
    """Lines of plain text, one row per rank.

    Raises:
        InputError: the settings do not fit, or the model's shape is not known.
    """
    device = choose_device(config.device, 0)
    dtype = choose_dtype(config.dtype, device)
    world_size = config.world_size or 1
    costs = CostModel(
        shape=_shape(config), rates=known_rates(device, dtype), itemsize=dtype.itemsize
    )
    method = config.method.build(seed=config.seed)
    plan = method.plan(
        PlanRequest(
            context_len=context_len,
            query_len=_QUERY_LEN,
            world_size=world_size,
            num_blocks=config.num_blocks,
            costs=costs,
        )
    )
    name = plan.method or plugin_name("method", config.method)
    return [
        f"{config.model.name}, {context_len} tokens, {name}, {len(plan.layout.blocks)} blocks on "
        f"{world_size} ranks, {str(dtype).removeprefix('torch.')}",
        f"weights {_gib(costs.weight_bytes)}, KV {_gib(costs.kv_bytes(context_len))} in all",
        f"rates: {costs.rates.source}",
        "",
        "rank        rows      cached    received  peak memory   prefill",
        *_rank_lines(config, method, plan, costs),
        *(f"note: {note}" for note in plan.notes),
    ]


def _rank_lines(
    config: RunConfig, method: AttentionMethod, plan: PrefillPlan, costs: CostModel
) -> list[str]:
    lines = []
    for rank in range(plan.layout.world_size):
        work = method.workload(plan, costs.shape, rank)
        cached = plan.layout.tokens_on(rank)
        peak = costs.prefill_bytes(work, cached_tokens=cached, chunk_len=config.runtime.chunk_len)
        received = work.received * costs.itemsize * costs.shape.num_layers
        lines.append(
            f"{rank:>4}  {work.rows:>10}  {cached:>10}  {_gib(received):>10}  {_gib(peak):>11}  "
            f"{costs.prefill_s([work]):>8.2f} s"
        )
    return lines


def _shape(config: RunConfig) -> ModelShape:
    """From the model's configuration file in `conf/`, or else from its checkpoint."""
    if config.model.shape is None:
        return model_shape(load_config(config.model))
    try:
        return ModelShape(**config.model.shape)
    except TypeError as error:
        fields = ", ".join(ModelShape._fields)
        raise InputError(f"model.shape needs exactly the fields {fields}") from error


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    if {"-h", "--help"}.intersection(arguments):
        print(__doc__)  # noqa: T201
        return 0
    try:
        lengths = [word for word in arguments if word.startswith("context_len=")]
        overrides = [word for word in arguments if word not in lengths]
        print("\n".join(plan_table(compose_config(overrides), _length(lengths))))  # noqa: T201
    except ApbError as error:
        print(f"apb.plan: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


def _length(words: Sequence[str]) -> int:
    value = words[-1].partition("=")[2] if words else ""
    if not value.isdecimal() or int(value) < 1:
        raise InputError("context_len=N is needed, a number of tokens from 1")
    return int(value)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
