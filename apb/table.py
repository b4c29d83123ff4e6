"""The table that a run prints: what it cost, in total and per rank."""

from __future__ import annotations

from collections.abc import Sequence

from apb.output import LayerFinding, RequestMetrics


def timing_table(metrics: RequestMetrics) -> list[str]:
    """Lines of plain text, one row per rank."""
    ms_per_token = 1e3 / metrics.tokens_per_s if metrics.tokens_per_s else 0.0
    lines = [
        f"{metrics.method}, {_count(metrics.num_blocks, 'block')} on "
        f"{_count(len(metrics.layout), 'rank')}, KV {metrics.placement}, "
        f"{metrics.dtype}, {metrics.device}",
        f"context {metrics.context_tokens} tokens, query {metrics.query_tokens}, "
        f"generated {metrics.generated_tokens}",
        f"prefill {metrics.prefill_s:.2f} s   TTFT {metrics.ttft_s:.2f} s   "
        f"decode {metrics.tokens_per_s:.1f} tokens/s ({ms_per_token:.0f} ms per token)",
        f"drafter {metrics.drafter}, "
        f"acceptance length {metrics.acceptance_length:.2f} tokens a step",
        *_audit(metrics.audit),
        "",
        "rank  tokens run    cached    received  peak memory  blocks",
    ]
    for rank, layout in enumerate(metrics.layout):
        blocks = " ".join(f"{start}-{stop}" for start, stop in layout.blocks) or "none"
        lines.append(
            f"{rank:>4}  {layout.tokens_run:>10}  {layout.tokens_cached:>8}  "
            f"{_size(metrics.bytes_exchanged[rank]):>10}  "
            f"{_size(metrics.peak_memory_bytes[rank]):>11}  {blocks}"
        )
    return lines


def _audit(findings: Sequence[LayerFinding]) -> list[str]:
    if not findings:
        return []
    least = min(findings, key=lambda finding: finding.recovered_mass)
    worst = max(findings, key=lambda finding: finding.output_error)
    return [
        f"audit of {_count(len(findings), 'layer')}: recovered attention mass from "
        f"{least.recovered_mass:.3f} (layer {least.layer}), output error up to "
        f"{worst.output_error:.3f} (layer {worst.layer})"
    ]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
