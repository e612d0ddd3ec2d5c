"""A message that ends behind each of its bytes in turn, by an orderly end and by a reset, on either side.

Whatever the place: one record for each request that began, balanced counts, true bytes, the right side and phase.
"""

import pytest

import harness
from harness import ProxyProcess
from peers import PeerGone, Script, Upstream, Wire, answer_all, chunk, connect, ok

LENGTH_REQUEST = b"POST /x HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED_REQUEST = (
    b"POST /x HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"hello") + b"0\r\nA: b\r\n\r\n"
)
LENGTH_RESPONSE = ok(b"hello")
CHUNKED_RESPONSE = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"hello") + b"0\r\nA: b\r\n\r\n"


def head_of(octets: bytes) -> int:
    return octets.index(b"\r\n\r\n") + 4


def content_in(part: bytes, whole: bytes) -> int:
    """Returns: how many octets of ``hello`` are in this part of a message."""
    start = whole.index(b"hello")
    return max(0, min(5, len(part) - start))


@pytest.mark.parametrize("request_octets", [LENGTH_REQUEST, CHUNKED_REQUEST], ids=["length", "chunked"])
def test_a_client_that_ends_behind_each_byte(request_octets: bytes) -> None:
    head = head_of(request_octets)
    with Upstream(answer_all(ok())) as upstream, ProxyProcess(upstream.url) as proxy:
        for cut in range(1, len(request_octets)):
            with connect(proxy.address) as wire:
                wire.send_and_end(request_octets[:cut])
                wire.await_end()
            record = proxy.wait_requests(cut)[-1]
            harness.check_record(record)
            phase = "request_head" if cut < head else "request_body"
            found = (record["event"], record["side"], record["cause"])
            assert found == ("request.abort", "client", "closed"), cut
            # The end may be seen while upstream is being connected, before the body is read.
            assert record["phase"] in ((phase,) if phase == "request_head" else (phase, "connect")), cut
            assert record["bytes"]["client_read"] == cut
            assert record["bytes"]["request_body"] <= content_in(request_octets[:cut], request_octets)
            assert record["bytes"]["response_body"] == 0
        upstream.settle()


@pytest.mark.parametrize("request_octets", [LENGTH_REQUEST, CHUNKED_REQUEST], ids=["length", "chunked"])
def test_a_client_that_resets_behind_each_byte(request_octets: bytes) -> None:
    with Upstream(answer_all(ok())) as upstream, ProxyProcess(upstream.url) as proxy:
        for cut in range(1, len(request_octets)):
            with connect(proxy.address) as wire:
                wire.send(request_octets[:cut])
                wire.reset()
        with connect(proxy.address) as wire:  # all before it are over, or will be
            wire.get("/last")
            assert wire.read_response().status == 200
        stop = proxy.stop()
        records = proxy.requests()
    # A reset destroys what was not read, so that some of these requests have not begun for the proxy.
    assert stop["balanced"] is True
    assert stop["requests"]["begun"] == len(records)
    assert [record["target"] for record in records].count("/last") == 1
    for record in records:
        harness.check_record(record)
        if record["target"] != "/last":
            assert (record["event"], record["side"]) == ("request.abort", "client")
            assert record["cause"] in ("closed", "reset")
            assert record["phase"] in ("request_head", "connect", "request_body")
            assert record["bytes"]["client_read"] < len(request_octets)


def part_of(response: bytes, cut: int, by: str) -> Script:
    """Read a request, answer with a part of a response, then end or reset."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(response[:cut])
        if by == "reset":
            wire.reset()
        else:
            wire.end_write()
            wire.await_end()

    return script


@pytest.mark.parametrize("by", ["fin", "reset"])
@pytest.mark.parametrize("response", [LENGTH_RESPONSE, CHUNKED_RESPONSE], ids=["length", "chunked"])
def test_an_upstream_that_ends_behind_each_byte(response: bytes, by: str) -> None:
    head = head_of(response)
    with Upstream(answer_all(ok())) as upstream, ProxyProcess(upstream.url) as proxy:
        for cut in range(len(response)):
            upstream.script = part_of(response, cut, by)
            with connect(proxy.address) as wire:
                wire.send(b"POST /x HTTP/1.1\r\nHost: t\r\nContent-Length: 2\r\n\r\nhi")
                try:
                    seen = wire.read_response()
                except PeerGone:
                    pytest.fail(f"the client saw nothing behind byte {cut}")
                wire.await_end()
            record = proxy.wait_requests(cut + 1)[-1]
            harness.check_record(record)
            upstream.settle()
            assert (record["event"], record["side"]) == ("request.abort", "upstream"), cut
            assert record["cause"] in ("closed", "reset") if by == "reset" else record["cause"] == "closed"
            read = record["bytes"]["upstream_read"]
            assert read == cut if by == "fin" else read <= cut  # a reset destroys what was not read
            if read < head:
                assert (record["phase"], record["status"], seen.status) == ("response_head", 502, 502)
                assert seen.whole
            else:
                assert (record["phase"], record["status"], seen.status) == ("response_body", 200, 200)
                assert not seen.whole
                assert record["bytes"]["response_body"] == len(seen.body) == content_in(response[:read], response)
            assert record["bytes"]["client_written"] == wire.received.count
            assert record["bytes"]["client_read"] == wire.sent.count
