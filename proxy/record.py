"""What is known of one request, and the one terminal event it ends in, whatever happens.

``Record`` is a context manager around everything that is done for a request. It sees every exception: an ``Abort`` as
it is, anything else as a bug of the proxy's own (``cause: internal``). It decides which of the three events is
written, writes it once, and counts it. How the client is answered is decided by its owner, through ``settle``, in
between.
"""

import collections.abc
import errno
import json
import os
import socket
import ssl
import threading
import time
import traceback
import types
import typing

from .aborts import Abort
from .head import RequestHead
from .inflight import InFlight, Slot
from .limits import Bound, Limit
from .log import SCHEMA_VERSION, EventLog, timestamp
from .masking import mask_secrets, printable
from .relay import AtOnce, Relay
from .vocabulary import Cause, Operation, Phase, Side

_Made = typing.TypeVar("_Made")
_BYTE_COUNTS = (
    "client_read",
    "client_written",
    "upstream_read",
    "upstream_written",
    "request_body",
    "response_body",
)
_quote = json.encoder.encode_basestring_ascii
# A longer target goes the general way, where what is too long for a line is cut.
_LONG_TARGET = 4096
# Of method and target in a message, in characters.
_MOST_WORDS = 300


class Tally:
    """Counts of requests, shared between the worker, its threads and the main process."""

    NAMES = ("begun", "complete", "reject", "abort", "connections", "lost_lines")

    __slots__ = ("_cells", "_lock")

    def __init__(self, cells: memoryview) -> None:
        """``cells`` are ``len(NAMES)`` unsigned 64-bit numbers in memory that may be shared between processes."""
        self._cells = cells
        # Guards _cells against the other threads of this process, the only one that writes them.
        self._lock = threading.Lock()

    def add(self, index: int, count: int = 1) -> None:
        """Add to the count of ``NAMES[index]``."""
        with self._lock:
            self._cells[index] += count

    def set(self, index: int, value: int) -> None:
        """Set what is no count of events: ``connections`` of a dead worker."""
        with self._lock:
            self._cells[index] = value

    def counts(self) -> dict[str, int]:
        """Returns: all counts by name."""
        return dict(zip(self.NAMES, self._cells, strict=True))


BEGUN, COMPLETE, REJECT, ABORT, CONNECTIONS, LOST_LINES = range(6)
_EVENT_INDEX = {"request.complete": COMPLETE, "request.reject": REJECT, "request.abort": ABORT}


class AboutConnection:
    """What all records of a client connection say alike."""

    __slots__ = ("client", "client_text", "connection_id", "fields_text", "pid", "slot")

    def __init__(self, connection_id: str, client: str, pid: int, slot: Slot) -> None:
        """``slot`` keeps account of the request in flight, should the worker die."""
        self.connection_id = connection_id
        self.client = client
        self.pid = pid
        self.slot = slot
        # Ready for a line of JSON, as they are in every one.
        self.client_text = _quote(client)[1:-1]
        self.fields_text = f'"connection_id":"{connection_id}","pid":{pid},"client":{_quote(client)}'


class Record:
    """One request from its first byte to its event. Used by the thread of the connection; others may read it."""

    __slots__ = (
        "_log",
        "_settle",
        "_tally",
        "abort",
        "about",
        "answered",
        "answered_bytes",
        "at_once",
        "attempts",
        "client_evidence",
        "connected_at",
        "first_at",
        "head",
        "head_at",
        "head_read",
        "phase",
        "relay",
        "request_id",
        "request_line",
        "told_at",
        "upstream",
        "upstream_evidence",
    )

    def __init__(
        self,
        log: EventLog,
        tally: Tally,
        settle: collections.abc.Callable[["Record", Abort | None], Abort | None],
        request_id: str,
        about: AboutConnection,
        first_at: float,
    ) -> None:
        """A request has begun: its first byte came at ``first_at``.

        ``settle`` is called once at the end: it reads the evidence, answers the client, and returns the abort if
        there is one, since the end of a response can still fail.
        """
        self._log = log
        self._tally = tally
        self._settle = settle
        self.request_id = request_id
        self.about = about
        self.first_at = first_at
        self.head: RequestHead | None = None
        # Method, and target if it is known, of a head that was refused or has not come whole.
        self.request_line: tuple[bytes, bytes | None] | None = None
        self.head_read = 0  # octets of the head
        self.head_at: float | None = None
        self.connected_at: float | None = None
        self.phase = Phase.REQUEST_HEAD  # while there is no relay
        self.at_once: AtOnce | None = None  # what was tried without one
        self.relay: Relay | None = None
        self.upstream: str | None = None
        self.abort: Abort | None = None
        self.answered: int | None = None  # the status of the proxy's own response
        self.told_at: float | None = None  # when the sentence was first made: client and log are told the same
        self.answered_bytes = 0  # written by the proxy itself, its own response or last line
        self.attempts: list[dict[str, object]] = []
        self.client_evidence: dict[str, object] | None = None
        self.upstream_evidence: dict[str, object] | None = None
        tally.add(BEGUN)

    def __enter__(self) -> "Record":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> bool:
        """Settle, write the event, count it. Swallows every ``Exception``: it is in the event now."""
        abort = None if error is None else error if isinstance(error, Abort) else self._bug(error)
        try:
            abort = self._settle(self, abort)
        except Exception as bug:  # noqa: BLE001  # the promise of one event holds for bugs of the ending, too
            if abort is None:
                abort = self._bug(bug)
            else:
                abort.add_note(f"while ending: {bug!r}")
        self.abort = abort
        if abort is None:
            event, level = "request.complete", "info"
        elif abort.reject:
            event, level = "request.reject", "warning"
        else:
            event, level = "request.abort", "warning"
        self.about.slot.end()
        try:
            if abort is None:
                if self._log.info_enabled:
                    self._log.write(self._complete_line())
            else:
                self._log.event(level, event, **self.fields(abort))
        except Exception as bug:  # noqa: BLE001  # a bug in making the line must not cost the line
            self._log.event(level, event, **self._fields_despite(bug, abort))
            self._log.event(
                "error",
                "internal.error",
                message=f"a bug in making the record of request {self.request_id}: {bug!r}",
                request_id=self.request_id,
                pid=self.about.pid,
                traceback=_traceback_text(bug),
            )
        # After the line: should the worker die in between, the balance tells of it.
        self._tally.add(_EVENT_INDEX[event])
        return error is None or isinstance(error, Exception)

    def _bug(self, error: BaseException) -> Abort:
        cause = Cause.RESOURCE if isinstance(error, MemoryError) else Cause.INTERNAL
        phase = self.relay.phase_of(Side.PROXY, Operation.READ) if self.relay is not None else self.phase
        return Abort(Side.PROXY, phase, None, cause, original=error)

    # -- what the event says -----------------------------------------------------------------------

    def method_and_target(self) -> tuple[str | None, str | None]:
        """Returns: both as they are logged, None where the head never told."""
        if self.head is not None:
            return printable(self.head.method), printable(self.head.masked_target())
        if self.request_line is not None:
            method, target = self.request_line
            return printable(method), printable(mask_secrets(target)) if target is not None else None
        return None, None

    def bytes(self) -> dict[str, int]:
        """Returns: the ``bytes`` field."""
        relay, at_once = self.relay, self.at_once
        if relay is None:
            if at_once is None:
                counts = dict.fromkeys(_BYTE_COUNTS, 0)
                counts["client_read"] = self.head_read
                counts["client_written"] = self.answered_bytes
                return counts
            return {
                "client_read": self.head_read + at_once.request_read,
                "client_written": at_once.client_written + self.answered_bytes,
                "upstream_read": len(at_once.answer or b""),
                "upstream_written": at_once.upstream_written,
                "request_body": at_once.request_read if at_once.upstream_written else 0,
                "response_body": at_once.framing.content if at_once.last_byte_at is not None else 0,
            }
        return {
            "client_read": self.head_read + relay.request.read,
            "client_written": relay.response.written + self.answered_bytes,
            "upstream_read": relay.response.read + len(relay.partial_head),
            "upstream_written": relay.request.written,
            "request_body": relay.request.relayed_content(),
            "response_body": relay.response.relayed_content(),
        }

    def status(self) -> int | None:
        """Returns: what the client was sent."""
        if self.answered is not None:
            return self.answered
        relay = self.relay
        exchange = relay or self.at_once
        if exchange is None or exchange.response_head is None:
            return None
        is_out = relay.head_out if relay is not None else exchange.last_byte_at is not None
        return exchange.response_head.status if is_out else None

    def _complete_line(self) -> str:
        """The line of ``request.complete``, without the general way through dictionaries where nothing is out of the
        ordinary.

        It is written for every small request, and the general way takes three times as long (scripts/bench).
        """
        head, first_at, head_at, connected_at = self.head, self.first_at, self.head_at, self.connected_at
        relay = self.relay
        exchange = relay or self.at_once
        assert head is not None
        assert exchange is not None
        response_head, sent_at = exchange.response_head, exchange.sent_at
        first_byte_at, last_byte_at = exchange.first_byte_at, exchange.last_byte_at
        logged = head.logged or _say_alike(head)
        if (
            logged is None
            or self.attempts
            or (relay is not None and (relay.events or relay.tunnel))
            or response_head is None
            or head_at is None
            or connected_at is None
            or sent_at is None
            or first_byte_at is None
            or last_byte_at is None
        ):
            return self._log.formatter.line("info", "request.complete", self.fields(None))
        what, method_and_target, expected_request = logged
        about = self.about
        counts = self.bytes()
        duration = f"{last_byte_at - first_at:.6f}"
        status = response_head.status
        expected_response = response_head.section.content_length
        return (
            f'{{"time":"{timestamp()}","level":"info","event":"request.complete","schema_version":{SCHEMA_VERSION},'
            f'"message":"{what} answered {status} in {duration} s: {counts["response_body"]:,} bytes of content'
            f' to client {about.client_text}","request_id":"{self.request_id}",{about.fields_text},'
            f'"upstream":{_quote(self.upstream or "")},{method_and_target},"status":{status},'
            f'"bytes":{{"client_read":{counts["client_read"]},"client_written":{counts["client_written"]},'
            f'"upstream_read":{counts["upstream_read"]},"upstream_written":{counts["upstream_written"]},'
            f'"request_body":{counts["request_body"]},"response_body":{counts["response_body"]}}},'
            f'"expected":{{"request_body":{expected_request},'
            f'"response_body":{"null" if expected_response is None else expected_response}}},'
            f'"duration_s":{duration},"timing_s":{{"head":{head_at - first_at:.6f},'
            f'"connected":{connected_at - first_at:.6f},"request_sent":{sent_at - first_at:.6f},'
            f'"first_byte":{first_byte_at - first_at:.6f},"last_byte":{duration}}}}}\n'
        )

    def fields(self, abort: Abort | None) -> dict[str, object]:
        """Returns: the fields of the contract, those of an abort included if there is one."""
        now = time.monotonic()
        relay, at_once = self.relay, self.at_once
        if relay is not None:
            if abort is None and relay.ended_at is not None:
                now = relay.ended_at  # what was awaited after that is its delivery
        elif at_once is not None and at_once.last_byte_at is not None:
            now = at_once.last_byte_at
        first_at = self.first_at
        method, target = self.method_and_target()
        moments: dict[str, float | None] = {"head": self.head_at, "connected": self.connected_at}
        response_head = None
        exchange = relay or at_once  # both tell these under the same names
        if exchange is not None:
            response_head = exchange.response_head
            moments["request_sent"] = exchange.sent_at
            moments["first_byte"] = exchange.first_byte_at
            moments["last_byte"] = exchange.last_byte_at
        fields: dict[str, object] = {
            "message": "",
            "request_id": self.request_id,
            "connection_id": self.about.connection_id,
            "pid": self.about.pid,
            "client": self.about.client,
            "upstream": self.upstream,
            "method": method,
            "target": target,
            "status": self.status(),
            "bytes": self.bytes(),
            "expected": {
                "request_body": self.head.section.content_length if self.head is not None else None,
                "response_body": response_head.section.content_length if response_head is not None else None,
            },
            "duration_s": round(now - first_at, 6),
            "timing_s": {name: round(at - first_at, 6) for name, at in moments.items() if at is not None},
        }
        if self.attempts:
            fields["attempts"] = self.attempts
        if relay is not None and relay.events and abort is None:
            fields["events"] = self._events()
        if abort is not None:
            fields |= self._abort_fields(abort, now)
            fields["message"] = self.sentence(abort)
        elif response_head is not None:
            content = self.bytes()["response_body"]
            client = self.about.client
            answered = f"{request_words(method, target)} answered {self.status()} in {now - first_at:.6f} s"
            fields["message"] = f"{answered}: {content:,} bytes of content to client {client}"
        return fields

    def _fields_despite(self, bug: Exception, abort: Abort | None) -> dict[str, object]:
        """Returns: the fields after making them has met a bug: each by itself, and by default what can't be made."""
        now = time.monotonic()
        unknown: tuple[str | None, str | None] = (None, None)
        method, target = _try(self.method_and_target, unknown)
        fields: dict[str, object] = {
            "message": f"{request_words(method, target)} ended after {now - self.first_at:.1f} s",
            "request_id": self.request_id,
            "connection_id": self.about.connection_id,
            "pid": self.about.pid,
            "client": self.about.client,
            "upstream": self.upstream,
            "method": method,
            "target": target,
            "status": _try(self.status, None),
            "bytes": _try(self.bytes, dict.fromkeys(_BYTE_COUNTS, 0)),
            "expected": {"request_body": None, "response_body": None},
            "duration_s": round(now - self.first_at, 6),
            "timing_s": {},
        }
        if abort is not None:
            least: dict[str, object] = {
                "side": abort.side,
                "phase": abort.phase,
                "operation": abort.operation,
                "cause": abort.cause,
                "limit": _try(lambda: describe_limit(abort), None),
                "error_type": abort.error_type,
                "exception": _try(lambda: describe_exception(abort.original), None),
                "stalled_s": {},
                "socket": {"client": self.client_evidence, "upstream": self.upstream_evidence},
                "events": [],
            }
            fields |= _try(lambda: self._abort_fields(abort, now), least)
            fields["message"] = _try(lambda: self.sentence(abort), f"{fields['message']}: {abort.cause}")
        else:
            nothing: dict[str, object] = {}
            fields |= _try(lambda: self.fields(None), nothing)
        if self.attempts:
            fields["attempts"] = self.attempts
        fields["notes"] = [*getattr(abort, "__notes__", ()), f"while making this record: {bug!r}"]
        return fields

    def _abort_fields(self, abort: Abort, now: float) -> dict[str, object]:
        fields = describe_abort(abort) | {
            "exception": describe_exception(self._first_error(abort)),
            "stalled_s": self._stalled(now, refused=abort.reject),
            "socket": {"client": self.client_evidence, "upstream": self.upstream_evidence},
            "events": self._events(),
        }
        notes = getattr(abort, "__notes__", None)
        if notes:
            fields["notes"] = list(notes)
        if abort.cause is Cause.INTERNAL and abort.original is not None:
            fields["traceback"] = _traceback_text(abort.original)
        return fields

    def _first_error(self, abort: Abort) -> BaseException | None:
        """Returns: what was met first: the error of a write that upstream did not take, if there was one. A TLS alert
        that is read behind it was sent before, and is why.
        """
        broken = self.relay.broken if self.relay is not None else None
        if broken is None or broken.original is None or isinstance(abort.original, ssl.SSLError):
            return abort.original
        return broken.original

    def _events(self) -> list[dict[str, object]]:
        noted = self.relay.events if self.relay is not None else []
        return [{"t": round(at - self.first_at, 6), "side": side, "what": what} for at, side, what in noted]

    def _stalled(self, now: float, *, refused: bool) -> dict[str, float]:
        """Time since the last byte moved, for each side and direction that was open."""
        relay = self.relay
        if relay is None:
            # A head that was not whole was being read; one that was refused leaves nothing open.
            return {"client_read": round(now - self.first_at, 6)} if self.head is None and not refused else {}
        began = self.connected_at or self.head_at or self.first_at
        stalled: dict[str, float] = {}
        if not relay.request.framing.complete:
            stalled["client_read"] = round(now - (relay.request.last_read_at or self.head_at or self.first_at), 6)
        if not relay.request.finished and relay.upstream is not None:
            stalled["upstream_write"] = round(now - (relay.request.last_written_at or began), 6)
        if not relay.response.finished and relay.upstream is not None:
            stalled["upstream_read"] = round(now - (relay.response.last_read_at or began), 6)
            stalled["client_write"] = round(now - (relay.response.last_written_at or began), 6)
        return stalled

    def sentence(self, abort: Abort) -> str:
        """Returns: one plain sentence a person can act on: side, cause, limit with value and source, bytes."""
        method, target = self.method_and_target()
        what = request_words(method, target)
        if self.told_at is None:
            self.told_at = time.monotonic()
        duration_s = self.told_at - self.first_at
        counts = self.bytes()
        client, upstream = f"client {self.about.client}", f"upstream {self.upstream or self._upstream_setting()}"
        who = {Side.CLIENT: client, Side.UPSTREAM: upstream, Side.PROXY: "the proxy"}[abort.side]
        detail = f" ({abort.detail})" if abort.detail else ""
        limit = f"{abort.limit}" if abort.limit is not None else "a limit"
        why = _error_text(abort.original)
        where = _PHASE_WORDS[abort.phase]
        ended = f"ended {what} after {duration_s:.1f} s"
        match abort.cause:
            case Cause.TIMEOUT | Cause.DEADLINE:
                begin = f"{limit} {ended}"
            case Cause.LIMIT:
                begin = f"{limit} {ended}{detail}"
            case Cause.DEAD_PEER:
                by = f" for longer than {limit}" if abort.limit is not None else ""
                begin = f"{who} has answered nothing at all{by} (dead peer), which {ended}"
            case Cause.CLOSED:
                begin = f"{who} closed the connection {where} and {ended}{detail}"
            case Cause.RESET:
                begin = f"{who} reset the connection {where} and {ended}{detail}"
            case Cause.REFUSED | Cause.UNREACHABLE | Cause.DNS:
                begin = f"{who} could not be reached ({abort.cause}: {why}), which {ended}"
            case Cause.TLS if isinstance(abort.original, ssl.SSLEOFError):
                begin = f"{who} cut the TLS connection without close_notify {where} and {ended}{detail}"
            case Cause.TLS:
                begin = f"TLS with {who} failed {where} ({why}), which {ended}"
            case Cause.PROTOCOL:
                kind = "response" if abort.side is Side.UPSTREAM else "request"
                begin = f"{who} sent a {kind} that is not valid HTTP/1.1: {abort.detail or why}"
            case Cause.FORBIDDEN | Cause.UNAUTHORIZED:
                begin = f"{what} of {client} was refused{detail}"
            case Cause.RESOURCE:
                begin = f"the proxy ran out of a resource ({why}), which {ended}{detail}"
            case Cause.KILLED:
                begin = f"an order through the admin listener {ended}"
            case Cause.SHUTDOWN:
                begin = f"the proxy was told to stop and {ended}"
            case Cause.INTERNAL:
                begin = f"a bug in the proxy {ended} ({why})"
            case _:
                typing.assert_never(abort.cause)
        if abort.reject:
            return f"{begin}; nothing of it went upstream"
        return f"{begin}: {self._progress(abort, counts, client, upstream)}"

    def _upstream_setting(self) -> str:
        """Returns: where upstream should have been, for a request that did not get there."""
        return str(self.relay.settings.upstream) if self.relay is not None else "not asked"

    def _progress(self, abort: Abort, counts: dict[str, int], client: str, upstream: str) -> str:
        relay = self.relay
        if abort.phase is Phase.REQUEST_HEAD:
            return f"{counts['client_read']:,} bytes of the request head had come from {client}"
        if relay is None and counts["upstream_written"]:
            answered = counts["upstream_read"]
            return f"the request was sent from {client}, {upstream} had answered {answered:,} bytes"
        if relay is None or relay.upstream is None:
            return f"nothing of it had reached upstream from {client}{' in the last attempt' if self.attempts else ''}"
        if abort.phase is Phase.TUNNEL:
            return _tunnelled(counts, client, upstream)
        if abort.phase is Phase.REQUEST_BODY:
            length = self.head.section.content_length if self.head is not None else None
            unread = _unacknowledged(self.upstream_evidence)
            sent = f"{counts['request_body']:,}{_of(length)} bytes of the request body had gone to {upstream}{unread}"
            return f"{sent} from {client}"
        if not relay.head_out:
            unread = _unacknowledged(self.upstream_evidence)
            waiting = f"the request was sent{unread}" if relay.request.finished else "the request was being sent"
            if relay.broken is not None:
                waiting = "upstream had stopped reading the request"
            answered = counts["upstream_read"]
            return f"{waiting} and no response had reached {client}, {upstream} had answered {answered:,} bytes"
        if relay.response.framing.complete or relay.hung_up_at is not None:
            state = "had sent all of it"  # of a client's abort: else upstream's failure would have decided
        else:
            state = "was still sending" if counts["response_body"] else "had not ended it"
        doing = f", {upstream} {state}" if abort.side is not Side.UPSTREAM else ""
        length = relay.response_head.section.content_length if relay.response_head is not None else None
        unread = _unacknowledged(self.client_evidence)
        return f"{counts['response_body']:,}{_of(length)} bytes of the response had gone to {client}{unread}{doing}"


def left_in_flight(request: InFlight, cause: Cause, pid: int, how: str) -> dict[str, object]:
    """Make the record of a request from what its worker noted last, as the worker has died and can't.

    ``how`` ends the sentence "process ``pid`` ended ...": "by signal 9", "with status 1".
    Returns: the fields of ``request.abort``.
    """
    abort = Abort(Side.PROXY, request.phase, None, cause)
    method = printable(request.method) if request.method is not None else None
    target = printable(request.target) if request.target is not None else None
    what = request_words(method, target)
    duration_s = time.monotonic() - request.first_at
    counts = {name: getattr(request, name) for name in _BYTE_COUNTS}
    client, upstream = f"client {request.client}", f"upstream {request.upstream or '(none yet)'}"
    if request.phase is Phase.TUNNEL:
        progress = _tunnelled(counts, client, upstream)  # what was announced is the body that asked for it
    else:
        there = f"{counts['request_body']:,}" + _of(request.expected_request)
        back = f"{counts['response_body']:,}" + _of(request.expected_response)
        progress = f"{there} bytes of the request body had gone from {client} to {upstream},"
        progress += f" {back} bytes of the response back"
    ended = f"the proxy's worker process {pid} ended {how}, which ended {what} after {duration_s:.1f} s"
    return {
        "message": f"{ended}: {progress}",
        # Where it is not known nobody has been told of it either.
        "request_id": request.request_id or os.urandom(10).hex(),
        "connection_id": request.connection_id,
        "pid": pid,
        "client": request.client,
        "upstream": request.upstream,
        "method": method,
        "target": target,
        "status": request.status,
        "bytes": counts,
        "expected": {"request_body": request.expected_request, "response_body": request.expected_response},
        "duration_s": round(duration_s, 6),
        "timing_s": {},
        **describe_abort(abort),
        "stalled_s": {},
        "socket": {"client": None, "upstream": None},
        "events": [],
    }


def _say_alike(head: RequestHead) -> tuple[str, str, str] | None:
    """Make, and keep with it, what the lines of all complete requests of this head say alike: for the message, the
    fields for method and target, the announced length of the body. Returns: None where a line might be too long.
    """
    if len(head.method) + len(head.target) > _LONG_TARGET:
        return None
    method = head.method.decode("ascii")  # a token: nothing in it needs escaping
    target = head.masked_target().decode("ascii")
    quoted = _quote(target)
    length = head.section.content_length
    expected = "null" if length is None else str(length)
    words = _quote(request_words(method, target))[1:-1]
    head.logged = logged = (words, f'"method":"{method}","target":{quoted}', expected)
    return logged


def request_words(method: str | None, target: str | None) -> str:
    """Returns: the request as a message names it, a long target cut and marked; the field ``target`` has all of it."""
    if method is None:
        return "a request"
    if target is None:
        return f"a request ({method})"
    words = f"{method} {target}"
    return words if len(words) <= _MOST_WORDS else words[:_MOST_WORDS] + "..."


def _of(length: int | None) -> str:
    """Returns: what follows a count of content whose announced length is known."""
    return f" of {length:,}" if length is not None else ""


def _tunnelled(counts: dict[str, int], client: str, upstream: str) -> str:
    """Returns: what had passed through a tunnel, each way."""
    there, back = counts["request_body"], counts["response_body"]
    return f"{there:,} bytes had passed from {client} to {upstream}, {back:,} bytes back"


def _unacknowledged(evidence: dict[str, object] | None) -> str:
    """Returns: what is to be added where octets were written to a socket and are not known to have arrived."""
    count = evidence["unacked_bytes"] if evidence is not None else 0
    return f" ({count:,} bytes unacknowledged)" if isinstance(count, int) and count else ""


def _try(make: collections.abc.Callable[[], _Made], default: _Made) -> _Made:
    try:
        return make()
    except Exception:  # noqa: BLE001  # the bug that led here is told already, and the record must be made
        return default


def _traceback_text(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-8192:]


_PHASE_WORDS = {
    Phase.TLS_HANDSHAKE: "during the TLS handshake",
    Phase.REQUEST_HEAD: "in the middle of the request head",
    Phase.CONNECT: "while upstream was being connected",
    Phase.REQUEST_BODY: "in the middle of the request body",
    Phase.RESPONSE_HEAD: "while the response was awaited",
    Phase.RESPONSE_BODY: "in the middle of the response",
    Phase.TUNNEL: "in the middle of the tunnel",
}


def _error_text(error: BaseException | None) -> str:
    if error is None:
        return "no further reason"
    if isinstance(error, OSError) and error.strerror:
        return printable(error.strerror.encode("utf-8", "backslashreplace"))[:200]
    return printable(f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace"))[:200]


def describe_abort(abort: Abort) -> dict[str, object]:
    """Returns: the fields that say whose doing an abort was, when and why."""
    return {
        "side": abort.side,
        "phase": abort.phase,
        "operation": abort.operation,
        "cause": abort.cause,
        "limit": describe_limit(abort),
        "error_type": abort.error_type,
        "exception": describe_exception(abort.original),
    }


def describe_exception(error: BaseException | None) -> dict[str, object] | None:
    """Returns: the ``exception`` field: class, errno name and text, or None."""
    if error is None:
        return None
    number = error.errno if isinstance(error, OSError) else None
    name = None
    if isinstance(error, socket.gaierror):
        # Its errno is one of getaddrinfo's own codes; SSLError's is OpenSSL's, and has no name.
        name = next((n for n in dir(socket) if n.startswith("EAI_") and getattr(socket, n) == number), None)
    elif isinstance(number, int) and not isinstance(error, ssl.SSLError):
        name = errno.errorcode.get(number)
    return {
        "class": type(error).__name__,
        "errno": name,
        "text": printable(str(error).encode("utf-8", "backslashreplace"))[:1024],
    }


def describe_limit(abort: Abort) -> dict[str, object] | None:
    """Returns: the ``limit`` field, or None where no option is behind the abort."""
    match abort.limit:
        case Limit(name, seconds, source):
            limit: dict[str, object] = {"name": name, "seconds": seconds, "source": source}
            if abort.elapsed_s is not None:
                limit["elapsed_s"] = round(abort.elapsed_s, 3)
            return limit
        case Bound(name, value, source):
            return {"name": name, "value": value, "source": source}
        case None:
            return None
