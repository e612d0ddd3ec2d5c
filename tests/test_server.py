"""Numbers of connections: too many, very many, and too few descriptors for them."""

import collections.abc
import contextlib
import os
import pathlib
import resource
import select
import socket
import subprocess
import sys
import time

import pytest

import harness
from conftest import Certificates
from harness import ProxyProcess, wait_until
from in_process import make_worker
from peers import Upstream, Wire, answer_all, connect, ok
from proxy.log import EventLog
from proxy.server import ProxyServer


@pytest.fixture
def upstream() -> collections.abc.Iterator[Upstream]:
    with Upstream(answer_all(ok(b"fine"))) as upstream:
        yield upstream


def ask(wire: Wire) -> int:
    """Returns: the status of one answer."""
    wire.get()
    return wire.read_response().status


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_connection_too_many_is_told_so(workers: str, upstream: Upstream) -> None:
    """With a 503 and a reject record; when one has gone, the next is served."""
    with ProxyProcess(upstream.url, "--max-connections", "3", "--workers", workers) as proxy:
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(connect(proxy.address)) for _ in range(3)]
            for wire in held:
                wire.get("/too/many")  # known, then, and too many all the same
                assert wire.read_response().status == 200
            with connect(proxy.address) as wire:
                wire.get("/too/many")
                response = wire.read_response()
                assert response.status == 503
                assert b"error=connection_limit_reached" in (response.get("proxy-status") or b"")
                assert response.get("connection") == b"close"
                assert b"max_connections" in response.body
                assert wire.await_end() == "fin"
            assert [ask(wire) for wire in held] == [200] * 3  # the others are not touched
            record = proxy.wait_for(lambda record: record["event"] == "request.reject")
            harness.check_record(record)
            assert (record["side"], record["cause"], record["phase"]) == ("proxy", "limit", "request_head")
            assert record["limit"] == {"name": "max_connections", "value": 3, "source": "flag"}
            assert record["target"] == "/too/many"
            held[0].close()

            def served() -> bool:
                with connect(proxy.address) as wire:
                    return ask(wire) == 200

            wait_until(served)


def test_a_connection_too_many_that_says_nothing_is_closed(upstream: Upstream) -> None:
    with ProxyProcess(upstream.url, "--max-connections", "1") as proxy, connect(proxy.address) as held:
        assert ask(held) == 200
        with connect(proxy.address) as wire:
            assert wire.await_end() == "fin"  # in a second or two, while others may be idle for a minute
        assert len(proxy.requests()) == 1


def test_far_too_many_connections_leave_no_threads(upstream: Upstream) -> None:
    """Beyond those that wait for a 503, connections are closed unread, with an event each."""
    with ProxyProcess(upstream.url, "--max-connections", "1") as proxy, contextlib.ExitStack() as stack:
        held = stack.enter_context(connect(proxy.address))
        assert ask(held) == 200
        for _ in range(150):
            stack.enter_context(connect(proxy.address))
        wait_until(lambda: sum(r["event"] == "connection.abort" for r in proxy.records()) >= 150 - 64)
        aborts = [record for record in proxy.records() if record["event"] == "connection.abort"]
        assert len({record["connection_id"] for record in aborts}) == len(aborts)
        first = aborts[0]
        assert (first["side"], first["phase"], first["operation"], first["cause"]) == (
            *("proxy", "request_head"),
            *(None, "limit"),
        )
        assert first["limit"] == {"name": "max_connections", "value": 1, "source": "flag"}
        assert first["error_type"] == "connection_limit_reached"
        assert first["socket"]["client"]["state"] == "ESTABLISHED"
        assert first["exception"] is None
        assert first["duration_s"] < 1
        # Those that wait for a 503, and of those that closed the others as many as may wait for connections.
        assert proxy.threads() < 64 + 64 + 10
        assert ask(held) == 200
        wait_until(lambda: proxy.threads() < 75, 10)


class Crowd:
    """Clients and upstream of very many connections at once, in one thread."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(4096)
        self.listener.setblocking(False)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.poll = select.epoll()
        self.poll.register(self.listener, select.EPOLLIN)
        self.clients: dict[int, socket.socket] = {}
        self.upstreams: dict[int, socket.socket] = {}
        self.heard: dict[int, bytes] = {}
        self.pending: set[int] = set()  # upstream connections with a request that is not answered

    def connect(self, address: tuple[str, int]) -> None:
        """Connect all, and send a request on each."""
        for number in range(self.count):
            sock = socket.create_connection(address, 10)
            sock.sendall(b"GET /%d HTTP/1.1\r\nHost: t\r\nX-Request-Id: r%d\r\n\r\n" % (number, number))
            sock.setblocking(False)
            self.clients[sock.fileno()] = sock
            self.heard[sock.fileno()] = b""
            self.poll.register(sock, select.EPOLLIN)
            self.turn(0)

    def turn(self, timeout_s: float) -> None:
        """Take what is ready."""
        for fd, _ in self.poll.poll(timeout_s):
            if fd == self.listener.fileno():
                with contextlib.suppress(BlockingIOError):  # the queue is empty
                    while True:
                        sock, _ = self.listener.accept()
                        sock.setblocking(False)
                        self.upstreams[sock.fileno()] = sock
                        self.heard[sock.fileno()] = b""
                        self.poll.register(sock, select.EPOLLIN)
                continue
            sock = self.clients.get(fd) or self.upstreams[fd]
            octets = sock.recv(65536)
            if not octets:
                self.poll.unregister(fd)
                continue
            self.heard[fd] += octets
            if fd in self.upstreams and octets.endswith(b"\r\n\r\n"):
                self.pending.add(fd)

    def until(self, condition: collections.abc.Callable[[], bool], timeout_s: float) -> None:
        """Take turns until a condition holds. Raises: AssertionError."""
        until = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < until, (len(self.pending), sum(b"fine" in h for h in self.heard.values()))
            self.turn(0.05)

    def answer(self) -> None:
        """Answer all requests that are pending."""
        for fd in self.pending:
            self.upstreams[fd].sendall(ok(b"fine"))
        self.pending.clear()

    def close(self) -> None:
        """Close all."""
        self.poll.close()
        for sock in (self.listener, *self.clients.values(), *self.upstreams.values()):
            sock.close()


def test_4096_requests_at_once() -> None:
    """All are held open together, then answered: each has its own record."""
    count = 4096
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * count + 200
    if hard < needed:
        pytest.skip(f"the limit on open files is {hard}, and {needed} are needed: ulimit -n")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    crowd = Crowd(count)
    try:
        with ProxyProcess(crowd.url, "--workers", "2") as proxy:
            crowd.connect(("127.0.0.1", proxy.port))
            crowd.until(lambda: len(crowd.pending) == count, 60)
            assert not proxy.requests()
            crowd.answer()
            crowd.until(lambda: all(b"fine" in crowd.heard[fd] for fd in crowd.clients), 60)
            records = proxy.wait_requests(count, 30)
            assert {record["event"] for record in records} == {"request.complete"}
            assert {record["request_id"] for record in records} == {f"r{number}" for number in range(count)}
            assert all(record["target"] == "/" + record["request_id"][1:] for record in records)
            for record in records:
                number = record["request_id"]
                assert record["bytes"]["response_body"] == 4, number
            assert len({record["client"] for record in records}) == count
            for sock in crowd.clients.values():
                sock.close()
            crowd.clients.clear()
            wait_until(lambda: proxy.threads() < 3 * 70, 20, "the end of most threads")
            stop = proxy.stop()
            assert stop["requests"] == {"begun": count, "complete": count, "reject": 0, "abort": 0}
    finally:
        crowd.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_descriptors_requests_fail_for_a_resource_and_it_recovers(upstream: Upstream) -> None:
    """EMFILE while upstream is connected is the proxy's own lack; EMFILE in accept keeps clients waiting."""
    with ProxyProcess(upstream.url, "--workers", "1", prefix=("prlimit", "--nofile=48:48")) as proxy:
        with contextlib.ExitStack() as stack:
            wires = [stack.enter_context(connect(proxy.address, patience_s=5)) for _ in range(24)]
            statuses = []
            for wire in wires:  # each holds a descriptor, and its request needs another one
                with contextlib.suppress(TimeoutError):
                    wire.sock.settimeout(1.0)
                    statuses.append(ask(wire))
            assert 200 in statuses
    # Another proxy: kept connections of the first part would answer in place of those that hold.
    with ProxyProcess(upstream.url, "--workers", "1", prefix=("prlimit", "--nofile=48:48")) as proxy:
        with contextlib.ExitStack() as stack:
            held = []

            def hold(wire: Wire) -> None:
                wire.read_head()
                held.append(wire)
                wire.await_end()

            upstream.script = hold
            # All accepted before the first of them asks: otherwise each could find what it needs, and the next one
            # would not be accepted.
            wires = [stack.enter_context(connect(proxy.address, patience_s=5)) for _ in range(26)]
            for wire in wires:
                wire.send(b"GET /held HTTP/1.1\r\n")
            wait_until(lambda: len(proxy.ask_in_flight()[0]) == len(wires))
            for wire in wires:
                wire.send(b"Host: test\r\n\r\n")
            aborted = proxy.wait_for(lambda record: record["event"] == "request.abort")
            harness.check_record(aborted)
            assert (aborted["side"], aborted["cause"], aborted["phase"]) == ("proxy", "resource", "connect")
            assert aborted["status"] == 503
            assert aborted["exception"]["errno"] == "EMFILE"
            for _ in range(40):
                stack.enter_context(connect(proxy.address, patience_s=5))
            proxy.wait_for(lambda record: record["event"] == "server.resource")
        upstream.script = answer_all(ok(b"fine"))

        def served() -> bool:
            with connect(proxy.address, patience_s=2) as wire:
                return ask(wire) == 200

        def many_served() -> bool:
            with contextlib.ExitStack() as stack:
                wires = [stack.enter_context(connect(proxy.address)) for _ in range(8)]
                return [ask(wire) for wire in wires] == [200] * 8

        wait_until(served)
        wait_until(many_served)  # when those that waited in the queue have been found closed


# One who may read Python, wherever it is.
_AS_USER = ("setpriv", "--clear-groups", "--inh-caps=+dac_override", "--ambient-caps=+dac_override")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user whose processes are counted")
def test_a_worker_without_threads_serves_once_it_can(upstream: Upstream) -> None:
    """Threads count as processes; with room for two there is none for a thread that accepts."""
    user = (*_AS_USER, "--reuid=61234")
    with ProxyProcess(upstream.url, "--log-file", "-", prefix=(*user, "prlimit", "--nproc=2:")) as proxy:
        failed = proxy.wait_for(lambda record: record["event"] == "server.resource")
        assert "no more threads can be started" in failed["message"]
        (pid,) = proxy.worker_pids()
        with connect(proxy.address, patience_s=10) as wire:
            wire.get()
            time.sleep(0.2)  # nobody accepts it, which shows nowhere
            assert not proxy.requests()
            subprocess.run([*user, "prlimit", f"--pid={pid}", "--nproc=100:"], check=True)
            assert wire.read_response().status == 200


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user whose processes are counted")
def test_a_worker_without_threads_ends_in_order(upstream: Upstream) -> None:
    user = (*_AS_USER, "--reuid=61235", "prlimit", "--nproc=2")
    with ProxyProcess(upstream.url, "--log-file", "-", prefix=user) as proxy:
        proxy.wait_for(lambda record: record["event"] == "server.resource")
        with connect(proxy.address) as wire:
            time.sleep(1.1)  # complaints are at most one a second
            stop = proxy.stop()
            assert stop["requests"]["begun"] == 0
            assert wire.await_end() == "fin"
        closed = [record for record in proxy.records() if "closed unread" in record["message"]]
        assert len(closed) == 1
        assert not [record for record in proxy.records() if record["event"] in ("worker.error", "worker.exit")]


def test_tls_connections_leave_no_memory_behind(upstream: Upstream, certificates: Certificates) -> None:
    """What a connection held goes with it, and does not wait for the collector, which does not count OpenSSL's part."""
    context = certificates.client_context()
    options = ("--tls-cert", certificates.server, "--tls-key", certificates.server)
    with ProxyProcess(upstream.url, *options) as proxy:

        def load(count: int) -> None:
            for _ in range(count):
                with connect(proxy.address, context) as wire:
                    assert ask(wire) == 200

        load(200)
        before = proxy.rss_bytes()
        load(600)
        assert proxy.rss_bytes() - before < 12 * 1024 * 1024


@pytest.mark.parametrize("kind", ["options", "query"])
def test_large_heads_leave_no_memory_behind(kind: str, upstream: Upstream) -> None:
    """Parsed, one may take twenty times its size. Neither idle connections hold on to that, nor what outlives them."""
    names = [b"%x" % number for number in range(0x1000, 0x1000 + 12_000)]
    with ProxyProcess(upstream.url, "--workers", "1") as proxy:
        with connect(proxy.address) as wire:
            assert ask(wire) == 200
        (worker,) = proxy.worker_pids()
        before = proxy.rss_bytes()
        with contextlib.ExitStack() as stack:
            for number in range(100):
                wire = stack.enter_context(connect(proxy.address))
                options = b",".join((b"x%d" % number, *names))
                if kind == "options":
                    wire.send(b"GET / HTTP/1.1\r\nHost: t\r\nConnection: %b\r\n\r\n" % options)
                else:
                    wire.send(b"GET /?%b HTTP/1.1\r\nHost: t\r\n\r\n" % options)
                assert wire.read_response().status == 200
        assert proxy.rss_bytes() - before < 40 * 1024 * 1024
        assert proxy.worker_pids() == [worker]


def test_a_resolver_without_descriptors_is_not_upstreams_doing(upstream: Upstream) -> None:
    """It says that there is no such name, of a file or a socket that it could not open."""
    url = upstream.url.replace("127.0.0.1", "localhost")
    found = set()
    for spare in range(6):
        with ProxyProcess(url) as proxy, connect(proxy.address) as wire:
            (worker,) = proxy.worker_pids()
            limits = resource.prlimit(worker, resource.RLIMIT_NOFILE)
            wire.send(b"GET / HTTP/1.1\r\n")
            proxy.wait_connections(1)
            used = {int(fd) for fd in os.listdir(f"/proc/{worker}/fd")}
            most = next(n for n in range(1, 100) if n > max(used) and n - len(used) >= spare)
            resource.prlimit(worker, resource.RLIMIT_NOFILE, (most, limits[1]))
            wire.send(b"Host: t\r\n\r\n")
            found.add((wire.read_response().status, proxy.next_request().get("cause")))
    assert found == {(200, None), (503, "resource")}


def test_a_lack_of_memory_outside_of_any_request_is_no_bug(tmp_path: pathlib.Path) -> None:
    code = (
        "import sys, proxy.cli, proxy.exchange\n"
        "def fail(self): raise MemoryError\n"
        "proxy.exchange.ClientConnection.serve = fail\n"
        "sys.exit(proxy.cli.main(sys.argv[1:]))"
    )
    path, log = tmp_path / "s", tmp_path / "log"
    options = ["--listen", f"unix:{path}", "--log-file", str(log), "--workers", "1", "--upstream", "http://127.0.0.1:9"]
    with subprocess.Popen([sys.executable, "-c", code, *options], cwd=harness.ROOT) as process:
        try:
            wait_until(lambda: log.exists() and b"server.start" in log.read_bytes(), 10)
            with connect(str(path)) as wire:
                wire.await_end()
            wait_until(lambda: b"connection.abort" in log.read_bytes())
        finally:
            process.terminate()
            assert process.wait(10) == 0
    (record,) = (r for r in harness.parse_log(log.read_bytes()) if r["event"] == "connection.abort")
    assert (record["level"], record["side"], record["cause"]) == ("warning", "proxy", "resource")
    assert "out of memory" in record["message"]
    assert "bug" not in record["message"]


def test_a_drain_serves_no_more_than_the_queue_holds(log: EventLog, upstream: Upstream) -> None:
    """Where clients come faster than they are accepted it would have no end."""
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(make_worker(log, "--upstream", upstream.url))
        listener = socket.create_server(("127.0.0.1", 0), backlog=16)
        address = listener.getsockname()
        server = ProxyServer(worker, listener, lambda: 0)
        stack.callback(server.socket.close)
        wires = [stack.enter_context(connect(address)) for _ in range(10)]
        server.stop_accepting(3)  # a full queue has one more
        for wire in wires[:4]:
            assert ask(wire) == 200
        for wire in wires[4:]:
            assert wire.await_end() == "reset"
        for wire in wires:
            wire.close()
        wait_until(server.has_ended)
