"""Processes joined by a slow link: two network namespaces, a veth pair, and `tc`'s token bucket.

The namespaces have no names and no route to anywhere: each lives as long as a process that holds it
and whoever runs inside, and the holders end with their parent, however that ends. So nothing is
left behind, even by SIGKILL. Needs root (CAP_SYS_ADMIN, CAP_NET_ADMIN), util-linux and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from types import TracebackType

INTERFACE = "slow0"
"""What the link is called, at both ends."""
ADDRESSES = ("10.231.0.1", "10.231.0.2")
MTU = 9000
"""Bytes. Large packets: headers take 1 % of the rate, and shaping takes little CPU."""
QUEUE = 8 << 20
"""Bytes that may wait in an end's bucket: more than TCP ever sends ahead, so nothing is dropped."""
TOOLS = {"unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2", "tc": "iproute2"}


class LinkError(Exception):
    """The link cannot be made; says why."""


def missing() -> str | None:
    """What this machine lacks for a slow link and how to get it; None if it lacks nothing."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            return f"there is no `{tool}`; install {package}"
    try:
        with SlowLink() as link:
            link.limit(1e9)
    except LinkError as e:
        root = "" if os.geteuid() == 0 else "; run it as root"
        return f"{e}{root}"
    return None


def burst(rate: float) -> int:
    """Bytes that pass an idle link at once, at `rate` bits/s.

    No less than a segment as TCP hands it over (64 KiB; tbf would have to cut it up), and a
    millisecond's worth: timers are late by as much, and tokens that find the bucket full are lost.
    """
    return max(96 << 10, int(rate / 8 * 1e-3))


class SlowLink:
    """Two namespaces and the link between them; a context manager."""

    def __init__(self) -> None:
        self.holders: list[subprocess.Popen] = []

    def __enter__(self) -> SlowLink:
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def inside(self, end: int) -> list[str]:
        """What to put before a command to run it at `end` of the link, 0 or 1."""
        return ["nsenter", f"--net=/proc/{self.holders[end].pid}/ns/net", "--"]

    def limit(self, rate: float | None) -> None:
        """Let `rate` bits/s pass in each direction, at the same time; None is no limit."""
        for end in (0, 1):
            # Fails where there was none.
            subprocess.run(
                [*self.inside(end), "tc", "qdisc", "del", "dev", INTERFACE, "root"],
                stderr=subprocess.DEVNULL,
                check=False,
                timeout=10,
            )
            if rate is not None:
                shape = f"rate {int(rate)}bit burst {burst(rate)}b limit {QUEUE}b"
                self._run(end, f"tc qdisc add dev {INTERFACE} root tbf {shape}")

    def namespaces(self) -> list[str]:
        """The kernel's names of the two, as in /proc/PID/ns/net."""
        return [_namespace(holder.pid) for holder in self.holders]

    def close(self) -> None:
        """End the holders; with them and the commands inside go namespaces and link."""
        for holder in self.holders:
            holder.kill()
            holder.wait()
            if holder.stdin:
                holder.stdin.close()
        self.holders.clear()

    def _make(self) -> None:
        for _ in ADDRESSES:
            # `cat` reads a pipe that only we hold the other end of: it ends when we do.
            holder = subprocess.Popen(
                ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stderr=subprocess.PIPE
            )
            self.holders.append(holder)
            self._await(holder)
        one, other = (holder.pid for holder in self.holders)
        add = f"ip link add {INTERFACE} netns {one} type veth peer name {INTERFACE} netns {other}"
        _run(add.split())
        for end, address in enumerate(ADDRESSES):
            self._run(end, "ip link set lo up")
            self._run(end, f"ip addr add {address}/30 dev {INTERFACE}")
            # No IPv6 address: gloo might take that, and the kernel would talk to find neighbours.
            self._run(end, f"ip link set {INTERFACE} addrgenmode none mtu {MTU} up")
            # Reno is in every kernel and guesses no bandwidth, as the host's own choice may.
            self._sysctl(end, "tcp_congestion_control", "reno")
            self._sysctl(end, "tcp_slow_start_after_idle", "0")

    def _run(self, end: int, command: str) -> None:
        _run([*self.inside(end), *command.split()])

    def _sysctl(self, end: int, name: str, value: str) -> None:
        """Best effort: /proc may be read-only."""
        write = f"echo {value} > /proc/sys/net/ipv4/{name}"
        subprocess.run(
            [*self.inside(end), "sh", "-c", write],
            stderr=subprocess.DEVNULL,
            check=False,
            timeout=10,
        )

    @staticmethod
    def _await(holder: subprocess.Popen) -> None:
        """Until `holder` is in a namespace of its own."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            if holder.poll() is not None:
                assert holder.stderr
                raise LinkError(holder.stderr.read().decode().strip())
            if _namespace(holder.pid) != _namespace("self"):
                return
            time.sleep(0.005)
        raise LinkError("`unshare --net` makes no namespace within 10 seconds")


def _namespace(pid: int | str) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise LinkError(f"`{' '.join(command)}` says: {said}")
