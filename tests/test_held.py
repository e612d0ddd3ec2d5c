"""What is held of a connection that has ended: nothing that waits for the collector.

Errors make circles: a traceback holds frames, and a frame what its names stand for, the error among it. The collector
counts objects and not what they weigh, and comes late: buffers of half a megabyte would pile up. Connections are
served in this process, where it can be asked what there is.
"""

import collections.abc
import gc
import socket
import threading

import pytest

import peers
from conftest import Certificates
from harness import wait_until
from in_process import serving
from peers import Upstream, Wire, chunk, ok
from proxy.exchange import ClientConnection
from proxy.log import EventLog
from proxy.relay import Relay

_POST = b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(autouse=True)
def no_collector() -> collections.abc.Iterator[None]:
    """Keep the collector from mending what is looked for."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _held() -> list[str]:
    return [type(each).__name__ for each in gc.get_objects() if isinstance(each, ClientConnection | Relay)]


def test_a_kept_connection_that_had_gone_stale(log: EventLog) -> None:
    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(ok())
        wire.read_request()
        wire.reset()

    with Upstream(script) as upstream, serving(log, "--upstream", upstream.url) as server:
        with server.client() as wire:
            for _ in range(2):
                wire.get()
                assert wire.read_response().status == 200
        assert len(upstream.wires) == 2
        assert not _held()


def test_an_upstream_that_refuses(log: EventLog) -> None:
    with peers.closed_port() as port, serving(log, "--upstream", f"http://127.0.0.1:{port}") as server:
        with server.client() as wire:
            wire.get()
            assert wire.read_response().status == 502
        assert not _held()


def test_the_first_of_two_addresses_refuses(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where ``localhost`` is ``::1``, too, and upstream listens on 127.0.0.1."""
    real = socket.getaddrinfo

    def look_up(host: str, port: int, **options: int) -> list[object]:
        hosts = ("127.0.0.2", "127.0.0.1") if host == "both.test" else (host,)
        return [found for each in hosts for found in real(each, port, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with Upstream(peers.answer_all(ok())) as upstream:
        port = upstream.url.rpartition(":")[2]
        with serving(log, "--upstream", f"http://both.test:{port}") as server:
            with server.client() as wire:
                wire.get()
                assert wire.read_response().status == 200
            assert not _held()


def test_an_early_answer_of_an_upstream_that_takes_no_more(log: EventLog) -> None:
    """The request is complete, and the error of the write that upstream did not take is no abort of it."""
    takes_no_more, broken = threading.Event(), threading.Event()

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.sock.shutdown(socket.SHUT_RD)
        takes_no_more.set()
        assert broken.wait(10)
        wire.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")

    with Upstream(script, "unix") as upstream, serving(log, "--upstream", upstream.url) as server:
        with server.client() as wire:
            wire.send(_POST)
            assert takes_no_more.wait(10)
            wire.send(chunk(b"x" * 1000))
            wait_until(lambda: any(isinstance(each, Relay) and each.broken for each in gc.get_objects()))
            broken.set()
            assert wire.read_response().status == 413
        assert not _held()


@pytest.mark.parametrize("octets", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05abcde", b"\x16\x03\x01"])
def test_a_handshake_that_fails(octets: bytes, log: EventLog, certificates: Certificates) -> None:
    options = ("--upstream", "http://127.0.0.1:1", "--tls-cert", certificates.server)
    with serving(log, *options) as server:
        with server.client() as wire:
            wire.send(octets)
            wire.end_write()
            wire.await_end()
        assert not _held()


def test_an_upstream_whose_certificate_does_not_do(log: EventLog, certificates: Certificates) -> None:
    with (
        Upstream(peers.answer_all(ok()), "tls", tls=certificates.server_context()) as upstream,
        serving(log, "--upstream", upstream.url) as server,
    ):
        with server.client() as wire:
            wire.get()
            assert wire.read_response().status == 502
        assert not _held()
