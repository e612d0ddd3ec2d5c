"""What the kernel is asked for: the evidence of ``TCP_INFO``, socket options, ``splice``, cores and file limits.

Decides what the kernel's numbers say about a peer (``verdict``, ``PeerPulse``); what follows for a request is decided
elsewhere. A system that lacks one of these facilities gets None or a no-op in its place, so that nobody else asks for
the platform. The table of what Linux was seen to report for paused, dead and slow peers is in docs/kernel.md.
"""

import dataclasses
import errno
import fcntl
import functools
import math
import os
import resource
import select
import socket
import struct
import termios

HAVE_SPLICE: bool = hasattr(os, "splice")
# Not in Python's select module on every system; 0 asks for nothing.
POLLRDHUP: int = getattr(select, "POLLRDHUP", 0)

# tcp(7): SIOCOUTQ has the number of TIOCOUTQ.
_SIOCOUTQ = termios.TIOCOUTQ
_SIOCOUTQNSD = 0x894B
_COUNT = struct.Struct("=i")
# linux/tcp.h. Python 3.11 has no name for it; since Linux 6.15, else ENOPROTOOPT.
_TCP_RTO_MAX_MS = 44
# linux/fcntl.h. Python 3.10 added the name, on Linux only.
_F_SETPIPE_SZ: int = getattr(fcntl, "F_SETPIPE_SZ", 1031)
_PIPE_SIZE = 1024 * 1024

# struct tcp_info of linux/tcp.h, which only grows at its end; fields that nobody here reads are skipped (x).
_INFO = struct.Struct("=BxBB4x 16xI 16xI4xII 8xI28xI 16xQ12xII 20xQQ 44xI")
_INFO_READ = 512

_STATES = (
    "?",
    "ESTABLISHED",
    "SYN_SENT",
    "SYN_RECEIVED",
    "FIN_WAIT_1",
    "FIN_WAIT_2",
    "TIME_WAIT",
    "CLOSED",
    "CLOSE_WAIT",
    "LAST_ACK",
    "LISTEN",
    "CLOSING",
)

# After this many questions in a row without an answer a single look calls the peer dead: retransmissions and probes
# each wait twice as long as the one before, and a receiver answers probes of a closed window at most every 0.5 s
# (tcp_invalid_ratelimit), so one or two say nothing.
_UNANSWERED_MANY = 3
# A smoothed round trip beyond this is called slow: no two places on earth are that far apart, so something on the way
# queues or loses.
_SLOW_RTT_S = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class TcpInfo:
    """What the kernel knows of one TCP connection. Times reach back from the moment of asking, in jiffies (4 ms)."""

    state: str  # as RFC 9293 §3.3.2 writes it: "ESTABLISHED", "FIN_WAIT_1"
    retransmits: int  # retransmission timeouts in a row that nothing answered
    probes: int  # probes, of a closed window or keepalive, that nothing answered
    unacked: int  # segments in flight
    last_data_sent_s: float  # a retransmission counts, a probe does not
    last_data_recv_s: float
    last_ack_s: float
    rtt_s: float  # smoothed
    total_retransmits: int
    bytes_acked: int
    segments_received: int  # with data or without
    notsent_bytes: int
    busy_s: float  # with data to send; of this, held up by the peer's window:
    rwnd_limited_s: float
    snd_wnd: int | None  # the peer's window; None before Linux 5.4

    @property
    def heard_s(self) -> float:
        """Time since the peer's kernel last said anything; data that acknowledges nothing new is no ACK."""
        return min(self.last_ack_s, self.last_data_recv_s)

    @property
    def questioned(self) -> bool:
        """Whether the peer's kernel owes an answer.

        Segments in flight alone do not say so: a receiver out of memory answers each retransmission without taking it,
        and the next one may be two minutes off. What counts is that something was sent since it last spoke. Where both
        fall into the same jiffy nothing is owed yet: if no answer comes, the kernel sends again, and that is later.
        """
        return self.probes > 0 or (self.unacked > 0 and self.last_data_sent_s < self.heard_s)

    def verdict(self, alive: bool = False) -> str:
        """Judge the peer by one look: ``idle``, ``moving``, ``paused``, ``slow_network`` or ``dead`` (docs/records.md).

        ``alive``: it has just spoken. The numbers may not show that: a reset answers no probe.
        """
        if not alive and self.questioned and max(self.retransmits, self.probes) >= _UNANSWERED_MANY:
            return "dead"
        if self.state == "CLOSED":
            # The queues are gone, but not what led to it: the kernel gave up on a peer that answered none of these.
            return "dead" if not alive and (self.retransmits or self.probes) else "idle"
        if not self.unacked and not self.notsent_bytes:
            return "idle"
        if self.snd_wnd == 0 or not self.unacked:
            return "paused"
        if self.retransmits or self.rtt_s >= _SLOW_RTT_S:
            return "slow_network"
        return "moving"


def tcp_info(sock: socket.socket) -> TcpInfo | None:
    """Ask the kernel about a connection.

    Returns: None on a unix socket, a closed one, or where there is no such thing. Never raises OSError.
    """
    try:
        octets = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_READ)
    except (OSError, AttributeError):
        return None  # not TCP, closed, or not Linux
    have = len(octets)
    if have < _INFO.size:
        octets += bytes(_INFO.size - have)
    (
        state,
        retransmits,
        probes,
        unacked,
        last_data_sent_ms,
        last_data_recv_ms,
        last_ack_ms,
        rtt_us,
        total_retransmits,
        bytes_acked,
        segments_received,
        notsent_bytes,
        busy_us,
        rwnd_limited_us,
        snd_wnd,
    ) = _INFO.unpack_from(octets)
    return TcpInfo(
        _STATES[state] if state < len(_STATES) else f"STATE_{state}",
        retransmits,
        probes,
        unacked,
        last_data_sent_ms / 1000,
        last_data_recv_ms / 1000,
        last_ack_ms / 1000,
        rtt_us / 1e6,
        total_retransmits,
        bytes_acked,
        segments_received,
        notsent_bytes,
        busy_us / 1e6,
        rwnd_limited_us / 1e6,
        snd_wnd if have >= _INFO.size else None,
    )


def unacknowledged_bytes(sock: socket.socket) -> int | None:
    """Count the bytes written to a TCP socket that the peer's kernel has not acknowledged.

    Ask before closing: afterwards the number is gone.
    Returns: bytes, or None where there is no such count (on a unix socket the same call counts memory).
    Raises: OSError if the socket is closed.
    Source: SIOCOUTQ, tcp(7). The page says "unsent"; the kernel counts what is in flight too.
    """
    return None if sock.family == socket.AF_UNIX else _count(sock, _SIOCOUTQ)


def unsent_bytes(sock: socket.socket) -> int:
    """Count the bytes written to a TCP socket that the kernel has not sent once.

    What was sent is retransmitted after ``close``, too; what was not waits for a window that may stay closed for long.
    Returns: bytes; 0 where there is no such count. Raises: OSError if the socket is closed.
    Source: SIOCOUTQNSD, linux/sockios.h.
    """
    return _count(sock, _SIOCOUTQNSD) or 0


def unread_bytes(sock: socket.socket) -> int:
    """Count the bytes received and not read yet. Raises: OSError if the socket is closed. Source: FIONREAD, tcp(7)."""
    return _count(sock, termios.FIONREAD) or 0


def acknowledged_progress(sock: socket.socket) -> int | None:
    """Return a number that grows as the peer takes what was written; differences mean nothing but that it does.

    For TCP: bytes its kernel acknowledged. For a unix socket: what it has read, by the memory that the rest takes,
    where a writer that does not write in between is asked for; a write lowers it.
    Returns: None where it is not known.
    """
    try:
        if sock.family == socket.AF_UNIX:
            held = _count(sock, _SIOCOUTQ)
            return None if held is None else -held
    except OSError:
        return None  # closed
    info = tcp_info(sock)
    return None if info is None else info.bytes_acked


def _count(sock: socket.socket, request: int) -> int | None:
    """Returns: how many bytes stand in a queue of a socket; None where there is no such count. Raises: OSError."""
    fd = sock.fileno()
    if fd < 0:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))  # for a closed socket ioctl raises ValueError
    try:
        octets = fcntl.ioctl(fd, request, bytes(_COUNT.size))
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTTY, errno.EOPNOTSUPP):
            return None  # a listener, a unix socket, or a system without it
        raise
    count: int = _COUNT.unpack(octets)[0]
    return count


def socket_evidence(sock: socket.socket, dead: bool = False, alive: bool = False) -> dict[str, object] | None:
    """Read one side of a record's ``socket`` field. Ask before closing.

    ``dead``: it is known already that the peer is, from longer watching than this one look; ``alive``: that it is not,
    as it has just ended the connection itself.
    Returns: None where there is nothing to read (unix sockets, closed ones).
    """
    info = tcp_info(sock)
    if info is None:
        return None
    return {
        "unacked_bytes": unacknowledged_bytes(sock),
        "notsent_bytes": info.notsent_bytes,
        "retransmits": info.total_retransmits,
        "rtt_s": info.rtt_s,
        "last_ack_s": info.last_ack_s,
        "last_data_recv_s": info.last_data_recv_s,
        "rwnd_limited_s": info.rwnd_limited_s,
        "busy_s": info.busy_s,
        "state": info.state,
        "verdict": "dead" if dead else info.verdict(alive),
    }


def heard_s(evidence: dict[str, object] | None) -> float | None:
    """Returns: the time since the last segment that was heard, by what ``socket_evidence`` read; None if unknown.

    Data that acknowledges nothing new is no ACK.
    """
    if evidence is None:
        return None
    times = [time for name in ("last_ack_s", "last_data_recv_s") if isinstance(time := evidence[name], float)]
    return min(times, default=None)


class PeerPulse:
    """Tells for one socket how long its peer's kernel has owed an answer. Asked at intervals, by one thread.

    Age alone condemns nobody: probes of a closed window back off to two minutes, and an idle peer is asked nothing. So
    time counts only from the first look that found a question open, and any segment that comes in starts it anew.
    """

    __slots__ = ("_no_way", "_retransmits", "_segments", "_silent_since", "_total_retransmits")

    def __init__(self) -> None:
        self._segments = -1
        self._retransmits = 0
        self._total_retransmits = -1
        self._no_way = False  # nothing that is to be sent again goes out
        self._silent_since: float | None = None

    def silent_s(self, sock: socket.socket, now: float) -> float:
        """Returns: seconds for which a question was open and nothing at all was heard; 0.0 if none is."""
        info = tcp_info(sock)
        # A closed one is no longer asked: the kernel has given its verdict, and poll tells it behind what came before.
        if info is None or info.state == "CLOSED":
            self._silent_since = None
            return 0.0
        heard = info.segments_received != self._segments
        if heard or not info.unacked:
            self._no_way = False
        elif info.retransmits > self._retransmits and info.total_retransmits == self._total_retransmits:
            # It was time to ask again, and nothing went out: this machine has lost its route or its address.
            self._no_way = True
        self._segments = info.segments_received
        self._retransmits = info.retransmits
        self._total_retransmits = info.total_retransmits
        if not info.questioned and not self._no_way:
            self._silent_since = None
            return 0.0
        if self._silent_since is None or heard:
            # Not the time of that last segment: the question may have come long after it.
            self._silent_since = now
        return now - self._silent_since


def prepare_listener(
    sock: socket.socket, peer_dead_s: float | None, user_timeout_s: float | None, *, defer: bool = False
) -> None:
    """Set on a listener what its accepted sockets shall have: Linux copies all of it (tests/test_kernel.py).

    ``defer``: a connection is accepted when its client has spoken, so that no thread is woken twice; one that says
    nothing for a second is accepted, too (docs/kernel.md).
    """
    prepare_socket(sock, peer_dead_s, user_timeout_s)
    if defer and hasattr(socket, "TCP_DEFER_ACCEPT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)


def prepare_socket(sock: socket.socket, peer_dead_s: float | None, user_timeout_s: float | None) -> None:
    """Set options of a TCP socket; a unix socket is left alone.

    Keepalive probes always, at the system's intervals if ``peer_dead_s`` is None, else so that the kernel gives an idle
    dead peer up after about that time. ``TCP_USER_TIMEOUT`` only if asked for, as it also ends a reader that merely
    pauses.
    """
    if sock.family == socket.AF_UNIX:
        return
    for level, name, value in _tcp_options(peer_dead_s, user_timeout_s):
        sock.setsockopt(level, name, value)
    if peer_dead_s is not None:
        try:
            # Otherwise a reader that pauses, and then dies, is asked again only after up to two minutes.
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_RTO_MAX_MS, min(max(1000, int(peer_dead_s * 1000 / 6)), 120_000))
        except OSError as error:
            if error.errno not in (errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINVAL):
                raise


@functools.cache
def _tcp_options(peer_dead_s: float | None, user_timeout_s: float | None) -> tuple[tuple[int, int, int], ...]:
    """Returns: level, name and value of each option, as far as the system has them."""
    tcp = socket.IPPROTO_TCP
    options = [(tcp, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    if peer_dead_s is not None:
        interval_s = min(max(1, round(peer_dead_s / 10)), 32767)
        # The kernel gives up a little later than PeerPulse, which counts from the first question that nobody answers;
        # by itself it counts for connections that nobody looks at, those kept for the next request.
        count = min(math.ceil(peer_dead_s * 1.25 / interval_s) + 1, 127)
        idle_s = min(max(1, round(peer_dead_s / 4)), 32767)
        for name, value in (("TCP_KEEPIDLE", idle_s), ("TCP_KEEPINTVL", interval_s), ("TCP_KEEPCNT", count)):
            if hasattr(socket, name):
                options.append((tcp, getattr(socket, name), value))
    if user_timeout_s is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
        options.append((tcp, socket.TCP_USER_TIMEOUT, min(max(1, int(user_timeout_s * 1000)), 2**31 - 1)))
    return tuple(options)


class SplicePipe:
    """A pipe through which octets pass from socket to socket inside the kernel. Used by one thread at a time.

    A pipe is full when its slots are, and a slot may hold as little as one small packet: no count of octets promises
    room, so drain before filling again, and take ``BlockingIOError`` of ``fill`` for an empty socket only while nothing
    is held.
    """

    __slots__ = ("_read_fd", "_write_fd", "held")

    def __init__(self) -> None:
        """Raises: OSError when no pipe can be had: no descriptors left, or no splice here."""
        if not HAVE_SPLICE:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self._read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.held = 0
        try:
            fcntl.fcntl(self._write_fd, _F_SETPIPE_SZ, _PIPE_SIZE)
        except OSError:
            # Past the user's share of pipe pages, or the system's largest pipe: it stays as small as it was made.
            pass

    def fill(self, source_fd: int, count: int) -> int:
        """Move up to ``count`` octets from a socket into the pipe, without waiting.

        Returns: how many; 0 at the end of the stream.
        Raises: BlockingIOError if the socket has none or the pipe has no slot; OSError.
        """
        moved = os.splice(source_fd, self._write_fd, count, flags=os.SPLICE_F_NONBLOCK)
        self.held += moved
        return moved

    def drain(self, sink_fd: int) -> int:
        """Move as much of what is held into a socket as it takes, without waiting.

        Returns: how many octets. Raises: BlockingIOError if it takes none; OSError.
        """
        # Without SPLICE_F_MORE: it would hold the last packet back for 0.2 s, TCP_NODELAY or not (docs/kernel.md).
        moved = os.splice(self._read_fd, sink_fd, self.held, flags=os.SPLICE_F_NONBLOCK)
        self.held -= moved
        return moved

    def close(self) -> None:
        """Close both ends; what is held is lost."""
        os.close(self._read_fd)
        os.close(self._write_fd)


def reset_on_close(sock: socket.socket) -> None:
    """Make ``close`` send a reset instead of a FIN. Not for unix sockets, where a peer sees an end in either case."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def fin_on_close(sock: socket.socket) -> None:
    """Take ``reset_on_close`` back."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))


def raise_file_limit() -> tuple[int, int]:
    """Raise the soft limit of open files to the hard one.

    Returns: the soft limit before and now.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        # Some systems call the hard limit infinite and do not grant that much: what we have has to do.
        return soft, soft
    return soft, hard


def most_open_files() -> int | None:
    """Returns: how many files a worker may open once it has raised its limit; None where there is no limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if hard == resource.RLIM_INFINITY else hard


def run_as_batch() -> None:
    """Ask the scheduler not to interrupt whoever runs each time a thread of this process wakes up.

    Where threads share one interpreter it is mostly one of theirs who runs: it holds the interpreter's lock, the
    thread that interrupts it wants that first of all, and each has been woken for nothing (docs/performance.md). A
    policy that somebody has chosen for us is left alone.
    """
    try:
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except (AttributeError, OSError):
        return  # not Linux, or forbidden in a sandbox


def pin_to_core(index: int) -> int | None:
    """Let this process run on one of its allowed cores alone, counted round from 0.

    Returns: the core, or None where that can't be chosen.
    """
    try:
        allowed = sorted(os.sched_getaffinity(0))
        core = allowed[index % len(allowed)]
        os.sched_setaffinity(0, (core,))
    except (AttributeError, OSError):
        return None  # not Linux, or forbidden in a sandbox
    return core
