"""Connections to upstream: urllib3 pools, with the waiting done by the proxy.

urllib3 owns pooling, the check for dropped connections, TLS wrapping and certificate checks. The connect itself is
made here, non-blocking, so that its limit is a limit on the whole and a client that leaves is noticed meanwhile.
``urlopen`` is not used: it costs many times a leased socket, drops trailers, can't do 101, and hides which operation
failed.
"""

import collections
import collections.abc
import contextlib
import errno
import functools
import os
import queue
import select
import socket
import threading
import time
import typing

import urllib3
import urllib3.connection
import urllib3.connectionpool
import urllib3.exceptions

from .aborts import Abort, socket_abort
from .config import Settings, UpstreamUrl
from .endpoint import ANSWER_PATIENCE_S, WRITABLE, AnyEndpoint, Endpoint, TlsEndpoint
from .head import SectionMemory
from .kernel import PeerPulse, prepare_socket
from .masking import path_text
from .tls import UpstreamContext
from .vocabulary import Cause, Operation, Phase, Side

# Idle connections kept for each worker; what a burst opened beyond it is closed after use.
_MAX_IDLE = 256

# Names that are being looked up at once, for all clients of a worker; more wait for one to end.
_LOOKUPS = threading.BoundedSemaphore(64)
# Descriptors that one lookup may take at once: files such as /etc/hosts, a socket for each server that is asked.
_FILES_OF_RESOLVER = 4

# wait(descriptor, events, seconds at most or None) -> whether the descriptor is ready; with -1 for it only time passes.
# Raises Abort for limits and a client that leaves.
ConnectWait = collections.abc.Callable[[int, int, float | None], bool]


def endpoint_name(sock: socket.socket, path: str | None) -> str:
    """Returns: ``ip:port`` or ``unix:path`` of the peer a socket is connected to."""
    if path is not None:
        return f"unix:{path_text(path)}"
    host, port = sock.getpeername()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def upstream_host(url: UpstreamUrl) -> str:
    """Returns: the Host field for ``url``; ``localhost`` for a unix socket, which has no name."""
    if url.scheme == "unix":
        return "localhost"
    host = f"[{url.host}]" if ":" in url.host else url.host
    return host if url.port == (443 if url.scheme == "https" else 80) else f"{host}:{url.port}"


@functools.cache
def _read_numeric(host: str, port: int) -> list[tuple[int, typing.Any]]:
    """Returns: as ``_look_up``; nothing if ``host`` is a name. Kept, as it is the same for each connection."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        return []
    return [(family, address) for family, _, _, _, address in found]


def _look_up(host: str, port: int, wait: ConnectWait) -> list[tuple[int, typing.Any]]:
    """Returns: the addresses of ``host``, as family and socket address. Raises: OSError; Abort as ``wait`` does.

    getaddrinfo can't be told when to give up, so a name is looked up by a thread of its own, which ends when the
    resolver does, whether or not anybody waits for it: hence the bound on how many there are.
    """
    if numeric := _read_numeric(host, port):
        return numeric
    answers: list[list[tuple[int, typing.Any]] | OSError] = []
    while not _LOOKUPS.acquire(blocking=False):
        wait(-1, 0, 0.05)
    try:
        done_fd, end_fd = os.pipe()
    except OSError:
        _LOOKUPS.release()
        raise

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answers.append([(family, address) for family, _, _, _, address in found])
        except OSError as error:
            answers.append(_missing_files(end_fd) or error)
        finally:
            _LOOKUPS.release()
            os.close(end_fd)

    try:
        try:
            threading.Thread(target=ask, name="name lookup", daemon=True).start()
        except RuntimeError:
            ask()  # no more threads: then this one waits, without a limit
        wait(done_fd, select.POLLIN, None)
    finally:
        os.close(done_fd)
    answer = answers[0] if answers else socket.gaierror(socket.EAI_FAIL, f"looking up {host} failed")
    if isinstance(answer, OSError):
        raise answer
    return answer


def _missing_files(fd: int) -> OSError | None:
    """Find out, after a lookup has failed, whether the descriptors that it takes could be had: of a file or a socket
    that it could not open the resolver says no more than that there is no such name. ``fd`` is any that is open.

    Returns: the error of the first that was missing, None if none was.
    """
    with contextlib.ExitStack() as taken:
        try:
            for _ in range(_FILES_OF_RESOLVER):
                taken.callback(os.close, os.dup(fd))
        except OSError as error:
            return error
    return None


def _has_source_address(family: int, address: typing.Any) -> bool:
    """Whether this machine has an address to reach ``address`` from: if so, EADDRNOTAVAIL says that all local ports
    are taken. A UDP socket finds it, sends nothing, and needs no port of those of TCP.
    """
    with socket.socket(family, socket.SOCK_DGRAM) as trial:
        return not trial.connect_ex(address)


class _NoAnswerInTime(Exception):
    """One of several addresses of upstream did not answer in its share of --upstream-connect-timeout."""


class _LeasedConnection:
    """What both kinds of connection add to urllib3's: a connect under the proxy's limits, and an endpoint for the
    relay.
    """

    # Set by the pool right after construction.
    url: UpstreamUrl
    settings: Settings
    memory: SectionMemory
    endpoint: AnyEndpoint | None
    name: str
    _wait: ConnectWait | None
    _probe: typing.Any
    sock: typing.Any

    def adopt(self, url: UpstreamUrl, settings: Settings, sections: SectionMemory) -> None:
        """Take what urllib3's constructors have no room for."""
        self.url = url
        self.settings = settings
        self.memory = SectionMemory(sections)
        self.endpoint = None
        self.name = ""
        self._wait = None
        self._probe = None

    @property
    def is_connected(self) -> bool:
        """Asked by urllib3 2 before a connection is used again: whether it is open and has nothing to read, with a
        kept poll object.
        """
        return self.sock is not None and not self._probe.poll(0)

    @property
    def is_open(self) -> bool:
        """Whether this connection was used before and is connected still."""
        return self.sock is not None

    def close(self) -> None:
        """Close the socket. urllib3 does so, too, before it uses a connection anew that was dropped."""
        self.endpoint = None
        super().close()  # type: ignore[misc]  # urllib3's

    def open(self, wait: ConnectWait) -> None:
        """Connect, TLS handshake included, and make the endpoint. Raises: Abort with side upstream, or as ``wait``."""
        self._wait = wait
        try:
            self.connect()  # type: ignore[attr-defined]  # urllib3's: it comes back through _new_conn
        finally:
            self._wait = None  # which holds this connection in turn
        watched = self.settings.peer_dead_timeout is not None and self.url.scheme != "unix"
        pulse = PeerPulse() if watched else None
        if isinstance(self.sock, TlsEndpoint):
            endpoint: AnyEndpoint = self.sock
            endpoint.name = self.name
            endpoint.pulse = pulse
            self._shake_hands(self.sock, wait)
        else:
            self.sock.setblocking(True)
            endpoint = Endpoint(self.sock, Side.UPSTREAM, self.name, pulse)
            endpoint.become_patient(ANSWER_PATIENCE_S)
        self.endpoint = endpoint
        self.memory = SectionMemory(self.memory.shared)
        self._probe = select.poll()
        self._probe.register(endpoint.fd, select.POLLIN)

    def _shake_hands(self, endpoint: TlsEndpoint, wait: ConnectWait) -> None:
        try:
            while not endpoint.handshake():
                wait(endpoint.fd, endpoint.read_event, None)
        except OSError as error:
            limit = self.settings.dead_peer_limit
            raise socket_abort(Side.UPSTREAM, Phase.TLS_HANDSHAKE, Operation.HANDSHAKE, error, limit) from error

    def _new_conn(self) -> socket.socket:
        """Called by urllib3's ``connect``. Returns: a connected, non-blocking socket. Raises: Abort."""
        wait = self._wait
        assert wait is not None
        began_at = time.monotonic()
        first_error: OSError | None = None
        ports_used_up = False
        addresses = self._addresses(wait)
        whole = self.settings.upstream_connect_timeout
        for number, (family, address) in enumerate(addresses):
            # An address that says nothing may take its share of the time, so that the others are asked, too.
            share_s = None
            if whole is not None and number < len(addresses) - 1:
                share_s = max(0.0, began_at + whole.seconds - time.monotonic()) / (len(addresses) - number)
            try:
                sock = self._connect(family, address, wait, share_s)
            except _NoAnswerInTime:
                continue  # never of the last address: that one ends in a connection, its own error, or the limit
            except OSError as error:
                if first_error is None:
                    first_error = error.with_traceback(None)  # which would hold on to this frame, and the frame to it
                    ports_used_up = error.errno == errno.EADDRNOTAVAIL and _has_source_address(family, address)
                continue
            return sock
        assert first_error is not None  # getaddrinfo gives at least one address, or raises
        # Keepalive probes are for connections that stand: without the user timeout it is the kernel's own patience.
        limit = self.settings.tcp_user_timeout
        abort = socket_abort(Side.UPSTREAM, Phase.CONNECT, Operation.CONNECT, first_error, limit)
        if ports_used_up:
            abort = Abort(Side.PROXY, Phase.CONNECT, Operation.CONNECT, Cause.RESOURCE, original=first_error)
        if abort.limit is not None:
            abort.elapsed_s = time.monotonic() - began_at
        if abort.cause is Cause.UNREACHABLE and self.url.scheme == "unix":
            abort.error_type = "destination_unavailable"  # no address is involved that could be unroutable
        raise abort from first_error

    def _addresses(self, wait: ConnectWait) -> list[tuple[int, typing.Any]]:
        url = self.url
        if url.scheme == "unix":
            return [(socket.AF_UNIX, url.path)]
        try:
            return _look_up(url.host, url.port, wait)
        except OSError as error:
            raise socket_abort(Side.UPSTREAM, Phase.CONNECT, Operation.CONNECT, error) from error

    def _connect(self, family: int, address: typing.Any, wait: ConnectWait, at_most_s: float | None) -> socket.socket:
        """Raises: _NoAnswerInTime after ``at_most_s``; OSError; Abort as ``wait`` does."""
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            if family != socket.AF_UNIX:
                dead, user = self.settings.peer_dead_timeout, self.settings.tcp_user_timeout
                prepare_socket(sock, dead.seconds if dead else None, user.seconds if user else None)
            while True:
                number = sock.connect_ex(address)
                if number != errno.EAGAIN:
                    break
                # A unix listener whose backlog is full; poll has no event for it.
                wait(-1, 0, 0.01)
            if number == errno.EINPROGRESS:
                if not wait(sock.fileno(), WRITABLE, at_most_s):
                    raise _NoAnswerInTime
                number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number:
                raise OSError(number, os.strerror(number))
            # Raises where upstream has reset the connection by now.
            self.name = endpoint_name(sock, self.url.path if self.url.scheme == "unix" else None)
        except BaseException:
            sock.close()
            raise
        return sock


# -- urllib3's private names; an upgrade breaks here or nowhere. ``_new_conn`` above is one of them.


class PlainConnection(_LeasedConnection, urllib3.connection.HTTPConnection):
    """A connection over TCP or a unix socket."""


class TlsConnection(_LeasedConnection, urllib3.connection.HTTPSConnection):
    """A connection under TLS; ``sock`` is a ``TlsEndpoint``, made by ``UpstreamContext.wrap_socket``."""


AnyConnection = PlainConnection | TlsConnection


class IdleConnections:
    """The part of ``queue.LifoQueue`` that a pool with ``block=False`` uses, without its locks: a deque's own
    operations are atomic.

    A lease and its return cost a fifth of what they cost with the condition variables of a queue that can be waited
    for.
    """

    def __init__(self, maxsize: int) -> None:
        self._items: collections.deque[typing.Any] = collections.deque()
        self._maxsize = maxsize

    def get(self, block: bool = False, timeout: float | None = None) -> typing.Any:
        """Returns: the connection put last. Raises: queue.Empty."""
        try:
            return self._items.pop()
        except IndexError:
            raise queue.Empty from None

    def put(self, item: typing.Any, block: bool = False, timeout: float | None = None) -> None:
        """Keep a connection; None, with which urllib3 fills a new pool, is not worth keeping. Raises: queue.Full."""
        if item is None:
            return
        if len(self._items) >= self._maxsize:
            raise queue.Full
        self._items.append(item)

    def full(self) -> bool:
        """Whether no more connections are kept."""
        return len(self._items) >= self._maxsize

    def qsize(self) -> int:
        """Returns: how many connections are kept."""
        return len(self._items)


class _LeasingPool:
    """What both pools add to urllib3's: lease, release and sweep."""

    url: UpstreamUrl
    settings: Settings
    sections: SectionMemory  # what all connections remember of their responses
    pool: typing.Any

    def lease(self, *, fresh: bool = False) -> AnyConnection:
        """Take a connection: one kept from before if it is still good, else, or if ``fresh``, a new one that is not
        connected.
        """
        try:
            connection = self._new_conn() if fresh else self._get_conn()  # type: ignore[attr-defined]  # urllib3's
        except urllib3.exceptions.ClosedPoolError:
            connection = self._new_conn()  # type: ignore[attr-defined]  # a reload has replaced this pool just now
        if not hasattr(connection, "url"):
            connection.adopt(self.url, self.settings, self.sections)
        return connection  # type: ignore[no-any-return]  # urllib3 makes what ConnectionCls says

    def release(self, connection: AnyConnection) -> None:
        """Give back a connection that stands between two exchanges."""
        pool = self.pool  # a reload may close it meanwhile
        if pool is None or pool.full():
            connection.close()
        else:
            self._put_conn(connection)  # type: ignore[attr-defined]  # urllib3's

    def sweep(self) -> None:
        """Close kept connections that upstream has closed, so that they do not hold descriptors until they are
        leased.
        """
        pool = self.pool
        kept = []
        while pool is not None:
            try:
                connection = pool.get()
            except queue.Empty:
                break
            if connection.is_connected:
                kept.append(connection)
            else:
                connection.close()
        for connection in reversed(kept):
            self.release(connection)


class UpstreamPool(_LeasingPool, urllib3.connectionpool.HTTPConnectionPool):
    """Connections to an ``http://`` or ``unix://`` upstream."""

    ConnectionCls = PlainConnection
    QueueCls = IdleConnections  # type: ignore[assignment]  # it has what a pool with block=False uses


class TlsUpstreamPool(_LeasingPool, urllib3.connectionpool.HTTPSConnectionPool):
    """Connections to an ``https://`` upstream."""

    ConnectionCls = TlsConnection
    QueueCls = IdleConnections  # type: ignore[assignment]  # it has what a pool with block=False uses


AnyPool = UpstreamPool | TlsUpstreamPool


def upstream_pool(settings: Settings, context: UpstreamContext | None) -> AnyPool:
    """Make the pool for the upstream that ``settings`` name. Safe from any thread."""
    url = settings.upstream
    pool: AnyPool
    if context is not None:
        pool = TlsUpstreamPool(url.host, url.port, maxsize=_MAX_IDLE, ssl_context=context, cert_reqs="CERT_REQUIRED")
    else:
        pool = UpstreamPool(url.host or "localhost", url.port or None, maxsize=_MAX_IDLE)
    pool.url = url
    pool.settings = settings
    pool.sections = SectionMemory()
    return pool
