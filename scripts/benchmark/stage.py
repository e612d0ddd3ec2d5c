"""Starts upstreams and proxies when they are first needed, runs a load client against one, and measures meanwhile.

A cell is one figure of one proxy in one round. Whatever is not as it should be, a wrong response, a process that ended,
a request missing from the access log, raises `CellError`, and the table then says so in place of a number.
"""

import collections.abc
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
import socket
import ssl
import subprocess
import tempfile
import time
import typing

from .machine import Processes, cpu_seconds, memory_bytes, process_tree
from .peers import Command, Peer, Setup, free_port, nginx_upstream
from .tools import build_load, find, make_certificate, wait_until

SMALL_BODY = "".join(hashlib.sha256(bytes([number])).hexdigest() for number in range(16))  # 1 KiB of ASCII
START_S = 30.0
CLIENT_S = 300.0

# wrk prints sizes rounded; this runs once at its end and prints what it counted.
WRK_SUMMARY = """
function done(summary, latency, requests)
    local e = summary.errors
    io.write(string.format('SUMMARY {"requests":%d,"bytes":%d,"duration_us":%d,"p99_us":%d,',
        summary.requests, summary.bytes, summary.duration, latency:percentile(99)))
    io.write(string.format('"connect":%d,"read":%d,"write":%d,"status":%d,"timeout":%d}\\n',
        e.connect, e.read, e.write, e.status, e.timeout))
end
"""

# The client prefers AES-128, and so do Go and Envoy; OpenSSL would choose AES-256, which costs more. All get the same.
OPENSSL_CONFIG = """
openssl_conf = main
[main]
ssl_conf = ssl
[ssl]
system_default = defaults
[defaults]
Ciphersuites = TLS_AES_128_GCM_SHA256
"""


class CellError(Exception):
    """A cell has no number, and why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything a run does."""

    small_s: float
    bulk_bytes: int
    trickle_lines: int
    ping_pongs: int
    slow_streams: int
    slow_lines: int
    storm_clients: int
    storm_alone: str
    connections: tuple[int, ...]
    sizes_mib: tuple[int, ...]
    # How often a cell is measured, at most, if others use the machine meanwhile; the least disturbed counts.
    attempts: int


FULL = Scale(2.0, 1 << 30, 500, 5000, 2000, 12, 5000, "3s", (1, 16, 64, 256, 1000), (16, 64, 256, 1024, 4096), 4)
QUICK = Scale(0.7, 256 << 20, 120, 1000, 200, 4, 300, "1s", (1, 16, 64), (16, 64, 256), 2)


class Instance:
    """A running proxy; for `direct`, the upstream itself, which has no CPU time of interest and no log."""

    def __init__(
        self,
        peer: Peer,
        port: int,
        process: "subprocess.Popen[str] | None",
        log_file: pathlib.Path,
        ca: pathlib.Path | None,
    ) -> None:
        self.peer = peer
        self.port = port
        self.process = process
        self.log_file = log_file
        self.ca = ca

    def pids(self) -> list[int]:
        """List the processes of the proxy. Raises: CellError if it has ended."""
        if self.process is None:
            return []
        if self.process.poll() is not None:
            raise CellError(f"ended by itself with {self.process.returncode}")
        return process_tree(self.process.pid)

    def memory(self) -> int:
        """Tell the memory of all its processes in bytes, shared pages once."""
        return memory_bytes(self.pids())

    def read_log(self, enough: collections.abc.Callable[[list[bytes]], bool], seconds: float = 3.0) -> list[bytes]:
        """Read the access log until it holds enough; some proxies write late. Returns: its lines, enough or not."""
        lines: list[bytes] = []
        seen = 0

        def look() -> bool:
            nonlocal seen
            size = self.log_file.stat().st_size if self.log_file.exists() else 0
            if size != seen or not lines:
                seen = size
                lines[:] = self.log_file.read_bytes().split(b"\n")[:-1] if size else []
            return enough(lines)

        end = time.monotonic() + seconds
        while not look() and time.monotonic() < end:
            time.sleep(0.1)
        return lines

    def empty_log(self) -> None:
        """Forget the log so far, so that it never fills the disk. Every proxy here appends."""
        if self.log_file.exists():
            with self.log_file.open("r+b") as file:
                file.truncate(0)


class Measurement:
    """CPU seconds a proxy used while a block ran."""

    def __init__(self) -> None:
        self.cpu_s = 0.0


class Stage:
    """Everything that runs during a benchmark."""

    def __init__(self, scale: Scale, processes: Processes) -> None:
        self.scale = scale
        self.processes = processes
        self.ciphers: set[str] = set()
        self._root = tempfile.TemporaryDirectory(prefix="bench-")
        self.directory = pathlib.Path(self._root.name)
        self._load = build_load()
        make_certificate(self.directory)
        (self.directory / "summary.lua").write_text(WRK_SUMMARY)
        (self.directory / "openssl.cnf").write_text(OPENSSL_CONFIG)
        self._openssl = {"OPENSSL_CONF": str(self.directory / "openssl.cnf")}
        self._upstreams: dict[str, int] = {}
        self._instances: dict[tuple[str, str, bool], Instance] = {}
        self._started = 0

    def close(self) -> None:
        """End everything and remove what it wrote."""
        self.processes.end_all()
        self._root.cleanup()

    # What runs ------------------------------------------------------------------------------------------------------

    def _launch(self, name: str, command: Command, port: int, log_file: pathlib.Path) -> "subprocess.Popen[str]":
        errors_file = self.directory / f"{name}.errors"
        # Append: the log is emptied under the writer, which would otherwise leave a hole of zeros before its next line.
        output = log_file if command.log_is_output else errors_file
        with output.open("ab") as standard, errors_file.open("ab") as errors:
            process = self.processes.start(
                command.words,
                output=standard,
                errors=errors,
                cwd=command.folder or self.directory,
                env={
                    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                    "HOME": str(self.directory),
                    **self._openssl,
                    **command.environ,
                },
            )
        if not wait_until(lambda: process.poll() is not None or _listens(port), START_S) or process.poll() is not None:
            text = errors_file.read_text(errors="replace").strip() or "no word"
            raise CellError(f"did not start: {text.splitlines()[-1][:200]}")
        return process

    def _setup(self, name: str, upstream_port: int, secure: bool) -> Setup:
        self._started += 1
        directory = self.directory / f"{self._started}-{name}"
        directory.mkdir()
        return Setup(
            directory, free_port(), upstream_port, directory / "access.log", self.directory if secure else None
        )

    def _upstream(self, kind: str) -> int:
        """Start an upstream once: `small` answers 1 KiB, `stream` is the Go helper, `secure` the same with TLS."""
        if kind not in self._upstreams:
            setup = self._setup(f"upstream-{kind}", 0, False)
            if kind == "small":
                command = nginx_upstream(setup, SMALL_BODY)
            else:
                words: list[str | pathlib.Path] = [self._load, "upstream", "-listen", f"127.0.0.1:{setup.port}"]
                if kind == "secure":
                    words += ["-cert", self.directory / "cert.pem", "-key", self.directory / "key.pem"]
                command = Command(tuple(words))
            self._launch(f"upstream-{kind}", command, setup.port, setup.log_file)
            self._upstreams[kind] = setup.port
        return self._upstreams[kind]

    def start(self, peer: Peer, upstream: str, secure: bool) -> Instance:
        """Start a proxy, for the caller to end; most figures take `instance` instead. Raises: CellError."""
        ca = self.directory / "cert.pem" if secure else None
        if peer.command is None:
            port = self._upstream("secure" if secure and upstream == "stream" else upstream)
            return Instance(peer, port, None, self.directory / "no.log", ca)
        setup = self._setup(peer.name, self._upstream(upstream), secure)
        process = self._launch(f"{self._started}-{peer.name}", peer.command(setup), setup.port, setup.log_file)
        instance = Instance(peer, setup.port, process, setup.log_file, ca)
        try:
            self._await_answer(instance, upstream)
        except CellError:
            self.processes.end(process)
            raise
        return instance

    def _await_answer(self, instance: Instance, upstream: str) -> None:
        """Wait until the first right answer: some proxies listen before they have read their routes."""
        problem = "no answer"

        def answers() -> bool:
            nonlocal problem
            try:
                if upstream == "small":
                    self.check_small(instance)
                else:
                    self.client(instance, "transfer", "-kind", "down", "-bytes", "1048576")
            except CellError as error:
                problem = str(error)
                time.sleep(0.05)
                return False
            return True

        if not wait_until(answers, 10):
            raise CellError(f"does not answer rightly: {problem}")

    def instance(self, peer: Peer, upstream: str = "stream", secure: bool = False) -> Instance:
        """Give the running proxy of this kind, started when first asked for."""
        key = (peer.name, upstream, secure)
        if key not in self._instances:
            self._instances[key] = self.start(peer, upstream, secure)
        return self._instances[key]

    def drop(self, peer: Peer) -> None:
        """End the instances of a proxy: what is left after an error is no fair start for the next round."""
        for key in [key for key in self._instances if key[0] == peer.name]:
            process = self._instances.pop(key).process
            if process is not None:
                self.processes.end(process)

    # What is measured -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def measuring(self, instance: Instance) -> collections.abc.Iterator[Measurement]:
        """Measure the CPU time of a proxy's processes around a block."""
        measured = Measurement()
        before = cpu_seconds(instance.pids())
        yield measured
        measured.cpu_s = cpu_seconds(instance.pids()) - before

    def client(self, instance: Instance, command: str, *options: str, prompt: bool = False) -> dict[str, typing.Any]:
        """Run a load client to its end. Returns: its result. Raises: CellError if anything it did went wrong."""
        process = self.begin_client(instance, command, *options, prompt=prompt)
        return self.finish_client(process)

    def begin_client(
        self, instance: Instance, command: str, *options: str, prompt: bool = False
    ) -> "subprocess.Popen[str]":
        """Start a load client; `finish_client` waits for it."""
        words: list[str | pathlib.Path] = [self._load, command, "-target", f"127.0.0.1:{instance.port}"]
        if instance.ca is not None:
            words += ["-ca", instance.ca]
        return self.processes.start([*words, *options], interactive=True, prompt=prompt)

    def finish_client(self, process: "subprocess.Popen[str]") -> dict[str, typing.Any]:
        """Close a client's standard input, wait for its end and read its result. Raises: CellError."""
        try:
            printed, _nothing = process.communicate(timeout=CLIENT_S)
        except subprocess.TimeoutExpired as error:
            raise CellError(f"the client was not done after {CLIENT_S:.0f} s") from error
        finally:
            self.processes.end(process)
        try:
            result: dict[str, typing.Any] = json.loads(printed.splitlines()[-1])
        except (IndexError, ValueError) as error:
            raise CellError(f"the client ended with {process.returncode} and no result") from error
        if result["failed"]:
            raise CellError(f"{result['failed']} failed, {result['done']} right: {result['errors'][0]}")
        if result["cipher"]:
            self.ciphers.add(result["cipher"])
        return result

    def wrk(self, instance: Instance, connections: int, seconds: float, close: bool = False) -> dict[str, float]:
        """Load with small requests. Returns: requests, duration_s and p99_us. Raises: CellError."""
        words: list[str | pathlib.Path] = [find("wrk"), "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s"]
        words += ["-s", self.directory / "summary.lua", "--timeout", "20s"]
        if close:
            words += ["-H", "Connection: close"]
        process = self.processes.start([*words, f"http://127.0.0.1:{instance.port}/small"], interactive=True)
        try:
            printed, _nothing = process.communicate(timeout=CLIENT_S)
        finally:
            self.processes.end(process)
        summary = re.search(r"^SUMMARY (.*)$", printed, re.MULTILINE)
        if summary is None:
            raise CellError(f"wrk ended with {process.returncode}: {printed.strip()[-200:]}")
        counted: dict[str, int] = json.loads(summary.group(1))
        wrong = {name: counted[name] for name in ("connect", "read", "write", "status", "timeout") if counted[name]}
        if wrong:
            raise CellError("wrk: " + ", ".join(f"{count} {name} errors" for name, count in wrong.items()))
        requests = counted["requests"]
        if requests == 0 or counted["bytes"] < requests * len(SMALL_BODY):
            raise CellError(f"wrk: {counted['bytes']} bytes in {requests} responses")
        return {"requests": requests, "duration_s": counted["duration_us"] / 1e6, "p99_us": counted["p99_us"]}

    def check_small(self, instance: Instance) -> None:
        """Ask for the small body once and compare status and content: wrk only counts. Raises: CellError."""
        try:
            with socket.create_connection(("127.0.0.1", instance.port), 5) as plain:
                connection = plain
                if instance.ca is not None:
                    context = ssl.create_default_context(cafile=str(instance.ca))
                    connection = context.wrap_socket(plain, server_hostname="localhost")
                connection.sendall(b"GET /small HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                answer = b""
                while part := connection.recv(65536):
                    answer += part
        except OSError as error:
            raise CellError(f"no answer: {error}") from error
        head, _, body = answer.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 ") or body != SMALL_BODY.encode():
            raise CellError(f"wrong answer: {answer[:60]!r}, {len(body)} bytes of body")


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1):
            return True
    except OSError:
        return False
