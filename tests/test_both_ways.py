"""What happens at once: a client that writes and does not read, an upstream that answers while it is asked, kept
connections that fail together, a retry with the next request behind it. No octet is lost, and none counted wrongly.
"""

import collections.abc
import contextlib
import hashlib
import os
import pathlib
import re
import select
import signal
import socket
import ssl
import subprocess
import threading
import time

import pytest

import harness
import peers
from conftest import Certificates
from harness import LogRecord, ProxyProcess
from peers import Script, Upstream, Wire, connect, ok

SWITCHED = b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
UPGRADE = b"GET /t HTTP/1.1\r\nHost: t\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
MANY = 48 * 1024 * 1024


@contextlib.contextmanager
def _scene(
    certificates: Certificates, script: Script, *options: str, client_tls: bool = False, upstream_tls: bool = False
) -> collections.abc.Iterator[tuple[Upstream, ProxyProcess]]:
    own = ("--tls-cert", certificates.server, "--tls-key", certificates.server) if client_tls else ()
    theirs = ("--upstream-ca", certificates.ca) if upstream_tls else ()
    context = certificates.server_context() if upstream_tls else None
    with (
        Upstream(script, "tls" if upstream_tls else "tcp", tls=context) as upstream,
        ProxyProcess(upstream.url, *own, *theirs, *options) as proxy,
    ):
        yield upstream, proxy


def _record(proxy: ProxyProcess, count: int = 1) -> LogRecord:
    record = proxy.wait_requests(count)[-1]
    harness.check_record(record)
    return record


# -- a client that writes first and reads later -----------------------------------------------------------------------


def _echo(head: bytes, count: int) -> Script:
    """Make an upstream that says ``head`` and then sends back what it gets, as it comes."""

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.send(head)
        got = 0
        while got < count:
            octets = wire.read()
            if not octets:
                return
            got += len(octets)
            wire.send(octets)
        wire.await_end()

    return script


def _write_first(address: tuple[str, int] | str, context: ssl.SSLContext | None, octets: bytes, count: int) -> str:
    """Write until nothing more is taken, only then read, too, and count what comes behind the head.

    Returns: the digest of what came back.
    """
    assert isinstance(address, tuple)
    plain = socket.create_connection(address, 10)
    sock = context.wrap_socket(plain, server_hostname="localhost") if context is not None else plain
    with sock:
        sock.setblocking(False)
        left = memoryview(octets)
        head, got, digest = b"", 0, hashlib.sha256()
        reads = False
        until = time.monotonic() + 30
        while got < count:
            assert time.monotonic() < until, f"{len(left)} octets not taken, {got} came back"
            _, writable, _ = select.select([sock] if reads else [], [sock] if left else [], [], 0.3)
            reads = reads or not writable
            with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if left:
                    left = left[sock.send(left[:65536]) :]
            with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                while reads and (came := sock.recv(262144)):
                    if b"\r\n\r\n" not in head:
                        head += came
                        came = head.partition(b"\r\n\r\n")[2]
                    got += len(came)
                    digest.update(came)
        return digest.hexdigest()


@pytest.mark.parametrize("upstream_tls", [False, True], ids=["plain_upstream", "tls_upstream"])
@pytest.mark.parametrize("client_tls", [False, True], ids=["plain_client", "tls_client"])
@pytest.mark.parametrize("kind", ["tunnel", "body"])
def test_an_echo_of_what_a_client_writes_before_it_reads(
    kind: str, client_tls: bool, upstream_tls: bool, certificates: Certificates
) -> None:
    data = os.urandom(1024 * 1024) * (MANY // 1024 // 1024)
    if kind == "tunnel":
        request, head = UPGRADE, SWITCHED
    else:
        request = b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % MANY
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % MANY
    scene = _scene(certificates, _echo(head, MANY), client_tls=client_tls, upstream_tls=upstream_tls)
    with scene as (_, proxy):
        context = certificates.client_context() if client_tls else None
        assert _write_first(proxy.address, context, request + data, MANY) == hashlib.sha256(data).hexdigest()
        record = _record(proxy)
        assert record["bytes"]["request_body"] == record["bytes"]["response_body"] == MANY


@pytest.mark.parametrize("client_tls", [False, True], ids=["plain_client", "tls_client"])
@pytest.mark.parametrize("kind", ["tunnel", "body"])
def test_an_end_behind_octets_that_upstream_does_not_take_yet(
    kind: str, client_tls: bool, certificates: Certificates
) -> None:
    data = os.urandom(5_000_000)
    got = []

    def script(wire: Wire) -> None:
        wire.read_head()
        if kind == "tunnel":
            wire.send(SWITCHED)
        time.sleep(1.0)  # the proxy meets the client's end meanwhile
        got.append(wire.read_exactly(len(data)))
        if kind == "tunnel":
            wire.await_end()
            wire.end_write()
        else:
            wire.send(ok())

    options = () if kind == "tunnel" else ("--client-half-close", "allow")
    with _scene(certificates, script, *options, client_tls=client_tls) as (_, proxy):
        with connect(proxy.address, certificates.client_context() if client_tls else None) as wire:
            if kind == "tunnel":
                wire.send(UPGRADE)
                wire.read_head()
                wire.send(data)
            else:
                wire.send(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
            wire.end_write()
            if kind == "body":
                assert wire.read_response().whole
            else:
                assert wire.read_to_end() == b""
        record = _record(proxy)
        assert got == [data]
        assert record["event"] == "request.complete"
        assert record["bytes"]["request_body"] == len(data)


def test_a_tls_client_that_leaves_in_the_middle_of_what_upstream_does_not_take(certificates: Certificates) -> None:
    over = threading.Event()

    def script(wire: Wire) -> None:
        wire.read_head()
        assert over.wait(20)  # deaf
        wire.await_end()

    with _scene(certificates, script, client_tls=True) as (_, proxy):
        with connect(proxy.address, certificates.client_context()) as wire:
            wire.send(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 100000000\r\n\r\n")
            wire.fill()
            wire.reset()
            try:
                record = _record(proxy)
            finally:
                over.set()
        assert (record["side"], record["phase"], record["cause"]) == ("client", "request_body", "reset")


@pytest.mark.parametrize("cause", ["tls", "closed"])
def test_how_a_tls_client_ends_in_the_middle_of_what_upstream_does_not_take(
    cause: str, certificates: Certificates
) -> None:
    """Whether it said so is known behind the octets that nobody takes, which are counted all the same."""
    over = threading.Event()

    def script(wire: Wire) -> None:
        wire.read_head()
        assert over.wait(20)  # deaf

    with (
        Upstream(script, "unix") as upstream,  # which takes little before it is full
        ProxyProcess(upstream.url, "--tls-cert", certificates.server) as proxy,
    ):
        with connect(proxy.address, certificates.client_context()) as wire:
            wire.send(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 100000000\r\n\r\n")
            # As much as the proxy reads, and a portion that stays in its socket.
            while proxy.wait_in_flight()["bytes"]["client_read"] == wire.sent.count:
                wire.send(bytes(65_536))
                _settle_read(proxy, wire.sent.count)
            if cause == "closed":
                wire.end_write()
            wire.cut_write()
            try:
                record = _record(proxy)
            finally:
                over.set()
        assert (record["side"], record["phase"], record["operation"]) == ("client", "request_body", "read")
        assert record["cause"] == cause
        assert record["bytes"]["client_read"] == wire.sent.count


def _settle_read(proxy: ProxyProcess, count: int) -> None:
    """Wait until the proxy has read so much from a client, or for so long that it seems to wait for upstream."""
    until = time.monotonic() + 0.3
    while time.monotonic() < until and proxy.wait_in_flight()["bytes"]["client_read"] < count:
        time.sleep(0.01)


def test_an_upstream_that_stops_reading_and_then_resets_was_alive(certificates: Certificates) -> None:
    """As one that is killed while its buffer is full: a reset answers none of the probes of its closed window."""

    filled = threading.Event()

    def script(wire: Wire) -> None:
        wire.read_head()
        assert filled.wait(20)
        time.sleep(1.0)  # deaf, for as long as it takes until a probe is unanswered
        wire.reset()

    with _scene(certificates, script) as (_, proxy), connect(proxy.address) as wire:
        wire.send(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 100000000\r\n\r\n")
        wire.fill()
        filled.set()
        record = _record(proxy)
        assert (record["side"], record["phase"], record["cause"]) == ("upstream", "request_body", "reset")
        assert record["socket"]["upstream"]["verdict"] == "idle"
        assert record["socket"]["upstream"]["rwnd_limited_s"] > 0.5


def test_a_switch_of_protocols_before_all_of_the_request_was_written() -> None:
    """What waits in the proxy must not be lost, nor get behind what the client says in the tunnel: upstream gets all
    of it in its order, or there is no switch.
    """
    got = []

    def script(wire: Wire) -> None:
        time.sleep(0.3)  # until this socket is full, or the proxy has written all
        wire.send(SWITCHED)
        time.sleep(0.1)  # until the proxy has read that
        wire.read_head()
        got.append(wire.read_to_end())

    with Upstream(script, "unix") as upstream, ProxyProcess(upstream.url) as proxy:
        statuses = []
        # The socket takes some 230 kB; of what is more, the proxy holds up to 64 kB.
        for size in range(180_000, 340_000, 20_000):
            with connect(proxy.address) as wire:
                head = UPGRADE.replace(b"GET", b"POST")[:-2] + b"Content-Length: %d\r\n\r\n" % size
                wire.send(head + b"x" * size + b"behind")
                statuses.append(wire.read_response().status)
                wire.end_write()
                upstream.settle()
            if statuses[-1] == 101:
                assert got[-1] == b"x" * size + b"behind"
            else:
                assert statuses[-1] == 502
                assert set(got[-1]) == set(b"x")
        assert set(statuses) == {101, 502}, statuses
        assert [record["cause"] for record in proxy.wait_requests(8) if record["status"] == 502] == [
            "protocol"
        ] * statuses.count(502)


def test_a_client_that_takes_only_a_part_of_an_interim_response() -> None:
    """Behind a part of a head nothing can be said: the answer to the abort would become a part of that head."""
    count = 12
    numbers = iter(range(count))
    # A large one, of which a socket takes a part, and a small one that is read with it.
    interim = [
        b"HTTP/1.1 103 Early Hints\r\nX-Pad: %b\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n" % (b"x" * (40_000 + n * 1_000))
        for n in range(count)
    ]

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.send_until_answered(interim[next(numbers)] * 60)

    with (
        Upstream(script) as upstream,
        ProxyProcess(upstream.url, "--client-write-deadline", "0.3", listen="unix") as proxy,
    ):
        ends = []
        for number in range(count):
            with connect(proxy.address) as wire:
                wire.get("/")
                time.sleep(
                    0.6
                )  # the limit has ended the request, and the client takes the rest while it may be answered
                left = wire.read_to_end()
            record = _record(proxy, number + 1)
            assert record["limit"]["name"] == "client_write_deadline"
            while left.startswith(b"HTTP/1.1 103"):
                head, end, left = left.partition(b"\r\n\r\n")
                assert head.count(b"HTTP/1.1 ") == 1
                ends.append("whole" if end else "cut")
            if left:
                assert left.startswith(b"HTTP/1.1 %d " % record["status"])
                ends.append("answered")
        assert "cut" in ends


def test_an_upstream_that_shakes_hands_anew_in_the_middle_of_an_upload(certificates: Certificates) -> None:
    """As servers do under TLS 1.2 that ask for a certificate late: no write is possible meanwhile, and none failed."""
    lines = 100
    line = b"x" * 99_999 + b"\n"
    command = ["openssl", "s_server", "-accept", "127.0.0.1:0", "-tls1_2", "-naccept", "1"]
    command += ["-cert", certificates.server, "-key", certificates.server]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    )
    got = bytearray()

    def collect() -> None:
        assert server.stdout is not None
        while octets := os.read(server.stdout.fileno(), 65536):
            got.extend(octets)

    collector = threading.Thread(target=collect, daemon=True)
    collector.start()
    try:
        harness.wait_until(lambda: re.search(rb"ACCEPT 127\.0\.0\.1:\d+\n", got), what="openssl listens")
        port = int(got.partition(b"ACCEPT 127.0.0.1:")[2].split()[0])
        url = f"https://localhost:{port}"
        with ProxyProcess(url, "--upstream-ca", certificates.ca) as proxy, connect(proxy.address) as wire:
            assert server.stdin is not None
            wire.send(b"PUT / HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % (lines * len(line)))
            wire.send(line)
            harness.wait_until(lambda: got.count(b"x") >= 99_990, what="the first line")
            for number in range(1, lines):
                if number % 10 == 0:
                    server.stdin.write(b"r\n")
                wire.send(line)
            # The rest of openssl's own words has a few, too.
            harness.wait_until(lambda: got.count(b"x") >= lines * 99_999 - 200, what="all lines")
            server.stdin.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            assert wire.read_response().status == 200
            record = _record(proxy)
        assert record["event"] == "request.complete"
        assert record["bytes"]["request_body"] == lines * len(line)
        assert not record.get("notes")
    finally:
        server.kill()
        collector.join(5)
        with server:  # closes its pipes, and waits for it
            pass


@pytest.mark.parametrize("length", [10, 5000], ids=["short_target", "long_target"])
def test_a_response_that_waits_for_its_delivery_has_ended_before(length: int) -> None:
    body = b"x" * 300_000  # more than the client takes at once, less than the proxy's socket takes
    with Upstream(peers.answer(ok(body))) as upstream, ProxyProcess(upstream.url) as proxy:
        with connect(proxy.address, receive_buffer=4096) as wire:
            wire.get("/" + "t" * length)
            time.sleep(0.8)
            assert len(wire.read_response().body) == len(body)
            record = _record(proxy)
        assert record["duration_s"] == record["timing_s"]["last_byte"] < 0.5


def test_a_tunnel_lasts_until_its_other_direction_ends_too() -> None:
    def script(wire: Wire) -> None:
        wire.read_head()
        wire.send_and_end(SWITCHED)
        wire.await_end()

    with Upstream(script) as upstream, ProxyProcess(upstream.url) as proxy:
        with connect(proxy.address) as wire:
            wire.send(UPGRADE)
            wire.read_to_end()
            time.sleep(0.5)
            wire.send_and_end(b"more")
            record = _record(proxy)
        assert record["event"] == "request.complete"
        assert record["duration_s"] - record["timing_s"]["last_byte"] > 0.4


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_the_first_byte_is_that_of_the_final_response(version: str) -> None:
    def script(wire: Wire) -> None:
        wire.read_head()
        wire.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        time.sleep(0.3)
        wire.send(ok())
        wire.await_end()

    with Upstream(script) as upstream, ProxyProcess(upstream.url) as proxy, connect(proxy.address) as wire:
        wire.send(f"GET / HTTP/{version}\r\nHost: t\r\n\r\n".encode())
        assert _record(proxy)["timing_s"]["first_byte"] >= 0.3


# -- kept connections -------------------------------------------------------------------------------------------------


def test_upstream_is_gone_between_two_requests() -> None:
    """The kept connection is found dropped, and no other can be made: an answer, and a whole record."""

    def once(wire: Wire) -> None:
        wire.read_request()
        wire.send(ok())
        wire.close()

    with Upstream(once) as upstream, ProxyProcess(upstream.url) as proxy, connect(proxy.address) as wire:
        wire.get("/1")
        assert wire.read_response().status == 200
        upstream.settle()
        upstream.close()
        wire.get("/2")
        assert wire.read_response().status == 502
        record = _record(proxy, 2)
        assert (record["side"], record["phase"], record["cause"]) == ("upstream", "connect", "refused")
        assert record["status"] == 502
        assert not record.get("notes")


def test_upstream_goes_when_it_is_asked_again() -> None:
    """Of two attempts, the first on a kept connection, the record speaks of the one that decided."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(ok())
        wire.read_request()
        upstream.stop_listening()
        wire.reset()

    with Upstream(script) as upstream, ProxyProcess(upstream.url) as proxy, connect(proxy.address) as wire:
        wire.get("/1")
        assert wire.read_response().status == 200
        wire.get("/2")
        assert wire.read_response().status == 502
        record = _record(proxy, 2)
        assert (record["side"], record["phase"], record["cause"]) == ("upstream", "connect", "refused")
        assert [(attempt["upstream"], attempt["cause"]) for attempt in record["attempts"]] == [(upstream.name, "reset")]
        assert record["upstream"] is None
        assert "connected" not in record["timing_s"]
        assert record["socket"]["upstream"] is None


@pytest.mark.parametrize("end", ["reset", "cut"])
@pytest.mark.parametrize("upstream_tls", [False, True], ids=["plain", "tls"])
def test_kept_connections_that_have_all_gone_stale(upstream_tls: bool, end: str, certificates: Certificates) -> None:
    """The second attempt is made on a new connection, not on the next one that was kept."""
    both = threading.Barrier(2)
    numbers = iter(range(10))

    def script(wire: Wire) -> None:
        stale = next(numbers) < 2
        wire.read_request()
        if stale:
            both.wait(5)
        wire.send(ok())
        if stale:
            wire.read_head()
            if end == "reset":
                wire.reset()
            else:
                wire.close()  # under TLS without close_notify, as many servers do
        else:
            wire.await_end()

    with (
        _scene(certificates, script, upstream_tls=upstream_tls) as (upstream, proxy),
        connect(proxy.address) as one,
        connect(proxy.address) as other,
    ):
        one.get("/1")
        other.get("/2")
        assert one.read_response().status == other.read_response().status == 200
        proxy.wait_requests(2)
        one.get("/3")
        assert one.read_response().status == 200
        record = _record(proxy, 3)
        assert record["event"] == "request.complete"
        assert len(record["attempts"]) == 1
        assert len(upstream.wires) == 3


@pytest.mark.parametrize("client_tls", [False, True], ids=["plain_client", "tls_client"])
def test_the_next_request_waits_for_a_retry(client_tls: bool, certificates: Certificates) -> None:
    """A body that comes behind it must not be taken for a request."""
    body = b"GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n"
    seen = []
    asked = threading.Event()
    numbers = iter(range(10))

    def script(wire: Wire) -> None:
        stale = next(numbers) == 0
        seen.append(wire.read_request())
        wire.send(ok())
        if stale:
            wire.read_head()
            asked.set()
            time.sleep(0.5)  # until the proxy has read what comes meanwhile
            wire.close()
            return
        for _ in range(2):
            seen.append(wire.read_request())
            wire.send(ok())
        wire.await_end()

    with (
        _scene(certificates, script, client_tls=client_tls) as (_, proxy),
        connect(proxy.address, certificates.client_context() if client_tls else None) as wire,
    ):
        wire.get("/1")
        assert wire.read_response().status == 200
        wire.get("/2")
        assert asked.wait(5)
        wire.send(b"PUT /3 HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body))
        assert wire.read_response().status == 200
        wire.send(body)
        wire.get("/4")
        assert [wire.read_response().status for _ in range(2)] == [200, 200]
        records = proxy.wait_requests(4)
        assert [record["target"] for record in records] == ["/1", "/2", "/3", "/4"]
        assert [len(record.get("attempts") or ()) for record in records] == [0, 1, 0, 0]
        assert [request.split(b" ")[1] for request in seen] == [b"/1", b"/2", b"/3", b"/4"]
        assert seen[2].endswith(body)


# -- limits that stand still ------------------------------------------------------------------------------------------


def test_a_tunnel_whose_octets_the_reader_takes_slowly_is_not_idle(certificates: Certificates) -> None:
    size = 3_000_000

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.send(SWITCHED + bytes(size))
        wire.await_end()

    with _scene(certificates, script, "--tunnel-timeout", "0.6") as (_, proxy):
        with connect(proxy.address, receive_buffer=16384) as wire:
            wire.send(UPGRADE)
            wire.read_head()
            got = 0
            while got < size:
                octets = wire.read(30_000)
                assert octets, f"the tunnel ended after {got} octets"
                got += len(octets)
                time.sleep(0.03)
            record = _record(proxy)
        assert (record["cause"], record["limit"]["name"]) == ("timeout", "tunnel_timeout")
        assert record["bytes"]["response_body"] == size


def test_no_limit_of_an_exchange_runs_in_a_tunnel() -> None:
    names = ("client-read", "client-write", "upstream-write", "upstream-read")
    limits = [f"--{name}-{kind}=1" for name in names for kind in ("timeout", "deadline")]
    with (
        Upstream(peers.upgrade(SWITCHED)) as upstream,
        ProxyProcess(upstream.url, *limits, "--upstream-head-timeout=1", "--client-head-timeout=1") as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send(UPGRADE)
        wire.read_head()
        for octets in (b"at once", b"late"):
            wire.send(octets)
            assert wire.read_exactly(len(octets)) == octets
            time.sleep(1.3)
        wire.end_write()
        assert wire.read_to_end() == b""
        assert _record(proxy)["event"] == "request.complete"


def test_a_request_that_was_whole_does_not_run_into_its_read_deadline() -> None:
    with (
        peers.full_listener() as port,
        ProxyProcess(
            f"http://127.0.0.1:{port}", "--upstream-connect-timeout", "1.2", "--client-read-deadline", "0.4"
        ) as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send(b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
        assert wire.read_response().status == 504
        record = _record(proxy)
        assert (record["side"], record["phase"], record["cause"]) == ("upstream", "connect", "timeout")


def test_no_limit_on_the_request_runs_after_upstream_has_stopped_reading() -> None:
    def script(wire: Wire) -> None:
        wire.read_head()
        wire.sock.shutdown(socket.SHUT_RD)
        time.sleep(0.3)  # until the proxy has found out
        wire.send(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 40\r\n\r\n")
        for _ in range(8):
            wire.send(b"hello")
            time.sleep(0.2)

    options = ("--upstream-write-timeout", "0.5", "--upstream-write-deadline", "1", "--client-read-deadline", "1.2")
    with (
        Upstream(script, "unix") as upstream,
        ProxyProcess(upstream.url, *options) as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 1000000\r\n\r\n")
        for _ in range(2):
            time.sleep(0.1)  # two writes: the first one finds out
            wire.send(b"x" * 60000)
        response = wire.read_response()
        assert (response.status, response.whole) == (413, True)
        assert _record(proxy)["event"] == "request.complete"


@pytest.mark.parametrize("answers", ["103", "401"])
def test_a_client_that_waits_for_its_100_is_not_late(answers: str) -> None:
    def script(wire: Wire) -> None:
        wire.read_head()
        if answers == "103":
            wire.send(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
            time.sleep(1.0)
            wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            assert wire.read_exactly(5) == b"hello"
            wire.send(ok())
        else:
            wire.send(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 40\r\n\r\n")
            for _ in range(8):
                wire.send(b"hello")
                time.sleep(0.2)

    with Upstream(script) as upstream, ProxyProcess(upstream.url, "--client-read-timeout", "0.5") as proxy:
        with connect(proxy.address) as wire:
            wire.send(b"PUT / HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
            status = 0
            while status < 200:
                response = wire.read_response()
                status = response.status
                if status == 100:
                    wire.send(b"hello")
            assert response.whole
            assert status == (200 if answers == "103" else 401)
        assert _record(proxy)["event"] == "request.complete"


# -- a resolver that does not answer ----------------------------------------------------------------------------------

_SLOW_RESOLVER = """
import socket, time
real = socket.getaddrinfo
def getaddrinfo(host, *arguments, **options):
    if host == "slow.example" and not options.get("flags", 0) & socket.AI_NUMERICHOST:
        time.sleep(60)
    return real(host, *arguments, **options)
socket.getaddrinfo = getaddrinfo
"""


@pytest.fixture
def slow_resolver(tmp_path: pathlib.Path) -> dict[str, str]:
    """Returns: the environment of a proxy for which ``slow.example`` takes a minute to look up."""
    (tmp_path / "sitecustomize.py").write_text(_SLOW_RESOLVER)
    return {"PYTHONPATH": f"{tmp_path}:{harness.ROOT}"}


@pytest.mark.parametrize("end", ["timeout", "client", "shutdown"])
def test_a_name_lookup_ends_as_any_wait(end: str, slow_resolver: dict[str, str]) -> None:
    limit_s = "0.5" if end == "timeout" else "30"
    options = ("--upstream-connect-timeout", limit_s, "--drain-timeout", "0.2")
    with ProxyProcess("http://slow.example", *options, env=slow_resolver) as proxy:
        with connect(proxy.address) as wire:
            wire.get()
            began_at = time.monotonic()
            if end == "timeout":
                assert wire.read_response().status == 504
            else:
                time.sleep(0.2)  # until it looks up, which shows nowhere
                if end == "client":
                    wire.close()
                else:
                    proxy.send_signal(signal.SIGTERM)
            record = _record(proxy)
            assert time.monotonic() - began_at < 3.0
        cause = {"timeout": "timeout", "client": "closed", "shutdown": "shutdown"}[end]
        side = {"timeout": "upstream", "client": "client", "shutdown": "proxy"}[end]
        assert (record["side"], record["phase"], record["cause"]) == (side, "connect", cause)
        if end == "shutdown":
            proxy.await_stop()


def test_a_resolver_that_does_not_answer_takes_no_more_than_its_threads(slow_resolver: dict[str, str]) -> None:
    options = ("--upstream-connect-timeout", "1.5", "--workers", "1")
    with ProxyProcess("http://slow.example", *options, env=slow_resolver) as proxy, contextlib.ExitStack() as stack:
        wires = [stack.enter_context(connect(proxy.address)) for _ in range(80)]
        for wire in wires:
            wire.get()
        (worker,) = proxy.worker_pids()
        tasks = pathlib.Path(f"/proc/{worker}/task")
        harness.wait_until(lambda: len(list(tasks.iterdir())) > 80 + 60)
        assert len(list(tasks.iterdir())) < 80 + 64 + 8
        assert [wire.read_response().status for wire in wires] == [504] * 80
        assert len(proxy.wait_requests(80)) == 80


def test_a_name_that_does_not_resolve() -> None:
    with ProxyProcess("http://nothing.invalid") as proxy, connect(proxy.address) as wire:
        wire.get()
        assert wire.read_response().status == 502
        record = _record(proxy)
        assert (record["side"], record["phase"], record["cause"]) == ("upstream", "connect", "dns")
        assert record["exception"]["errno"] in ("EAI_NONAME", "EAI_AGAIN")


# -- what a stranger found --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_head", "head", "phase"),
    [
        (UPGRADE, SWITCHED, "tunnel"),
        (
            b"POST /exec/1/start HTTP/1.1\r\nHost: t\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.docker.raw-stream\r\n\r\n",
            "tunnel",
        ),
        (
            b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 1000000000\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n\r\n",
            "request_body",
        ),
    ],
    ids=["101", "raw", "early"],
)
def test_a_reset_that_a_write_meets_is_no_end_of_the_response(request_head: bytes, head: bytes, phase: str) -> None:
    """The kernel tells of a reset once: after a write was told, a read shows an end."""
    filled = threading.Event()

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.send(head)
        assert filled.wait(10)
        wire.reset()

    with Upstream(script) as upstream, ProxyProcess(upstream.url) as proxy, connect(proxy.address) as wire:
        wire.send(request_head)
        assert b" 101 " in (answer := wire.read_head()) or b" 200 " in answer
        wire.fill()
        filled.set()
        wire.read_to_end()
        assert wire.end == "reset"  # a FIN would look like the end of the response
        record = _record(proxy)
        assert (record["event"], record["side"], record["phase"], record["cause"]) == (
            *("request.abort", "upstream"),
            *(phase, "reset"),
        )


@pytest.mark.parametrize("transport", ["tcp", "unix", "tls"])
def test_an_upstream_that_goes_after_its_half_close_ends_the_tunnel(transport: str, certificates: Certificates) -> None:
    """The client is silent: that nobody reads any more must be seen without it, and at once."""
    gone_at = []

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.send(SWITCHED + b"bye")
        wire.end_write()
        time.sleep(0.3)
        gone_at.append(time.monotonic())
        if transport == "unix":
            wire.close()
        else:
            wire.reset()

    options = ("--upstream-ca", certificates.ca) if transport == "tls" else ()
    context = certificates.server_context() if transport == "tls" else None
    with (
        Upstream(script, transport, tls=context) as upstream,
        ProxyProcess(upstream.url, *options) as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send(UPGRADE)
        wire.read_head()
        assert wire.read_to_end() == b"bye"
        assert wire.end == "fin"
        record = _record(proxy)
        assert time.monotonic() - gone_at[0] < 2
        assert record["event"] == "request.complete"
        assert 0.25 < record["duration_s"] < 2


@pytest.mark.parametrize("upstream_end", ["close", "reset"])
@pytest.mark.parametrize("client_end", ["close", "reset"])
@pytest.mark.parametrize("client_tls", [False, True], ids=["plain", "tls"])
def test_a_client_that_leaves_just_before_upstream_does(
    client_tls: bool, client_end: str, upstream_end: str, certificates: Certificates
) -> None:
    """While the answer is awaited inside a read, the client is not watched; it was first all the same."""
    asked, left = threading.Event(), threading.Event()

    def script(wire: Wire) -> None:
        wire.read_head()
        asked.set()
        assert left.wait(10)
        if upstream_end == "reset":
            wire.reset()
        else:
            wire.close()

    context = certificates.client_context() if client_tls else None
    with (
        _scene(certificates, script, client_tls=client_tls) as (_, proxy),
        connect(proxy.address, context) as wire,
    ):
        wire.get("/1")
        assert asked.wait(10)
        if client_end == "reset":
            wire.reset()
        else:
            wire.close()
        left.set()
        record = _record(proxy)
        assert (record["event"], record["side"]) == ("request.abort", "client")
        assert record["phase"] == "response_head"
        # Closing with session tickets unread resets the connection, under TLS.
        assert record["cause"] == ("closed" if client_end == "close" and not client_tls else "reset")


@pytest.mark.parametrize("client_tls", [False, True], ids=["plain", "tls"])
def test_a_client_that_resets_just_before_its_answer_comes(client_tls: bool, certificates: Certificates) -> None:
    """The write that finds it tells the kernel's reason, which is told once."""
    asked, left = threading.Event(), threading.Event()

    def script(wire: Wire) -> None:
        wire.read_head()
        asked.set()
        assert left.wait(10)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        wire.await_end()

    context = certificates.client_context() if client_tls else None
    with (
        _scene(certificates, script, client_tls=client_tls) as (_, proxy),
        connect(proxy.address, context) as wire,
    ):
        wire.get("/1")
        assert asked.wait(10)
        wire.reset()
        left.set()
        record = _record(proxy)
        assert (record["event"], record["side"], record["cause"]) == ("request.abort", "client", "reset")
        assert record["exception"]["errno"] in ("ECONNRESET", "EPIPE")


def _send_in_pieces(wire: Wire, octets: bytes) -> None:
    """Send one TLS record so slowly that no timeout of a second lasts until it is whole."""
    assert isinstance(wire, peers.TlsWire)
    wire.tls.write(octets)
    record = wire._outgoing.read()
    wire.sent.add(octets)
    for start in range(0, len(record), 2000):
        wire.sock.sendall(record[start : start + 2000])
        time.sleep(0.25)


def test_a_part_of_a_tls_record_is_progress(certificates: Certificates) -> None:
    """On a slow link a record takes longer than the timeout, and its octets move all the time."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 16000\r\n\r\n")
        _send_in_pieces(wire, bytes(16000))

    options = ("--client-read-timeout", "1", "--upstream-read-timeout", "1")
    with (
        _scene(certificates, script, *options, client_tls=True, upstream_tls=True) as (_, proxy),
        connect(proxy.address, certificates.client_context()) as wire,
    ):
        wire.send(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 16000\r\n\r\n")
        _send_in_pieces(wire, bytes(16000))
        assert wire.read_response().body == bytes(16000)
        assert _record(proxy)["event"] == "request.complete"


def test_of_limits_that_a_machine_which_stood_still_finds_expired_the_first_decides() -> None:
    limits = ("--client-write-deadline", "2", "--upstream-head-timeout", "1")
    with (
        Upstream(peers.silent) as upstream,
        ProxyProcess(upstream.url, *limits) as proxy,
        connect(proxy.address) as wire,
    ):
        wire.get()
        upstream.await_head()
        proxy.wait_in_flight(lambda request: request["duration_s"] > 0.05)  # both limits run by then
        (worker,) = proxy.worker_pids()
        os.kill(worker, signal.SIGSTOP)
        time.sleep(2.5)
        os.kill(worker, signal.SIGCONT)
        assert wire.read_response().status == 504
        assert _record(proxy)["limit"]["name"] == "upstream_head_timeout"


# -- a response that ends with its connection, to a client whose socket has no reset -----------------------------------

UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n"


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_000])
def test_a_unix_client_gets_chunks_where_a_response_ends_with_its_connection(size: int, kind: str) -> None:
    body = os.urandom(size)

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(UNTIL_CLOSE + body[:10])
        wire.send(body[10:])
        wire.end_write()

    with (
        Upstream(script, kind) as upstream,
        ProxyProcess(upstream.url, listen="unix") as proxy,
        connect(proxy.address) as wire,
    ):
        wire.get()
        response = wire.read_response()
        assert (response.get("transfer-encoding"), response.get("connection")) == (b"chunked", b"close")
        assert (response.whole, response.body) == (True, body)
        assert wire.await_end() == "fin"
        record = _record(proxy)
        assert record["event"] == "request.complete"
        counts = record["bytes"]
        assert (counts["response_body"], counts["client_written"]) == (size, wire.received.count)
        assert counts["upstream_read"] == len(UNTIL_CLOSE) + size


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "message_stream"])
def test_a_unix_client_sees_a_cut_where_a_response_ends_with_its_connection(stream: bool) -> None:
    content_type = b"application/json" if stream else b"text/plain"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n\r\n" % content_type
    with (
        Upstream(peers.answer_and_wait(head + b'{"status":"x"}\r\n')) as upstream,
        ProxyProcess(upstream.url, "--upstream-read-timeout", "0.3", listen="unix") as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send(b"POST /v1.41/build HTTP/1.1\r\nHost: t\r\nContent-Length: 0\r\n\r\n")
        response = wire.read_response()
        assert (response.get("transfer-encoding"), response.whole) == (b"chunked", False)
        first, _, last = response.body.partition(b"\r\n")
        assert first == b'{"status":"x"}'
        assert (b"upstream_read_timeout" in last) is stream
        record = _record(proxy)
        assert (record["event"], record["phase"], record["cause"]) == ("request.abort", "response_body", "timeout")
        assert record["bytes"]["response_body"] == 16


def test_a_unix_client_that_stops_in_mid_chunk_is_counted_by_the_octet() -> None:
    with (
        Upstream(peers.flood(UNTIL_CLOSE)) as upstream,
        ProxyProcess(upstream.url, "--client-write-timeout", "0.5", listen="unix") as proxy,
        connect(proxy.address) as wire,
    ):
        wire.get()
        record = _record(proxy)
        response = wire.read_response()
        assert (response.whole, record["cause"]) == (False, "timeout")
        assert (record["bytes"]["response_body"], record["bytes"]["client_written"]) == (
            len(response.body),
            wire.received.count,
        )
        assert response.body


def test_a_unix_client_of_http_1_0_gets_no_chunks() -> None:
    with (
        Upstream(peers.answer_and_close(UNTIL_CLOSE + b"hello")) as upstream,
        ProxyProcess(upstream.url, listen="unix") as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send(b"GET / HTTP/1.0\r\n\r\n")
        response = wire.read_response()
        assert (response.get("transfer-encoding"), response.body) == (None, b"hello")
        assert _record(proxy)["event"] == "request.complete"
