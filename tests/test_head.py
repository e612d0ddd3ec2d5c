"""Heads: what is refused and why, the referee's reading of what is not, and time."""

import collections.abc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.grammar import MAX_FIELDS, MalformedMessage
from proxy.head import (
    HeaderSection,
    SectionMemory,
    check_partial_head,
    parse_request_head,
    parse_response_head,
)
from referee import check_linear, codec_request, codec_response, h11_request, h11_response

Work = collections.abc.Callable[[], object]

# Octets that matter to some parser, for hypothesis to put in odd places.
_ODD = [
    b" ",
    b"\t",
    b"\r",
    b"\n",
    b"\r\n",
    b"\x00",
    b"\x0b",
    b"\x7f",
    b"\x85",
    b"\xa0",
    b":",
    b",",
    b";",
    b"0",
    b"a",
    b'"',
]
_METHODS = [b"GET", b"POST", b"HEAD", b"get", b"OPTIONS", b"CONNECT", b"G@T"]
_TARGETS = [b"/", b"/a?b=c", b"//a", b"/%00", b"http://a/", b"http://b/", b"http://a@b/", b"*", b"a:80", b"/#", b"/a b"]
_VERSIONS = [b"1.1", b"1.0", b"0.9", b"1.2", b"2.0", b"1.10"]
_STATUS = [b"200 OK", b"204 ", b"304", b"500 \xe9", b"099 x", b"103 x", b"2000 x"]
_HELLO = b"5\r\nhello\r\n0\r\n\r\n"
# Field lines on framing, the empty line, and what follows: well framed ones and others.
_FRAMED = [
    b"\r\n",
    b"\r\nGET / HTTP/1.1\r\n",
    b"Content-Length: 5\r\n\r\nhello",
    b"content-length:  05 \r\n\r\nhello" + _HELLO,
    b"Content-Length: 6\r\n\r\nhello",
    b"Content-Length: 0\r\n\r\nhello",
    b"Transfer-Encoding: chunked\r\n\r\n" + _HELLO,
    b"TRANSFER-ENCODING:Chunked \r\n\r\n" + _HELLO + b"hello",
    b'Transfer-Encoding: chunked\r\n\r\n00005;a="b;\\"c";d\r\nhello\r\n0\r\nX: y\r\n\r\n',
    b"Transfer-Encoding: chunked\r\n\r\na;b=c\r\n" + _HELLO,
    b"Transfer-Encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n",
    b"Transfer_Encoding: chunked\r\n\r\n" + _HELLO,
    b"Transfer-Encoding: chunked,\r\n\r\n" + _HELLO,
    b"Transfer-Encoding: gzip, chunked\r\n\r\n" + _HELLO,
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding:\r\n\r\n" + _HELLO,
    b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + _HELLO,
    b"Content-Length: 5, 5\r\n\r\nhello",
    b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    b"Content-Length: +5\r\n\r\nhello",
]
_OTHER_LINES = [
    b"Host: a",
    b"host: a:80",
    b"Host:",
    b"Connection: close",
    b"Connection: keep-alive, Content-Length",
    b"Connection: transfer-encoding,, X",
    b"Expect: 100-continue",
    b"TE: trailers",
    b"X:",
    b"X: \xe9 y",
    b" folded",
    b"Cookie: a=b",
]


def _mostly(choices: list[bytes]) -> st.SearchStrategy[bytes]:
    """The first choice in four of five draws."""
    return st.sampled_from(choices[:1] * (4 * len(choices) - 4) + choices)


@st.composite
def _spoiled(draw: st.DrawFn, heads: st.SearchStrategy[bytes]) -> bytes:
    """Whole messages, half of them with odd octets put in, or octets taken out, in up to two places."""
    octets = draw(heads)
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        start = draw(st.integers(0, len(octets)))
        taken = draw(st.sampled_from([0, 0, 1, 2]))
        octets = octets[:start] + draw(st.sampled_from(_ODD)) + octets[start + taken :]
    return octets


_other_lines = st.one_of(st.just([]), st.lists(st.sampled_from(_OTHER_LINES), max_size=2)).map(
    lambda lines: b"".join(line + b"\r\n" for line in lines)
)
_requests = _spoiled(
    st.tuples(
        _mostly(_METHODS),
        st.just(b" "),
        _mostly(_TARGETS),
        st.just(b" HTTP/"),
        _mostly(_VERSIONS),
        st.just(b"\r\n"),
        _mostly([b"Host: a\r\n", b""]),
        _other_lines,
        st.sampled_from(_FRAMED),
    ).map(b"".join)
)
_responses = _spoiled(
    st.tuples(
        st.just(b"HTTP/"),
        _mostly(_VERSIONS),
        st.just(b" "),
        _mostly(_STATUS),
        st.just(b"\r\n"),
        _other_lines,
        st.sampled_from(_FRAMED),
    ).map(b"".join)
)

# A head in order, for properties of those that are accepted.
_token = st.text("!#$%&'*+-.^_`|~0123456789abcXYZ", min_size=1, max_size=8).map(str.encode)
_text = st.binary(max_size=12).map(lambda octets: bytes(o for o in octets if o >= 0x20 and o != 0x7F))
_good_fields = st.lists(st.tuples(_token.map(lambda name: b"x" + name), _text), max_size=6)


def _section(fields: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(b"%b:%b\r\n" % field for field in fields)


# The referee.


@given(_requests)
@example(b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked,\r\n\r\n0\r\n\r\n")
@example(b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n")
def test_a_request_we_accept_is_read_the_same_by_the_referee(octets: bytes) -> None:
    ours = codec_request(octets)
    if ours.refused == "head":
        return
    # h11 knows nothing of an empty line before a request (RFC 9112 §2.2).
    referee = h11_request(octets.removeprefix(b"\r\n"))
    assert (referee.start, referee.minor, referee.fields) == (ours.start, ours.minor, ours.fields)
    if not ours.refused:
        assert not referee.refused
        assert (referee.content, referee.complete) == (ours.content, ours.complete)
        assert not ours.complete or referee.rest == ours.rest


@given(_responses, st.sampled_from([b"GET", b"HEAD"]))
def test_a_response_we_accept_is_read_the_same_by_the_referee(octets: bytes, method: bytes) -> None:
    ours = codec_response(octets, method)
    if ours.refused == "head":
        return
    referee = h11_response(octets, method)
    assert (referee.start, referee.minor, referee.fields) == (ours.start, ours.minor, ours.fields)
    if not ours.refused:
        assert not referee.refused
        assert (referee.content, referee.complete) == (ours.content, ours.complete)
        assert not ours.complete or referee.rest == ours.rest


@given(_requests | _responses | st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=8))
def test_any_split_is_read_the_same(octets: bytes, cuts: list[int]) -> None:
    whole, split = codec_request(octets), codec_request(octets, cuts)
    # A head that is never whole is refused for what is wrong with it as soon as that is seen.
    assert (split.refused, split.start, split.fields) == (whole.refused, whole.start, whole.fields)
    if not whole.refused:
        assert split == whole
    whole, split = codec_response(octets, b"GET"), codec_response(octets, b"GET", cuts)
    assert split.refused == whole.refused
    if not whole.refused:
        assert split == whole


# Octets.


@given(st.binary(max_size=300))
def test_nothing_but_malformed_message_is_raised(octets: bytes) -> None:
    """Whatever stands before the empty line: with it, octets are a whole head, good or not."""
    octets = octets[: octets.find(b"\r\n\r\n")] if b"\r\n\r\n" in octets else octets
    for parse in (parse_request_head, parse_response_head):
        with pytest.raises(MalformedMessage):
            # No octets that come from nowhere make a head; those that might are the business of the other tests.
            parse(b"\x01" + octets + b"\r\n\r\n", SectionMemory())
    stray = _stray(octets, 0)
    assert stray is None or 0 <= stray < len(octets)


@given(_token, st.sampled_from([b"/", b"/a?b", b"http://a/", b"//"]), st.sampled_from([0, 1]), _good_fields)
def test_a_request_head_keeps_its_octets(
    method: bytes, target: bytes, minor: int, fields: list[tuple[bytes, bytes]]
) -> None:
    octets = b"%b %b HTTP/1.%d\r\nHost: a\r\n%b\r\n" % (method, target, minor, _section(fields))
    head = parse_request_head(octets, SectionMemory())
    assert (head.method, head.target, head.minor, head.size) == (method, target, minor, len(octets))
    assert head.section.fields == [(b"Host", b" a"), *fields]
    again = b"%b %b HTTP/1.%d\r\n%b\r\n" % (head.method, head.target, head.minor, _section(head.section.fields))
    assert again == octets


@given(st.integers(100, 999), _text, st.sampled_from([0, 1]), _good_fields)
def test_a_response_head_keeps_its_octets(
    status: int, reason: bytes, minor: int, fields: list[tuple[bytes, bytes]]
) -> None:
    octets = b"HTTP/1.%d %d %b\r\n%b\r\n" % (minor, status, reason, _section(fields))
    head = parse_response_head(octets, SectionMemory())
    assert (head.status, head.reason, head.minor, head.size) == (status, reason, minor, len(octets))
    assert head.section.fields == fields


@given(_good_fields, st.integers(0, 300), st.integers(0, 300))
def test_no_beginning_of_a_good_head_is_refused(fields: list[tuple[bytes, bytes]], end: int, start: int) -> None:
    octets = b"GET / HTTP/1.1\r\nHost: a\r\n%b\r\n" % _section(fields)
    check_partial_head(octets[:end])
    check_partial_head(octets[:end], min(start, len(octets[:end])))


@given(_requests | st.binary(max_size=100), st.data())
def test_a_beginning_is_refused_the_same_from_wherever_it_was_checked(octets: bytes, data: st.DataObject) -> None:
    bad_at = _stray(octets, 0)
    good = len(octets) if bad_at is None else bad_at
    # What had been checked before was refused then: the start is never behind the first stray octet. A CR at the end of
    # what has come is not stray yet.
    start = data.draw(
        st.integers(0, min(good + 1, len(octets))) if octets[good : good + 1] == b"\r" else st.integers(0, good)
    )
    assert _stray(octets, start) == bad_at


def _stray(octets: bytes, start: int) -> int | None:
    try:
        check_partial_head(octets, start)
    except MalformedMessage as error:
        return error.octet
    return None


@given(_requests | _responses)
def test_no_head_with_a_bad_beginning_is_accepted(octets: bytes) -> None:
    head = octets[: octets.index(b"\r\n\r\n") + 4] if b"\r\n\r\n" in octets else octets + b"\r\n\r\n"
    if _stray(head[:-4], 0) is None:
        return
    for parse in (parse_request_head, parse_response_head):
        with pytest.raises(MalformedMessage):
            parse(head, SectionMemory())


# What is wrong, and where.


def _refused_request(octets: bytes) -> MalformedMessage:
    with pytest.raises(MalformedMessage) as caught:
        parse_request_head(octets, SectionMemory())
    return caught.value


@pytest.mark.parametrize(
    ("line", "reason", "octet"),
    [
        (b"", "an empty request line", 0),
        (b"GE T / HTTP/1.1", "more than two spaces in the request line", 6),
        (b"G@T / HTTP/1.1", "a method that is no token", 1),
        (b"GET\t/\tHTTP/1.1", "a method that is no token", 3),
        (b" / HTTP/1.1", "a method that is no token", 0),
        (b"GET /", "a request line without an HTTP version", 5),
        (b"GET  HTTP/1.1", "two spaces in a row in the request line", 3),
        (b"GET / HTTP/1", "not an HTTP version", 6),
        (b"GET / http/1.1", "not an HTTP version", 6),
        (b"GET /\xe9 HTTP/1.1", "octets outside visible ASCII in the request target", 4),
        (b"GET / HTTP/2.0", "an HTTP version other than 1.0 and 1.1", 11),
        (b"GET /\rHTTP/1.1", "a carriage return without its line feed", 5),
        (b"GET /\nHTTP/1.1", "a line feed without its carriage return", 5),
        (b"GET /\x00 HTTP/1.1", "a control character (0x00)", 5),
        (b"\x16\x03\x01", "this looks like a TLS handshake, but plain HTTP is spoken here", 0),
        (b"GET /# HTTP/1.1", "a fragment in the request target", 5),
        (b"GET a HTTP/1.1", "a request target that is neither a path nor an absolute URI", 4),
        (b"GET * HTTP/1.1", "a request target that is neither a path nor an absolute URI", 4),
        (b"GET http:/// HTTP/1.1", "an absolute request target without a valid host", 4),
        (b"GET http://a@b/ HTTP/1.1", "an absolute request target without a valid host", 4),
        (b"GET http://b/ HTTP/1.1", "a request target for another host than the Host field names", 4),
    ],
)
def test_request_line_refused(line: bytes, reason: str, octet: int) -> None:
    error = _refused_request(line + b"\r\nHost: a\r\n\r\n")
    assert (error.reason, error.octet) == (reason, octet)
    assert error.status == (505 if "other than" in reason else 400)
    assert error.bound is None


@pytest.mark.parametrize(
    "line",
    [
        b"GET\t/?a=SECRET\tHTTP/1.1",
        b"GET /?a=SECRET",
        b"GET / ?a=SECRET",
        b"GET / /?a=SECRET HTTP/1.1",
        b"GET /\xe9?a=SECRET HTTP/1.1",
        b"GET a?a=SECRET HTTP/1.1",
        b"GET /?a=SECRET#b HTTP/1.1",
        b"GET http://b/?a=SECRET HTTP/1.1",
        b"GET http://u:SECRET@a/ HTTP/1.1",
    ],
)
def test_no_error_quotes_a_query_or_user_information(line: bytes) -> None:
    assert "SECRET" not in str(_refused_request(line + b"\r\nHost: a\r\n\r\n"))


_BEFORE = len(b"GET / HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("lines", "reason", "octet"),
    [
        (b" Host: a\r\n", "a field line that begins with whitespace (obsolete line folding)", 0),
        (b"Host: a\r\n\tb\r\n", "a field line that begins with whitespace (obsolete line folding)", 9),
        (b"Host: a\nX: b\r\n", "a line feed without its carriage return in a field line", 7),
        (b"Host: a\rX: b\r\n", "a carriage return without its line feed in a field line", 7),
        (b"Host: a\r\nX: \x7f\r\n", "a control character (0x7f) in a field line", 12),
        (b"Host: a\r\nX\r\n", "a field line without a colon", 9),
        (b"Host: a\r\n: b\r\n", "a field without a name", 9),
        (b"Host: a\r\nX : b\r\n", "whitespace between a field name and its colon", 9),
        (b"Host: a\r\nX\t: b\r\n", "whitespace between a field name and its colon", 9),
        (b"Host: a\r\nX@: b\r\n", "a field name that is no token", 9),
        (b"X: b\r\n", "no Host field in an HTTP/1.1 request", 0),
        (b"Host: a\r\nHost: a\r\n", "more than one Host field", 0),
        (b"Host: a/b\r\n", "a Host field that is no host", 0),
        (b"Connection: a b\r\n", "a Connection option that is no token", 0),
        (b"Connection: a, host\r\n", "a Connection option that names a field meant for all recipients", 0),
        (b"Content-Length: 1\r\nContent-Length: 1\r\n", "more than one Content-Length", 0),
        (b"Content-Length:\t1\r\n", "a tab in a field that frames the body", 0),
        (b"transfer-encoding: chunked\t\r\n", "a tab in a field that frames the body", 0),
        (b"Content-Length: 1x\r\n", "a Content-Length that is not a number of at most 18 digits", 0),
        (b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n", "both Transfer-Encoding and Content-Length", 0),
        (b"Transfer-Encoding: chunked,\r\n", "a Transfer-Encoding with an empty element", 0),
        (b"Transfer-Encoding:\r\n", "a Transfer-Encoding with an empty element", 0),
        (b"Transfer-Encoding: chunked, Chunked\r\n", "the chunked coding applied twice", 0),
        (b"Transfer-Encoding: chunked, gzip\r\n", "a transfer coding after chunked", 0),
        (b"Transfer-Encoding: chunked;a\r\n", "a Transfer-Encoding that is no list of codings", 0),
        (b"Transfer-Encoding: a b\r\n", "a Transfer-Encoding that is no list of codings", 0),
        (b"Transfer-Encoding: gzip;q=1, chunked\r\n", "an unknown transfer coding", 0),
    ],
)
def test_section_refused(lines: bytes, reason: str, octet: int) -> None:
    error = _refused_request(b"GET / HTTP/1.1\r\n" + lines + b"\r\n")
    assert (error.reason, error.octet) == (reason, _BEFORE + octet)
    assert error.status == (501 if "unknown" in reason else 400)
    # The same section in a response, where Host means nothing.
    if "Host" not in reason:
        with pytest.raises(MalformedMessage) as caught:
            parse_response_head(b"HTTP/1.1 204 \r\n" + lines + b"\r\n", SectionMemory())
        assert (caught.value.reason, caught.value.octet) == (reason, len(b"HTTP/1.1 204 \r\n") + octet)


def test_chunked_in_10_is_refused() -> None:
    section = b"Transfer-Encoding: chunked\r\n\r\n"
    assert _refused_request(b"GET / HTTP/1.0\r\n" + section).reason == "Transfer-Encoding in an HTTP/1.0 request"
    with pytest.raises(MalformedMessage, match=r"Transfer-Encoding in an HTTP/1\.0 response"):
        parse_response_head(b"HTTP/1.0 200 OK\r\n" + section, SectionMemory())


def test_number_of_fields() -> None:
    assert len(HeaderSection(b"a:\r\n" * MAX_FIELDS).fields) == MAX_FIELDS
    with pytest.raises(MalformedMessage) as caught:
        HeaderSection(b"a:\r\n" * (MAX_FIELDS + 1))
    assert (caught.value.status, caught.value.bound) == (431, "max_fields")


@pytest.mark.parametrize("line", [b"", b"HTTP/1.1 20", b"HTTP/1.1 200OK", b"GET / HTTP/1.1", b"HTTP/1.1 200 \x00"])
def test_status_line_refused(line: bytes) -> None:
    with pytest.raises(MalformedMessage, match="not a status line"):
        parse_response_head(line + b"\r\n\r\n", SectionMemory())


def test_response_version_refused() -> None:
    with pytest.raises(MalformedMessage, match="an HTTP version other"):
        parse_response_head(b"HTTP/2.0 200 OK\r\n\r\n", SectionMemory())


def test_octets_without_a_line_are_no_head() -> None:
    with pytest.raises(MalformedMessage, match="not a status line"):
        parse_response_head(b"HTTP/1.1 200 OK", SectionMemory())


# What a section says.


def test_what_a_section_says() -> None:
    section = HeaderSection(b"CONNECTION:close , X-y\r\nconnection: ,TE\r\nTe:\ttrailers \r\nContent-Length: 007\r\n")
    assert section.options == {b"close", b"x-y", b"te"}
    assert (section.content_length, section.chunked) == (7, False)
    assert section.known[b"connection"] == [b"close , X-y", b",TE"]
    assert section.first(b"te") == b"trailers"
    assert section.first(b"host") is None
    plain = HeaderSection(b"")
    assert (plain.fields, plain.options, plain.content_length, plain.chunked) == ([], frozenset(), None, False)
    assert HeaderSection(b"Transfer-Encoding: CHUNKED\r\n").chunked


@pytest.mark.parametrize(
    ("target", "method"),
    [
        (b"http://A:80/x", b"GET"),
        (b"*", b"OPTIONS"),
        (b"anything", b"CONNECT"),
        (b"HTTPS://a:80", b"GET"),
        (b"/x", b"GET"),
    ],
)
def test_target_accepted(target: bytes, method: bytes) -> None:
    head = parse_request_head(b"%b %b HTTP/1.1\r\nHost: a:80\r\n\r\n" % (method, target), SectionMemory())
    assert (head.method, head.target) == (method, target)


def test_10_needs_no_host() -> None:
    assert parse_request_head(b"GET / HTTP/1.0\r\n\r\n", SectionMemory()).minor == 0
    error = _refused_request(b"GET http://a/ HTTP/1.0\r\n\r\n")
    assert (error.reason, error.octet) == ("an absolute request target without a Host field", 4)


# Memory.


def test_a_section_is_parsed_once() -> None:
    memory = SectionMemory()
    first = parse_request_head(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n", memory)
    second = parse_request_head(b"POST /b HTTP/1.1\r\nHost: a\r\n\r\n", memory)
    assert second.section is first.section
    third = parse_request_head(b"GET /a HTTP/1.1\r\nHost: b\r\n\r\n", memory)
    assert third.section is not first.section
    assert third.section.first(b"host") == b"b"


def test_memory_never_lets_in_what_it_refused() -> None:
    """Sections that are good in themselves, and not in the request they came with."""
    memory = SectionMemory()
    for _ in range(2):
        for octets in (
            b"GET / HTTP/1.1\r\nX: a\r\n\r\n",
            b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n",
            b"GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
        ):
            with pytest.raises(MalformedMessage):
                parse_request_head(octets, memory)
    parse_request_head(b"GET / HTTP/1.0\r\nX: a\r\n\r\n", memory)
    with pytest.raises(MalformedMessage, match="no Host"):
        parse_request_head(b"GET / HTTP/1.1\r\nX: a\r\n\r\n", memory)
    # Another version makes the same section another matter, even where it has passed before.
    head = parse_request_head(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", memory)
    head.section.prepared = object()
    with pytest.raises(MalformedMessage, match=r"HTTP/1\.0"):
        parse_request_head(b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", memory)


@given(st.lists(_requests, min_size=2, max_size=5))
def test_memory_changes_no_verdict(requests: list[bytes]) -> None:
    memory = SectionMemory()
    for octets in requests:
        end = octets.find(b"\r\n\r\n")
        head_octets = octets[: end + 4]
        assert _verdict(head_octets, memory) == _verdict(head_octets, SectionMemory())


def _verdict(octets: bytes, memory: SectionMemory) -> object:
    try:
        head = parse_request_head(octets, memory)
    except MalformedMessage as error:
        return (str(error), error.status)
    section = head.section
    return (
        head.method,
        head.target,
        head.minor,
        section.fields,
        section.content_length,
        section.chunked,
        section.options,
    )


def test_shared_memory_is_shared_but_for_credentials() -> None:
    shared = SectionMemory()
    plain, secret = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nCookie: b\r\n\r\n"
    first = parse_request_head(plain, SectionMemory(shared)).section
    assert parse_request_head(plain, SectionMemory(shared)).section is first
    own = SectionMemory(shared)
    secret_section = parse_request_head(secret, own).section
    assert parse_request_head(secret, own).section is secret_section
    assert shared.section is first
    assert parse_request_head(secret, SectionMemory(shared)).section is not secret_section


# Time.

_BUSY_SECTIONS: dict[str, collections.abc.Callable[[int], bytes]] = {
    "spaces": lambda n: b"X:" + b" " * n + b"\r\n",
    "colons": lambda n: b"X" + b":" * n + b"\r\n",
    "connection commas": lambda n: b"Connection:" + b"," * n + b"\r\n",
    "connection options": lambda n: b"Connection:" + b"".join(b"%x," % i for i in range(n // 6)) + b"\r\n",
    "coding commas": lambda n: b"Transfer-Encoding:" + b"," * n + b"\r\n",
    "coding list": lambda n: b"Transfer-Encoding: a" + b",a" * (n // 2) + b"\r\n",
    "length digits": lambda n: b"Content-Length: " + b"1" * n + b"\r\n",
    "host": lambda n: b"Host: " + b"a." * (n // 2) + b"@\r\n",
    "many lines": lambda n: b"X:a\r\n" * (n // 5),
    "bad line at the end": lambda n: b"X:a\r\n" * (n // 5) + b" \r\n",
    "name without colon": lambda n: b"a" * n + b"\r\n",
    "control character at the end": lambda n: b"X:" + b" " * n + b"\x00\r\n",
}


@pytest.mark.parametrize("name", _BUSY_SECTIONS)
def test_linear_time(name: str) -> None:
    def make(count: int) -> Work:
        octets = b"GET / HTTP/1.1\r\n" + _BUSY_SECTIONS[name](count) + b"\r\n"
        return lambda: _verdict(octets, SectionMemory())

    check_linear(make, 4096)


@pytest.mark.parametrize("run", [b" ", b"/", b"\xe9", b"a "])
def test_linear_time_of_request_lines(run: bytes) -> None:
    def make(count: int) -> Work:
        octets = b"GET " + run * count + b"\r\n\r\n"
        return lambda: _verdict(octets, SectionMemory())

    check_linear(make, 4096)


def test_linear_time_of_a_head_that_comes_octet_by_octet() -> None:
    """Each octet of a slow head may be looked at once, or a trickle of octets keeps a processor busy."""

    def make(count: int) -> Work:
        octets = b"GET / HTTP/1.1\r\nX: " + b"a" * count
        # Cut beforehand, as the copies are not what is measured.
        parts = [octets[:end] for end in range(0, len(octets), 16)]

        def work() -> None:
            checked = 0
            for part in parts:
                check_partial_head(part, checked)
                checked = len(part)

        return work

    check_linear(make, 1024)
