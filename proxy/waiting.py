"""Where the thread of an exchange waits: ``poll`` on the client, on upstream and on the worker's own wish to end, under
all limits that run. (Besides, it waits for moments: for a last answer to go out, and, once all is said, for the client
to take it; ``exchange`` has bounds of its own for those.)

Decides nothing about what readiness means. Raises an ``Abort`` when a limit runs out, a peer's kernel has fallen
silent, or the worker ends; so no wait for a request or a response is without its limits.
"""

import collections.abc
import select
import time

from .aborts import Abort
from .endpoint import NO_WAIT, READABLE, WRITABLE, AnyEndpoint
from .inflight import Slot
from .kernel import POLLRDHUP, acknowledged_progress, unread_bytes
from .limits import Limit, Watch
from .vocabulary import Cause, Operation, Phase, Side

# POLLERR and POLLHUP come unasked.
FAILED = select.POLLERR | select.POLLHUP | select.POLLNVAL
HUNG_UP = POLLRDHUP | FAILED

# Client events of a wait that leaves the client out; 0 waits for its failure alone.
LEFT_OUT = -1

# The longest wait while a write makes no progress, as a part of its timeout: how soon acknowledged bytes are noticed.
_STALL_CHECKS = 4
# While the worker drains, how often a request in flight looks whether it has to end now.
_DRAIN_CHECK_S = 0.2


class Control:
    """What a worker tells all its threads: to drain, until when, and to end now. As it begins to drain, ``wake_fd``
    becomes readable, and stays so.
    """

    __slots__ = ("drain_until", "draining", "ending", "wake_fd")

    def __init__(self, wake_fd: int) -> None:
        self.wake_fd = wake_fd
        self.draining = False
        self.drain_until = 0.0
        self.ending = False


class TimedWatch:
    """A watch with what it says of an abort when it runs out."""

    __slots__ = ("acknowledged", "operation", "side", "watch")

    def __init__(self, watch: Watch, side: Side, operation: Operation) -> None:
        self.watch = watch
        self.side = side
        self.operation = operation
        # Of a write: what ``acknowledged_progress`` last said of its sockets; None: not asked yet.
        self.acknowledged: list[int | None] | None = None


class Waiter:
    """Waits for the sockets of one client connection. Used by the thread that holds the connection, alone."""

    __slots__ = (
        "_client_events",
        "_modify",
        "_poll",
        "_poller",
        "_upstream_events",
        "_upstream_fd",
        "_wake_registered",
        "client",
        "control",
        "dead_limit",
        "drain_seen",
        "next_pulse_at",
        "phase_of",
        "pulse_every_s",
        "slot",
        "upstream",
        "watches",
    )

    def __init__(
        self, client: AnyEndpoint, control: Control, dead_limit: Limit | None, pulse_every_s: float, slot: Slot
    ) -> None:
        """``pulse_every_s`` is what ``pulse_interval`` says of ``dead_limit``."""
        self.slot = slot  # where account is kept of what is waited for
        self.client = client
        self.upstream: AnyEndpoint | None = None
        self.control = control
        self.dead_limit = dead_limit
        self.drain_seen = False
        self.watches: list[TimedWatch] = []
        self.phase_of: collections.abc.Callable[[Side, Operation], Phase] = _between_relays
        self._poller: select.poll | None = None  # made when first wanted: many short connections never wait
        self._client_events = LEFT_OUT
        self._wake_registered = False
        self._upstream_fd = -1
        self._upstream_events = 0
        self.pulse_every_s = pulse_every_s
        self.next_pulse_at = time.monotonic() + pulse_every_s

    def _open_poller(self) -> select.poll:
        self._poller = poller = select.poll()
        self._poll = poller.poll
        self._modify = poller.register  # adds or changes
        self._modify(self.control.wake_fd, READABLE)
        self._wake_registered = True
        return poller

    def forget_upstream(self) -> None:
        """The upstream socket is gone, or goes back into its pool."""
        if self._upstream_fd >= 0:
            self._change_upstream(-1, 0)
        self.upstream = None

    def forget_phases(self) -> None:
        """Let go of whoever was asked for phases, and of the limits: what comes next is a request head."""
        self.phase_of = _between_relays
        self.watches.clear()

    def idle(self, until: float | None) -> bool:
        """Wait for the first byte of a request.

        Returns: True if the client's socket has something to read (its end included), False if ``until`` passed or
        the worker drains.
        """
        if self._poller is None:
            self._open_poller()
        if self._client_events != READABLE:
            self._modify(self.client.fd, READABLE)
            self._client_events = READABLE
        while True:
            if self.drain_seen:
                ready = self._poll(0)  # the worker drains, and its descriptor is no longer polled for
            elif until is None:
                ready = self._poll()
            else:
                ready = self._poll(max(0, int((until - time.monotonic()) * 1000) + 1))
            for fd, _ in ready:
                if fd == self.client.fd:
                    return True
            if not ready or self.control.draining:
                return False

    def read_soon(self, endpoint: AnyEndpoint, size: int) -> bytes:
        """Read from the one socket that is to say something next, and wait for it in the read itself for a moment.

        That takes one system call where waiting and reading take two, which is what a peer that answers at once is
        worth; meanwhile nothing else is watched, and no limit may run out.
        Raises: BlockingIOError if nothing came in the endpoint's ``patience_s``: wait, then; OSError; Abort.
        """
        if not endpoint.patience_s or self.drain_seen:
            return endpoint.read(size, NO_WAIT)
        if self.watches:
            now = time.monotonic()
            if self._check_watches(now) < now + endpoint.patience_s:
                return endpoint.read(size, NO_WAIT)
        return endpoint.read(size, 0)

    def peek_client(self) -> int:
        """Returns: poll's events of the client's end, 0 if it has not ended; without waiting."""
        poller = select.poll()
        poller.register(self.client.fd, POLLRDHUP)
        return sum(events for _, events in poller.poll(0))

    def wait(
        self, client_events: int, upstream_fd: int = -1, upstream_events: int = 0, due_at: float | None = None
    ) -> tuple[int, int, float]:
        """Wait until a socket is ready, or ``due_at``, whichever comes first.

        Upstream events of 0 leave that socket out altogether: its hang-up is not acted on while its octets wait for
        the client, and would end every wait at once. The client's failure ends the wait unless it is ``LEFT_OUT`` in
        the same way.
        Returns: the events of client and upstream (0 where not ready), and the time.
        Raises: Abort when a limit runs out, a peer is dead, or the worker ends.
        """
        poller = self._poller or self._open_poller()
        if client_events != self._client_events:
            if client_events != LEFT_OUT:
                self._modify(self.client.fd, client_events)
            else:
                poller.unregister(self.client.fd)
            self._client_events = client_events
        if upstream_fd != self._upstream_fd or upstream_events != self._upstream_events:
            self._change_upstream(upstream_fd, upstream_events)
        return self.wait_again(due_at)

    def wait_again(self, due_at: float | None = None) -> tuple[int, int, float]:
        """Wait for the same events as the last time. Otherwise as ``wait``."""
        now = time.monotonic()
        if now >= self.next_pulse_at:
            self._check_pulses(now)
        wake_at = self.next_pulse_at
        if due_at is not None and due_at < wake_at:
            wake_at = due_at
        if self.watches:
            wake_at = min(wake_at, self._check_watches(now))
        if self.drain_seen:
            self._check_shutdown(now)
            wake_at = min(wake_at, now + _DRAIN_CHECK_S, self.control.drain_until)
        # poll counts in whole milliseconds, rounded up: a limit must not be looked at before it has run out.
        ready = self._poll(int((wake_at - now) * 1000) + 1 if wake_at > now else 0)
        now = time.monotonic()
        client_ready = upstream_ready = 0
        for fd, events in ready:
            if fd == self._upstream_fd:
                upstream_ready = events
            elif fd == self.client.fd:
                client_ready = events
            else:
                self._see_control()
        if self.watches and not client_ready and not upstream_ready:
            self._check_watches(now)
        return client_ready, upstream_ready, now

    def _change_upstream(self, fd: int, events: int) -> None:
        assert self._poller is not None
        if self._upstream_fd >= 0 and (fd != self._upstream_fd or not events):
            self._poller.unregister(self._upstream_fd)
            self._upstream_fd = -1
            self._upstream_events = 0
        if fd >= 0 and events:
            self._modify(fd, events)
            self._upstream_fd = fd
            self._upstream_events = events

    def _check_watches(self, now: float) -> float:
        """Returns: when the next limit runs out. Raises: Abort if one has."""
        due = now + 3600.0
        ended_at = now
        ended: tuple[TimedWatch, Limit, float] | None = None
        for timed in self.watches:
            watch = timed.watch
            at = watch.due_at()
            if at is None:
                continue
            writes = timed.operation is Operation.WRITE or timed.side is Side.PROXY  # the latter: both ways of a tunnel
            if writes and watch.timeout is not None and watch.stalled_from is not None:
                at = min(at, self._acknowledged(timed, watch, watch.timeout, now))
            expired = watch.expired(now)
            if expired is not None:
                # Of several that a machine which stood still finds expired, the first to run out decides.
                ran_out_at = now - expired[1] + expired[0].seconds
                if ended is None or ran_out_at < ended_at:
                    ended_at = ran_out_at
                    ended = timed, *expired
            due = min(due, at)
        if ended is not None:
            timed, limit, elapsed_s = ended
            raise Abort(
                timed.side,
                self.phase_of(timed.side, timed.operation),
                timed.operation if timed.side is not Side.PROXY else None,  # both sockets, both ways
                Cause.TIMEOUT if limit is timed.watch.timeout else Cause.DEADLINE,
                limit=limit,
                elapsed_s=elapsed_s,
                # Without a body the phase alone does not tell that upstream has not taken the request.
                error_type="connection_write_timeout"
                if timed.side is Side.UPSTREAM and timed.operation is Operation.WRITE
                else None,
            )
        return due

    def _acknowledged(self, timed: TimedWatch, watch: Watch, timeout: Limit, now: float) -> float:
        """Let bytes that the peer acknowledged count as progress of a write that the socket does not take.

        Returns: when to look again.
        """
        endpoints = [each for each in (self.client, self.upstream) if each and timed.side in (each.side, Side.PROXY)]
        progress = [acknowledged_progress(each.sock) for each in endpoints]
        if progress != timed.acknowledged:
            if timed.acknowledged is not None:
                watch.progress(now)
            timed.acknowledged = progress
        return now + timeout.seconds / _STALL_CHECKS

    def _check_pulses(self, now: float) -> None:
        """Raises: Abort if the kernel of a peer has answered nothing for longer than ``--peer-dead-timeout``."""
        self.next_pulse_at = now + self.pulse_every_s
        if self.dead_limit is None:
            return
        for endpoint in (self.client, self.upstream):
            if endpoint is not None and endpoint.pulse is not None:
                silent_s = endpoint.pulse.silent_s(endpoint.sock, now)
                if silent_s >= self.dead_limit.seconds and not (endpoint is self.upstream and self._has_more_to_give()):
                    # What is in flight was written; an unanswered probe was the kernel's own question.
                    phase = self.phase_of(endpoint.side, Operation.WRITE)
                    if phase is Phase.RESPONSE_HEAD:
                        phase = self.phase_of(endpoint.side, Operation.READ)  # of a client that still sends its body
                    raise Abort(
                        endpoint.side,
                        phase,
                        Operation.WRITE,
                        Cause.DEAD_PEER,
                        limit=self.dead_limit,
                        elapsed_s=silent_s,
                    )

    def _has_more_to_give(self) -> bool:
        """Whether octets of upstream wait for the client to take what came before them: it gets to have them, whatever
        has become of upstream. The end that the kernel finds is told behind them.
        """
        assert self.upstream is not None
        waits_for_client = self._client_events != LEFT_OUT and self._client_events & WRITABLE
        return bool(waits_for_client) or unread_bytes(self.upstream.sock) > 0

    def _see_control(self) -> None:
        """The worker drains: look at its clock from now on, and no longer at the descriptor, which stays readable."""
        if self._wake_registered:
            assert self._poller is not None
            self._poller.unregister(self.control.wake_fd)
            self._wake_registered = False
        self.drain_seen = True

    def _check_shutdown(self, now: float) -> None:
        if self.control.ending or now >= self.control.drain_until:
            raise Abort(Side.PROXY, self.phase_of(Side.PROXY, Operation.READ), None, Cause.SHUTDOWN)


def pulse_interval(dead_limit: Limit | None) -> float:
    """Returns: seconds between two looks at the kernel's pulse of both peers."""
    return min(max(dead_limit.seconds / 8, 0.02), 10.0) if dead_limit is not None else 3600.0


def _between_relays(side: Side, operation: Operation) -> Phase:
    return Phase.REQUEST_HEAD
