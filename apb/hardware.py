"""Named hardware, for plans made on another machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from apb.cost import Rates


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A kind of device in nodes of several, by its data sheet (GPUs: dense bf16) and what kernels
    reach.

    Attributes:
        flops: peak of matrix products per second.
        linear_share: of the peak, by large linear layers.
        attention_share: of the peak, by attention of long sequences.
        memory: bytes of a GPU.
        memory_bytes: peak of its reads per second; `MEMORY_SHARE` of it is reached.
        node_link: bytes per second that a GPU receives within its node.
        net_link: and from other nodes.
        gpus_per_node: as they are usually built.
        source: of the shares.
    """

    flops: float
    linear_share: float
    attention_share: float
    memory: float
    memory_bytes: float
    node_link: float
    net_link: float
    gpus_per_node: int = 8
    source: str

    def rates(self, name: str, world_size: int) -> Rates:
        """Of one rank; among several nodes their network is the link that exchanges wait for."""
        within = world_size <= self.gpus_per_node
        return Rates(
            linear_flops=self.flops * self.linear_share,
            attention_flops=self.flops * self.attention_share,
            memory_bytes=self.memory_bytes * MEMORY_SHARE,
            link_bytes=self.node_link if within else self.net_link,
            latency_s=_NODE_LATENCY if within else _NET_LATENCY,
            source=f"{name}'s data sheet; {self.source}",
        )


MEMORY_SHARE = 0.8
"""Of the memory's peak rate, by large reads."""
_NODE_LATENCY, _NET_LATENCY = 2e-5, 4e-5
"""Of a small NCCL collective."""
_MEASURED = "shares of it as APB's table 16 measured them (linear maps 0.79, attention 0.68)"
_ASSUMED = "shares of it assumed (linear maps 0.7, attention 0.6)"

_A800 = Hardware(
    flops=312e12,
    linear_share=0.79,
    attention_share=0.68,
    memory=80e9,
    memory_bytes=2.04e12,
    node_link=95e9,
    net_link=25e9,
    source=_MEASURED,
)
_H100 = Hardware(
    flops=989e12,
    linear_share=0.7,
    attention_share=0.6,
    memory=80e9,
    memory_bytes=3.35e12,
    node_link=210e9,
    net_link=50e9,
    source=_ASSUMED,
)

HARDWARE: Mapping[str, Hardware] = {
    "a800": _A800,
    "a100": replace(_A800, node_link=140e9, source=f"{_MEASURED} on A800s"),
    "h100": _H100,
    "h200": replace(_H100, memory=141e9, memory_bytes=4.8e12),
    "b200": Hardware(
        flops=2250e12,
        linear_share=0.7,
        attention_share=0.6,
        memory=180e9,
        memory_bytes=8e12,
        node_link=420e9,
        net_link=50e9,
        source=_ASSUMED,
    ),
    "cpu": Hardware(
        flops=1.3e11,
        linear_share=0.9,
        attention_share=0.8,
        memory=64e9,
        memory_bytes=2e10,
        node_link=1e9,
        net_link=1e8,
        gpus_per_node=4,
        source="measured on 2 cores of an AMD EPYC in fp32",
    ),
}
"""NVLink has 400 GB/s both ways on A800s, 600 on A100s, 900 on Hopper, 1800 on Blackwell; about
0.47 of one way is what collectives deliver. Nodes are joined by 200 (Ampere) or 400 Gbit/s per GPU.
"""
