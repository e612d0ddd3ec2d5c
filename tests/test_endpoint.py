"""A socket under TLS: several reads of ciphertext and several batches of records in one call, and what of it is told
where the socket fails in between.
"""

import collections.abc
import contextlib
import pathlib
import select
import socket
import ssl
import struct
import threading

import pytest

from conftest import Certificates
from harness import wait_until
from key_updates import KeyUpdates
from peers import TlsWire
from proxy import endpoint
from proxy.endpoint import NO_WAIT, TlsEndpoint
from proxy.framing import ConnectionFraming
from proxy.kernel import unread_bytes
from proxy.record import describe_exception
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


@pytest.mark.parametrize("ended", [False, True])
def test_an_end_of_what_we_write_takes_nothing_of_what_was_not_read(certificates: Certificates, ended: bool) -> None:
    with pair(certificates) as (ours, peer):
        sent = bytes(range(250)) * 100  # two records
        peer.sendall(sent)
        if ended:
            peer.setblocking(False)
            with pytest.raises(ssl.SSLWantReadError):  # close_notify is out, and is not answered yet
                peer.unwrap()
        await_unread(ours, len(sent) + 2 * OVERHEAD + (2 + OVERHEAD if ended else 0))
        view = memoryview(bytearray(len(sent)))
        assert read_when_ready(ours, view[:600]) == 600
        ours.end_write()
        assert ours.has_unread
        assert ours.read_into(view[600:], 0, NO_WAIT) == len(sent) - 600
        assert bytes(view) == sent
        if ended:
            assert ours.read_into(view, 0, NO_WAIT) == 0
        else:
            assert peer.recv(1) == b""  # close_notify is out


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


# -- a peer that asks for new keys again and again, and takes no answer ------------------------------------------------

UPDATES = 500  # in one go: few enough for the sockets between both
ANSWER = 5 + 5 + 1 + 16  # octets: header, message, content type, tag
MOST_UNSENT = 32 * 1024


@contextlib.contextmanager
def narrow_pair(
    certificates: Certificates, keylog: pathlib.Path, side: Side
) -> collections.abc.Iterator[tuple[TlsEndpoint, TlsWire, KeyUpdates]]:
    """Give an endpoint whose peer is on ``side``, that peer, and what it can flood the endpoint with. The sockets
    between them hold little.
    """
    accepts, connects = certificates.server_context(), certificates.client_context()
    accepts.num_tickets = 0  # each would be a record
    contexts = (accepts, connects) if side is Side.CLIENT else (connects, accepts)
    contexts[1].minimum_version = ssl.TLSVersion.TLSv1_3
    contexts[1].keylog_filename = str(keylog)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.socket()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        theirs.connect(listener.getsockname())
        sock, _ = listener.accept()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    name = "localhost"
    ours = TlsEndpoint(sock, side, "peer", None, contexts[0], None if side is Side.CLIENT else name)
    peer = TlsWire(theirs, contexts[1], server_side=side is not Side.CLIENT, name=name if side is Side.CLIENT else None)
    shaking = threading.Thread(target=peer.handshake)
    shaking.start()
    try:
        while not ours.handshake():
            wait(sock, ours.read_event)
        shaking.join(10)
        contexts[1].keylog_filename = None  # type: ignore[assignment]  # closes it, which the stub does not know
        yield ours, peer, KeyUpdates(keylog, peer.tls, by="CLIENT" if side is Side.CLIENT else "SERVER", records=0)
    finally:
        ours.close()
        peer.close()


def read_all_there_is(ours: TlsEndpoint) -> None:
    while unread_bytes(ours.sock):
        with contextlib.suppress(BlockingIOError):
            ours.read_into(memoryview(bytearray(RECORD)), 0, NO_WAIT)


def fill(sock: socket.socket) -> int:
    """Returns: how many octets it took. What they are the peer never sees."""
    taken = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            taken += sock.send(b"\0" * ANSWER)
    return taken


def flood(ours: TlsEndpoint, peer: TlsWire, updates: KeyUpdates, size: int) -> None:
    """Ask for so many new keys that the answers are of ``size``."""
    for _ in range(0, size, UPDATES * ANSWER):
        peer.sock.sendall(updates.make(UPDATES))
        wait(ours.sock, select.POLLIN)
        read_all_there_is(ours)


@pytest.mark.parametrize("side", [Side.CLIENT, Side.UPSTREAM])
def test_a_peer_that_floods_key_updates_while_a_batch_is_half_sent_is_ended(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, side: Side
) -> None:
    monkeypatch.setattr(endpoint, "_MOST_UNSENT", MOST_UNSENT)
    with narrow_pair(certificates, tmp_path / "keys", side) as (ours, peer, updates):
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.write(b"a" * endpoint._BATCH_SIZE, NO_WAIT)
        assert ours.mid_write
        with pytest.raises(ssl.SSLError) as raised:
            flood(ours, peer, updates, 2 * MOST_UNSENT)
        described = describe_exception(raised.value)
        assert described is not None
        assert described["text"] == "the peer asks for key updates and takes no answer"


@pytest.mark.parametrize("side", [Side.CLIENT, Side.UPSTREAM])
def test_why_a_peer_that_floods_key_updates_is_ended_is_said_in_a_sentence(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, side: Side
) -> None:
    """It takes a little now and then, and nothing else is on its way."""
    monkeypatch.setattr(endpoint, "_MOST_UNSENT", MOST_UNSENT)
    with narrow_pair(certificates, tmp_path / "keys", side) as (ours, peer, updates):

        def takes_some() -> bool:
            before = len(ours._unsent)
            peer.sock.recv(4096)
            return not ours.flush() and len(ours._unsent) < before

        with pytest.raises(ssl.SSLError) as raised:  # noqa: PT012  # in either, as the socket takes more or less
            flood(ours, peer, updates, 3 * MOST_UNSENT)
            wait_until(takes_some)
        described = describe_exception(raised.value)
        assert described is not None
        assert described["text"] == "the peer asks for key updates and takes no answer"


@pytest.mark.parametrize("side", [Side.CLIENT, Side.UPSTREAM])
def test_a_peer_that_floods_key_updates_and_takes_nothing_is_ended_though_nothing_else_is_sent(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, side: Side
) -> None:
    """Once the socket is full it takes nothing at all, and what is kept for it grows."""
    monkeypatch.setattr(endpoint, "_MOST_UNSENT", MOST_UNSENT)
    with narrow_pair(certificates, tmp_path / "keys", side) as (ours, peer, updates):
        wait_until(lambda: not fill(ours.sock), what="a socket without any room")
        with pytest.raises(ssl.SSLError, match="takes no answer"):
            flood(ours, peer, updates, 4 * MOST_UNSENT)
        assert len(ours._unsent) < 2 * MOST_UNSENT


def test_few_key_updates_are_answered_behind_a_batch_that_is_half_sent(
    certificates: Certificates, tmp_path: pathlib.Path
) -> None:
    with narrow_pair(certificates, tmp_path / "keys", Side.CLIENT) as (ours, peer, updates):
        body = memoryview(b"a" * (8 * endpoint._BATCH_SIZE))
        written = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                written += ours.write(body[written:], NO_WAIT)
        assert ours.mid_write
        peer.sock.sendall(updates.make(UPDATES))
        await_unread(ours, UPDATES * ANSWER)
        read_all_there_is(ours)
        got: list[bytes] = []
        reading = threading.Thread(target=lambda: got.append(peer.read_exactly(len(body))))
        reading.start()
        while written < len(body):
            wait(ours.sock, select.POLLOUT)
            with contextlib.suppress(BlockingIOError):
                written += ours.write(body[written:], NO_WAIT)
        reading.join(10)
        assert got == [body]


# -- a handshake that fails, and a reset behind it ---------------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_reset_behind_a_certificate_that_does_not_hold_does_not_hide_it(
    certificates: Certificates, version: ssl.TLSVersion
) -> None:
    """The alert finds nobody, and what upstream has shown is the reason."""
    context = certificates.server_context(certificate=certificates.stranger)
    context.maximum_version = version
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    shows = context.wrap_bio(incoming, outgoing, server_side=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = socket.create_connection(listener.getsockname())
        upstream, _ = listener.accept()
    ours = TlsEndpoint(sock, Side.UPSTREAM, "upstream", None, certificates.client_context(), "localhost")
    with contextlib.closing(ours):
        assert not ours.handshake()
        incoming.write(upstream.recv(RECORD))
        with pytest.raises(ssl.SSLWantReadError):
            shows.do_handshake()
        upstream.sendall(outgoing.read())
        wait(sock, select.POLLIN)
        reset(upstream)
        wait(sock, select.POLLHUP)
        with pytest.raises(ssl.SSLCertVerificationError):
            ours.handshake()
