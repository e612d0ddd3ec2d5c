"""What is held of a connection that has ended: nothing that waits for the collector.

Errors make circles: a traceback holds frames, and a frame what its names stand for, the error among it. The collector
counts objects and not what they weigh, and comes late: buffers of half a megabyte would pile up. Connections are
served in this process, where it can be asked what there is.
"""

import collections.abc
import contextlib
import dataclasses
import gc
import os
import socket
import threading

import pytest

import peers
from conftest import Certificates
from harness import wait_until
from peers import Upstream, Wire, chunk, connect, ok
from proxy.config import load_settings
from proxy.exchange import ClientConnection, Worker
from proxy.inflight import InFlightTable
from proxy.log import EventLog
from proxy.record import Tally
from proxy.relay import Bustle, Relay
from proxy.tls import read_contexts
from proxy.upstream import upstream_pool
from proxy.waiting import Control

_POST = b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> collections.abc.Iterator[EventLog]:
    """A log in this process; what it shares with others has no end but that of the process."""
    log = EventLog(str(tmp_path_factory.mktemp("log") / "log"), "info")
    yield log
    for fd in {log._file.fd, log._stderr.fd} - {2}:
        os.close(fd)


@pytest.fixture(autouse=True)
def no_collector() -> collections.abc.Iterator[None]:
    """Keep the collector from mending what is looked for."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _held() -> list[str]:
    return [type(each).__name__ for each in gc.get_objects() if isinstance(each, ClientConnection | Relay)]


@dataclasses.dataclass
class _Server:
    """Serves connections in this process, each by a thread of its own."""

    worker: Worker
    listener: socket.socket

    @contextlib.contextmanager
    def client(self) -> collections.abc.Iterator[Wire]:
        """Give a client. Leaving the context waits until its connection is served no more."""
        with connect(self.listener.getsockname()) as wire:
            sock, _ = self.listener.accept()
            thread = threading.Thread(target=self._serve, args=(sock,))
            del sock
            thread.start()
            yield wire
        thread.join(10)
        assert not thread.is_alive()

    def _serve(self, sock: socket.socket) -> None:
        ClientConnection(self.worker, sock, "127.0.0.1:1", "127.0.0.1", overflow=False).serve()


@contextlib.contextmanager
def _serving(log: EventLog, *options: str) -> collections.abc.Iterator[_Server]:
    with contextlib.ExitStack() as stack:
        settings = load_settings(options, {})
        reading, writing = os.pipe()
        stack.callback(os.close, writing)
        stack.callback(os.close, reading)
        tally = Tally(memoryview(bytearray(8 * len(Tally.NAMES))).cast("Q"))
        contexts = read_contexts(settings)
        pool = upstream_pool(settings, contexts.upstream)
        stack.callback(pool.close)
        slots = InFlightTable(1, 1).slots(0)
        bustle = Bustle(memoryview(bytearray(8)).cast("d"), 0)
        worker = Worker(settings, log, tally, Control(reading), pool, contexts.server, slots, bustle)
        yield _Server(worker, stack.enter_context(socket.create_server(("127.0.0.1", 0))))


def test_a_kept_connection_that_had_gone_stale(log: EventLog) -> None:
    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(ok())
        wire.read_request()
        wire.reset()

    with Upstream(script) as upstream, _serving(log, "--upstream", upstream.url) as server:
        with server.client() as wire:
            for _ in range(2):
                wire.get()
                assert wire.read_response().status == 200
        assert len(upstream.wires) == 2
        assert not _held()


def test_an_upstream_that_refuses(log: EventLog) -> None:
    with peers.closed_port() as port, _serving(log, "--upstream", f"http://127.0.0.1:{port}") as server:
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
        with _serving(log, "--upstream", f"http://both.test:{port}") as server:
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

    with Upstream(script, "unix") as upstream, _serving(log, "--upstream", upstream.url) as server:
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
    with _serving(log, *options) as server:
        with server.client() as wire:
            wire.send(octets)
            wire.end_write()
            wire.await_end()
        assert not _held()


def test_an_upstream_whose_certificate_does_not_do(log: EventLog, certificates: Certificates) -> None:
    with (
        Upstream(peers.answer_all(ok()), "tls", tls=certificates.server_context()) as upstream,
        _serving(log, "--upstream", upstream.url) as server,
    ):
        with server.client() as wire:
            wire.get()
            assert wire.read_response().status == 502
        assert not _held()
