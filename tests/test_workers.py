"""Signals, deaths and ends: of one worker, of the main process, of a terminal's whole group."""

import collections.abc
import contextlib
import json
import os
import pathlib
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import typing

import pytest

import harness
import peers
from conftest import Certificates
from harness import LogRecord, ProxyProcess, run_cli, wait_until
from peers import Upstream, Wire, chunk, connect, ok
from proxy import workers
from proxy.config import ConfigError, load_settings
from proxy.kernel import prepare_listener
from proxy.workers import open_listeners

_BEGIN = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"begin")


class Gate:
    """An upstream that answers ``/slow`` in two halves, the second once it is let through, and all else at once."""

    def __init__(self) -> None:
        self.open = threading.Event()

    def __call__(self, wire: Wire) -> None:
        while True:
            head = wire.read_request()
            if head.startswith(b"GET /slow"):
                wire.send(_BEGIN)
                self.open.wait(10)
                wire.send(chunk(b"end") + b"0\r\n\r\n")
            elif head.startswith(b"GET /never"):
                wire.send(_BEGIN)
                wire.await_end()
                return
            else:
                wire.send(ok(b"fine"))


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def upstream(gate: Gate) -> collections.abc.Iterator[Upstream]:
    with Upstream(gate) as upstream:
        yield upstream
        gate.open.set()


def begin(proxy: ProxyProcess, target: str) -> Wire:
    """Returns: a connection on which a response has begun."""
    wire = connect(proxy.address)
    wire.get(target)
    assert b"200 OK" in wire.read_head()
    wire.read_exactly(len(chunk(b"begin")))
    return wire


def refuses(address: peers.Address) -> bool:
    """Whether nobody listens there any more."""
    try:
        with connect(address):
            return False
    except ConnectionError:
        return True


def only(proxy: ProxyProcess) -> LogRecord:
    """Returns: the one terminal record, checked."""
    (record,) = proxy.requests()
    harness.check_record(record)
    return record


@pytest.mark.parametrize(("workers", "number"), [("1", signal.SIGTERM), ("2", signal.SIGTERM), ("2", signal.SIGQUIT)])
def test_a_transfer_in_flight_is_completed(
    workers: str, number: signal.Signals, gate: Gate, upstream: Upstream
) -> None:
    """SIGTERM: no new connections; what runs has its time."""
    with ProxyProcess(upstream.url, "--drain-timeout", "10", "--workers", workers) as proxy:
        with begin(proxy, "/slow") as wire:
            pids = proxy.pids()
            proxy.send_signal(number)
            proxy.wait_for(lambda record: record["event"] == "server.drain")
            wait_until(lambda: refuses(proxy.address))
            gate.open.set()
            assert wire.read_to_end() == chunk(b"end") + b"0\r\n\r\n"
            assert wire.end == "fin"  # it ends, though nothing else was announced
        proxy.await_stop(3, pids)
        assert only(proxy)["event"] == "request.complete"


def test_the_drain_timeout_ends_what_still_runs(upstream: Upstream) -> None:
    with ProxyProcess(upstream.url, "--drain-timeout", "0.3") as proxy:
        with begin(proxy, "/never") as wire:
            pids = proxy.pids()
            began_at = time.monotonic()
            proxy.send_signal(signal.SIGTERM)
            assert wire.read_to_end() == b""
            assert 0.3 <= time.monotonic() - began_at < 2
        proxy.await_stop(3, pids)
        record = only(proxy)
        assert (record["side"], record["cause"], record["phase"]) == ("proxy", "shutdown", "response_body")


def test_delivery_is_awaited_in_the_drain_too() -> None:
    """A response that the client's kernel has not taken yet is not complete while there is time."""
    body = bytes(2_000_000)
    with (
        Upstream(peers.answer(ok(body))) as upstream,
        ProxyProcess(upstream.url, "--drain-timeout", "10") as proxy,
    ):
        with connect(proxy.address, receive_buffer=4096) as wire:
            wire.get()
            wire.read_head()
            proxy.wait_in_flight(lambda request: request["bytes"]["response_body"] == len(body))
            proxy.send_signal(signal.SIGTERM)
            proxy.wait_for(lambda record: record["event"] == "server.drain")
            time.sleep(0.3)
            wire.reset()
        proxy.await_stop(5)
        record = only(proxy)
        assert (record["event"], record["side"], record["cause"]) == ("request.abort", "client", "reset")


def test_a_second_sigterm_ends_at_once(upstream: Upstream) -> None:
    with ProxyProcess(upstream.url, "--drain-timeout", "60", "--workers", "2") as proxy:
        with begin(proxy, "/never") as one, begin(proxy, "/never") as two:
            pids = proxy.pids()
            began_at = time.monotonic()
            proxy.send_signal(signal.SIGTERM)
            proxy.wait_for(lambda record: record["event"] == "server.drain")
            proxy.send_signal(signal.SIGTERM)
            one.read_to_end()
            two.read_to_end()
        proxy.await_stop(3, pids)
        assert time.monotonic() - began_at < 3
        assert [record["cause"] for record in proxy.requests()] == ["shutdown", "shutdown"]


def test_idle_connections_end_with_the_drain(upstream: Upstream) -> None:
    """At once, with a FIN, and no record."""
    with ProxyProcess(upstream.url, "--drain-timeout", "60", "--workers", "2") as proxy:
        unused, used = connect(proxy.address), connect(proxy.address)
        with unused, used:
            used.get()
            assert used.read_response().whole
            proxy.wait_connections(2)
            began_at = time.monotonic()
            proxy.send_signal(signal.SIGTERM)
            assert unused.await_end() == used.await_end() == "fin"
            assert time.monotonic() - began_at < 5  # of 60
        proxy.await_stop(3)
        assert only(proxy)["event"] == "request.complete"


def test_a_half_head_is_recorded_when_the_drain_ends(upstream: Upstream) -> None:
    with ProxyProcess(upstream.url, "--drain-timeout", "0.3") as proxy:
        with connect(proxy.address) as wire:
            wire.send(b"GET /ha")
            proxy.wait_in_flight()
            proxy.send_signal(signal.SIGTERM)
            assert b"503" in wire.read_to_end()
        proxy.await_stop(3)
        record = only(proxy)
        assert (record["side"], record["cause"], record["phase"]) == ("proxy", "shutdown", "request_head")


def test_connections_that_wait_in_the_queue_are_served(gate: Gate, upstream: Upstream) -> None:
    """A connection that the kernel has accepted before the drain is answered, not reset."""
    with ProxyProcess(upstream.url, "--drain-timeout", "5") as proxy:
        (worker,) = proxy.worker_pids()
        os.kill(worker, signal.SIGSTOP)
        wires = [connect(proxy.address) for _ in range(40)]
        for wire in wires:
            wire.get()
        proxy.send_signal(signal.SIGTERM)
        proxy.wait_for(lambda record: record["event"] == "server.drain")
        os.kill(worker, signal.SIGCONT)
        for wire in wires:
            with wire:
                assert wire.read_response().status == 200
        stop = proxy.await_stop(5)
        assert stop["requests"]["complete"] == 40


def test_ctrl_c_of_a_terminal_counts_once(gate: Gate, upstream: Upstream) -> None:
    """A terminal sends SIGINT to the whole group: the transfer in flight still has its time."""
    with ProxyProcess(upstream.url, "--drain-timeout", "10", "--workers", "2") as proxy:
        with begin(proxy, "/slow") as wire:
            os.killpg(proxy.process.pid, signal.SIGINT)  # it has a session of its own
            proxy.wait_for(lambda record: record["event"] == "server.drain")
            gate.open.set()
            assert wire.read_to_end().endswith(b"0\r\n\r\n")
        proxy.await_stop(3)
        assert only(proxy)["event"] == "request.complete"


def test_a_worker_that_is_killed_is_replaced(gate: Gate, upstream: Upstream) -> None:
    """Its requests end, each with its record; those of the other worker go on."""
    with ProxyProcess(upstream.url, "--workers", "2") as proxy:
        wires: list[Wire] = []
        held: dict[int, list[Wire]] = {}
        before = proxy.worker_pids()
        try:
            while len(held) < 2 or len(wires) < 6:
                wire = begin(proxy, "/slow")
                wires.append(wire)
                held.setdefault(_owner(before, wire), []).append(wire)
                assert len(wires) < 100
            victim, other = before
            began_at = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            exit_record = proxy.wait_for(lambda record: record["event"] == "worker.exit")
            assert exit_record["pid"] == victim
            assert exit_record["status"] == -9
            assert exit_record["aborted_requests"] == len(held[victim])
            assert exit_record["lost_requests"] == 0
            assert exit_record["level"] == "error"
            for wire in held[victim]:
                wire.await_end()
            wait_until(lambda: len(proxy.worker_pids()) == 2 and victim not in proxy.worker_pids())
            # New connections are served, by both: those that came meanwhile waited.
            for _ in range(30):
                with connect(proxy.address) as wire:
                    wire.get()
                    assert wire.read_response().status == 200
            assert time.monotonic() - began_at < 5
            gate.open.set()
            for wire in held[other]:
                assert wire.read_exactly(len(chunk(b"end")) + 5).endswith(b"0\r\n\r\n")
        finally:
            for wire in wires:
                wire.close()
        proxy.process.terminate()
        assert proxy.process.wait(10) == 0
        stop = proxy.records()[-1]
        assert stop["event"] == "server.stop"
        assert stop["balanced"] is True
        assert (stop["requests"]["abort"], stop["requests"]["complete"]) == (len(held[victim]), 30 + len(held[other]))
        aborted = {record["client"] for record in proxy.requests() if record["event"] == "request.abort"}
        assert len(aborted) == len(held[victim])


def test_a_worker_that_is_killed_in_the_drain_is_told(upstream: Upstream) -> None:
    """With what ended with it; nothing takes its place."""
    with ProxyProcess(upstream.url, "--drain-timeout", "30") as proxy, begin(proxy, "/never"):
        (worker,) = proxy.worker_pids()
        proxy.send_signal(signal.SIGTERM)
        proxy.wait_for(lambda record: record["event"] == "server.drain")
        os.kill(worker, signal.SIGKILL)
        assert proxy.process.wait(5) == 0
        record, exit_record, stop = proxy.records()[-3:]
        harness.check_record(record)
        assert (record["event"], record["side"], record["cause"]) == ("request.abort", "proxy", "internal")
        assert (exit_record["event"], exit_record["pid"]) == ("worker.exit", worker)
        assert exit_record["message"] == "worker 0 ended by signal 9 in the drain; 1 requests in flight ended with it"
        assert (stop["event"], stop["balanced"]) == ("server.stop", True)


def test_a_worker_that_cannot_be_started_again_is_tried_again(upstream: Upstream) -> None:
    """Out of descriptors the main process goes on, and the other worker with it."""
    with ProxyProcess(upstream.url, "--workers", "2") as proxy:
        first = proxy.process.pid
        victim, other = proxy.worker_pids()
        limits = resource.prlimit(first, resource.RLIMIT_NOFILE)
        resource.prlimit(first, resource.RLIMIT_NOFILE, (1, limits[1]))
        os.kill(victim, signal.SIGKILL)
        failed = proxy.wait_for(lambda record: record["event"] == "server.resource")
        assert (failed["pid"], failed["worker"], failed["exception"]["errno"]) == (first, 0, "EMFILE")
        assert proxy.worker_pids() == [other]
        resource.prlimit(first, resource.RLIMIT_NOFILE, limits)
        wait_until(lambda: len(proxy.worker_pids()) == 2)
        for _ in range(10):
            with connect(proxy.address) as wire:
                wire.get()
                assert wire.read_response().status == 200


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "unix"])
def test_too_few_descriptors_for_the_workers_is_one_clear_line(listen: str, tmp_path: pathlib.Path) -> None:
    where = f"unix:{tmp_path}/s" if listen == "unix" else listen
    command = ["prlimit", "--nofile=24:24", sys.executable, "-m", "proxy", "--workers=24", "--listen", where]
    done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"proxy: error: (listen|workers 24) .*Too many open files; allow more .*\n", done.stderr)
    assert not os.listdir(tmp_path)


def test_small_proxies_side_by_side_do_not_all_begin_at_the_first_core(upstream: Upstream) -> None:
    cores = sorted(os.sched_getaffinity(0))
    with ProxyProcess(upstream.url, "--workers", "1") as proxy:
        (worker,) = proxy.worker_pids()
        assert os.sched_getaffinity(worker) == {cores[proxy.process.pid % len(cores)]}


@pytest.mark.parametrize("descriptors", range(8, 22))
def test_whoever_is_told_of_a_start_is_served(descriptors: int, upstream: Upstream) -> None:
    """At the edge of too few descriptors either the start fails, or it is announced and every worker lives."""
    command = [
        *("prlimit", f"--nofile={descriptors}:{descriptors}", sys.executable, "-m", "proxy", "--workers=2"),
        *("--listen", "127.0.0.1:0", "--upstream", upstream.url, "--drain-timeout", "0"),
    ]
    process = subprocess.Popen(command, cwd=harness.ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process.stderr:
        line = process.stderr.readline()
        if line.startswith("{"):
            time.sleep(0.3)  # in which a worker that can't live would say so
            process.terminate()
        said = line + process.stderr.read()
    status = process.wait(10)
    if line.startswith("{"):
        assert [json.loads(each)["event"] for each in said.splitlines()] == [
            # The note says that so few do not suffice for all connections.
            *("server.start", "server.note", "server.drain", "server.stop")
        ]
        assert status == 0
    elif line.startswith("proxy: error: "):
        assert re.fullmatch(r"proxy: error: .*Too many open files.*\n", said)
        assert status == 2
    else:
        assert "Too many open files" in said  # with so few that Python can't load the program
        assert status != 0


def test_a_worker_that_cannot_serve_ends_the_start(tmp_path: pathlib.Path) -> None:
    """Nobody is told of a start, and the workers that could serve end with the others."""
    code = (
        "import errno, os, sys, proxy.cli, proxy.workers\n"
        "make = proxy.workers.Worker\n"
        "def fail_second(settings, log, tally, *rest):\n"
        "    try:\n"
        "        os.mkdir(sys.argv[1])\n"  # which one of both can do
        "    except FileExistsError:\n"
        "        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) from None\n"
        "    return make(settings, log, tally, *rest)\n"
        "proxy.workers.Worker = fail_second\n"
        "sys.exit(proxy.cli.main(['--workers', '2', '--listen', '127.0.0.1:0', '--upstream', 'http://127.0.0.1:9']))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "one")]
    done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert re.fullmatch(
        r"proxy: error: workers 2 \(flag\): 1 can't serve: Too many open files; allow more .*\n", done.stderr
    )


def _owner(pids: list[int], wire: Wire) -> int:
    """Returns: the worker that holds the other end of a connection."""
    found: list[int] = []

    def find() -> bool:
        found.extend(_owners(pids, wire.sock.getsockname()[1]))
        return bool(found)

    # The kernel's table is not read at once, and may leave out what others come before meanwhile.
    wait_until(find, what="a worker that holds it")
    return found[0]


def _owners(pids: list[int], port: int) -> collections.abc.Iterator[int]:
    rows = pathlib.Path("/proc/net/tcp").read_text().splitlines()
    inodes = {row.split()[9] for row in rows if row.split()[2].endswith(f":{port:04X}")}
    for pid in pids:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                link = os.readlink(f"/proc/{pid}/fd/{fd}")
            except FileNotFoundError:
                continue  # closed just now
            if link.removeprefix("socket:[").removesuffix("]") in inodes:
                yield pid


def test_without_the_process_above_workers_drain(gate: Gate, upstream: Upstream) -> None:
    """kill -9 of the first process: transfers in flight are completed, then the workers end."""
    with ProxyProcess(upstream.url, "--workers", "2", "--drain-timeout", "10") as proxy:
        workers = proxy.worker_pids()
        assert len(workers) == 2
        with begin(proxy, "/slow") as wire:
            proxy.process.kill()
            proxy.process.wait(5)
            wait_until(lambda: refuses(proxy.address))
            gate.open.set()
            assert wire.read_to_end().endswith(b"0\r\n\r\n")
        wait_until(lambda: not any(_runs(pid) for pid in workers))
        assert only(proxy)["event"] == "request.complete"
        said = [record for record in proxy.records() if record["event"] == "server.drain"]
        assert sorted(record["pid"] for record in said) == sorted(workers)
        assert {record["level"] for record in said} == {"error"}


def _runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the latter if it goes between opening and reading
        return False


def test_sigusr2_shows_what_is_in_flight(gate: Gate, upstream: Upstream) -> None:
    with ProxyProcess(upstream.url, "--workers", "2") as proxy:
        with begin(proxy, "/slow?token=secret") as one, begin(proxy, "/slow") as two, connect(proxy.address):
            with connect(proxy.address) as half:
                half.send(b"GET /ha")
                proxy.wait_connections(4)
                shown, summaries = proxy.ask_in_flight()
            assert len(shown) == 3
            assert sum(summary["requests"] for summary in summaries) == 3
            assert sum(summary["connections"] for summary in summaries) == 4
            assert {r["target"] for r in shown} == {"/slow?token=***", "/slow", None}
            assert all(r["bytes"]["upstream_written"] > 0 for r in shown if r["target"])
            gate.open.set()
            for wire in (one, two):
                assert wire.read_exactly(len(chunk(b"end")) + 5).endswith(b"0\r\n\r\n")


def test_sigusr2_is_answered_at_any_log_level(gate: Gate, upstream: Upstream, tmp_path: pathlib.Path) -> None:
    log, path = tmp_path / "log", tmp_path / "listen.sock"
    command = [sys.executable, "-m", "proxy", "--listen", f"unix:{path}", "--upstream", upstream.url]
    command += ["--log-file", str(log), "--log-level", "error", "--workers", "1", "--drain-timeout", "1"]
    with subprocess.Popen(command, cwd=harness.ROOT) as process:
        try:
            # It is there a little before anybody listens.
            wait_until(lambda: path.exists() and not refuses(str(path)), 10.0)
            with connect(str(path)) as wire:
                wire.send(b"GET /slow HTTP/1.1\r\nHost: t\r\n\r\n")
                wire.read_head()
                process.send_signal(signal.SIGUSR2)
                wait_until(lambda: log.read_bytes().count(b"\n") == 2)
                gate.open.set()
            assert [r["event"] for r in harness.parse_log(log.read_bytes())] == ["request.inflight", "server.inflight"]
        finally:
            process.terminate()
            assert process.wait(10) == 0


def test_a_worker_that_is_started_again_needs_no_certificate_files(
    upstream: Upstream, gate: Gate, certificates: Certificates, tmp_path: pathlib.Path
) -> None:
    """They may be half renewed at that moment; its share of the connections must not wait for it."""
    gate.open.set()
    own = tmp_path / "own.pem"
    own.write_bytes(pathlib.Path(certificates.server).read_bytes())
    context = certificates.client_context()
    with ProxyProcess(upstream.url, "--workers", "2", "--tls-cert", str(own)) as proxy:
        own.write_text("half of it")
        proxy.send_signal(signal.SIGHUP)
        wait_until(lambda: sum(record["event"] == "server.reload" for record in proxy.records()) == 2)
        first = proxy.start_record["workers"]
        os.kill(first[0], signal.SIGKILL)
        proxy.wait_for(lambda record: record["event"] == "worker.exit")
        for _ in range(20):
            with connect(proxy.address, context, patience_s=5) as wire:
                wire.get("/")
                assert b"200 OK" in wire.read_head()
        records = proxy.records()
        assert sum(record["event"] == "worker.exit" for record in records) == 1
        assert not [record for record in records if record["event"] == "worker.error"]


def test_a_worker_that_is_stuck_does_not_hold_the_end(upstream: Upstream) -> None:
    with ProxyProcess(upstream.url, "--drain-timeout", "0") as proxy:
        os.kill(proxy.start_record["workers"][0], signal.SIGSTOP)
        proxy.send_signal(signal.SIGTERM)
        assert proxy.process.wait(15) == 0
        records = proxy.records()
        assert [r["status"] for r in records if r["event"] == "worker.exit"] == [-signal.SIGKILL]
        assert records[-1]["event"] == "server.stop"


@pytest.mark.parametrize("tls", [True, False])
def test_sighup_says_what_was_done(tls: bool, upstream: Upstream, certificates: Certificates) -> None:
    options = ("--tls-cert", certificates.server) if tls else ()
    read = ["certificates read anew"] if tls else []
    with ProxyProcess(upstream.url, *options) as proxy:
        proxy.send_signal(signal.SIGHUP)
        reload = proxy.wait_for(lambda record: record["event"] == "server.reload")
        assert reload["message"] == ", ".join(["log reopened", *read])
        moved = proxy.directory / "moved"
        proxy.log_path.rename(moved)
        proxy.log_path.mkdir()  # what can't be opened
        proxy.send_signal(signal.SIGHUP)

        def reloads() -> list[LogRecord]:
            records = harness.parse_log(moved.read_bytes())
            return [record for record in records if record["event"] == "server.reload"]

        wait_until(lambda: len(reloads()) == 2)
        assert reloads()[1]["message"] == ("".join(read) or "no log was reopened, and there are no certificates")
        proxy.log_path.rmdir()
        moved.rename(proxy.log_path)


def test_a_port_in_use_is_one_clear_line() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        port = holder.getsockname()[1]
        done = run_cli("--listen", f"127.0.0.1:{port}", "--upstream", "http://127.0.0.1:1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"127.0.0.1:{port}" in done.stderr
    assert "another process listens there" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a mount of its own")
def test_localhost_is_where_clients_look_for_it_first(upstream: Upstream, tmp_path: pathlib.Path) -> None:
    """The hosts file of Debian's installer names both, and the resolver has ::1 first."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
    shell = 'mount --bind "$0" /etc/hosts && exec "$@"'
    prefix = ("unshare", "--mount", "--propagation=private", "sh", "-c", shell, str(hosts))
    with ProxyProcess(upstream.url, listen="localhost:0", prefix=prefix) as proxy:
        with connect(("127.0.0.1", proxy.port)) as wire:
            wire.get()
            assert wire.read_response().status == 200
        assert proxy.listen == f"127.0.0.1:{proxy.port}"


def test_two_proxies_do_not_share_a_port(upstream: Upstream) -> None:
    """With SO_REUSEPORT a second one would silently take half of the connections."""
    with ProxyProcess(upstream.url, "--workers", "2") as proxy:
        done = run_cli("--listen", f"127.0.0.1:{proxy.port}", "--upstream", upstream.url, "--workers", "2")
        assert done.returncode == 2
        assert "another process listens there" in done.stderr


def test_a_port_can_be_taken_again_at_once(upstream: Upstream) -> None:
    """Connections in TIME_WAIT are no obstacle to a restart."""
    # An address of its own: at the usual one another test might get the port meanwhile.
    with ProxyProcess(upstream.url, listen="127.9.9.9:0") as first:
        with connect(first.address) as wire:
            wire.get()
            assert wire.read_response().whole
            port = first.port
            first.stop()
    with ProxyProcess(upstream.url, listen=f"127.9.9.9:{port}") as second, connect(second.address) as wire:
        wire.get()
        assert wire.read_response().whole


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_unix_socket_is_made_and_removed(workers: str, upstream: Upstream) -> None:
    with ProxyProcess(upstream.url, "--workers", workers, listen="unix") as proxy:
        path = pathlib.Path(str(proxy.address))
        mode = path.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert mode & 0o777 == 0o660
        for _ in range(10):
            with connect(str(path)) as wire:
                wire.get()
                assert wire.read_response().status == 200
        stop = proxy.stop()
        assert stop["requests"]["complete"] == 10
        assert not path.exists()
        assert not [r for r in proxy.records() if r["level"] == "error"]


def test_a_path_that_is_no_utf_8_is_told_in_valid_unicode(upstream: Upstream, tmp_path: pathlib.Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.sock")
    with ProxyProcess(upstream.url, listen=f"unix:{path}") as proxy:
        with connect(path) as wire:
            wire.get()
            assert wire.read_response().status == 200
        proxy.wait_requests(1)
        log = proxy.log_path.read_text()
    assert "\\ud" not in log
    assert f'"client":"unix:{tmp_path}/\\\\xff.sock"' in log


def test_configuration_and_upstream_at_paths_that_are_no_utf_8_are_told_in_valid_unicode(
    tmp_path: pathlib.Path,
) -> None:
    place = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    os.mkdir(place)
    pathlib.Path(place, "c.toml").write_text("client_head_timeout = 0.2\n")
    told = []
    options = ("--config", f"{place}/c.toml")
    other = {os.fsdecode(b"PROXY_\xff"): "somebody else's"}
    # The source of a limit, an upstream that is not there, and notes on it and on a variable.
    with ProxyProcess(f"unix://{place}/none", *options, listen="0.0.0.0:0", env=other) as proxy:
        for octets in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"GET"):
            with connect(("127.0.0.1", proxy.port)) as wire:
                wire.send(octets)
                told.append(json.loads(wire.read_response().body)["message"])
        proxy.wait_requests(2)
        records = proxy.records()
    json.dumps([told, records], ensure_ascii=False).encode()  # which a lone surrogate can't be
    assert f"upstream unix://{tmp_path}/\\xff/none could not be reached" in told[0]
    assert f"set in {tmp_path}/\\xff/c.toml line 1" in told[1]
    assert r"PROXY_\xff is no option, and is ignored" in [record["message"] for record in records]


def test_a_stale_unix_socket_is_replaced_and_one_in_use_is_not(upstream: Upstream, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with ProxyProcess(upstream.url, listen=f"unix:{path}") as proxy:
        done = run_cli("--listen", f"unix:{path}", "--upstream", upstream.url)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "another process listens there" in done.stderr
        with connect(str(path)) as wire:  # the first one still has it
            wire.get()
            assert wire.read_response().status == 200
        assert proxy.process.poll() is None


def test_a_socket_of_another_kind_stays(upstream: Upstream, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        done = run_cli("--listen", f"unix:{path}", "--upstream", upstream.url)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "another process has a socket of another kind there" in done.stderr
        assert path.is_socket()


def test_a_socket_whose_queue_is_full_is_in_use(upstream: Upstream, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as client:
        other.bind(str(path))
        other.listen(0)
        client.connect(str(path))
        done = run_cli("--listen", f"unix:{path}", "--upstream", upstream.url)
        assert done.returncode == 2
        assert "another process listens there" in done.stderr
        assert path.is_socket()


def test_a_successor_keeps_its_unix_socket(upstream: Upstream, tmp_path: pathlib.Path) -> None:
    """A proxy that drains listens no more, so another one may take its path; the end of the drain leaves it there."""
    path = tmp_path / "s"
    with ProxyProcess(upstream.url, "--drain-timeout", "10", listen=f"unix:{path}") as first:
        with begin(first, "/never"):
            first.send_signal(signal.SIGTERM)
            wait_until(lambda: refuses(str(path)))
            with ProxyProcess(upstream.url, listen=f"unix:{path}") as second:
                first.send_signal(signal.SIGTERM)
                first.await_stop(5)
                with connect(str(path)) as wire:
                    wire.get()
                    assert wire.read_response().status == 200
                second.stop()
                assert not path.exists()


def test_a_file_in_the_place_of_a_unix_socket_stays(upstream: Upstream, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    for place in (path, tmp_path):
        for command in ("check", "serve"):
            done = run_cli(command, "--listen", f"unix:{place}", "--upstream", upstream.url)
            assert (done.returncode, done.stdout) == (2, "")
            assert f"listen 'unix:{place}' (flag): what is there is no socket; remove it" in done.stderr
    assert path.read_text() == "precious"
    missing = run_cli("--listen", f"unix:{tmp_path}/no/s", "--upstream", upstream.url)
    assert missing.returncode == 2
    assert "the directory does not exist" in missing.stderr


def test_a_worker_ends_in_time_when_a_client_takes_nothing(upstream: Upstream) -> None:
    """A response whose last bytes a client does not read must not hold the process beyond the drain."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(ok(b"x" * 300_000))
        wire.await_end()

    with Upstream(script) as full, ProxyProcess(full.url, "--drain-timeout", "0.3") as proxy:
        with connect(proxy.address, receive_buffer=4096) as wire:
            wire.get()
            wait_until(lambda: b"Host" in full.wire().received.octets)
            began_at = time.monotonic()
            proxy.send_signal(signal.SIGTERM)
            proxy.process.wait(10)
            assert time.monotonic() - began_at < 5
        assert len(proxy.requests()) == 1


def test_the_limit_on_open_files_is_raised(upstream: Upstream) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with ProxyProcess(upstream.url, prefix=("prlimit", f"--nofile=256:{hard}")) as proxy:
        (pid,) = proxy.worker_pids()
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE)[0] == hard


def test_systemd_is_told(upstream: Upstream, tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(5)
        with ProxyProcess(upstream.url, env={"NOTIFY_SOCKET": path}) as proxy:
            assert manager.recv(100) == b"READY=1"
            proxy.stop()
            assert manager.recv(100) == b"STOPPING=1"


def test_a_stop_that_the_service_manager_cannot_be_told_of(upstream: Upstream, tmp_path: pathlib.Path) -> None:
    """With no descriptor left for that, it is obeyed all the same."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        with ProxyProcess(upstream.url, "--workers", "2", env=environment) as proxy:
            first = proxy.process.pid
            resource.prlimit(first, resource.RLIMIT_NOFILE, (1, 1))
            proxy.stop()


def test_an_end_is_in_order_where_the_socket_can_not_be_removed(upstream: Upstream, tmp_path: pathlib.Path) -> None:
    """As on a file system that has become read-only."""
    directory = tmp_path / "directory"
    directory.mkdir()
    with ProxyProcess(upstream.url, listen=f"unix:{directory}/s") as proxy:
        directory.rename(tmp_path / "elsewhere")
        directory.touch()  # what is neither missing nor to be looked into
        proxy.stop()


def _control_pipe(writer: int, reader: int) -> int:
    """Returns: our own descriptor for the pipe through which one process tells the other what to do."""

    def pipes(pid: int, mode: str) -> dict[str, str]:
        found = {}
        for fd in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{fd}"
            flags = pathlib.Path(f"/proc/{pid}/fdinfo/{fd}").read_text().split("flags:")[1].split()[0]
            if os.readlink(path).startswith("pipe:") and flags[-1] == mode:
                found[os.readlink(path)] = path
        return found

    written, read = pipes(writer, "1"), pipes(reader, "0")
    (name,) = written.keys() & read.keys()
    return os.open(written[name], os.O_WRONLY | os.O_NONBLOCK)


def test_a_worker_that_hears_nothing_does_not_hold_the_others(upstream: Upstream) -> None:
    """Nor the end: its pipe may be full of what it was told while it stood still."""
    with ProxyProcess(upstream.url, "--workers", "2", "--drain-timeout", "0") as proxy:
        victim, other = proxy.start_record["workers"]
        os.kill(victim, signal.SIGSTOP)
        pipe = _control_pipe(proxy.process.pid, victim)
        with contextlib.suppress(BlockingIOError):  # it is full
            while True:
                os.write(pipe, b"O" * 4096)
        os.close(pipe)
        proxy.send_signal(signal.SIGUSR2)
        proxy.wait_for(lambda record: record["event"] == "server.inflight" and record["pid"] == other)
        proxy.send_signal(signal.SIGTERM)
        assert proxy.process.wait(15) == 0
        records = proxy.records()
        assert [r["pid"] for r in records if r["event"] == "worker.exit"] == [victim]
        assert records[-1]["event"] == "server.stop"


def test_a_storm_of_reloads_does_not_hold_up_the_stop_behind_it(certificates: Certificates) -> None:
    """What was asked for many times is done once or a few times: reading the CAs takes some hundredths of a second."""
    with peers.closed_port() as port, ProxyProcess(f"https://127.0.0.1:{port}", "--workers", "2") as proxy:
        for _ in range(1000):
            proxy.send_signal(signal.SIGHUP)
            time.sleep(0.0005)
        began_at = time.monotonic()
        proxy.stop()
        assert time.monotonic() - began_at < 5
        assert sum(record["event"] == "server.reload" for record in proxy.records()) >= 2


def test_whoever_asks_often_what_is_in_flight_does_not_keep_a_worker_from_its_housekeeping() -> None:
    """A kept connection that upstream has ended is closed within some seconds."""
    with Upstream(peers.answer_and_wait(ok(b"fine"))) as upstream, ProxyProcess(upstream.url) as proxy:
        with connect(proxy.address) as wire:
            wire.get()
            assert wire.read_response().status == 200
        proxy.wait_connections(0)
        files = proxy.open_files()
        upstream.wire().end_write()

        def closed() -> bool:
            proxy.ask_in_flight()
            return proxy.open_files() < files

        wait_until(closed, 12, "the end of the connection to upstream")


def test_nobody_waits_at_the_listener_of_a_worker_that_died_just_before_the_stop(upstream: Upstream) -> None:
    """It is not started again, and refuses no more by itself."""
    with ProxyProcess(upstream.url, "--workers", "2", "--drain-timeout", "20") as proxy:
        wires: dict[int, Wire] = {}
        while len(wires) < 2:
            wire = begin(proxy, "/never")
            before = wires.setdefault(_owner(proxy.start_record["workers"], wire), wire)
            if before is not wire:
                wire.close()
        try:
            victim, other = proxy.start_record["workers"]
            os.kill(victim, signal.SIGKILL)
            proxy.wait_for(lambda record: record["event"] == "worker.exit")
            proxy.send_signal(signal.SIGTERM)
            proxy.wait_for(lambda record: record["event"] == "server.drain")
            time.sleep(0.2)
            assert all(refuses(proxy.address) for _ in range(10))
            wires[other].close()
            assert proxy.process.wait(5) == 0
        finally:
            for wire in wires.values():
                wire.close()


def test_the_listener_of_a_dead_worker_does_not_outlive_the_process_above(upstream: Upstream) -> None:
    """A worker that drains must not hold it: clients would wait there for nobody, and no new start be possible."""
    with ProxyProcess(upstream.url, "--workers", "2", "--drain-timeout", "20") as proxy:
        first, (victim, other) = proxy.process.pid, proxy.start_record["workers"]
        while True:
            wire = begin(proxy, "/never")
            if _owner([victim, other], wire) == other:
                break
            wire.close()
        try:
            os.kill(first, signal.SIGKILL)
            os.kill(victim, signal.SIGKILL)
            proxy.process.wait(5)
            wait_until(lambda: refuses(proxy.address))
            with ProxyProcess(upstream.url, listen=proxy.listen) as successor, connect(successor.address) as another:
                another.get()
                assert another.read_response().status == 200
            assert _runs(other)
        finally:
            wire.close()
        wait_until(lambda: not _runs(other))


def test_of_two_that_start_at_once_one_gets_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the SO_REUSEPORT of their workers both could have it, and would silently share the connections."""
    with peers.closed_port() as port:
        settings = load_settings(
            ["--listen", f"127.0.0.1:{port}", "--upstream", "http://127.0.0.1:9", "--workers", "2"], {}
        )
    opened: list[socket.socket] = []

    def other_comes_first(*arguments: typing.Any, **options: typing.Any) -> None:
        monkeypatch.undo()
        opened.extend(open_listeners(settings)[0])  # while we are about to listen
        prepare_listener(*arguments, **options)

    monkeypatch.setattr(workers, "prepare_listener", other_comes_first)
    try:
        with pytest.raises(ConfigError, match="another process listens there"):
            opened.extend(open_listeners(settings)[0])
        assert [listener.getsockname()[1] for listener in opened] == [port, port]
    finally:
        for listener in opened:
            listener.close()


def test_certificates_that_a_worker_started_again_will_not_have_are_told(
    upstream: Upstream, certificates: Certificates
) -> None:
    """The main process could not read them, the worker could: its successor shows the old ones."""
    with ProxyProcess(upstream.url, "--tls-cert", certificates.server) as proxy:
        first = proxy.process.pid
        limits = resource.prlimit(first, resource.RLIMIT_NOFILE)
        resource.prlimit(first, resource.RLIMIT_NOFILE, (1, limits[1]))
        proxy.send_signal(signal.SIGHUP)
        note = proxy.wait_for(lambda record: record["event"] == "server.note")
        assert (note["pid"], note["level"]) == (first, "warning")
        assert "started again will have the old certificates: tls_cert" in note["message"]
        assert "Too many open files" in note["message"]
        assert "read anew" in proxy.wait_for(lambda record: record["event"] == "server.reload")["message"]
        resource.prlimit(first, resource.RLIMIT_NOFILE, limits)
