"""Two machines on one: network namespaces, joined by a wire that can be slow, lossy or cut.

The wire is a pair of TUN devices and a thread that carries packets between them, because kernels
are built without `netem` as often as with it. Linux and root only.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEVICE = "apb0"
ADDRESSES = ("10.78.0.1", "10.78.0.2")
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x1, 0x1000
_MTU = 9000


def why_not() -> str | None:
    """What this machine or user lacks; None where nodes can be made."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"{' and '.join(missing)} not found: install iproute2"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "there is no /dev/net/tun here"
    probe = f"apb-probe-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return "network namespaces are not permitted here"
    _ip("netns", "del", probe)
    return None


class Nodes:
    """Two namespaces with one address each. Attributes of the wire may change at any time.

    Attributes:
        delay_s: one way.
        loss: share of packets that vanish.
        is_cut: whether all of them do.
        bytes_carried: both ways, so far.
    """

    def __init__(self) -> None:
        self.delay_s, self.loss, self.is_cut, self.bytes_carried = 0.0, 0.0, False, 0
        self._names = [f"apb-node-{os.getpid()}-{idx}" for idx in range(2)]
        self._is_open = True
        self._random = random.Random(0)
        self._devices: list[int] = []
        self._thread = threading.Thread(target=self._carry, daemon=True)
        _remove_orphans()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        self._thread.start()

    def _build(self) -> None:
        for name in self._names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        self._devices += [_in_thread(_open_tun, name) for name in self._names]
        for name, address in zip(self._names, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
            _ip("-n", name, "link", "set", DEVICE, "mtu", str(_MTU), "up")

    def limit(self, mbit: int) -> None:
        """Let each node send that many Mbit/s."""
        bucket = ["tbf", "rate", f"{mbit}mbit", "burst", "72kb", "latency", "100ms"]
        for name in self._names:
            _run("tc", "-n", name, "qdisc", "replace", "dev", DEVICE, "root", *bucket)

    def mend(self) -> None:
        """A fast wire again."""
        self.delay_s, self.loss, self.is_cut = 0.0, 0.0, False
        for name in self._names:
            subprocess.run(
                ["tc", "-n", name, "qdisc", "del", "dev", DEVICE, "root"], capture_output=True
            )

    def start(
        self, node: int, command: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> subprocess.Popen[str]:
        """A process on a node; what it prints is in one pipe."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self._names[node], *command],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def processes(self) -> list[int]:
        """Ids of all processes on both nodes."""
        return [pid for name in self._made() for pid in _processes_in(name)]

    def clear(self) -> None:
        """End all processes on both nodes."""
        give_up = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < give_up:
            _kill(left)
            time.sleep(0.05)

    def close(self) -> None:
        """End what runs there and remove the namespaces."""
        self.clear()
        self._is_open = False
        if self._thread.is_alive():
            self._thread.join()
        for device in self._devices:
            os.close(device)
        for name in self._made():
            _ip("netns", "del", name)

    def _made(self) -> list[str]:
        return [name for name in self._names if Path(f"/run/netns/{name}").exists()]

    def _carry(self) -> None:
        flying: list[tuple[float, int, int, bytes]] = []
        other = dict(zip(self._devices, reversed(self._devices), strict=True))
        count = 0
        while self._is_open:
            due = flying[0][0] - time.monotonic() if flying else 0.05
            ready, _, _ = select.select(self._devices, [], [], min(max(due, 0.0), 0.05))
            for device in ready:
                packet = os.read(device, 2 * _MTU)
                if self.is_cut or self._random.random() < self.loss:
                    continue
                count += 1
                self.bytes_carried += len(packet)
                heapq.heappush(
                    flying, (time.monotonic() + self.delay_s, count, other[device], packet)
                )
            while flying and flying[0][0] <= time.monotonic():
                _, _, device, packet = heapq.heappop(flying)
                if not self.is_cut:
                    with suppress(OSError):  # no room in its queue: lost, as on any wire
                        os.write(device, packet)


def _remove_orphans() -> None:
    """Remove what a run that was killed outright has left behind."""
    for line in _run("ip", "netns", "list").splitlines():
        name = line.split()[0]
        prefix, _, rest = name.partition("apb-node-")
        if not prefix and rest and not Path(f"/proc/{rest.partition('-')[0]}").exists():
            _kill(_processes_in(name))
            _ip("netns", "del", name)


def _processes_in(namespace: str) -> list[int]:
    return [int(pid) for pid in _run("ip", "netns", "pids", namespace).split()]


def _kill(processes: Sequence[int]) -> None:
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _in_thread(function: Callable[[str], int], argument: str) -> int:
    """In a thread of its own, which goes with the namespace that it has moved to."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, argument).result()


def _open_tun(namespace: str) -> int:
    """A TUN device in a namespace, made by a thread that moves there."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/run/netns/{namespace}").open() as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    device = os.open("/dev/net/tun", os.O_RDWR)  # it belongs to the namespace it is opened in
    request = struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI)
    fcntl.ioctl(device, _TUNSETIFF, request)
    return device


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
