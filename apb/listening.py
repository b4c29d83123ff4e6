"""Where ranks listen for each other."""

from __future__ import annotations

import sys
from collections.abc import MutableMapping

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def listen_on(interface: str, environment: MutableMapping[str, str]) -> None:
    """Have gloo and NCCL use that network interface, where the variables name no other."""
    environment.setdefault("GLOO_SOCKET_IFNAME", interface)
    # Without the sign NCCL takes it for the beginning of a name; unasked it avoids loopback.
    environment.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
