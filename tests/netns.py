"""Two network namespaces and a link between them that can be slow, lossy or dead, as a test needs it.

The link is a pair of tun devices with a process of ours between them, which delays and drops packets; so nothing is
needed of the machine but root, ``ip`` and ``/dev/net/tun``, while netem and nftables are often missing. A dropped
packet vanishes as on a broken route: no interface goes down and no ICMP comes.
"""

import collections.abc
import contextlib
import ctypes
import fcntl
import heapq
import itertools
import json
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import sys
import time
import typing

_TUN = "/dev/net/tun"
# linux/if_tun.h, linux/if.h
_TUNSETIFF = 0x400454CA
_IFF_TUN = 0x0001
_IFF_NO_PI = 0x1000
_CLONE_NEWNET = 0x40000000
_PACKET = 65536
# What a slow link holds before it drops, in seconds at its rate: a router's buffer.
_QUEUE_S = 0.5

HERE_IP = "10.77.0.1"
THERE_IP = "10.77.0.2"
_NUMBERS = itertools.count()


def why_not() -> str | None:
    """Returns: the reason why namespaces can't be had on this machine; None if they can."""
    if os.geteuid():
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need ip (package iproute2)"
    if not os.path.exists(_TUN):
        return f"{_TUN} does not exist"
    probe = f"probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"ip netns add failed: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


def _setns(fd: int) -> None:
    # os.setns came with Python 3.12.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextlib.contextmanager
def inside(namespace: str) -> collections.abc.Iterator[None]:
    """Let this thread make its sockets in a namespace; they stay there."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(f"/run/netns/{namespace}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(there)
        finally:
            os.close(there)
        try:
            yield
        finally:
            _setns(home)
    finally:
        os.close(home)


class Network:
    """Namespaces ``here`` (``HERE_IP``) and ``there`` (``THERE_IP``), joined by a link. A context manager.

    The proxy runs ``here``, the peer whose network fails is ``there``. Each has its own loopback.
    """

    def __init__(self) -> None:
        number = next(_NUMBERS)
        self.here = f"proxy-test-{os.getpid()}-{number}-here"
        self.there = f"proxy-test-{os.getpid()}-{number}-there"
        self._stack = contextlib.ExitStack()
        self._state: dict[str, object] = {
            "drop": "",
            "delay_s": 0.0,
            "loss": 0.0,
            "rate": 0.0,
            "largest": 0,
            "forgotten": 0,
        }

    def __enter__(self) -> typing.Self:
        with self._stack:
            self._build()
            self._stack = self._stack.pop_all()
        return self

    def _build(self) -> None:
        ends = []
        for namespace, address in ((self.here, HERE_IP), (self.there, THERE_IP)):
            _ip("netns", "add", namespace)
            self._stack.callback(_ip, "netns", "delete", namespace)
            with inside(namespace):
                fd = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                self._stack.callback(os.close, fd)
                fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"tun0", _IFF_TUN | _IFF_NO_PI))
            ends.append(fd)
            _ip("-n", namespace, "link", "set", "lo", "up")
            _ip("-n", namespace, "address", "add", f"{address}/24", "dev", "tun0")
            _ip("-n", namespace, "link", "set", "tun0", "up")
        control, far = socket.socketpair()
        self._control = self._stack.enter_context(control)
        with far:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(ends[0]), str(ends[1]), str(far.fileno())],
                pass_fds=(*ends, far.fileno()),
                start_new_session=True,  # a Ctrl-C is for whoever made the link, who then ends it
            )
        self._stack.callback(self._process.wait, 5)
        self._stack.callback(control.shutdown, socket.SHUT_RDWR)  # which ends the process
        control.settimeout(5)
        self._set()

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _set(self, **changes: object) -> None:
        self._state |= changes
        self._control.sendall(json.dumps(self._state).encode() + b"\n")
        assert self._control.recv(1) == b"k", "the link's process has ended"

    def drop(self, towards: str = "both") -> None:
        """Let all packets vanish that go ``towards`` ``here``, ``there`` or ``both``."""
        self._set(drop=towards)

    def restore(self) -> None:
        """Make the link whole and fast."""
        self._set(drop="", delay_s=0.0, loss=0.0, rate=0.0, largest=0, forgotten=0)

    def slow(self, *, rate: float = 0.0, delay_s: float = 0.0, loss: float = 0.0) -> None:
        """Make the link slow: octets per second (0 is unbounded), one-way delay, share of packets lost; in each
        direction.
        """
        self._set(rate=rate, delay_s=delay_s, loss=loss)

    def narrow(self, largest: int) -> None:
        """Let packets of more than ``largest`` octets vanish, in each direction: the way has a smaller MTU than both
        ends believe, and nobody tells them (RFC 2923 §2.1).
        """
        self._set(largest=largest)

    def forget(self, port: int) -> None:
        """Let the packets of one TCP connection vanish, in each direction, by the port ``here``: a NAT or firewall on
        the way has forgotten it, and takes new ones. IPv4 only.
        """
        self._set(forgotten=port)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _port(packet: bytes, side: str) -> int:
    """Returns: the TCP port ``here`` of a packet that comes in at the end whose packets go towards ``side``; 0 of
    another packet.
    """
    if packet[0] >> 4 != 4 or packet[9] != socket.IPPROTO_TCP:
        return 0
    at = (packet[0] & 15) * 4 + (2 if side == "here" else 0)
    port: int = struct.unpack_from("!H", packet, at)[0]
    return port


def _carry(ends: tuple[int, int], control: socket.socket) -> None:
    """Carry packets between the devices until the control socket ends."""
    randomness = random.Random(7)
    towards = {ends[0]: "there", ends[1]: "here"}
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    free_at = dict.fromkeys(ends, 0.0)
    state: dict[str, typing.Any] = {"drop": "both"}
    waiting: list[tuple[float, int, int, bytes]] = []
    numbers = itertools.count()
    buffered = b""
    while True:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready = set(select.select([*ends, control.fileno()], [], [], timeout)[0])
        now = time.monotonic()
        if control.fileno() in ready:
            octets = control.recv(4096)
            if not octets:
                return
            buffered += octets
            while b"\n" in buffered:
                line, _, buffered = buffered.partition(b"\n")
                state = json.loads(line)
                if state["drop"]:
                    # What is under way is lost as well.
                    waiting = [entry for entry in waiting if state["drop"] not in ("both", towards[other[entry[2]]])]
                    heapq.heapify(waiting)
                control.sendall(b"k")
        for end in ends:
            if end in ready:
                for _ in range(64):
                    try:
                        packet = os.read(end, _PACKET)
                    except BlockingIOError:
                        break
                    if state["drop"] in ("both", towards[end]) or randomness.random() < state["loss"]:
                        continue
                    if 0 < state["largest"] < len(packet):
                        continue
                    if state["forgotten"] and state["forgotten"] == _port(packet, towards[end]):
                        continue
                    due = now
                    if state["rate"]:
                        due = max(now, free_at[end]) + len(packet) / state["rate"]
                        if due > now + _QUEUE_S:
                            continue
                        free_at[end] = due
                    heapq.heappush(waiting, (due + state["delay_s"], next(numbers), other[end], packet))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, sink, packet = heapq.heappop(waiting)
            with contextlib.suppress(OSError):  # the device's queue is full, or it goes down: a packet may be lost
                os.write(sink, packet)


if __name__ == "__main__":
    _carry((int(sys.argv[1]), int(sys.argv[2])), socket.socket(fileno=int(sys.argv[3])))
