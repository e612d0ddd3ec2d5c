"""The log under stress: full disks, readers that stop, rotation, hostile text, many writers."""

import collections.abc
import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import typing

import pytest

import harness
from harness import ProxyProcess, parse_log, wait_until
from peers import Upstream, answer, answer_all, connect, ok
from proxy.log import EventLog, LineFile, SharedState

LONGEST = 32 * 1024


@contextlib.contextmanager
def open_log(path: pathlib.Path | str, level: str = "info") -> collections.abc.Iterator[EventLog]:
    """An event log of this process, without the descriptors it leaves behind."""
    log = EventLog(str(path), level)
    try:
        yield log
    finally:
        for file in (log._file, log._stderr):
            if file.fd > 2:
                os.close(file.fd)
        for file in {log._file, log._stderr}:
            lock_fd = file._shared._lock_fd
            assert lock_fd is not None
            os.close(lock_fd)


def open_names(pid: int) -> list[str]:
    """Returns: what the open descriptors of a process lead to."""
    names = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed just now
            names.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return names


def command(upstream: Upstream, *options: str) -> list[str]:
    """Returns: what starts a proxy of two workers."""
    listen = "--listen=127.0.0.1:0"
    return [sys.executable, "-m", "proxy", listen, f"--upstream={upstream.url}", "--workers=2", *options]


@pytest.fixture
def upstream() -> collections.abc.Iterator[Upstream]:
    with Upstream(answer_all(ok(b"fine"))) as upstream:
        yield upstream


def ask(proxy: ProxyProcess, octets: bytes = b"GET / HTTP/1.1\r\nHost: t\r\n\r\n", count: int = 1) -> None:
    """Send requests on one connection, and see each answered."""
    with connect(proxy.address) as wire:
        for _ in range(count):
            wire.send(octets)
            assert wire.read_response().status == 200


# -- one process ------------------------------------------------------------------------------------------------------


def test_every_line_is_short_ascii_json(tmp_path: pathlib.Path) -> None:
    hostile = "\r\n\x00\x1b[2J\"'\\ \x7f\u0085\u2028\ud800é" + '{"event":"forged"}\n'
    with open_log(tmp_path / "log") as log:
        for size in (1, 10, 1000, 5000, 31_000, 33_000, 1_000_000):
            fields: dict[str, object] = {"message": hostile * (size // len(hostile) + 1), "list": [hostile * 9] * 20}
            log.event("info", "test", **fields, nested={"a": {"b": "x" * size}}, number=size)
    octets = (tmp_path / "log").read_bytes()
    records = parse_log(octets)
    assert [record["number"] for record in records] == [1, 10, 1000, 5000, 31_000, 33_000, 1_000_000]
    assert all(32 <= octet < 127 or octet == 10 for octet in octets)
    assert all("more characters" in json.dumps(record) for record in records[-2:])
    assert all(len(line) <= LONGEST for line in octets.splitlines(keepends=True))


def test_levels(tmp_path: pathlib.Path) -> None:
    with open_log(tmp_path / "log", "warning") as log:
        for level in ("debug", "info", "warning", "error"):
            log.event(level, "test")
        assert not log.info_enabled
    assert [record["level"] for record in parse_log((tmp_path / "log").read_bytes())] == ["warning", "error"]


def test_reopening_keeps_no_descriptor_of_the_old_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log"
    with open_log(path) as log:
        before = os.listdir("/proc/self/fd")
        for number in range(20):
            log.event("info", "test", number=number)
            path.rename(tmp_path / f"log.{number}")
            log.reopen()
        assert len(os.listdir("/proc/self/fd")) == len(before)
        assert not [name for name in open_names(os.getpid()) if str(tmp_path) + "/log." in name]
    for number in range(20):
        assert parse_log((tmp_path / f"log.{number}").read_bytes())[0]["number"] == number


def test_a_file_that_cannot_be_opened_anew_stays_in_use(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "directory" / "log"
    path.parent.mkdir()
    with open_log(path) as log:
        path.rename(tmp_path / "moved")
        path.parent.rmdir()
        assert not log.reopen()
        log.event("info", "test")
        assert log.lost_lines == 0
    assert [r["event"] for r in parse_log((tmp_path / "moved").read_bytes())] == ["log.reopen", "test"]


def test_a_file_that_was_removed_is_not_written_to(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "directory" / "log"
    path.parent.mkdir()
    with open_log(path) as log:
        path.unlink()
        path.parent.rmdir()
        assert not log.reopen()
        log.event("info", "lost")
        assert log.lost_lines == 2
        path.parent.mkdir()
        assert log.reopen()
        log.event("info", "found")
        assert log.lost_lines == 2
        path.unlink()
        path.parent.rmdir()
        time.sleep(1.1)  # as long as it takes to be another outage
        assert not log.reopen()
    said = [record["event"] for record in parse_log(capfd.readouterr().err.encode())]
    assert said == ["log.lost", "log.reopen", "lost", "log.lost", "log.reopen"]


def test_a_path_that_is_no_utf_8_is_told_in_valid_unicode(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    os.symlink("/dev/full", path)
    with open_log(pathlib.Path(path)) as log:
        log.event("info", "lost")
        os.unlink(path)
        os.mkdir(path)
        assert not log.reopen()
    told = [record["message"] for record in parse_log(capfd.readouterr().err.encode())[:3] if "message" in record]
    assert [message.split(" can't be ")[0] for message in told] == [f"{tmp_path}/\\xff"] * len(told)
    assert len(told) == 2


def test_a_named_pipe_without_a_reader_is_an_error_and_no_wait(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device or address"):
        EventLog(str(tmp_path / "pipe"), "info")


@contextlib.contextmanager
def file_size_limit(size: int) -> collections.abc.Iterator[None]:
    """A disk that is full at some size, as far as this process can tell. Python ignores SIGXFSZ."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# A shell's "2> FILE" appends nothing by itself: it has a position of its own.
@pytest.mark.parametrize("mode", ["ab", "wb"])
def test_a_line_that_half_fits_leaves_nothing_behind(mode: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log"
    with path.open("ab") if mode == "ab" else path.open("wb") as file:
        lines = LineFile(file.fileno(), SharedState())
        lines.write(b'{"a":1}\n')
        with file_size_limit(12), pytest.raises(OSError, match="only a part"):
            lines.write(b'{"a":2}\n')
        assert path.read_bytes() == b'{"a":1}\n'
        lines.write(b'{"a":3}\n')
    assert path.read_bytes() == b'{"a":1}\n{"a":3}\n'
    os.close(typing.cast(int, lines._shared._lock_fd))


def test_a_part_that_cannot_be_taken_back_is_no_part_of_the_next_line(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log"
    shared = SharedState()
    with open(path, "ab", buffering=0) as file, open(path, "ab", buffering=0) as other:
        lines, of_other_worker = LineFile(file.fileno(), shared), LineFile(other.fileno(), shared)
        path.write_bytes(b'{"a":')  # as if another process had left it
        shared.torn = True
        of_other_worker.write(b'{"a":2}\n')
        lines.write(b'{"a":3}\n')
    assert path.read_bytes() == b'{"a":\n{"a":2}\n{"a":3}\n'
    os.close(typing.cast(int, shared._lock_fd))


def test_a_reader_that_stops_within_a_line_finds_the_next_ones_whole() -> None:
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 8192)
    lines = LineFile(write_end, SharedState())
    try:
        began_at = time.monotonic()
        with pytest.raises(BlockingIOError):
            lines.write(b"x" * 20_000 + b"\n")
        first_s = time.monotonic() - began_at
        assert 0.9 < first_s < 3
        for _ in range(50):  # nobody waits for that reader again
            with pytest.raises(BlockingIOError):
                lines.write(b"y\n")
        assert time.monotonic() - began_at - first_s < 0.5
        found = os.read(read_end, 65536)
        lines.write(b"z\n")
        lines.write(b"z\n")
        found += os.read(read_end, 65536)
        assert found.strip(b"x") == b"\nz\nz\n"
    finally:
        os.close(read_end)
        os.close(lines.fd)
        os.close(typing.cast(int, lines._shared._lock_fd))


def test_a_socket_gets_each_line_in_one_write_and_costs_no_transfer() -> None:
    """As the journal's, which can't be opened anew. One that keeps writes apart tells how many there were."""

    def fill(lines: LineFile) -> None:
        for _ in range(1000):
            lines.write(b"y" * 9_999 + b"\n")

    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with reader, writer:
        lines = LineFile(os.dup(writer.fileno()), SharedState())
        assert lines._socket is not None
        try:
            for size in (10, 5_000, 30_000):
                lines.write(b"x" * size + b"\n")
                assert len(reader.recv(65536)) == size + 1
            with pytest.raises(BlockingIOError):
                fill(lines)
            assert writer.getblocking()  # which others share with us
        finally:
            lines._socket.close()
            os.close(lines.fd)
            os.close(typing.cast(int, lines._shared._lock_fd))


def test_a_pipe_of_another_user_costs_a_line_and_no_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It can't be opened anew, so that writes to it wait; poll promises room for one page."""
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 8192)

    def refuse(*arguments: object) -> int:
        raise PermissionError(errno.EACCES, "another user's")

    monkeypatch.setattr(os, "open", refuse)
    lines = LineFile(write_end, SharedState())
    monkeypatch.undo()
    failed = threading.Event()

    def write() -> None:
        try:
            lines.write(b"x" * 20_000 + b"\n")
        except BlockingIOError:
            failed.set()

    threading.Thread(target=write, daemon=True).start()
    try:
        assert failed.wait(5)
        assert os.get_blocking(write_end)
        found = os.read(read_end, 65536)
        lines.write(b"z\n")
        assert (found + os.read(read_end, 65536)).strip(b"x") == b"\nz\n"
    finally:
        os.close(read_end)
        os.close(lines.fd)
        os.close(typing.cast(int, lines._shared._lock_fd))


def test_a_process_that_stops_with_the_lock_costs_lines_and_no_transfer() -> None:
    read_end, write_end = os.pipe()
    shared = SharedState()
    lines = LineFile(write_end, shared)
    lock_fd = typing.cast(int, shared._lock_fd)
    keeper = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl; fcntl.lockf({lock_fd}, fcntl.LOCK_EX); print(flush=True); input()"],
        pass_fds=[lock_fd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert keeper.stdout is not None
        keeper.stdout.readline()
        began_at = time.monotonic()
        for _ in range(10):
            with pytest.raises(BlockingIOError):
                lines.write(b"y\n")
        assert time.monotonic() - began_at < 4
        keeper.communicate(b"\n", 10)
        lines.write(b"z\n")
        assert os.read(read_end, 65536) == b"z\n"
    finally:
        keeper.kill()
        keeper.wait(10)
        os.close(read_end)
        os.close(lines.fd)
        os.close(lock_fd)


def test_a_bug_in_the_log_costs_a_line_and_nothing_else(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_log(tmp_path / "log") as log:
        monkeypatch.setattr(log._file, "write", None)
        log.event("info", "test")
        assert log.lost_lines == 1


# -- many writers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_lines_of_two_workers_stay_whole(kind: str, upstream: Upstream, tmp_path: pathlib.Path) -> None:
    """Long lines, too: targets of 8 KB make lines larger than what a pipe takes at once."""
    read_end, write_end = os.pipe()
    collected = bytearray()

    def collect() -> None:
        while octets := os.read(read_end, 1 << 16):
            collected.extend(octets)

    reader = threading.Thread(target=collect)
    reader.start()
    path = tmp_path / "log"
    process = subprocess.Popen(
        command(upstream, *([f"--log-file={path}"] if kind == "file" else [])),
        stderr=write_end,
        cwd=harness.ROOT,
    )
    os.close(write_end)

    def log() -> bytes:
        return bytes(collected) if kind == "pipe" else path.read_bytes() if path.exists() else b""

    try:
        wait_until(lambda: log().endswith(b"\n"), 20)
        port = int(parse_log(log())[0]["listen"].rpartition(":")[2])

        def load(number: int) -> None:
            for _ in range(10):  # connections: the kernel gives each to either worker, by chance
                with connect(("127.0.0.1", port)) as wire:
                    for turn in range(6):
                        wire.get("/" + str(number % 10) * (8000 if turn % 3 == 0 else 10))
                        assert wire.read_response().status == 200

        threads = [threading.Thread(target=load, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        process.terminate()
        status = process.wait(20)
        reader.join()
        os.close(read_end)
    assert status == 0
    records = parse_log(log())
    requests = [record for record in records if record["event"] == "request.complete"]
    assert len(requests) == 720
    assert len({record["pid"] for record in requests}) == 2
    assert records[-1]["event"] == "server.stop"
    assert records[-1]["lost_log_lines"] == 0


def test_rotation_loses_no_line(upstream: Upstream) -> None:
    with ProxyProcess(upstream.url, "--workers", "2") as proxy:
        done = threading.Event()
        counts = []

        def load() -> None:
            count = 0
            while not done.is_set():
                ask(proxy, count=20)
                count += 20
            counts.append(count)

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        old = []
        try:
            for number in range(12):
                time.sleep(0.05)  # lets requests pass; the outcome does not hang on how many
                old.append(proxy.directory / f"log.{number}")
                proxy.log_path.rename(old[-1])
                proxy.send_signal(signal.SIGHUP if number % 2 else signal.SIGUSR1)
                wait_until(proxy.log_path.exists)
        finally:
            done.set()
            for thread in threads:
                thread.join()
        proxy.process.terminate()
        assert proxy.process.wait(10) == 0
        records = [record for path in [*old, proxy.log_path] for record in parse_log(path.read_bytes())]
        complete = [record["request_id"] for record in records if record["event"] == "request.complete"]
        assert len(complete) == len(set(complete)) == sum(counts)
        stop = records[-1]
        assert stop["event"] == "server.stop"
        assert (stop["balanced"], stop["lost_log_lines"]) == (True, 0)
        assert stop["requests"]["complete"] == sum(counts)


def test_after_rotations_no_worker_holds_an_old_file(upstream: Upstream) -> None:
    with ProxyProcess(upstream.url, "--workers", "2") as proxy:
        ask(proxy)
        files = proxy.open_files()
        for number in range(5):
            proxy.log_path.rename(proxy.directory / f"log.{number}")
            proxy.send_signal(signal.SIGUSR1)
            wait_until(proxy.log_path.exists)

        def held() -> list[str]:
            return [name for pid in proxy.pids() for name in open_names(pid) if re.search(r"/log\.\d", name)]

        wait_until(lambda: not held(), what="old logs closed")
        wait_until(lambda: proxy.open_files() <= files, what="no more files than before")
        proxy.process.terminate()
        assert proxy.process.wait(10) == 0


def test_a_rotation_that_found_no_descriptor_is_made_up_for(upstream: Upstream) -> None:
    """Whoever rotates asks once, and then removes the old file: lines in there nobody would ever see, or miss."""
    with ProxyProcess(upstream.url) as proxy:
        ask(proxy)
        (worker,) = proxy.worker_pids()
        limits = resource.prlimit(worker, resource.RLIMIT_NOFILE)
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (1, limits[1]))
        rotated = proxy.directory / "rotated"
        proxy.log_path.rename(rotated)
        proxy.send_signal(signal.SIGUSR1)
        wait_until(lambda: b"log.reopen" in rotated.read_bytes())
        assert "tried again" in parse_log(rotated.read_bytes())[-1]["message"]
        rotated.unlink()
        resource.prlimit(worker, resource.RLIMIT_NOFILE, limits)
        opened = proxy.wait_for(lambda record: record["event"] == "log.reopen", 10)
        assert (opened["level"], opened["pid"]) == ("info", worker)
        ask(proxy)
        (record,) = proxy.wait_requests(1)
        harness.check_record(record)
        proxy.process.terminate()
        assert proxy.process.wait(10) == 0


def test_a_file_that_somebody_removes_is_made_anew(upstream: Upstream) -> None:
    """Within seconds, and without a signal: nobody would ever see, or miss, what is written to it."""
    with ProxyProcess(upstream.url, "--workers", "2") as proxy:
        ask(proxy)
        workers = proxy.worker_pids()
        proxy.log_path.unlink()
        wait_until(lambda: len(proxy.records()) == 2, 10)
        assert {record["event"] for record in proxy.records()} == {"log.reopen"}
        assert {record["pid"] for record in proxy.records()} == set(workers)
        ask(proxy)
        (record,) = proxy.wait_requests(1)
        harness.check_record(record)
        proxy.process.terminate()
        assert proxy.process.wait(10) == 0
        # The main process has nothing to say before: it looks when it does.
        assert [r["event"] for r in proxy.records()[3:]] == ["log.reopen", "server.drain", "server.stop"]


def test_a_file_without_a_name_is_not_opened_again_and_again(tmp_path: pathlib.Path) -> None:
    """As where /dev/stdout leads to one."""
    with tempfile.TemporaryFile() as file, open_log(f"/proc/self/fd/{file.fileno()}") as log:
        for _ in range(3):
            log.tend()
        log.event("info", "test")
        file.seek(0)
        assert [record["event"] for record in parse_log(file.read())] == ["test"]


# -- a log that can't be written --------------------------------------------------------------------------------------


def records_so_far(path: pathlib.Path) -> list[harness.LogRecord]:
    """Returns: the records in a file, without the one that is being written."""
    octets = path.read_bytes()
    return parse_log(octets[: octets.rfind(b"\n") + 1])


@contextlib.contextmanager
def start_with_log(
    upstream: Upstream, path: pathlib.Path, stderr_path: pathlib.Path, prefix: tuple[str, ...] = ()
) -> collections.abc.Iterator[tuple[subprocess.Popen[bytes], tuple[str, int]]]:
    """A proxy of two workers whose log may break, and its address."""
    with stderr_path.open("wb") as stderr:
        process = subprocess.Popen([*prefix, *command(upstream, f"--log-file={path}")], stderr=stderr, cwd=harness.ROOT)

    def begin() -> list[harness.LogRecord]:
        records = [record for p in (path, stderr_path) if p.is_file() for record in records_so_far(p)]
        return [record for record in records if record["event"] == "server.start"]

    try:
        wait_until(begin, 20)
        yield process, ("127.0.0.1", int(begin()[0]["listen"].rpartition(":")[2]))
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def check_stop(stop: harness.LogRecord, complete: int, lost: list[harness.LogRecord]) -> None:
    """Check that the last event counts all that went to stderr, except itself and what tells of the loss."""
    assert stop["event"] == "server.stop"
    assert stop["balanced"] is True
    assert stop["requests"]["complete"] == complete
    assert stop["lost_log_lines"] == sum(record["event"] not in ("log.lost", "server.stop") for record in lost)
    told = [record for record in lost if record["event"] == "log.lost"]
    assert told
    assert all("go to stderr" in record["message"] for record in told)


def test_a_log_device_that_is_full(upstream: Upstream, tmp_path: pathlib.Path) -> None:
    stderr_path = tmp_path / "stderr"
    with start_with_log(upstream, pathlib.Path("/dev/full"), stderr_path) as (process, address):
        for _ in range(30):
            with connect(address) as wire:
                wire.get()
                assert wire.read_response().status == 200
        process.terminate()
        assert process.wait(10) == 0
    lost = parse_log(stderr_path.read_bytes())
    assert sum(record["event"] == "request.complete" for record in lost) == 30
    check_stop(lost[-1], 30, lost)


def test_lines_that_a_killed_worker_has_lost_are_counted(upstream: Upstream, tmp_path: pathlib.Path) -> None:
    stderr_path = tmp_path / "stderr"
    with start_with_log(upstream, pathlib.Path("/dev/full"), stderr_path) as (process, address):
        for _ in range(10):
            with connect(address) as wire:
                wire.get()
                assert wire.read_response().status == 200
        wait_until(lambda: stderr_path.read_bytes().count(b'"request.complete"') == 10)
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()

        def held() -> int:
            summary = b'"event":"server.inflight"'
            before = stderr_path.read_bytes().count(summary)
            process.send_signal(signal.SIGUSR2)
            wait_until(lambda: stderr_path.read_bytes().count(summary) == before + 2)
            said = [record for record in records_so_far(stderr_path) if record["event"] == "server.inflight"]
            return sum(record["connections"] for record in said[-2:])

        wait_until(lambda: not held(), what="the end of all connections: their requests are counted by then")
        for worker in children:
            os.kill(int(worker), signal.SIGKILL)
        wait_until(lambda: stderr_path.read_bytes().count(b'"worker.exit"') == 2)
        process.terminate()
        assert process.wait(10) == 0
    lost = parse_log(stderr_path.read_bytes())
    check_stop(lost[-1], 10, lost)


def mount_small_disk(directory: pathlib.Path, request: pytest.FixtureRequest) -> None:
    """Mount a file system of 64 KiB, half of them taken by a file ``ballast``, until the test ends."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=65536", "none", str(directory)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mount is not allowed here: {mounted.stderr.decode().strip()}")
    request.addfinalizer(lambda: subprocess.run(["umount", str(directory)], check=True))
    (directory / "ballast").write_bytes(b"\0" * 32768)


def whole_lines(path: pathlib.Path) -> list[harness.LogRecord]:
    """Returns: the records in a full file. The part of one more can be seen there until its writer takes it back."""
    octets = b""

    def is_whole() -> bool:
        nonlocal octets
        octets = path.read_bytes()
        return octets.endswith(b"\n")

    wait_until(is_whole, what="a file of whole lines")
    return parse_log(octets)


@pytest.mark.parametrize("how", ["limit", "disk"])
def test_a_disk_that_fills_up(
    how: str, upstream: Upstream, tmp_path: pathlib.Path, request: pytest.FixtureRequest
) -> None:
    """What was written before stays whole, what comes later goes to stderr; with room again the log goes on."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if how == "disk":
        mount_small_disk(directory, request)
    prefix = ("prlimit", "--fsize=65536") if how == "limit" else ()
    path, stderr_path = directory / "log", tmp_path / "stderr"
    with start_with_log(upstream, path, stderr_path, prefix) as (process, address):

        def load(count: int) -> None:
            for number in range(count):
                with connect(address) as wire:
                    wire.get("/" + "x" * (number % 700))
                    assert wire.read_response().status == 200

        count = 150
        load(count)
        wait_until(lambda: b"request.complete" in stderr_path.read_bytes(), what="lines on stderr")
        in_file = whole_lines(path)
        if how == "disk":
            (directory / "ballast").unlink()
            load(5)
            count += 5
            wait_until(lambda: len(records_so_far(path)) >= len(in_file) + 5)
        process.terminate()
        assert process.wait(10) == 0
    lost, kept = parse_log(stderr_path.read_bytes()), parse_log(path.read_bytes())
    requests = [record["request_id"] for record in kept + lost if record["event"] == "request.complete"]
    assert len(requests) == len(set(requests)) == count
    # A short line may still have found room.
    check_stop(next(record for record in kept + lost if record["event"] == "server.stop"), count, lost)


def test_stderr_on_a_disk_that_fills_up(
    upstream: Upstream, tmp_path: pathlib.Path, request: pytest.FixtureRequest
) -> None:
    """With room again the log goes on after the last whole line."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount_small_disk(directory, request)
    stderr_path = directory / "stderr"
    with start_with_log(upstream, pathlib.Path("-"), stderr_path) as (process, address):

        def load(count: int) -> None:
            for _ in range(count):
                with connect(address) as wire:
                    wire.get()
                    assert wire.read_response().status == 200

        load(80)
        before = whole_lines(stderr_path)
        assert len(before) < 80, "the disk is too large"
        (directory / "ballast").unlink()
        load(5)
        process.terminate()
        assert process.wait(10) == 0
    after = parse_log(stderr_path.read_bytes())
    assert after[: len(before)] == before
    completed = [record for record in after if record["event"] == "request.complete"]
    stop = after[-1]
    assert (stop["event"], stop["requests"]["complete"]) == ("server.stop", 85)
    assert 0 < stop["lost_log_lines"] == 85 - len(completed)


def test_stderr_in_a_file_that_somebody_cuts_short(upstream: Upstream) -> None:
    """As logrotate's copytruncate does."""
    # The level is the default; naming it tells the helper that its file has not all records at the end.
    with ProxyProcess(upstream.url, "--log-file=-", "--workers=2", "--log-level=info") as proxy:
        ask(proxy, count=5)
        proxy.wait_requests(5)
        os.truncate(proxy.stderr_path, 0)
        for _ in range(10):
            ask(proxy)
        proxy.wait_requests(10)


def test_a_reader_of_stderr_that_stops(upstream: Upstream) -> None:
    """Transfers wait for it once, for about a second; then its lines are lost, and counted."""
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 16384)
    process = subprocess.Popen(command(upstream), stderr=write_end, cwd=harness.ROOT)
    os.close(write_end)
    collected = bytearray()
    try:
        while not collected.endswith(b"\n"):
            collected += os.read(read_end, 65536)
        port = int(parse_log(bytes(collected))[0]["listen"].rpartition(":")[2])
        longest_s = 0.0
        slow = 0
        for number in range(200):
            began_at = time.monotonic()
            with connect(("127.0.0.1", port)) as wire:
                wire.get("/" + "x" * (1000 if number % 50 == 0 else 10))
                assert wire.read_response().status == 200
                wire.get()  # waits for the line of the one before
                assert wire.read_response().status == 200
            took_s = time.monotonic() - began_at
            longest_s = max(longest_s, took_s)
            slow += took_s > 0.5
        # Each would be slow if each waited; a busy machine makes some of them so.
        assert longest_s < 8
        assert slow <= 10
        # It reads again: the log goes on.
        os.set_blocking(read_end, False)
        with contextlib.suppress(BlockingIOError):
            while octets := os.read(read_end, 65536):
                collected += octets
        with connect(("127.0.0.1", port)) as wire:
            wire.get("/again")
            assert wire.read_response().status == 200

        def again() -> bool:
            collected.extend(_read_some(read_end))
            return b"/again" in collected

        wait_until(again)
    finally:
        process.terminate()
        status = process.wait(10)
        collected += _read_some(read_end)
        os.close(read_end)
    assert status == 0
    records = parse_log(bytes(collected))
    stop = records[-1]
    assert stop["event"] == "server.stop"
    complete = sum(record["event"] == "request.complete" for record in records)
    assert stop["requests"]["complete"] == 401
    assert stop["lost_log_lines"] == 401 - complete > 200


def _read_some(fd: int) -> bytes:
    with contextlib.suppress(BlockingIOError):
        return os.read(fd, 1 << 20)
    return b""


def test_a_closed_stderr_does_not_end_a_transfer(upstream: Upstream) -> None:
    read_end, write_end = os.pipe()
    process = subprocess.Popen(command(upstream), stderr=write_end, cwd=harness.ROOT)
    os.close(write_end)
    collected = b""
    try:
        while not collected.endswith(b"\n"):
            collected += os.read(read_end, 65536)
        os.close(read_end)
        port = int(parse_log(collected)[0]["listen"].rpartition(":")[2])
        with connect(("127.0.0.1", port)) as wire:
            for _ in range(20):
                wire.get()
                assert wire.read_response().status == 200
    finally:
        process.terminate()
        status = process.wait(10)
    assert status == 0


# -- hostile text -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proxy() -> collections.abc.Iterator[ProxyProcess]:
    with (
        Upstream(answer(ok(b"fine", b"Connection: close\r\n"))) as upstream,
        ProxyProcess(upstream.url, "--max-head-size", "131072") as proxy,
    ):
        yield proxy


_FORGED = b'"}\r\n{"event":"forged","a":"'
_CHUNKED = b"POST /x HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
_HOSTILE = {
    "control characters in the target": b"GET /\x00\x1b[2J\x08\x7f HTTP/1.1\r\nHost: t\r\n\r\n",
    "quotes in the target": b'GET /"}{"event":"forged"}\\ HTTP/1.1\r\nHost: t\r\n\r\n',
    "not ASCII in the target": "GET /é\u2028\u202e HTTP/1.1\r\nHost: t\r\n\r\n".encode(),
    "not UTF-8 in the target": b"GET /\xff\xfe\xc0\x80\xed\xa0\x80 HTTP/1.1\r\nHost: t\r\n\r\n",
    "a bare line feed": b'GET /x\n{"event":"forged"}\n HTTP/1.1\r\nHost: t\r\n\r\n',
    "a bare carriage return": b"GET /x\rforged HTTP/1.1\r\nHost: t\r\n\r\n",
    "a hostile method": b'G"{}\x1b /x HTTP/1.1\r\nHost: t\r\n\r\n',
    "a hostile version": b'GET /x HTTP/1.1"}\x1b[31m\r\nHost: t\r\n\r\n',
    "a hostile field name": b'GET /x HTTP/1.1\r\nHost: t\r\nA"}\x1b\xff: 1\r\n\r\n',
    "a hostile field value": b'GET /x HTTP/1.1\r\nHost: t\r\nA: "}\x1b[2J\x00\xff\r\n\r\n',
    "a hostile length": b'GET /x HTTP/1.1\r\nHost: t\r\nContent-Length: 1"}\xe2\x80\xa8\r\n\r\n',
    "a hostile coding": b'GET /x HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: "}\xe9\r\n\r\n',
    "a hostile host": b'GET /x HTTP/1.1\r\nHost: "}\xe9\r\n\r\n',
    "a hostile request id": b'GET /x HTTP/1.1\r\nHost: t\r\nX-Request-Id: a"}\xe9\r\n\r\n',
    "a long request id": b"GET /x HTTP/1.1\r\nHost: t\r\nX-Request-Id: " + b"a" * 5000 + b"\r\n\r\n",
    "a hostile chunk": _CHUNKED + b'"}\x1b\xff\r\n\r\n',
    "a hostile trailer": b"POST /x HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    + _FORGED
    + b"\r\n\r\n",
    "a long target": b"GET /" + b"%22" * 20_000 + b" HTTP/1.1\r\nHost: t\r\n\r\n",
    "a long target of quotes": b"GET /" + b'"' * 60_000 + b" HTTP/1.1\r\nHost: t\r\n\r\n",
    "a long target of backslashes": b"GET /" + b"\\" * 60_000 + b" HTTP/1.1\r\nHost: t\r\n\r\n",
    "a long target of octets": b"GET /" + b"\xff" * 60_000 + b" HTTP/1.1\r\nHost: t\r\n\r\n",
    "a long query of secrets": b"GET /?" + b"token=x&" * 7_500 + b" HTTP/1.1\r\nHost: t\r\n\r\n",
    "a long method": b"G" * 60_000 + b" / HTTP/1.1\r\nHost: t\r\n\r\n",
    "a long field": b"GET / HTTP/1.1\r\nHost: t\r\nA: " + b"\\" * 60_000 + b"\x00\r\n\r\n",
    "a target longer than a head": b"GET /" + b"\x7f" * 140_000,
    "only octets": bytes(range(256)) * 8,
}


@pytest.mark.parametrize("octets", _HOSTILE.values(), ids=_HOSTILE)
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_nothing_a_client_says_breaks_a_line(octets: bytes, cut: bool, proxy: ProxyProcess) -> None:
    """One event for each, in JSON of printable ASCII, whose text shows what came in escapes."""
    before = len(proxy.records())
    with connect(proxy.address) as wire:
        wire.send_until_answered(octets[: len(octets) * 2 // 3] if cut else octets)
        wire.end_write()
        wire.await_end()
    wait_until(lambda: len(proxy.records()) > before)
    whole = proxy.log_path.read_bytes()
    line = whole.splitlines(keepends=True)[-1]
    assert len(line) <= LONGEST
    assert all(32 <= octet < 127 for octet in line[:-1])
    records = proxy.records()[before:]
    assert len(records) == 1
    harness.check_record(records[0])
    for text in _texts(records[0]):
        assert text.isascii()
        assert text.isprintable()


def _texts(value: object) -> collections.abc.Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


_HOSTILE_ANSWERS = {
    "status line": b'HTTP/1.1 200"}\x1b OK\r\n\r\n',
    "reason": b'HTTP/1.1 200 "}\x1b\xff\n\r\nContent-Length: 0\r\n\r\n',
    "field name": b'HTTP/1.1 200 OK\r\nA"}\x1b\xff: 1\r\nContent-Length: 0\r\n\r\n',
    "length": b'HTTP/1.1 200 OK\r\nContent-Length: "}\xe2\x80\xa8\r\n\r\n',
    "chunk": b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"}\x1b\xff\r\n\r\n',
    "trailer": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + _FORGED + b"\r\n\r\n",
    "garbage": bytes(range(256)) * 300,
    "garbage lines": _FORGED * 3000,
}


@pytest.mark.parametrize("octets", _HOSTILE_ANSWERS.values(), ids=_HOSTILE_ANSWERS)
def test_nothing_an_upstream_says_breaks_a_line_or_an_answer(octets: bytes) -> None:
    def script(wire: typing.Any) -> None:
        wire.read_head()
        wire.send(octets)
        wire.await_end()

    with Upstream(script) as upstream, ProxyProcess(upstream.url) as proxy, connect(proxy.address) as wire:
        wire.get()
        answer = wire.read_response()
        assert answer.status in (200, 502)
        if answer.status == 502:
            message = json.loads(answer.body)["message"]
            assert message.isascii()
            assert message.isprintable()
        record = proxy.next_request()
        harness.check_record(record)
        assert record["side"] == "upstream"
        assert all(text.isascii() and text.isprintable() for text in _texts(record))


@pytest.mark.parametrize(("level", "events"), [("info", ["library.log"]), ("warning", ["library.log"]), ("error", [])])
def test_what_a_library_warns_of_has_a_level_too(level: str, events: list[str], tmp_path: pathlib.Path) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        with open_log(tmp_path / "log", level) as log:
            log.capture_library_logs()
            logging.getLogger("urllib3").warning("a warning")
    finally:
        root.handlers[:] = before[0]
        root.setLevel(before[1])
    assert [record["event"] for record in parse_log((tmp_path / "log").read_bytes())] == events
