"""Ranks in network namespaces of this machine, joined by a switch of limited speed (Linux, root).

Every rank's port is a veth pair into a bridge in a namespace of its own. tc's token bucket filter
limits both ends, so that a rank sends and receives at the rate given. It adds no delay: the time of
a small message stays that of this machine's own network stack.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from apb.errors import ApbError, InputError
from benchmarks.environment import ROOT

PORT = "apb0"
"""The rank's end of its link, in the rank's namespace."""
OWNER_ADDRESS = "10.77.0.1"
_PREFIX = "apb-overlap-"
_CONGESTION_CONTROL = "cubic"
_BURST = "72kb"
"""One segmentation-offload packet: the least that the filter passes without cutting packets up."""
_MAX_QUEUE = "100ms"
_EXIT_S = 10.0


class Switch:
    """A network of `num_ranks` namespaces, which `close` takes down with the processes in them."""

    def __init__(self, num_ranks: int) -> None:
        """Raises InputError where this machine or this user cannot make it."""
        if sys.platform != "linux" or os.geteuid() != 0:
            raise InputError("network namespaces need Linux and root: run benchmarks.overlap there")
        if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
            raise InputError(f"{' and '.join(missing)} not found: install the iproute2 package")
        self._congestion_control = congestion_control()
        self._ranks = [f"{_PREFIX}{os.getpid()}-{rank}" for rank in range(num_ranks)]
        self._hub = f"{_PREFIX}{os.getpid()}-hub"
        self._processes: list[subprocess.Popen[str]] = []
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        _remove_orphans()
        for namespace in (self._hub, *self._ranks):
            _ip("netns", "add", namespace)
        _ip("-n", self._hub, "link", "add", "switch", "type", "bridge")
        _ip("-n", self._hub, "link", "set", "switch", "up")
        for rank, namespace in enumerate(self._ranks):
            pair = ["type", "veth", "peer", "name", PORT, "netns", namespace]
            _ip("-n", self._hub, "link", "add", _port(rank), *pair)
            _ip("-n", self._hub, "link", "set", _port(rank), "master", "switch", "up")
            address = f"10.77.0.{rank + 1}"
            _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", PORT)
            _ip("-n", namespace, "link", "set", PORT, "up")
            _ip("-n", namespace, "link", "set", "lo", "up")
            route = [
                "10.77.0.0/24",
                "dev",
                PORT,
                "src",
                address,
                "congctl",
                self._congestion_control,
            ]
            _ip("-n", namespace, "route", "replace", *route)

    def limit(self, gbit: float | None) -> None:
        """Let every port carry that many Gbit/s in each direction, or as many as it can."""
        for rank, namespace in enumerate(self._ranks):
            for where, device in ((self._hub, _port(rank)), (namespace, PORT)):
                root = ["dev", device, "root"]
                if gbit is not None:
                    bucket = ["rate", f"{gbit}gbit", "burst", _BURST, "latency", _MAX_QUEUE]
                    _run("tc", "-n", where, "qdisc", "replace", *root, "tbf", *bucket)
                elif "tbf" in _run("tc", "-n", where, "qdisc", "show", *root):
                    _run("tc", "-n", where, "qdisc", "del", *root)

    def start(
        self, rank: int, command: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[str]:
        """A process in the rank's namespace, spoken to by its standard input and output."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self._ranks[rank], *command],
            env={**os.environ, "GLOO_SOCKET_IFNAME": PORT, **environment},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is the driver's to handle
        )
        self._processes.append(process)
        return process

    @property
    def description(self) -> str:
        """How ranks are joined, for a report."""
        return (
            "network namespaces, veth pairs and a bridge on one machine; where limited, by `tbf` "
            f"on both ends of each pair (burst {_BURST}), with no delay added; TCP with "
            f"{self._congestion_control}"
        )

    def close(self) -> None:
        """End the processes and remove the namespaces; repeating it does no harm."""
        for process in self._processes:
            process.kill()
            process.wait()
        existing = _run("ip", "netns", "list").split()
        for namespace in (*self._ranks, self._hub):
            if namespace in existing:
                _ip("netns", "del", namespace)


@contextmanager
def switch(num_ranks: int) -> Iterator[Switch]:
    """A `Switch` that goes away in any case, also where this process is asked to end."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    made = None
    try:
        made = Switch(num_ranks)
        yield made
    finally:
        if made is not None:
            made.close()
        signal.signal(signal.SIGTERM, before)


def _remove_orphans() -> None:
    """Remove what a benchmark that was killed outright has left behind."""
    for namespace in _run("ip", "netns", "list").split():
        found = re.fullmatch(rf"{_PREFIX}(\d+)-\w+", namespace)
        if found and not Path(f"/proc/{found[1]}").exists():
            _ip("netns", "del", namespace)


def congestion_control() -> str:
    """Linux's own default, `cubic`, where the kernel has it, whatever this machine prefers."""
    available = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    return _CONGESTION_CONTROL if _CONGESTION_CONTROL in available else available[0]


def _port(rank: int) -> str:
    return f"port{rank}"


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_EXIT_S)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ApbError(f"`{' '.join(command)}` failed: {reason}")
    return done.stdout
