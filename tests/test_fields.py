"""Which fields pass, which the proxy sets, and what a head asks of the connection."""

import pytest

from proxy.fields import ForwardingContext, PreparedRequest, prepare_request, prepare_response, serialize_request
from proxy.head import SectionMemory, parse_request_head, parse_response_head

CONTEXT = ForwardingContext(b"here", b"192.0.2.7", b"https", b"upstream:2375")


def prepare(fields: bytes, line: bytes = b"GET / HTTP/1.1") -> PreparedRequest:
    return prepare_request(parse_request_head(line + b"\r\n" + fields + b"\r\n", SectionMemory()), CONTEXT)


def test_what_is_relayed_keeps_its_order_case_repetition_and_octets() -> None:
    fields = b"Host: a\r\nb-B:  1 \r\nX:\xff\t2\r\nb-b:3\r\nAuthorization: Basic x\r\n"
    assert prepare(fields).lines.startswith(fields)


def test_the_proxy_sets_its_own_fields_and_drops_those_of_the_client() -> None:
    names = (b"X-Forwarded-For", b"X-Forwarded-Proto", b"X-Forwarded-Host", b"x_forwarded_for", b"X-Request_ID")
    fields = b"Host: a:80\r\n" + b"".join(name + b": forged\r\n" for name in names) + b"Via: 1.0 before\r\n"
    lines = prepare(fields).lines
    assert b"forged" not in lines
    assert lines == (
        b"Host: a:80\r\nVia: 1.0 before\r\nX-Forwarded-Host: a:80\r\nX-Forwarded-For: 192.0.2.7\r\n"
        b"X-Forwarded-Proto: https\r\nVia: 1.1 here\r\n"
    )


def test_hop_by_hop_fields_and_those_that_connection_names_end_here() -> None:
    dropped = b"Keep-Alive: 1\r\nProxy-Connection: x\r\nTE: gzip\r\nUpgrade: x\r\nProxy-Authorization: x\r\nOwn: x\r\n"
    lines = prepare(b"Host: a\r\nConnection: close, own\r\n" + dropped + b"Kept: x\r\n").lines
    names = [line.split(b":")[0].lower() for line in lines.split(b"\r\n") if line]
    assert names == [b"host", b"kept", b"x-forwarded-host", b"x-forwarded-for", b"x-forwarded-proto", b"via"]


def test_an_upgrade_and_te_trailers_are_set_anew() -> None:
    prepared = prepare(b"Host: a\r\nConnection: upgrade, te\r\nUpgrade: h2c\r\nTE: trailers, deflate\r\n")
    assert prepared.upgrade
    assert prepared.lines.endswith(b"Upgrade: h2c\r\nTE: trailers\r\nConnection: Upgrade, TE\r\n")
    assert not prepare(b"Host: a\r\nUpgrade: h2c\r\n").upgrade


def test_http_1_0_gets_a_host_and_no_expectation() -> None:
    prepared = prepare(b"Expect: 100-continue\r\nUpgrade: x\r\nConnection: upgrade\r\n", b"GET / HTTP/1.0")
    assert prepared.lines.startswith(b"Host: upstream:2375\r\nX-Forwarded-For:")
    assert b"Expect" not in prepared.lines
    assert (prepared.upgrade, prepared.expects_continue, prepared.keep_alive) == (False, False, False)


def test_an_expectation_that_ends_here_is_none() -> None:
    assert prepare(b"Host: a\r\nExpect: 100-Continue\r\n").expects_continue
    assert not prepare(b"Host: a\r\nExpect: 100-continue\r\nConnection: expect\r\n").expects_continue


@pytest.mark.parametrize(
    ("line", "connection", "kept"),
    [
        (b"GET / HTTP/1.1", b"", True),
        (b"GET / HTTP/1.1", b"Connection: a, Close\r\n", False),
        (b"GET / HTTP/1.0", b"", False),
        (b"GET / HTTP/1.0", b"Connection: Keep-Alive\r\n", True),
    ],
)
def test_whether_the_connection_is_kept(line: bytes, connection: bytes, kept: bool) -> None:
    assert prepare(b"Host: a\r\n" + connection, line).keep_alive is kept


@pytest.mark.parametrize("good", [b"a", b"A.b_c-9", b"x" * 128])
def test_a_request_id_that_is_well_formed_is_kept(good: bytes) -> None:
    assert prepare(b"Host: a\r\nX-Request-Id: " + good + b"\r\n").request_id == good


@pytest.mark.parametrize("bad", [b"", b"a b", b"x" * 129, b'a"', b"a\r\nX-Request-Id: b"])
def test_any_other_request_id_is_not(bad: bytes) -> None:
    assert prepare(b"Host: a\r\nX-Request-Id: " + bad + b"\r\n").request_id is None


def test_method_and_target_go_through_octet_for_octet() -> None:
    head = parse_request_head(b"PURGE //a/%2F/../b?c=%00&d HTTP/1.1\r\nHost: a\r\n\r\n", SectionMemory())
    octets = serialize_request(head, prepare_request(head, CONTEXT), b"id-1")
    assert octets.startswith(b"PURGE //a/%2F/../b?c=%00&d HTTP/1.1\r\nHost: a\r\n")
    assert octets.endswith(b"X-Request-Id: id-1\r\n\r\n")


def test_a_response_loses_its_chunked_coding_only_where_it_is_taken_off() -> None:
    fields = b"Transfer-Encoding: chunked\r\nTrailer: a\r\nX-Request-Id: theirs\r\nConnection: close\r\n"
    octets = b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n"
    head = parse_response_head(octets, SectionMemory())
    kept = prepare_response(head, b"here", dechunk=False)
    assert kept.lines == b"Transfer-Encoding: chunked\r\nTrailer: a\r\nVia: 1.1 here\r\n"
    assert not kept.keep_alive
    assert prepare_response(head, b"here", dechunk=True).lines == b"Via: 1.1 here\r\n"


def test_a_response_without_a_body_loses_what_would_frame_one() -> None:
    fields = b"Transfer-Encoding: chunked\r\nTrailer: a\r\nA: b\r\n"
    memory = SectionMemory()
    for status, lines in ((b"204", b""), (b"103", b""), (b"304", fields[:-6]), (b"200", fields[:-6])):
        head = parse_response_head(b"HTTP/1.1 " + status + b" \r\n" + fields + b"\r\n", memory)
        assert prepare_response(head, b"here", dechunk=False).lines == lines + b"A: b\r\nVia: 1.1 here\r\n"


def prepare_hops(method: bytes, value: bytes, memory: SectionMemory) -> PreparedRequest:
    fields = b"Host: a\r\nMax-Forwards: " + value + b"\r\n"
    return prepare_request(parse_request_head(method + b" /x HTTP/1.1\r\n" + fields + b"\r\n", memory), CONTEXT)


def test_max_forwards_counts_down_for_the_methods_that_trace() -> None:
    memory = SectionMemory()
    for method in (b"TRACE", b"OPTIONS"):
        prepared = prepare_hops(method, b"3", memory)
        assert prepared.hops == 3
        assert prepared.lines.count(b"Max-Forwards:") == 1
        assert b"Max-Forwards: 2\r\n" in prepared.lines
    # The same fields under another method go through as they are, and what was made for one is not used for the other.
    for method in (b"GET", b"POST"):
        assert b"Max-Forwards: 3\r\n" in prepare_hops(method, b"3", memory).lines
    assert b"Max-Forwards: 2\r\n" in prepare_hops(b"TRACE", b"3", memory).lines
    # What is no number says nothing.
    assert prepare_hops(b"TRACE", b"many", SectionMemory()).hops is None
