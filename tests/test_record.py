"""Exactly one record, whatever fails inside the proxy: exceptions at every layer, put there by faults/sitecustomize.py.

A proxy with a bug says so (side proxy, cause internal, with a traceback), tells the client, closes, and goes on.
"""

import collections.abc
import pathlib
import threading

import pytest

import harness
from harness import LogRecord, ProxyProcess, wait_until
from peers import PeerGone, Upstream, Wire, chunk, closed_port, connect, ok
from proxy.masking import mask_secrets, printable
from proxy.record import Tally

_FAULTS = pathlib.Path(__file__).resolve().parent / "faults"
_BIG = b"x" * (2 * 1024 * 1024)
_UPGRADE = b"Connection: Upgrade\r\nUpgrade: tcp\r\n"

# Requests by what they go through; "post" needs no relay, as its answer comes at once. What upstream does is in
# ``_serve``.
_IN_CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"fine") + b"0\r\n\r\n"
_REQUESTS = {
    "post": b"POST /post HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\n\r\nhello",
    "post in chunks": b"POST /chunks HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "chunks both ways": b"POST /both HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "fresh": b"GET /fresh HTTP/1.1\r\nHost: t\r\n\r\n",
    "big": b"GET /big HTTP/1.1\r\nHost: t\r\n\r\n",
    "upload": b"POST /upload HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % len(_BIG) + _BIG,
    "chunked": b"GET /chunked HTTP/1.1\r\nHost: t\r\n\r\n",
    "tunnel": b"GET /tunnel HTTP/1.1\r\nHost: t\r\n" + _UPGRADE + b"\r\n",
    "cut": b"GET /cut HTTP/1.1\r\nHost: t\r\n\r\n",
    "drop": b"POST /drop HTTP/1.1\r\nHost: t\r\nContent-Length: 0\r\n\r\n",
    "half": b"GET /half HTT",
}


def _serve(wire: Wire) -> None:
    """What upstream does, by target."""
    while True:
        target = wire.read_head().split()[1]
        match target:
            case b"/post":
                wire.read_exactly(5)
                wire.send(ok(b"fine"))
            case b"/chunks":
                wire.read_until(b"0\r\n\r\n")
                wire.send(ok(b"fine"))
            case b"/big":
                wire.send(ok(_BIG))
            case b"/upload":
                wire.read_exactly(len(_BIG))
                wire.send(ok(b"fine"))
            case b"/both":
                wire.read_until(b"0\r\n\r\n")
                wire.send(_IN_CHUNKS)
            case b"/chunked":
                wire.send(_IN_CHUNKS)
            case b"/tunnel":
                wire.send(b"HTTP/1.1 101 UPGRADED\r\n" + _UPGRADE + b"\r\n")
                while octets := wire.read():
                    wire.send(octets)
                return
            case b"/fresh":
                wire.send(ok(b"fine", b"Connection: close\r\n"))
                return
            case b"/cut":
                wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")
                return
            case b"/drop":
                return


class Faulty:
    """A proxy that can be made to fail, and what its client and upstream saw."""

    def __init__(self, directory: pathlib.Path, kind: str = "RuntimeError") -> None:
        self.directory = directory
        self.upstream = Upstream(_serve)
        environment = {
            "PYTHONPATH": f"{_FAULTS}:{harness.ROOT}",
            "FAULTS": str(directory),
            "FAULT_KIND": kind,
        }
        self.proxy = ProxyProcess(self.upstream.url, "--client-head-timeout", "0.15", env=environment)
        self.count = 0

    def ask(self, which: str, extra: bytes = b"") -> str:
        """Make one request, and wait for its record. Returns: what the client saw: ``whole``, ``cut``, ``gone``, or
        the proxy's own status.
        """
        self.count += 1
        seen = self._ask(_REQUESTS[which].replace(b"Host: t\r\n", b"Host: t\r\n" + extra, 1))
        self.proxy.wait_requests(self.count)
        return seen

    def _ask(self, octets: bytes) -> str:
        with connect(self.proxy.address) as wire:
            try:
                wire.send_until_answered(octets)
                response = wire.read_response()
                if response.get("proxy-status") is not None:
                    assert response.whole
                    assert wire.await_end() == "fin"
                    return str(response.status)
                if response.status == 101:
                    wire.send(b"echo")
                    if wire.read() != b"echo":
                        return "cut"
                    wire.end_write()
                    return "whole" if wire.await_end() == "fin" else "cut"
                if not response.whole:
                    wire.await_end()
            except PeerGone:
                return "gone"
            return "whole" if response.whole else "cut"

    def fail(self, which: str, fault: str) -> tuple[str, LogRecord]:
        """Make one request fail. Returns: what the client saw, and its record."""
        (self.directory / fault).touch()
        for _ in range(10):
            seen = self.ask(which, b"X-Fails: yes\r\n")
            if not (self.directory / fault).exists():
                break
            # On a busy machine upstream may answer late, which takes another way.
            assert (which, seen) == ("post", "whole"), f"{which} does not pass {fault}"
        else:
            pytest.fail(f"{which} does not pass {fault}")
        record = self.proxy.requests()[-1]
        assert self.ask("post") == "whole"  # the next one is served
        assert self.proxy.requests()[-1]["event"] == "request.complete"
        return seen, record

    def check_upstream_was_told(self) -> None:
        """What failed was closed towards upstream at once, not when memory is tidied up."""

        def still_open() -> list[Wire]:
            return [
                wire
                for wire in self.upstream.wires
                if b"X-Fails" in wire.received.octets and wire.sock.fileno() >= 0 and wire.end is None
            ]

        wait_until(lambda: not still_open(), 1, "the end of the upstream connection")
        self.upstream.wires[:] = [wire for wire in self.upstream.wires if wire.sock.fileno() >= 0]

    def use_up_kept_connections(self) -> None:
        """Make the next request need a connection of its own."""
        while self.upstream._running:
            assert self.ask("fresh") == "whole"

    def close(self, *, failed: bool) -> None:
        """Stop both."""
        try:
            with self.proxy:
                if failed:
                    raise InterruptedError
        except InterruptedError:
            pass  # killed: a test has failed, and says why
        finally:
            self.upstream.close()


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> collections.abc.Iterator[Faulty]:
    faulty = Faulty(tmp_path_factory.mktemp("faults"))
    faulty.ask("post")
    yield faulty
    faulty.close(failed=False)


@pytest.fixture(autouse=True)
def nothing_left() -> None:
    """Not counted here after each test: the upstream of all tests has connections that are kept between them."""


# Where it fails, on which requests, what the client sees, and the phase.
_ANSWERED = [
    *(("exchange." + place, which, "request_head") for place in (
        "parse_request_head", "prepare_request", "serialize_request",
        "ClientConnection._judge", "ClientConnection._exchange", "ClientConnection._read_head",
    ) for which in ("post", "big", "tunnel", "upload")),
    *(("exchange." + place, which, "connect") for place in (
        "request_framing", "Relay", "ClientConnection._relay"
    ) for which in ("post in chunks", "upload", "after fresh")),
    ("exchange.ClientConnection._exchange_at_once", "post", "connect"),
    ("exchange.AtOnce", "post", "connect"),
    ("exchange.parse_response_head", "post", "response_head"),
    ("exchange.prepare_response", "post", "response_head"),
    ("exchange.serialize_response", "post", "response_head"),
    ("exchange.check_partial_head", "half", "request_head"),
    ("exchange.ClientConnection._read_head", "half", "request_head"),
    ("waiting.Waiter.wait", "half", "request_head"),
    ("upstream._LeasingPool.lease", "fresh", "connect"),
    ("upstream._LeasingPool.lease", "post", "connect"),
    ("exchange.ClientConnection._connect", "after fresh", "connect"),
    ("upstream._LeasedConnection._connect", "after fresh", "connect"),
    ("upstream._LeasedConnection.open", "after fresh", "connect"),
    ("upstream.endpoint_name", "after fresh", "connect"),
    ("relay.Relay.attach", "post in chunks", "connect"),
    ("relay.Relay.run", "post in chunks", "request_body"),
    ("relay.Relay.run", "big", "response_head"),
    ("relay.Flow.push", "post in chunks", "request_body"),
    ("relay.Flow.push", "big", "response_body"),
    ("upstream.write", "post", "request_body"),
    ("upstream.write", "post in chunks", "request_body"),
    ("upstream.read", "post", "response_head"),
    ("upstream.read", "post in chunks", "response_head"),
    ("framing.LengthFraming.feed", "upload", "request_body"),
    ("framing.ChunkedFraming.feed", "post in chunks", "request_body"),
    ("relay.Relay._pump_request", "upload", "request_body"),
    ("relay.Relay._read_upstream", "post in chunks", "response_head"),
    ("relay.Relay._take_head", "post in chunks", "response_head"),
    ("relay.parse_response_head", "post in chunks", "response_head"),
    ("relay.response_framing", "post in chunks", "response_head"),
    ("relay.prepare_response", "post in chunks", None),
    ("relay.prepare_response", "tunnel", None),
    ("relay.serialize_response", "post in chunks", None),
    ("relay.serialize_response", "chunks both ways", None),
    ("relay.Relay._begin_tunnel", "tunnel", "response_head"),
    ("relay.Relay._flush_response", "post in chunks", None),
    ("framing.LengthFraming.feed", "big", None),
    ("framing.ChunkedFraming.feed", "chunked", None),
    ("framing.ChunkedFraming.feed", "chunks both ways", None),
    ("client.write", "post", None),
    ("client.write", "post in chunks", None),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "which", "phase"), _ANSWERED)
def test_a_bug_before_the_response_is_a_502(fault: str, which: str, phase: str | None, faulty: Faulty) -> None:
    if which == "after fresh":
        faulty.use_up_kept_connections()
        which = "fresh"
    seen, record = faulty.fail(which, fault)
    check_bug(record, fault)
    assert (seen, record["status"]) == ("502", 502)
    assert phase is None or record["phase"] == phase
    faulty.check_upstream_was_told()


@pytest.mark.parametrize("fault", ["exchange.parse_response_head", "exchange.serialize_response"])
def test_a_bug_where_there_is_no_relay_yet_tells_how_far_it_had_come(fault: str, faulty: Faulty) -> None:
    """Somebody who reads that nothing had reached upstream sends a POST again."""
    _, record = faulty.fail("post", fault)
    counts = record["bytes"]
    assert (counts["request_body"], counts["response_body"]) == (5, 0)
    assert counts["upstream_read"] == len(ok(b"fine"))
    assert counts["upstream_written"] > counts["client_read"] > 5
    assert "the request was sent" in record["message"]


def check_bug(record: LogRecord, fault: str) -> None:
    """Check the record of a bug."""
    harness.check_record(record)
    assert record["event"] == "request.abort"
    assert (record["side"], record["cause"], record["operation"]) == ("proxy", "internal", None)
    assert record["exception"]["class"] == "RuntimeError"
    assert record["exception"]["text"].startswith(f"injected at {fault}, ")
    assert record["traceback"].startswith("Traceback")
    assert f"injected at {fault}" in record["traceback"]


_CUT = [
    ("relay.Relay._splice", "big"),
    ("kernel.SplicePipe.fill", "big"),
    ("kernel.SplicePipe.drain", "big"),
    ("relay.Relay._pump_request", "tunnel"),
]


@pytest.mark.parametrize(("fault", "which"), _CUT)
def test_a_bug_within_the_response_is_a_cut(fault: str, which: str, faulty: Faulty) -> None:
    seen, record = faulty.fail(which, fault)
    check_bug(record, fault)
    assert seen == "cut"
    assert record["status"] == (101 if which == "tunnel" else 200)
    assert record["phase"] == ("tunnel" if which == "tunnel" else "response_body")
    faulty.check_upstream_was_told()


_AFTER = [
    ("exchange.ClientConnection._return_lease", "post in chunks"),
    ("upstream._LeasingPool.release", "post"),
    ("upstream._LeasingPool.release", "post in chunks"),
    ("exchange.ClientConnection._settle", "post"),
    ("exchange.ClientConnection._settle", "post in chunks"),
    ("exchange.ClientConnection._settle", "big"),
    ("exchange.ClientConnection._ending_after", "chunks both ways"),
    ("exchange.ClientConnection._await_delivery", "big"),
]


@pytest.mark.parametrize(("fault", "which"), _AFTER)
def test_a_bug_after_the_response_ends_the_connection(fault: str, which: str, faulty: Faulty) -> None:
    """The client has all of it; that the proxy failed is on record, and the connection ends there."""
    (faulty.directory / fault).touch()
    with connect(faulty.proxy.address) as wire:
        wire.send(_REQUESTS[which].replace(b"Host: t\r\n", b"Host: t\r\nX-Fails: yes\r\n"))
        faulty.count += 1
        assert wire.read_response().whole
        faulty.proxy.wait_requests(faulty.count)
        wire.sock.settimeout(1)
        assert wire.read_to_end() == b""  # no second answer
        assert wire.end in ("fin", "reset")
    check_bug(faulty.proxy.requests()[-1], fault)
    assert faulty.ask("post") == "whole"
    if "_LeasingPool" in fault or "_return_lease" in fault:
        faulty.check_upstream_was_told()


_ENDING = [
    (fault, which)
    for fault in (
        "exchange.socket_evidence", "exchange.ClientConnection._settle", "exchange.ClientConnection._drop_lease",
        "exchange.ClientConnection._tell_client", "exchange.ClientConnection._answer", "exchange.error_response",
        "client.write", "record.Record.sentence",
    )
    for which in ("cut", "drop", "half")
    if which != "cut" or fault.rpartition(".")[2] not in ("_answer", "error_response", "write", "sentence")
]  # fmt: skip


@pytest.mark.parametrize(("fault", "which"), _ENDING)
def test_a_bug_while_an_abort_is_ended_does_not_hide_the_abort(fault: str, which: str, faulty: Faulty) -> None:
    """The first error is the record's; the bug is a note in it, and the client is told or cut off."""
    seen, record = faulty.fail(which, fault)
    harness.check_record(record)
    assert (record["side"], record["cause"]) == (("client", "timeout") if which == "half" else ("upstream", "closed"))
    assert any(f"injected at {fault}" in note for note in record["notes"])
    assert seen in ({"cut": ("cut",), "drop": ("gone", "502"), "half": ("gone", "408")}[which])
    assert record["status"] == {"gone": None, "cut": 200}.get(seen, int(seen) if seen.isdigit() else None)
    faulty.check_upstream_was_told()


_RECORD_BUGS = [
    *((fault, "post") for fault in ("record.Record._complete_line", "record.timestamp")),
    *(
        (fault, which)
        for fault in ("fields", "_abort_fields", "sentence", "bytes")
        for which in ("cut", "drop", "half")
        if which == "cut" or fault in ("fields", "_abort_fields")
        for fault in (f"record.Record.{fault}",)
    ),
    *((f"record.{fault}", "cut") for fault in ("describe_exception", "describe_limit")),
    *(("log.EventLog.write", which) for which in ("post", "cut", "half", "tunnel")),
    *((fault, "cut") for fault in ("log.EventLog.event", "log.RecordFormatter.line")),
]


@pytest.mark.parametrize(("fault", "which"), _RECORD_BUGS)
def test_a_bug_in_making_the_record_does_not_cost_the_record(fault: str, which: str, faulty: Faulty) -> None:
    seen, record = faulty.fail(which, fault)
    assert seen == {"post": "whole", "tunnel": "whole", "cut": "cut", "drop": "502", "half": "408"}[which]
    harness.check_record(record)
    assert record["event"] == ("request.complete" if seen == "whole" else "request.abort")
    # It says what it would have said, and what was wrong.
    if seen != "whole":
        expected = {"cut": ("upstream", "closed"), "drop": ("upstream", "closed"), "half": ("client", "timeout")}
        assert (record["side"], record["cause"]) == expected[which]
    assert record["bytes"]["client_read"] > 0
    assert record["bytes"]["response_body"] == {"post": 4, "tunnel": 4, "cut": 3, "drop": 0, "half": 0}[which]
    assert any(fault in note for note in record["notes"])
    told = [line for line in faulty.proxy.records() if line["event"] == "internal.error"][-1]
    assert told["request_id"] == record["request_id"]
    assert fault in told["traceback"]


def test_a_bug_in_writing_the_line_costs_the_line_at_most(tmp_path: pathlib.Path) -> None:
    """It goes to stderr, and is counted as lost."""
    faulty = Faulty(tmp_path)
    try:
        assert faulty.ask("post") == "whole"
        (tmp_path / "log.LineFile.write").touch()
        assert faulty._ask(_REQUESTS["post"]) == "whole"
        wait_until(lambda: '"event":"request.complete"' in faulty.proxy.stderr())
        assert faulty.ask("post") == "whole"
        faulty.proxy.process.terminate()
        assert faulty.proxy.process.wait(10) == 0
        stop = faulty.proxy.records()[-1]
        assert stop["requests"] == {"begun": 3, "complete": 3, "reject": 0, "abort": 0}
        assert (stop["balanced"], stop["lost_log_lines"]) == (True, 1)
    finally:
        faulty.proxy.kill()
        faulty.proxy.remove()
        faulty.upstream.close()


@pytest.mark.parametrize("fault", ["exchange.ClientConnection._end", "relay.Relay.release"])
def test_a_bug_after_the_record_is_an_event_of_its_own(fault: str, faulty: Faulty) -> None:
    before = len(faulty.proxy.records())
    faulty.fail("drop", fault)
    found = faulty.proxy.wait_for(lambda record: record["event"] == "connection.abort", since=before)
    assert (found["level"], found["side"], found["cause"]) == ("error", "proxy", "internal")
    assert fault in found["message"]
    assert fault in found["exception"]["text"]
    assert found["connection_id"] in {record["connection_id"] for record in faulty.proxy.requests()}
    assert found["duration_s"] > 0


def test_a_bug_in_housekeeping_does_not_end_a_worker(tmp_path: pathlib.Path) -> None:
    """Every five seconds a worker looks after its pool: what fails there must not cost the requests in flight."""
    faulty = Faulty(tmp_path)
    try:
        assert faulty.ask("post") == "whole"  # leaves a kept connection to look after
        pids = faulty.proxy.pids()
        (tmp_path / "upstream._LeasingPool.release").touch()
        found = faulty.proxy.wait_for(lambda record: record["event"] == "worker.error", 12)
        assert "goes on" in found["message"]
        assert faulty.ask("post") == "whole"
        assert faulty.proxy.pids() == pids
    finally:
        faulty.close(failed=False)


def test_out_of_memory_is_a_resource(tmp_path: pathlib.Path) -> None:
    faulty = Faulty(tmp_path, "MemoryError")
    try:
        assert faulty.ask("post") == "whole"
        for fault, which in (("relay.Relay.attach", "post in chunks"), ("exchange.parse_request_head", "post")):
            seen, record = faulty.fail(which, fault)
            harness.check_record(record)
            assert (record["side"], record["cause"], seen) == ("proxy", "resource", "503")
    finally:
        faulty.close(failed=False)


def test_nothing_leaks_over_many_bugs(faulty: Faulty) -> None:
    """Threads, descriptors and upstream connections, after the same bugs ten and twenty times."""
    counts: list[tuple[int, int]] = []
    for _ in range(3):
        for fault, which in (
            ("relay.Relay.run", "post in chunks"),
            ("exchange.ClientConnection._exchange_at_once", "post"),
            ("relay.Relay._splice", "big"),
            ("exchange.ClientConnection._settle", "cut"),
            ("exchange.socket_evidence", "drop"),
            ("exchange.error_response", "half"),
            ("record.Record.fields", "cut"),
            ("upstream._LeasingPool.lease", "fresh"),
        ):
            for _ in range(3):
                faulty.fail(which, fault)
        faulty.check_upstream_was_told()
        if len(counts) < 2:
            counts.append((faulty.proxy.open_files(), faulty.proxy.threads()))
    # The last connections may have yet to end.
    wait_until(lambda: faulty.proxy.open_files() <= counts[1][0] + 2, what=f"no more files than {counts}")
    wait_until(lambda: faulty.proxy.threads() <= counts[1][1] + 1, what=f"no more threads than {counts}")


# -- what is in it ----------------------------------------------------------------------------------------------------


def test_octets_are_logged_as_printable_ascii() -> None:
    text = printable(bytes(range(256)))
    assert text.isascii()
    assert text.isprintable()
    assert r"\x00" in text
    assert r"\x0a" in text
    assert r"\x7f" in text
    assert r"\xff" in text
    assert printable(b"/plain?a=b") == "/plain?a=b"


@pytest.mark.parametrize(
    ("target", "masked"),
    [
        (b"/x?token=secret", b"/x?token=***"),
        (b"/x?a=b&Password=s%20x&c=d", b"/x?a=b&Password=***&c=d"),
        (b"/x?api_key=1&api-key=2&apikey=3", b"/x?api_key=***&api-key=***&apikey=***"),
        (b"/x?token=", b"/x?token=***"),
        (b"/token=x", b"/token=x"),
        (b"/x?mytoken=x", b"/x?mytoken=x"),
        (b"/x?a?token=x", b"/x?a?token=***"),
    ],
)
def test_secrets_in_queries_are_masked(target: bytes, masked: bytes) -> None:
    assert mask_secrets(target) == masked


def test_counts_of_many_threads_add_up() -> None:
    tally = Tally(memoryview(bytearray(8 * len(Tally.NAMES))).cast("Q"))

    def count() -> None:
        for _ in range(2000):
            tally.add(0)
            tally.add(4)
            tally.add(4, -1)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tally.counts() == {name: 16_000 if name == "begun" else 0 for name in Tally.NAMES}


def test_a_body_that_came_before_upstream_was_reached_is_counted() -> None:
    """What was read from the client crossed its socket, though it never left for upstream."""
    request = b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\n\r\nhello"
    with closed_port() as port, ProxyProcess(f"http://127.0.0.1:{port}") as proxy:
        with connect(proxy.address) as wire:
            wire.send(request + b"GET /next HTTP/1.1\r\nHost: t\r\n\r\n")  # not of this request
            assert wire.read_response().status == 502
        record = proxy.next_request()
        harness.check_record(record)
        assert record["cause"] == "refused"
        assert record["bytes"]["client_read"] == len(request)
        assert record["bytes"]["request_body"] == 0
