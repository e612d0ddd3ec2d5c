"""TLS on both sides of a running proxy: whose certificate is good for what, what a peer under TLS can make the proxy
hold, and how a connection under TLS ends for a client that is slow to take the end.
"""

import collections.abc
import contextlib
import os
import pathlib
import select
import socket
import ssl
import threading
import time

import pytest

import harness
import peers
from conftest import Certificates
from harness import LogRecord, ProxyProcess, wait_until
from in_process import make_worker
from key_updates import KeyUpdates
from peers import TlsWire, Upstream, Wire, answer_all, connect, ok
from proxy import exchange
from proxy.config import load_settings
from proxy.endpoint import TlsEndpoint
from proxy.exchange import ClientConnection
from proxy.kernel import unread_bytes
from proxy.log import EventLog
from proxy.tls import read_contexts
from proxy.vocabulary import Side
from proxy.waiting import Control

# -- an upstream that is named by its address -------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("shown", ["wrong_name", "server"])
def test_a_certificate_of_an_upstream_by_address_must_be_good_for_the_address(
    certificates: Certificates, host: str, shown: str
) -> None:
    """urllib3 1.26 names no host to check the certificate by, if it is an address."""
    context = certificates.server_context(certificate=getattr(certificates, shown))
    with Upstream(answer_all(ok(b"taken")), "tls", tls=context, host=host) as upstream:
        port = upstream.url.rpartition(":")[2]
        url = f"https://{f'[{host}]' if ':' in host else host}:{port}"
        with (
            ProxyProcess(url, "--upstream-ca", certificates.ca) as proxy,
            connect(proxy.address) as wire,
        ):
            wire.get(extra="Authorization: Basic secret\r\n")
            response = wire.read_response()
            record = proxy.next_request()
            harness.check_record(record)
            reached = upstream.wire().received.count
    if shown == "server":
        assert (response.status, response.body) == (200, b"taken")
        return
    assert response.status == 502
    expected = ("request.abort", "upstream", "tls_handshake", "handshake", "tls", "tls_certificate_error")
    names = ("event", "side", "phase", "operation", "cause", "error_type")
    assert tuple(record[name] for name in names) == expected
    assert record["exception"]["class"] == "SSLCertVerificationError"
    assert reached == record["bytes"]["upstream_written"] == 0


def test_a_name_of_upstream_that_ends_with_a_dot_is_checked_as_urllib3_gives_it(certificates: Certificates) -> None:
    """Without the dot: it keeps a resolver from trying other domains, and no certificate has it."""
    settings = load_settings(["--upstream", "https://proxy.test.:1", "--upstream-ca", certificates.ca], {})
    context = read_contexts(settings).upstream
    assert context is not None
    ours, theirs = socket.socketpair()
    endpoint = context.wrap_socket(ours, server_hostname="proxy.test")
    with TlsWire(theirs, certificates.server_context(), server_side=True) as wire, contextlib.closing(endpoint):
        serving = threading.Thread(target=wire.handshake)
        serving.start()
        poller = select.poll()
        try:
            while not endpoint.handshake():
                poller.register(ours, endpoint.read_event)
                assert poller.poll(5000)
        finally:
            ours.shutdown(socket.SHUT_WR)
            serving.join(10)


# -- peers that ask for new keys and take nothing ----------------------------------------------------------------------

LARGE = 64 * 1024 * 1024
# Answers to so many are some MiB, and the proxy bears 256 KiB.
UPDATES = 100_000
AT_ONCE = 2000
MOST_GROWN = 16 * 1024 * 1024


def _flood(wire: TlsWire, updates: KeyUpdates) -> int:
    """Send key updates until the proxy has ended the connection. Returns: how many."""
    for sent in range(0, UPDATES, AT_ONCE):
        try:
            wire.sock.sendall(updates.make(AT_ONCE))
        except ConnectionError:
            return sent
    return UPDATES


def _check_flood(record: LogRecord, side: str, phase: str) -> None:
    harness.check_record(record)
    assert (record["event"], record["side"], record["phase"], record["cause"]) == ("request.abort", side, phase, "tls")
    assert record["exception"]["text"] == "the peer asks for key updates and takes no answer"
    assert "the peer asks for key updates and takes no answer" in record["message"]


def test_a_client_that_floods_key_updates_and_takes_nothing_of_a_response_is_ended(
    certificates: Certificates, tmp_path: pathlib.Path
) -> None:
    context = certificates.client_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.keylog_filename = str(tmp_path / "keys")
    stalled = threading.Event()

    def script(upstream: Wire) -> None:
        upstream.read_head()
        upstream.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % LARGE)
        upstream.fill()
        stalled.set()
        upstream.await_end()

    with (
        Upstream(script) as upstream,
        ProxyProcess(upstream.url, "--tls-cert", certificates.server) as proxy,
        connect(proxy.address, context, receive_buffer=4096) as wire,
    ):
        context.keylog_filename = None  # type: ignore[assignment]  # closes it, which the stub does not know
        assert isinstance(wire, TlsWire)
        wire.get()
        assert stalled.wait(10)
        before = proxy.rss_bytes()
        assert _flood(wire, KeyUpdates(tmp_path / "keys", wire.tls, by="CLIENT", records=1)) < UPDATES
        assert proxy.rss_bytes() - before < MOST_GROWN
        _check_flood(proxy.next_request(), "client", "response_body")


def test_an_upstream_that_floods_key_updates_and_takes_nothing_of_a_request_is_ended(
    certificates: Certificates, tmp_path: pathlib.Path
) -> None:
    context = certificates.server_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # each would be a record
    context.keylog_filename = str(tmp_path / "keys")
    stalled = threading.Event()
    sent = []

    def script(upstream: Wire) -> None:
        assert isinstance(upstream, TlsWire)
        context.keylog_filename = None  # type: ignore[assignment]  # closes it, which the stub does not know
        upstream.read_head()
        assert stalled.wait(10)
        sent.append(_flood(upstream, KeyUpdates(tmp_path / "keys", upstream.tls, by="SERVER", records=0)))

    with (
        Upstream(script, "tls", tls=context, receive_buffer=4096) as upstream,
        ProxyProcess(upstream.url, "--upstream-ca", certificates.ca) as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send(b"PUT / HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % LARGE)
        wire.fill()
        before = proxy.rss_bytes()
        stalled.set()
        assert wire.read_response().status == 502
        assert proxy.rss_bytes() - before < MOST_GROWN
        _check_flood(proxy.next_request(), "upstream", "request_body")
        upstream.settle()
        assert sent[0] < UPDATES


# -- an alert for a client that sends on -------------------------------------------------------------------------------


@pytest.mark.parametrize("shown", ["none", "stranger"])
def test_a_client_whose_certificate_does_not_do_sees_the_alert_whatever_it_sends_meanwhile(
    certificates: Certificates, shown: str
) -> None:
    """In TLS 1.3 the handshake is over for it by then, and its request under way."""
    certificate = certificates.stranger if shown == "stranger" else None
    context = certificates.client_context(certificate=certificate)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    options = ("--tls-cert", certificates.server, "--tls-client-ca", certificates.ca)
    reason = "TLSV1_ALERT_UNKNOWN_CA" if shown == "stranger" else "TLSV13_ALERT_CERTIFICATE_REQUIRED"
    with Upstream(answer_all(ok())) as upstream, ProxyProcess(upstream.url, *options) as proxy:
        for _ in range(3):
            with connect(proxy.address, context) as wire:
                wire.send(b"PUT / HTTP/1.1\r\nHost: t\r\nContent-Length: 3000000\r\n\r\n" + bytes(3_000_000))
                with pytest.raises(ssl.SSLError) as raised:
                    wire.read()
                assert raised.value.reason == reason
        wait_until(lambda: len(proxy.records()) == 4)
        proxy.stop()
        aborts = [record for record in proxy.records() if record["event"] == "connection.abort"]
        assert [(record["cause"], record["phase"]) for record in aborts] == [("tls", "tls_handshake")] * 3
        assert not proxy.requests()
        assert not upstream.wires


def test_a_client_that_fails_the_handshake_and_takes_nothing_is_not_held(certificates: Certificates) -> None:
    """Whoever it is: nobody has asked for a certificate yet."""
    with (
        Upstream(answer_all(ok())) as upstream,
        ProxyProcess(upstream.url, "--tls-cert", certificates.server, "--tls-client-ca", certificates.ca) as proxy,
        connect(proxy.address, certificates.client_context(), receive_buffer=1, handshake=False) as wire,
    ):
        assert isinstance(wire, TlsWire)
        with pytest.raises(ssl.SSLWantReadError):
            wire.tls.do_handshake()
        wire._flush()
        # The first half of what the server has to say, which is as much as the window lets through.
        wait_until(lambda: unread_bytes(wire.sock) >= 1000)
        wire.sock.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
        proxy.wait_for(lambda record: record["event"] == "connection.abort" and record["cause"] == "tls")
        proxy.wait_connections(0, timeout=8.0)


# -- close_notify behind a response that the client takes late ---------------------------------------------------------

BODY = os.urandom(200_000)
UPGRADE = b"Connection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
HEADS = {
    "close": (b"GET / HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n", ok(BODY)[: -len(BODY)]),
    "tunnel": (b"GET / HTTP/1.1\r\nHost: t\r\n" + UPGRADE, b"HTTP/1.1 101 UPGRADED\r\n" + UPGRADE),
}
TRIES = 4  # to send close_notify, a tenth of a second each


class _Narrowing(TlsEndpoint):
    """A client's endpoint whose socket has no room for close_notify until nearly all before it was taken.

    It is a unix socket: TCP fills the last segment up, however much there is.
    """

    __slots__ = ("tries",)

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]  # as the class that it stands in for
        self.tries = 0
        if self.side is Side.CLIENT:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * len(BODY))

    def end_write(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least there is
        super().end_write()

    def flush(self) -> bool:
        self.tries += 1
        return super().flush()


class _Ending:
    """A connection that is served in this process by a thread of its own, and its client, which has read the head."""

    def __init__(self, wire: Wire, control: Control, endpoint: _Narrowing, thread: threading.Thread) -> None:
        self.wire = wire
        self.control = control
        self.endpoint = endpoint
        self.thread = thread

    def await_tries(self) -> None:
        """Wait until close_notify did not fit, and did not again."""
        before = self.endpoint.tries
        wait_until(lambda: self.endpoint.tries >= before + TRIES, what="another try to send close_notify")

    def await_end(self) -> float:
        """Wait until the connection is served no more. Returns: after how many seconds."""
        began_at = time.monotonic()
        self.thread.join(8)
        assert not self.thread.is_alive()
        return time.monotonic() - began_at


@contextlib.contextmanager
def _ending(log: EventLog, certificates: Certificates, what: str, *options: str) -> collections.abc.Iterator[_Ending]:
    """Give a client for whom all of a response or a tunnel, but for close_notify, is in the proxy's socket."""
    request, head = HEADS[what]
    go = threading.Event()

    def script(upstream: Wire) -> None:
        upstream.read_head()
        upstream.send(head)
        assert go.wait(10)
        upstream.send(BODY)
        upstream.end_write()
        upstream.await_end()

    with contextlib.ExitStack() as stack:
        upstream = stack.enter_context(Upstream(script))
        listen = ("--listen", "unix:/nobody-listens")
        arguments = [*listen, "--upstream", upstream.url, "--tls-cert", certificates.server, *options]
        worker = stack.enter_context(make_worker(log, *arguments))
        accepted, theirs = socket.socketpair()
        wire = stack.enter_context(TlsWire(theirs, certificates.client_context(), server_side=False, name="localhost"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exchange, "TlsEndpoint", _Narrowing)
            connection = ClientConnection(worker, accepted, "unix:@", "0.0.0.0", overflow=False)
        thread = threading.Thread(target=connection.serve)
        thread.start()
        stack.callback(thread.join, 10)
        stack.callback(wire.reset)  # whatever became of the test
        assert isinstance(connection.client, _Narrowing)
        wire.handshake()
        wire.send(request)
        wire.read_head()
        if what == "tunnel":
            wire.end_write()  # or it would not be over for the proxy
        go.set()
        ending = _Ending(wire, worker.control, connection.client, thread)
        wait_until(lambda: connection.client.unflushed, what="a close_notify that does not fit")
        yield ending


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for nothing that is not asked about here: a client that sends no more, one that takes no answer."""
    monkeypatch.setattr(exchange, "_LINGER_IDLE_S", 0.05)
    monkeypatch.setattr(exchange, "_ANSWER_S", 0.05)
    monkeypatch.setattr(exchange, "_SETTLE_S", 0.05)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("what", ["close", "tunnel"])
def test_close_notify_waits_for_a_client_that_pauses(what: str, log: EventLog, certificates: Certificates) -> None:
    with _ending(log, certificates, what) as ending:
        ending.await_tries()
        assert ending.wire.read_to_end() == BODY
        assert ending.wire.end == "close_notify"
        ending.await_end()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("what", ["close", "tunnel"])
def test_a_client_that_takes_nothing_before_it_has_sent_all_gets_close_notify(
    what: str, log: EventLog, certificates: Certificates
) -> None:
    """More than the sockets hold: who would wait for it to read would wait for ever."""
    with _ending(log, certificates, what) as ending:
        ending.await_tries()
        # No TLS any more, as the client of a tunnel has ended its own side.
        ending.wire.sock.sendall(b"\x17\x03\x03\x40\x00" + bytes(8 * 1024 * 1024))
        ending.await_tries()
        assert ending.wire.read_to_end() == BODY
        assert ending.wire.end == "close_notify"
        ending.wire.cut_write()
        ending.await_end()


@pytest.mark.usefixtures("short")
def test_close_notify_waits_for_a_client_that_is_slower_than_the_write_timeout_in_all(
    log: EventLog, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes some all the time."""
    monkeypatch.setattr(peers, "_READ", 8192)
    with _ending(log, certificates, "close", "--client-write-timeout", "1.5") as ending:
        began_at = time.monotonic()
        got = b""
        while part := ending.wire.read(8192):
            got += part
            time.sleep(0.1)
        assert time.monotonic() - began_at > 2.0
        assert got == BODY
        assert ending.wire.end == "close_notify"
        ending.await_end()


@pytest.mark.usefixtures("short")
def test_a_client_that_ends_its_side_still_gets_close_notify(log: EventLog, certificates: Certificates) -> None:
    """Its FIN is no reason to hurry: between the tries the thread sleeps."""
    with _ending(log, certificates, "close") as ending:
        ending.wire.cut_write()
        ending.await_tries()
        tries, began_at = ending.endpoint.tries, time.monotonic()
        ending.await_tries()
        assert ending.endpoint.tries - tries <= (time.monotonic() - began_at) / 0.1 + 2
        assert ending.wire.read_to_end() == BODY
        assert ending.wire.end == "close_notify"
        ending.await_end()


@pytest.mark.parametrize("limit", ["client-write-timeout", "client-write-deadline", "drain", "end", "reset"])
def test_close_notify_waits_no_longer_than_a_limit_allows(
    limit: str, log: EventLog, certificates: Certificates, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the answer to a client there is a limit of its own, which is none here."""
    monkeypatch.setattr(exchange, "_ANSWER_S", 60.0)
    limit_s = 0.5
    options = (f"--{limit}", str(limit_s)) if limit.startswith("client") else ()
    with _ending(log, certificates, "close", *options) as ending:
        if options:
            assert ending.await_end() < 5.0
            ending.wire.read_to_end()
            assert ending.wire.end != "close_notify"
            return
        ending.await_tries()
        match limit:
            case "drain":
                ending.control.drain_until = time.monotonic() + limit_s
                ending.control.draining = True
                assert ending.await_end() < 5.0
                assert time.monotonic() >= ending.control.drain_until
            case "end":
                ending.control.ending = True
                assert ending.await_end() < 5.0
            case _:
                ending.wire.reset()
                assert ending.await_end() < 5.0


# -- a connection that never shakes hands ------------------------------------------------------------------------------


@pytest.mark.parametrize("why", ["shutdown", "idle", "no request"])
def test_a_connection_on_which_no_handshake_begins_is_told_as_one_without_a_request(
    certificates: Certificates, why: str
) -> None:
    """As on a plain listener: at debug, with what ended it."""
    keepalive_s = "0.2" if why == "idle" else "60"
    with ProxyProcess(
        "http://127.0.0.1:9",
        *("--tls-cert", certificates.server, "--keepalive-timeout", keepalive_s, "--log-level", "debug"),
    ) as proxy:
        with connect(proxy.address) as wire:
            if why == "shutdown":
                proxy.wait_connections(1)
                proxy.stop()
            elif why == "no request":
                wire.end_write()
            assert wire.await_end() == "fin"
            closed = proxy.wait_for(lambda record: record["event"] == "connection.close")
        assert (closed["level"], closed["requests"], closed["why"]) == ("debug", 0, why)
