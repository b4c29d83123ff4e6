"""How the ranks come to be, as the configuration names it: one config per launcher."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from apb.errors import InputError


@dataclass(kw_only=True, slots=True)
class LauncherConfig:
    """Config of a launcher."""


@dataclass(kw_only=True, slots=True)
class AutoLauncherConfig(LauncherConfig):
    """`torchrun` inside one, else `local`."""


@dataclass(kw_only=True, slots=True)
class LocalLauncherConfig(LauncherConfig):
    """Processes of this machine."""


@dataclass(kw_only=True, slots=True)
class TorchrunLauncherConfig(LauncherConfig):
    """This process is a rank already."""


class Spread(StrEnum):
    """How ranks lie on nodes, in the words of Ray's placement groups."""

    PACK = "PACK"
    STRICT_PACK = "STRICT_PACK"
    SPREAD = "SPREAD"
    STRICT_SPREAD = "STRICT_SPREAD"


@dataclass(kw_only=True, slots=True)
class RayLauncherConfig(LauncherConfig):
    """Actors of a Ray cluster, one per rank, with one GPU each where the cluster has GPUs.

    Attributes:
        address: ``HOST:PORT`` of a cluster, `auto` (`RAY_ADDRESS`, or the cluster that this machine
            belongs to) or `local` (a cluster of this machine alone, ended with the ranks).
        placement_timeout_s: how long to wait for the resources of all ranks.
        strategy: `PACK` fills nodes one after the other, `STRICT_PACK` takes one node only.
        cpus_per_rank: cores that a rank reserves and, unless `OMP_NUM_THREADS` is set, uses.
        resources: further Ray resources that each rank reserves, as ``{accelerator_type:H200: 1}``.
        environment: variables of the driver that ranks get besides those of
            `apb.launchers.ray_rank.PASSED_ON`; a name may end in an asterisk.
    """

    address: str = "auto"
    placement_timeout_s: int = 60
    strategy: Spread = Spread.PACK
    cpus_per_rank: int = 1
    resources: dict[str, float] = field(default_factory=dict)
    environment: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.address.startswith("ray://"):
            raise InputError(
                f"launcher.address={self.address} is a Ray client's: run this on a node of the "
                "cluster, with launcher.address=auto, or send it there with `ray job submit`"
            )
        if not self.address:
            raise InputError("launcher.address is empty: give HOST:PORT, auto or local")
        for name, least in (("placement_timeout_s", 0), ("cpus_per_rank", 1)):
            if not getattr(self, name) >= least:
                raise InputError(f"launcher.{name}={getattr(self, name)} must be at least {least}")
        for name, amount in self.resources.items():
            if not amount > 0:
                raise InputError(f"launcher.resources.{name}={amount} must be above 0")
