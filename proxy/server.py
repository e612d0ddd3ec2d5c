"""Accepting client connections: a ``ThreadingHTTPServer`` whose threads wait in ``accept`` themselves and are used
again.

Decides which thread serves a connection and how many there may be. What happens on a connection is decided in
``exchange``.
"""

import collections.abc
import errno
import http.server
import os
import socket
import threading
import time
import typing

from .aborts import Abort
from .exchange import ClientConnection, Worker, log_connection_abort
from .kernel import socket_evidence
from .masking import printable
from .record import CONNECTIONS, describe_exception
from .vocabulary import Cause, Phase, Side

# A thread that has nothing to do waits in accept; more than this many would only take memory.
_MAX_IDLE_THREADS = 64
# Connections beyond --max-connections that are told so with a 503; what comes beyond these is closed at once.
MAX_OVERFLOW = 64
# Python frames are on the heap; the stack is for OpenSSL and the resolver.
_STACK_BYTES = 512 * 1024
_ACCEPT_PAUSE_S = 0.1


class _Listener(socket.socket):
    """A listening socket that keeps its family and type: ``accept`` asks for both each time, and to make enumerations
    of the numbers takes 2.5 µs.
    """

    __slots__ = ("family", "type")

    def __init__(self, listener: socket.socket) -> None:
        """Take over the descriptor of ``listener``."""
        family, kind = listener.family, listener.type
        super().__init__(family, kind, listener.proto, fileno=listener.detach())
        self.family = family  # type: ignore[misc]  # a property there
        self.type = kind  # type: ignore[misc]


class ProxyServer(http.server.ThreadingHTTPServer):
    """Serves one listening socket in one process.

    Waiting threads block in ``accept`` (the kernel wakes one for each connection), so that no hand-over between
    threads is on the way of a request; whoever takes the last waiting place starts another thread first.
    """

    def __init__(
        self, worker: Worker, listener: socket.socket, all_connections: collections.abc.Callable[[], int]
    ) -> None:
        """Take over ``listener``, which listens already. ``all_connections`` counts the client connections of all
        workers.
        """
        super().__init__(("", 0), http.server.BaseHTTPRequestHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = _Listener(listener)
        self.worker = worker
        self.is_unix = self.socket.family == socket.AF_UNIX
        self._all_connections = all_connections
        self._max_connections = worker.settings.max_connections.value
        self._lock = threading.Lock()  # guards _idle, _threads, _queued, _overflow, _stopped
        self.connections: set[ClientConnection] = set()
        self._idle = 0
        self._threads = 0
        self._queued = 0  # connections accepted while stopping, each on a thread of its own
        self._overflow = 0
        self._stopped = False
        self._complained_at = 0.0

    # -- threads -----------------------------------------------------------------------------------

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Start serving; returns at once, as the threads accept by themselves."""
        threading.stack_size(_STACK_BYTES)
        self._start_thread()

    def tend(self) -> None:
        """Start a thread if none waits for connections: an earlier start may have failed."""
        with self._lock:
            nobody_waits = self._idle == 0 and not self._stopped
        if nobody_waits:
            self._start_thread()

    def _start_thread(self) -> None:
        with self._lock:
            self._threads += 1
            self._idle += 1
            number = self._threads
        try:
            threading.Thread(target=self._accept_connections, name=f"connection-{number}", daemon=True).start()
        except RuntimeError as error:
            with self._lock:
                self._threads -= 1
                self._idle -= 1
            self._complain("no more threads can be started; connections wait until one is free", error)

    def _accept_connections(self) -> None:
        """What each thread does: accept a connection, serve it to its end, and again."""
        while True:
            try:
                sock, address = self.get_request()
            except OSError as error:
                if self._stopped or error.errno == errno.EINVAL:
                    break  # the listener was shut: by this worker, or by another one that shares it
                # EMFILE and its kin pass when others close something; a connection that ended in the queue is no
                # error at all.
                if isinstance(error, ConnectionError):
                    continue
                if not isinstance(error, BlockingIOError):  # or a worker that shares the listener is about to shut it
                    self._complain("a connection could not be accepted", error)
                time.sleep(_ACCEPT_PAUSE_S)
                continue
            with self._lock:
                self._idle -= 1
                is_last = self._idle == 0 and not self._stopped
            if is_last:
                self._start_thread()
            self.process_request(sock, address)
            with self._lock:
                if self._stopped or self._idle >= _MAX_IDLE_THREADS:
                    self._threads -= 1
                    return
                self._idle += 1
        with self._lock:
            self._idle -= 1
            self._threads -= 1

    def process_request(self, request: typing.Any, client_address: typing.Any) -> None:
        """Serve one connection in the calling thread."""
        tally = self.worker.tally
        tally.add(CONNECTIONS)
        overflow = self._all_connections() > self._max_connections
        if overflow:
            tally.add(CONNECTIONS, -1)  # it is not held, and must not keep others out while it is told so
        try:
            if not overflow:
                self._serve(request, client_address, overflow=False)
            elif self._enter_overflow():
                try:
                    self._serve(request, client_address, overflow=True)
                finally:
                    with self._lock:
                        self._overflow -= 1
            else:
                self._turn_away(request, client_address)
        except Exception as error:  # noqa: BLE001  # a bug before anything was served: logged, and the thread lives on
            self._log_bug(request, client_address, error, None)
        finally:
            if not overflow:
                tally.add(CONNECTIONS, -1)

    def _name(self, address: typing.Any) -> tuple[str, str]:
        """Returns: the client's name for the log, and its address for X-Forwarded-For."""
        if self.is_unix:
            return str(self.worker.settings.listen), "unknown"
        host, port = address[0], address[1]
        host = host.removeprefix("::ffff:") if "." in host else host
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}", host

    def _serve(self, sock: socket.socket, address: typing.Any, *, overflow: bool) -> None:
        name, host = self._name(address)
        connection = ClientConnection(self.worker, sock, name, host, overflow=overflow)
        self.connections.add(connection)  # one operation each, which no other thread can come into
        try:
            connection.serve()
        except Exception as error:  # noqa: BLE001  # a bug outside of any request: logged, and the thread lives on
            self._log_bug(sock, address, error, connection)
        finally:
            self.connections.discard(connection)

    def _enter_overflow(self) -> bool:
        with self._lock:
            if self._overflow >= MAX_OVERFLOW:
                return False
            self._overflow += 1
            return True

    def _turn_away(self, sock: socket.socket, address: typing.Any) -> None:
        """Close a connection for which there is no place even to be told so. One ``connection.abort`` says it."""
        evidence = socket_evidence(sock)
        sock.close()
        limit = self.worker.settings.max_connections
        name, _ = self._name(address)
        message = f"{limit} closed a connection of client {name} unread: too many others wait for their 503"
        abort = Abort(Side.PROXY, Phase.REQUEST_HEAD, None, Cause.LIMIT, limit=limit)
        log_connection_abort(self.worker, abort, message, self.worker.next_id(), name, 0.0, evidence)

    def _log_bug(
        self, sock: socket.socket, address: typing.Any, error: Exception, connection: ClientConnection | None
    ) -> None:
        """A bug outside of any request is one ``connection.abort``, with the connection closed."""
        evidence = socket_evidence(sock)
        sock.close()
        if isinstance(error, MemoryError):
            cause, message = Cause.RESOURCE, "the proxy ran out of memory, which ended a connection"
        else:
            what = printable(repr(error).encode("utf-8", "backslashreplace"))[:500]
            cause, message = Cause.INTERNAL, f"a bug in the proxy ended a connection: {what}"
        abort = Abort(Side.PROXY, Phase.REQUEST_HEAD, None, cause, original=error)
        client_id = connection.connection_id if connection is not None else self.worker.next_id()
        duration_s = time.monotonic() - connection.began_at if connection is not None else 0.0
        name, _ = self._name(address)
        log_connection_abort(self.worker, abort, message, client_id, name, duration_s, evidence)

    def _complain(self, what: str, error: BaseException) -> None:
        """Log that resources run out, at most once a second."""
        now = time.monotonic()
        if now - self._complained_at >= 1.0:
            self._complained_at = now
            self.worker.log.event(
                "error",
                "server.resource",
                message=f"{what}: {error}",
                pid=self.worker.pid,
                exception=describe_exception(error),
            )

    # -- the end -----------------------------------------------------------------------------------

    def stop_accepting(self, backlog: int) -> None:
        """Serve what the kernel has queued, at most ``backlog``, then refuse. Connections that are open go on."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
        os.set_blocking(self.socket.fileno(), False)
        for _ in range(backlog + 1):  # more have come since
            try:
                sock, address = self.socket.accept()
            except OSError:
                break  # the queue is empty
            with self._lock:
                self._queued += 1
            try:
                threading.Thread(target=self._serve_queued, args=(sock, address), daemon=True).start()
            except RuntimeError as error:
                with self._lock:
                    self._queued -= 1
                sock.close()
                self._complain("no more threads can be started; a connection from the queue was closed unread", error)
        try:
            # Wakes the threads that wait in accept.
            self.socket.shutdown(socket.SHUT_RD)
        except OSError:
            return  # a listener of another worker's as well, and that one was first

    def _serve_queued(self, sock: socket.socket, address: typing.Any) -> None:
        try:
            self.process_request(sock, address)
        finally:
            with self._lock:
                self._queued -= 1

    def has_ended(self) -> bool:
        """Whether no thread accepts or serves any more, after ``stop_accepting``.

        The connections alone do not tell: one may have been accepted and not be among them yet.
        """
        with self._lock:
            return self._stopped and not self._threads and not self._queued

    def snapshot(self) -> list[ClientConnection]:
        """Returns: the connections being served."""
        return list(self.connections)  # one operation as well
