"""One client connection, and on it one request after another: from the first byte to the record. Read this first.

    await the first byte -> read the head -> judge it -> lease an upstream connection
        -> exchange at once, or relay -> settle -> record -> next request, linger, or close

Whatever goes wrong with a request is an ``Abort`` and ends in ``Record.__exit__``, which calls ``_settle`` here: the
one place that asks the kernel for evidence, closes upstream, and answers the client or cuts its response.
"""

import contextlib
import itertools
import os
import select
import socket
import ssl
import time
import typing

from .aborts import Abort, classify, failed_socket, malformed_request, socket_abort
from .config import Settings, UnixAddress
from .docker import error_line
from .endpoint import (
    ANSWER_PATIENCE_S,
    IDLE_PATIENCE_S,
    NO_WAIT,
    READABLE,
    WRITABLE,
    AnyEndpoint,
    Endpoint,
    TlsEndpoint,
)
from .fields import (
    ForwardingContext,
    PreparedRequest,
    max_forwards,
    prepare_request,
    prepare_response,
    serialize_request,
    serialize_response,
)
from .framing import request_framing, response_framing
from .grammar import MAX_FIELDS, REQUEST_ID, REQUEST_ID_LINE, TOLD_LINE, TOLD_METHOD, MalformedMessage
from .head import (
    RequestHead,
    SectionMemory,
    check_partial_head,
    parse_request_head,
    parse_request_line,
    parse_response_head,
)
from .inflight import SlotStore
from .kernel import (
    POLLRDHUP,
    PeerPulse,
    acknowledged_progress,
    heard_s,
    reset_on_close,
    socket_evidence,
    tcp_info,
    unacknowledged_bytes,
    unread_bytes,
    unsent_bytes,
)
from .limits import Bound, Limit, Watch
from .log import LEVELS, EventLog
from .record import AboutConnection, Record, Tally, describe_abort, describe_exception
from .relay import FIRST_READ, AtOnce, Bustle, PipeStore, Relay, half_a_request
from .reply import error_response
from .upstream import AnyConnection, AnyPool, upstream_host
from .vocabulary import Cause, Operation, Phase, Side
from .waiting import FAILED, HUNG_UP, LEFT_OUT, Control, TimedWatch, Waiter, pulse_interval

# In one read of a head, or of what a client sends that nobody wants any more; and what is held of a body while upstream
# is being connected.
_HEAD_READ = 64 * 1024
# More than an exchange without a relay takes, which never waits but for an answer that comes soon.
_AT_ONCE_S = 5 * ANSWER_PATIENCE_S
# A kept connection that fails so soon may have been ended before the request came to it.
_STALE_S = 1.0
# RFC 9110 §9.2.2
_IDEMPOTENT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"))

# After the last byte of a response that the kernel could not deliver at once: how long its delivery is awaited before
# the record is written. A response of less than ``_SETTLE_MIN`` octets is not worth the system call that asks.
_SETTLE_S = 2.0
_SETTLE_MIN = 64 * 1024
# The kernel's probes take 1.5 to 1.8 times peer_dead_timeout, rounded up to seconds: a verdict of its own that comes
# much earlier or later has another reason.
_PROBES_TAKE_AT_LEAST, _PROBES_TAKE_AT_MOST, _PROBES_ROUNDING_S = 0.75, 2.0, 3.0
# Lingering: a client that still sends is read for so long, and so much, that it gets to see the answer (RFC 9112 §9.6).
_LINGER_S = 10.0
_LINGER_IDLE_S = 2.0
_LINGER_BYTES = 1024 * 1024 * 1024
# How long the proxy's own answer may wait for a client that does not take it.
_ANSWER_S = 1.0
# A connection beyond --max-connections is told so, if it asks within this time.
_OVERFLOW_HEAD_S = 2.0

# What becomes of the client's connection when an exchange, or the wait for the next one, is over.
Ending = typing.Literal[
    "keep",  # another request may follow
    "finish",  # all is said, on both sides: close
    "linger",  # all is said, and the client may send more that nobody wants: read on until it has seen the end
    "cut",  # as "linger", without close_notify, in the middle of a message: nobody is to take what it got for whole
    "reset",  # in the middle of a message that ends with its connection, which a FIN would make whole
    "idle",  # nothing was under way: close once the client has all of what was said before
    "close",  # at once: the client has left, or nothing was said
]
# Not the word itself where it is set: mypy would take it for still so when ``_settle`` has said otherwise.
_UNTIL_SETTLED: Ending = "close"


class Worker:
    """What the connections of one worker process share. Made in the process that serves them."""

    def __init__(
        self,
        settings: Settings,
        log: EventLog,
        tally: Tally,
        control: Control,
        pool: AnyPool,
        server_tls: ssl.SSLContext | None,
        slots: SlotStore,
        bustle: Bustle,
    ) -> None:
        self.settings = settings
        self.log = log
        self.tally = tally
        self.control = control
        self.pool = pool
        self.server_tls = server_tls
        self.slots = slots
        self.pipes = PipeStore()
        self.bustle = bustle
        # Bounds by the names that MalformedMessage uses.
        self.bounds = {
            "max_head_size": settings.max_head_size,
            "max_fields": Bound("max_fields", MAX_FIELDS, "default"),
        }
        self.pid = os.getpid()
        self._ids = itertools.count(1)
        self._id_prefix = os.urandom(6).hex()
        # From here on, what each connection would otherwise have to work out for itself.
        self.sections = SectionMemory()
        self._context: ForwardingContext | None = None
        self._proxy_name = settings.proxy_name.encode("ascii")
        self._upstream_host = upstream_host(settings.upstream).encode("ascii")
        # Whether any limit on the client's socket is set beyond those on the head.
        self.client_limits = any(
            limit is not None
            for limit in (
                settings.client_read_timeout,
                settings.client_read_deadline,
                settings.client_write_timeout,
                settings.client_write_deadline,
            )
        )
        # Before which request, counted from 0, a connection first makes its reads wait, which takes a system call: the
        # first one is there already where connections are accepted when their client has spoken.
        self.patient_from = 1 if settings.defers_accept else 0
        # Whether an exchange without a relay is over before any limit could run out.
        self.may_skip_relay = all(
            limit is None or limit.seconds >= _AT_ONCE_S
            for limit in (
                settings.client_write_timeout,
                settings.client_write_deadline,
                settings.upstream_write_timeout,
                settings.upstream_write_deadline,
                settings.upstream_head_timeout,
                settings.upstream_read_timeout,
                settings.upstream_read_deadline,
            )
        )
        # Whether clients can vanish, and are watched for it; how often both peers are looked at.
        self.watches_pulse = settings.peer_dead_timeout is not None and not isinstance(settings.listen, UnixAddress)
        self.pulse_every_s = pulse_interval(settings.peer_dead_timeout)

    def context_of(self, address: str) -> ForwardingContext:
        """Returns: what the proxy says of a client with that address to upstream, from memory for the last address."""
        client_address = address.encode("ascii")
        context = self._context
        if context is None or context.client_address != client_address:
            self._context = context = ForwardingContext(
                proxy_name=self._proxy_name,
                client_address=client_address,
                scheme=b"http" if self.server_tls is None else b"https",
                upstream_host=self._upstream_host,
            )
        return context

    def next_id(self) -> str:
        """Returns: an id no other connection or request has, in this worker or another."""
        return f"{self._id_prefix}{next(self._ids):08x}"


class ClientConnection:
    """Serves one client connection until it ends. Used by one thread; ``record`` may be read by others."""

    __slots__ = (
        "_about",
        "_context",
        "_ending",
        "_memory",
        "_overdue",
        "_residue",
        "began_at",
        "client",
        "connection_id",
        "lease",
        "name",
        "overflow",
        "record",
        "served",
        "settings",
        "waiter",
        "worker",
    )

    def __init__(self, worker: Worker, sock: socket.socket, name: str, address: str, *, overflow: bool) -> None:
        """``name`` is for the log, ``address`` for X-Forwarded-For; ``overflow`` marks a connection beyond
        --max-connections.
        """
        self.worker = worker
        self.settings = settings = worker.settings
        self.name = name
        self.overflow = overflow
        self.connection_id = worker.next_id()
        self.began_at = time.monotonic()
        slot = worker.slots.take(self.connection_id, name)  # given back at the end of ``serve``
        self._about = AboutConnection(self.connection_id, name, worker.pid, slot)
        dead = settings.peer_dead_timeout
        pulse = PeerPulse() if worker.watches_pulse else None
        self.client: AnyEndpoint
        if worker.server_tls is None:
            self.client = Endpoint(sock, Side.CLIENT, name, pulse)
        else:
            self.client = TlsEndpoint(sock, Side.CLIENT, name, pulse, worker.server_tls, None)
        self.waiter = Waiter(self.client, worker.control, dead, worker.pulse_every_s, slot)
        self._memory = SectionMemory(worker.sections)
        self._residue = b""  # read from the client and not yet parsed
        self._context = worker.context_of(address)
        self.record: Record | None = None
        self.lease: AnyConnection | None = None
        self.served = 0
        self._ending: Ending = "close"
        self._overdue = False  # a limit on what the client takes has run out

    # -- the connection ----------------------------------------------------------------------------

    def serve(self) -> None:
        """Serve requests until the connection ends, and close it. Raises nothing a peer could cause."""
        try:
            if self.worker.server_tls is None or self._shake_hands():
                while self._serve_request():
                    self.served += 1
            self._end()
        finally:
            self.client.close()
            self.worker.slots.give(self.waiter.slot)
            # Breaks the circle connection, waiter, relay: without it, buffers and TLS state wait for the collector,
            # which counts neither and comes late.
            self.waiter.forget_phases()

    def _shake_hands(self) -> bool:
        """TLS handshake under client_head_timeout, from its first byte.

        Returns: whether requests may follow. A failure is one ``connection.abort``, since no request had begun.
        """
        client = self.client
        assert isinstance(client, TlsEndpoint)
        first = self._await_handshake()
        if not first:
            return False
        began_at = time.monotonic()
        try:
            if first[0] != 0x16:
                plain = Abort(
                    Side.CLIENT,
                    Phase.TLS_HANDSHAKE,
                    Operation.HANDSHAKE,
                    Cause.PROTOCOL,
                    detail=f"plain text on a TLS port, beginning with {first!r}",
                )
                self._answer_plain_http(plain, head_only=first.startswith(b"HEAD "))
                raise plain
            self.waiter.phase_of = lambda side, operation: Phase.TLS_HANDSHAKE
            self._watch_head(began_at, Operation.HANDSHAKE)
            while not client.handshake():
                self.waiter.wait(client.read_event)
        except Abort as abort:
            self._log_handshake_abort(abort, began_at)
            return False
        except OSError as error:
            if isinstance(error, ssl.SSLEOFError):
                failure = Abort(Side.CLIENT, Phase.TLS_HANDSHAKE, Operation.HANDSHAKE, Cause.CLOSED, original=error)
            else:
                limit = self.settings.dead_peer_limit
                failure = socket_abort(Side.CLIENT, Phase.TLS_HANDSHAKE, Operation.HANDSHAKE, error, limit)
                if failure.cause is Cause.TLS:
                    self._ending = "linger"  # a client of TLS 1.3 may send its request by now, and is to see the alert
                    self._overdue = True  # but is not waited for: anybody may fail a handshake, and take nothing of it
            self._log_handshake_abort(failure, began_at)
            return False
        finally:
            self.waiter.forget_phases()
        return True

    def _await_handshake(self) -> bytes:
        """Wait until the client speaks. Returns: its first octets, left to be read again; b"" if there will be none."""
        at_most = self._idle_at_most()
        until = None if at_most is None else time.monotonic() + at_most
        while self.waiter.idle(until):
            try:
                first = self.client.sock.recv(8, socket.MSG_PEEK | NO_WAIT)
            except BlockingIOError:
                continue  # poll was wrong about readiness
            except OSError as error:
                # As a health check ends, or a client that vanished: nothing had begun.
                self._log_close(classify(error, Operation.READ))
                return b""
            if not first:
                self._log_close("no request")
            return first
        self._log_close("shutdown" if self.worker.control.draining else "idle")
        return b""

    def _answer_plain_http(self, abort: Abort, *, head_only: bool) -> None:
        """Say in plain HTTP that TLS is spoken here: the client would see no more than garbage otherwise."""
        message = "this port speaks TLS, and the request came in plain HTTP; use https:// (docker: --tlsverify)"
        octets = error_response(abort, 400, message, self.settings.proxy_name, None, head_only=head_only)
        self._ending = "linger"
        try:
            self.client.sock.send(octets)
        except OSError:
            return  # the client has left, and what it sent is on record all the same

    def _log_handshake_abort(self, abort: Abort, began_at: float) -> None:
        duration_s = time.monotonic() - began_at
        evidence = socket_evidence(self.client.sock, abort.cause is Cause.DEAD_PEER)
        if abort.cause is Cause.DEAD_PEER:
            _time_verdict(abort, evidence, 0.0)
        what = abort.detail or (str(abort.original) if abort.original is not None else str(abort.limit or abort.cause))
        message = f"TLS handshake with client {self.name} failed after {duration_s:.1f} s ({abort.cause}): {what}"
        log_connection_abort(self.worker, abort, message, self.connection_id, self.name, duration_s, evidence)
        abort.forget_frames()

    def _log_close(self, why: str) -> None:
        """Log, at debug, the end of a connection between two requests, or before the first."""
        if self.worker.log.threshold <= LEVELS["debug"]:
            self.worker.log.event(
                "debug",
                "connection.close",
                message=f"client {self.name}: {why} after {self.served} requests",
                connection_id=self.connection_id,
                pid=self.worker.pid,
                client=self.name,
                requests=self.served,
                why=why,
            )

    # -- one request -------------------------------------------------------------------------------

    def _serve_request(self) -> bool:
        """Relay one request and write its record. Returns: whether another may follow on this connection."""
        octets = self._await_first_byte()
        if not octets:
            return False
        worker = self.worker
        self.record = record = Record(
            worker.log, worker.tally, self._settle, worker.next_id(), self._about, time.monotonic()
        )
        self._ending = _UNTIL_SETTLED
        with record:
            head = self._read_head(octets, record)
            prepared = prepare_request(head, self._context)
            if prepared.request_id is not None:
                record.request_id = prepared.request_id.decode("ascii")
            self._judge(head, record)
            self._exchange(record, head, prepared)
        if self.lease is not None:
            # Whatever went wrong in ending it: an upstream connection that was not given back is closed.
            self._drop_lease()
        relay = record.relay
        if relay is not None:
            self._residue = relay.residue
            relay.release()
            self.waiter.forget_phases()
            self.client.end_splice()
        if relay is None or not relay.bulky:
            worker.bustle.own[0] = record.first_at
        if record.abort is not None:
            record.abort.forget_frames()
            self.waiter.watches.clear()
        self.record = None
        return self._ending == "keep"

    def _await_first_byte(self) -> bytes:
        """Wait for the next request. Returns: its first octets; b"" if there will be none."""
        octets, self._residue = self._residue, b""
        keepalive = self.settings.keepalive_timeout
        begun_at = time.monotonic()
        skipped = False
        client = self.client
        # The next request is about to come, or has come.
        soon = not client.has_unread and (keepalive is None or keepalive.seconds > IDLE_PATIENCE_S)
        if soon and self.served == self.worker.patient_from:
            client.become_patient(IDLE_PATIENCE_S)
        while True:
            # One empty line before a request begins nothing (RFC 9112 §2.2).
            if not skipped and octets[:2] == b"\r\n":
                octets = octets[2:]
                skipped = True
            if octets and (skipped or octets != b"\r"):
                return octets
            if not soon and not client.has_unread:
                at_most = self._idle_at_most()
                if not self.waiter.idle(None if at_most is None else begun_at + at_most):
                    self._log_close("shutdown" if self.worker.control.draining else "idle")
                    self._ending = "idle"
                    return b""
            try:
                more = self.waiter.read_soon(client, _HEAD_READ) if soon else client.read(_HEAD_READ, NO_WAIT)
            except BlockingIOError:
                soon = False
                continue
            except OSError as error:
                # Between two requests a reset is as good an end as any.
                self._log_close(classify(error, Operation.READ))
                self._ending = "close"
                return b""
            if not more:
                self._log_close("closed by the client")
                self._ending = "idle"
                return b""
            octets += more

    def _idle_at_most(self) -> float | None:
        """Returns: how long the connection may say nothing, in seconds; None is for ever."""
        if self.overflow:
            return _OVERFLOW_HEAD_S
        keepalive = self.settings.keepalive_timeout
        return None if keepalive is None else keepalive.seconds

    def _watch_head(self, first_at: float, operation: Operation) -> None:
        limit: Limit | None = self.settings.client_head_timeout
        deadline = self.settings.client_read_deadline if operation is Operation.READ else None
        if limit is not None or deadline is not None:
            watch = Watch(limit, deadline)
            watch.start(first_at)
            watch.wait(first_at)  # and no progress: it is a deadline in effect
            self.waiter.watches.append(TimedWatch(watch, Side.CLIENT, operation))

    def _read_head(self, octets: bytes, record: Record) -> RequestHead:
        """Read until the head is whole, and parse it. What follows it stays in ``_residue``. Raises: Abort."""
        max_size = self.settings.max_head_size
        waiter = self.waiter
        watching = False
        line_known = False
        scanned_from = 0
        while True:
            head_end = octets.find(b"\r\n\r\n", scanned_from)
            if 0 <= head_end <= max_size.value - 4:
                break
            record.head_read = len(octets) if head_end < 0 else head_end + 4
            try:
                check_partial_head(octets if head_end < 0 else octets[: head_end + 4], scanned_from)
                if not line_known and (line_end := octets.find(b"\r\n", 0, max_size.value)) >= 0:
                    # A line that is none has no head behind it that would ever end, as in HTTP/0.9.
                    record.request_line = parse_request_line(octets[:line_end])[:2]
                    line_known = True
            except MalformedMessage as error:
                self._learn_request(octets, record)
                raise malformed_request(error, Phase.REQUEST_HEAD, self.worker.bounds) from error
            if len(octets) >= max_size.value:
                self._learn_request(octets, record)
                too_long_line = octets.find(b"\r\n", 0, max_size.value) < 0
                what = "the request line" if too_long_line else "the request head"
                raise Abort(
                    Side.CLIENT,
                    Phase.REQUEST_HEAD,
                    Operation.READ,
                    Cause.LIMIT,
                    limit=max_size,
                    status=414 if too_long_line else 431,
                    detail=f"{what} is larger",
                    reject=True,
                )
            if not watching:
                watching = True
                self._watch_head(record.first_at, Operation.READ)
            waiter.slot.begin(record.first_at, len(octets))
            scanned_from = max(0, len(octets) - 3)
            try:
                octets += self._read_more()
            except Abort:
                self._learn_request(octets, record)
                raise
        head_octets = octets[: head_end + 4]
        self._residue = octets[head_end + 4 :]
        record.head_read = len(head_octets)
        if watching:
            waiter.watches.clear()
        try:
            head = parse_request_head(head_octets, self._memory)
        except MalformedMessage as error:
            self._learn_request(head_octets, record)
            raise malformed_request(error, Phase.REQUEST_HEAD, self.worker.bounds) from error
        record.head = head
        record.head_at = time.monotonic()
        return head

    def _read_more(self) -> bytes:
        """Read more of a request head. Raises: Abort if there is no more."""
        client = self.client
        while True:
            if not client.has_unread:
                self.waiter.wait(client.read_event)
            try:
                more = client.read(_HEAD_READ, NO_WAIT)
            except BlockingIOError:
                continue  # nothing to read after all: wait again, under the same limit
            except OSError as error:
                limit = self.settings.dead_peer_limit
                raise socket_abort(Side.CLIENT, Phase.REQUEST_HEAD, Operation.READ, error, limit) from error
            if not more:
                raise half_a_request(self.settings, Phase.REQUEST_HEAD)
            return more

    def _learn_request(self, octets: bytes, record: Record) -> None:
        """Keep what a head tells that is refused, or will never be whole: method, target, the client's request id."""
        line_end = octets.find(b"\r\n")
        method = TOLD_METHOD.match(octets)
        if method is not None:
            told = TOLD_LINE.fullmatch(octets, 0, line_end) if line_end > 0 else None
            record.request_line = method[1], told[1] if told is not None else None
        ids = REQUEST_ID_LINE.findall(octets, 0, max(0, octets.rfind(b"\r\n")))
        if len(ids) == 1 and REQUEST_ID.fullmatch(own := ids[0].strip(b" \t")):
            record.request_id = own.decode("ascii")

    def _judge(self, head: RequestHead, record: Record) -> None:
        """Refuse what may not pass, on the head alone. Raises: Abort with ``reject``."""
        if head.passed and not self.overflow:
            return
        refusal = self._find_refusal(head)
        head.passed = refusal is None
        if refusal is not None:
            if self._residue:
                # What has come of its body with the head is of this request, too.
                record.head_read += self._own_octets(head, self._residue)[0]
            raise refusal

    def _find_refusal(self, head: RequestHead) -> Abort | None:
        if self.overflow:
            return Abort(
                Side.PROXY,
                Phase.REQUEST_HEAD,
                None,
                Cause.LIMIT,
                limit=self.settings.max_connections,
                detail="all connections the proxy may hold are taken",
                reject=True,
            )
        if head.method == b"CONNECT":
            return Abort(
                Side.CLIENT,
                Phase.REQUEST_HEAD,
                Operation.READ,
                Cause.FORBIDDEN,
                status=405,
                detail="this is a reverse proxy and opens no tunnels",
                reject=True,
            )
        if max_forwards(head) == 0:
            return Abort(
                Side.CLIENT,
                Phase.REQUEST_HEAD,
                Operation.READ,
                Cause.FORBIDDEN,
                status=405,
                detail="Max-Forwards is 0, so it ends here, and the proxy has no resources of its own",
                reject=True,
            )
        bound = self.settings.max_body_size
        length = head.section.content_length
        if bound is not None and length is not None and length > bound.value:
            return Abort(
                Side.CLIENT,
                Phase.REQUEST_HEAD,
                Operation.READ,
                Cause.LIMIT,
                limit=bound,
                status=413,
                detail=f"the announced body has {length:,} bytes",
                reject=True,
            )
        return None

    def _exchange(self, record: Record, head: RequestHead, prepared: PreparedRequest) -> None:
        """Lease an upstream connection and pass the request on. Raises: Abort."""
        worker = self.worker
        # Nobody has looked at the peers' pulses since the last request. A look now would take system calls, and only
        # begin to count (PeerPulse); most requests are over before the one that is due an interval from now.
        self.waiter.next_pulse_at = record.first_at + self.waiter.pulse_every_s
        body, self._residue = self._residue, b""
        request_id = record.request_id.encode("ascii")
        head_octets = serialize_request(head, prepared, request_id)
        record.phase = Phase.CONNECT
        pool = worker.pool  # a reload may put another in its place meanwhile
        self.lease = connection = pool.lease()
        upstream = connection.endpoint
        if (
            upstream is not None  # kept from an earlier request
            and upstream.patience_s
            and worker.may_skip_relay
            and len(body) == prepared.whole_with
        ):
            record.upstream = upstream.name
            record.connected_at = time.monotonic()
            if self._exchange_at_once(record, head, prepared, request_id, head_octets, body, connection):
                pool.release(connection)
                self.lease = None
                return
            record.phase = Phase.RESPONSE_HEAD
        self._relay(record, head, prepared, request_id, head_octets, body, connection, pool)

    def _exchange_at_once(
        self,
        record: Record,
        head: RequestHead,
        prepared: PreparedRequest,
        request_id: bytes,
        head_octets: bytes,
        body: bytes,
        connection: AnyConnection,
    ) -> bool:
        """Relay without a ``Relay``: send a request that is whole, and pass on an answer that comes at once, is whole
        in one read, and does not end with its connection. Most are like that, and it takes half of the instructions
        (docs/performance.md).

        Returns: whether it was so; else a relay has to go on from ``record.at_once``. Raises nothing.
        """
        client, upstream = self.client, connection.endpoint
        assert upstream is not None
        request = head_octets + body
        size = len(request)
        content = len(body)
        self.waiter.slot.describe(record.first_at, head, request_id, upstream.name, content, size, content)
        record.at_once = exchange = AtOnce(content, prepared.keep_alive)
        try:
            exchange.upstream_written = written = upstream.write(request, NO_WAIT)
            if written == size:
                exchange.sent_at = time.monotonic()
                exchange.answer = answer = self.waiter.read_soon(upstream, FIRST_READ)
                exchange.first_byte_at = time.monotonic()
                head_size = answer.find(b"\r\n\r\n") + 4
                max_size = self.settings.max_head_size.value
                if 4 <= head_size <= max_size:
                    parsed = parse_response_head(answer[:head_size], connection.memory)
                    response = prepare_response(parsed, self._context.proxy_name, dechunk=False)
                    status = parsed.status
                    framing = response_framing(status, parsed.section, head.method, max_size)
                    if (
                        framing.feed(answer, head_size, len(answer)) == len(answer) < FIRST_READ
                        and framing.complete
                        and status >= 200
                        and status != 426  # its Upgrade field is put together by the relay
                        and response.keep_alive
                        and not self.worker.control.draining
                    ):
                        close = b"" if prepared.keep_alive else b"Connection: close\r\n"
                        told = serialize_response(parsed, response, close, request_id) + answer[head_size:]
                        exchange.octets = told
                        exchange.framing = framing
                        exchange.response_head = parsed
                        exchange.client_written = taken = client.write(told, NO_WAIT)
                        if taken == len(told):
                            exchange.last_byte_at = time.monotonic()
                            return True
        except (BlockingIOError, MalformedMessage):
            pass  # the relay waits for it, or finds the same
        except OSError as failure:
            exchange.error = failure.with_traceback(None)  # which would hold on to this frame, and the frame to it
        except Exception as other:  # noqa: BLE001  # an Abort or a bug: raised by the relay, which can say how far it had come
            exchange.error = other
        return False

    def _relay(
        self,
        record: Record,
        head: RequestHead,
        prepared: PreparedRequest,
        request_id: bytes,
        head_octets: bytes,
        body: bytes,
        connection: AnyConnection,
        pool: AnyPool,
    ) -> None:
        """Relay over a leased connection; once more over a fresh one where the first had gone stale.

        ``head_octets`` are for upstream, ``body`` is what has come behind the client's; ``record.at_once`` says
        what was done with both over this connection. Raises: Abort.
        """
        waiter = self.waiter
        slot = waiter.slot
        client_read = client_write = None
        if self.worker.client_limits:
            client_read, client_write = self._client_watches(record, head, body)
        while True:
            relay = Relay(
                self.settings,
                self.worker.bounds,
                waiter,
                self.worker.pipes,
                self.worker.bustle,
                head,
                prepared,
                request_framing(head.section, self.settings.max_head_size.value),
                request_id,
                self._context.proxy_name,
            )
            relay.client_read_watch = client_read
            relay.client_write_watch = client_write
            record.relay = relay
            reused = connection.is_open
            if not reused:
                base_watches = list(waiter.watches)
                slot.describe(record.first_at, head, request_id, "", self._own_octets(head, body)[0], 0, 0)
                try:
                    self._connect(connection, head, body)
                except Abort:
                    relay.count_unsent(body + self._residue)
                    raise
                body, self._residue = body + self._residue, b""
                waiter.watches[:] = base_watches
            upstream = connection.endpoint
            assert upstream is not None
            record.upstream = connection.name
            now = record.connected_at  # known where something was begun
            if now is None:
                record.connected_at = now = time.monotonic()
            try:
                relay.attach(upstream, connection.memory, head_octets, body, now)
                behind = len(relay.residue)
                request = relay.request
                content = request.framing.content
                slot.describe(record.first_at, head, request_id, upstream.name, request.read, request.end, content)
                relay.run(record.at_once)
            except Abort as last:
                # Which event came first is decided here and, where both sides spoke at once, in Relay.run.
                abort = relay.first_of(last)
                if abort is not last:
                    raise abort from abort.original
                # A kept connection that had gone stale proves nothing about upstream. The next one is no kept one, so
                # there is one more attempt at most.
                is_stale = reused and _went_stale(abort, relay)
                if not is_stale or not _may_retry(relay, head):
                    if is_stale and time.monotonic() - now < _STALE_S:
                        abort.detail = (
                            "on a connection kept from an earlier request, which upstream may just have ended as idle;"
                            f" not sent again, as {_why_not_again(relay)}"
                        )
                    raise
                body += relay.residue[behind:]  # what came meanwhile waits for its turn
                record.attempts.append(_attempt(abort, connection.name))
                abort.forget_frames()
                record.upstream = record.connected_at = record.at_once = None
                self._drop_lease()
                relay.release()
                if client_read is not None:
                    client_read.rest()  # while the next connection is made nobody asks the client for octets
                waiter.watches[:] = [w for w in waiter.watches if w.side is Side.CLIENT]
                pool = self.worker.pool
                self.lease = connection = pool.lease(fresh=True)
                continue
            if relay.guarded:
                relay.unguard()
            self._return_lease(relay, connection, pool)
            return

    def _client_watches(self, record: Record, head: RequestHead, body: bytes) -> tuple[Watch | None, Watch | None]:
        """The limits on the client's socket that run for the whole exchange. ``body`` is what has come behind the
        head.
        """
        settings = self.settings
        assert record.head_at is not None
        read = write = None
        if settings.client_read_timeout is not None or settings.client_read_deadline is not None:
            if not self._own_octets(head, body)[1]:
                read = Watch(settings.client_read_timeout, settings.client_read_deadline)
                read.start(record.first_at)
                self.waiter.watches.append(TimedWatch(read, Side.CLIENT, Operation.READ))
        if settings.client_write_timeout is not None or settings.client_write_deadline is not None:
            write = Watch(settings.client_write_timeout, settings.client_write_deadline)
            write.start(record.head_at)
            self.waiter.watches.append(TimedWatch(write, Side.CLIENT, Operation.WRITE))
        return read, write

    def _own_octets(self, head: RequestHead, body: bytes) -> tuple[int, bool]:
        """Returns: how many of the octets that came behind a head belong to its request, and whether it is whole."""
        framing = request_framing(head.section, self.settings.max_head_size.value)
        try:
            return framing.feed(body, 0, len(body)), framing.complete
        except MalformedMessage:
            return len(body), False  # which is said when it is to be relayed

    def _connect(self, connection: AnyConnection, head: RequestHead, body: bytes) -> None:
        """Connect to upstream under its limit, with an eye on the client, of whose ``body`` so much has come. Raises:
        Abort.
        """
        waiter = self.waiter
        limit = self.settings.upstream_connect_timeout
        began_at = time.monotonic()
        if limit is not None:
            watch = Watch(limit, None)
            watch.wait(began_at)
            waiter.watches.append(TimedWatch(watch, Side.UPSTREAM, Operation.CONNECT))

        def phase_of(side: Side, operation: Operation) -> Phase:
            if side is Side.CLIENT:
                return Phase.REQUEST_BODY if operation is Operation.READ else Phase.CONNECT
            return Phase.TLS_HANDSHAKE if isinstance(connection.sock, TlsEndpoint) else Phase.CONNECT

        def wait(fd: int, events: int, at_most_s: float | None) -> bool:
            due_at = None if at_most_s is None else time.monotonic() + at_most_s
            mask = 0 if self.settings.allows_half_close else POLLRDHUP
            reads_ahead = mask != 0 and self.client.is_tls
            if isinstance(connection.sock, TlsEndpoint):
                waiter.upstream = connection.sock  # its kernel owes answers from now on
            while True:
                if reads_ahead:
                    # Under TLS only a read tells the end of the client's side, and whether it is an orderly one.
                    if self.client.has_unread:
                        self._read_ahead(head, body)
                    room = len(self._residue) < _HEAD_READ
                    mask = POLLRDHUP | (self.client.read_event if room else 0)
                client_ready, upstream_ready, now = waiter.wait(mask, fd, events, due_at)
                if reads_ahead and client_ready:
                    self._read_ahead(head, body)
                if client_ready & HUNG_UP:
                    if reads_ahead:
                        self._read_ahead(head, body, to_its_end=True)
                    number = self.client.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if number or client_ready & select.POLLERR:
                        # A reset, or the kernel's verdict that nobody is there any more.
                        dead_limit = self.settings.dead_peer_limit
                        raise failed_socket(Side.CLIENT, Phase.CONNECT, Operation.READ, number, dead_limit)
                    raise Abort(Side.CLIENT, Phase.CONNECT, Operation.READ, Cause.CLOSED)
                if upstream_ready or (due_at is not None and now >= due_at):
                    return bool(upstream_ready)

        waiter.phase_of = phase_of
        try:
            connection.open(wait)
        except Abort as abort:
            if abort.side is Side.UPSTREAM and abort.phase is Phase.TLS_HANDSHAKE:
                abort.operation = Operation.HANDSHAKE  # its limit's watch began when it was still to connect
            raise
        finally:
            waiter.forget_upstream()

    def _read_ahead(self, head: RequestHead, body: bytes, *, to_its_end: bool = False) -> None:
        """Read what the client sends under TLS while upstream is being connected: a portion, or all that has come, as
        only what is behind it tells how the client has ended. Raises: Abort at its end.
        """
        parts = [self._residue]
        try:
            while to_its_end or (len(parts) == 1 and len(self._residue) < _HEAD_READ):
                octets = self.client.read(_HEAD_READ, NO_WAIT)
                if not octets:
                    raise Abort(Side.CLIENT, Phase.CONNECT, Operation.READ, Cause.CLOSED)
                parts.append(octets)
        except BlockingIOError:
            pass  # what came was TLS's own, or a part of a record
        except OSError as error:
            limit = self.settings.dead_peer_limit
            raise socket_abort(Side.CLIENT, Phase.CONNECT, Operation.READ, error, limit) from error
        finally:
            if len(parts) > 1:
                self._residue = b"".join(parts)
                self.waiter.slot.count(self._own_octets(head, body + self._residue)[0], 0, 0, 0, 0, 0)

    def _return_lease(self, relay: Relay, connection: AnyConnection, pool: AnyPool) -> None:
        """The response is whole: keep the upstream connection if it stands between two messages, else close it."""
        upstream = connection.endpoint
        assert upstream is not None
        self.waiter.forget_upstream()
        if relay.upstream_usable and relay.request.finished and not upstream.has_unread and not upstream.mid_record:
            upstream.end_splice()
            pool.release(connection)
            self.lease = None
            return
        self._say_goodbye(upstream)
        self.lease = None
        connection.close()

    def _say_goodbye(self, endpoint: AnyEndpoint) -> None:
        """close_notify at an orderly end under TLS; best effort, as the connection is done with."""
        if isinstance(endpoint, TlsEndpoint):
            try:
                endpoint.end_write()
            except OSError:
                return  # the peer has gone first: nothing is owed to it

    def _drop_lease(self) -> None:
        """Close the upstream connection in the middle of an exchange: that is how upstream is told that nobody waits
        any more.
        """
        connection, self.lease = self.lease, None
        if connection is None:
            return
        self.waiter.forget_upstream()
        endpoint = connection.endpoint
        try:
            if endpoint is not None and self.settings.upstream.scheme != "unix" and unacknowledged_bytes(endpoint.sock):
                # Behind octets that upstream does not read a FIN would wait as long as they do; a reset does not.
                reset_on_close(endpoint.sock)
        finally:
            connection.close()

    # -- the end of one request --------------------------------------------------------------------

    def _settle(self, record: Record, abort: Abort | None) -> Abort | None:
        """End an exchange: await delivery, or read the evidence, tell upstream, and tell the client.

        Returns: the abort, if there is one by now. Sets ``_ending``.
        """
        relay = record.relay
        if abort is None:
            if relay is None:
                assert record.at_once is not None
                self._ending = "keep" if record.at_once.keep_alive else "finish"
                return None
            try:
                if relay.response.written >= _SETTLE_MIN:
                    relay.note_progress()
                    self._await_delivery(relay)
            except Abort as late:
                abort = late
            else:
                self._ending = self._ending_after(relay)
                return None
        self._overdue = (
            abort.side is Side.CLIENT
            and abort.operation is Operation.WRITE
            and abort.cause in (Cause.TIMEOUT, Cause.DEADLINE)
        )
        if relay is None:
            self.waiter.slot.begin(record.first_at, record.head_read)  # the answer may have to wait for the client
        is_dead = abort.cause is Cause.DEAD_PEER
        spoke = abort.cause in (Cause.CLOSED, Cause.RESET)
        by_client, by_upstream = abort.side is Side.CLIENT, abort.side is Side.UPSTREAM
        record.client_evidence = socket_evidence(self.client.sock, is_dead and by_client, spoke and by_client)
        connection = self.lease
        if connection is not None and connection.sock is not None:
            upstream_sock = connection.sock.sock if isinstance(connection.sock, TlsEndpoint) else connection.sock
            record.upstream_evidence = socket_evidence(upstream_sock, is_dead and by_upstream, spoke and by_upstream)
        if is_dead:
            told_at = relay.hung_up_at if relay is not None and by_upstream else None
            evidence = record.client_evidence if by_client else record.upstream_evidence
            _time_verdict(abort, evidence, 0.0 if told_at is None else time.monotonic() - told_at)
        if connection is not None and connection.endpoint is None and connection.sock is not None:
            record.upstream = connection.name or None  # in the middle of the handshake
        self._drop_lease()
        self._tell_client(record, abort)
        return abort

    def _ending_after(self, relay: Relay) -> Ending:
        if relay.tunnel or not relay.request.framing.complete:
            return "linger"
        return "finish" if relay.close_client else "keep"

    def _await_delivery(self, relay: Relay) -> None:
        """Wait until the client's kernel has acknowledged the whole response, or for a while.

        Raises: Abort if the client is lost meanwhile.
        """
        sock = self.client.sock
        waiter = self.waiter
        until = time.monotonic() + _SETTLE_S
        pause_s = 0.0005
        waiter.watches.clear()
        phase = Phase.TUNNEL if relay.tunnel else Phase.RESPONSE_BODY
        waiter.phase_of = lambda side, operation: phase
        hung_up = False
        while unacknowledged_bytes(sock):
            now = time.monotonic()
            control = self.worker.control
            if now >= until or control.ending or (control.draining and now >= control.drain_until):
                return
            # A hang-up is no failure: both sides have ended what they write, and the queue still drains. It would end
            # each wait at once, so the client is not polled for after it.
            try:
                ready, _, _ = waiter.wait(LEFT_OUT if hung_up else 0, due_at=min(until, now + pause_s))
            except Abort as abort:
                if abort.cause is Cause.SHUTDOWN:
                    return  # all was written; that its delivery is no longer awaited makes no abort of it
                raise
            hung_up = hung_up or bool(ready & FAILED)
            if hung_up:
                if not unacknowledged_bytes(sock):
                    return  # it has taken all, and was reset only then, which the wait for the next request finds
                info = tcp_info(sock)
                number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if number or (info is not None and info.state == "CLOSED"):
                    raise failed_socket(Side.CLIENT, phase, Operation.WRITE, number, self.settings.dead_peer_limit)
            pause_s = min(pause_s * 2, 0.05)

    def _tell_client(self, record: Record, abort: Abort) -> None:
        """Answer the client if nothing of a response has gone out, else cut the response: it can't look whole then."""
        relay = record.relay
        gone = (
            abort.side is Side.CLIENT
            and abort.cause in (Cause.CLOSED, Cause.RESET, Cause.DEAD_PEER, Cause.TLS)
            and abort.status is None
        )
        self._ending = "close"
        if gone:
            return
        if relay is None and record.at_once is not None and record.at_once.client_written:
            # What failed is behind a response that is whole, or kept a relay from going on with it.
            if record.at_once.last_byte_at is None:
                self._ending = "cut"
            return
        if relay is None or not (relay.head_out or relay.mid_head):
            if self.client.mid_write:
                # A part of the response is out, though no octet of it counts as written: only an end can follow.
                self._ending = "cut"
            elif abort.status is not None:
                if relay is not None:
                    relay.unguard()
                self._answer(record, abort, abort.status)
                self._ending = "linger"
            return
        if relay.tunnel:
            self._ending = "reset"
            return
        response = relay.response
        framed_by_end = (response.framing.ends_with_connection and not response.enchunk) or response.dechunk
        if relay.between_lines():
            message = record.sentence(abort) + f" (request id {record.request_id})"
            line = error_line(message)
            if framed_by_end:
                record.answered_bytes += self._write_out(line)
            else:
                record.answered_bytes += self._write_out(b"%x\r\n%b\r\n" % (len(line), line))
        self._ending = "reset" if framed_by_end else "cut"

    def _answer(self, record: Record, abort: Abort, status: int) -> None:
        message = record.sentence(abort) + f" (request id {record.request_id})"
        method = record.head.method if record.head is not None else (record.request_line or (b"",))[0]
        head_only = method == b"HEAD"
        octets = error_response(
            abort, status, message, self.settings.proxy_name, record.request_id, head_only=head_only
        )
        written = self._write_out(octets)
        record.answered_bytes += written
        if written:
            record.answered = status

    def _write_out(self, octets: bytes) -> int:
        """Write the proxy's own octets to the client, within a moment. Returns: how many went out."""
        client = self.client
        poller = select.poll()
        poller.register(client.fd, WRITABLE)
        until = time.monotonic() + _ANSWER_S
        done = 0
        while done < len(octets):
            try:
                done += client.write(memoryview(octets)[done:], NO_WAIT)
            except BlockingIOError:
                left_s = until - time.monotonic()
                poller.modify(client.fd, client.write_event)
                if left_s <= 0 or not poller.poll(int(left_s * 1000) + 1):
                    break
            except OSError:
                break  # the abort that is being answered is the first error, and the one that is logged
        return done

    # -- the end of the connection -----------------------------------------------------------------

    def _end(self) -> None:
        """End the connection as the last exchange left it."""
        ending = self._ending
        if ending == "reset":
            self._await_empty(time.monotonic() + _ANSWER_S)
            if self.client.sock.family != socket.AF_UNIX:
                reset_on_close(self.client.sock)
            return
        if ending == "close":
            return
        client = self.client
        try:
            if ending != "cut" and client.is_tls and not client.mid_write:
                client.end_write()  # close_notify, which a cut response must not have, and half a record can't
                self._await_flushed(self._given_up_at())
            may_send_more = ending in ("linger", "cut") or bool(self._residue)
            if not may_send_more and not unread_bytes(client.sock) and not unsent_bytes(client.sock):
                return  # the usual end: nothing is left to read or to send, and closing says so
            client.sock.shutdown(socket.SHUT_WR)
        except OSError:
            return  # the client has closed already
        if ending != "idle":
            self._linger()
        self._await_empty(self._given_up_at())

    def _given_up_at(self) -> float | None:
        """Returns: when, on the monotonic clock, a wait that begins now gives up the last octets for the client; None:
        not while it lives.
        """
        if self._overdue:
            return time.monotonic() + _ANSWER_S
        deadline = self.settings.client_write_deadline
        return None if deadline is None else time.monotonic() + deadline.seconds

    def _await_flushed(self, until: float | None) -> None:
        """Wait until the socket has taken what TLS has to say last, on the terms of ``_await_empty``. What the client
        sends meanwhile is dropped: it may take nothing before it has sent all it wants to. Raises: OSError.
        """
        client = self.client
        events = WRITABLE | READABLE
        dropped = 0
        poller = select.poll()
        patience = self.settings.client_write_timeout
        before, moved_at = acknowledged_progress(client.sock), time.monotonic()
        while not client.flush():
            now = time.monotonic()
            progress = acknowledged_progress(client.sock)
            if progress != before:
                before, moved_at = progress, now
            if self._waits_in_vain(until, now) or (patience is not None and now - moved_at >= patience.seconds):
                return
            poller.register(client.fd, events)
            if any(ready & READABLE for _, ready in poller.poll(100)):
                with contextlib.suppress(BlockingIOError):  # nothing to read after all
                    octets = client.sock.recv(_HEAD_READ, NO_WAIT)
                    dropped += len(octets)
                    if not octets or dropped >= _LINGER_BYTES:
                        events = WRITABLE  # its end would end each wait at once

    def _waits_in_vain(self, until: float | None, now: float) -> bool:
        """Whether the last octets for the client are given up: a limit has run out, the worker ends, or it is dead."""
        if until is not None and now >= until:
            return True
        control = self.worker.control
        if control.ending or (control.draining and now >= control.drain_until):
            return True
        dead, pulse = self.settings.peer_dead_timeout, self.client.pulse
        return dead is not None and pulse is not None and pulse.silent_s(self.client.sock, now) >= dead.seconds

    def _linger(self) -> None:
        """Read and drop what the client still sends until it has seen our end, since closing with unread data would
        reset the connection and destroy the answer on its way (RFC 9112 §9.6).
        """
        sock = self.client.sock
        poller = select.poll()
        poller.register(self.client.fd, READABLE)
        until = time.monotonic() + _LINGER_S
        drained = 0
        while drained < _LINGER_BYTES and not self.worker.control.ending:
            left_s = min(until - time.monotonic(), _LINGER_IDLE_S)
            if left_s <= 0 or not poller.poll(int(left_s * 1000) + 1):
                return
            try:
                octets = sock.recv(_HEAD_READ, NO_WAIT)
            except BlockingIOError:
                continue  # nothing to read after all: wait again, as long as lingering goes on
            except OSError:
                return  # a reset ends the lingering as well as anything
            if not octets:
                return
            drained += len(octets)

    def _await_empty(self, until: float | None) -> None:
        """Hold the socket until the client's kernel has taken everything.

        A closed socket with unsent data is an orphan, and the kernel gives up on orphans whose reader pauses for some
        minutes; a socket that is held it never gives up on while the reader lives.
        """
        client = self.client
        pause_s = 0.001
        poller = select.poll()
        poller.register(client.fd, 0)
        patience = self.settings.client_write_timeout
        before = 0
        hung_up = False
        moved_at = time.monotonic()
        while waiting := unacknowledged_bytes(client.sock):
            now = time.monotonic()
            if waiting != before:
                before, moved_at = waiting, now
            elif patience is not None and now - moved_at >= patience.seconds:
                return  # the response is on record; its last octets are given up
            if self._waits_in_vain(until, now):
                return
            ready = poller.poll(int(pause_s * 1000) + 1)
            if ready and ready[0][1] & ~select.POLLHUP:
                return  # failed: nothing will be taken any more
            if ready:
                # Both sides have ended what they write, and the queue still drains. It would end each wait at once.
                hung_up = True
                poller.unregister(client.fd)
            if hung_up:
                info = tcp_info(client.sock)
                if info is None or info.state == "CLOSED":
                    return
            pause_s = min(pause_s * 2, 1.0)


def log_connection_abort(
    worker: Worker,
    abort: Abort,
    message: str,
    connection_id: str,
    client: str,
    duration_s: float,
    evidence: dict[str, object] | None,
) -> None:
    """Log the end of a connection on which no request had begun: the fields of a request's record that do not speak of
    a request.
    """
    worker.log.event(
        "error" if abort.cause is Cause.INTERNAL else "warning",
        "connection.abort",
        message=message,
        connection_id=connection_id,
        pid=worker.pid,
        client=client,
        duration_s=round(duration_s, 6),
        **describe_abort(abort),
        socket={"client": evidence, "upstream": None},
    )


def _time_verdict(abort: Abort, evidence: dict[str, object] | None, age_s: float) -> None:
    """Say of a peer that the kernel itself has given up, ``age_s`` ago, how long it took: it counts from the last
    segment it heard.
    """
    heard = heard_s(evidence)
    if abort.elapsed_s is not None or heard is None:
        return
    abort.elapsed_s = elapsed_s = max(0.0, heard - age_s)
    limit = abort.limit
    if isinstance(limit, Limit) and limit.name == "peer_dead_timeout":
        at_least = limit.seconds * _PROBES_TAKE_AT_LEAST
        at_most = limit.seconds * _PROBES_TAKE_AT_MOST + _PROBES_ROUNDING_S
        if not at_least <= elapsed_s <= at_most:
            abort.limit = None  # the kernel's own count of retransmissions (tcp_retries2), and no option


def _may_retry(relay: Relay, head: RequestHead) -> bool:
    """Whether a request may be sent again: all of it is still at hand, and sending it twice does no harm (RFC 9110
    §9.2.2).
    """
    return relay.body_reads == 0 and (head.method in _IDEMPOTENT or relay.request.written == 0)


def _why_not_again(relay: Relay) -> str:
    """Returns: for a request that may not be sent again, which of the two keeps it from that."""
    return "its body can't be read again" if relay.body_reads else "it might be done twice"


def _went_stale(abort: Abort, relay: Relay) -> bool:
    """Whether a kept connection failed as one does that upstream had ended, or was about to: nothing came back."""
    return (
        abort.side is Side.UPSTREAM
        # Many servers that end an idle connection leave close_notify out.
        and (abort.cause in (Cause.CLOSED, Cause.RESET, Cause.DEAD_PEER) or isinstance(abort.original, ssl.SSLEOFError))
        and relay.response.read == 0
        and not relay.partial_head
    )


def _attempt(abort: Abort, upstream: str) -> dict[str, object]:
    return {
        "upstream": upstream,
        "phase": abort.phase,
        "operation": abort.operation,
        "cause": abort.cause,
        "exception": describe_exception(abort.original),
    }
