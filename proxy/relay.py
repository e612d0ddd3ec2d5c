"""One loop for everything between the request head and the end of the response: upload, early answer, download,
tunnel.

Two flows, client to upstream and back, each with its framing, its counters and at most one buffer of octets on the
way. The loop polls a source only while its flow holds nothing, and a sink only while it does: that is the
back-pressure, and what the limits go by. Raises an ``Abort`` where it sees the fact; answers, logs and closes
nothing.

Invariant: octets are read from a source only when all read before have been written.
"""

import copy
import select
import socket
import ssl
import time

from .aborts import Abort, failed_socket, malformed_request, malformed_response, refuses_certificate, socket_abort
from .config import Settings
from .docker import hijacks, is_message_stream
from .endpoint import NO_WAIT, READABLE, WRITABLE, AnyEndpoint, TlsEndpoint
from .fields import PreparedRequest, prepare_response, serialize_response, upgrade_lines, upgrade_protocols
from .framing import (
    CRLF,
    ENDLESS,
    FRESH,
    NO_BODY,
    ChunkedFraming,
    ConnectionFraming,
    Framing,
    Mark,
    Octets,
    response_framing,
)
from .grammar import MalformedMessage
from .head import RequestHead, ResponseHead, SectionMemory, check_partial_response_head, parse_response_head
from .kernel import POLLRDHUP, SplicePipe, fin_on_close, reset_on_close, unacknowledged_bytes
from .limits import Bound, Watch
from .vocabulary import Cause, Operation, Phase, Side
from .waiting import FAILED, HUNG_UP, LEFT_OUT, TimedWatch, Waiter

# A first read of this size finds out whether more than a trickle comes; only then a larger buffer is worth its memory.
FIRST_READ = 64 * 1024
_BULK_BUFFER = 512 * 1024
# Below this, two system calls through a pipe cost more than copying (scripts/bench measures both).
_SPLICE_MIN = 128 * 1024
_SPLICE_AT_ONCE = 1024 * 1024
# How a transfer in bulk gives way while others move: in smaller portions, with a pause after each, in which whoever
# waits for a core or the interpreter gets it. Without, a line beside a download waits for 1 to 3 ms now and then; the
# 0.6 GiB/s that are left are more than most networks carry (docs/performance.md).
_PORTION_BESIDE_OTHERS = 256 * 1024
_PAUSE_BESIDE_OTHERS_S = 0.0001
# For how long after one of them has moved.
_BUSTLE_STAYS_S = 1.0
# An exchange is one of those others when it has not been in bulk for so long, or its answer began so long ago: what is
# in bulk moves small portions as well, and must not give way to itself.
_BULK_STAYS_S = 0.1
_BEGINNING_S = 0.01
# What a client may send ahead of its turn while its response is awaited under TLS, where poll can't tell a FIN from
# data.
_MAX_RESIDUE = 64 * 1024
_FREE_PIPES = 32
# How often upstream's kernel is asked for the last octets of a client that has gone.
_ACKNOWLEDGED_CHECK_S = 0.02
_LAST_CHUNK = b"0\r\n\r\n"
# Of a record (docs/records.md): an upstream may send any number of interim responses, and each is one.
_MOST_EVENTS = 16


class PipeStore:
    """Empty pipes of one worker, kept for the next bulk transfer."""

    __slots__ = ("_free",)

    def __init__(self) -> None:
        self._free: list[SplicePipe] = []

    def take(self) -> SplicePipe | None:
        """Returns: an empty pipe, or None where no more are to be had: copy, then."""
        try:
            return self._free.pop()
        except IndexError:
            pass  # none is free: make one
        try:
            return SplicePipe()
        except OSError:
            return None  # no descriptors left, or no splice here: copying does it, too

    def give(self, pipe: SplicePipe) -> None:
        """Take a pipe back; one that still holds octets of a broken transfer is closed."""
        if pipe.held or len(self._free) >= _FREE_PIPES:
            pipe.close()
        else:
            self._free.append(pipe)


class Bustle:
    """When exchanges that are not in bulk last moved, in all workers: those that are give way to them."""

    __slots__ = ("_moved_at", "own")

    def __init__(self, moved_at: "memoryview[float]", index: int) -> None:
        """``moved_at`` are times on the monotonic clock, one for each worker, in memory that may be shared; that of
        this worker is at ``index``.
        """
        self._moved_at = moved_at
        self.own = moved_at[index : index + 1]

    def is_on(self, now: float) -> bool:
        """Returns: whether any has moved lately."""
        return now - max(self._moved_at) < _BUSTLE_STAYS_S


class Flow:
    """One direction of an exchange."""

    __slots__ = (
        "buffer",
        "bulk",
        "content_at",
        "content_before",
        "counted",
        "dechunk",
        "enchunk",
        "end",
        "fed_from",
        "finished",
        "framing",
        "held",
        "last_read_at",
        "last_written_at",
        "mark",
        "octets",
        "pending",
        "pipe",
        "read",
        "sink",
        "source",
        "start",
        "tail",
        "written",
    )

    def __init__(self, framing: Framing) -> None:
        self.source: AnyEndpoint | None = None
        self.sink: AnyEndpoint | None = None
        self.framing = framing
        self.octets: Octets = b""  # on the way: [start:end]
        self.start = 0
        self.end = 0
        self.pending = False  # whether there are any, in octets or in the pipe
        self.fed_from = 0  # where in octets the body begins, and how the framing stood there
        self.mark: Mark = FRESH
        self.content_at = 0  # framing.content there
        # How far what is on the way was counted: for which octets (what ``read`` was), up to where, how the framing
        # stood there, and the content behind it.
        self.counted: tuple[int, int, Mark, int] | None = None
        # Read, and not to go on before more of it is known (ChunkedFraming.undecided); made when first wanted.
        self.held: bytearray | None = None
        self.dechunk = False  # only content is on the way
        self.enchunk = False  # what ends with the source's connection is on the way as chunks
        self.bulk = False  # the last read filled what it was given
        self.buffer: tuple[bytearray, memoryview] | None = None  # used again and again by a flow in bulk
        self.pipe: SplicePipe | None = None
        self.read = 0  # octets of this request, head and framing included, that crossed the source's socket
        self.written = 0  # and the sink's
        self.content_before = 0  # content relayed by an earlier framing of this flow (before a tunnel)
        self.finished = False  # the message has ended (framing.complete) and all of it was written
        self.tail: bytes | None = None  # the last octets read, where somebody wants to know
        self.last_read_at: float | None = None
        self.last_written_at: float | None = None

    def bulk_buffer(self) -> tuple[bytearray, memoryview]:
        """Returns: the flow's large buffer and a view of it, made when it is first wanted."""
        if self.buffer is None:
            octets = bytearray(_BULK_BUFFER)
            self.buffer = octets, memoryview(octets)
        return self.buffer

    def release_decided(self, octets: Octets, count: int) -> tuple[Octets, int, int]:
        """Put what was held before the ``count`` octets just fed, and hold what may not go on yet.

        Returns: the octets that may go on, how many of them, and where in them those just fed begin.
        """
        undecided = self.framing.undecided
        held = self.held
        if held is None:
            held = self.held = bytearray()
        before = len(held)
        held += octets[:count]
        count = len(held) - undecided
        if not count:
            return b"", 0, 0
        octets = bytes(held[:count])
        del held[:count]
        return octets, count, min(before, count)

    def push(self, now: float, watch: Watch | None) -> None:
        """Write what is on the way to the sink, as far as it takes it.

        Raises: BlockingIOError while it takes no more; OSError.
        """
        sink, pipe = self.sink, self.pipe
        assert sink is not None
        if pipe is not None:
            while pipe.held:
                self.written += pipe.drain(sink.fd)
                self.last_written_at = now = time.monotonic()
                if watch is not None:
                    watch.progress(now)
        start, end = self.start, self.end
        while start < end:
            octets: Octets | memoryview = self.octets
            if start or end != len(octets):
                octets = memoryview(octets)[start:end]
            count = sink.write(octets, NO_WAIT)
            self.start = start = start + count
            self.written += count
            self.last_written_at = now
            if watch is not None:
                watch.progress(now)
            if start < end and not sink.takes_more:
                break
        self.pending = start < end

    def leave_out(self, content: int) -> None:
        """What the framing has counted since it stood at ``content`` is not on the way, and will not be relayed."""
        self.content_at = self.framing.content
        self.content_before -= self.content_at - content

    def relayed_content(self) -> int:
        """Returns: the octets of content that were written to the sink."""
        count = self.content_before + self.framing.content
        if self.pipe is not None:
            count -= self.pipe.held
        if self.start < self.end:
            if self.dechunk:
                count -= self.end - max(self.start, self.fed_from)
            elif self.enchunk:
                count -= max(0, self.end - len(CRLF) - max(self.start, self.fed_from))
            else:
                count -= self._content_behind(max(self.start, self.fed_from))
        return count

    def _content_behind(self, start: int) -> int:
        """Returns: the octets of content on the way from ``start`` on. It is asked with each turn of the loop, and a
        sink may take what is on the way in hundreds of them: so what was counted once is not counted anew.
        """
        framing, key, counted = self.framing, self.read, self.counted
        if counted is not None and counted[0] == key and self.fed_from <= counted[1] <= start:
            _, at, mark, behind = counted
        else:
            at, mark, behind = self.fed_from, self.mark, framing.content - self.content_at
        between, mark = framing.content_between(mark, self.octets, at, start)
        behind -= between
        self.counted = key, start, mark, behind  # one store, and of no use where ``read`` has changed meanwhile
        return behind


class AtOnce:
    """An exchange without a relay, as far as it has come: to its end, or for a relay to go on from there."""

    # Made for each small request: so what has not come about yet is said here, and costs nothing.
    upstream_written = 0  # octets of the request that upstream took
    sent_at: float | None = None  # when it had taken all of them; None: it has not
    answer: bytes | None = None  # what upstream then answered, in one read; None: nothing yet
    first_byte_at: float | None = None  # when that was read
    response_head: ResponseHead | None = None  # what the client is told, as the answer was whole
    octets = b""  # what the client is told: head and body
    framing: Framing = NO_BODY  # of that body, which it was fed
    client_written = 0  # how many of these octets the client took
    last_byte_at: float | None = None  # when it had taken all of them: no relay is needed
    error: Exception | None = None  # what the last step met, if it did not merely have to wait

    def __init__(self, request_read: int, keep_alive: bool) -> None:
        """``request_read`` octets of body have come, which are all; ``keep_alive``: the client may ask again."""
        self.request_read = request_read
        self.keep_alive = keep_alive


class Relay:
    """Relays one request, whose head is known, over one leased upstream connection. One thread, once."""

    __slots__ = (
        "_bustle",
        "_bustles_from",
        "_head_from",
        "_noted_finished",
        "_noted_head",
        "_portion",
        "_stood",
        "awaited_from",
        "awaiting_continue",
        "body_reads",
        "bounds",
        "broken",
        "bulky",
        "client",
        "client_fin",
        "client_gone",
        "client_hung_up",
        "client_read_watch",
        "client_write_watch",
        "close_client",
        "ended_at",
        "events",
        "first_byte_at",
        "guarded",
        "hung_up_at",
        "last_byte_at",
        "memory",
        "message_stream",
        "partial_head",
        "pipes",
        "prepared",
        "proxy_name",
        "request",
        "request_head",
        "request_id",
        "residue",
        "response",
        "response_head",
        "sent_at",
        "settings",
        "tunnel",
        "tunnel_watch",
        "upstream",
        "upstream_head_watch",
        "upstream_read_watch",
        "upstream_usable",
        "upstream_write_watch",
        "waiter",
    )

    def __init__(
        self,
        settings: Settings,
        bounds: dict[str, Bound],
        waiter: Waiter,
        pipes: PipeStore,
        bustle: Bustle,
        head: RequestHead,
        prepared: PreparedRequest,
        framing: Framing,
        request_id: bytes,
        proxy_name: bytes,
    ) -> None:
        self.settings = settings
        self.bounds = bounds
        self.waiter = waiter
        self.pipes = pipes
        self._bustle = bustle
        self._bustles_from = 0.0  # when it begins to be one of those that others give way to
        self.bulky = False  # whether it has been in bulk
        self._portion = _SPLICE_AT_ONCE
        self.request_head = head
        self.prepared = prepared
        self.request_id = request_id
        self.proxy_name = proxy_name
        self.client = waiter.client
        self.upstream: AnyEndpoint | None = None
        self.memory: SectionMemory | None = None
        self.request = Flow(framing)
        self.request.source = waiter.client
        self.response = Flow(NO_BODY)
        self.response.sink = waiter.client
        self.response_head: ResponseHead | None = None
        self.partial_head = b""  # of a response head whose end has not come
        self.residue = b""  # what the client sent behind this request
        self.tunnel = False
        self.message_stream = False
        self._stood: bool | None = None  # whether the client stood between two chunks when malformed ones came
        self.close_client = not prepared.keep_alive  # the connection ends with this response
        self.upstream_usable = True  # nothing has happened that keeps the upstream connection out of its pool
        self.client_fin = False  # seen, and allowed
        self.client_hung_up = False  # both sides have ended, or it is gone: it is no longer polled for
        self.client_gone = False  # what a unix socket says before we have ended: it takes nothing any more
        # Why no more of the request can be written; judged when upstream's answer is known.
        self.broken: Abort | None = None
        # When upstream's connection failed, or ended (in a tunnel: both ways), while what came before waits for the
        # client; None: it has not. Its error is not asked for: that would take it, and a read behind the last octet
        # then shows an end.
        self.hung_up_at: float | None = None
        # Reads of the request body beyond what came with the head: those octets can't be sent again.
        self.body_reads = 0
        self._noted_head: ResponseHead | None = None  # see note_progress
        self._noted_finished: bool | None = None
        self._head_from = ENDLESS  # what response.written was when the final head was queued
        self.guarded: list[AnyEndpoint] = []  # see _guard
        self.events: list[tuple[float, Side, str]] = []
        self.sent_at: float | None = None
        self.awaited_from: float | None = None  # the answer: since then all was sent, or no more could be
        self.first_byte_at: float | None = None
        self.last_byte_at: float | None = None
        self.ended_at: float | None = None  # as last_byte_at; of a tunnel, the end of the direction that ended last
        self.awaiting_continue = False
        # Watches exist only for limits that are set; most exchanges have none.
        self.client_read_watch: Watch | None = None
        self.client_write_watch: Watch | None = None
        self.upstream_write_watch: Watch | None = None
        self.upstream_head_watch: Watch | None = None
        self.upstream_read_watch: Watch | None = None
        self.tunnel_watch: Watch | None = None

    # -- where the exchange stands -----------------------------------------------------------------

    def phase_of(self, side: Side, operation: Operation) -> Phase:
        """Returns: the phase in which a failure of that socket and operation falls."""
        if self.tunnel:
            return Phase.TUNNEL
        if self.upstream is None:
            return Phase.CONNECT
        uploading = not self.request.finished and self.request.framing is not NO_BODY and self.broken is None
        if uploading and ((side is Side.CLIENT) is (operation is Operation.READ)) and side is not Side.PROXY:
            return Phase.REQUEST_BODY
        if self.response_head is not None:
            return Phase.RESPONSE_BODY
        if uploading and operation is Operation.READ:
            # Upstream ended the connection, or the proxy ends, in the middle of the request.
            return Phase.REQUEST_BODY
        return Phase.RESPONSE_HEAD

    def _watch(self, watch: Watch | None, side: Side, operation: Operation) -> None:
        if watch is not None:
            self.waiter.watches.append(TimedWatch(watch, side, operation))

    def attach(self, upstream: AnyEndpoint, memory: SectionMemory, head: bytes, body: bytes, now: float) -> None:
        """Give the relay its upstream connection, and the octets to begin with: the head, and what has come of the
        body.
        """
        self.upstream = upstream
        self.memory = memory
        waiter = self.waiter
        waiter.upstream = upstream
        waiter.phase_of = self.phase_of
        request = self.request
        request.sink = upstream
        self.response.source = upstream
        settings = self.settings
        if settings.upstream_write_timeout is not None or settings.upstream_write_deadline is not None:
            self.upstream_write_watch = Watch(settings.upstream_write_timeout, settings.upstream_write_deadline)
            self.upstream_write_watch.start(now)
            self._watch(self.upstream_write_watch, Side.UPSTREAM, Operation.WRITE)
        if settings.upstream_head_timeout is not None:
            self.upstream_head_watch = Watch(settings.upstream_head_timeout, None)
            self._watch(self.upstream_head_watch, Side.UPSTREAM, Operation.READ)
        if settings.upstream_read_timeout is not None or settings.upstream_read_deadline is not None:
            self.upstream_read_watch = Watch(settings.upstream_read_timeout, settings.upstream_read_deadline)
            self._watch(self.upstream_read_watch, Side.UPSTREAM, Operation.READ)
        request.octets = head
        request.end = request.fed_from = len(head)
        request.pending = True
        if body and request.framing is not NO_BODY:
            self._take_request_octets(body, len(body), len(head))
        elif body:
            self.residue = body
        if self.prepared.expects_continue and request.framing is not NO_BODY and request.read == 0:
            self.awaiting_continue = True

    def count_unsent(self, body: bytes) -> None:
        """Count what had come of the request body with its head, where upstream was never reached."""
        request = self.request
        if request.framing is NO_BODY:
            return
        try:
            request.read += request.framing.feed(body, 0, len(body))
        except MalformedMessage:
            request.read += len(body)
        request.content_before -= request.framing.content  # counted, and will not be relayed

    @property
    def head_out(self) -> bool:
        """Whether a part of the final response head may have reached the client."""
        return self.response_head is not None and self.response.written > self._head_from

    @property
    def mid_head(self) -> bool:
        """Whether an interim head is half written: then nothing else can be said to the client."""
        response = self.response
        return 0 < response.start < response.end and response.written < self._head_from

    def between_lines(self) -> bool:
        """Whether the client has received whole lines of a JSON message stream, so that one more can follow."""
        response = self.response
        if not self.message_stream or response.pending or not self.head_out:
            return False
        tail = response.tail
        if response.framing.ends_with_connection or response.dechunk:
            return not tail or tail.endswith(b"\n")
        stands = self._stands_between_chunks() if self._stood is None else self._stood
        return stands and (not tail or tail == b"\n\r\n")

    def _stands_between_chunks(self) -> bool:
        framing = self.response.framing
        # What is undecided is a line of its own, or the end, and the client has not got it.
        return framing.between_chunks or framing.undecided > 0

    # -- the loop ----------------------------------------------------------------------------------

    def run(self, begun: AtOnce | None) -> None:
        """Relay until the response is whole, or a tunnel has ended on both sides; ``begun`` is what was done before.

        Raises: Abort.
        """
        request, response, client, upstream = self.request, self.response, self.client, self.upstream
        assert upstream is not None
        waiter = self.waiter
        now = time.monotonic()
        self._bustles_from = now + _BULK_STAYS_S
        try:
            if begun is not None:
                self._go_on(begun, now)
            else:
                self._flush_request(now)
                if request.finished and upstream.patience_s:
                    # Most answers come at once, whole, and fit into one read.
                    self._read_upstream(now, soon=True)
        except Abort as abort:
            # Upstream's end ends that wait at once and the client's does not: if it is there by now, it came first.
            if abort.side is Side.UPSTREAM:
                self._client_ends(waiter.peek_client())
            raise
        while not (response.finished and (request.finished or not self.tunnel or self.broken is not None)):
            client_events = 0 if self.client_fin else POLLRDHUP
            upstream_events = 0
            due_at = None
            if request.pending:
                if self.broken is None:
                    upstream_events = upstream.write_event
            elif self.broken is None and not request.framing.complete:
                client_events |= client.read_event
                if client.has_unread:
                    due_at = 0.0
            elif client.is_tls:
                # Under TLS only a read tells the end of the client's side.
                if len(self.residue) < _MAX_RESIDUE and not self.client_fin:
                    client_events |= client.read_event
                    if client.has_unread:
                        due_at = 0.0
            if response.pending:
                client_events |= client.write_event
                if self.hung_up_at is None:
                    # No more of it is wanted now, but its failure, and its end where that comes too early.
                    upstream_events |= select.POLLERR if self.tunnel else POLLRDHUP
            elif not response.finished:
                upstream_events |= upstream.read_event
                if upstream.has_unread:
                    due_at = 0.0
            elif not upstream_events:
                upstream_events = select.POLLERR  # a tunnel that upstream has ended, but for what it still reads
            if self.client_gone and (request.finished or self.broken is not None):
                if upstream.sock.family == socket.AF_UNIX or not unacknowledged_bytes(upstream.sock):
                    raise Abort(Side.CLIENT, self.phase_of(Side.CLIENT, Operation.READ), Operation.READ, Cause.CLOSED)
                due_at = now + _ACKNOWLEDGED_CHECK_S  # closing now would take the client's last octets back
            if client.unflushed:
                client_events |= WRITABLE
            if upstream.unflushed:
                upstream_events |= WRITABLE
            if not client_events and self.client_hung_up:
                client_events = LEFT_OUT
            if waiter.watches:
                self._set_watches(now, client_events)
            self.note_progress()
            if request.bulk or response.bulk:
                self._give_way(now)
            elif now > self._bustles_from:
                self._bustle.own[0] = now
            client_ready, upstream_ready, now = waiter.wait(client_events, upstream.fd, upstream_events, due_at)
            if due_at is None and not (request.pending or response.pending or response.bulk):
                client_ready, upstream_ready, now = self._pass_on(client_ready, upstream_ready, now)
            if client.unflushed and client_ready & WRITABLE:
                self._flush_endpoint(client)
            if upstream.unflushed and upstream_ready & WRITABLE:
                self._flush_endpoint(upstream)
            # Upstream first: where both have something to say, an answer that is whole makes the client's end none of
            # our business.
            if upstream_ready or (due_at is not None and upstream.has_unread):
                if request.pending and self.broken is None and upstream_ready & (upstream.write_event | FAILED):
                    self._flush_request(now)
                if response.pending and upstream_ready & (FAILED if self.tunnel else HUNG_UP):
                    self.hung_up_at = now  # it would end each wait at once
                if (
                    not response.pending
                    and not response.finished
                    and (upstream_ready & (upstream.read_event | HUNG_UP) or upstream.has_unread)
                ):
                    try:
                        self._read_upstream(now)
                    except Abort as abort:
                        # Under TLS only a read tells the end of the client's side.
                        if abort.side is Side.UPSTREAM and (client_ready & HUNG_UP or (client_ready and client.is_tls)):
                            self._client_ends(client_ready)  # as where the answer came soon
                        raise
                if (
                    response.finished
                    and self.tunnel
                    and not request.finished
                    and upstream_ready & FAILED
                    and self.broken is None
                ):
                    self._break_request(self._socket_failed(upstream, Operation.WRITE))
            if client_ready or (due_at is not None and client.has_unread):
                if response.pending and client_ready & client.write_event:
                    self._flush_response(now)
                if (client_ready & ~WRITABLE or client.has_unread) and (self.tunnel or not response.finished):
                    self._read_client(client_ready, now)
        if not (request.finished or self.tunnel):
            self._add_event(Side.CLIENT, "unread")  # upstream had answered: the rest of the request goes nowhere

    def _give_way(self, now: float) -> None:
        """In bulk: leave room to those that are not, if any of them has moved lately."""
        self.bulky = True
        self._bustles_from = now + _BULK_STAYS_S
        if self._bustle.is_on(now):
            self._portion = _PORTION_BESIDE_OTHERS
            time.sleep(_PAUSE_BESIDE_OTHERS_S)
        else:
            self._portion = _SPLICE_AT_ONCE

    def _pass_on(self, client_ready: int, upstream_ready: int, now: float) -> tuple[int, int, float]:
        """Pass on one small portion after the other, as long as each is taken whole and nothing else happens.

        A line now and then, or a keystroke and its echo: turns of the loop that change nothing of what is waited for,
        so they do without finding that out. What is out of the ordinary is left to the loop and what it calls.
        Returns: what the last wait has found and was not dealt with. Raises: Abort.
        """
        waiter, request, response, moved_at = self.waiter, self.request, self.response, self._bustle.own
        while True:
            if upstream_ready == READABLE and not client_ready:
                flow = response
            elif client_ready == READABLE and not upstream_ready and self.tunnel:
                flow = request
            else:
                return client_ready, upstream_ready, now
            source, sink = flow.source, flow.sink
            assert source is not None
            assert sink is not None
            if (
                source.is_tls  # under TLS more may be left than poll sees
                or flow.bulk
                or flow.dechunk
                or flow.enchunk
                or flow.tail is not None
            ):
                return client_ready, upstream_ready, now
            try:
                octets = source.read(FIRST_READ, NO_WAIT)
            except BlockingIOError:
                return 0, 0, now  # nothing to read after all
            except OSError as error:
                abort = self._read_failed(flow, error)
                raise abort from abort.original
            count = len(octets)
            if not 0 < count < FIRST_READ or not flow.framing.take_whole(octets):
                if flow is response:
                    self._take_from_upstream(octets, count, now)
                else:
                    self._take_from_client(octets, count, now)
                return 0, 0, now
            flow.read += count
            flow.last_read_at = now
            if waiter.watches:
                self._see_progress(self.upstream_read_watch if flow is response else self.client_read_watch, now)
            try:
                taken = sink.write(octets, NO_WAIT)
            except OSError as error:
                self._leave_pending(flow, octets, 0)
                if not isinstance(error, BlockingIOError):
                    self._write_failed(flow, error)
                return 0, 0, now
            flow.written += taken
            flow.last_written_at = now
            if taken < count:
                self._leave_pending(flow, octets, taken)
                return 0, 0, now
            waiter.slot.count(
                request.read,
                response.written,
                response.read,
                request.written,
                request.content_before + request.framing.content,
                response.content_before + response.framing.content,
            )
            if now > self._bustles_from:
                moved_at[0] = now
            if sink.has_unread:
                return 0, 0, now  # a write under TLS may have read
            client_ready, upstream_ready, now = waiter.wait_again()

    @staticmethod
    def _leave_pending(flow: Flow, octets: bytes, taken: int) -> None:
        """Leave to the loop what the sink did not take of octets that began where no chunk was under way."""
        # Before the rest, which stands together at once: another thread may look (SIGUSR2).
        flow.content_at = flow.framing.content - flow.framing.content_between(FRESH, octets, 0, len(octets))[0]
        flow.octets = octets
        flow.start = taken
        flow.fed_from = 0
        flow.mark = FRESH
        flow.end = len(octets)
        flow.pending = True

    def _go_on(self, begun: AtOnce, now: float) -> None:
        """Take over what was done before there was a relay: nothing of it is done or decided again. Raises: Abort, or
        the error of a bug.
        """
        request, client, upstream = self.request, self.client, self.upstream
        assert upstream is not None
        error, sent_at, answer = begun.error, begun.sent_at, begun.answer
        if begun.upstream_written:
            request.start = request.written = begun.upstream_written
            request.last_written_at = sent_at or now
        if sent_at is None:
            if isinstance(error, OSError):
                self._break_request(self._abort(upstream, Operation.WRITE, error))
                return
        else:
            request.pending = False
            request.finished = True
            self.sent_at = self.awaited_from = sent_at
            if self.upstream_head_watch is not None:
                self.upstream_head_watch.wait(sent_at)
        if answer is None:
            if isinstance(error, OSError):  # of the read: that of a write was dealt with
                raise self._upstream_failed(error)
        elif begun.response_head is not None:
            self._take_over_response(begun, begun.response_head, len(answer), now)
            if isinstance(error, OSError):
                raise self._abort(client, Operation.WRITE, error)
        elif error is not None:
            self.partial_head = answer
        else:
            assert begun.first_byte_at is not None
            self._take_from_upstream(answer, len(answer), begun.first_byte_at)
        if error is not None:
            raise error

    def _take_over_response(self, begun: AtOnce, head: ResponseHead, read: int, now: float) -> None:
        """The client has been told a head, and upstream's answer, ``read`` octets, was whole."""
        response = self.response
        self.response_head = head
        self.first_byte_at = response.last_read_at = begun.first_byte_at
        self._head_from = 0
        response.read = read
        response.framing = begun.framing
        response.octets = begun.octets
        response.start = response.written = begun.client_written
        response.end = len(begun.octets)
        response.fed_from = response.end - (read - head.size)
        response.pending = True
        if begun.client_written:
            response.last_written_at = now

    def note_progress(self) -> None:
        """Leave word of how far it has come: with each turn of the loop, as any of its waits may be the last."""
        request, response, head = self.request, self.response, self.response_head
        slot = self.waiter.slot
        if self._noted_head is not head or self._noted_finished is not request.finished:
            phase = self.phase_of(Side.PROXY, Operation.READ)
            out = self.head_out
            slot.stage(phase, head.status if head and out else 0, head.section.content_length if head else None)
            self._noted_head = head if out else None
            self._noted_finished = request.finished
        slot.count(
            request.read,
            response.written,
            response.read,
            request.written,
            request.relayed_content() if request.pending else request.content_before + request.framing.content,
            response.relayed_content() if response.pending else response.content_before + response.framing.content,
        )

    def _set_watches(self, now: float, client_events: int) -> None:
        """Let the timeouts run whose event is polled for, and the others rest; end what has nothing left to watch."""
        request, response = self.request, self.response
        watch = self.client_read_watch
        if watch is not None:
            if request.framing.complete or self.tunnel or self.broken is not None:
                watch.end()
            elif client_events & READABLE and not request.pending and not self.awaiting_continue:
                watch.wait(now)
            else:
                watch.rest()
        watch = self.client_write_watch
        if watch is not None:
            if self.tunnel:
                watch.end()
            elif response.pending:
                watch.wait(now)
            else:
                watch.rest()
        watch = self.upstream_write_watch
        if watch is not None:
            if request.finished or self.tunnel or self.broken is not None:
                watch.end()
            elif request.pending:
                watch.wait(now)
            else:
                watch.rest()
        watch = self.upstream_head_watch
        if watch is not None:
            if self.response_head is None and self.awaited_from is not None and not response.pending:
                watch.wait(max(self.awaited_from, response.last_written_at or 0.0))
            else:
                watch.rest()  # while an interim response waits for the client, upstream is not asked
        watch = self.upstream_read_watch
        if watch is not None:
            if self.response_head is not None and (response.framing.complete or self.tunnel):
                watch.end()
            elif self.response_head is not None and not response.pending:
                watch.wait(now)
            else:
                watch.rest()

    # -- client to upstream ------------------------------------------------------------------------

    def _take_request_octets(self, octets: Octets, count: int, head_size: int = 0) -> None:
        """Feed the ``count`` octets that the client sent, and put what belongs to this request on the way.

        ``head_size`` octets of head are there already.
        """
        request = self.request
        framing = request.framing
        request.mark = framing.mark
        request.content_at = content = framing.content
        try:
            stop = framing.feed(octets, 0, count)
        except MalformedMessage as error:
            request.read += count
            request.leave_out(content)
            raise malformed_request(error, Phase.REQUEST_BODY, self.bounds) from error
        request.read += stop
        if stop < count:
            self.residue = bytes(octets[stop:count])
        bound = self.settings.max_body_size
        if bound is not None and framing.content > bound.value and not self.tunnel:
            request.leave_out(content)
            raise Abort(
                Side.CLIENT,
                Phase.REQUEST_BODY,
                Operation.READ,
                Cause.LIMIT,
                limit=bound,
                detail=f"the body is larger than {bound.value:,} bytes",
            )
        fed_from = 0
        if request.held or framing.undecided:
            octets, stop, fed_from = request.release_decided(octets, stop)
        if head_size:
            request.octets = bytes(request.octets) + octets[:stop]
            request.end = head_size + stop
        else:
            request.octets = octets
            request.start = 0
            request.fed_from = fed_from
            request.end = stop
            request.pending = stop > 0

    def _read_client(self, ready: int, now: float) -> None:
        """Read from the client what its request still lacks; notice its end in any case."""
        request, client = self.request, self.client
        if ready & select.POLLERR and not ready & READABLE:
            raise self._socket_failed(client, Operation.WRITE if self.response.pending else Operation.READ)
        wanted = not request.pending and not request.framing.complete and self.broken is None
        if wanted and (ready & (client.read_event | HUNG_UP) or client.has_unread):
            self._pump_request(now)
            return
        if ready & HUNG_UP or client.is_tls:
            self._client_ends(ready)

    def _client_ends(self, ready: int) -> None:
        """The client sends no more while its response is pending, or, under TLS, may be about to say so."""
        client = self.client
        may_go_on = self.tunnel or self.settings.allows_half_close
        if ready & (select.POLLERR | select.POLLNVAL):
            raise self._socket_failed(client, Operation.WRITE if self.response.pending else Operation.READ)
        hung_up = bool(ready & HUNG_UP)
        if client.is_tls and (self.request.framing.complete or self.broken is not None):
            if not self._read_behind_request(hung_up):
                return
        elif not hung_up:
            return
        elif client.is_tls and not may_go_on:
            self._read_off_end()
        if may_go_on:
            if not self.client_fin:
                self._add_event(Side.CLIENT, "fin")
            self.client_fin = True
            self.client_hung_up = bool(ready & select.POLLHUP)
            self.client_gone = (
                self.client_hung_up and client.sock.family == socket.AF_UNIX and not self.response.finished
            )
            return
        raise Abort(Side.CLIENT, self.phase_of(Side.CLIENT, Operation.READ), Operation.READ, Cause.CLOSED)

    def _read_behind_request(self, hung_up: bool) -> bool:
        """Under TLS, read what the client sends where no more of its request is wanted: one portion, while there is
        room for it, or all there is if it has ``hung_up``, as its end is behind that.

        Returns: whether it has come to its end. Raises: Abort.
        """
        request = self.request
        if not hung_up and len(self.residue) >= _MAX_RESIDUE:
            return False
        while True:
            try:
                octets = self.client.read(FIRST_READ, NO_WAIT)
            except BlockingIOError:
                return hung_up
            except OSError as error:
                if self._ends_like_this(error):
                    return True
                raise self._abort(self.client, Operation.READ, error) from error
            if not octets:
                return True
            if request.framing.complete:
                self.residue += octets
            else:
                # Of a body that upstream does not take: it can't be sent again.
                request.read += len(octets)
                self.body_reads += 1
            if not hung_up:
                return False

    def _read_off_end(self) -> None:
        """Under TLS, find out how a client ended that has left in the middle of its request: what it sent before is
        not wanted any more. Raises: Abort, unless it was close_notify.
        """
        try:
            while octets := self.client.read(FIRST_READ, NO_WAIT):
                self.request.read += len(octets)
        except BlockingIOError:
            return  # its FIN has come, but the kernel holds on to what was before it
        except OSError as error:
            raise self._abort(self.client, Operation.READ, error) from error

    def _pump_request(self, now: float) -> None:
        request, client = self.request, self.client
        if request.framing.opaque() >= _SPLICE_MIN and self._prepare_splice(request):
            self._splice(request, now)
            return
        octets: Octets
        try:
            if request.bulk:
                octets, view = request.bulk_buffer()
                count = client.read_into(view[: self._portion], 0, NO_WAIT)
            else:
                octets = client.read(FIRST_READ, NO_WAIT)
                count = len(octets)
        except BlockingIOError:
            if client.is_tls:
                self._see_progress(self.client_read_watch, now)  # a part of a record
            return  # nothing to read after all: poll says when
        except OSError as error:
            if self._ends_like_this(error):
                self._request_source_ended(now)
                return
            abort = self._read_failed(request, error)
            raise abort from abort.original
        self._take_from_client(octets, count, now)

    def _take_from_client(self, octets: Octets, count: int, now: float) -> None:
        """Take ``count`` octets that were read from the client; none are its end."""
        request = self.request
        if not count:
            self._request_source_ended(now)
            return
        request.last_read_at = now
        self.awaiting_continue = False
        self.body_reads += 1
        request.bulk = count >= FIRST_READ
        self._see_progress(self.client_read_watch, now)
        self._take_request_octets(octets, count)
        self._flush_request(now)

    def _ends_like_this(self, error: OSError) -> bool:
        """Whether a failed read is how a client ends a tunnel: all that upstream had to say was delivered, its end
        included, and many clients then close without close_notify.
        """
        return self.tunnel and self.response.finished and isinstance(error, ssl.SSLEOFError)

    def _request_source_ended(self, now: float) -> None:
        """The client's side has come to its end: a half-close in a tunnel, else the end of a request that is not
        whole.
        """
        request = self.request
        if self.tunnel:
            request.framing.complete = True  # a ConnectionFraming: NoBody is never read from
            if not self.client_fin:
                self._add_event(Side.CLIENT, "fin")
            self.client_fin = True
            self._flush_request(now)
            return
        raise half_a_request(self.settings, Phase.REQUEST_BODY, "the request body was not whole")

    def _flush_request(self, now: float) -> None:
        """Write what is on the way to upstream."""
        request = self.request
        try:
            request.push(now, self.tunnel_watch if self.tunnel else self.upstream_write_watch)
            if request.pending or not request.framing.complete or request.finished:
                return
            request.finished = True
            if request.pipe is not None:
                self._release_pipe(request)
            if isinstance(request.framing, ChunkedFraming) and request.framing.trailer_fields:
                # Some servers take them for fields of the next request (aiohttp), which may be another client's.
                self.upstream_usable = False
            if not self.tunnel:
                self.sent_at = self.awaited_from = time.monotonic()
                if self.upstream_head_watch is not None:
                    self.upstream_head_watch.wait(self.sent_at)
            else:
                assert self.upstream is not None
                self.upstream.end_write()
                self.ended_at = time.monotonic()
        except BlockingIOError:
            return  # upstream takes no more for now: poll says when
        except OSError as error:
            self._write_failed(request, error)

    def _break_request(self, abort: Abort) -> None:
        """Remember why upstream takes no more, and let the response be read. What was on the way stays pending: it
        counts as not relayed, and no more is read.
        """
        self.broken = abort
        self.upstream_usable = False
        now = time.monotonic()
        if self.tunnel:
            self.ended_at = now
        elif self.awaited_from is None:
            self.awaited_from = now
        self._add_event(Side.UPSTREAM, "stopped_reading")

    # -- upstream to client ------------------------------------------------------------------------

    def _read_upstream(self, now: float, *, soon: bool = False) -> None:
        response, upstream = self.response, self.upstream
        assert upstream is not None
        if response.framing.opaque() >= _SPLICE_MIN and self._prepare_splice(response):
            self._splice(response, now)
            return
        octets: Octets
        try:
            if response.bulk:
                octets, view = response.bulk_buffer()
                count = upstream.read_into(view[: self._portion], 0, NO_WAIT)
            elif soon:
                octets = self.waiter.read_soon(upstream, FIRST_READ)
                count = len(octets)
                now = time.monotonic()
            else:
                octets = upstream.read(FIRST_READ, NO_WAIT)
                count = len(octets)
        except BlockingIOError:
            if upstream.is_tls:
                self._see_progress(self.upstream_read_watch, now)  # a part of a record
            return  # nothing to read after all, or not soon: poll says when
        except OSError as error:
            abort = self._read_failed(response, error)
            raise abort from abort.original
        self._take_from_upstream(octets, count, now)

    def _upstream_failed(self, error: OSError) -> Abort:
        """Returns: the abort of a read from upstream that failed; the first error wins."""
        if self.broken is not None and not refuses_certificate(error):
            return self.broken
        assert self.upstream is not None
        return self._abort(self.upstream, Operation.READ, error)

    def first_of(self, abort: Abort) -> Abort:
        """Returns: the abort that decides: where this one came after upstream had failed in the middle of its response,
        that failure, for which all that upstream had sent before is read.
        """
        if self.hung_up_at is None or abort.cause in (Cause.INTERNAL, Cause.RESOURCE):
            return abort
        if abort.side is Side.UPSTREAM and abort.cause is not Cause.DEADLINE:
            return abort  # it is about upstream as it is
        assert self.upstream is not None
        is_final = self.response_head is not None  # or what waits for the client is interim, and has no framing
        framing = copy.deepcopy(self.response.framing)
        try:
            while not (is_final and framing.complete):
                octets = self.upstream.read(_BULK_BUFFER, NO_WAIT)
                if not octets:
                    break
                self.response.read += len(octets)
                if is_final:
                    framing.feed(octets, 0, len(octets))
            else:
                return abort  # all of it had come
            self._refuse_false_end()
        except (BlockingIOError, MalformedMessage):
            return abort
        except OSError as error:
            return self._upstream_failed(error)
        except Abort as broken:
            return broken
        if is_final and framing.ends_with_connection:
            return abort
        return Abort(Side.UPSTREAM, self.phase_of(Side.UPSTREAM, Operation.READ), Operation.READ, Cause.CLOSED)

    def _refuse_false_end(self) -> None:
        """Behind the last octet that was read: raise what a write has met, if the end that a read then shows is none
        that upstream has sent, since a socket tells its error once. Raises: Abort.
        """
        broken = self.broken
        if (
            broken is not None
            and broken.original is not None
            # A reset behind a FIN: that end was one. (A unix socket has EPIPE for a write, and tells a read the reset.)
            and not isinstance(broken.original, BrokenPipeError)
            # Under TLS the end that is read is close_notify, which upstream has sent.
            and not isinstance(self.upstream, TlsEndpoint)
        ):
            raise broken from broken.original

    def _take_from_upstream(self, octets: Octets, count: int, now: float) -> None:
        """Take ``count`` octets that were read from upstream at ``now``; none are its end."""
        response = self.response
        if not count:
            self._response_source_ended(now)
            return
        response.last_read_at = now
        if self.first_byte_at is None:
            self.first_byte_at = now
        if self.response_head is None:
            self._take_head_octets(bytes(octets), now)  # no copy: a flow is in bulk only after its head
        else:
            response.bulk = count >= FIRST_READ
            self._see_progress(self.upstream_read_watch, now)
            self._take_response_octets(octets, count)
            self._flush_response(now)

    def _see_progress(self, watch: Watch | None, now: float) -> None:
        """Octets have come; under TLS perhaps no whole record yet: over a slow link that is all the progress."""
        for each in (watch, self.tunnel_watch):
            if each is not None:
                each.progress(now)

    def _response_source_ended(self, now: float) -> None:
        """Upstream's side has come to its end: the end of a body framed by it, a half-close in a tunnel, or the end
        of too little.
        """
        response = self.response
        self._refuse_false_end()
        if self.response_head is not None and response.framing.ends_with_connection:
            response.framing.complete = True  # a ConnectionFraming: NoBody is never read from
            self.upstream_usable = False
            if self.tunnel:
                self._add_event(Side.UPSTREAM, "fin")
            elif response.enchunk:
                response.octets = _LAST_CHUNK
                response.start, response.end = 0, len(_LAST_CHUNK)
                response.fed_from = response.end
                response.pending = True
            self._flush_response(now)
            return
        if self.broken is not None:
            raise self.broken from self.broken.original
        raise Abort(
            Side.UPSTREAM,
            self.phase_of(Side.UPSTREAM, Operation.READ),
            Operation.READ,
            Cause.CLOSED,
            detail=None
            if self.response_head is not None or not self.partial_head
            else "its response head was not whole",
        )

    def _take_head_octets(self, octets: bytes, now: float) -> None:
        """Take octets of response heads: interim ones go on at once, the final one decides how the rest is relayed."""
        response = self.response
        checked = len(self.partial_head)
        if checked:
            octets = self.partial_head + octets
            self.partial_head = b""
        memory = self.memory
        assert memory is not None
        while octets and self.response_head is None:
            head_end = octets.find(b"\r\n\r\n")
            if head_end < 0 or head_end > self.settings.max_head_size.value - 4:
                if len(octets) > self.settings.max_head_size.value:
                    response.read += len(octets)
                    raise Abort(
                        Side.UPSTREAM,
                        Phase.RESPONSE_HEAD,
                        Operation.READ,
                        Cause.LIMIT,
                        limit=self.settings.max_head_size,
                        detail="the response head is too large",
                    )
                self.partial_head = octets
                try:
                    check_partial_response_head(octets, checked)
                except MalformedMessage as error:
                    raise malformed_response(error, Phase.RESPONSE_HEAD, self.bounds) from error
                return
            head_octets = octets[: head_end + 4]
            octets = octets[head_end + 4 :]
            checked = 0
            response.read += len(head_octets)
            try:
                head = parse_response_head(head_octets, memory)
                self._take_head(head, octets, now)
            except MalformedMessage as error:
                response.read += len(octets)
                raise malformed_response(error, Phase.RESPONSE_HEAD, self.bounds) from error

    def _take_head(self, head: ResponseHead, rest: bytes, now: float) -> None:
        """Serialize one response head for the client; with the final one goes what has come of its body."""
        response = self.response
        status = head.status
        if status < 200:
            if status == 101:
                self._begin_tunnel(head, rest, now, upgrade_lines(head.section))
                return
            if status == 100:
                self.awaiting_continue = False
            if self.request_head.minor:
                prepared = prepare_response(head, self.proxy_name, dechunk=False)
                self._take_response_octets(b"", 0, serialize_response(head, prepared, b"", None))
                self._add_event(Side.UPSTREAM, str(status))
                self._flush_response(now)
            if not rest:
                self.first_byte_at = None  # of the final response
            return
        framing = response_framing(status, head.section, self.request_head.method, self.settings.max_head_size.value)
        if hijacks(self.request_head, head, framing):
            self._begin_tunnel(head, rest, now, b"Connection: close\r\n")
            return
        self.response_head = head
        if not self.bulky:
            self._bustles_from = now + _BEGINNING_S
        dechunk = head.section.chunked and not self.request_head.minor
        prepared = prepare_response(head, self.proxy_name, dechunk=dechunk)
        response.framing = framing
        response.dechunk = dechunk and framing is not NO_BODY
        # A unix socket has no reset to cut a response with that ends with the connection.
        response.enchunk = (
            framing.ends_with_connection and self.request_head.minor == 1 and self.client.sock.family == socket.AF_UNIX
        )
        if not prepared.keep_alive:
            self.upstream_usable = False
        if framing.ends_with_connection or response.dechunk:
            self.close_client = True
            if not response.enchunk:
                self._guard(self.client)
        elif not self.request.framing.complete or self.waiter.control.draining:
            # An answer before the request is through: the rest of the request will not be read to its end.
            self.close_client = True
        if self.close_client:
            connection = b"Connection: close\r\n"
        else:
            connection = b"" if self.request_head.minor else b"Connection: keep-alive\r\n"
        if response.enchunk:
            connection = b"Transfer-Encoding: chunked\r\n" + connection
        if status == 426:
            connection = upgrade_lines(head.section) + connection
        self.message_stream = is_message_stream(self.request_head, head)
        if self.message_stream:
            response.tail = b""
        if self.upstream_read_watch is not None:
            self.upstream_read_watch.start(now)
        self._head_from = response.written + response.end - response.start  # what is pending is interim
        self._take_response_octets(rest, len(rest), serialize_response(head, prepared, connection, self.request_id))
        self._flush_response(now)

    def _take_response_octets(self, octets: Octets, count: int, head: bytes = b"") -> None:
        """Feed the ``count`` octets of content and framing that upstream sent, and put what belongs to this response
        on the way, behind ``head``.
        """
        response = self.response
        framing = response.framing
        response.mark = framing.mark
        response.content_at = content = framing.content
        contents: list[tuple[int, int]] | None = [] if response.dechunk else None
        stood = not self.message_stream or self._stands_between_chunks()
        try:
            stop = framing.feed(octets, 0, count, contents)
        except MalformedMessage as error:
            response.read += count
            self._stood = stood  # none of these octets goes on
            response.leave_out(content)
            raise malformed_response(error, Phase.RESPONSE_BODY, self.bounds) from error
        response.read += stop
        if stop < count:
            # Octets behind the end of a response belong to nothing we asked for.
            self.upstream_usable = False
            self._add_event(Side.UPSTREAM, "excess")
        if contents is not None:
            octets = b"".join(octets[a:b] for a, b in contents)
            stop = len(octets)
        start = 0
        fed_from = len(head)
        if contents is None and (response.held or framing.undecided):
            octets, stop, fed_from = response.release_decided(octets, stop)
            fed_from += len(head)
        if response.tail is not None and stop:
            last = bytes(octets[max(0, stop - 3) : stop])
            response.tail = last if stop >= 3 else (response.tail + last)[-3:]
        if response.enchunk and stop:
            size = b"%x\r\n" % stop
            octets = b"".join((size, memoryview(octets)[:stop], CRLF))
            stop = len(octets)
            fed_from += len(size)
        if head:
            if response.start < response.end:  # an interim head that the client has not taken whole (see mid_head)
                start = response.start
                before = bytes(response.octets[: response.end])
                head = before + head
                fed_from += len(before)
            octets = head + octets[:stop]
            stop = len(octets)
        response.octets = octets
        response.start = start
        response.end = stop
        response.fed_from = fed_from
        response.pending = stop > start

    def _flush_response(self, now: float) -> None:
        """Write what is on the way to the client. Raises: Abort."""
        response = self.response
        try:
            response.push(now, self.tunnel_watch if self.tunnel else self.client_write_watch)
            if response.pending or not response.framing.complete or self.response_head is None or response.finished:
                return
            response.finished = True
            self.last_byte_at = self.ended_at = time.monotonic()
            if response.pipe is not None:
                self._release_pipe(response)
            if self.tunnel:
                self.client.end_write()
        except BlockingIOError:
            return  # the client takes no more for now: poll says when
        except OSError as error:
            self._write_failed(response, error)

    # -- both ways ---------------------------------------------------------------------------------

    def _begin_tunnel(self, head: ResponseHead, rest: bytes, now: float, connection: bytes) -> None:
        """From here on octets pass both ways without framing, each direction until its source ends it."""
        if head.status == 101:
            if not self.prepared.upgrade:
                raise MalformedMessage("a 101 response to a request that asked for no upgrade", 0)
            chosen = upgrade_protocols(head.section)
            if not chosen or not chosen <= upgrade_protocols(self.request_head.section):
                raise MalformedMessage("a 101 response that switches to what the request did not offer", 0)
        request, response = self.request, self.response
        if not request.finished:
            raise MalformedMessage("a switch of protocols before the request was whole", 0)
        self.tunnel = True
        self.response_head = head
        self.close_client = True
        self.upstream_usable = False
        self.awaiting_continue = False
        prepared = prepare_response(head, self.proxy_name, dechunk=False)
        request.content_before = request.framing.content
        request.framing = ConnectionFraming()
        request.finished = False
        response.framing = ConnectionFraming()
        self._add_event(Side.UPSTREAM, "tunnel")
        assert self.upstream is not None
        self._guard(self.client)
        self._guard(self.upstream)
        limit = self.settings.tunnel_timeout
        if limit is not None:
            self.tunnel_watch = Watch(limit, None)
            self.tunnel_watch.wait(now)
            self._watch(self.tunnel_watch, Side.PROXY, Operation.READ)
        self._head_from = response.written + response.end - response.start  # what is pending is interim
        self._take_response_octets(rest, len(rest), serialize_response(head, prepared, connection, self.request_id))
        self._flush_response(now)
        if self.residue:
            octets, self.residue = self.residue, b""
            self._take_request_octets(octets, len(octets))
            self._flush_request(now)

    def _prepare_splice(self, flow: Flow) -> bool:
        """Make ready for ``_splice``, if the next octets, at least ``_SPLICE_MIN`` of which are opaque, may pass from
        socket to socket inside the kernel, and it is worth it.

        Returns: whether the flow has a pipe, and its sockets do not wait.
        """
        if flow.dechunk or flow.enchunk or flow.tail is not None:
            return False
        if flow.framing.ends_with_connection and not flow.bulk:
            return False
        source, sink = flow.source, flow.sink
        assert source is not None
        assert sink is not None
        if not (source.can_splice and sink.can_splice):
            return False
        bound = self.settings.max_body_size
        if (
            bound is not None
            and flow is self.request
            and not self.tunnel
            and flow.framing.content + flow.framing.opaque() > bound.value
        ):
            return False  # a chunk that passes the bound: copied, so that it is noticed where it does
        if flow.pipe is None:
            flow.pipe = self.pipes.take()
            if flow.pipe is None:
                return False
            source.prepare_splice()
            sink.prepare_splice()
        return True

    def _splice(self, flow: Flow, now: float) -> None:
        """Move opaque octets from socket to socket by way of a pipe."""
        source, sink, pipe = flow.source, flow.sink, flow.pipe
        assert source is not None
        assert sink is not None
        assert pipe is not None
        try:
            count = pipe.fill(source.fd, min(flow.framing.opaque(), self._portion))
        except BlockingIOError:
            return  # nothing to read after all: poll says when
        except OSError as error:
            abort = self._read_failed(flow, error)
            raise abort from abort.original
        if not count:
            if flow is self.request:
                self._request_source_ended(now)
            else:
                self._response_source_ended(now)
            return
        flow.framing.skip(count)
        flow.pending = True
        flow.bulk = count >= FIRST_READ
        flow.read += count
        flow.last_read_at = now
        if flow is self.request:
            self.body_reads += 1
            self._see_progress(self.client_read_watch, now)
            self._flush_request(now)
        else:
            self._see_progress(self.upstream_read_watch, now)
            self._flush_response(now)

    def _read_failed(self, flow: Flow, error: OSError) -> Abort:
        """Returns: the abort of a read from the flow's source that failed."""
        return (
            self._upstream_failed(error) if flow is self.response else self._abort(self.client, Operation.READ, error)
        )

    def _write_failed(self, flow: Flow, error: OSError) -> None:
        """A write to the flow's sink failed. Upstream's failure is kept: its answer may be in our receive buffer
        already. Raises: Abort for the client's.
        """
        if flow is self.response:
            raise self._abort(self.client, Operation.WRITE, error) from error
        assert self.upstream is not None
        self._break_request(self._abort(self.upstream, Operation.WRITE, error))

    def _guard(self, endpoint: AnyEndpoint) -> None:
        """Let a message that ends with its connection end in a reset, for as long as it is not whole: whoever closes
        the socket, be it the kernel after this process was killed.
        """
        if endpoint.sock.family != socket.AF_UNIX:
            reset_on_close(endpoint.sock)
            self.guarded.append(endpoint)

    def unguard(self) -> None:
        """What ends with its connection is whole, or was not begun."""
        while self.guarded:
            sock = self.guarded.pop().sock
            if sock.fileno() >= 0:  # upstream's may have been closed, and its reset was right
                fin_on_close(sock)

    def _release_pipe(self, flow: Flow) -> None:
        if flow.pipe is not None:
            self.pipes.give(flow.pipe)
            flow.pipe = None

    def release(self) -> None:
        """Give back what the relay holds besides the sockets. Call it once, when nobody will ask for its counts any
        more: they need what is left in the pipes.
        """
        self._release_pipe(self.request)
        self._release_pipe(self.response)
        if self.broken is not None:
            self.broken.forget_frames()

    def _flush_endpoint(self, endpoint: AnyEndpoint) -> None:
        try:
            endpoint.unflushed = not endpoint.flush()
        except OSError as error:
            raise self._abort(endpoint, Operation.WRITE, error) from error

    def _abort(self, endpoint: AnyEndpoint, operation: Operation, error: OSError) -> Abort:
        phase = self.phase_of(endpoint.side, operation)
        if endpoint.side is Side.UPSTREAM and refuses_certificate(error):
            # Under TLS 1.3 upstream judges our certificate when the handshake is over for us (RFC 8446 §4.4.2.4).
            phase, operation = Phase.TLS_HANDSHAKE, Operation.HANDSHAKE
        return socket_abort(endpoint.side, phase, operation, error, self.settings.dead_peer_limit)

    def _socket_failed(self, endpoint: AnyEndpoint, operation: Operation) -> Abort:
        """Make the abort of a socket that poll reports as failed: the kernel keeps the reason until it is asked."""
        number = endpoint.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        phase = self.phase_of(endpoint.side, operation)
        return failed_socket(endpoint.side, phase, operation, number, self.settings.dead_peer_limit)

    def _add_event(self, side: Side, what: str) -> None:
        if len(self.events) < _MOST_EVENTS:
            self.events.append((time.monotonic(), side, what))


def half_a_request(settings: Settings, phase: Phase, detail: str | None = None) -> Abort:
    """Make the abort of a client that has ended its side in the middle of its request: it is answered only where that
    does not mean that it has left.
    """
    status, error_type = (400, "http_request_error") if settings.allows_half_close else (None, None)
    return Abort(Side.CLIENT, phase, Operation.READ, Cause.CLOSED, status=status, error_type=error_type, detail=detail)
