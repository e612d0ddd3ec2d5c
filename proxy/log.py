"""One JSON line for each event, whole or not at all, to a file or to stderr.

A line is one ``write``. Where the file can't be written, the loss is counted and the line goes to stderr; a transfer
never waits for its log for longer than a moment, and never fails because of it. The file is opened anew on request,
for log rotation.
"""

import collections.abc
import contextlib
import errno
import fcntl
import json
import logging
import mmap
import os
import select
import socket
import stat
import threading
import time
import typing

from .masking import path_text

try:
    import pythonjsonlogger.json

    _BaseFormatter: typing.Any = pythonjsonlogger.json.JsonFormatter
except ModuleNotFoundError:  # python-json-logger before 3.1, as in Debian 12
    import pythonjsonlogger.jsonlogger

    _BaseFormatter = pythonjsonlogger.jsonlogger.JsonFormatter  # type: ignore[attr-defined,unused-ignore]  # as the release has it

SCHEMA_VERSION = 1
MAX_LINE = 32 * 1024
LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
# How long one line may wait for a pipe whose reader does not read, or for its turn.
_PATIENCE_S = 1.0
# And for its turn where the reader, or who holds the lock, did not move before.
_SHORT_PATIENCE_S = 0.05
# How often it is tried again to open the file anew.
_REOPEN_EVERY_S = 5.0
# A line that is lost so long after the last one is the first of another outage.
_OUTAGE_S = 1.0

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


class SharedState:
    """What all processes that write to one log know of it: a lock between them, and how the last write ended."""

    def __init__(self) -> None:
        self._lock_fd = os.memfd_create("log-lock", os.MFD_CLOEXEC) if hasattr(os, "memfd_create") else None
        self._cells = mmap.mmap(-1, 2)

    @property
    def torn(self) -> bool:
        """Whether a part of a line stands at the end: the next line must not be glued to it."""
        return self._cells[0] != 0

    @torn.setter
    def torn(self, value: bool) -> None:
        self._cells[0] = value

    @property
    def stuck(self) -> bool:
        """Whether the reader of a pipe had not read for too long, or a process had not let go of the lock: nobody waits
        for that again until it does.
        """
        return self._cells[1] != 0

    @stuck.setter
    def stuck(self, value: bool) -> None:
        self._cells[1] = value

    @contextlib.contextmanager
    def locked(self, until: float) -> collections.abc.Iterator[None]:
        """Keep other processes out; threads of this one need a lock besides, as lockf does not hold them apart.

        Raises: BlockingIOError if another process has not let go of it by ``until``: it was stopped there, say.
        """
        if self._lock_fd is None:
            yield
            return
        while True:
            try:
                fcntl.lockf(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() >= until:
                    self.stuck = True
                    raise BlockingIOError(errno.EAGAIN, "another process does not let go of the log") from None
                time.sleep(0.0005)
        try:
            yield
        finally:
            fcntl.lockf(self._lock_fd, fcntl.LOCK_UN)


class LineFile:
    """An open file that takes whole lines.

    A regular file takes each in one appending write. For a pipe, a socket or a terminal, a lock that all workers share
    keeps a line larger than the kernel's atomic size together, and a reader that has stopped costs a line, not a
    transfer.
    """

    def __init__(self, fd: int, shared: SharedState) -> None:
        """Take over ``fd``, unless it is stderr."""
        self.is_regular = stat.S_ISREG(os.fstat(fd).st_mode)
        if self.is_regular:
            # A shell's "2> FILE" writes at a position of its own: where the file has become shorter (a full disk,
            # copytruncate), the next line would begin with NULs.
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)
        self.fd, self._waits = (fd, False) if self.is_regular else _private_description(fd)
        # Of a socket, such as journald's, each call says for itself that it must not wait.
        self._socket = socket.socket(fileno=os.dup(self.fd)) if stat.S_ISSOCK(os.fstat(self.fd).st_mode) else None
        self._shared = shared
        self._lock = threading.Lock()  # guards the order of writes, and torn and stuck against the other threads

    def write(self, data: bytes) -> None:
        """Write one line. Raises: OSError if it could not be written whole."""
        if self.is_regular:
            if self._shared.torn:
                self._begin_line()
            written = os.write(self.fd, data)
            if written != len(data):
                self._take_back(data[:written])
                raise OSError(errno.ENOSPC, "only a part of the line fit")
            return
        with self._alone():
            self._write_waiting(data)

    @contextlib.contextmanager
    def _alone(self) -> collections.abc.Iterator[None]:
        """Keep out threads and processes. Raises: BlockingIOError if that takes too long."""
        patience_s = _SHORT_PATIENCE_S if self._shared.stuck else _PATIENCE_S
        until = time.monotonic() + patience_s
        if not self._lock.acquire(timeout=patience_s):
            raise BlockingIOError(errno.EAGAIN, "too many lines wait for the log")
        try:
            with self._shared.locked(until):
                yield
        finally:
            self._lock.release()

    def _begin_line(self) -> None:
        with self._alone():
            if self._shared.torn:
                os.write(self.fd, b"\n")
                self._shared.torn = False

    def _take_back(self, part: bytes) -> None:
        """A full disk took a part of a line: remove it again, or at least keep it apart from the next one."""
        try:
            reader = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                begin = os.fstat(reader).st_size - len(part)
                if begin >= 0 and os.pread(reader, len(part), begin) == part:
                    os.ftruncate(self.fd, begin)
                    return
            finally:
                os.close(reader)
        except OSError:
            pass  # it may not be read, say: then the part stays, as a line of its own
        self._shared.torn = True

    def _write_waiting(self, data: bytes) -> None:
        shared = self._shared
        give_up_at = time.monotonic() + (0.0 if shared.stuck else _PATIENCE_S)
        poller = select.poll()
        poller.register(self.fd, select.POLLOUT)
        view = memoryview(b"\n" + data if shared.torn else data)
        while view:
            wait_s = max(0.0, give_up_at - time.monotonic())
            if not poller.poll(wait_s * 1000):
                shared.stuck = True
                raise BlockingIOError(errno.EAGAIN, "nobody reads the log")
            try:
                if self._socket is not None:
                    count = self._socket.send(view, socket.MSG_DONTWAIT)
                else:
                    # Where a write may wait inside the kernel, no more than poll has promised room for.
                    count = os.write(self.fd, view[: select.PIPE_BUF] if self._waits else view)
            except BlockingIOError:
                # poll promises one page; this line is larger than what is free.
                if time.monotonic() >= give_up_at:
                    shared.stuck = True
                    raise
                time.sleep(0.005)
                continue
            view = view[count:]
            shared.torn = bool(view)
            give_up_at = time.monotonic() + _PATIENCE_S
        shared.stuck = False

    def replace(self, fd: int) -> None:
        """Write to another open file from now on, which is taken over. Safe while other threads write."""
        fresh = LineFile(fd, self._shared)
        # The number stays: a thread may be about to write to it, and must not find another file under it.
        os.dup2(fresh.fd, self.fd, inheritable=False)
        os.close(fresh.fd)
        self.is_regular, self._waits, self._socket = fresh.is_regular, fresh._waits, fresh._socket
        self._shared.torn = False


def _private_description(fd: int) -> tuple[int, bool]:
    """Returns: a descriptor for the same pipe, terminal or socket, and whether its writes may wait."""
    # O_NONBLOCK belongs to the open file, which others (a shell) share with us; opened anew, it is ours alone. A
    # socket can't be opened that way and stays as it is. Nor can another user's pipe.
    try:
        private = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return fd, os.get_blocking(fd)
    if fd > 2:
        os.close(fd)
    return private, False


class EventLog:
    """Where events go: level, file, and what happens when it can't be written. Safe from any thread."""

    def __init__(self, path: str, level: str) -> None:
        """Open ``path`` (``-`` is stderr). Raises: OSError if it can't be opened."""
        self.path = path
        self.threshold = LEVELS[level]
        self.info_enabled = self.threshold <= LEVELS["info"]
        self.formatter = RecordFormatter()
        self.lost_lines = 0
        self.on_loss: collections.abc.Callable[[], None] | None = None  # called for each lost line
        self._lock = threading.Lock()  # guards lost_lines and _lost_at
        self._lost_at = -_OUTAGE_S
        self._removed = False  # the file has no name any more, and could not be made anew
        self._nameless = False  # it never had one
        self.reopen_at: float | None = None  # when to try it again, as the file could not be opened anew
        fd = 2 if path == "-" else self._open()
        self._stderr = LineFile(2, SharedState())
        self._file = self._stderr if path == "-" else LineFile(fd, SharedState())

    def _open(self) -> int:
        # O_NONBLOCK: a named pipe that nobody reads is an error, and not an endless wait.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(self.path, flags, 0o640)

    def event(self, level: str, event: str, **fields: object) -> None:
        """Write one event. Never raises for the file's sake."""
        if LEVELS[level] >= self.threshold:
            self.write(self.formatter.line(level, event, fields))

    def answer(self, event: str, **fields: object) -> None:
        """Write one event at level info, whatever the threshold: somebody asked for it."""
        self.write(self.formatter.line("info", event, fields))

    def write(self, line: str) -> None:
        """Write one finished line. Raises nothing: a transfer must not fail because of its log."""
        data = line.encode("ascii")
        try:
            if self._removed:
                raise FileNotFoundError(errno.ENOENT, "the file was removed, and can't be made anew")
            self._file.write(data)
        except Exception as error:  # noqa: BLE001  # a bug in here has no other log to be told to
            self._lose(data, error)

    def _lose(self, data: bytes, error: Exception) -> None:
        with self._lock:
            self.lost_lines += 1
            now = time.monotonic()
            is_told = self.lost_lines % 1000 == 0 or now - self._lost_at >= _OUTAGE_S
            self._lost_at = now
        if self.on_loss is not None:
            self.on_loss()
        if self._file is self._stderr:
            return
        try:
            if is_told:
                path = path_text(self.path)
                text = f"{path} can't be written ({error}); log lines go to stderr, {self.lost_lines} so far"
                self._stderr.write(self.formatter.line("error", "log.lost", {"message": text}).encode("ascii"))
            self._stderr.write(data)
        except OSError:
            # Neither the file nor stderr takes the line: counting it, above, is all that is left to do.
            return

    def reopen(self) -> bool:
        """Open the file anew, as after rotation. If that fails the old one stays in use, unless nobody could ever read
        it.

        Returns: whether there is a file, and it was opened anew. If not, an event says why.
        """
        if self.path == "-":
            return False
        error = self._reopen()
        if error is None:
            return True
        meanwhile = "lines go to stderr, as the old file was removed" if self._removed else "the old file stays in use"
        text = f"{path_text(self.path)} can't be opened, {meanwhile}; it is tried again every few seconds: {error}"
        self.event("error", "log.reopen", message=text, pid=os.getpid())
        return False

    def tend(self) -> None:
        """Open the file anew where that is overdue: it could not be done when it was asked for, and whoever rotates
        asks but once; or the file was removed without a word, and nobody would ever see what is written to it.
        """
        if self.reopen_at is not None:
            if time.monotonic() >= self.reopen_at and self._reopen() is None:
                self.event("info", "log.reopen", message=f"{path_text(self.path)} was opened at last", pid=os.getpid())
        elif self.path != "-" and not self._nameless and self._is_removed() and self.reopen():
            self._nameless = self._is_removed()  # it has no name by design: /dev/stdout may lead to such a file
            if not self._nameless:
                text = f"{path_text(self.path)} was removed, and is made anew; lines of the last seconds went with it"
                self.event("warning", "log.reopen", message=text, pid=os.getpid())

    def _is_removed(self) -> bool:
        return self._file.is_regular and os.fstat(self._file.fd).st_nlink == 0

    def _reopen(self) -> OSError | None:
        """Returns: why the file could not be opened anew; None if it was."""
        try:
            self._file.replace(self._open())
        except OSError as error:
            self._removed = self._is_removed()
            self.reopen_at = time.monotonic() + _REOPEN_EVERY_S
            return error
        self._removed = False
        self.reopen_at = None
        return None

    def capture_library_logs(self) -> None:
        """Send what libraries log at warning and above through this log, as events."""
        handler = _LibraryHandler(self)
        handler.setFormatter(self.formatter)
        root = logging.getLogger()
        root.handlers[:] = [handler]
        root.setLevel(max(logging.WARNING, self.threshold))


class _LibraryHandler(logging.Handler):
    def __init__(self, log: EventLog) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.write(self.format(record))
