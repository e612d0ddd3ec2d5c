"""The proxy as a process of its own, as a user starts it, and its log, read strictly.

``ProxyProcess`` starts it in one of three forms: the package, the single file, the zip archive. What holds for every
log (each line is JSON and at most 32 KiB, the balance, no traceback on stderr, exit status 0) is asserted here, so
that no test can forget it.
"""

import collections.abc
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
import typing

ROOT = pathlib.Path(__file__).resolve().parent.parent
SINGLE_FILE = ROOT / "proxy.py"
ARCHIVE = ROOT / "dist" / "proxy.pyz"
FORMS = ("package", "single_file", "pyz")
TERMINAL = ("request.complete", "request.reject", "request.abort")
LONGEST_LINE = 32 * 1024
_START_S = 20.0

LogRecord = dict[str, typing.Any]


def parse_log(octets: bytes) -> list[LogRecord]:
    """Parse a log strictly. Returns: its records. Raises: AssertionError."""
    assert octets.endswith(b"\n") or not octets, f"the log ends within a line: {octets[-200:]!r}"
    records = []
    for line in octets.splitlines(keepends=True):
        assert len(line) <= LONGEST_LINE, f"{len(line)} octets: {line[:200]!r}"
        record = json.loads(line, object_pairs_hook=_unique)
        assert isinstance(record, dict), line
        records.append(record)
    return records


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    assert len(record) == len(pairs), f"a name comes twice in {[name for name, _ in pairs]}"
    return record


def wait_until(
    condition: collections.abc.Callable[[], object], timeout_s: float = 5.0, what: str = "the condition"
) -> None:
    """Wait for a condition that no event announces. Raises: AssertionError."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, f"{what} did not come about in {timeout_s} s"
        time.sleep(0.003)


SIDES = ("client", "upstream", "proxy")
PHASES = ("tls_handshake", "request_head", "connect", "request_body", "response_head", "response_body", "tunnel")
OPERATIONS = ("read", "write", "connect", "handshake", None)
CAUSES = (
    "timeout", "deadline", "dead_peer", "closed", "reset", "refused", "unreachable", "dns", "tls", "protocol", "limit",
    "forbidden", "unauthorized", "resource", "killed", "shutdown", "internal",
)  # fmt: skip
_COUNTS = {"client_read", "client_written", "upstream_read", "upstream_written", "request_body", "response_body"}
_TIMINGS = ("head", "connected", "request_sent", "first_byte", "last_byte")
_EVIDENCE = {
    "unacked_bytes", "notsent_bytes", "retransmits", "rtt_s", "last_ack_s", "last_data_recv_s", "rwnd_limited_s",
    "busy_s", "state", "verdict",
}  # fmt: skip
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3,9}Z")


def check_record(record: LogRecord) -> None:
    """Check that a terminal record has all fields of the contract, each of its type and in agreement with the others.

    Raises: AssertionError.
    """
    assert _TIME.fullmatch(record["time"]), record["time"]
    assert record["event"] in TERMINAL
    assert record["level"] == ("info" if record["event"] == "request.complete" else "warning")
    assert record["schema_version"] == 1
    for name in ("message", "request_id", "connection_id", "client"):
        assert isinstance(record[name], str), name
        assert record[name], name
    assert record["message"].isprintable()
    assert isinstance(record["pid"], int)
    for name in ("upstream", "method", "target"):
        assert record[name] is None or isinstance(record[name], str), name
    assert record["status"] is None or 100 <= record["status"] <= 599
    assert set(record["bytes"]) == _COUNTS
    for name, count in record["bytes"].items():
        assert isinstance(count, int), name
        assert count >= 0, name
    assert set(record["expected"]) == {"request_body", "response_body"}
    assert record["duration_s"] >= 0
    assert set(record["timing_s"]) <= set(_TIMINGS)
    for name, moment in record["timing_s"].items():
        assert 0 <= moment <= record["duration_s"] + 0.01, name
    assert record["timing_s"].get("first_byte", 0) <= record["timing_s"].get("last_byte", 3600)
    if record["event"] == "request.complete":
        assert "cause" not in record
        if all(event["what"] != "tunnel" for event in record.get("events", ())):  # which ends when both directions have
            assert record["duration_s"] == record["timing_s"]["last_byte"]
        assert record["status"] is not None
        return
    assert record["side"] in SIDES
    assert record["phase"] in PHASES
    assert record["operation"] in OPERATIONS
    assert record["cause"] in CAUSES
    assert record["error_type"] is None or re.fullmatch("[a-z_]+", record["error_type"])
    if record["side"] == "client" and record["cause"] in ("closed", "reset", "dead_peer"):
        # Of these only the end of half a request may be answered.
        assert record["error_type"] in (None, "http_request_error")
        assert record["error_type"] or record["status"] != 400
    assert record["exception"] is None or isinstance(record["exception"], dict)
    limit: dict[str, typing.Any] = record.get("limit") or {}
    if record["cause"] in ("timeout", "deadline", "limit"):
        assert limit, "no limit is named"
    if record["cause"] in ("timeout", "deadline"):
        assert limit["elapsed_s"] >= limit["seconds"] > 0
    if limit:
        assert limit["name"] in record["message"]
        assert ("seconds" in limit) != ("value" in limit)
        assert re.fullmatch(r"default|flag|env:PROXY_\w+|file:.+:\d+", limit["source"])
    if record["event"] == "request.reject":
        return
    assert isinstance(record["stalled_s"], dict)
    assert set(record["socket"]) == {"client", "upstream"}
    for evidence in record["socket"].values():
        if evidence is not None:
            assert set(evidence) == _EVIDENCE
            assert evidence["verdict"] in ("idle", "moving", "paused", "slow_network", "dead")
    assert len(record["events"]) <= 16
    moments = [event["t"] for event in record["events"]]
    assert moments == sorted(moments)
    for event in record["events"]:
        assert event["side"] in SIDES
        assert isinstance(event["what"], str)


class ProxyProcess:
    """A running proxy. ``options`` are written as on the command line.

    Unless they say otherwise it has one worker, gives requests one second when it is told to end, and logs to a file of
    its own. ``listen`` may be ``unix``: a socket in a directory of its own. ``prefix`` goes before its command (strace,
    say), and ``namespace`` is a network namespace to run it in. Leaving the context stops it, asserting what ``stop``
    asserts.
    """

    def __init__(
        self,
        upstream: str,
        *options: str,
        form: str = "package",
        listen: str = "127.0.0.1:0",
        env: dict[str, str] | None = None,
        python: str = sys.executable,
        namespace: str | None = None,
        prefix: tuple[str, ...] = (),
    ) -> None:
        self.form = form
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="proxy-test-"))
        self.log_path = self.directory / "log.jsonl"
        self.stderr_path = self.directory / "stderr"
        self.options = [
            *("--listen", listen if listen != "unix" else f"unix:{self.directory / 'listen.sock'}"),
            *("--upstream", upstream),
            *options,
        ]
        for name, value in (("--workers", "1"), ("--drain-timeout", "1"), ("--log-file", str(self.log_path))):
            if not any(option == name or option.startswith(name + "=") for option in options):
                self.options += [name, value]
        self._own_log = str(self.log_path) in self.options
        self._all_levels = not any(option.startswith("--log-level") for option in options)
        command, cwd = launch(form, python, self.directory)
        if namespace is not None:
            command = ["ip", "netns", "exec", namespace, *command]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PROXY_")}
        environment |= env or {}
        with self.stderr_path.open("wb") as stderr, open(os.devnull, "r+b") as nothing:
            self.process = subprocess.Popen(
                [*prefix, *command, *self.options],
                cwd=cwd,
                env=environment,
                stdin=nothing,
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,  # a Ctrl-C in the tests is not the proxy's
            )
        try:
            self.start_record = self.wait_for(lambda record: record["event"] == "server.start", _START_S)
        except BaseException:
            self.kill()
            self.remove()
            raise
        self.listen: str = self.start_record["listen"]
        self._offset = 0

    # -- where it is

    @property
    def address(self) -> tuple[str, int] | str:
        """Returns: host and port, or the path, that clients connect to."""
        if self.listen.startswith("unix:"):
            return self.listen[5:]
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def port(self) -> int:
        """Returns: the port that clients connect to."""
        return int(self.listen.rpartition(":")[2])

    # -- what it says

    def stderr(self) -> str:
        """Returns: all of stderr (and stdout) so far."""
        return self.stderr_path.read_text(errors="backslashreplace")

    def records(self) -> list[LogRecord]:
        """Returns: all records so far."""
        path = self.log_path if self._own_log else self.stderr_path
        if not path.exists():
            return []
        octets = path.read_bytes()
        # One write may become visible page by page while it is under way, and a busy machine may stop it there.
        for _ in range(400):
            if octets.endswith(b"\n") or not octets or self.process.poll() is not None:
                break
            time.sleep(0.005)
            octets = path.read_bytes()
        return parse_log(octets)

    def requests(self) -> list[LogRecord]:
        """Returns: all terminal records so far."""
        return [record for record in self.records() if record["event"] in TERMINAL]

    def wait_for(
        self, predicate: collections.abc.Callable[[LogRecord], object], timeout: float = 5.0, since: int = 0
    ) -> LogRecord:
        """Wait for a record that fits. Returns: the first one. Raises: AssertionError, with the log."""
        until = time.monotonic() + timeout
        while True:
            over = time.monotonic() >= until or self.process.poll() is not None  # looked at before the log is
            for record in self.records()[since:]:
                if predicate(record):
                    return record
            assert not over, (
                f"no such record within {timeout} s (exit status {self.process.poll()});"
                f" stderr: {self.stderr()[-3000:]} log: {self._tail()}"
            )
            time.sleep(0.003)

    def wait_requests(self, count: int, timeout: float = 5.0) -> list[LogRecord]:
        """Wait for the terminal records of ``count`` requests in all. Returns: all. Raises: AssertionError if there
        are more.
        """
        until = time.monotonic() + timeout
        while len(found := self.requests()) < count:
            assert time.monotonic() < until, f"{len(found)} records of {count} requests; log: {self._tail()}"
            time.sleep(0.003)
        assert len(found) == count, f"{len(found)} records of {count} requests; log: {self._tail()}"
        return found

    def next_request(self, timeout: float = 5.0) -> LogRecord:
        """Wait for one more terminal record than at the last call. Returns: it. Raises: AssertionError if there are
        two.
        """
        self._offset += 1
        return self.wait_requests(self._offset, timeout)[-1]

    def wait_connections(self, count: int, timeout: float = 5.0) -> None:
        """Wait until the workers hold ``count`` client connections: one whose client says nothing is accepted only
        after a second.
        """
        until = time.monotonic() + timeout
        while (held := self._count_connections()) != count:
            assert time.monotonic() < until, f"{held} connections are held, not {count}"
            time.sleep(0.05)

    def _count_connections(self) -> int:
        return sum(summary["connections"] for summary in self.ask_in_flight()[1])

    def ask_in_flight(self) -> tuple[list[LogRecord], list[LogRecord]]:
        """Send SIGUSR2. Returns: what the workers say of each request in flight, and the summary of each."""
        workers = len(self.worker_pids())
        before = len(self.records())

        def said(event: str) -> list[LogRecord]:
            return [record for record in self.records()[before:] if record["event"] == event]

        self.send_signal(signal.SIGUSR2)
        wait_until(lambda: len(said("server.inflight")) == workers, what="a summary of each worker")
        return said("request.inflight"), said("server.inflight")

    def wait_in_flight(
        self, fits: collections.abc.Callable[[LogRecord], object] = lambda record: True, timeout: float = 5.0
    ) -> LogRecord:
        """Wait until a request in flight fits: what a worker has read or written shows in its counts.

        Returns: what was said of it. Raises: AssertionError, with what was said last.
        """
        until = time.monotonic() + timeout
        while True:
            requests, _ = self.ask_in_flight()
            for request in requests:
                if fits(request):
                    return request
            assert time.monotonic() < until, f"no such request in flight within {timeout} s: {requests}"
            time.sleep(0.003)

    def _tail(self) -> str:
        return "\n".join(json.dumps(record) for record in self.records()[-12:] if record["event"] != "server.start")

    # -- what it uses

    def pids(self) -> list[int]:
        """Returns: the process and all below it."""
        found = [self.process.pid]
        for pid in found:
            with contextlib.suppress(FileNotFoundError):  # has ended just now
                for task in os.listdir(f"/proc/{pid}/task"):
                    children = pathlib.Path(f"/proc/{pid}/task/{task}/children").read_text()
                    found += [int(child) for child in children.split()]
        return found

    def worker_pids(self) -> list[int]:
        """Returns: the processes that serve."""
        return self.pids()[1:] or self.pids()

    def _sum_status(self, name: str) -> int:
        total = 0
        for pid in self.pids():
            for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith(name + ":"):
                    total += int(line.split()[1])
        return total

    def rss_bytes(self) -> int:
        """Returns: resident memory of all processes; pages they share count once for each."""
        return self._sum_status("VmRSS") * 1024

    def threads(self) -> int:
        """Returns: threads of all processes."""
        return self._sum_status("Threads")

    def open_files(self) -> int:
        """Returns: open descriptors of all processes."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.pids())

    def cpu_s(self) -> float:
        """Returns: CPU time of all processes so far."""
        ticks = 0
        for pid in self.pids():
            fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    # -- its end

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the first process, as a service manager does."""
        self.process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout: float = 15.0) -> LogRecord:
        """End it. Returns: its ``server.stop``.

        Asserted: exit status 0, requests in balance and as many as there are records, nothing but the log on stderr,
        nothing left running.
        """
        pids = self.pids()
        self.process.send_signal(number)
        return self.await_stop(timeout, pids)

    def await_stop(self, timeout: float = 15.0, pids: collections.abc.Sequence[int] = ()) -> LogRecord:
        """Wait for an end that was asked for in another way. Returns and asserts as ``stop``."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end within {timeout} s; log: {self._tail()}") from None
        records = self.records()
        assert status == 0, f"exit status {status}; stderr: {self.stderr()[-3000:]}"
        stops = [record for record in records if record["event"] == "server.stop"]
        assert len(stops) == 1, f"{len(stops)} server.stop; log: {self._tail()}"
        stop = stops[0]
        counts = stop["requests"]
        assert stop["balanced"] is True, stop
        assert counts["begun"] == counts["complete"] + counts["reject"] + counts["abort"], stop
        if self._all_levels and not stop.get("lost_log_lines"):
            for event in TERMINAL:
                logged = sum(record["event"] == event for record in records)
                assert logged == counts[event.removeprefix("request.")], f"{logged} {event} in the log, {counts}"
        if self._own_log:
            assert not self.stderr(), self.stderr()[-3000:]
        for pid in pids:
            assert not os.path.exists(f"/proc/{pid}/fd"), f"process {pid} is left"
        return stop

    def kill(self) -> None:
        """End it by force: for what has failed already."""
        for pid in reversed(self.pids()):
            with contextlib.suppress(ProcessLookupError):  # has ended by itself
                os.kill(pid, signal.SIGKILL)
        self.process.wait(5)

    def remove(self) -> None:
        """Remove log and directory."""
        shutil.rmtree(self.directory)

    def __enter__(self) -> typing.Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        try:
            if error is not None:
                # A failed test says what it found, and here is what the proxy said.
                error.add_note(f"proxy's log: {self._log_for_note()}\nstderr: {self.stderr()[-3000:]}")
                self.kill()
            elif self.process.poll() is None:
                self.stop()
        finally:
            if self.process.poll() is None:
                self.kill()
            self.remove()

    def _log_for_note(self) -> str:
        try:
            return self._tail()
        except AssertionError as broken:
            return str(broken)


def launch(form: str, python: str, directory: pathlib.Path) -> tuple[list[str], pathlib.Path]:
    """Returns: the command that starts the proxy in a form, and the working directory for it.

    The single file and the archive run as copies in a directory of their own, where no package ``proxy`` is in reach.
    """
    match form:
        case "package":
            return [python, "-m", "proxy"], ROOT
        case "single_file" | "pyz":
            source = SINGLE_FILE if form == "single_file" else ARCHIVE
            home = directory / "home"
            home.mkdir(exist_ok=True)
            shutil.copy(source, home)
            # -I keeps site-packages away from the archive, which brings its own.
            return [python, *(("-I",) if form == "pyz" else ()), str(home / source.name)], home
        case _:
            raise ValueError(form)


def run_cli(
    *arguments: str, form: str = "package", env: dict[str, str] | None = None, timeout: float = 20.0
) -> subprocess.CompletedProcess[str]:
    """Run a command of the proxy that ends by itself. Returns: status, stdout and stderr."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PROXY_")}
    with tempfile.TemporaryDirectory(prefix="proxy-test-") as directory:
        command, cwd = launch(form, sys.executable, pathlib.Path(directory))
        return subprocess.run(
            [*command, *arguments],
            cwd=cwd,
            env=environment | (env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
