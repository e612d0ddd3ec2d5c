"""A worker that is killed leaves the records of its requests to the main process: one each, and true.

Worker processes are killed from outside at every stage of a request; what the record says is held against what the
peers sent and got.
"""

import fcntl
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

from conftest import Certificates
from harness import ROOT, LogRecord, ProxyProcess, check_record, wait_until
from peers import Upstream, Wire, answer_all, answer_and_wait, chunk, connect, deaf, full_listener, ok, silent
from proxy.inflight import InFlightTable

_MEBIBYTE = b"x" * (1024 * 1024)
_HEAD = b"GET /x?token=secret&y=1 HTTP/1.1\r\nHost: t\r\nX-Request-Id: mine\r\n\r\n"
_POST = b"POST /p HTTP/1.1\r\nHost: t\r\nContent-Length: 5000000\r\n\r\n"
_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
_TO_THE_END = b"HTTP/1.1 200 OK\r\n\r\n"
_UPGRADE = b"Connection: Upgrade\r\nUpgrade: tcp\r\n"


def killed(proxy: ProxyProcess) -> LogRecord:
    """Kill the only worker. Returns: the record of the only request, checked, once it is there."""
    (worker,) = proxy.worker_pids()
    os.kill(worker, signal.SIGKILL)
    record = proxy.next_request()
    check_record(record)
    assert (record["event"], record["side"], record["cause"]) == ("request.abort", "proxy", "internal")
    assert (record["operation"], record["limit"], record["exception"]) == (None, None, None)
    assert record["error_type"] == "proxy_internal_error"
    assert record["pid"] == worker
    assert f"worker process {worker} ended by signal 9" in record["message"]
    ended = proxy.wait_for(lambda record: record["event"] == "worker.exit")
    assert (ended["pid"], ended["aborted_requests"], ended["lost_requests"]) == (worker, 1, 0)
    return record


def test_each_connection_that_may_be_held_has_a_slot() -> None:
    """Made when first wanted, given back, and none of them somebody else's."""
    table = InFlightTable(2, 9000)
    stores = [table.slots(index) for index in range(2)]
    for store in stores:
        slots = [store.take(f"{number:08x}", "127.0.0.1:1") for number in range(9001)]
        assert [slot.is_shared for slot in slots] == [True] * 9000 + [False]
        for number, slot in enumerate(slots):
            slot.begin(0.0, number)
            if number < 4000:
                slot.end()
                store.give(slot)
        assert sum(store.take("again", "127.0.0.1:1").is_shared for _ in range(4001)) == 4000
    for index in range(2):
        assert sorted(request.client_read for request in table.left_by(index)) == list(range(4000, 9000))
        assert table.left_by(index) == []


def test_there_is_a_bound_to_what_all_slots_may_take() -> None:
    store = InFlightTable(4, 1_000_000).slots(3)
    taken = [store.take("id", "client") for _ in range(65_537)]
    assert [slot.is_shared for slot in taken[-2:]] == [True, False]


def test_in_the_middle_of_a_request_head() -> None:
    with Upstream(silent) as upstream, ProxyProcess(upstream.url) as proxy, connect(proxy.address) as wire:
        wire.send(_HEAD[:20])
        # The worker has read it when it polls for more, which SIGUSR2 shows.
        _await_in_flight(proxy)
        record = killed(proxy)
        assert (record["phase"], record["status"], record["upstream"]) == ("request_head", None, None)
        assert (record["method"], record["target"]) == (None, None)
        assert record["bytes"] == _counts(client_read=20)
        assert record["client"] == f"127.0.0.1:{wire.sock.getsockname()[1]}"
        assert record["request_id"]
        assert wire.await_end() == "fin"
    assert not upstream.wires


def test_while_upstream_is_being_connected() -> None:
    with full_listener() as port, ProxyProcess(f"http://127.0.0.1:{port}") as proxy, connect(proxy.address) as wire:
        wire.send(_HEAD)
        _await_in_flight(proxy)
        record = killed(proxy)
        assert (record["phase"], record["status"], record["upstream"]) == ("connect", None, None)
        assert (record["method"], record["target"]) == ("GET", "/x?token=***&y=1")
        assert record["request_id"] == "mine"
        assert record["bytes"] == _counts(client_read=len(_HEAD))


def test_while_the_answer_is_awaited() -> None:
    with Upstream(silent) as upstream, ProxyProcess(upstream.url) as proxy, connect(proxy.address) as wire:
        wire.send(_HEAD)
        upstream.await_head()
        _await_in_flight(proxy)
        record = killed(proxy)
        assert (record["phase"], record["status"], record["upstream"]) == ("response_head", None, upstream.name)
        assert record["request_id"] == "mine"
        upstream.wire().await_end()
        sent = upstream.wire().received.count
        assert record["bytes"] == _counts(client_read=len(_HEAD), upstream_written=sent)
        assert (
            f" ended by signal 9, which ended GET /x?token=***&y=1 after {record['duration_s']:.1f} s"
            in record["message"]
        )


def test_in_the_middle_of_a_request_body() -> None:
    with Upstream(deaf) as upstream, ProxyProcess(upstream.url) as proxy, connect(proxy.address) as wire:
        wire.send(_POST)
        wire.fill()
        record = killed(proxy)
        assert (record["phase"], record["status"], record["method"]) == ("request_body", None, "POST")
        assert record["expected"] == {"request_body": 5_000_000, "response_body": None}
        counts = record["bytes"]
        assert 0 < counts["request_body"] < 5_000_000
        assert counts["client_read"] >= len(_POST) + counts["request_body"]
        assert counts["upstream_written"] > counts["request_body"]


@pytest.mark.parametrize("kind", ["tcp", "tls"])
def test_in_the_middle_of_a_response(kind: str, certificates: Certificates) -> None:
    options = ("--tls-cert", certificates.server) if kind == "tls" else ()
    context = certificates.client_context() if kind == "tls" else None
    answer = _CHUNKED + chunk(b"begin")
    with (
        Upstream(answer_and_wait(answer)) as upstream,
        ProxyProcess(upstream.url, *options) as proxy,
        connect(proxy.address, context) as wire,
    ):
        wire.send(_HEAD)
        wire.read_head()
        wire.read_exactly(len(chunk(b"begin")))
        _await_in_flight(proxy)
        record = killed(proxy)
        assert (record["phase"], record["status"]) == ("response_body", 200)
        counts = record["bytes"]
        assert counts["upstream_read"] == len(answer)
        assert counts["response_body"] == 5
        assert counts["client_written"] == wire.received.count
        # No last chunk, and under TLS no close_notify: it does not look whole.
        assert wire.await_end() == "fin"


def test_a_client_that_stopped_reading_has_not_got_what_waits_in_the_proxy() -> None:
    with (
        Upstream(answer_and_wait(ok(_MEBIBYTE * 16))) as upstream,
        ProxyProcess(upstream.url) as proxy,
        connect(proxy.address, receive_buffer=8192) as wire,
    ):
        wire.send(_HEAD)
        head = wire.read_head()
        _await_standstill(proxy)
        record = killed(proxy)
        counts = record["bytes"]
        assert record["expected"]["response_body"] == len(_MEBIBYTE) * 16
        assert f" {counts['response_body']:,} of 16,777,216 bytes of the response back" in record["message"]
        assert 0 < counts["response_body"] < len(_MEBIBYTE) * 16
        assert counts["client_written"] == counts["response_body"] + len(head)


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_response_that_ends_with_its_connection_does_not_look_whole(version: bytes) -> None:
    """The kernel closes the sockets of a process that was killed, in good order: a FIN would be the end of it."""
    with (
        Upstream(answer_and_wait(_TO_THE_END + b"begin")) as upstream,
        ProxyProcess(upstream.url) as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send(b"GET / HTTP/%b\r\nHost: t\r\n\r\n" % version)
        wire.read_head()
        wire.read_exactly(5)
        _await_in_flight(proxy)
        record = killed(proxy)
        assert (record["phase"], record["bytes"]["response_body"]) == ("response_body", 5)
        assert wire.await_end() == "reset"


def test_a_tunnel_ends_in_a_reset_on_both_sides() -> None:
    """To dockerd a FIN is the end of standard input, to the client that of the output."""
    with (
        Upstream(answer_and_wait(b"HTTP/1.1 101 UPGRADED\r\n" + _UPGRADE + b"\r\nhello")) as upstream,
        ProxyProcess(upstream.url) as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send(b"POST /attach HTTP/1.1\r\nHost: t\r\n" + _UPGRADE + b"\r\n")
        wire.read_head()
        wire.read_exactly(5)
        wire.send(b"input")
        wait_until(lambda: upstream.wire().received.count and bytes(upstream.wire().received).endswith(b"input"))
        _await_in_flight(proxy)
        record = killed(proxy)
        assert (record["phase"], record["status"]) == ("tunnel", 101)
        assert (record["bytes"]["request_body"], record["bytes"]["response_body"]) == (5, 5)
        assert wire.await_end() == "reset"
        assert upstream.wire().await_end() == "reset"


def test_a_tunnel_that_ends_in_order_still_does() -> None:
    """What lets it end in a reset is taken back."""

    def echo(wire: Wire) -> None:
        wire.read_head()
        wire.send(b"HTTP/1.1 101 UPGRADED\r\n" + _UPGRADE + b"\r\n")
        wire.read_to_end()
        wire.send(_MEBIBYTE)
        wire.end_write()
        wire.await_end()

    with Upstream(echo) as upstream, ProxyProcess(upstream.url) as proxy, connect(proxy.address) as wire:
        wire.send(b"POST /attach HTTP/1.1\r\nHost: t\r\n" + _UPGRADE + b"\r\n")
        wire.read_head()
        wire.send(b"input")
        wire.end_write()
        assert wire.read_to_end() == _MEBIBYTE
        assert wire.end == "fin"
        assert proxy.next_request()["event"] == "request.complete"
        wire.close()
        upstream.settle()
        assert upstream.wire().end == "fin"


@pytest.mark.parametrize("size", [100_000, 4_000_000])
def test_a_response_whose_last_octets_wait_for_the_client(size: int) -> None:
    """All of it is written, and its delivery awaited: the record says that it was sent."""
    with (
        Upstream(answer_and_wait(ok(b"x" * size))) as upstream,
        ProxyProcess(upstream.url) as proxy,
        connect(proxy.address, receive_buffer=8192) as wire,
    ):
        wire.send(_HEAD)
        wire.read_head()
        while [request["bytes"]["response_body"] for request in proxy.ask_in_flight()[0]] != [size]:
            wire.read(65536)
        record = killed(proxy)
        assert (record["phase"], record["status"]) == ("response_body", 200)
        assert record["expected"]["response_body"] == record["bytes"]["response_body"] == size


def test_a_small_request_body_is_counted_at_once() -> None:
    def script(wire: Wire) -> None:
        wire.read_head()
        wire.read_exactly(5)
        (worker,) = proxy.start_record["workers"]
        os.kill(worker, signal.SIGKILL)  # before the answer has been awaited for long
        wire.await_end()

    with Upstream(script) as upstream, ProxyProcess(upstream.url) as proxy, connect(proxy.address) as wire:
        wire.send(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\n\r\nhello")
        record = proxy.next_request()
        upstream.settle()
        written = upstream.wire().received.count
        head = len(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\n\r\n")
        assert record["bytes"] == _counts(client_read=head + 5, upstream_written=written, request_body=5)


def test_requests_behind_the_one_in_flight_are_not_counted_with_it() -> None:
    with full_listener() as port, ProxyProcess(f"http://127.0.0.1:{port}") as proxy, connect(proxy.address) as wire:
        wire.send(_HEAD + b"GET /second HTTP/1.1\r\nHost: t\r\n\r\n")
        _await_in_flight(proxy)
        assert killed(proxy)["bytes"] == _counts(client_read=len(_HEAD))


def test_a_body_that_came_while_upstream_is_being_connected_is_counted_without_what_is_behind_it(
    certificates: Certificates,
) -> None:
    """Under TLS it is read ahead, as only a read tells the end of the client's side."""
    head = b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 1500\r\n\r\n"
    with (
        full_listener() as port,
        ProxyProcess(f"http://127.0.0.1:{port}", "--tls-cert", certificates.server) as proxy,
        connect(proxy.address, certificates.client_context()) as wire,
    ):
        wire.send(head + b"x" * 1000)
        _await_in_flight(proxy)
        wire.send(b"x" * 500 + b"GET /second HTTP/1.1\r\nHost: t\r\n\r\n")
        time.sleep(0.3)  # nothing shows that it has been read
        assert killed(proxy)["bytes"] == _counts(client_read=len(head) + 1500)


@pytest.mark.parametrize("size", [500, 600, 620, 640, 700, 5000])
def test_a_long_target_is_cut_and_keeps_its_secrets(size: int) -> None:
    target = b"/build?x=" + b"y" * size + b"&remote=https://user:hunter2@h/"
    with Upstream(silent) as upstream, ProxyProcess(upstream.url) as proxy, connect(proxy.address) as wire:
        wire.send(b"GET %b HTTP/1.1\r\nHost: t\r\n\r\n" % target)
        upstream.await_head()
        _await_in_flight(proxy)
        record = killed(proxy)
        assert "hunter2" not in json.dumps(record)
        if size == 500:
            assert record["target"].endswith("&remote=https://***@h/")
        elif size == 5000:
            kept, _, rest = record["target"].partition("... (")
            masked = len(target) - len("user:hunter2") + len("***")
            assert rest == f"{masked - len(kept)} more characters)"


def test_a_method_longer_than_any_is_no_bug() -> None:
    with (
        Upstream(answer_and_wait(ok(b"fine"))) as upstream,
        ProxyProcess(upstream.url, "--max-head-size", "1MiB") as proxy,
        connect(proxy.address) as wire,
    ):
        wire.send(b"X" * 70_000 + b" / HTTP/1.1\r\nHost: t\r\n\r\n")
        assert wire.read_response().body == b"fine"


def test_a_record_that_could_not_be_written_before_the_end_is_missed(tmp_path: pathlib.Path) -> None:
    """The reader of a pipe pauses; the worker is killed while it waits for it: the balance tells of the loss."""
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with Upstream(answer_all(ok(b"fine"))) as upstream:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "proxy", "--listen", f"unix:{tmp_path / 's'}", "--upstream", upstream.url),
                *("--log-file", str(fifo), "--workers", "1"),
            ],
            cwd=ROOT,
        )
        try:
            wait_until((tmp_path / "s").exists)
            octets = b""
            while not octets.endswith(b"\n"):
                octets += _read_pipe(reader)
            (worker,) = json.loads(octets)["workers"]
            answered = 0
            with connect(str(tmp_path / "s")) as wire:
                written = True
                while written:
                    before = _waits_in(reader)
                    wire.get("/")
                    wire.read_response()
                    answered += 1
                    assert answered < 1000
                    until = time.monotonic() + 0.5  # of the second for which a record may wait
                    while not (written := _waits_in(reader) > before) and time.monotonic() < until:
                        time.sleep(0.001)
                os.kill(worker, signal.SIGKILL)
                while b"worker.exit" not in octets:
                    octets += _read_pipe(reader)
        finally:
            process.terminate()
            while process.poll() is None:
                octets += _read_pipe(reader)
            octets += _read_pipe(reader)
            os.close(reader)
    records = [json.loads(line) for line in octets.splitlines()]
    ended = next(record for record in records if record["event"] == "worker.exit")
    complete = sum(record["event"] == "request.complete" for record in records)
    assert ended["lost_requests"] == answered - complete == 1
    assert records[-1]["balanced"] is False


def test_all_requests_of_many_connections() -> None:
    with Upstream(silent) as upstream, ProxyProcess(upstream.url) as proxy:
        wires = [connect(proxy.address) for _ in range(50)]
        try:
            for number, wire in enumerate(wires):
                wire.get(f"/{number}")
            wait_until(lambda: len(upstream.wires) == 50)
            for wire in wires[:10]:
                wire.close()  # on record, and counted, before the kill
            proxy.wait_requests(10)
            proxy.wait_connections(40)
            (worker,) = proxy.worker_pids()
            os.kill(worker, signal.SIGKILL)
            records = proxy.wait_requests(50)
        finally:
            for wire in wires:
                wire.close()
        assert sorted(record["target"] for record in records) == sorted(f"/{number}" for number in range(50))
        assert sum(record["side"] == "proxy" for record in records) == 40
        assert len({record["request_id"] for record in records}) == 50
        # The next process begins with a clean slate.
        wait_until(lambda: proxy.worker_pids() != [worker] and len(proxy.worker_pids()) == 1)
        upstream.script = answer_and_wait(ok(b"fine"))
        with connect(proxy.address) as wire:
            wire.get("/after")
            assert wire.read_response().body == b"fine"
        assert proxy.wait_requests(51)[-1]["event"] == "request.complete"
        stop = proxy.stop()
        assert stop["requests"] == {"begun": 51, "complete": 1, "reject": 0, "abort": 50}
        assert stop["balanced"] is True


def test_a_worker_that_is_stuck_when_its_time_is_up() -> None:
    """Killed by the proxy itself: that is the shutdown, and no bug."""
    with (
        Upstream(silent) as upstream,
        ProxyProcess(upstream.url, "--drain-timeout", "0") as proxy,
        connect(proxy.address) as wire,
    ):
        wire.get("/held")
        upstream.await_head()
        _await_in_flight(proxy)
        os.kill(proxy.start_record["workers"][0], signal.SIGSTOP)
        proxy.send_signal(signal.SIGTERM)
        assert proxy.process.wait(15) == 0
        (record,) = proxy.requests()
        check_record(record)
        assert (record["side"], record["phase"], record["cause"]) == ("proxy", "response_head", "shutdown")
        assert proxy.records()[-1]["balanced"] is True


def _waits_in(pipe: int) -> int:
    """Returns: the octets in a pipe."""
    (count,) = struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4))
    return int(count)


def _read_pipe(reader: int) -> bytes:
    time.sleep(0.01)
    try:
        return os.read(reader, 1 << 20)
    except BlockingIOError:
        return b""


def _counts(**known: int) -> dict[str, int]:
    names = ("client_read", "client_written", "upstream_read", "upstream_written", "request_body", "response_body")
    return dict.fromkeys(names, 0) | known


def _await_in_flight(proxy: ProxyProcess) -> LogRecord:
    """Wait until the worker waits with its one request: long enough that its thread has come to its poll.

    Returns: what SIGUSR2 says of it.
    """
    return proxy.wait_in_flight(lambda request: request["duration_s"] > 0.05)


def _await_standstill(proxy: ProxyProcess) -> None:
    """Wait until nothing moves any more."""
    seen: list[int] = []

    def stands() -> bool:
        seen.append(_await_in_flight(proxy)["bytes"]["client_written"])
        return len(seen) > 5 and len(set(seen[-5:])) == 1

    wait_until(stands, 10)
