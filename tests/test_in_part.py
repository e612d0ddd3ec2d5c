"""What comes behind what the client or the proxy has in part: heads behind half an interim head, responses behind half
a TLS record.
"""

import collections.abc
import contextlib

import pytest

from conftest import Certificates
from harness import LogRecord, ProxyProcess, check_record
from peers import TlsWire, Upstream, Wire, answer_at_once, connect, ok

_SIZE = 6_000_000  # more than all sockets on the way take
_INTERIM = b"HTTP/1.1 103 Early Hints\r\nLink: %b\r\n\r\n" % (b"x" * _SIZE)
_FINAL = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"
_SWITCH = b"HTTP/1.1 101 Go\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
_UPGRADE = b"Connection: Upgrade\r\nUpgrade: tcp\r\n"
_CHUNKED = b"Transfer-Encoding: chunked\r\n"


@contextlib.contextmanager
def half_an_interim_head(
    method: bytes, fields: bytes, final: bytes
) -> collections.abc.Iterator[tuple[ProxyProcess, Wire]]:
    """Give a client that has a part of a large 103, while the rest and ``final`` wait for it in the proxy."""
    with (
        Upstream(answer_at_once(_INTERIM + final)) as upstream,
        ProxyProcess(upstream.url, "--max-head-size", "8MiB") as proxy,
        connect(proxy.address, receive_buffer=20_000) as wire,
    ):
        wire.send(b"%b / HTTP/1.1\r\nHost: t\r\n%b\r\n" % (method, fields))
        least = len(_INTERIM + final) - len(b"abc")
        proxy.wait_in_flight(lambda request: request["bytes"]["upstream_read"] >= least, 10)
        yield proxy, wire


def aborted(proxy: ProxyProcess) -> LogRecord:
    """Returns: the one record, checked."""
    record = proxy.next_request()
    check_record(record)
    assert record["event"] == "request.abort"
    return record


def test_nothing_is_said_in_the_middle_of_an_interim_head() -> None:
    """Not even where the final head is known: the answer to the abort would become a part of the 103."""
    with half_an_interim_head(b"POST", _CHUNKED, _FINAL) as (proxy, wire):
        wire.send(b"3\r\nabc\r\nzz\r\n")
        got = wire.read_to_end()
        record = aborted(proxy)
        assert (record["side"], record["phase"], record["cause"]) == ("client", "request_body", "protocol")
        assert record["status"] is None
        assert record["bytes"]["client_written"] >= len(got)
        head = _INTERIM.partition(b"Link:")[0]
        assert got.startswith(head)
        assert b"HTTP/1.1" not in got[len(head) :]
        assert wire.end in ("fin", "reset")


@pytest.mark.parametrize(("fields", "final"), [(b"", _FINAL), (_UPGRADE, _SWITCH)], ids=["response", "tunnel"])
def test_a_final_head_that_waits_behind_an_interim_one_was_not_sent(fields: bytes, final: bytes) -> None:
    with half_an_interim_head(b"GET", fields, final) as (proxy, wire):
        wire.read_exactly(2_000_000)  # of the interim head
        wire.reset()
        record = aborted(proxy)
        assert (record["side"], record["cause"], record["status"]) == ("client", "reset", None)
        assert record["bytes"]["client_written"] < len(_INTERIM)


def test_half_a_tls_record_behind_a_response_keeps_its_connection_from_being_used_again(
    certificates: Certificates,
) -> None:
    """OpenSSL holds it without a word; its rest would be the answer to the next request, perhaps another client's."""
    evil = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nEVIL"
    halves: list[bytes] = []

    def script(wire: Wire) -> None:
        assert isinstance(wire, TlsWire)
        wire.read_head()
        if halves:
            wire.send(ok(b"fine"))
            wire.await_end()
            return
        wire.tls.write(ok(b"good"))
        good = wire._outgoing.read()
        wire.tls.write(evil)
        record = wire._outgoing.read()
        halves.extend((record[:30], record[30:]))
        wire.sock.sendall(good + halves[0])
        with contextlib.suppress(OSError):
            if wire.read():  # the next request, if it comes here
                wire.sock.sendall(halves[1])

    context = certificates.server_context()
    with (
        Upstream(script, "tls", tls=context) as upstream,
        ProxyProcess(upstream.url, "--upstream-ca", certificates.ca) as proxy,
    ):
        bodies = []
        for _ in range(2):
            with connect(proxy.address) as wire:
                wire.get("/")
                bodies.append(wire.read_response().body)
        assert bodies == [b"good", b"fine"]
        assert len(upstream.wires) == 2


@pytest.mark.parametrize("size", [1, 3, 5, 7, 1000, 16384])
def test_a_tls_upstream_whose_records_come_in_parts_is_used_again(size: int, certificates: Certificates) -> None:
    """What ends with a record ends, however it was cut on its way."""
    body = b"x" * (50_000 if size > 10 else 500)

    def script(wire: Wire) -> None:
        assert isinstance(wire, TlsWire)
        while True:
            wire.read_head()
            wire.tls.write(ok(body))
            octets = wire._outgoing.read()
            for at in range(0, len(octets), size):
                wire.sock.sendall(octets[at : at + size])

    with (
        Upstream(script, "tls", tls=certificates.server_context()) as upstream,
        ProxyProcess(upstream.url, "--upstream-ca", certificates.ca) as proxy,
        connect(proxy.address) as wire,
    ):
        for _ in range(5):
            wire.get("/")
            assert wire.read_response().body == body
        assert len(upstream.wires) == 1


def test_te_trailers_is_not_said_for_a_client_that_can_have_none() -> None:
    for version in (0, 1):
        with Upstream(answer_at_once(ok())) as upstream, ProxyProcess(upstream.url) as proxy:
            with connect(proxy.address) as wire:
                wire.send(b"GET / HTTP/1.%d\r\nHost: t\r\nConnection: TE\r\nTE: trailers\r\n\r\n" % version)
                upstream.await_head()
                assert (b"TE: trailers" in bytes(upstream.wire().received)) is bool(version)


def test_what_happened_on_the_way_is_told_of_a_request_that_completes_too() -> None:
    excess = b"HTTP/1.1 103 Early Hints\r\n\r\n" + ok(b"fine") + b"more"
    with Upstream(answer_at_once(excess)) as upstream, ProxyProcess(upstream.url) as proxy:
        with connect(proxy.address) as wire:
            wire.get("/")
            assert b"fine" in wire.read_until(b"fine")
        record = proxy.next_request()
        check_record(record)
        assert record["event"] == "request.complete"
        assert [event["what"] for event in record["events"]] == ["103", "excess"]
        assert all(0 <= event["t"] <= record["duration_s"] for event in record["events"])
