"""A socket under TLS: several reads of ciphertext and several batches of records in one call, and what of it is told
where the socket fails in between.
"""

import collections.abc
import contextlib
import select
import socket
import ssl
import struct
import threading

import pytest

from conftest import Certificates
from harness import wait_until
from proxy import endpoint
from proxy.endpoint import NO_WAIT, TlsEndpoint
from proxy.framing import ConnectionFraming
from proxy.kernel import unread_bytes
from proxy.relay import Flow
from proxy.vocabulary import Side

RECORD = 16384
OVERHEAD = 22  # of a record of TLS 1.3 with any cipher that Python's defaults choose: header, content type, tag


@contextlib.contextmanager
def pair(certificates: Certificates) -> collections.abc.Iterator[tuple[TlsEndpoint, ssl.SSLSocket]]:
    """Give an endpoint on the server's side, and its peer, with the handshake behind them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    context = certificates.client_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    peer = context.wrap_socket(client, server_hostname="localhost", do_handshake_on_connect=False)
    ours = TlsEndpoint(server, Side.CLIENT, "peer", None, certificates.server_context(), None)
    shaking = threading.Thread(target=peer.do_handshake)
    shaking.start()
    try:
        while not ours.handshake():
            wait(server, select.POLLIN)
        shaking.join(10)
        # The tickets that follow the handshake are read before anything is counted.
        ours.write(b"!", NO_WAIT)
        assert peer.recv(1) == b"!"
        yield ours, peer
    finally:
        ours.close()
        peer.close()


def wait(sock: socket.socket, event: int) -> None:
    poller = select.poll()
    poller.register(sock.fileno(), event)
    assert poller.poll(10_000)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def await_unread(ours: TlsEndpoint, count: int) -> None:
    """Wait until ``count`` octets of ciphertext have come."""
    wait_until(lambda: unread_bytes(ours.sock) == count)


def read_when_ready(ours: TlsEndpoint, view: memoryview) -> int:
    wait(ours.sock, select.POLLIN)
    return ours.read_into(view, 0, NO_WAIT)


def test_one_read_takes_all_that_the_socket_has(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_CIPHERTEXT_READ", RECORD + OVERHEAD)
    sent = bytes(range(256)) * 64 * 3
    with pair(certificates) as (ours, peer):
        peer.sendall(sent)
        await_unread(ours, 3 * (RECORD + OVERHEAD))
        view = memoryview(bytearray(2 * len(sent)))
        assert read_when_ready(ours, view) == len(sent)
        assert bytes(view[: len(sent)]) == sent
        assert not ours.has_unread
        with pytest.raises(BlockingIOError):
            ours.read_into(view, 0, NO_WAIT)


def test_what_no_longer_fits_is_said_to_be_unread(certificates: Certificates) -> None:
    with pair(certificates) as (ours, peer):
        peer.sendall(b"a" * 1000)
        view = memoryview(bytearray(600))
        assert read_when_ready(ours, view) == 600
        assert ours.has_unread
        assert ours.read_into(view, 0, NO_WAIT) == 400
        assert not ours.has_unread


@pytest.mark.parametrize("reads", [1, 2, 3])
def test_a_reset_behind_octets_is_met_once_they_are_taken(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch, reads: int
) -> None:
    """Each read of ciphertext is full, so that the endpoint asks the socket again, and meets the reset."""
    size = 8192
    monkeypatch.setattr(endpoint, "_CIPHERTEXT_READ", size)
    with pair(certificates) as (ours, peer):
        for _ in range(reads):
            peer.send(b"a" * (size - OVERHEAD))
        await_unread(ours, reads * size)  # what its kernel has not sent, a reset drops
        reset(peer)
        view = memoryview(bytearray(64 * 1024))
        assert read_when_ready(ours, view) == reads * (size - OVERHEAD)
        assert ours.has_unread
        for _ in range(2):
            with pytest.raises(ConnectionResetError):
                ours.read_into(view, 0, NO_WAIT)


@pytest.mark.parametrize("orderly", [True, False])
def test_an_end_behind_octets_is_met_once_they_are_taken(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch, orderly: bool
) -> None:
    size = 8192
    monkeypatch.setattr(endpoint, "_CIPHERTEXT_READ", size)
    with pair(certificates) as (ours, peer):
        peer.send(b"a" * (size - OVERHEAD))
        if orderly:
            peer.setblocking(False)
            with contextlib.suppress(ssl.SSLWantReadError):
                peer.unwrap()
        peer.shutdown(socket.SHUT_WR)
        view = memoryview(bytearray(64 * 1024))
        assert read_when_ready(ours, view) == size - OVERHEAD
        if orderly:
            assert read_when_ready(ours, view) == 0
        else:
            with pytest.raises(ssl.SSLEOFError):
                read_when_ready(ours, view)


def test_a_flow_writes_batch_behind_batch_and_counts_what_the_peer_gets(certificates: Certificates) -> None:
    body = bytes(range(256)) * 8192  # eight batches
    with pair(certificates) as (ours, peer):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        ours.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 600 * 1024)
        flow = flow_to(ours, body)
        with contextlib.suppress(BlockingIOError):
            flow.push(0.0, None)
        assert flow.pending
        assert flow.written > endpoint._BATCH_SIZE, "one push wrote several batches"
        got = bytearray()
        while flow.written < len(body):
            got += peer.recv(RECORD)
            with contextlib.suppress(BlockingIOError):
                flow.push(0.0, None)
        while len(got) < len(body):
            got += peer.recv(RECORD)
        assert got == body


def test_a_reset_between_two_batches_leaves_the_first_counted(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "_BATCH_SIZE", RECORD)
    with pair(certificates) as (ours, peer):
        flow = flow_to(ours, b"a" * (8 * RECORD))
        write, calls = ours.write, 0

        def write_and_be_reset(octets: bytes | bytearray | memoryview, flags: int) -> int:
            nonlocal calls
            calls += 1
            if calls == 4:
                reset(peer)
                wait(ours.sock, select.POLLHUP)
            return write(octets, flags)

        ours.write = write_and_be_reset
        with pytest.raises(ConnectionResetError):
            flow.push(0.0, None)
        assert flow.written == 3 * RECORD


def flow_to(sink: TlsEndpoint, octets: bytes) -> Flow:
    """Returns: a flow with ``octets`` on the way to ``sink``."""
    flow = Flow(ConnectionFraming())
    flow.sink = sink
    flow.octets = octets
    flow.end = len(octets)
    flow.pending = True
    return flow
