"""Two readers of one message: the codec, used as the proxy uses it, and h11, the referee.

Both say what they read as a ``Reading``, so that a test compares values.
"""

import collections.abc
import dataclasses
import time
import typing

import h11

from proxy.framing import (
    ChunkedFraming,
    ConnectionFraming,
    Framing,
    NoBody,
    request_framing,
    response_framing,
)
from proxy.grammar import MalformedMessage
from proxy.head import (
    RequestHead,
    ResponseHead,
    SectionMemory,
    check_partial_head,
    parse_request_head,
    parse_response_head,
)

MAX_TRAILER_SIZE = 65536
_HEAD_END = b"\r\n\r\n"


@dataclasses.dataclass(slots=True)
class Reading:
    """What a reader made of the octets. ``refused`` says where; ``start`` is method and target, or the status."""

    refused: typing.Literal["", "head", "body"] = ""
    status: int = 0  # what a server answers to a refused request
    start: tuple[bytes, bytes] | int | None = None
    minor: int = -1
    fields: list[tuple[bytes, bytes]] = dataclasses.field(default_factory=list)
    framing: str = ""
    content: bytes = b""
    complete: bool = False
    rest: bytes = b""


def _pieces(octets: bytes, cuts: typing.Sequence[int]) -> typing.Iterator[bytes]:
    ends = sorted({min(cut, len(octets)) for cut in cuts} | {len(octets)})
    start = 0
    for end in ends:
        if start < end:
            yield octets[start:end]
        start = end


def _trimmed(fields: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    trimmed = [(name, value.strip(b" \t")) for name, value in fields]
    # h11 gives the names of codings in lower case.
    return [(name, value.lower() if name.lower() == b"transfer-encoding" else value) for name, value in trimmed]


def framing_name(framing: Framing) -> str:
    """Returns: the word the corpus uses for a framing."""
    match framing:
        case NoBody():
            return "none"
        case ChunkedFraming():
            return "chunked"
        case ConnectionFraming():
            return "connection"
        case _:
            return "length"


def codec_request(octets: bytes, cuts: typing.Sequence[int] = ()) -> Reading:
    """Read a request with the codec, as it comes in pieces: cut at ``cuts``, and one empty line before it skipped."""
    reading = Reading()
    held = b""
    checked = 0
    head: RequestHead | None = None
    framing: Framing | None = None
    skipped = False
    for piece in _pieces(octets, cuts):
        if framing is None:
            held += piece
            if not skipped and held[:2] == b"\r\n":
                held, skipped = held[2:], True
            if not held or (held == b"\r" and not skipped):
                continue
            head_end = held.find(_HEAD_END)
            try:
                if head_end < 0:
                    check_partial_head(held, checked)
                    checked = len(held)
                    continue
                head = parse_request_head(held[: head_end + 4], SectionMemory())
            except MalformedMessage as error:
                return Reading("head", error.status)
            reading.start, reading.minor = (head.method, head.target), head.minor
            reading.fields = _trimmed(head.section.fields)
            framing = request_framing(head.section, MAX_TRAILER_SIZE)
            piece = held[head_end + 4 :]
        try:
            _take(framing, piece, reading)
        except MalformedMessage as error:
            reading.refused, reading.status = "body", error.status
            return reading
    if framing is None:
        return Reading("head", 408)
    _end(framing, reading)
    return reading


def codec_response(octets: bytes, method: bytes, cuts: typing.Sequence[int] = ()) -> Reading:
    """Read a final response with the codec, interim ones before it, and the end of the connection behind it."""
    reading = Reading()
    held = b""
    framing: Framing | None = None
    memory = SectionMemory()
    for piece in _pieces(octets, cuts):
        if framing is None:
            held += piece
            head: ResponseHead | None = None
            while head is None and (head_end := held.find(_HEAD_END)) >= 0:
                try:
                    head = parse_response_head(held[: head_end + 4], memory)
                except MalformedMessage:
                    return Reading("head", 502)
                held = held[head_end + 4 :]
                if head.status < 200:
                    head = None
            if head is None:
                continue
            reading.start, reading.minor = head.status, head.minor
            reading.fields = _trimmed(head.section.fields)
            framing = response_framing(head.status, head.section, method, MAX_TRAILER_SIZE)
            piece = held
        try:
            _take(framing, piece, reading)
        except MalformedMessage:
            reading.refused, reading.status = "body", 502
            return reading
    if framing is None:
        return Reading("head", 502)
    if isinstance(framing, ConnectionFraming):
        framing.complete = True
    _end(framing, reading)
    return reading


def _take(framing: Framing, piece: bytes, reading: Reading) -> None:
    if framing.complete:
        reading.rest += piece
        return
    spans: list[tuple[int, int]] = []
    stop = framing.feed(piece, 0, len(piece), spans)
    assert stop == len(piece) or framing.complete, "octets left over from a message that is not complete"
    reading.content += b"".join(piece[start:end] for start, end in spans)
    reading.rest += piece[stop:]


def _end(framing: Framing, reading: Reading) -> None:
    reading.framing = framing_name(framing)
    reading.complete = framing.complete
    assert framing.content == len(reading.content), "the count of content is not its length"


def h11_request(octets: bytes) -> Reading:
    """Read a request with h11."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(octets)
    return _h11_reading(connection)


def h11_response(octets: bytes, method: bytes) -> Reading:
    """Read a response with h11, and the end of the connection behind it."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    connection.send(h11.Request(method=method, target=b"/", headers=[(b"Host", b"a")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(octets)
    return _h11_reading(connection)


def _h11_reading(connection: h11.Connection) -> Reading:
    reading = Reading()
    ended = False
    while True:
        try:
            event = connection.next_event()
            if event is h11.NEED_DATA and connection.our_role is h11.CLIENT and not ended and reading.start is not None:
                ended = True
                connection.receive_data(b"")
                continue
        except h11.RemoteProtocolError:
            if ended and reading.start is not None:
                return reading  # cut short
            reading.refused = "head" if reading.start is None else "body"
            return reading
        match event:
            case h11.Request():
                reading.start = (event.method, event.target)
            case h11.Response():
                reading.start = event.status_code
            case h11.Data():
                reading.content += bytes(event.data)
            case h11.EndOfMessage():
                reading.complete = True
                reading.rest = connection.trailing_data[0]
                return reading
            case h11.InformationalResponse():
                continue
            case _:
                if reading.start is None:
                    reading.refused = "head"  # its end never came
                return reading
        if isinstance(event, h11.Request | h11.Response):
            reading.minor = 0 if event.http_version == b"1.0" else 1
            reading.fields = _trimmed(event.headers.raw_items())


def check_linear(make: collections.abc.Callable[[int], collections.abc.Callable[[], object]], size: int) -> None:
    """Assert that work of 16 times the size takes nothing like the 256 times as long of a quadratic algorithm.

    ``make(size)`` returns the work. CPU time of this thread alone is compared, and the best of several runs: a loaded
    machine makes both sides slower, for some runs, and what is quadratic is so in all of them. (Most of the work is
    done inside of ``re``, where nothing can be counted.)
    """
    works = make(size), make(16 * size)
    best = [1 << 62, 1 << 62]
    for run in range(12):
        for which, work in enumerate(works):
            began = time.thread_time_ns()
            work()
            best[which] = min(best[which], time.thread_time_ns() - began)
        # Below 50 µs the clock and the call itself are what is measured.
        if run >= 2 and best[1] < 64 * max(best[0], 50_000):
            return
    raise AssertionError(f"{size}: {best[0]} ns, 16 times that: {best[1]} ns")
