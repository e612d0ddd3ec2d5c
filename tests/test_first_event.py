"""Two ends of one exchange, one behind the other: the first decides, and neither is taken for another kind of end."""

import contextlib
import fcntl
import os
import pathlib
import signal
import socket
import ssl
import struct
import termios
import threading
import time

import pytest

from conftest import Certificates
from harness import ProxyProcess, check_record, wait_until
from peers import Upstream, Wire, answer_all, chunk, connect, full_listener, ok, silent
from proxy.aborts import Abort
from proxy.config import load_settings
from proxy.endpoint import Endpoint
from proxy.framing import NO_BODY, LengthFraming
from proxy.head import SectionMemory, parse_response_head
from proxy.kernel import reset_on_close
from proxy.relay import Flow, Relay
from proxy.vocabulary import Cause, Operation, Phase, Side

_HEAD = b"GET /%b HTTP/1.1\r\nHost: t\r\n\r\n"
_UPGRADE = b"GET /x HTTP/1.1\r\nHost: t\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
_SWITCH = b"HTTP/1.1 101 S\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
_BIG = 600_000
_LINE = b"x" * 60_000


def _big_then_silent(wire: Wire) -> None:
    """Answer the first request with much, and the second not at all."""
    wire.read_head()
    wire.send(ok(b"x" * _BIG))
    wire.read_head()
    wire.await_end()


@pytest.mark.parametrize("mode", ["abort", "allow"])
@pytest.mark.parametrize("kind", ["tcp", "tls"])
def test_a_reset_behind_a_large_response_ends_the_next_request(
    kind: str, mode: str, certificates: Certificates
) -> None:
    tls = ("--tls-cert", certificates.server) if kind == "tls" else ()
    context = certificates.client_context() if kind == "tls" else None
    with (
        Upstream(_big_then_silent) as upstream,
        ProxyProcess(upstream.url, "--client-half-close", mode, *tls) as proxy,
        # So small that the delivery of the last octets is waited for.
        connect(proxy.address, context, receive_buffer=32_768) as wire,
    ):
        wire.send(_HEAD % b"big" + _HEAD % b"next")
        time.sleep(0.1)
        assert len(wire.read_response().body) == _BIG
        wire.reset()
        big, following = proxy.wait_requests(2)
        check_record(big)
        check_record(following)
    assert (big["target"], big["event"]) == ("/big", "request.complete")
    assert (following["target"], following["side"], following["cause"]) == ("/next", "client", "reset")
    assert [event["what"] for event in following["events"]] == []


class ResettingUpstream:
    """Answers with more than all buffers take, and resets when it is told to, with nothing left to send; or closes."""

    def __init__(self, framing: bytes, octets: bytes, *, closes: bool = False) -> None:
        self.octets = b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n" + octets
        self.closes = closes
        self.delivered = threading.Event()  # into the proxy's socket
        self.reset = threading.Event()

    def script(self, wire: Wire) -> None:
        """The script of the upstream."""
        wire.read_head()
        wire.send(self.octets)
        while struct.unpack("=i", fcntl.ioctl(wire.sock, termios.TIOCOUTQ, b"\0" * 4))[0]:
            time.sleep(0.001)
        self.delivered.set()
        assert self.reset.wait(20)
        if self.closes:
            wire.end_write()
            wire.close()
        else:
            wire.reset()

    def pause_behind(self, wire: Wire) -> bytes:
        """Read as a client until all is in the proxy's socket, and let upstream reset then. Returns: what was read."""
        got = bytearray()
        while not self.delivered.is_set():
            got += wire.read(16_384)
            time.sleep(0.001)  # slower than upstream, so that all buffers are full when it is through
        time.sleep(0.2)  # the proxy writes until the client's buffer is full
        self.reset.set()
        time.sleep(0.2)
        return bytes(got)


_STOCK = b"y" * 20_000_000
_RESPONSES = {
    "length, cut": (_STOCK, b"Content-Length: 90000000", "upstream"),
    "length, whole": (_STOCK, b"Content-Length: %d" % len(_STOCK), "client"),
    "chunked, cut": (chunk(_STOCK) + b"5\r\nfo", b"Transfer-Encoding: chunked", "upstream"),
    "chunked, whole": (chunk(_STOCK) + b"0\r\n\r\n", b"Transfer-Encoding: chunked", "client"),
    "by the end, cut": (_STOCK, b"Connection: close", "upstream"),
}


@pytest.mark.parametrize("then", ["reset", "limit"])
@pytest.mark.parametrize("name", _RESPONSES)
def test_upstream_resets_while_the_client_pauses(name: str, then: str) -> None:
    """The client leaves only later. It is to blame where all of the response had come by then."""
    octets, framing, side = _RESPONSES[name]
    resetting = ResettingUpstream(framing, octets)
    options = ("--client-write-timeout", "1") if then == "limit" else ()
    with (
        Upstream(resetting.script) as upstream,
        ProxyProcess(upstream.url, *options) as proxy,
        connect(proxy.address, receive_buffer=65_536) as wire,
    ):
        wire.send(_HEAD % b"x")
        resetting.pause_behind(wire)
        if then == "reset":
            wire.reset()
        record = proxy.next_request()
        check_record(record)
    assert record["side"] == side, record["message"]
    if side == "upstream":
        assert (record["cause"], record["operation"]) == ("reset", "read")
        assert record["exception"]["errno"] == "ECONNRESET"
    else:
        assert record["cause"] == ("reset" if then == "reset" else "timeout")
        assert "was still sending" not in record["message"]
    assert record["phase"] == "response_body"


def test_who_reads_on_gets_all_that_upstream_had_sent_before_its_reset() -> None:
    resetting = ResettingUpstream(b"Content-Length: 90000000", _STOCK)
    with (
        Upstream(resetting.script) as upstream,
        ProxyProcess(upstream.url) as proxy,
        connect(proxy.address, receive_buffer=65_536) as wire,
    ):
        wire.send(_HEAD % b"x")
        octets = resetting.pause_behind(wire) + wire.read_to_end()
        record = proxy.next_request()
        check_record(record)
    assert octets.partition(b"\r\n\r\n")[2] == _STOCK
    assert (record["side"], record["cause"], record["phase"]) == ("upstream", "reset", "response_body")
    assert record["bytes"]["response_body"] == len(_STOCK)


@pytest.mark.parametrize("then", ["reads", "resets"])
@pytest.mark.parametrize("kind", ["tunnel", "upload"])
def test_a_late_octet_behind_upstreams_end_takes_nothing_of_what_came_before(kind: str, then: str) -> None:
    """Upstream has sent everything and closed in order; what the client still sends is answered with a reset, while the
    client has yet to read.
    """
    upstream_is = ResettingUpstream(b"Connection: close", _STOCK, closes=True)
    if kind == "tunnel":
        upstream_is.octets = _SWITCH + _STOCK
    head = _UPGRADE if kind == "tunnel" else b"POST /x HTTP/1.1\r\nHost: t\r\nContent-Length: 900\r\n\r\n"
    with (
        Upstream(upstream_is.script) as upstream,
        ProxyProcess(upstream.url) as proxy,
        connect(proxy.address, receive_buffer=65_536) as wire,
    ):
        wire.send(head)
        octets = upstream_is.pause_behind(wire)
        for _ in range(3):
            wire.send(b"late")
            time.sleep(0.1)
        if then == "reads":
            octets += wire.read_to_end()
            assert wire.end == "fin"
        else:
            wire.reset()
        record = proxy.next_request()
        check_record(record)
    if then == "reads":
        assert octets.partition(b"\r\n\r\n")[2] == _STOCK
        assert record["event"] == "request.complete", record["message"]
    else:
        assert (record["side"], record["cause"]) == ("client", "reset"), record["message"]


def test_close_notify_behind_a_paused_client_is_an_end_though_a_reset_follows(certificates: Certificates) -> None:
    upstream_is = ResettingUpstream(b"Connection: close", _STOCK[:8_000_000], closes=True)
    with (
        Upstream(upstream_is.script, "tls", tls=certificates.server_context()) as upstream,
        ProxyProcess(upstream.url, "--upstream-ca", certificates.ca) as proxy,
        connect(proxy.address, receive_buffer=65_536) as wire,
    ):
        wire.send(
            b"POST /x HTTP/1.1\r\nHost: t\r\nContent-Length: 900000\r\n\r\n" + b"z" * 100_000
        )  # which it never reads
        octets = upstream_is.pause_behind(wire)
        wire.send(b"late")
        time.sleep(0.1)
        octets += wire.read_to_end()
        assert wire.end == "fin"
        record = proxy.next_request()
        check_record(record)
    assert octets.partition(b"\r\n\r\n")[2] == _STOCK[:8_000_000]
    assert record["event"] == "request.complete", record["message"]


@pytest.mark.parametrize("kind", ["tunnel", "upload"])
def test_a_unix_upstream_that_dies_with_octets_unread_does_not_look_like_an_end(kind: str) -> None:
    """A write is told EPIPE, and the read behind the last octet the reset."""
    sent = 0
    begun, done = threading.Event(), threading.Event()

    def die(wire: Wire) -> None:
        nonlocal sent
        wire.read_head()
        begun.set()
        wire.send(_SWITCH if kind == "tunnel" else b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        sent = wire.fill()  # until the paused client holds all up
        wire.close()
        done.set()

    head = _UPGRADE if kind == "tunnel" else b"POST /x HTTP/1.1\r\nHost: t\r\nContent-Length: 90000000\r\n\r\n"
    with (
        Upstream(die, "unix") as upstream,
        ProxyProcess(upstream.url) as proxy,
        connect(proxy.address, receive_buffer=65_536) as wire,
    ):
        wire.send(head)
        assert begun.wait(20)
        if kind == "tunnel":
            wire.read_head()
        for _ in range(3):
            wire.send(b"z" * 10_000)  # which it never reads
        assert done.wait(20)
        wire.send(b"late")
        time.sleep(0.3)
        octets = wire.read_to_end()
        assert wire.end == "reset"
        record = proxy.next_request()
        check_record(record)
    assert (record["side"], record["cause"]) == ("upstream", "reset"), record["message"]
    content = octets if kind == "tunnel" else octets.partition(b"\r\n\r\n")[2]
    assert len(content) <= sent


def test_relays_that_ended_so_are_not_held() -> None:
    """Two aborts of one exchange must not hold each other: memory would wait for the collector."""
    resetting = [ResettingUpstream(b"Content-Length: 90000000", _STOCK[:9_000_000]) for _ in range(12)]
    at = iter(resetting)
    with Upstream(lambda wire: next(at).script(wire)) as upstream, ProxyProcess(upstream.url) as proxy:
        (worker,) = proxy.worker_pids()

        def resident() -> int:
            pages = pathlib.Path(f"/proc/{worker}/statm").read_text().split()[1]
            return int(pages) * 4096

        before = 0
        for number, each in enumerate(resetting):
            with connect(proxy.address, receive_buffer=65_536) as wire:
                wire.send(_HEAD % b"x")
                each.pause_behind(wire)
                wire.reset()
            proxy.wait_requests(number + 1)
            if number == 3:
                before = resident()
        assert {record["side"] for record in proxy.requests()} == {"upstream"}
        assert resident() - before < 3_000_000


@pytest.mark.parametrize("framing", [b"", b"Content-Length: 12\r\n"])
def test_an_early_answer_with_its_end_under_tls_is_whole_though_a_reset_follows(
    framing: bytes, certificates: Certificates
) -> None:
    """Upstream closes with octets of the request unread, and its kernel resets the connection behind close_notify."""

    def early(wire: Wire) -> None:
        wire.read_head()
        time.sleep(0.3)  # in which octets come that nobody reads
        wire.send(b"HTTP/1.1 413 No\r\n" + framing + b"\r\nwhole answer")
        wire.end_write()
        wire.close()

    with (
        Upstream(early, "tls", tls=certificates.server_context()) as upstream,
        ProxyProcess(upstream.url, "--upstream-ca", certificates.ca) as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send(b"POST /x HTTP/1.1\r\nHost: t\r\nContent-Length: 30000000\r\n\r\n")
        wire.send_until_answered(b"z" * 30_000_000)
        response = wire.read_response()
        record = proxy.next_request()
        check_record(record)
    assert (response.status, response.body) == (413, b"whole answer")
    assert record["event"] == "request.complete", record["message"]


@pytest.mark.parametrize("rest", [b"", b"exit\n"])
@pytest.mark.parametrize("kind", ["tcp", "tls"])
def test_a_client_leaves_a_tunnel_that_upstream_has_ended(kind: str, rest: bytes, certificates: Certificates) -> None:
    """Many say no close_notify then, and some have a few last octets."""

    def bye(wire: Wire) -> None:
        wire.read_head()
        wire.send(_SWITCH + b"bye")
        time.sleep(0.1)
        wire.close()

    tls = ("--tls-cert", certificates.server) if kind == "tls" else ()
    context = certificates.client_context() if kind == "tls" else None
    with Upstream(bye) as upstream, ProxyProcess(upstream.url, *tls) as proxy:
        for _ in range(3):
            with connect(proxy.address, context) as wire:
                wire.send(_UPGRADE)
                wire.read_head()
                assert wire.read_to_end() == b"bye"
                wire.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)  # with the end, in one segment
                if rest:
                    wire.send(rest)
        for record in proxy.wait_requests(3):
            check_record(record)
            assert record["event"] == "request.complete", record["message"]


def test_a_tunnel_that_both_sides_end_in_turn_has_no_other_events() -> None:
    def echo_once(wire: Wire) -> None:
        wire.read_head()
        wire.send(_SWITCH)
        while wire.read():
            pass
        wire.send(b"answer")
        wire.close()

    with Upstream(echo_once) as upstream, ProxyProcess(upstream.url) as proxy, connect(proxy.address) as wire:
        wire.send(_UPGRADE)
        wire.read_head()
        wire.send(b"stdin")
        wire.end_write()
        assert wire.read_to_end() == b"answer"
        record = proxy.next_request()
        check_record(record)
    assert record["event"] == "request.complete"
    assert [(event["side"], event["what"]) for event in record["events"]] == [
        ("upstream", "tunnel"),
        ("client", "fin"),
        ("upstream", "fin"),
    ]


@pytest.mark.parametrize("orderly", [False, True])
@pytest.mark.parametrize("behind", [b"", _HEAD % b"next", b"n" * 100_000])
def test_a_client_ends_while_upstream_is_being_connected(
    behind: bytes, orderly: bool, certificates: Certificates
) -> None:
    """What comes with its end does not hide how it ended."""
    with (
        full_listener() as port,
        ProxyProcess(f"http://127.0.0.1:{port}", "--tls-cert", certificates.server) as proxy,
        connect(proxy.address, certificates.client_context()) as wire,
    ):
        wire.sock.settimeout(0.2)
        with pytest.raises((TimeoutError, ssl.SSLError, OSError)):
            wire.read()  # session tickets: unread, they would make a reset of the end
        wire.sock.settimeout(5)
        wire.send(_HEAD % b"x")
        time.sleep(0.2)
        wire.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        if behind:
            wire.send(behind)
        if orderly:
            wire.end_write()
        wire.close()
        record = proxy.next_request()
        check_record(record)
    assert (record["side"], record["phase"]) == ("client", "connect")
    assert record["cause"] == ("closed" if orderly else "tls")


def test_one_more_signal_at_the_very_end_changes_nothing(tmp_path: pathlib.Path) -> None:
    for _ in range(10):
        with Upstream(silent) as upstream, ProxyProcess(upstream.url) as proxy:
            proxy.process.terminate()

            def ended() -> bool:
                return any(record["event"] == "server.stop" for record in proxy.records())

            wait_until(ended)
            proxy.process.terminate()
            assert proxy.process.wait(5) == 0


@pytest.mark.parametrize(("length", "side"), [(5, Side.CLIENT), (6, Side.UPSTREAM)])
def test_a_response_that_is_read_whole_is_no_matter_of_upstreams_any_more(length: int, side: Side) -> None:
    """All five octets were read and wait for the client; then upstream's connection is reset, and then the client's."""
    settings = load_settings(["--upstream", "http://127.0.0.1:1"], {})
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname())
        sock, _ = listener.accept()
    with sock:
        reset_on_close(peer)
        peer.close()
        relay = Relay.__new__(Relay)
        relay.settings, relay.upstream = settings, Endpoint(sock, Side.UPSTREAM, "upstream", None)
        relay.tunnel, relay.broken, relay.hung_up_at = False, None, 0.0
        relay.request, relay.response = Flow(NO_BODY), Flow(LengthFraming(length))
        relay.response.framing.skip(5)
        relay.response_head = parse_response_head(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", SectionMemory())
        abort = Abort(Side.CLIENT, Phase.RESPONSE_BODY, Operation.WRITE, Cause.RESET)
        decides = relay.first_of(abort)
    assert decides.side is side
    assert decides.cause is Cause.RESET


def test_what_was_read_to_find_out_how_upstream_ended_is_counted() -> None:
    def script(wire: Wire) -> None:
        wire.read_head()
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        wire.sock.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            while True:
                wire.sent.add(_LINE[: wire.sock.send(_LINE)])
        ended.set()

    ended = threading.Event()
    with (
        Upstream(script, "unix") as upstream,
        ProxyProcess(upstream.url) as proxy,
        connect(proxy.address, receive_buffer=8192) as wire,
    ):
        wire.get()
        assert ended.wait(10)
        time.sleep(0.1)
        wire.reset()
        record = proxy.next_request()
        check_record(record)
        (peer,) = upstream.wires
        assert (record["side"], record["cause"]) == ("upstream", "closed")
        assert record["bytes"]["upstream_read"] == peer.sent.count


def test_a_verdict_that_comes_behind_the_last_octet_names_its_limit() -> None:
    """All of the response is in the client's socket, which is waited for."""
    with (
        Upstream(answer_all(ok(b"x" * 300_000))) as upstream,
        ProxyProcess(upstream.url, "--tcp-user-timeout", "0.5") as proxy,
        connect(proxy.address, receive_buffer=8192) as wire,
    ):
        wire.get()
        record = proxy.next_request()
        check_record(record)
    assert (record["side"], record["phase"], record["cause"]) == ("client", "response_body", "dead_peer")
    assert record["operation"] == "write"
    assert record["limit"]["name"] == "tcp_user_timeout"
    assert record["limit"]["source"] == "flag"
    assert record["bytes"]["response_body"] == 300_000


def test_a_client_that_has_said_all_and_pauses_gets_the_rest() -> None:
    """Both sides of a tunnel have ended, which poll calls a hang-up, and the queue to the client is full."""

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.send(_SWITCH)
        assert wire.await_end() == "fin"
        wire.send(b"x" * 1_000_000)

    with (
        contextlib.ExitStack() as stack,
        Upstream(script) as upstream,
        ProxyProcess(upstream.url) as proxy,
    ):
        (worker,) = proxy.worker_pids()

        def sockets() -> int:
            names = [os.readlink(each) for each in pathlib.Path(f"/proc/{worker}/fd").iterdir() if each.is_symlink()]
            return sum(name.startswith("socket:") for name in names)

        before = sockets()
        wire = stack.enter_context(connect(proxy.address, receive_buffer=8192))
        wire.send(_UPGRADE)
        wire.read_head()
        wire.end_write()
        assert proxy.next_request()["event"] == "request.complete"
        time.sleep(0.5)
        # A socket that was closed would be the kernel's, which gives it up after some minutes.
        assert sockets() == before + 1
        assert len(wire.read_to_end()) == 1_000_000
        assert wire.end == "fin"
        wait_until(lambda: sockets() == before)


@pytest.mark.parametrize("then", ["reset", "client_write_timeout", "upstream_read_deadline", "drain"])
def test_upstream_ends_too_early_while_the_client_pauses(then: str) -> None:
    """In order, as a daemon does that is stopped; what ends the request later only shows it."""
    closing = ResettingUpstream(b"Content-Length: 90000000", _STOCK, closes=True)
    options = (f"--{then.replace('_', '-')}", "1.5") if "_" in then else ("--drain-timeout", "0.5")
    with (
        Upstream(closing.script) as upstream,
        ProxyProcess(upstream.url, *options) as proxy,
        connect(proxy.address, receive_buffer=65_536) as wire,
    ):
        wire.send(_HEAD % b"x")
        closing.pause_behind(wire)
        if then == "reset":
            wire.reset()
        elif then == "drain":
            proxy.send_signal(signal.SIGTERM)
        record = proxy.next_request()
        check_record(record)
    assert (record["side"], record["cause"], record["operation"]) == ("upstream", "closed", "read"), record["message"]
    assert record["error_type"] == "http_response_incomplete"
    assert record["bytes"]["upstream_read"] == upstream.wires[0].sent.count


@pytest.mark.parametrize("kind", ["tunnel", "allow"])
def test_who_closes_a_unix_socket_has_left_though_it_might_have_ended_one_side(kind: str) -> None:
    def script(wire: Wire) -> None:
        wire.read_head()
        if kind == "tunnel":
            wire.send(_SWITCH)
            assert wire.read_exactly(4) == b"last"
            seen.set()
        assert over.wait(20)  # silent, as a container that is attached to

    seen, over = threading.Event(), threading.Event()
    mode = ("--client-half-close", "allow") if kind == "allow" else ()
    with Upstream(script) as upstream, ProxyProcess(upstream.url, *mode, listen="unix") as proxy:
        with connect(proxy.address) as wire:
            if kind == "tunnel":
                wire.send(_UPGRADE)
                wire.read_head()
                wire.send(b"last")
            else:
                wire.get()
                wait_until(lambda: upstream.wires and upstream.wires[0].received.count)
        try:
            record = proxy.next_request()
            assert kind == "allow" or seen.wait(5)
        finally:
            over.set()
        check_record(record)
        phase = {"tunnel": "tunnel", "allow": "response_head"}[kind]
        assert (record["side"], record["phase"], record["cause"]) == ("client", phase, "closed")
        assert record["operation"] == "read"


def test_who_ends_one_side_of_a_unix_socket_is_still_answered() -> None:
    def script(wire: Wire) -> None:
        wire.read_head()
        wire.send(_SWITCH)
        assert wire.await_end() == "fin"
        time.sleep(0.2)
        wire.send(b"answer")

    with (
        Upstream(script) as upstream,
        ProxyProcess(upstream.url, listen="unix") as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send(_UPGRADE)
        wire.read_head()
        wire.end_write()
        assert wire.read_to_end() == b"answer"
        assert proxy.next_request()["event"] == "request.complete"


@pytest.mark.parametrize("limit", ["timeout", "deadline"])
def test_a_response_that_its_limit_has_ended_does_not_hold_its_connection(limit: str) -> None:
    with (
        Upstream(answer_all(ok(_STOCK))) as upstream,
        ProxyProcess(upstream.url, f"--client-write-{limit}", "1", "--max-connections", "1") as proxy,
        connect(proxy.address, receive_buffer=8192) as paused,
    ):
        paused.get()
        record = proxy.next_request()
        assert (record["side"], record["cause"]) == ("client", limit)

        def is_free() -> bool:
            with connect(proxy.address) as wire:
                wire.get()
                return wire.read_head().startswith(b"HTTP/1.1 200")

        wait_until(is_free, 5)
