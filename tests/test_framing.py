"""Framing: the same end and the same content however the octets come, h11's reading of it, and time."""

import collections.abc

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.framing import (
    ENDLESS,
    NO_BODY,
    ChunkedFraming,
    ConnectionFraming,
    Framing,
    LengthFraming,
    request_framing,
    response_framing,
)
from proxy.grammar import MAX_CHUNK_LINE, MAX_FIELDS, MalformedMessage
from proxy.head import HeaderSection
from referee import check_linear

_REST = b"GET / HTTP/1.1\r\n"
_ODD = [b"\r", b"\n", b"\r\n", b"\x00", b" ", b";", b'"', b"0", b"5", b"x", b":"]
_SIZES = [b"%x", b"%X", b"0%x", b"%015x"]
_EXTENSIONS = [b"", b"", b";a", b";a=b", b';a="b;\\"\\r\\n"', b";a;b=c"]
_TRAILERS = [b"", b"", b"X: y\r\n", b"X:\r\nY: \xe9\r\n", b"Z: " + b"z" * 40 + b"\r\n"]


@st.composite
def _bodies(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Bodies in the chunked coding, and their content."""
    contents = draw(st.lists(st.binary(min_size=1, max_size=20), max_size=5))
    octets = b""
    for content in contents:
        size = draw(st.sampled_from(_SIZES)) % len(content)
        octets += size + draw(st.sampled_from(_EXTENSIONS)) + b"\r\n" + content + b"\r\n"
    last = draw(st.sampled_from([b"0", b"000"])) + draw(st.sampled_from(_EXTENSIONS)) + b"\r\n"
    return octets + last + draw(st.sampled_from(_TRAILERS)) + b"\r\n", b"".join(contents)


@st.composite
def _spoiled(draw: st.DrawFn) -> bytes:
    """Such bodies with something put in or taken out, and octets behind."""
    octets = draw(_bodies())[0] + _REST
    for _ in range(draw(st.sampled_from([0, 1, 1, 2]))):
        start = draw(st.integers(0, len(octets)))
        octets = octets[:start] + draw(st.sampled_from(_ODD)) + octets[start + draw(st.sampled_from([0, 1, 2])) :]
    return octets


_cuts = st.lists(st.integers(0, 200), max_size=10)


def _pieces(octets: bytes, cuts: list[int]) -> collections.abc.Iterator[bytes]:
    ends = [*sorted({cut for cut in cuts if 0 < cut < len(octets)}), len(octets)]
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        yield octets[start:end]


def _read(framing: Framing, pieces: collections.abc.Iterable[bytes]) -> tuple[bytes, bytes]:
    """Feed until the message is complete. Returns: its content, and what is left. Raises: MalformedMessage."""
    content = rest = b""
    for piece in pieces:
        if framing.complete:
            rest += piece
            continue
        spans: list[tuple[int, int]] = []
        before = framing.content
        stop = framing.feed(piece, 0, len(piece), spans)
        assert stop == len(piece) or framing.complete
        taken = b"".join(piece[start:end] for start, end in spans)
        assert len(taken) == framing.content - before
        content += taken
        rest += piece[stop:]
    return content, rest


def _verdict(framing: Framing, pieces: collections.abc.Iterable[bytes]) -> object:
    try:
        content, rest = _read(framing, pieces)
    except MalformedMessage:
        return "refused"
    return content, rest, framing.complete, framing.content


# The chunked coding: any way it comes.


@given(_bodies(), _cuts)
def test_chunked_content_and_end(body: tuple[bytes, bytes], cuts: list[int]) -> None:
    octets, content = body
    framing = ChunkedFraming()
    assert _read(framing, _pieces(octets + _REST, cuts)) == (content, _REST)
    assert framing.complete
    assert framing.content == len(content)


@given(_spoiled(), _cuts, st.sampled_from([8, 40, 65536]))
def test_chunked_any_split_is_the_same(octets: bytes, cuts: list[int], max_trailer_size: int) -> None:
    whole = _verdict(ChunkedFraming(max_trailer_size), [octets])
    assert _verdict(ChunkedFraming(max_trailer_size), _pieces(octets, cuts)) == whole
    assert _verdict(ChunkedFraming(max_trailer_size), _pieces(octets, list(range(len(octets))))) == whole


@given(_spoiled(), _cuts)
def test_chunked_in_a_window_of_a_bytearray(octets: bytes, cuts: list[int]) -> None:
    """The relay feeds a part of its buffer; what stands around it there is not looked at."""
    whole = _verdict(ChunkedFraming(), [octets])
    framing = ChunkedFraming()
    content = b""
    at = 0
    try:
        for piece in _pieces(octets, cuts):
            buffer = bytearray(b"5\r\n" + piece + b"\r\n\r\n0\r\n")
            spans: list[tuple[int, int]] = []
            stop = framing.feed(buffer, 3, 3 + len(piece), spans) - 3
            content += b"".join(buffer[start:end] for start, end in spans)
            at += stop
            if framing.complete:
                break
    except MalformedMessage:
        assert whole == "refused"
        return
    assert (content, octets[at:], framing.complete, framing.content) == whole


@given(_spoiled())
def test_chunked_is_read_the_same_by_the_referee(octets: bytes) -> None:
    framing = ChunkedFraming()
    try:
        content, rest = _read(framing, [octets])
    except MalformedMessage:
        return
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + octets)
    assert isinstance(connection.next_event(), h11.Request)
    theirs = b""
    while isinstance(event := connection.next_event(), h11.Data):
        theirs += bytes(event.data)
    assert theirs == content
    assert isinstance(event, h11.EndOfMessage) is framing.complete
    if framing.complete:
        assert connection.trailing_data[0] == rest


@given(st.binary(max_size=60), _cuts)
def test_chunked_raises_nothing_but_malformed_message(octets: bytes, cuts: list[int]) -> None:
    framing = ChunkedFraming()
    assert framing.content == 0
    _verdict(framing, _pieces(octets, cuts))


@given(_bodies(), _cuts, st.data())
def test_content_between_counts_any_part(body: tuple[bytes, bytes], cuts: list[int], data: st.DataObject) -> None:
    """What was fed, and only a part of it written: the content in that part, from wherever the framing stood."""
    framing = ChunkedFraming()
    for piece in _pieces(body[0], cuts):
        mark = framing.mark
        spans: list[tuple[int, int]] = []
        framing.feed(piece, 0, len(piece), spans)
        end = data.draw(st.integers(0, len(piece)))
        content = sum(max(0, min(stop, end) - start) for start, stop in spans)
        assert framing.content_between(mark, piece, 0, end)[0] == content
        # The same in two steps.
        middle = data.draw(st.integers(0, end))
        first, mark = framing.content_between(mark, piece, 0, middle)
        assert first + framing.content_between(mark, piece, middle, end)[0] == content


@given(_bodies(), st.lists(st.integers(1, 30), max_size=40))
def test_opaque_octets_may_pass_unseen(body: tuple[bytes, bytes], counts: list[int]) -> None:
    """What a splice does: content goes by without a look at it, and all else is fed."""
    octets, content = body
    framing = ChunkedFraming()
    at = 0
    while not framing.complete:
        count = counts.pop() if counts else 7
        opaque = framing.opaque()
        assert opaque == 0 or octets[at : at + opaque] in content
        if opaque:
            count = min(count, opaque)
            framing.skip(count)
            at += count
        else:
            at = framing.feed(octets, at, min(at + count, len(octets)))
    assert (at, framing.content) == (len(octets), len(content))


def test_between_chunks() -> None:
    octets = b"5;a\r\nhello\r\n0\r\nX: y\r\n\r\n"
    places = []
    framing = ChunkedFraming()
    for at in range(len(octets)):
        if framing.between_chunks:
            places.append(at)
        framing.feed(octets, at, at + 1)
    assert places == [0, 12]
    assert framing.complete


def test_complete_takes_nothing_more() -> None:
    octets = b"0\r\n\r\n"
    for framing in (ChunkedFraming(), LengthFraming(5)):
        assert framing.feed(octets + _REST, 0, len(octets + _REST)) == 5
        assert framing.feed(_REST, 0, len(_REST)) == 0
        assert framing.complete


# The chunked coding: what is refused, and when.


@pytest.mark.parametrize(
    ("octets", "reason"),
    [
        (b"g", "not a chunk size"),
        (b"g\r\n", "not a chunk size"),
        (b"1" * 16, "not a chunk size"),
        (b"1;" + b"a" * MAX_CHUNK_LINE, "not a chunk size"),
        (b"1;" + b"a" * MAX_CHUNK_LINE + b"\r\n", "not a chunk size"),
        (b"5\n", "a line feed without its carriage return in chunked framing"),
        (b"5\rx", "a control character in chunked framing"),
        (b"5\r\r", "a control character in chunked framing"),
        (b"5;\x00", "a control character in chunked framing"),
        (b"1\r\nab", "a chunk longer than its size"),
        (b"1\r\nab\r\n", "a chunk longer than its size"),
        (b"1\r\na\rb", "a control character in chunked framing"),
        (b"1\r\na\n", "a line feed without its carriage return in chunked framing"),
        (b"0\r\nX\r\n", "a trailer field that is no field"),
        (b"0\r\n X: y\r\n", "a trailer field that is no field"),
        (b"0\r\nX: \x7f", "a control character in chunked framing"),
        (b"0\r\nX: y\rZ", "a control character in chunked framing"),
        (b"0\r\nX: y\n", "a line feed without its carriage return in chunked framing"),
        (b"0\r\nHOST: y\r\n", "a trailer field that may only stand in a head"),
        (b"0\r\nKeep-Alive: 1\r\n", "a trailer field that may only stand in a head"),
        (b"0\r\nProxy-Authorization: y\r\n", "a trailer field that may only stand in a head"),
        (b"0\r\nX_Forwarded_For: y\r\n", "a trailer field that may only stand in a head"),
        (b"0\r\nX-Request-Id: y\r\n", "a trailer field that may only stand in a head"),
        (b"0\r\n" + b"X:\r\n" * (MAX_FIELDS + 1), f"more than {MAX_FIELDS} trailer fields"),
    ],
)
@pytest.mark.parametrize("make", [bytes, bytearray])
def test_chunked_refused(octets: bytes, reason: str, make: type[bytes] | type[bytearray]) -> None:
    """At once: none of these is waited with for more."""
    with pytest.raises(MalformedMessage) as caught:
        ChunkedFraming().feed(make(octets), 0, len(octets))
    assert caught.value.reason == reason
    assert 0 <= caught.value.octet < len(octets)
    assert type(caught.value.excerpt) is bytes
    with pytest.raises(MalformedMessage):
        _read(ChunkedFraming(), _pieces(octets, list(range(len(octets)))))


def test_a_trailer_field_that_connection_names_is_refused() -> None:
    """RFC 9110 §7.6.1: it is for the next hop alone, and what passes is not changed."""
    octets = b"0\r\nX-Secret: y\r\n\r\n"
    assert ChunkedFraming().feed(octets, 0, len(octets)) == len(octets)
    with pytest.raises(MalformedMessage) as caught:
        ChunkedFraming(options=frozenset((b"x-secret",))).feed(octets, 0, len(octets))
    assert caught.value.excerpt == b"x-secret"  # no value: it may be a secret


@pytest.mark.parametrize("end", [b"\n", b"\x01", b"\rx"])
def test_no_value_of_a_trailer_is_quoted(end: bytes) -> None:
    for octets in (b"0\r\nX-Secret: hunter2" + end, b"0\r\nX Secret: hunter2\r\n", b"0\r\nX:hunter2" + end):
        for pieces in ([octets], _pieces(octets, list(range(len(octets))))):
            with pytest.raises(MalformedMessage) as caught:
                _read(ChunkedFraming(), pieces)
            assert b"hunter" not in caught.value.excerpt


def test_what_may_be_taken_for_the_end_is_undecided_until_it_is_the_end() -> None:
    octets = b"1;e=f\r\na\r\n00\r\nX: y\r\n\r\n"
    framing = ChunkedFraming()
    found = []
    for i in range(len(octets)):
        framing.feed(octets, i, i + 1)
        found.append(framing.undecided)
    size_line, content, last = [1, 2, 3, 4, 5, 6, 0], [0, 0, 0], list(range(1, 12))
    assert found == size_line + content + [*last, 0]
    assert ChunkedFraming().feed(octets, 0, len(octets)) == len(octets)


def test_size_of_trailer_section() -> None:
    section = b"X: y\r\nZ:\r\n"
    for cuts in ([], list(range(30))):
        framing = ChunkedFraming(len(section))
        _read(framing, _pieces(b"0\r\n" + section + b"\r\n", cuts))
        assert framing.complete
        with pytest.raises(MalformedMessage) as caught:
            _read(ChunkedFraming(len(section) - 1), _pieces(b"0\r\n" + section + b"\r\n", cuts))
        assert (caught.value.status, caught.value.bound) == (431, "max_head_size")


# The other framings.


@given(st.integers(1, 40), st.binary(max_size=60), _cuts)
def test_length(length: int, octets: bytes, cuts: list[int]) -> None:
    framing = LengthFraming(length)
    assert _read(framing, _pieces(octets, cuts)) == (octets[:length], octets[length:])
    assert framing.complete is (len(octets) >= length)
    assert framing.content == min(length, len(octets))
    assert framing.opaque() == length - framing.content
    assert framing.content_between(framing.mark, octets, 2, 9)[0] == 7


def test_length_skipped() -> None:
    framing = LengthFraming(10)
    framing.skip(4)
    assert (framing.content, framing.complete, framing.opaque()) == (4, False, 6)
    framing.skip(6)
    assert (framing.content, framing.complete, framing.opaque()) == (10, True, 0)
    assert LengthFraming(0).complete


@given(st.binary(max_size=60), _cuts)
def test_connection(octets: bytes, cuts: list[int]) -> None:
    framing = ConnectionFraming()
    assert _read(framing, _pieces(octets, cuts)) == (octets, b"")
    assert not framing.complete
    assert framing.feed(octets, 0, len(octets)) == len(octets)
    framing.skip(3)
    assert framing.content == 2 * len(octets) + 3
    assert framing.opaque() == ENDLESS
    assert framing.ends_with_connection
    assert not LengthFraming(1).ends_with_connection


def test_no_body() -> None:
    assert NO_BODY.complete
    assert NO_BODY.feed(b"hello", 2, 5) == 2
    assert (NO_BODY.opaque(), NO_BODY.content, NO_BODY.content_between(NO_BODY.mark, b"hello", 0, 5)[0]) == (0, 0, 0)
    NO_BODY.skip(0)


@pytest.mark.parametrize(
    ("lines", "kind"),
    [
        (b"", type(NO_BODY)),
        (b"Content-Length: 0\r\n", type(NO_BODY)),
        (b"Content-Length: 7\r\n", LengthFraming),
        (b"Transfer-Encoding: chunked\r\n", ChunkedFraming),
    ],
)
def test_framing_of_requests(lines: bytes, kind: type[Framing]) -> None:
    framing = request_framing(HeaderSection(lines), 123)
    assert type(framing) is kind
    if isinstance(framing, ChunkedFraming):
        assert framing.max_trailer_size == 123
    elif isinstance(framing, LengthFraming):
        assert framing.remaining == 7


@pytest.mark.parametrize(
    ("status", "method", "lines", "kind"),
    [
        (200, b"GET", b"", ConnectionFraming),
        (200, b"GET", b"Content-Length: 7\r\n", LengthFraming),
        (200, b"GET", b"Content-Length: 0\r\n", type(NO_BODY)),
        (200, b"GET", b"Transfer-Encoding: chunked\r\n", ChunkedFraming),
        (200, b"HEAD", b"Content-Length: 7\r\n", type(NO_BODY)),
        (200, b"HEAD", b"Transfer-Encoding: chunked\r\n", type(NO_BODY)),
        (200, b"head", b"Content-Length: 7\r\n", LengthFraming),
        (204, b"GET", b"Content-Length: 7\r\n", type(NO_BODY)),
        (304, b"GET", b"Transfer-Encoding: chunked\r\n", type(NO_BODY)),
        (304, b"GET", b"", type(NO_BODY)),
        (205, b"GET", b"Content-Length: 7\r\n", LengthFraming),
        (404, b"POST", b"", ConnectionFraming),
    ],
)
def test_framing_of_responses(status: int, method: bytes, lines: bytes, kind: type[Framing]) -> None:
    framing = response_framing(status, HeaderSection(lines), method, 123)
    assert type(framing) is kind
    if isinstance(framing, ChunkedFraming):
        assert framing.max_trailer_size == 123


# Time.

_BUSY: dict[str, collections.abc.Callable[[int], bytes]] = {
    "small chunks": lambda n: b"1\r\na\r\n" * (n // 6),
    "trailer": lambda n: b"0\r\nX:" + b" " * n,
    "trailer lines": lambda n: b"0\r\n" + b"X:" + b"a" * (n // 200) + (b"\r\nX:" + b"a" * (n // 200)) * 199,
    "data": lambda n: b"fffffff\r\n" + b"\n" * n,
}


def _feed_in_steps(octets: bytes, step: int) -> None:
    framing = ChunkedFraming(1 << 30)
    for at in range(0, len(octets), step):
        mark = framing.mark  # as the relay takes one before each feed
        end = min(at + step, len(octets))
        framing.feed(octets, at, end)
        framing.content_between(mark, octets, at, end)


@pytest.mark.parametrize("name", _BUSY)
@pytest.mark.parametrize("step", [1, 65536])
def test_linear_time(name: str, step: int) -> None:
    def make(count: int) -> collections.abc.Callable[[], object]:
        octets = _BUSY[name](count)
        return lambda: _feed_in_steps(octets, step)

    check_linear(make, 4096 if step == 1 else 65536)


def test_linear_time_of_a_chunk_line() -> None:
    """Its length is bounded, but each octet is looked at with all that came before it: that may not take long."""

    def make(count: int) -> collections.abc.Callable[[], object]:
        octets = b"1;" + b"a" * (count - 4) + b"\r\na\r\n"
        return lambda: _feed_in_steps(octets, 1)

    check_linear(make, MAX_CHUNK_LINE // 16)
