"""Who did it, and how far it had come: ends that looked whole, limits that blamed the wrong side or nobody, counts that
left octets out, and records that said too much.
"""

import collections.abc
import contextlib
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import harness
import netns
from conftest import Certificates
from harness import LogRecord, ProxyProcess, wait_until
from peers import (
    TlsWire,
    Upstream,
    Wire,
    answer_all,
    answer_and_close,
    answer_and_wait,
    chunk,
    connect,
    ok,
    silent,
    upgrade,
)
from proxy.head import SectionMemory, parse_request_head
from proxy.masking import mask_secrets

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
TO_THE_END = b"HTTP/1.1 200 OK\r\n\r\n"
SWITCHED = b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
UPGRADE = b"POST /t HTTP/1.1\r\nHost: t\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
LIMIT_S = 0.3


def _get(version: str = "1.1", target: str = "/") -> bytes:
    return f"GET {target} HTTP/{version}\r\nHost: t\r\n\r\n".encode()


def _post(length: int, method: str = "POST") -> bytes:
    """Returns: the head of a request with a body."""
    return f"{method} / HTTP/1.1\r\nHost: t\r\nContent-Length: {length}\r\n\r\n".encode()


def _last_record(proxy: ProxyProcess, count: int = 1) -> LogRecord:
    """Wait for the records of ``count`` requests. Returns: the last one. All are checked."""
    records = proxy.wait_requests(count)
    for record in records:
        harness.check_record(record)
    return records[-1]


def _blame(record: LogRecord) -> tuple[str, ...]:
    return tuple(record[name] for name in ("event", "side", "phase", "cause"))


def _check_counts(record: LogRecord, **counts: int) -> None:
    assert {name: record["bytes"][name] for name in counts} == counts


# -- a client that half-closes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize(
    ("version", "answer"),
    [("1.1", TO_THE_END + b"begin"), ("1.0", TO_THE_END + b"begin"), ("1.0", CHUNKED + chunk(b"begin"))],
    ids=["to_1.1", "to_1.0", "chunked_to_1.0"],
)
def test_a_client_that_half_closes_takes_no_cut_for_the_end(
    version: str, answer: bytes, tls: bool, certificates: Certificates
) -> None:
    """It reads on, and to a response that ends with its connection a FIN would be the end."""
    options = ("--tls-cert", certificates.server, "--tls-key", certificates.server) if tls else ()
    with (
        Upstream(answer_and_wait(answer)) as upstream,
        ProxyProcess(upstream.url, *options) as proxy,
        connect(proxy.address, certificates.client_context() if tls else None) as wire,
    ):
        wire.send(_get(version))
        wire.read_until(b"\r\n\r\nbegin")
        wire.end_write()
        assert wire.await_end() == "reset"
        upstream.settle()
        record = _last_record(proxy)
        assert _blame(record) == ("request.abort", "client", "response_body", "closed")
        assert record["status"] == 200
        assert record["bytes"] == {
            "client_read": len(_get(version)),
            "client_written": wire.received.count,
            "upstream_read": len(answer),
            "upstream_written": upstream.wires[0].received.count,
            "request_body": 0,
            "response_body": len(b"begin"),
        }


# -- limits that blamed the wrong side, or nobody ---------------------------------------------------------------------


@contextlib.contextmanager
def _stale_then_full(
    directory: pathlib.Path, *options: str
) -> collections.abc.Iterator[tuple[ProxyProcess, Wire, collections.abc.Callable[[], Wire]]]:
    """Give a proxy whose client has sent the head of a PUT with ten octets, which is connected to upstream for the
    second time, and upstream does not accept. The callable does, and returns that connection.
    """
    path = str(directory / "s")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        listener.settimeout(10)
        proxy = stack.enter_context(ProxyProcess(f"unix://{path}", *options))
        wire = stack.enter_context(connect(proxy.address))
        wire.send(_get())
        kept = stack.enter_context(Wire(listener.accept()[0]))
        kept.read_head()
        kept.send(ok())
        assert wire.read_response().whole
        waiting = 0
        while True:
            other = stack.enter_context(socket.socket(socket.AF_UNIX))
            other.setblocking(False)
            try:
                other.connect(path)
            except BlockingIOError:
                break
            waiting += 1

        def accept() -> Wire:
            for _ in range(waiting):
                listener.accept()[0].close()
            return stack.enter_context(Wire(listener.accept()[0]))

        wire.send(_post(10, "PUT"))
        kept.read_head()
        kept.end_write()
        assert kept.await_end() == "fin"  # the proxy has let go of it
        yield proxy, wire, accept


def test_a_client_that_sent_its_body_while_a_second_connect_took_long_is_served(tmp_path: pathlib.Path) -> None:
    with _stale_then_full(tmp_path, "--client-read-timeout", str(LIMIT_S)) as (proxy, wire, accept):
        wire.send(b"0123456789")
        time.sleep(3 * LIMIT_S)  # what the second connect takes
        second = accept()
        assert second.read_request().endswith(b"\r\n\r\n0123456789")
        second.send(ok(b"stored"))
        assert wire.read_response().body == b"stored"
        record = _last_record(proxy, 2)
        assert record["event"] == "request.complete"
        assert [attempt["cause"] for attempt in record["attempts"]] == ["closed"]
        _check_counts(
            record, client_read=len(_post(10, "PUT")) + 10, upstream_written=second.received.count, request_body=10
        )


def test_a_second_connect_that_never_ends_is_upstreams_doing(tmp_path: pathlib.Path) -> None:
    limits = ("--client-read-timeout", str(LIMIT_S), "--upstream-connect-timeout", str(2 * LIMIT_S))
    with _stale_then_full(tmp_path, *limits) as (proxy, wire, _):
        wire.send(b"0123456789")
        assert wire.read_response().status == 504
        record = _last_record(proxy, 2)
        assert _blame(record) == ("request.abort", "upstream", "connect", "timeout")
        assert record["limit"]["name"] == "upstream_connect_timeout"
        _check_counts(record, upstream_read=0, upstream_written=0, request_body=0)


def test_an_interim_response_that_the_client_does_not_take_is_no_silence_of_upstream() -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\nX-Pad: %b\r\n\r\n" % (b"x" * 30_000)
    count = 12  # more than the client's socket holds, less than both sockets do

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.send(interim * count + ok(b"done"))
        wire.await_end()

    with (
        Upstream(script, "unix") as upstream,
        ProxyProcess(upstream.url, "--upstream-head-timeout", str(LIMIT_S), listen="unix") as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send(_get())
        time.sleep(3 * LIMIT_S)  # it takes nothing for that long
        assert [wire.read_response().status for _ in range(count)] == [103] * count
        assert wire.read_response().body == b"done"
        record = _last_record(proxy)
        assert (record["event"], record["status"]) == ("request.complete", 200)
        _check_counts(
            record, client_written=wire.received.count, upstream_read=upstream.wires[0].sent.count, response_body=4
        )


@pytest.mark.parametrize("pause_s", [0.1, 5.0], ids=["again_and_again", "once"])
def test_interim_responses_do_not_hold_off_the_limit_for_the_final_one(pause_s: float) -> None:
    ended = threading.Event()

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        while not ended.wait(pause_s):
            wire.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")

    with (
        Upstream(script) as upstream,
        ProxyProcess(upstream.url, "--upstream-head-timeout", str(LIMIT_S)) as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send(_get())
        while wire.read_response().status == 103:
            pass
        ended.set()
        record = _last_record(proxy)
        assert _blame(record) == ("request.abort", "upstream", "response_head", "timeout")
        assert record["limit"]["name"] == "upstream_head_timeout"
        assert LIMIT_S <= record["limit"]["elapsed_s"] < 2.0


def test_an_upstream_that_stops_reading_and_never_answers_is_given_up() -> None:
    stopped, over = threading.Event(), threading.Event()

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.sock.shutdown(socket.SHUT_RD)
        stopped.set()
        assert over.wait(10)

    with (
        Upstream(script, "unix") as upstream,
        ProxyProcess(upstream.url, "--upstream-head-timeout", str(LIMIT_S)) as proxy,
        connect(proxy.address, patience_s=4.0) as wire,
    ):
        try:
            wire.send(_post(100_000))
            assert stopped.wait(10)
            wire.send(b"x" * 2000)
            assert wire.read_response().status == 504
        finally:
            over.set()
        record = _last_record(proxy)
        assert (record["event"], record["side"], record["cause"]) == ("request.abort", "upstream", "timeout")
        assert record["limit"]["name"] == "upstream_head_timeout"
        assert LIMIT_S <= record["limit"]["elapsed_s"] < 3.0
        assert [event["what"] for event in record["events"]] == ["stopped_reading"]
        assert record["message"].endswith(
            f": upstream had stopped reading the request and no response had reached client {record['client']},"
            f" upstream {upstream.name} had answered 0 bytes"
        )
        _check_counts(record, client_read=len(_post(100_000)) + 2000, client_written=wire.received.count)


def test_a_limit_of_a_few_milliseconds_is_not_passed_over() -> None:
    """As long as an answer may come at once nothing else is looked at, but no longer than a limit allows."""

    def script(wire: Wire) -> None:
        wire.read_head()
        time.sleep(0.1)
        wire.send(ok())

    with (
        Upstream(script) as upstream,
        ProxyProcess(upstream.url, "--upstream-head-timeout", "0.005") as proxy,
    ):
        # A loaded machine is late, so the best of some tries counts.
        for number in range(20):
            with connect(proxy.address) as wire:
                wire.send(_get())
                assert wire.read_response().status == 504
            record = _last_record(proxy, number + 1)
            assert record["limit"]["name"] == "upstream_head_timeout"
            assert record["limit"]["elapsed_s"] >= 0.005
            if record["limit"]["elapsed_s"] < 0.018:
                break
        else:
            pytest.fail("none of the answers was given up before 18 ms had passed")


# -- --max-connections ------------------------------------------------------------------------------------------------


def test_connections_that_were_turned_away_keep_no_others_out() -> None:
    def is_served() -> bool:
        with connect(proxy.address) as wire:
            wire.send(_get())
            return wire.read_response().status == 200

    with (
        Upstream(answer_all(ok())) as upstream,
        ProxyProcess(upstream.url, "--max-connections", "2") as proxy,
        contextlib.ExitStack() as stack,
    ):
        held = [stack.enter_context(connect(proxy.address)) for _ in range(2)]
        for wire in held:
            wire.send(_get())
            assert wire.read_response().status == 200
        files = proxy.open_files()
        refused = [stack.enter_context(connect(proxy.address)) for _ in range(3)]
        wait_until(lambda: proxy.open_files() >= files + len(refused), what="all are accepted")
        for wire in held:
            wire.close()
        wait_until(is_served, 1.5, "a place")
        assert not select.select([wire.sock for wire in refused], [], [], 0)[0]  # all of them are still there
        for record in proxy.requests():
            harness.check_record(record)


def test_a_tls_connection_too_many_that_says_nothing_is_closed_as_soon_as_a_plain_one(
    certificates: Certificates,
) -> None:
    own = ("--tls-cert", certificates.server, "--tls-key", certificates.server)
    with (
        Upstream(answer_all(ok())) as upstream,
        ProxyProcess(upstream.url, *own, "--max-connections", "1") as proxy,
        connect(proxy.address, certificates.client_context()) as held,
    ):
        held.send(_get())
        assert held.read_response().status == 200
        began_at = time.monotonic()
        with connect(proxy.address, patience_s=6.0) as extra:
            extra.await_end()
        assert time.monotonic() - began_at >= 2.0
        held.send(_get())
        assert held.read_response().status == 200
        assert _last_record(proxy, 2)["event"] == "request.complete"


# -- local addresses and ports ----------------------------------------------------------------------------------------


@pytest.fixture
def namespace() -> collections.abc.Iterator[str]:
    """A network namespace with a loopback of its own."""
    reason = netns.why_not()
    if reason is not None:
        pytest.skip(reason)
    name = f"proxy-test-{os.getpid()}-local"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.mark.netns
def test_local_ports_that_are_used_up_are_no_fault_of_upstream(namespace: str) -> None:
    with netns.inside(namespace):
        upstream = Upstream(silent)
    with (
        upstream,
        ProxyProcess(upstream.url, listen="unix", namespace=namespace) as proxy,
        contextlib.ExitStack() as stack,
    ):
        with netns.inside(namespace):
            pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("30000 30001")
        for number in range(2):
            stack.enter_context(connect(proxy.address)).send(_get())
            upstream.wire(number)
        with connect(proxy.address) as wire:
            wire.send(_get())
            assert wire.read_response().status == 503
        record = _last_record(proxy)
        assert _blame(record) == ("request.abort", "proxy", "connect", "resource")
        assert (record["operation"], record["status"], record["upstream"]) == ("connect", 503, None)
        assert record["exception"]["errno"] == "EADDRNOTAVAIL"
        _check_counts(record, client_read=len(_get()), client_written=wire.received.count, upstream_written=0)


@pytest.mark.netns
def test_an_upstream_that_no_address_of_this_machine_leads_to_is_unreachable(namespace: str) -> None:
    """The same error of the kernel as for want of ports."""
    subprocess.run(["ip", "-n", namespace, "address", "delete", "::1/128", "dev", "lo"], check=True)
    with ProxyProcess("http://[::1]:9", listen="unix", namespace=namespace) as proxy, connect(proxy.address) as wire:
        wire.send(_get())
        assert wire.read_response().status == 502
        record = _last_record(proxy)
        assert _blame(record) == ("request.abort", "upstream", "connect", "unreachable")
        assert record["exception"]["errno"] == "EADDRNOTAVAIL"


# -- what a record counts, and says -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_client_that_ends_in_its_body_was_silent_since_its_last_byte(tls: bool, certificates: Certificates) -> None:
    got = threading.Event()

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.read_exactly(3)
        got.set()
        wire.await_end()

    options = ("--tls-cert", certificates.server, "--tls-key", certificates.server) if tls else ()
    with (
        Upstream(script) as upstream,
        ProxyProcess(upstream.url, *options) as proxy,
        connect(proxy.address, certificates.client_context() if tls else None) as wire,
    ):
        wire.send(_post(100) + b"abc")
        assert got.wait(10)
        time.sleep(0.4)  # the silence
        wire.end_write()
        record = _last_record(proxy)
        assert _blame(record) == ("request.abort", "client", "request_body", "closed")
        assert 0.4 <= record["stalled_s"]["client_read"] <= record["duration_s"]
        _check_counts(record, client_read=len(_post(100)) + 3, request_body=3)


def test_a_failed_retry_does_not_claim_that_nothing_had_reached_upstream_before() -> None:
    octets = _post(8, "PUT") + b"BODYBODY"
    requests = []

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(ok())
        requests.append(wire.read_request())
        upstream.stop_listening()
        wire.reset()

    with (
        Upstream(script) as upstream,
        ProxyProcess(upstream.url) as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send(_get())
        assert wire.read_response().whole
        wire.send(octets)
        response = wire.read_response()
        assert response.status == 502
        record = _last_record(proxy, 2)
        assert requests[0].endswith(b"BODYBODY")
        assert _blame(record) == ("request.abort", "upstream", "connect", "refused")
        assert [attempt["cause"] for attempt in record["attempts"]] == ["reset"]
        for text in (record["message"], json.loads(response.body)["message"]):
            assert f"nothing of it had reached upstream from client {record['client']} in the last attempt" in text
        _check_counts(record, client_read=len(octets), upstream_read=0, upstream_written=0, request_body=0)


def test_where_nothing_was_tried_before_no_attempt_is_spoken_of() -> None:
    with Upstream(silent) as upstream:
        upstream.stop_listening()
        with ProxyProcess(upstream.url) as proxy, connect(proxy.address) as wire:
            wire.send(_get())
            assert wire.read_response().status == 502
            record = _last_record(proxy)
            assert "attempts" not in record
            assert record["message"].endswith(f"nothing of it had reached upstream from client {record['client']}")


def _check_had_sent_all(upstream: Upstream, record: LogRecord) -> None:
    sent = upstream.wires[0].sent.count
    assert record["bytes"]["upstream_read"] == sent
    assert f"upstream {record['upstream']} had sent all of it" in record["message"]
    assert "was still sending" not in record["message"]


def test_an_upstream_that_had_sent_all_was_not_still_sending_to_a_client_that_takes_nothing() -> None:
    with (
        Upstream(answer_all(ok(b"x" * 250_000))) as upstream,
        ProxyProcess(upstream.url, "--client-write-timeout", str(LIMIT_S), listen="unix") as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send(_get())
        record = _last_record(proxy)
        assert _blame(record) == ("request.abort", "client", "response_body", "timeout")
        _check_had_sent_all(upstream, record)
        wire.await_end()
        assert record["bytes"]["client_written"] == wire.received.count
        assert 0 < record["bytes"]["response_body"] < 250_000


def test_an_upstream_that_had_sent_all_was_not_still_sending_to_a_client_that_resets_it() -> None:
    answer = ok(b"x" * 250_000)
    with (
        Upstream(answer_all(answer)) as upstream,
        ProxyProcess(upstream.url) as proxy,
        connect(proxy.address, receive_buffer=4096) as wire,
    ):
        wire.send(_get())
        proxy.wait_in_flight(lambda request: request["bytes"]["upstream_read"] == len(answer))
        wire.reset()
        record = _last_record(proxy)
        assert _blame(record) == ("request.abort", "client", "response_body", "reset")
        _check_had_sent_all(upstream, record)


@pytest.mark.parametrize("came", [0, 1, 999, 1000], ids=["nothing", "one_octet", "nearly_all", "all"])
def test_a_body_that_is_refused_by_its_length_is_counted_as_far_as_it_came_with_its_head(came: int) -> None:
    with (
        Upstream(silent) as upstream,
        ProxyProcess(upstream.url, "--max-body-size", "100") as proxy,
        connect(proxy.address) as wire,
    ):
        # Behind a whole body stands what is another request's.
        wire.send(_post(1000) + b"x" * came + (_get(target="/next") if came == 1000 else b""))
        response = wire.read_response()
        assert response.status == 413
        record = _last_record(proxy)
        assert (record["event"], record["cause"], record["status"]) == ("request.reject", "limit", 413)
        _check_counts(
            record,
            client_read=len(_post(1000)) + came,
            client_written=wire.received.count,
            upstream_written=0,
            request_body=0,
        )


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"], ids=["without_end", "whole"])
def test_a_head_that_is_too_large_is_counted_as_far_as_it_was_read(end: bytes) -> None:
    octets = b"GET / HTTP/1.1\r\nHost: t\r\nX-Pad: " + b"x" * 2000 + end
    with (
        Upstream(silent) as upstream,
        ProxyProcess(upstream.url, "--max-head-size", "1024") as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send(octets)
        assert wire.read_response().status == 431
        record = _last_record(proxy)
        assert (record["event"], record["cause"], record["status"]) == ("request.reject", "limit", 431)
        assert record["bytes"]["client_read"] == len(octets)


# -- who was first ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _standing_still(proxy: ProxyProcess) -> collections.abc.Iterator[None]:
    """Stop the only worker, all of its threads, and let it go on at the end."""
    (worker,) = proxy.worker_pids()
    tasks = pathlib.Path(f"/proc/{worker}/task")

    def stands() -> bool:
        states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks.iterdir()]
        return set(states) == {"T"}

    os.kill(worker, signal.SIGSTOP)
    try:
        wait_until(stands, what="all threads stand still")
        yield
    finally:
        os.kill(worker, signal.SIGCONT)


@pytest.mark.parametrize("upstream_end", ["fin", "reset"])
@pytest.mark.parametrize("client_end", ["fin", "reset"])
@pytest.mark.parametrize(
    ("answer", "pause_s"),
    [
        (b"", 0.0),
        (b"", 0.1),  # longer than an answer is waited for in the read itself
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc", 0.1),
    ],
    ids=["asked", "awaited", "begun"],
)
def test_where_both_sides_ended_while_the_worker_stood_still_the_client_did_it(
    answer: bytes, pause_s: float, client_end: str, upstream_end: str
) -> None:
    go, gone = threading.Event(), threading.Event()

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.send(answer)
        assert go.wait(10)
        if upstream_end == "fin":
            wire.end_write()
        else:
            wire.reset()
        gone.set()
        wire.await_end()

    with (
        Upstream(script) as upstream,
        ProxyProcess(upstream.url) as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send(_get())
        upstream.await_head()
        if answer:
            wire.read_until(b"\r\n\r\nabc")
        time.sleep(pause_s)
        with _standing_still(proxy):
            if client_end == "fin":
                wire.end_write()
            else:
                wire.reset()
            go.set()
            assert gone.wait(10)
        record = _last_record(proxy)
        phase = "response_body" if answer else "response_head"
        cause = "closed" if client_end == "fin" else "reset"
        assert _blame(record) == ("request.abort", "client", phase, cause)
        assert record["status"] == (200 if answer else None)
        _check_counts(record, client_read=len(_get()), client_written=wire.received.count, upstream_read=len(answer))


@pytest.mark.parametrize("client_end", ["close_notify", "fin", "reset"])
@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc"], ids=["awaited", "begun"]
)
def test_where_a_tls_client_ended_first_while_the_worker_stood_still_it_did_it(
    answer: bytes, client_end: str, certificates: Certificates
) -> None:
    go, gone = threading.Event(), threading.Event()

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.send(answer)
        assert go.wait(10)
        wire.end_write()
        gone.set()
        wire.await_end()

    with (
        Upstream(script) as upstream,
        ProxyProcess(upstream.url, "--tls-cert", certificates.server) as proxy,
        connect(proxy.address, certificates.client_context()) as wire,
    ):
        assert isinstance(wire, TlsWire)
        wire.send(_get())
        upstream.await_head()
        if answer:
            wire.read_until(b"abc")
        time.sleep(0.1)  # longer than an answer is waited for in the read itself
        with _standing_still(proxy):
            {"close_notify": wire.end_write, "fin": wire.cut_write, "reset": wire.reset}[client_end]()
            go.set()
            assert gone.wait(10)
        assert _last_record(proxy)["side"] == "client"


@pytest.mark.parametrize("kind", ["tcp", "tls"])
def test_a_tunnel_whose_client_was_reset_does_not_look_ended_to_upstream(kind: str, certificates: Certificates) -> None:
    """A FIN would be the end of standard input, and half of a dump would be restored as if it were all."""
    with (
        Upstream(upgrade(SWITCHED), kind, tls=certificates.server_context() if kind == "tls" else None) as upstream,
        ProxyProcess(upstream.url, *(("--upstream-ca", certificates.ca) if kind == "tls" else ())) as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send(UPGRADE)
        assert wire.read_response().status == 101
        wire.send(b"half of a dump")
        assert wire.read_exactly(14) == b"half of a dump"  # so upstream has it, and its kernel has said so
        wire.reset()
        upstream.settle()
        assert upstream.wires[0].end == "reset"
        record = _last_record(proxy)
        assert _blame(record) == ("request.abort", "client", "tunnel", "reset")
        _check_counts(
            record,
            client_read=len(UPGRADE) + 14,
            client_written=wire.received.count,
            upstream_read=len(SWITCHED) + 14,
            upstream_written=upstream.wires[0].received.count,
            request_body=14,
            response_body=14,
        )


# -- the last line of a docker stream ---------------------------------------------------------------------------------

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
_LINES = (b'{"s":"one"}\r\n', b'{"s":"two"}\r\n{"s":"three"}\r\n', b'{"s":"four"}\n')


def _build(version: str) -> bytes:
    return f"POST /v1.41/build HTTP/{version}\r\nHost: t\r\nContent-Length: 0\r\n\r\n".encode()


def _split_chunks(body: bytes) -> tuple[bytes, bytes]:
    """Returns: the content of all whole chunks, and what there is of another one."""
    content = b""
    while (line_end := body.find(b"\r\n")) >= 0:
        begin, size = line_end + 2, int(body[:line_end], 16)
        if len(body) < begin + size + 2:
            break
        assert body[begin + size : begin + size + 2] == b"\r\n", body
        content += body[begin : begin + size]
        body = body[begin + size + 2 :]
    return content, body


def _read_stream(wire: Wire, version: str) -> tuple[bytes, bytes, str | None]:
    """Read a cut message stream to its end.

    Returns: its whole content, the part of a chunk behind it, and the error of its last line, where there is one.
    """
    wire.read_head()
    body = wire.read_to_end()
    assert wire.end == ("fin" if version == "1.1" else "reset")
    content, part = _split_chunks(body) if version == "1.1" else (body, b"")
    assert b"errorDetail" not in part, body
    content, mark, rest = content.partition(b'{"errorDetail"')
    if not mark:
        return content, part, None
    last = json.loads(mark + rest)
    assert last["errorDetail"]["message"] == last["error"]
    assert not part, body
    assert content.endswith(b"\n") or not content, body
    return content, part, last["error"]


@pytest.mark.parametrize(
    ("version", "behind"),
    [
        ("1.1", b"1"),
        ("1.1", b"1f;x=y\r"),
        ("1.1", b"0"),
        ("1.1", b"0\r\n"),
        ("1.1", b"0\r\nX-Trailer: y\r\n"),
        ("1.0", b"1"),
        ("1.0", b"1f\r\n"),
        ("1.0", b"0\r\n"),
    ],
)
def test_the_last_line_goes_out_where_upstream_has_begun_what_the_client_does_not_have(
    version: str, behind: bytes
) -> None:
    octets = STREAM + chunk(_LINES[0]) + behind
    with (
        Upstream(answer_and_close(octets)) as upstream,
        ProxyProcess(upstream.url) as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send(_build(version))
        content, _, error = _read_stream(wire, version)
        assert content == _LINES[0]
        assert error is not None
        record = _last_record(proxy)
        assert _blame(record) == ("request.abort", "upstream", "response_body", "closed")
        assert error.startswith(record["message"])
        _check_counts(
            record, client_written=wire.received.count, upstream_read=len(octets), response_body=len(_LINES[0])
        )


@pytest.mark.parametrize("crlf", [b"", b"\r"], ids=["no_crlf", "half_crlf"])
def test_the_last_line_goes_to_a_1_0_client_between_a_line_and_the_end_of_its_chunk(crlf: bytes) -> None:
    octets = STREAM + chunk(_LINES[0])[:-2] + crlf
    with (
        Upstream(answer_and_close(octets)) as upstream,
        ProxyProcess(upstream.url) as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send(_build("1.0"))
        content, _, error = _read_stream(wire, "1.0")
        assert content == _LINES[0]
        assert error is not None
        _check_counts(
            _last_record(proxy),
            client_written=wire.received.count,
            upstream_read=len(octets),
            response_body=len(_LINES[0]),
        )


def test_the_last_line_never_lands_in_the_middle_of_a_chunk_whose_rest_was_not_relayed() -> None:
    """The rest came in one read with what is no chunk line; and before it the chunk looked like one that ends."""
    first = b'14\r\n{"a":1}\r\n\r\n'
    relayed = threading.Event()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(STREAM + first)
        assert relayed.wait(10)
        wire.send(b'{"b":2}\r\n\r\nzz\r\n')
        wire.await_end()

    with (
        Upstream(script) as upstream,
        ProxyProcess(upstream.url) as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send(_build("1.1"))
        wire.read_until(first)
        relayed.set()
        assert wire.read_to_end() == b""
        record = _last_record(proxy)
        assert _blame(record) == ("request.abort", "upstream", "response_body", "protocol")
        _check_counts(
            record,
            client_written=wire.received.count,
            upstream_read=upstream.wires[0].sent.count,
            response_body=len(b'{"a":1}\r\n\r\n'),
        )


@pytest.mark.parametrize("garbage", [b"", b"\r\nzz\r\n"], ids=["end", "garbage"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_the_last_line_at_every_octet_of_a_stream(version: str, garbage: bytes) -> None:
    """It goes out exactly where the client stands between two lines and, if it gets chunks, between two of these."""
    octets = b"".join(chunk(line) for line in _LINES)
    if not garbage:
        octets += b"0\r\nA: b\r\n"
    with_line = []

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(STREAM + octets[:cut])
        if garbage:
            time.sleep(0.01)  # so that it comes in a read of its own
            wire.send(garbage)
        wire.end_write()
        wire.await_end()

    with Upstream(script) as upstream, ProxyProcess(upstream.url) as proxy:
        for cut in range(len(octets) + 1):
            with connect(proxy.address) as wire:
                wire.send(_build(version))
                content, part, error = _read_stream(wire, version)
            record = proxy.wait_requests(cut + 1)[-1]
            harness.check_record(record)
            assert _blame(record)[:3] == ("request.abort", "upstream", "response_body")
            upstream.settle()
            size, _, begun = part.partition(b"\r\n")
            _check_counts(
                record,
                client_written=wire.received.count,
                upstream_read=upstream.wires[-1].sent.count,
                response_body=len(content) + len(begun[: int(size or b"0", 16)]),
            )
            if error is not None:
                with_line.append(cut)
                assert error.startswith(record["message"])
            elif not garbage:
                assert part or not (b"\n" + content).endswith(b"\n"), f"no line at {cut}, behind {content!r}"
    assert {0, len(chunk(_LINES[0]))} <= set(with_line) or garbage


@pytest.mark.parametrize(
    "garbage", [b"5\r\nabcdefg\r\n", b"5;\x01\r\nabc", b"0\r\nbad trailer\r\n", b'3\r\n{"bxxxxx\r\n']
)
def test_the_last_line_goes_out_behind_garbage_of_which_the_client_has_nothing(garbage: bytes) -> None:
    relayed = threading.Event()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(STREAM + chunk(_LINES[0]))
        assert relayed.wait(10)
        wire.send(garbage)
        wire.end_write()
        wire.await_end()

    with Upstream(script) as upstream, ProxyProcess(upstream.url) as proxy, connect(proxy.address) as wire:
        wire.send(_build("1.1"))
        wire.read_until(chunk(_LINES[0]))
        relayed.set()
        assert b"errorDetail" in wire.read_to_end()
        assert _last_record(proxy)["cause"] == "protocol"


@pytest.mark.parametrize("garbage", [b"zz\r\n", b"\r\nzz\r\n", b"x"])
def test_the_last_line_goes_to_a_1_0_client_behind_garbage_after_the_content_of_a_chunk(garbage: bytes) -> None:
    relayed = threading.Event()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(STREAM + chunk(_LINES[0])[:-2])
        assert relayed.wait(10)
        wire.send(garbage)
        wire.end_write()
        wire.await_end()

    with Upstream(script) as upstream, ProxyProcess(upstream.url) as proxy, connect(proxy.address) as wire:
        wire.send(_build("1.0"))
        wire.read_until(_LINES[0])
        relayed.set()
        assert b"errorDetail" in wire.read_to_end()
        assert _last_record(proxy)["side"] == "upstream"


# -- secrets ----------------------------------------------------------------------------------------------------------

_URL = b"/build?remote=https%3A%2F%2F"


@pytest.mark.parametrize(
    ("target", "masked"),
    [
        (_URL + b"user%3Ahunter2%40github.com%2Fx.git&t=a", _URL + b"***%40github.com%2Fx.git&t=a"),
        (_URL + b"hunter2%40h%2F", _URL + b"***%40h%2F"),
        (_URL + b"user%3Ahun%40ter2%40h%2F", _URL + b"***%40h%2F"),
        (_URL + b"user%3Ahun%252Fter2%40h%2Fx", _URL + b"***%40h%2Fx"),
        (_URL + b"user:hunter2@h/x", _URL + b"***@h/x"),
        (_URL + b"a%3Ahunter2%40h&b=http%3A%2F%2Fb%3Ahunter2%40i", _URL + b"***%40h&b=http%3A%2F%2F***%40i"),
        (b"/build?remote=https%3a%2f%2fuser%3ahunter2%40h%2fx", b"/build?remote=https%3a%2f%2f***%40h%2fx"),
        (b"/build?remote=https://user:hunter2@h/", b"/build?remote=https://***@h/"),
        (b"/build?remote=https://user:hun@ter2@h/", b"/build?remote=https://***@h/"),
        (b"http://user:hunter2@h/x", b"http://***@h/x"),
        (b"http://u:pa%2Fhunter2@h/x", b"http://***@h/x"),
        (b"http://u:pa;hunter2@h/x", b"http://***@h/x"),
        (b"http://u:pa&hunter2@h/x", b"http://***@h/x"),
        (b"/x?u=https://u:pa%2Fhunter2@h/", b"/x?u=https://***@h/"),
        (b"/x?u=https://u:pa;hunter2@h/", b"/x?u=https://***@h/"),
        (b"/x?password=a;hunter2&c=d", b"/x?password=***&c=d"),
        (b"/x?a=http://h/p?token=hunter2", b"/x?a=http://h/p?token=***"),
        (b"/x?a=http%3A%2F%2Fh%2Fp%3Ftoken%3Dhunter2&b", b"/x?a=http%3A%2F%2Fh%2Fp%3Ftoken%3D***&b"),
        (b"u:hunter2@h:443", b"***@h:443"),
        (b"/x#token=hunter2", b"/x#***"),
        (b"/a&token=hunter2?x=1", b"/a&token=***"),
        (b"/x@y&token=hunter2", b"/x@y&token=***"),
        (b"http://user:hun@ter2@h/x?a=b", b"http://***@h/x?a=b"),
        (b"/x?tok%65n=hunter2", b"/x?tok%65n=***"),
        (b"/x?%54%4F%4B%45%4E=hunter2&a=b", b"/x?%54%4F%4B%45%4E=***&a=b"),
        (b"/x?a=b&access%5Ftoken=hunter2", b"/x?a=b&access%5Ftoken=***"),
        (b"/x?a=1;token=hunter2", b"/x?a=1;token=***"),
        (b"/x?a=1;p%61ss=hunter2&c=d", b"/x?a=1;p%61ss=***&c=d"),
        (b"/x?a?tok%65n=hunter2", b"/x?a?tok%65n=***"),
        (b"/x?token=hun%26ter2", b"/x?token=***"),
    ],
)
def test_secrets_that_are_spelled_in_other_ways_are_masked(target: bytes, masked: bytes) -> None:
    assert mask_secrets(target) == masked


@pytest.mark.parametrize(
    "target",
    [
        b"/images/create?fromImage=http://reg:5000&tag=a@b",
        b"/x?u=http://h&force=1&since=9&to=me@x",
        _URL + b"github.com%2Fx.git&t=a",
        _URL + b"github.com%2Fa%40b",
        b"/build?remote=https://github.com/x@v1",
        b"/images/name@sha256:0123/json?a=b",
        b"/images/create?fromImage=h%3A5000%2Fname%40sha256%3A0123",
        b"/x?mail=a%40b.test&n=1",
        b"/x?tok%65ns=1&%74=2;a=3",
        b"/x?token",
        b"/x?&;=%",
    ],
)
def test_what_is_no_secret_is_not_masked(target: bytes) -> None:
    assert mask_secrets(target) == target


_PARTS = b"? & ; = ?= &=; ?% &token ;tok%65n :// ://a %3a%2f%2f %3A%2F%2Fa : / % %2 %4 a".split()


@pytest.mark.parametrize("part", _PARTS)
def test_a_long_target_without_secrets_passes_at_once_as_it_is(part: bytes) -> None:
    """Each target is 64 KiB, and a pattern that tries every part with every other would take minutes for it."""
    target = b"/x?" + part * (65_536 // len(part))
    assert mask_secrets(target) == target
    # "@" lets the pattern for user information run as well, from where none of the parts may get to it.
    assert mask_secrets(b"/@" + target) == b"/@" + target


@pytest.mark.parametrize("part", [*_PARTS, b"a&", b"a=&", b"://@", b"%3a//a@", b"/"])
def test_parts_of_a_target_are_not_masked_one_by_one(part: bytes) -> None:
    """Counted are the calls: one for each part would make 64 KiB of them a cheap request that is dear to serve."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    for target in (b"/x?" + part * (65_536 // len(part)), b"/@" + part * (65_536 // len(part))):
        sys.setprofile(count)
        try:
            mask_secrets(target)
        finally:
            sys.setprofile(None)
    assert 0 < calls < 100


def test_a_target_is_masked_once_for_all_that_tell_it() -> None:
    head = parse_request_head(b"GET /x?token=hunter2 HTTP/1.1\r\nHost: t\r\n\r\n", SectionMemory())
    assert head.masked_target() == b"/x?token=***"
    assert head.masked_target() is head.masked_target()


@pytest.mark.parametrize(
    ("part", "masked"),
    [
        (b"&token=hunter2", b"&token=***"),
        (b"&x=y;tok%65n=hunter2", b"&x=y;tok%65n=***"),
        (b"&u=http://u:hunter2@h", b"&u=http://***@h"),
        (b"&u=http%3A%2F%2Fu%3Ahunter2%40h", b"&u=http%3A%2F%2F***%40h"),
    ],
)
def test_all_secrets_of_a_long_target_are_masked(part: bytes, masked: bytes) -> None:
    count = 65_536 // len(part)
    assert mask_secrets(b"/x?a=b" + part * count) == b"/x?a=b" + masked * count


def test_user_information_of_64_kib_is_masked() -> None:
    for password in (b"@" * 65_536, b"%40" * 20_000, b":" * 65_536, b"%" * 65_536, b"x" * 65_536):
        assert mask_secrets(b"/x?u=http://u:" + password + b"@h/") == b"/x?u=http://***@h/"
        assert mask_secrets(b"/x?u=http%3A%2F%2Fu:" + password + b"%40h/") == b"/x?u=http%3A%2F%2F***%40h/"


def test_no_secret_of_a_target_gets_into_the_log() -> None:
    targets = {
        "/v1.41/build?remote=https%3A%2F%2Fuser%3Ahunter2%40h%2Fx.git": "?remote=https%3A%2F%2F***%40h%2Fx.git",
        "/images/create?fromSrc=https%3A%2F%2Fuser%3Ahunter2%40h%2Fx": "?fromSrc=https%3A%2F%2F***%40h%2Fx",
        "/x?remote=https://user:hun@hunter2@h/": "remote=https://***@h/",
        "/x?tok%65n=hunter2": "?tok%65n=***",
        "/x?a=1;token=hunter2": "?a=1;token=***",
    }
    got = []

    def script(wire: Wire) -> None:
        while True:
            got.append(wire.read_request().split()[1].decode())
            wire.send(ok())

    with Upstream(script) as upstream, ProxyProcess(upstream.url) as proxy, connect(proxy.address) as wire:
        for number, (target, masked) in enumerate(targets.items(), 1):
            wire.send(_get(target=target))
            assert wire.read_response().status == 200
            record = _last_record(proxy, number)
            assert masked in record["target"]
            assert masked in record["message"]
        assert "hunter2" not in proxy.log_path.read_text()
    assert got == list(targets)  # upstream gets it as it is


@pytest.mark.parametrize(
    "octets",
    [
        b"GET /x?token=hunter2\x01 HTTP/1.1\r\nHost: t\r\n\r\n",
        b"GET /x?token=\x01hunter2 HTTP/1.1\r\nHost: t\r\n\r\n",
        b"GET /x?token=hun\x00ter2 HTTP/1.1\r\nHost: t\r\n\r\n",
        b"GET /x?token=hunter2\n HTTP/1.1\r\nHost: t\r\n\r\n",
        b"GET /x?token=hunter2\rabc HTTP/1.1\r\nHost: t\r\n\r\n",
        b"GET /x HTTP/1.1\r\nAuthorization: Basic hunter2\x01\r\n\r\n",
        b"GET /x HTTP/1.1\r\nX-Registry-Auth: \x7fhunter2\r\n\r\n",
        b"GET /x HTTP/1.1\r\nAuthorization: Basic hunter2\nHost: t\r\n\r\n",
    ],
)
def test_a_control_octet_in_a_head_quotes_nothing_of_what_stands_around_it(octets: bytes) -> None:
    with Upstream(silent) as upstream, ProxyProcess(upstream.url) as proxy, connect(proxy.address) as wire:
        wire.send(octets)
        response = wire.read_response()
        assert response.status == 400
        record = _last_record(proxy)
        assert _blame(record) == ("request.reject", "client", "request_head", "protocol")
        _check_counts(record, client_read=len(octets), client_written=wire.received.count)
        for text in (proxy.log_path.read_text(), response.head.decode() + response.body.decode()):
            for part in ("hunt", "nter", "ter2", "hun", "er2"):
                assert part not in text


@pytest.mark.parametrize(
    "octets",
    [
        b"GET /x?token=hunter2\xff HTTP/1.1\r\nHost: t\r\n\r\n",
        b"GET /x?token=hunter2 HTTP/1.7\r\nHost: t\r\n\r\n",
        b"GET /x?token=hunter2 J HTTP/1.1\r\nHost: t\r\n\r\n",
        b"GET /x?token=hunter2\r\nHost: t\r\n\r\n",
        b"GET http://u:hunter2@ HTTP/1.1\r\nHost: t\r\n\r\n",
        b"GET http://u:hunter2@h/ HTTP/1.1\r\nHost: t\r\nHost: t\r\n\r\n",
        b"GET x?token=hunter2 HTTP/1.1\r\nHost: t\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: t\r\nAuthorization : Basic hunter2\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: u:hunter2@h\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: u:hunter2@h\r\nHost: t\r\n\r\n",
        b"CONNECT u:hunter2@h:443 HTTP/1.1\r\nHost: t\r\n\r\n",
        b"GET /x#token=hunter2 HTTP/1.1\r\nHost: t\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n3\r\npasswordhunter2\r\n",
    ],
)
def test_a_malformed_request_does_not_bring_its_secrets_into_the_log_or_the_answer(octets: bytes) -> None:
    with Upstream(silent) as upstream, ProxyProcess(upstream.url) as proxy, connect(proxy.address) as wire:
        wire.send(octets)
        answer = wire.read_to_end()
        assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 505"))
        _last_record(proxy)
        assert b"hunter2" not in answer
        assert "hunter2" not in proxy.log_path.read_text()


def test_a_tls_client_that_sent_another_request_and_left_first_did_it(certificates: Certificates) -> None:
    """Its end is behind octets that nobody has asked for."""
    go, gone = threading.Event(), threading.Event()

    def script(wire: Wire) -> None:
        wire.read_head()
        assert go.wait(10)
        wire.end_write()
        gone.set()
        wire.await_end()

    with (
        Upstream(script) as upstream,
        ProxyProcess(upstream.url, "--tls-cert", certificates.server) as proxy,
        connect(proxy.address, certificates.client_context()) as wire,
    ):
        wire.send(_get())
        upstream.await_head()
        time.sleep(0.1)  # longer than an answer is waited for in the read itself
        with _standing_still(proxy):
            wire.send(_get())
            wire.end_write()
            wire.sock.shutdown(socket.SHUT_WR)
            go.set()
            assert gone.wait(10)
        record = _last_record(proxy)
        assert (record["side"], record["cause"]) == ("client", "closed")
        assert record["bytes"]["client_read"] == len(_get())
