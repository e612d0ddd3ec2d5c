"""The processes: the main one, which listens, watches and speaks to the outside, and workers that share its port.

Workers are told what to do through a pipe each, not by signals: a signal to the whole group (a terminal's Ctrl-C,
systemd's stop) then counts once. A worker whose pipe ends has lost the main process, and drains.
"""

import contextlib
import errno
import functools
import gc
import mmap
import os
import select
import signal
import socket
import stat
import sys
import time
import traceback
import typing

from .config import ConfigError, Settings, TcpAddress, UnixAddress
from .exchange import Worker
from .inflight import InFlightTable
from .kernel import pin_to_core, prepare_listener, raise_file_limit, run_as_batch
from .log import EventLog
from .notes import configuration_notes
from .record import ABORT, CONNECTIONS, LOST_LINES, Tally, describe_exception, left_in_flight, request_words
from .relay import Bustle
from .server import MAX_OVERFLOW, ProxyServer
from .tls import Contexts, certificate_notes, read_contexts
from .upstream import upstream_pool
from .vocabulary import Cause
from .waiting import Control

_BACKLOG = 4096
_CELL_BYTES = 8
_WORKER_BYTES = len(Tally.NAMES) * _CELL_BYTES
_DRAIN, _END, _RELOAD, _REOPEN, _DUMP = b"D", b"E", b"R", b"O", b"U"
# What a worker reports when it accepts connections; anything else is why it can't.
_SERVES = b"\0"
_SWEEP_EVERY_S = 5.0
_DRAIN_POLL_S = 0.02
# A worker that dies within the first of its start is started again only after the second.
_RIGHT_AFTER_START_S, _RESTART_PAUSE_S = 10.0, 1.0
# What the ending of a request in flight, record included, may take once its time is up.
_END_GRACE_S = 3.0
# How much longer a worker has that does not end by itself, as it is stopped or stuck.
_KILL_AFTER_S = 1.0
_MORE_ROOM = "allow more open files and processes (ulimit -n and -u), or set fewer --workers"


class SharedCounts:
    """The counts of all workers, in memory they share: cells of its own for each, which that worker alone writes."""

    def __init__(self, workers: int) -> None:
        self._memory = mmap.mmap(-1, workers * _WORKER_BYTES)
        self._cells = memoryview(self._memory).cast("Q")
        self._moved_at = memoryview(mmap.mmap(-1, workers * _CELL_BYTES)).cast("d")

    def cells(self, index: int) -> memoryview:
        """Returns: the cells of one worker."""
        width = len(Tally.NAMES)
        return self._cells[index * width : (index + 1) * width]

    def total(self, which: int) -> int:
        """Returns: the sum of ``Tally.NAMES[which]`` over all workers."""
        return sum(self._cells[which :: len(Tally.NAMES)])

    def bustle(self, index: int) -> Bustle:
        """Returns: where one worker tells the others that it is busy."""
        return Bustle(self._moved_at, index)

    def connections(self) -> int:
        """Returns: client connections held by all workers."""
        return self.total(CONNECTIONS)


# -- listening -------------------------------------------------------------------------------------


def open_listeners(settings: Settings) -> tuple[list[socket.socket], str]:
    """Bind and listen, one socket for each worker on TCP, one for all on a unix path.

    Returns: the sockets, and the address as it is logged (the port chosen, for port 0).
    Raises: ConfigError.
    """
    address = settings.listen
    where = f"listen {str(address)!r} ({settings.sources['listen']})"
    if isinstance(address, UnixAddress):
        _check_socket_path(where, address)
    try:
        if isinstance(address, UnixAddress):
            return [_listen_unix(address)], str(address)
        return _listen_tcp(address, settings)
    except OSError as error:
        raise _listen_error(where, error, unix=isinstance(address, UnixAddress)) from error


_LISTEN_HINTS = {
    errno.EADDRINUSE: "another process listens there; stop it, or choose another address (0: a free port)",
    errno.EACCES: "not allowed; ports below 1024 need CAP_NET_BIND_SERVICE",
    errno.EADDRNOTAVAIL: "this machine has no such address; choose one of its own, 0.0.0.0 or [::]",
    errno.EAFNOSUPPORT: "this machine has no such kind of address; choose another one",
    errno.EINVAL: "a link-local address needs its interface, and others do; choose another address",
    errno.EMFILE: _MORE_ROOM,
}
_UNIX_HINTS = {
    errno.EADDRINUSE: "another process listens there; stop it, or choose another path",
    errno.EACCES: "not allowed; the directory must be writable, and a socket that is there already is somebody else's",
    errno.EPROTOTYPE: "another process has a socket of another kind there; choose another path",
    errno.ENOENT: "the directory does not exist, or takes no files; choose another path",
    errno.ENOTDIR: "what should be a directory is none; choose another path",
    errno.ELOOP: "symbolic links lead in a circle; choose another path",
    errno.EROFS: "the file system is read-only; choose a path elsewhere",
    errno.EMFILE: _MORE_ROOM,
}


def _listen_error(where: str, error: OSError, *, unix: bool = False) -> ConfigError:
    hint = (_UNIX_HINTS if unix else _LISTEN_HINTS).get(error.errno or 0, "choose another address")
    if isinstance(error, socket.gaierror):
        hint = "write an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all"
    return ConfigError(f"{where}: {error.strerror or error}; {hint}")


def check_listen(settings: Settings) -> None:
    """Find out whether there is such an address to listen at. Who has it now is not asked. Raises: ConfigError."""
    address = settings.listen
    where = f"listen {str(address)!r} ({settings.sources['listen']})"
    if isinstance(address, UnixAddress):
        _check_socket_path(where, address)
        return
    try:
        family, _, _, _, found = _resolve_listen(address)
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.bind((found[0], 0, *found[2:]))
    except OSError as error:
        raise _listen_error(where, error) from error


def _check_socket_path(where: str, address: UnixAddress) -> None:
    """Refuse a path at which something stands that is no socket. Raises: ConfigError."""
    if not os.path.exists(address.path):
        if os.path.islink(address.path):
            raise ConfigError(f"{where}: is a symbolic link to nothing; remove it, or choose another path")
    elif not stat.S_ISSOCK(os.stat(address.path).st_mode):
        raise ConfigError(f"{where}: what is there is no socket; remove it, or choose another path")


def _resolve_listen(address: TcpAddress) -> tuple[int, int, int, str, typing.Any]:
    found = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    # Of the addresses of a name, such as localhost, that of IPv4: the one that most clients try.
    return next((each for each in found if each[0] == socket.AF_INET), found[0])


def _listen_tcp(address: TcpAddress, settings: Settings) -> tuple[list[socket.socket], str]:
    family, _, _, _, where = _resolve_listen(address)
    dead, user = settings.peer_dead_timeout, settings.tcp_user_timeout
    dead_s, user_s = dead.seconds if dead else None, user.seconds if user else None
    listeners: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        for number in range(settings.workers):
            listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if number:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            prepare_listener(listener, dead_s, user_s, defer=settings.defers_accept)
            listener.bind(where)
            listener.listen(_BACKLOG)
            if not number and settings.workers > 1:
                where = (where[0], listener.getsockname()[1], *where[2:])
                # Only now that it listens: with this from the beginning, a second proxy of the same user, started
                # before or at the same time, would silently share the connections. Now it finds the port taken.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listeners.append(listener)
        stack.pop_all()  # all are good: they stay open
    return listeners, str(TcpAddress(str(where[0]), int(listeners[0].getsockname()[1])))


def _listen_unix(address: UnixAddress) -> socket.socket:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
        trial.setblocking(False)  # or a full queue would hold us
        found = trial.connect_ex(address.path)
    if found == errno.ECONNREFUSED:
        os.unlink(address.path)  # left by a process that did not end in order
    elif found in (0, errno.EAGAIN):
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    elif found != errno.ENOENT:  # which is the usual case: nothing is there yet
        raise OSError(found, os.strerror(found))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address.path)
    os.chmod(address.path, 0o660)
    listener.listen(_BACKLOG)
    return listener


# -- a worker --------------------------------------------------------------------------------------


class WorkerProcess:
    """The life of one worker process: serve, do as it is told, drain."""

    def __init__(
        self,
        index: int,
        settings: Settings,
        log: EventLog,
        listener: socket.socket,
        counts: SharedCounts,
        contexts: Contexts,
        control_fd: int,
        in_flight: InFlightTable,
    ) -> None:
        self.index = index
        self.settings = settings
        self.log = log
        self.control_fd = control_fd
        wake_read, self._wake_write = os.pipe()
        self.control = Control(wake_read)
        self.tally = Tally(counts.cells(index))
        # At once, as this process may be killed; the main process counts its own lines itself.
        log.on_loss = functools.partial(self.tally.add, LOST_LINES)
        self.worker = Worker(
            settings,
            log,
            self.tally,
            self.control,
            upstream_pool(settings, contexts.upstream),
            contexts.server,
            in_flight.slots(index),
            counts.bustle(index),
        )
        self.server = ProxyServer(self.worker, listener, counts.connections)
        self._sweep_at = time.monotonic() + _SWEEP_EVERY_S

    def run(self, report_to: int | None) -> None:
        """Serve until told to stop and all is done. ``report_to`` is told once, when connections are accepted."""
        # Beginning at a core of its own: small proxies side by side are not to share the first one.
        pin_to_core(self.index + os.getppid())
        run_as_batch()
        # What exists now lives as long as the process; the collector need not look at it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 50)
        self.log.capture_library_logs()
        self.server.serve_forever()
        if report_to is not None:
            os.write(report_to, _SERVES)
            os.close(report_to)
        poller = select.poll()
        poller.register(self.control_fd, select.POLLIN)
        while not self._finished():
            try:
                self._tend(poller)
            except Exception as error:  # noqa: BLE001  # a bug in here must not cost the requests in flight
                self.log.event(
                    "error",
                    "worker.error",
                    message=f"worker {self.index} goes on after a bug in its housekeeping: {error!r}",
                    pid=os.getpid(),
                    traceback=traceback.format_exc()[-8192:],
                )
                time.sleep(0.1)

    def _tend(self, poller: select.poll) -> None:
        """Wait for a command and obey it, or do what is due from time to time."""
        draining = self.control.draining
        wait_s = _DRAIN_POLL_S if draining else max(0.0, self._sweep_at - time.monotonic())
        if poller.poll(int(wait_s * 1000) + 1):
            commands = os.read(self.control_fd, 4096)
            if not commands:
                commands = _DRAIN
                poller.unregister(self.control_fd)
                if not draining:
                    self.log.event(
                        "error",
                        "server.drain",
                        message=f"the main process has gone; worker {self.index} drains, and there will be no balance",
                        pid=os.getpid(),
                    )
            for command in dict.fromkeys(commands):  # one said twice is obeyed once
                self._obey(bytes((command,)))
        if not draining and time.monotonic() >= self._sweep_at:
            self._sweep_at = time.monotonic() + _SWEEP_EVERY_S
            self.worker.pool.sweep()
            self.server.tend()
            self.log.tend()

    def _finished(self) -> bool:
        control = self.control
        if not control.draining:
            return False
        if self.server.has_ended():
            return True
        # Everything in flight ends by itself when its time is up; what does not after that is a bug, and must not
        # hold the process.
        overdue_at = control.drain_until + _END_GRACE_S
        return time.monotonic() >= overdue_at

    def _obey(self, command: bytes) -> None:
        if command == _DRAIN:
            self._drain(self.settings.drain_timeout)
        elif command == _END:
            self._drain(0.0)
            self.control.ending = True
        elif command in (_RELOAD, _REOPEN):
            reopened = self.log.reopen()
            if command == _RELOAD:
                self._reload_certificates(reopened=reopened)
        elif command == _DUMP:
            self._dump()

    def _drain(self, seconds: float) -> None:
        control = self.control
        until = time.monotonic() + seconds
        if not control.draining:
            control.drain_until = until
            control.draining = True
            os.write(self._wake_write, b"!")  # and never read: every wait of every thread sees it
            self.server.stop_accepting(_BACKLOG)
        else:
            control.drain_until = min(control.drain_until, until)

    def _reload_certificates(self, *, reopened: bool) -> None:
        try:
            contexts = read_contexts(self.settings)
        except ConfigError as error:
            self.log.event(
                "error", "server.reload", message=f"the old certificates stay in use: {error}", pid=os.getpid()
            )
            return
        self.worker.server_tls = contexts.server
        if contexts.upstream is not None:
            # Connections on lease find the old pool closed when they come back, and are closed then.
            old, self.worker.pool = self.worker.pool, upstream_pool(self.settings, contexts.upstream)
            old.close()
        done = ["log reopened"] if reopened else []
        if contexts.server is not None or contexts.upstream is not None:
            done.append("certificates read anew")
        message = ", ".join(done) or "no log was reopened, and there are no certificates"
        self.log.event("info", "server.reload", message=message, pid=os.getpid())

    def _dump(self) -> None:
        """Log every request in flight, at any --log-level."""
        connections = self.server.snapshot()
        shown = 0
        for connection in connections:
            record = connection.record
            if record is None:
                continue
            shown += 1
            try:
                fields = record.fields(None)
                age_s = time.monotonic() - record.first_at
                fields["duration_s"] = round(age_s, 6)  # and not up to the end of one direction of a tunnel
                words = request_words(*record.method_and_target())
                fields["message"] = f"{words} of client {record.about.client} runs for {age_s:.1f} s"
            except Exception as error:  # noqa: BLE001  # another thread changes what is read here; one line less, not a worker less
                fields = {
                    "message": f"a request in flight changed while it was read: {error!r}",
                    "request_id": record.request_id,
                }
            self.log.answer("request.inflight", **fields)
        self.log.answer(
            "server.inflight",
            message=f"{shown} requests in flight on {len(connections)} connections",
            pid=os.getpid(),
            requests=shown,
            connections=len(connections),
        )


# -- the main process ------------------------------------------------------------------------------


class Supervisor:
    """Starts the workers, passes on what signals mean, starts a worker again that died, and states the balance at the
    end.
    """

    _STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
    _SIGNALS = (*_STOP, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)

    def __init__(
        self, settings: Settings, log: EventLog, listeners: list[socket.socket], where: str, contexts: Contexts
    ) -> None:
        self.settings = settings
        self.log = log
        # Workers inherit them: one that is started again must not find the files half renewed, or newer than those
        # of the others.
        self.contexts = contexts
        self.listeners = listeners
        self.where = where  # the address as it is logged
        self.counts = SharedCounts(settings.workers)
        # Connections beyond the limit have slots, too, while they wait to be told so.
        self.in_flight = InFlightTable(settings.workers, settings.max_connections.value + MAX_OVERFLOW)
        self.pids: dict[int, int] = {}  # pid to index
        self.pipes: dict[int, int] = {}  # index to the writing end of its control pipe
        self.restart_at: dict[int, float] = {}  # index of a worker that has died to when another is started
        self.started_at: dict[int, float] = {}  # index to when the present one was started
        self.lost: dict[int, int] = {}  # index to requests that died with earlier processes of that worker
        self.stopping = False
        self.ending = False  # stopping, and no longer waiting for requests in flight
        self.kill_at: float | None = None  # when workers that have not ended are killed
        self.killed = False  # whether they were
        self.wake = (-1, -1)  # signals arrive here

    def run(self) -> int:
        """Returns: the exit status, when all workers have ended."""
        began_at = time.monotonic()
        try:
            self._hear_signals()
            self._start_all()
        except OSError as error:
            self._tell(_END)
            raise ConfigError(
                f"workers {self.settings.workers} ({self.settings.sources['workers']}): number {len(self.pids) + 1}"
                f" can't be started: {error.strerror}; {_MORE_ROOM}"
            ) from error
        workers = "1 worker" if self.settings.workers == 1 else f"{self.settings.workers} workers"
        self.log.event(
            "info",
            "server.start",
            message=f"listening on {self.where}, upstream {self.settings.upstream}, {workers}",
            pid=os.getpid(),
            listen=self.where,
            workers=sorted(self.pids),
            settings=self.settings.describe(),
        )
        self._log_notes(configuration_notes(self.settings, os.environ))
        notify_systemd("READY=1")
        poller = select.poll()
        poller.register(self.wake[0], select.POLLIN)
        while self.pids or self.restart_at:
            now = time.monotonic()
            due = [*self.restart_at.values()] + ([self.kill_at] if self.kill_at is not None else [])
            if self.log.reopen_at is not None:
                due.append(self.log.reopen_at)
            wait_s = min((at - now for at in due), default=3600.0)
            ready = poller.poll(max(0, int(wait_s * 1000) + 1))
            self.log.tend()  # before anything is written
            if ready:
                for said in _without_repeats(os.read(self.wake[0], 4096), self._STOP):
                    self._handle(said)
            self._reap()
            if self.kill_at is not None and time.monotonic() >= self.kill_at:
                self.kill_at = None
                self.killed = True
                for pid in self.pids:
                    os.kill(pid, signal.SIGKILL)
            for index, at in list(self.restart_at.items()):
                if self.stopping:
                    del self.restart_at[index]
                    self._refuse(index)
                elif time.monotonic() >= at:
                    del self.restart_at[index]
                    self._start_again(index)
        return self._report(began_at)

    def _hear_signals(self) -> None:
        """Let signals arrive at ``wake``, those that came early, too. Raises: OSError where files run out."""
        self.wake = os.pipe()
        for fd in self.wake:
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(self.wake[1], warn_on_full_buffer=False)
        for number in self._SIGNALS:
            signal.signal(number, _ignore_here)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._SIGNALS)

    def _log_notes(self, notes: list[str]) -> None:
        """Log what is worth a look in the configuration."""
        for note in notes:
            self.log.event("warning", "server.note", message=note, pid=os.getpid())

    def _start_all(self) -> None:
        """Start every worker, and wait until all of them serve.

        Raises: OSError where one can't be started, ConfigError where one can't serve.
        """
        reports, report_to = os.pipe()
        with open(reports, "rb") as file:
            try:
                for index in range(self.settings.workers):
                    self._start(index, (reports, report_to))
            finally:
                os.close(report_to)
                said = file.read()  # to its end: each worker has closed its copy, or has died
        missing = self.settings.workers - said.count(_SERVES)
        if missing:
            self._tell(_END)
            why = said.replace(_SERVES, b"").decode("utf-8", "replace") or "killed at its start"
            raise ConfigError(
                f"workers {self.settings.workers} ({self.settings.sources['workers']}): {missing} can't serve: {why};"
                f" {_MORE_ROOM}"
            )

    def _start_again(self, index: int) -> None:
        try:
            self._start(index)
        except OSError as error:
            self.restart_at[index] = time.monotonic() + _RESTART_PAUSE_S
            self.log.event(
                "error",
                "server.resource",
                message=f"worker {index} can't be started, which is tried again every {_RESTART_PAUSE_S:g} s: {error}",
                pid=os.getpid(),
                worker=index,
                exception=describe_exception(error),
            )

    def _start(self, index: int, reports: tuple[int, int] | None = None) -> None:
        """Start a worker. ``reports`` are both ends of the pipe for what comes of it, at the start of all.

        Raises: OSError where files or processes run out.
        """
        read_end, write_end = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal that the child gets while the wakeup descriptor is still this process's would be taken for another.
        signal.pthread_sigmask(signal.SIG_BLOCK, self._SIGNALS)
        try:
            pid = os.fork()
        except OSError:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._SIGNALS)
            os.close(read_end)
            os.close(write_end)
            raise
        if pid == 0:
            status = 1
            try:
                os.close(write_end)
                status = self._be_worker(index, read_end, reports)
            except BaseException as error:  # noqa: BLE001  # a worker that can't run says why before it is gone
                self.log.event(
                    "error",
                    "worker.error",
                    message=f"worker {index} can't go on: {error!r}",
                    pid=os.getpid(),
                    traceback=traceback.format_exc()[-8192:],
                )
            finally:
                # Not sys.exit: what the main process registered to be done at exit is its own to do.
                os._exit(status)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._SIGNALS)
        os.close(read_end)
        os.set_blocking(write_end, False)
        self.pids[pid] = index
        self.pipes[index] = write_end
        self.started_at[index] = time.monotonic()

    def _be_worker(self, index: int, control_fd: int, reports: tuple[int, int] | None) -> int:
        """Let go of what is of the main process, and serve. Called in the new process. Returns: its exit status."""
        report_to = None
        if reports is not None:
            reading, report_to = reports
            os.close(reading)
        for fd in self.wake:
            os.close(fd)
        for other in self.pipes.values():
            os.close(other)  # or a worker would not see the end of the main process
        signal.set_wakeup_fd(-1)
        for number in self._SIGNALS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGCHLD else signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._SIGNALS)
        listener = self.listeners[index % len(self.listeners)]
        for sibling in self.listeners:
            if sibling is not listener:
                sibling.close()  # or, without the main process and its worker, clients would wait there for nobody
        try:
            worker = WorkerProcess(
                index, self.settings, self.log, listener, self.counts, self.contexts, control_fd, self.in_flight
            )
        except OSError as error:
            if report_to is None:
                raise
            os.write(report_to, (error.strerror or str(error)).encode("utf-8", "replace"))
            return 1
        worker.run(report_to)
        return 0

    def _handle(self, number: int) -> None:
        if number in self._STOP:
            if self.stopping:
                self.ending = True
            else:
                self.stopping = True
                notify_systemd("STOPPING=1")
                left = f"{self.settings.drain_timeout:g} s"
                self.log.event(
                    "info",
                    "server.drain",
                    message=f"{signal.Signals(number).name}: no new connections; requests in flight have {left}",
                    pid=os.getpid(),
                )
            drain_s = 0.0 if self.ending else self.settings.drain_timeout
            kill_at = time.monotonic() + drain_s + _END_GRACE_S + _KILL_AFTER_S
            self.kill_at = kill_at if self.kill_at is None else min(self.kill_at, kill_at)
            self._tell(_END if self.ending else _DRAIN)
        elif number == signal.SIGHUP:
            self.log.reopen()
            # Bad files leave the old contexts in use, here as in the workers, each of which logs what is wrong.
            try:
                self.contexts = read_contexts(self.settings)
            except ConfigError as error:
                # The workers may have found them good.
                told = f"a worker that is started again will have the old certificates: {error}"
                self._log_notes([f"{told}; send SIGHUP once more when that is mended"])
            else:
                self._log_notes(certificate_notes(self.settings))
            self._tell(_RELOAD)
        elif number == signal.SIGUSR1:
            self.log.reopen()
            self._tell(_REOPEN)
        elif number == signal.SIGUSR2:
            self._tell(_DUMP)

    def _tell(self, command: bytes) -> None:
        for fd in self.pipes.values():
            try:
                os.write(fd, command)
            except BrokenPipeError:
                continue  # that worker has ended; _reap will find it
            except BlockingIOError:
                continue  # it stands still and hears nothing; the others, and the end, must not wait for it

    def _reap(self) -> None:
        while self.pids:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            index = self.pids.pop(pid, None)
            if index is None:
                continue
            os.close(self.pipes.pop(index))
            how = (
                f"by signal {-os.waitstatus_to_exitcode(status)}"
                if os.WIFSIGNALED(status)
                else f"with status {os.WEXITSTATUS(status)}"
            )
            if self.killed and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                how += " from the main process, as its time in the drain was over"
            left = self._write_records(index, pid, status, how)
            if status or not self.stopping:
                self._mourn(index, pid, status, how, left)

    def _write_records(self, index: int, pid: int, status: int, how: str) -> int:
        """Write the records that a worker can't write any more. Returns: how many there were."""
        cells = Tally(self.counts.cells(index))
        left = self.in_flight.left_by(index)
        overdue = self.stopping and (self.killed or status == 0)
        cause = Cause.SHUTDOWN if overdue else Cause.INTERNAL
        for request in left:
            self.log.event("warning", "request.abort", **left_in_flight(request, cause, pid, how))
            cells.add(ABORT)
        return len(left)

    def _mourn(self, index: int, pid: int, status: int, how: str, left: int) -> None:
        """A worker died unasked: say so, and start another unless all are to end."""
        cells = Tally(self.counts.cells(index))
        counts = cells.counts()
        lost = counts["begun"] - counts["complete"] - counts["reject"] - counts["abort"] - self.lost.get(index, 0)
        cells.set(CONNECTIONS, 0)
        then = "in the drain" if self.stopping else "and is started again"
        lived_s = time.monotonic() - self.started_at[index]
        pause_s = _RESTART_PAUSE_S if lived_s < _RIGHT_AFTER_START_S else 0.0
        self.log.event(
            "error",
            "worker.exit",
            message=(
                f"worker {index} ended {how} {then}; {left} requests in flight ended with it"
                + (f", and {lost} more of which nothing is known" if lost else "")
            ),
            pid=pid,
            worker=index,
            status=os.waitstatus_to_exitcode(status),
            aborted_requests=left,
            lost_requests=lost,
        )
        self.lost[index] = self.lost.get(index, 0) + lost
        self.restart_at[index] = time.monotonic() + pause_s

    def _refuse(self, index: int) -> None:
        """Refuse, for a worker that died and is not started again, what comes to its listener: nobody else would, and
        all that connect while the others drain would wait there.
        """
        if len(self.listeners) > 1:
            with contextlib.suppress(OSError):  # it did so itself, before it died
                self.listeners[index].shutdown(socket.SHUT_RD)

    def _report(self, began_at: float) -> int:
        for number in self._STOP:
            signal.signal(number, signal.SIG_IGN)  # one more has nothing to end, and would change the exit status
        counts = {name: self.counts.total(i) for i, name in enumerate(Tally.NAMES)}
        ended = counts["complete"] + counts["reject"] + counts["abort"]
        balanced = counts["begun"] == ended
        self.log.event(
            "info" if balanced else "error",
            "server.stop",
            message=(
                f"{counts['begun']:,} requests begun = {counts['complete']:,} complete"
                f" + {counts['reject']:,} rejected + {counts['abort']:,} aborted"
                if balanced
                else f"{counts['begun']:,} requests begun, but only {ended:,} ended in a record"
            ),
            pid=os.getpid(),
            requests={name: counts[name] for name in ("begun", "complete", "reject", "abort")},
            balanced=balanced,
            lost_log_lines=counts["lost_lines"] + self.log.lost_lines,
            uptime_s=round(time.monotonic() - began_at, 3),
        )
        return 0


def _without_repeats(numbers: bytes, counted: tuple[int, ...]) -> list[int]:
    """Returns: the signals that have come, in their order, each once but for those of which each counts: a storm of
    reloads must not hold up the stop that comes behind it.
    """
    return [number for at, number in enumerate(numbers) if number in counted or number not in numbers[:at]]


def _ignore_here(number: int, frame: object) -> None:
    """Signals arrive through the wakeup descriptor; a handler must exist for that."""


def notify_systemd(state: str) -> None:
    """Tell systemd how the service stands, where it asked to be told (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect("\0" + path[1:] if path.startswith("@") else path)
            sock.send(state.encode("ascii"))
    except OSError:
        # Nobody listens, or no descriptor is left: the service manager has its own time limit for that, and what is to
        # be told, a stop above all, has to go on.
        return


def check_log_file(settings: Settings) -> bool:
    """Open the log as for writing, if there is one. Returns: whether there is. Raises: ConfigError."""
    try:
        os.close(os.open(settings.log_file, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _log_file_error(settings, error) from error
    return True


def _log_file_error(settings: Settings, error: OSError) -> ConfigError:
    mend = "choose a path that can be written, or - for stderr"
    if error.errno == errno.EISDIR:
        mend = "name a file in it"
    elif error.errno == errno.EMFILE:
        mend = _MORE_ROOM
    elif error.errno == errno.ENXIO:
        mend = "a named pipe needs a reader first, and a socket is no file; start the reader, or choose another path"
    return ConfigError(f"log_file {settings.log_file!r} ({settings.sources['log_file']}): {error.strerror}; {mend}")


def serve(settings: Settings) -> int:
    """Serve until told to stop. Returns: the exit status. Raises: ConfigError for what the environment does not
    allow.
    """
    contexts = read_contexts(settings)
    try:
        log = EventLog(settings.log_file, settings.log_level)
    except OSError as error:
        raise _log_file_error(settings, error) from error
    raise_file_limit()
    listeners, where = open_listeners(settings)
    socket_file = _socket_file(settings)
    try:
        return Supervisor(settings, log, listeners, where, contexts).run()
    finally:
        # A read-only file system, say: the end was in order all the same, and the next start replaces what is left.
        with contextlib.suppress(OSError):
            # A successor may have bound the path meanwhile. Its file is another one: ours exists until it is closed.
            if socket_file is not None and _socket_file(settings) == socket_file:
                os.unlink(socket_file[0])
        for listener in listeners:
            listener.close()


def _socket_file(settings: Settings) -> tuple[str, int, int] | None:
    """Returns: the path of the unix listener and which file is there now; None where there is none."""
    if not isinstance(settings.listen, UnixAddress):
        return None
    try:
        found = os.stat(settings.listen.path)
    except FileNotFoundError:
        return None  # somebody has removed it: then nothing of ours is left to remove
    return settings.listen.path, found.st_dev, found.st_ino
