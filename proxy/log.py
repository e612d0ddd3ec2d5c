"""One JSON line for each event, whole or not at all, to a file or to stderr.

A line is one ``write``. Where the file can't be written, the loss is counted and the line goes to stderr; a transfer
never waits for its log for longer than a moment, and never fails because of it. The file is opened anew on request,
for log rotation.
"""

import fcntl
import json
import logging
import os
import select
import stat
import sys
import threading
import time
import typing

try:
    import pythonjsonlogger.json

    _BaseFormatter: typing.Any = pythonjsonlogger.json.JsonFormatter
except ModuleNotFoundError:  # python-json-logger before 3.1, as in Debian 12
    import pythonjsonlogger.jsonlogger

    _BaseFormatter = pythonjsonlogger.jsonlogger.JsonFormatter  # type: ignore[attr-defined,unused-ignore]  # as the release has it

SCHEMA_VERSION = 1
MAX_LINE = 32 * 1024
LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
# How long one line may wait for a pipe whose reader does not read.
_PATIENCE_S = 1.0

# The second for which the text was made, in nanoseconds, and the text.
_known_second: tuple[int, str] = (0, "")


def timestamp() -> str:
    """Returns: now, as RFC 3339 in UTC with milliseconds."""
    global _known_second  # a new tuple each second; a torn read is not possible
    now_ns = time.time_ns()
    begin_ns, text = _known_second
    rest_ns = now_ns - begin_ns
    if not 0 <= rest_ns < 1_000_000_000:
        rest_ns = now_ns % 1_000_000_000
        begin_ns = now_ns - rest_ns
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(begin_ns // 1_000_000_000))
        _known_second = begin_ns, text
    return f"{text}.{rest_ns // 1_000_000:03d}Z"


class RecordFormatter(_BaseFormatter):  # type: ignore[misc]  # the class has two homes, and types in one of them only
    """python-json-logger's formatter for both ways into the log: ``logging`` records of libraries, and the proxy's
    own events.

    The proxy's own do not pass through ``LogRecord`` and the merging of extra fields, which cost more than relaying a
    small request.
    """

    def __init__(self) -> None:
        super().__init__("%(message)s")
        self._encode = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"), default=repr).encode

    def format(self, record: logging.LogRecord) -> str:
        """A library's own log line, as an event."""
        return self.line(
            record.levelname.lower() if record.levelname.lower() in LEVELS else "error",
            "library.log",
            {"message": record.getMessage(), "logger": record.name, "pid": record.process},
        )

    def line(self, level: str, event: str, fields: dict[str, object]) -> str:
        """Returns: the JSON line of an event, with its newline, at most ``MAX_LINE`` octets: the longest strings are
        cut if need be.
        """
        full = {"time": timestamp(), "level": level, "event": event, "schema_version": SCHEMA_VERSION, **fields}
        text: str = self._encode(full)
        room = MAX_LINE // 2
        while len(text) >= MAX_LINE and room > 64:
            text = self._encode(_cut_strings(full, room))
            room //= 2
        return text + "\n"


def _cut_strings(value: object, room: int) -> object:
    """Returns: ``value`` with every string cut to what takes at most ``room`` octets in JSON."""
    if isinstance(value, str):
        if len(value) * 6 <= room or len(json.dumps(value)) <= room:
            return value
        kept = value[:room]
        while len(json.dumps(kept)) > room:
            kept = kept[: len(kept) * 3 // 4]
        return kept + f"... ({len(value) - len(kept)} more characters)"
    if isinstance(value, dict):
        return {key: _cut_strings(item, room) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_cut_strings(item, room) for item in value]
    return value


class LineFile:
    """An open file descriptor that takes whole lines.

    A regular file takes each in one appending write. For a pipe, a socket or a terminal, ``lock_fd`` (a file all
    workers share) keeps a line larger than the kernel's atomic size together, and a reader that has stopped costs a
    line, not a transfer.
    """

    def __init__(self, fd: int, lock_fd: int | None) -> None:
        self.fd = fd
        self.is_regular = stat.S_ISREG(os.fstat(fd).st_mode)
        self._lock_fd = lock_fd
        self._lock = threading.Lock()  # guards nothing but the order of writes; lockf alone does not hold threads apart
        self._stuck = False
        if not self.is_regular:
            self.fd = self._private_description(fd)

    def _private_description(self, fd: int) -> int:
        # O_NONBLOCK belongs to the open file, which others (a shell) share with us; opened anew, it is ours alone. A
        # socket can't be opened that way and stays as it is: journald reads its sockets.
        try:
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return fd

    def write(self, data: bytes) -> None:
        """Write one line. Raises: OSError if it could not be written whole."""
        if self.is_regular:
            written = os.write(self.fd, data)
            if written != len(data):
                # A disk that is full took a part. The next line must not be glued to it.
                os.write(self.fd, b"\n")
                raise OSError(28, "only a part of the line fit")
            return
        with self._lock:
            if self._lock_fd is not None:
                fcntl.lockf(self._lock_fd, fcntl.LOCK_EX)
            try:
                self._write_waiting(data)
            finally:
                if self._lock_fd is not None:
                    fcntl.lockf(self._lock_fd, fcntl.LOCK_UN)

    def _write_waiting(self, data: bytes) -> None:
        give_up_at = time.monotonic() + (0.0 if self._stuck else _PATIENCE_S)
        poller = select.poll()
        poller.register(self.fd, select.POLLOUT)
        view = memoryview(data)
        while view:
            wait_s = max(0.0, give_up_at - time.monotonic())
            if not poller.poll(wait_s * 1000):
                self._stuck = True
                raise BlockingIOError(11, "nobody reads the log")
            try:
                count = os.write(self.fd, view)
            except BlockingIOError:
                # poll promises one page; this line is larger than what is free.
                if time.monotonic() >= give_up_at:
                    self._stuck = True
                    raise
                time.sleep(0.005)
                continue
            view = view[count:]
            give_up_at = time.monotonic() + _PATIENCE_S
        self._stuck = False

    def close(self) -> None:
        """Close the descriptor, unless it is stderr."""
        if self.fd > 2:
            os.close(self.fd)


class EventLog:
    """Where events go: level, file, and what happens when it can't be written. Safe from any thread."""

    def __init__(self, path: str, level: str) -> None:
        """Open ``path`` (``-`` is stderr). Raises: OSError if it can't be opened."""
        self.path = path
        self.threshold = LEVELS[level]
        self.info_enabled = self.threshold <= LEVELS["info"]
        self.formatter = RecordFormatter()
        self.lost_lines = 0
        self._lock = threading.Lock()  # guards lost_lines and the exchange of _file
        self._lock_fd = os.memfd_create("log-lock", os.MFD_CLOEXEC) if hasattr(os, "memfd_create") else None
        self._stderr = LineFile(2, self._lock_fd)
        self._file = self._stderr if path == "-" else LineFile(self._open(), self._lock_fd)

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def enabled(self, level: str) -> bool:
        """Whether events of that level are written."""
        return LEVELS[level] >= self.threshold

    def event(self, level: str, event: str, **fields: object) -> None:
        """Write one event. Never raises for the file's sake."""
        if LEVELS[level] >= self.threshold:
            self.write(self.formatter.line(level, event, fields))

    def write(self, line: str) -> None:
        """Write one finished line. Never raises for the file's sake."""
        data = line.encode("ascii")
        try:
            self._file.write(data)
        except OSError as error:
            self._lose(data, error)

    def _lose(self, data: bytes, error: OSError) -> None:
        with self._lock:
            self.lost_lines += 1
            first = self.lost_lines == 1 or self.lost_lines % 1000 == 0
        if self._file is self._stderr:
            return
        try:
            if first:
                text = f"{self.path} can't be written ({error}); log lines go to stderr, {self.lost_lines} so far"
                self._stderr.write(self.formatter.line("error", "log.lost", {"message": text}).encode("ascii"))
            self._stderr.write(data)
        except OSError:
            # Neither the file nor stderr takes the line: counting it, above, is all that is left to do.
            return

    def reopen(self) -> None:
        """Open the file anew, as after rotation; the old one stays in use if that fails.

        Raises: OSError.
        """
        if self.path == "-":
            return
        fresh = LineFile(self._open(), self._lock_fd)
        with self._lock:
            old, self._file = self._file, fresh
        # A thread may be about to write to the old descriptor; its number must not be given to another file under it.
        os.dup2(fresh.fd, old.fd, inheritable=False)
        self._retired = old

    def capture_library_logs(self) -> None:
        """Send what libraries log at warning and above through this log, as events."""
        handler = _LibraryHandler(self)
        handler.setFormatter(self.formatter)
        root = logging.getLogger()
        root.handlers[:] = [handler]
        root.setLevel(logging.WARNING)


class _LibraryHandler(logging.Handler):
    def __init__(self, log: EventLog) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.write(self.format(record))


def print_line(text: str) -> None:
    """Write a line for people to stderr."""
    sys.stderr.write(text + "\n")
