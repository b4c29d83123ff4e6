"""What compressors cost beside the rest of a layer: ``python -m benchmarks.compressors``.

One rank of a prefill is replayed, which gives the time of a layer; then every compressor scores and
selects from a random block of that rank, several times in turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from apb.calibration import known_rates
from apb.compress.base import BlockView, Compressor
from apb.compress.retaining_file import RetainingHead, RetainingHeads, num_inputs
from apb.compress.retaining_head import RetainingHeadCompressor
from apb.errors import ApbError, InputError
from apb.hf.model import DTYPES
from apb.layout import Block
from apb.markdown import table
from apb.methods.plan import PrefillPlan
from apb.plugins import PLUGINS
from apb.worker import choose_device
from benchmarks.chart import Bars
from benchmarks.critical_path_probe import Clock
from benchmarks.critical_path_runs import Bench, Case, median_run
from benchmarks.critical_path_variants import SHAPES, Scene, Variant
from benchmarks.environment import REPORTS, Environment
from benchmarks.report import Spread, print_report, write_report

_COMPRESSORS = PLUGINS["method/compressor"]
_BARS = {"cpu": 0.08, "cuda": 0.04}
"""Shares of a layer that scoring and selection may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds of one compressor in one layer; `reason` instead of them where it does not fit."""

    name: str
    score_s: Sequence[float] = ()
    select_s: Sequence[float] = ()
    """Scoring, pooling, sorting and gathering."""
    reason: str = ""


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compressors", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", choices=SHAPES, help="whose shape")
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--question", type=int, default=32, help="tokens that steer the anchor")
    parser.add_argument("--ranks", type=int, default=8, help="each with one block")
    parser.add_argument("--names", nargs="+", default=[*_COMPRESSORS], choices=_COMPRESSORS)
    parser.add_argument("--hidden", type=int, default=1024, help="size of retaining heads")
    parser.add_argument("--layers", type=int, default=2, help="how many the replayed rank runs")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", choices=DTYPES, help="bfloat16 on a GPU, float32 on the CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-ups", type=int, default=1, help="rounds before those that count")
    parser.add_argument("--override", action="append", default=[], help="as method.passing_len=0.1")
    parser.add_argument("--out", type=Path, default=REPORTS)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> Path:
    """Measure and report; returns the report.

    Raises:
        ApbError: a setting does not fit.
    """
    environment = Environment.read("benchmarks.compressors")
    bench = Bench(_scene(args))
    case = bench.case(Variant("apb", "", ("method=apb",)), args.context)
    block = _last_selecting(case.plan)
    layer_s = _layer_s(bench, case, block.rank, args)
    costs = _measure(bench, case, block, args)
    lines = _render(costs, layer_s, block, case.plan, environment, bench.scene)
    data = {
        "environment": environment.to_json(),
        "scene": asdict(bench.scene),
        "layer_s": layer_s,
        "block": asdict(block),
        "passing_len": case.plan.passing_lens[block.index],
        "costs": [asdict(cost) for cost in costs],
    }
    shares = {
        cost.name: {"score and select": Spread.of(cost.select_s).interval(100 / layer_s)}
        for cost in costs
        if not cost.reason
    }
    chart = Bars(title=f"Compressors, {args.model}", y_label="% of a layer", groups=shares)
    return write_report(args.out, "compressors", args.model, lines, data, chart)


def _scene(args: argparse.Namespace) -> Scene:
    if args.layers < 2:
        raise InputError(f"--layers {args.layers}: a layer's time takes at least two layers")
    device = choose_device(args.device, 0)
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return Scene(
        model=args.model,
        layers=min(args.layers, SHAPES[args.model].num_layers),
        ranks=args.ranks,
        question_len=args.question,
        dtype=dtype,
        device=str(device),
        overrides=tuple(args.override),
        rates=known_rates(device, DTYPES[dtype]),
    )


def _last_selecting(plan: PrefillPlan) -> Block:
    """The last block that passes something on: its rank receives the most of those that choose.

    Raises:
        InputError: nothing is passed on.
    """
    passing = [block for block in plan.layout.blocks if plan.passing_lens[block.index]]
    if not passing:
        raise InputError(f"{plan.layout.context_len} tokens fill one block: raise --context")
    return passing[-1]


def _layer_s(bench: Bench, case: Case, rank: int, args: argparse.Namespace) -> float:
    """Of the rank's median run, with the default compressor, without what the link takes."""
    runs = [
        bench.replay(case, rank, repeat=repeat) for repeat in range(-args.warm_ups, args.repeats)
    ]
    run = median_run(runs[args.warm_ups :])
    return sum(run.phases_s.values()) / bench.scene.shape.num_layers


def _attach(compressor: Compressor, bench: Bench, *, hidden_size: int) -> None:
    """Heads of any model are drawn at random: what they cost does not depend on their weights."""
    if not isinstance(compressor, RetainingHeadCompressor):
        compressor.attach(bench.target)
        return
    shape = bench.target.shape
    head = RetainingHead(
        torch.randn(hidden_size, num_inputs(shape)), torch.randn(shape.num_kv_heads, hidden_size)
    )
    compressor.use(RetainingHeads((head,) * shape.num_layers), bench.target)


def _measure(bench: Bench, case: Case, block: Block, args: argparse.Namespace) -> list[Cost]:
    compressors, reasons = dict[str, Compressor](), dict[str, str]()
    for name in args.names:
        compressors[name] = _COMPRESSORS[name]().build(seed=0)
        try:
            _attach(compressors[name], bench, hidden_size=args.hidden)
        except InputError as error:
            del compressors[name]
            reasons[name] = str(error)
    for name, compressor in compressors.items():
        check_selection(name, compressor, case, block, _draw(bench.scene, block))
    rounds = [_round(bench, case, block, compressors) for _ in range(args.warm_ups + args.repeats)][
        args.warm_ups :
    ]
    return [
        Cost(
            name=name,
            score_s=[seconds[name][0] for seconds in rounds] if name in compressors else (),
            select_s=[seconds[name][1] for seconds in rounds] if name in compressors else (),
            reason=reasons.get(name, ""),
        )
        for name in args.names
    ]


@torch.inference_mode()
def check_selection(
    name: str, compressor: Compressor, case: Case, block: Block, view: BlockView
) -> None:
    """Raises ApbError unless as many tokens as planned are kept, each once, none of the excluded
    ones, and their keys and values are what is sent.
    """
    budget, excluded = case.plan.passing_lens[block.index], case.plan.excluded(block)
    num_kv_heads, _, head_dim = view.k_KSD.shape
    out_P2KD = view.k_KSD.new_empty(budget, 2, num_kv_heads, head_dim)
    kept_KP = compressor.select(view, out_P2KD, backend=case.backend, excluded=excluded).long()
    in_order = bool((kept_KP.diff(dim=1) > 0).all()) and kept_KP.shape == (num_kv_heads, budget)
    index_KPD = kept_KP[..., None].expand(-1, -1, head_dim)
    sent = [x_KSD.gather(1, index_KPD).transpose(0, 1) for x_KSD in (view.k_KSD, view.v_KSD)]
    if not in_order or kept_KP.min() < excluded or not torch.equal(out_P2KD, torch.stack(sent, 1)):
        raise ApbError(f"{name} sends other keys and values than it keeps, so that cost is moot")


@torch.inference_mode()
def _round(
    bench: Bench, case: Case, block: Block, compressors: Mapping[str, Compressor]
) -> dict[str, tuple[float, float]]:
    """Seconds of scoring alone and of the whole selection, of every compressor in turn."""
    plan, view = case.plan, _draw(bench.scene, block)
    num_kv_heads, _, head_dim = view.k_KSD.shape
    out_P2KD = view.k_KSD.new_empty(plan.passing_lens[block.index], 2, num_kv_heads, head_dim)
    seconds = {}
    for name, compressor in compressors.items():
        clock = Clock(view.k_KSD.device)
        begin = clock.tick()
        compressor.score(view)
        middle = clock.tick()
        excluded = plan.excluded(block)
        compressor.select(view, out_P2KD, backend=case.backend, excluded=excluded)
        end = clock.tick()
        times = clock.read()
        seconds[name] = times[middle] - times[begin], times[end] - times[middle]
    return seconds


def _draw(scene: Scene, block: Block) -> BlockView:
    shape, device, dtype = scene.shape, torch.device(scene.device), DTYPES[scene.dtype]

    def draw(num_heads: int, num_tokens: int) -> torch.Tensor:
        """As attention gets them: the heads of a token lie side by side."""
        x_SHD = torch.randn(num_tokens, num_heads, shape.head_dim, device=device, dtype=dtype)
        return x_SHD.transpose(0, 1)

    return BlockView(
        layer_idx=0,
        block_idx=block.index,
        start=block.start,
        q_HSD=draw(shape.num_heads, len(block)),
        k_KSD=draw(shape.num_kv_heads, len(block)),
        v_KSD=draw(shape.num_kv_heads, len(block)),
        scale=shape.head_dim**-0.5,
        query_HWD=draw(shape.num_heads, scene.question_len),
    )


def _render(
    costs: Sequence[Cost],
    layer_s: float,
    block: Block,
    plan: PrefillPlan,
    environment: Environment,
    scene: Scene,
) -> list[str]:
    bar = _BARS[torch.device(scene.device).type]
    rows = []
    for cost in costs:
        if cost.reason:
            rows.append([cost.name, "", "", "", cost.reason])
            continue
        score, select = Spread.of(cost.score_s), Spread.of(cost.select_s)
        share = select.median / layer_s
        rows.append(
            [
                f"`{cost.name}`",
                f"{score.median * 1e3:.2f}",
                f"{select.median * 1e3:.2f} ({select.low * 1e3:.2f} to {select.high * 1e3:.2f})",
                f"{share:.1%}",
                "yes" if share <= bar else "no",
            ]
        )
    return [
        f"# Compressors: what scoring and selection cost, {scene.model}",
        "",
        *environment.lines(),
        f"* {plan.layout.context_len} tokens on {scene.ranks} ranks, {scene.dtype}, "
        f"{torch.get_num_threads()} threads",
        "* before anything was timed, every compressor kept as many tokens as planned, each once, "
        "and sent their keys and values",
        f"* rank {block.rank}, the last that passes anything on: block of {len(block)} tokens, "
        f"{plan.passing_lens[block.index]} of them kept per KV head",
        f"* a layer of that rank, replayed with the default compressor: {layer_s * 1e3:.1f} ms",
        "",
        *table(
            ["compressor", "score, ms", "score and select, ms", "of a layer", f"at most {bar:.0%}"],
            rows,
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    return print_report(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
