"""What a request told before it was refused, or broke off, is in its record and decides its answer: method, target, and
the client's own request id.
"""

import collections.abc
import json

import pytest

from conftest import Certificates
from harness import ProxyProcess, check_record
from peers import Upstream, Wire, connect, silent

_LINE = b"%b /abc?token=hush HTTP/1.1\r\n"
_ID = b"X-Request-Id: mine-1\r\n"
# What follows the request line, how the client goes on, and status and cause of what comes of it.
_BROKEN = {
    "end": (b"Host: x\r\n", "fin", None, "closed"),
    "reset": (b"Host: x\r\n", "reset", None, "reset"),
    "silence": (b"Host: x\r\n", "wait", 408, "timeout"),
    "a control character": (b"Host: x\r\nA: \x00b\r\n", "wait", 400, "protocol"),
    "no field line": (b"Host: x\r\nnonsense\r\n\r\n", "wait", 400, "protocol"),
    "no host": (b"\r\n", "wait", 400, "protocol"),
    "two lengths": (b"Host: x\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", "wait", 400, "protocol"),
    "unknown coding": (b"Host: x\r\nTransfer-Encoding: brotli\r\n\r\n", "wait", 501, "protocol"),
    "too many fields": (b"Host: x\r\n" + b"A: b\r\n" * 300 + b"\r\n", "wait", 431, "limit"),
    "too large": (b"Host: x\r\nA: " + b"b" * 70_000, "wait", 431, "limit"),
}
_LINES = {
    "another version": (b"%b /abc?token=hush HTTP/3.0", "/abc?token=***", 505),
    "no version": (b"%b /abc?token=hush", "/abc?token=***", 400),
    "octets outside ASCII": (b"%b /\xc3\xa4?token=hush HTTP/1.1", "/\\xc3\\xa4?token=***", 400),
    "a fragment": (b"%b /abc#hush HTTP/1.1", "/abc#***", 400),
    "a space in it": (b"%b /a b HTTP/1.1", None, 400),
    "too long": (b"%b /" + b"a" * 70_000, None, 414),
}


@pytest.fixture(scope="module")
def proxy() -> collections.abc.Iterator[ProxyProcess]:
    with Upstream(silent) as upstream, ProxyProcess(upstream.url, "--client-head-timeout", "0.3") as proxy:
        yield proxy


def _go_on(wire: Wire, how: str) -> None:
    if how == "fin":
        wire.end_write()
    elif how == "reset":
        wire.reset()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("name", _BROKEN)
def test_what_a_broken_head_told(name: str, method: str, proxy: ProxyProcess) -> None:
    rest, how, status, cause = _BROKEN[name]
    before = len(proxy.requests())
    with connect(proxy.address) as wire:
        wire.send(_LINE % method.encode() + _ID + rest)
        _go_on(wire, how)
        if status is not None:
            octets = wire.read_to_end()
            head, _, body = octets.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 %d " % status)
            assert b"\r\nX-Request-Id: mine-1\r\n" in head
            assert (body == b"") is (method == "HEAD")
            if body:
                assert "(request id mine-1)" in json.loads(body)["message"]
        record = proxy.wait_requests(before + 1)[-1]
    check_record(record)
    assert (record["method"], record["target"]) == (method, "/abc?token=***")
    assert (record["request_id"], record["status"], record["cause"]) == ("mine-1", status, cause)
    assert "hush" not in json.dumps(record)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("name", _LINES)
def test_what_a_line_told_that_is_none(name: str, method: str, proxy: ProxyProcess) -> None:
    line, target, status = _LINES[name]
    before = len(proxy.requests())
    with connect(proxy.address) as wire:
        wire.send(line % method.encode() + (b"\r\nHost: x\r\n\r\n" if name != "too long" else b""))
        head, _, body = wire.read_to_end().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status)
        assert (body == b"") is (method == "HEAD")
        record = proxy.wait_requests(before + 1)[-1]
    check_record(record)
    assert (record["method"], record["target"]) == (method, target)
    assert "hush" not in json.dumps(record)


@pytest.mark.parametrize(
    "octets",
    [
        b'{"user":"u","password":"hush"}GET / HTTP/1.1\r\nHost: x\r\n\r\n',  # behind a body longer than its length
        b"GET a&token=hush HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /a token=hush HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /a token=hush\r\nHost: x\r\n\r\n",
        b"GET /a?token=hush HTTP/3.hush\r\nHost: x\r\n\r\n",
    ],
)
def test_no_error_quotes_a_secret(octets: bytes, proxy: ProxyProcess) -> None:
    before = len(proxy.requests())
    with connect(proxy.address) as wire:
        wire.send(octets)
        assert b"hush" not in wire.read_to_end()
        record = proxy.wait_requests(before + 1)[-1]
    assert record["cause"] == "protocol"
    assert "hush" not in json.dumps(record)


def test_a_method_alone_is_what_the_message_says(proxy: ProxyProcess) -> None:
    before = len(proxy.requests())
    with connect(proxy.address) as wire:
        wire.send(b"GET /half")
        assert b"ended a request (GET) after" in wire.read_to_end()
        record = proxy.wait_requests(before + 1)[-1]
    assert "None" not in record["message"]


@pytest.mark.parametrize(
    "fields",
    [
        _ID + _ID,
        _ID + b"x-request-id: other\r\n",
        b"X-Request-Id: not one\r\n",
        b"X-Request-Id: " + b"a" * 129 + b"\r\n",
        b"X-Request-Id : mine-1\r\n",
        b"X-Request-Id: mi",
    ],
)
def test_an_id_that_is_not_kept(fields: bytes, proxy: ProxyProcess) -> None:
    before = len(proxy.requests())
    with connect(proxy.address) as wire:
        wire.send(_LINE % b"GET" + b"nonsense\r\n" + fields)
        octets = wire.read_to_end()
        record = proxy.wait_requests(before + 1)[-1]
    assert record["request_id"] not in ("mine-1", "other", "mi")
    assert f"\r\nX-Request-Id: {record['request_id']}\r\n".encode() in octets


def test_a_head_in_parts_says_early_who_it_is() -> None:
    """SIGUSR2 shows it while the rest is awaited."""
    with Upstream(silent) as upstream, ProxyProcess(upstream.url) as proxy, connect(proxy.address) as wire:
        wire.send(_LINE % b"GET" + b"Host: x\r\n")
        proxy.wait_in_flight(lambda request: (request["method"], request["target"]) == ("GET", "/abc?token=***"))


@pytest.mark.parametrize("where", ["head", "body", "chunked body"])
@pytest.mark.parametrize("mode", ["abort", "allow"])
def test_who_ends_its_side_in_mid_request_and_may_still_listen_is_told(where: str, mode: str) -> None:
    octets = {
        "head": b"POST /x HTTP/1.1\r\nHost: x\r\n",
        "body": b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nfour",
        "chunked body": b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nfour",
    }[where]
    with Upstream(silent) as upstream, ProxyProcess(upstream.url, "--client-half-close", mode) as proxy:
        with connect(proxy.address) as wire:
            wire.send(octets)
            wire.end_write()
            head, _, body = wire.read_to_end().partition(b"\r\n\r\n")
            record = proxy.next_request()
        check_record(record)
    assert (record["side"], record["cause"]) == ("client", "closed")
    if mode == "abort":
        assert (head, body, record["status"]) == (b"", b"", None)
    else:
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b"; error=http_request_error; status-code=400;" in head
        assert (record["status"], record["error_type"]) == (400, "http_request_error")
        assert json.loads(body)["message"].startswith("client 127.0.0.1:")


def test_plain_http_on_a_tls_port_with_head_has_no_body(certificates: Certificates) -> None:
    tls = ("--tls-cert", certificates.server, "--tls-key", certificates.server)
    with Upstream(silent) as upstream, ProxyProcess(upstream.url, *tls) as proxy, connect(proxy.address) as wire:
        wire.send(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
        head, _, body = wire.read_to_end().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert body == b""
