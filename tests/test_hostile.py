"""What strangers try that is no row of the table of scenarios: peers whose timing, order or octets are against the
proxy. Whatever they do, each request that began ends in one record, and nothing of one message gets into another.
"""

import collections.abc
import contextlib
import os
import select
import signal
import socket
import ssl
import struct
import threading
import time

import pytest

import harness
import peers
from conftest import Certificates
from harness import LogRecord, ProxyProcess, wait_until
from peers import PeerGone, Script, TlsWire, Upstream, Wire, answer, answer_all, chunk, connect, ok
from proxy.aborts import Abort
from proxy.config import load_settings
from proxy.framing import ChunkedFraming
from proxy.relay import PipeStore
from proxy.upstream import upstream_pool
from proxy.vocabulary import Cause, Phase, Side

UPGRADE = "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
LONG = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n"
RESET = struct.pack("ii", 1, 0)


def get(target: str = "/", extra: str = "", version: str = "1.1") -> bytes:
    """Returns: a request without a body."""
    return f"GET {target} HTTP/{version}\r\nHost: t\r\n{extra}\r\n".encode()


def post(body: bytes, extra: str = "", length: int | None = None, method: str = "POST") -> bytes:
    """Returns: a request with a body, or the part of it that ``body`` is."""
    size = len(body) if length is None else length
    return f"{method} / HTTP/1.1\r\nHost: t\r\nContent-Length: {size}\r\n{extra}\r\n".encode() + body


def sole_record(proxy: ProxyProcess) -> LogRecord:
    """Wait for the only record of a proxy. Returns: it, checked."""
    (record,) = proxy.wait_requests(1)
    harness.check_record(record)
    return record


@contextlib.contextmanager
def served(script: Script, *options: str) -> collections.abc.Iterator[tuple[Upstream, ProxyProcess, Wire]]:
    """Give an upstream, a proxy and a client's connection."""
    with (
        Upstream(script) as upstream,
        ProxyProcess(upstream.url, *options) as proxy,
        connect(proxy.address) as wire,
    ):
        yield upstream, proxy, wire


# -- upstream resets --------------------------------------------------------------------------------------------------


def test_an_upstream_that_resets_between_connect_and_first_look() -> None:
    """The connect succeeds, and the reset comes before the socket is asked for anything: a reset, and no bug."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        settings = load_settings(["--upstream", f"http://127.0.0.1:{listener.getsockname()[1]}"], {})
        pool = upstream_pool(settings, None)
        connection = pool.lease()

        def reset_then_go_on(fd: int, events: int, at_most_s: float | None) -> bool:
            accepted, _ = listener.accept()
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            accepted.close()
            poller = select.poll()
            poller.register(fd, select.POLLIN)
            assert poller.poll(5000)
            with socket.socket(fileno=socket.dup(fd)) as sock:
                # A connect that was looked at before the reset came finds no error; here asking for it takes it away.
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            return True

        with pytest.raises(Abort) as caught:
            connection.open(reset_then_go_on)
        pool.close()
    abort = caught.value
    assert (abort.side, abort.phase, abort.cause) == (Side.UPSTREAM, Phase("connect"), Cause("reset"))
    assert (abort.status, abort.error_type) == (502, "connection_terminated")


def test_an_upstream_that_resets_whatever_it_accepts_is_never_our_own_bug() -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)  # those it accepts inherit it
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        with ProxyProcess(f"http://127.0.0.1:{listener.getsockname()[1]}") as proxy:
            for _ in range(200):
                with connect(proxy.address) as wire:
                    wire.send(get())
                    listener.accept()[0].close()
                    assert wire.read_response().status == 502
            records = proxy.wait_requests(200)
    for record in records:
        harness.check_record(record)
        assert (record["side"], record["cause"]) == ("upstream", "reset")
        assert record["phase"] in ("connect", "response_head")


@pytest.mark.parametrize(
    "greeting",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"220 mail.test ESMTP\r\n",
        b"+OK",
        b"HTTP/1.1 20\r\n",
        b"HTTX",
        b"HTTP/3.0 200 OK\r\n",
    ],
)
def test_an_upstream_that_speaks_another_protocol_is_not_waited_for(greeting: bytes) -> None:
    def script(wire: Wire) -> None:
        wire.send(greeting)
        wire.await_end()

    with served(script) as (_, proxy, wire):
        wire.send(get())
        assert wire.read_response().status == 502
        record = sole_record(proxy)
    assert (record["side"], record["phase"], record["cause"]) == ("upstream", "response_head", "protocol")
    assert greeting.decode().strip() in record["message"]


@pytest.mark.parametrize("part", [b"H", b"HTTP", b"HTTP/", b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r", b"HTTP/1.1 200 OK\r\n"])
def test_a_status_line_may_come_in_parts(part: bytes) -> None:
    whole = ok(b"fine")

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.send(part)
        time.sleep(0.1)
        wire.send(whole[len(part) :])
        wire.await_end()

    with served(script) as (_, proxy, wire):
        assert whole.startswith(part)
        wire.send(get())
        assert wire.read_response().body == b"fine"
        assert sole_record(proxy)["event"] == "request.complete"


# -- requests in a row ------------------------------------------------------------------------------------------------


def answer_slowly(wire: Wire) -> None:
    """Answer each request with its target, after a moment."""
    while True:
        target = wire.read_request().split()[1]
        time.sleep(0.05)  # so that the client's end is there before the answer
        wire.send(ok(target))


def test_a_half_close_behind_pipelined_requests_leaves_them_all_answered_where_that_is_allowed() -> None:
    with served(answer_slowly, "--client-half-close", "allow") as (_, proxy, wire):
        wire.send_and_end(get("/1") + get("/2") + get("/3"))
        assert [wire.read_response().body for _ in range(3)] == [b"/1", b"/2", b"/3"]
        assert wire.await_end() == "fin"
        records = proxy.wait_requests(3)
    assert [record["event"] for record in records] == ["request.complete"] * 3
    assert [record["bytes"]["client_read"] for record in records] == [len(get("/1"))] * 3
    assert sum(record["bytes"]["client_written"] for record in records) == wire.received.count


def test_a_half_close_behind_pipelined_requests_ends_the_first_and_begins_no_other() -> None:
    with served(answer_slowly) as (upstream, proxy, wire):
        wire.send_and_end(get("/1") + get("/2") + get("/3"))
        assert wire.await_end() == "fin"
        record = sole_record(proxy)
        assert (record["side"], record["cause"], record["target"]) == ("client", "closed", "/1")
        assert record["bytes"]["client_read"] == len(get("/1"))
        upstream.settle()
        assert not any(target in wire.received.octets for wire in upstream.wires for target in (b"/2", b"/3"))
        assert proxy.stop()["requests"]["begun"] == 1


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_what_a_client_sends_behind_an_early_answer_is_never_a_request(framing: str) -> None:
    """Upstream answers the head alone; the body that comes all the same looks like a request."""
    smuggled = get("/smuggled")
    if framing == "length":
        octets, rest = post(b"", "Expect: 100-continue\r\n", length=len(smuggled)), smuggled
    else:
        head = b"POST / HTTP/1.1\r\nHost: t\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n"
        octets, rest = head, chunk(smuggled) + b"0\r\n\r\n"
    with served(peers.answer_at_once(b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n")) as (upstream, proxy, wire):
        wire.send(octets)
        response = wire.read_response()
        assert (response.status, response.get("connection")) == (403, b"close")
        wire.send(rest + get("/next"))
        assert wire.await_end() == "fin"
        record = sole_record(proxy)
        assert (record["event"], record["status"]) == ("request.complete", 403)
        assert record["bytes"]["request_body"] == 0
        upstream.settle()
        wire.close()
        (seen,) = upstream.wires
        assert b"smuggled" not in seen.received.octets
        assert proxy.stop()["requests"]["begun"] == 1


@pytest.mark.parametrize(
    "cut",
    [LONG + b"abc", CHUNKED + chunk(b"abc"), b"HTTP/1.1 200 OK\r\nContent-", b"garbage\r\n\r\n"],
    ids=["length", "chunks", "head", "garbage"],
)
def test_behind_a_response_that_was_cut_no_request_is_served(cut: bytes) -> None:
    with served(peers.answer_and_close(cut)) as (upstream, proxy, wire):
        wire.send(get("/1") + get("/2"))
        wire.await_end()
        record = sole_record(proxy)
        assert (record["event"], record["target"]) == ("request.abort", "/1")
        assert not any(b"/2" in wire.received.octets for wire in upstream.wires)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_an_early_answer_that_is_whole_before_the_client_leaves(tls: bool, certificates: Certificates) -> None:
    """Both are seen at once. The client has all that it is going to get: its end is none of the request's business."""
    options = ("--tls-cert", certificates.server, "--tls-key", certificates.server) if tls else ()
    context = certificates.client_context() if tls else None
    answer_now = threading.Event()

    def script(wire: Wire) -> None:
        wire.read_head()
        assert answer_now.wait(10)
        wire.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 5\r\nConnection: close\r\n\r\nlarge")
        wire.await_end()

    with (
        Upstream(script) as upstream,
        ProxyProcess(upstream.url, *options) as proxy,
        connect(proxy.address, context) as wire,
    ):
        wire.send(post(b"x" * 1000, length=2_000_000))
        upstream.await_head()
        time.sleep(0.1)  # until the proxy waits for both
        for pid in proxy.worker_pids():
            os.kill(pid, signal.SIGSTOP)
        time.sleep(0.1)  # until all its threads have stopped
        try:
            answer_now.set()
            wire.cut_write()
            time.sleep(0.2)
        finally:
            for pid in proxy.worker_pids():
                os.kill(pid, signal.SIGCONT)
        assert wire.read_response("POST").status == 413
        record = sole_record(proxy)
    assert record["event"] == "request.complete"
    assert (record["status"], record["bytes"]["response_body"]) == (413, 5)
    # Of the rest of the request nobody knows but the record.
    assert [event["what"] for event in record["events"]] == ["unread"]


@pytest.mark.parametrize("trailer", [b"", b"X-Sum: 1\r\n"], ids=["no trailer", "a trailer"])
def test_no_request_comes_behind_the_trailers_of_another(trailer: bytes) -> None:
    """There are servers that take them for fields of the next request on their connection, whoever's that is."""
    with Upstream(peers.answer_all(ok(b"1"))) as upstream, ProxyProcess(upstream.url, "--workers", "1") as proxy:
        with connect(proxy.address) as wire:
            wire.send(
                b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n" + trailer + b"\r\n"
            )
            assert wire.read_response("POST").status == 200
        proxy.wait_requests(1)  # by then upstream's connection was given back
        with connect(proxy.address) as wire:
            wire.get("/next")
            assert wire.read_response().status == 200
        assert len(upstream.wires) == (2 if trailer else 1)
        assert trailer in bytes(upstream.wires[0].received)


# -- repeated on a fresh connection -----------------------------------------------------------------------------------


def stale_then(seen: list[bytes]) -> Script:
    """Answer once on the first connection and reset it when more comes; answer on the others."""
    count = 0

    def script(wire: Wire) -> None:
        nonlocal count
        count += 1
        first = count == 1
        while True:
            if first and wire.sent.count:
                wire.read_head()
                wire.reset()
                return
            seen.append(wire.read_request())
            wire.send(ok())

    return script


def test_a_put_is_repeated_with_its_body() -> None:
    seen: list[bytes] = []
    with served(stale_then(seen)) as (upstream, proxy, wire):
        wire.get()
        assert wire.read_response().status == 200
        wire.send(post(b"content", method="PUT"))
        assert wire.read_response().status == 200
        record = proxy.wait_requests(2)[1]
        harness.check_record(record)
        assert [attempt["cause"] for attempt in record["attempts"]] == ["reset"]
        assert record["bytes"]["request_body"] == len(b"content")
        assert record["bytes"]["upstream_written"] == len(seen[1]) == upstream.wires[1].received.count
        assert seen[1].endswith(b"\r\n\r\ncontent")


def test_a_put_whose_body_is_on_its_way_is_not_repeated() -> None:
    """What was passed on is gone, and half of a body is no body."""
    with served(stale_then([])) as (upstream, proxy, wire):
        wire.get()
        assert wire.read_response().status == 200
        wire.send(post(b"", length=200_000, method="PUT"))
        wire.send_until_answered(b"x" * 200_000)
        response = wire.read_response()
        record = proxy.wait_requests(2)[1]
        harness.check_record(record)
        if record["event"] == "request.abort":
            assert (record["side"], record["cause"], response.status) == ("upstream", "reset", 502)
            assert not record.get("attempts")
        else:  # the reset came before the first octet of the body
            assert record["bytes"]["request_body"] == 200_000
            assert len(record["attempts"]) == 1
        for connection in upstream.wires[1:]:
            assert connection.received.octets.count(b"x") in (0, 200_000)


# -- switched protocols -----------------------------------------------------------------------------------------------


def frame(payload: bytes, opcode: int = 2) -> bytes:
    """Returns: a frame of RFC 6455 as a client sends it, masked."""
    mask = os.urandom(4)
    size = bytes([0x80 | 126]) + len(payload).to_bytes(2, "big")
    return bytes([0x80 | opcode]) + size + mask + bytes(octet ^ mask[at % 4] for at, octet in enumerate(payload))


def test_websocket_frames_pass_octet_for_octet() -> None:
    frames = [frame(os.urandom(size)) for size in (0, 1, 125, 126, 4096, 60_000)]
    octets = b"".join(frames) + frame(b"\x03\xe8", opcode=8)
    with served(peers.upgrade(SWITCHED)) as (upstream, proxy, wire):
        # A client may be sure of its upgrade, and not wait for the 101.
        wire.send(get("/chat", UPGRADE + "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n") + frames[0])
        head = wire.read_head()
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" in head
        wire.send(octets[len(frames[0]) :])
        assert wire.read_exactly(len(octets)) == octets
        wire.end_write()
        assert wire.await_end() == "fin"
        record = sole_record(proxy)
        assert (record["event"], record["status"]) == ("request.complete", 101)
        assert record["bytes"]["request_body"] == record["bytes"]["response_body"] == len(octets)
        assert b"\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" in upstream.wires[0].received.octets


def test_a_tunnel_begins_behind_the_body_of_its_request() -> None:
    def script(wire: Wire) -> None:
        assert wire.read_request().endswith(b"body")
        wire.send(SWITCHED)
        wire.send(wire.read())
        wire.end_write()

    with served(script) as (_, proxy, wire):
        wire.send(post(b"body", UPGRADE) + b"tunnel")
        wire.read_head()
        assert wire.read_exactly(6) == b"tunnel"
        wire.end_write()
        wire.await_end()
        record = sole_record(proxy)
    assert record["event"] == "request.complete"
    assert (record["bytes"]["request_body"], record["bytes"]["response_body"]) == (10, 6)


@pytest.mark.parametrize(
    ("offered", "chosen", "switches"),
    [
        ("websocket", "websocket", True),
        ("websocket", "WebSocket", True),
        ("h2c, websocket", "websocket", True),
        ("HTTP/2.0,SHTTP/1.3 , IRC/6.9", "irc/6.9", True),
        ("tcp", "websocket", False),
        ("tcp/1", "tcp/2", False),
        ("tcp", "tcp, websocket", False),
        ("tcp", "", False),
        ("tcp", None, False),
    ],
)
def test_upstream_switches_to_no_protocol_but_one_that_was_offered(
    offered: str, chosen: str | None, switches: bool
) -> None:
    field = b"" if chosen is None else f"Upgrade: {chosen}\r\n".encode()
    answer = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n" + field + b"\r\n"
    with served(peers.upgrade(answer)) as (_, proxy, wire):
        wire.send(get("/", f"Connection: Upgrade\r\nUpgrade: {offered}\r\n"))
        status = wire.read_head().split(b" ")[1]
        wire.end_write()
        wire.await_end()
        record = sole_record(proxy)
    if switches:
        assert (status, record["event"], record["status"]) == (b"101", "request.complete", 101)
    else:
        assert status == b"502"
        assert (record["side"], record["phase"], record["cause"]) == ("upstream", "response_head", "protocol")


@pytest.mark.parametrize(
    "octets",
    [
        get(),
        get(extra="Upgrade: websocket\r\n"),
        get(extra="Connection: Upgrade\r\n"),
        get(extra=UPGRADE, version="1.0"),
        post(b"half", UPGRADE, length=8),
    ],
    ids=["unasked", "no option", "no field", "HTTP/1.0", "half a request"],
)
def test_upstream_may_not_switch_protocols(octets: bytes) -> None:
    with served(peers.answer_at_once(SWITCHED + b"octets of no protocol")) as (_, proxy, wire):
        wire.send(octets)
        assert wire.read_response().status == 502
        assert wire.await_end() == "fin"
        record = sole_record(proxy)
    assert (record["event"], record["side"]) == ("request.abort", "upstream")
    assert (record["phase"], record["cause"]) == ("response_head", "protocol")
    assert b"octets of no protocol" not in wire.received.octets


# -- interim responses ------------------------------------------------------------------------------------------------


def test_interim_responses_do_not_keep_a_request_alive() -> None:
    """The limit is on the final head: whoever says 103 again and again has not answered."""

    def script(wire: Wire) -> None:
        wire.read_request()
        while not select.select([wire.sock], [], [], 0.02)[0]:
            wire.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")

    with served(script, "--upstream-head-timeout", "0.2") as (_, proxy, wire):
        wire.get()
        while (response := wire.read_response()).status == 103:
            assert response.whole
        assert response.status == 504
        record = sole_record(proxy)
    assert (record["phase"], record["cause"]) == ("response_head", "timeout")
    assert record["limit"]["name"] == "upstream_head_timeout"
    assert record["bytes"]["client_written"] == wire.received.count


def test_thousands_of_interim_responses_arrive_in_order() -> None:
    interim = b"".join(b"HTTP/1.1 103 Early Hints\r\nX-N: %d\r\n\r\n" % n for n in range(5000))
    with served(answer(interim + ok())) as (_, proxy, wire):
        wire.get()
        for n in range(5000):
            response = wire.read_response()
            assert (response.status, response.get("x-n")) == (103, b"%d" % n)
        assert wire.read_response().body == b"ok"
        record = sole_record(proxy)
    assert record["bytes"]["upstream_read"] == len(interim + ok())
    assert record["bytes"]["client_written"] == wire.received.count


def test_a_client_of_http_1_0_gets_no_interim_response() -> None:
    with served(answer(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 3 + ok())) as (_, proxy, wire):
        wire.send(get(version="1.0"))
        assert wire.read_response().status == 200
        record = sole_record(proxy)
    assert record["bytes"]["client_written"] == wire.received.count


# -- bounds, to the octet ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("size", [1000, 1001])
def test_max_body_size_is_the_largest_body_that_passes(framing: str, size: int) -> None:
    octets = post(b"x" * size)
    if framing == "chunked":
        octets = b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
        octets += chunk(b"x" * 500) + chunk(b"x" * (size - 500)) + b"0\r\n\r\n"
    with served(answer_all(ok()), "--max-body-size", "1000") as (_, proxy, wire):
        wire.send(octets)
        assert wire.read_response().status == (200 if size == 1000 else 413)
        record = sole_record(proxy)
    if size == 1000:
        assert record["bytes"]["request_body"] == 1000
    else:
        assert record["limit"] == {"name": "max_body_size", "value": 1000, "source": "flag"}


@pytest.mark.parametrize("parts", [1, 3], ids=["at once", "in parts"])
@pytest.mark.parametrize("size", [2048, 2049])
def test_max_head_size_is_the_largest_head_that_passes(size: int, parts: int) -> None:
    octets = get(extra="X: y\r\n")
    octets = octets.replace(b"X: y", b"X: " + b"y" * (1 + size - len(octets)))
    assert len(octets) == size
    with served(answer_all(ok()), "--max-head-size", "2048") as (_, proxy, wire):
        wire.send_in_parts(octets, -(-size // parts), 0.02)
        assert wire.read_response().status == (200 if size == 2048 else 431)
        record = sole_record(proxy)
    assert record["bytes"]["client_read"] == size


@pytest.mark.parametrize("parts", [1, 3], ids=["at once", "in parts"])
@pytest.mark.parametrize("size", [2048, 2049])
def test_max_head_size_is_the_largest_head_of_upstreams_that_passes(size: int, parts: int) -> None:
    octets = ok(b"", b"X: y\r\n")
    octets = octets.replace(b"X: y", b"X: " + b"y" * (1 + size - len(octets)))
    assert len(octets) == size

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send_in_parts(octets, -(-size // parts), 0.02)
        wire.await_end()

    with served(script, "--max-head-size", "2048") as (_, proxy, wire):
        wire.get()
        assert wire.read_response().status == (200 if size == 2048 else 502)
        record = sole_record(proxy)
    if size == 2049:
        assert (record["phase"], record["cause"]) == ("response_head", "limit")


@pytest.mark.parametrize("script", [answer_all(ok()), peers.answer_and_close(b"")], ids=["complete", "abort"])
@pytest.mark.parametrize("part", ["method", "target"])
def test_no_request_makes_a_line_of_the_log_too_long(part: str, script: Script) -> None:
    method, target = (b"M" * 60_000, b"/") if part == "method" else (b"GET", b"/" + b"\\" * 60_000)
    with served(script) as (_, proxy, wire):
        wire.send(method + b" " + target + b" HTTP/1.1\r\nHost: t\r\n\r\n")
        assert wire.read_response().whole
        record = sole_record(proxy)  # reading the log checks the length of its lines
    logged = record[part]
    assert 1000 < len(logged) < 32_768


# -- responses that the client does not take --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10_777, 12_554])  # where the kernel stops taking octets is a matter of chance
def test_no_answer_of_ours_is_put_into_half_a_response_under_tls(size: int, certificates: Certificates) -> None:
    """A record of TLS may be half sent when the proxy ends: no octet of it counts as written, and yet only its other
    half can follow.
    """
    own = ("--tls-cert", certificates.server, "--tls-key", certificates.server, "--drain-timeout", "0.2")
    with (
        Upstream(answer_all(ok(b"x" * size))) as upstream,
        ProxyProcess(upstream.url, *own) as proxy,
        connect(proxy.address, certificates.client_context(), receive_buffer=8192) as wire,
    ):
        wire.send(get() * 1000)
        settled = 0
        while settled != (settled := len(proxy.requests())) or not settled:
            time.sleep(0.3)  # until the responses stand still
        proxy.send_signal(signal.SIGTERM)
        time.sleep(0.6)  # the drain is over, and an answer would wait for the client to take it for a second
        wire.read_to_end()
        proxy.await_stop()
        records = proxy.requests()
    assert records[-1]["cause"] == "shutdown"
    assert records[-1]["status"] in (200, None)
    begun = bytes(wire.received).count(b"HTTP/1.1 200 OK\r\n")
    assert begun == sum(record["status"] == 200 for record in records)
    assert wire.received.count == sum(record["bytes"]["client_written"] for record in records)


# -- broken TLS -------------------------------------------------------------------------------------------------------


def send_with_broken_record(wire: Wire, octets: bytes) -> None:
    """Send octets and, in the same segment, a record that does not decrypt."""
    assert isinstance(wire, TlsWire)
    wire.tls.write(octets)
    wire.sock.sendall(wire._outgoing.read() + b"\x17\x03\x03\x00\x20" + bytes(32))


def check_broken(record: LogRecord, side: str, *phases: str) -> None:
    """Check that a record blames the broken record of TLS, and no end that there was not."""
    harness.check_record(record)
    assert (record["event"], record["side"]) == ("request.abort", side)
    assert record["cause"] == "tls"
    assert record["phase"] in phases
    assert record["exception"]["class"] == "SSLError"
    assert "without close_notify" not in record["message"]


@pytest.mark.parametrize(
    ("octets", "phase"),
    [(b"GET / HTT", "request_head"), (post(b"abc", length=10), "request_body"), (get(), "response_head")],
    ids=["head", "body", "request"],
)
def test_a_broken_record_behind_octets_of_the_client_is_no_end(
    octets: bytes, phase: str, certificates: Certificates
) -> None:
    own = ("--tls-cert", certificates.server, "--tls-key", certificates.server)
    with (
        Upstream(peers.silent) as upstream,
        ProxyProcess(upstream.url, *own) as proxy,
        connect(proxy.address, certificates.client_context()) as wire,
    ):
        send_with_broken_record(wire, octets)
        with pytest.raises(ssl.SSLError) as told:
            wire.await_end()
        assert "BAD_RECORD_MAC" in str(told.value.reason)
        # It may be seen while upstream is being connected.
        check_broken(sole_record(proxy), "client", *((phase,) if phase == "request_head" else (phase, "connect")))


def test_a_broken_record_behind_octets_of_upstream_is_no_end(certificates: Certificates) -> None:
    def script(wire: Wire) -> None:
        wire.read_request()
        send_with_broken_record(wire, LONG + b"abc")
        try:
            wire.await_end()
        except ssl.SSLError as error:
            alerts.append(str(error.reason))

    alerts: list[str] = []
    with (
        Upstream(script, "tls", tls=certificates.server_context()) as upstream,
        ProxyProcess(upstream.url, "--upstream-ca", certificates.ca) as proxy,
        connect(proxy.address) as wire,
    ):
        wire.get()
        response = wire.read_response()
        record = sole_record(proxy)
        check_broken(record, "upstream", "response_body")
    assert (response.body, response.whole) == (b"abc", False)
    assert record["bytes"]["response_body"] == 3
    (alert,) = alerts
    assert "BAD_RECORD_MAC" in alert


# -- peers that wait --------------------------------------------------------------------------------------------------


def hold(octets: bytes, *, end: bool = False, fill: bool = False) -> Script:
    """Read a head, answer with octets, then wait without a word until the other side ends."""

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.send(octets)
        if fill:
            wire.fill(quiet_s=0.1)
        if end:
            wire.end_write()
        poller = select.poll()
        poller.register(wire.sock, 0 if end else select.POLLRDHUP)
        poller.poll(3000)

    return script


@pytest.mark.parametrize(
    ("kind", "half_close"), [("tcp", "abort"), ("tcp", "allow"), ("tls", "allow"), ("unix", "allow")]
)
def test_waiting_costs_no_time_of_the_processor(kind: str, half_close: str, certificates: Certificates) -> None:
    """Each of these peers makes something about a socket ready that is of no use yet: a loop that does not see that
    spins.
    """
    tls = kind == "tls"
    own = ("--tls-cert", certificates.server, "--tls-key", certificates.server, "--upstream-ca", certificates.ca)
    context = certificates.client_context() if tls else None
    with contextlib.ExitStack() as stack:
        upstream = Upstream(peers.silent, kind, tls=certificates.server_context() if tls else None)
        stack.enter_context(upstream)
        options = ("--client-half-close", half_close, *(own if tls else ()))
        listen = "unix" if kind == "unix" else "127.0.0.1:0"
        proxy = stack.enter_context(ProxyProcess(upstream.url, *options, listen=listen))

        def begin(script: Script, octets: bytes, *, head: bool = False, fill: bool = False, end: bool = False) -> None:
            upstream.script = script
            before = len(upstream.wires)
            wire = stack.enter_context(connect(proxy.address, context))
            wire.send(octets)
            upstream.wire(before)
            if head:
                wire.read_head()
            if fill:
                wire.fill(quiet_s=0.1)
            if end:
                wire.end_write()

        begin(peers.silent, get() * 3)
        begin(peers.silent, get(), end=half_close == "allow")
        begin(peers.silent, post(b"abc", length=10))
        begin(peers.deaf, post(b"", length=10**9), fill=True)
        begin(hold(LONG, fill=True), get())
        begin(hold(LONG, end=True, fill=True), get())
        begin(hold(LONG), post(b"", length=10**9), head=True, fill=True)
        begin(hold(SWITCHED), get(extra=UPGRADE), head=True)
        begin(hold(SWITCHED), get(extra=UPGRADE), head=True, end=True)
        begin(hold(SWITCHED, end=True), get(extra=UPGRADE), head=True)
        begin(hold(SWITCHED), get(extra=UPGRADE), head=True, fill=True, end=True)
        begin(hold(SWITCHED, end=True, fill=True), get(extra=UPGRADE), head=True)
        time.sleep(0.1)  # until all have come to their waits, which shows nowhere
        spans: list[float] = []
        while len(spans) < 3 and min(spans, default=1.0) >= 0.15:  # a loop that spins does so in each of them
            used_s = proxy.cpu_s()
            time.sleep(0.4)  # what is measured
            spans.append(proxy.cpu_s() - used_s)
        assert min(spans) < 0.15, spans


# -- ends that look whole -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "last", [b"0", b"0\r", b"0\r\n", b"0\r\nX: y\r\n", b"0\r\nX: y\r\n\r", b"0\r\nHost: y\r\n\r\n"]
)
def test_a_last_chunk_without_its_end_is_not_passed_on(last: bytes) -> None:
    """Python's own client takes ``0`` and an end for a whole message."""

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.send(CHUNKED + chunk(b"abc"))
        time.sleep(0.05)  # so that it comes in a read of its own
        for i in range(len(last)):
            wire.send(last[i : i + 1])
        time.sleep(0.05)
        wire.end_write()
        wire.await_end()

    with served(script) as (_, proxy, wire):
        wire.send(get())
        octets = wire.read_to_end()
        assert octets.endswith(b"\r\n\r\n3\r\nabc\r\n")
        record = sole_record(proxy)
        assert (record["event"], record["side"]) == ("request.abort", "upstream")
        assert record["bytes"]["response_body"] == 3
        assert record["bytes"]["client_written"] == len(octets)


@pytest.mark.parametrize("begins", ["with the head", "behind a chunk"])
def test_a_request_that_is_cut_in_a_chunk_line_or_a_trailer_does_not_look_whole(begins: str) -> None:
    """Some recipients take a part of either for the end of the message."""
    parts = (b"0", b"0\r", b"0\r\n", b"000;x", b"0\r\nX", b"0\r\nX: y\r\n", b"0\r\nX: y\r\n\r", b"5", b"5;x=y\r")
    head = b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
    before = b"" if begins == "with the head" else chunk(b"abc")

    def script(wire: Wire) -> None:
        wire.read_head()
        assert wire.read_exactly(len(before)) == before
        got.set()
        seen.append(wire.read_to_end())

    got, seen = threading.Event(), list[bytes]()
    with Upstream(script) as upstream, ProxyProcess(upstream.url) as proxy:
        for part in parts:
            with connect(proxy.address) as wire:
                if before:
                    wire.send(head + before)
                    assert got.wait(10)
                    wire.send(part)
                else:
                    wire.send(head + part)
                    assert got.wait(10)
                proxy.wait_in_flight(lambda request: request["bytes"]["client_read"] == wire.sent.count)
            record = proxy.next_request()
            assert (record["side"], record["phase"], record["cause"]) == ("client", "request_body", "closed")
            assert record["bytes"]["request_body"] == (3 if before else 0)
            upstream.settle()
            got.clear()
        assert seen == [b""] * len(parts)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
def test_chunks_and_trailers_in_pieces_arrive_as_they_were_sent(size: int) -> None:
    message = b"".join(chunk(bytes([65 + i]) * (i * 7)) for i in range(1, 20)) + b"000;x=y\r\nX: y\r\nZ:\r\n\r\n"
    seen = []

    def script(wire: Wire) -> None:
        seen.append(wire.read_request())
        wire.send(CHUNKED)
        for i in range(0, len(message), size):
            wire.send(message[i : i + size])
            if size > 1:
                time.sleep(0.002)  # so that most come in reads of their own
        wire.await_end()

    with served(script) as (_, proxy, wire):
        wire.send(b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n")
        for i in range(0, len(message), size):
            wire.send(message[i : i + size])
        head = wire.read_head()
        assert b"200 OK" in head
        assert wire.read_exactly(len(message)) == message
        assert seen[0].endswith(b"\r\n\r\n" + message)
        record = sole_record(proxy)
        assert record["event"] == "request.complete"
        assert record["bytes"]["request_body"] == record["bytes"]["response_body"] == sum(i * 7 for i in range(1, 20))
        assert record["bytes"]["client_written"] == len(head) + len(message)


@pytest.mark.parametrize(
    "octets", [b"HEAD / HTTP/1.1\r\n\r\n", b"HEAD / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: gzip\r\n\r\n"]
)
def test_a_refused_head_request_gets_no_body(octets: bytes) -> None:
    with served(answer(ok())) as (_, proxy, wire):
        wire.send(octets)
        head, _, body = wire.read_to_end().partition(b"\r\n\r\n")
        assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 501 "))
        assert body == b""
        assert sole_record(proxy)["event"] == "request.reject"


def test_what_a_broken_transfer_leaves_is_no_part_of_the_next() -> None:
    """Octets that went into a pipe and not out of it any more."""
    much, more = ok(b"a" * 8_000_000), os.urandom(4_000_000)

    def script(wire: Wire) -> None:
        wire.send(ok(more) if wire.read_head().startswith(b"GET /more") else much)
        wire.await_end()

    with served(script) as (_, proxy, wire):
        with connect(proxy.address, receive_buffer=8192) as paused:
            paused.send(get("/much"))
            paused.read_head()
            head = len(much) - 8_000_000
            proxy.wait_in_flight(
                lambda request: request["bytes"]["upstream_read"] - head > request["bytes"]["response_body"] > 0
            )
            paused.reset()
        proxy.wait_requests(1)
        wire.send(get("/more"))
        assert wire.read_response().body == more


def test_no_more_empty_pipes_are_kept_than_are_worth_it() -> None:
    store = PipeStore()
    pipes = [pipe for pipe in (store.take() for _ in range(40)) if pipe is not None]
    before = len(os.listdir("/proc/self/fd"))
    for pipe in pipes:
        store.give(pipe)
    closed = (before - len(os.listdir("/proc/self/fd"))) // 2
    for _ in pipes[closed:]:
        again = store.take()
        assert again is not None
        assert again in pipes
        again.close()
    assert closed == len(pipes) - 32


def test_a_client_that_takes_no_answer_was_told_nothing() -> None:
    with Upstream(answer(ok())) as upstream, ProxyProcess(upstream.url, listen="unix") as proxy:
        with connect(proxy.address) as wire:
            wire.sock.shutdown(socket.SHUT_RD)  # of a unix socket the proxy sees it when it writes
            wire.send(b"GET / HTTP/1.1\r\nHost : t\r\n\r\n")
            record = sole_record(proxy)
        assert (record["event"], record["cause"], record["status"]) == ("request.reject", "protocol", None)
        assert record["bytes"]["client_written"] == 0
        assert "notes" not in record


def test_an_upgrade_that_is_required_on_a_connection_that_ends() -> None:
    refusal = b"HTTP/1.1 426 Upgrade Required\r\nUpgrade: tcp\r\nConnection: Upgrade\r\nContent-Length: 0\r\n\r\n"
    with served(answer(refusal)) as (_, proxy, wire):
        wire.send(get(extra="Connection: close\r\n"))
        lines = wire.read_to_end().split(b"\r\n")
        assert b"Connection: Upgrade" in lines
        assert b"Connection: close" in lines
        assert sole_record(proxy)["status"] == 426


def test_what_a_client_sends_costs_little_while_many_chunks_wait_for_it() -> None:
    """Each octet would otherwise have all that waits counted anew, which takes milliseconds. And the count is right."""
    chunks = b"".join(chunk(b"a" * (1 + number % 3)) for number in range(300_000))

    def script(wire: Wire) -> None:
        wire.read_head()
        with contextlib.suppress(PeerGone, TimeoutError):
            wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks * 5)

    with Upstream(script) as upstream, ProxyProcess(upstream.url) as proxy:
        with connect(proxy.address, receive_buffer=4096) as wire:
            wire.send(b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n")
            head = wire.read_head()
            before, since = -1, time.monotonic()

            def waits_for_client() -> bool:
                nonlocal before, since
                counts = proxy.wait_in_flight(lambda request: "bytes" in request)["bytes"]
                if counts["client_written"] != before:
                    before, since = counts["client_written"], time.monotonic()
                time.sleep(0.1)
                return time.monotonic() - since > 1 and counts["upstream_read"] > before + 10_000

            wait_until(waits_for_client, 20)
            began_s = proxy.cpu_s()
            for _ in range(300):
                wire.send(chunk(b"x"))
                time.sleep(0.003)
            assert proxy.cpu_s() - began_s < 0.3
            wire.reset()
        counts = proxy.next_request()["bytes"]
        reader = ChunkedFraming()
        reader.feed(chunks * 5, 0, counts["client_written"] - len(head))
        assert counts["response_body"] == reader.content


@pytest.mark.parametrize(
    ("body", "cause", "status"),
    [(b"3\r\nabc\r\nzz\r\n", "protocol", 400), (chunk(b"x" * 20), "limit", 413)],
    ids=["malformed", "too large"],
)
@pytest.mark.parametrize("before", [b"", chunk(b"abcde")], ids=["first", "behind a chunk"])
@pytest.mark.parametrize("comes", ["with the head", "later"])
def test_content_that_is_not_to_go_on_was_not_relayed(
    comes: str, before: bytes, body: bytes, cause: str, status: int
) -> None:
    with (
        Upstream(peers.silent) as upstream,
        ProxyProcess(upstream.url, "--max-body-size", "10") as proxy,
        connect(proxy.address) as wire,
    ):
        head = b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
        if comes == "later":
            wire.send(head)
            upstream.await_head()
        wire.send((head if comes != "later" else b"") + before + body)
        assert wire.read_response().status == status
        record = sole_record(proxy)
    assert (record["event"], record["phase"], record["cause"]) == ("request.abort", "request_body", cause)
    assert record["bytes"]["client_read"] == len(head + before + body)
    assert record["bytes"]["request_body"] == 0  # all came at once, and none of it went on
