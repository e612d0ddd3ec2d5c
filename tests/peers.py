"""Peers of the proxy: clients and upstreams that behave exactly as a script says, on real sockets, and remember what
they saw.

A script is a function of a ``Wire``, one connected socket, plain or under TLS. ``Upstream`` runs one for each
connection; ``connect`` gives a test a wire of its own, for the client's part. Every wait has an end: a peer that
hangs fails its test instead of stopping it.
"""

import collections.abc
import contextlib
import dataclasses
import hashlib
import os
import select
import socket
import ssl
import struct
import tempfile
import threading
import time
import types
import typing

# Of whoever waits for the other side, be it between two requests: a busy machine may take long for a test.
PATIENCE_S = 30.0
_KEPT = 4 * 1024 * 1024
_READ = 256 * 1024
_TLS_CHUNK = 128 * 1024


class PeerGone(Exception):
    """The other side ended the connection where the script wanted to go on."""


class Tape:
    """What passed in one direction: all octets up to some MiB, and count and digest of all."""

    def __init__(self) -> None:
        self.octets = bytearray()
        self.count = 0
        self._hash = hashlib.sha256()

    def add(self, octets: bytes | memoryview) -> None:
        """Note octets that passed."""
        self.count += len(octets)
        self._hash.update(octets)
        if len(self.octets) < _KEPT:
            self.octets += octets

    @property
    def digest(self) -> str:
        """Returns: SHA-256 of all that passed."""
        return self._hash.hexdigest()

    def __bytes__(self) -> bytes:
        assert self.count == len(self.octets), "too much passed to keep all of it"
        return bytes(self.octets)


@dataclasses.dataclass
class Response:
    """One response, as the raw octets had it."""

    status: int
    reason: bytes
    fields: list[tuple[bytes, bytes]]
    body: bytes = b""
    trailers: list[tuple[bytes, bytes]] = dataclasses.field(default_factory=list)
    whole: bool = False  # whether the framing said that this was all; never true for one that ends with its connection
    head: bytes = b""

    def get(self, name: str) -> bytes | None:
        """Returns: the value of the first field of this name."""
        return self.get_all(name)[0] if self.get_all(name) else None

    def get_all(self, name: str) -> list[bytes]:
        """Returns: the values of all fields of this name."""
        wanted = name.lower().encode()
        return [value for field, value in self.fields if field.lower() == wanted]


class Wire:
    """One connected socket in the hands of a script. ``end`` tells how the other side ended it, once that was seen.

    ``end``: None (open), ``fin``, ``reset``, and under TLS ``close_notify``, or ``fin`` where that did not come first.
    """

    def __init__(self, sock: socket.socket, patience_s: float = PATIENCE_S) -> None:
        self.sock = sock
        sock.settimeout(patience_s)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.received = Tape()
        self.sent = Tape()
        self.end: str | None = None
        self.ended_at: float | None = None
        self._ahead = bytearray()  # read, and not yet asked for

    # -- octets

    def _receive(self, size: int) -> bytes:
        return self.sock.recv(size)

    def _transmit(self, octets: memoryview) -> int:
        return self.sock.send(octets)

    def note_end(self, end: str) -> None:
        """Note how the other side ended, unless that is known."""
        if self.end is None:
            self.end = end
            self.ended_at = time.monotonic()

    def read(self, size: int = _READ) -> bytes:
        """Read what there is, up to ``size``.

        Returns: b"" once the other side has ended, in whatever way.
        Raises: TimeoutError if nothing comes.
        """
        if self._ahead:
            octets = bytes(self._ahead[:size])
            del self._ahead[:size]
            return octets
        return self._read_more(size)

    def _read_more(self, size: int) -> bytes:
        if self.end is not None:
            return b""
        try:
            octets = self._receive(size)
        except ConnectionError:
            self.note_end("reset")
            return b""
        if not octets:
            self.note_end("fin")
        self.received.add(octets)
        return octets

    def read_exactly(self, count: int) -> bytes:
        """Read ``count`` octets. Raises: PeerGone."""
        while len(self._ahead) < count:
            more = self._read_more(max(_READ, count - len(self._ahead)))
            if not more:
                raise PeerGone(f"{self.end} after {len(self._ahead)} of {count} octets")
            self._ahead += more
        octets = bytes(self._ahead[:count])
        del self._ahead[:count]
        return octets

    def read_until(self, mark: bytes) -> bytes:
        """Read up to and with ``mark``. Raises: PeerGone."""
        while (at := self._ahead.find(mark)) < 0:
            more = self._read_more(_READ)
            if not more:
                raise PeerGone(f"{self.end} before {mark!r}, after {bytes(self._ahead[:200])!r}")
            self._ahead += more
        octets = bytes(self._ahead[: at + len(mark)])
        del self._ahead[: at + len(mark)]
        return octets

    def read_head(self) -> bytes:
        """Read up to and with an empty line. Raises: PeerGone."""
        return self.read_until(b"\r\n\r\n")

    def read_to_end(self) -> bytes:
        """Read until the other side ends; ``end`` tells how."""
        octets = bytearray()
        while part := self.read():
            octets += part
        return bytes(octets)

    def await_end(self) -> str:
        """Read and forget until the other side ends. Returns: how."""
        while self.read():
            pass
        assert self.end is not None
        return self.end

    def send(self, octets: bytes) -> None:
        """Write all octets. Raises: PeerGone if the other side does not take them any more; TimeoutError."""
        view = memoryview(octets)
        while view:
            try:
                count = self._transmit(view)
            except ConnectionError as error:
                self.note_end("reset")
                raise PeerGone(str(error)) from error
            self.sent.add(view[:count])
            view = view[count:]

    def send_until_answered(self, octets: bytes) -> None:
        """Write octets as long as nothing comes back: who only writes may find an answer destroyed by a reset."""
        self.sock.setblocking(False)
        view = memoryview(octets)
        try:
            while view:
                readable, writable, _ = select.select([self.sock], [self.sock], [], PATIENCE_S)
                if not readable and not writable:
                    raise TimeoutError("nothing is taken, and nothing comes")
                try:
                    if readable:
                        part = self._receive(_READ)
                        self.received.add(part)
                        self._ahead += part
                        return
                    count = self._transmit(view[:65536])
                    self.sent.add(view[:count])
                    view = view[count:]
                except BlockingIOError:
                    continue  # what came was TLS's own, or poll spoke of less room than is needed
                except ConnectionError:
                    self.note_end("reset")
                    return
        finally:
            self.sock.settimeout(PATIENCE_S)

    def send_in_parts(self, octets: bytes, size: int, pause_s: float) -> None:
        """Write octets a few at a time: a drip. Raises: PeerGone."""
        for at in range(0, len(octets), size):
            if at:
                time.sleep(pause_s)
            self.send(octets[at : at + size])

    def fill(self, octets: bytes = b"\0" * 65536, quiet_s: float = 0.3) -> int:
        """Write until the other side has taken nothing for ``quiet_s``. Returns: how many octets went out."""
        before = self.sent.count
        self.sock.setblocking(False)
        try:
            while True:
                try:
                    count = self._transmit(memoryview(octets))
                    self.sent.add(octets[:count])
                except (BlockingIOError, ssl.SSLWantWriteError):
                    if not select.select([], [self.sock], [], quiet_s)[1]:
                        return self.sent.count - before
                except ConnectionError as error:
                    self.note_end("reset")
                    raise PeerGone(str(error)) from error
        finally:
            self.sock.settimeout(PATIENCE_S)

    # -- ends

    def end_write(self) -> None:
        """Say that nothing more comes (FIN; under TLS close_notify), and go on reading."""
        with contextlib.suppress(OSError):  # the other side may have reset it already
            self.sock.shutdown(socket.SHUT_WR)

    def send_and_end(self, octets: bytes) -> None:
        """Write octets with the end right behind them, under TLS in one segment."""
        self.send(octets)
        self.end_write()

    def cut_write(self) -> None:
        """Send a FIN, under TLS without the close_notify that belongs before it."""
        Wire.end_write(self)

    def reset(self) -> None:
        """Break the connection. On a unix socket the other side sees a reset only if it wrote what was not read."""
        if self.sock.fileno() >= 0:
            if self.sock.family != socket.AF_UNIX:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.sock.close()

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()

    def __enter__(self) -> typing.Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- HTTP, as much as tests need

    def read_request(self) -> bytes:
        """Read a request, its body by its framing. Returns: head and body as they came. Raises: PeerGone."""
        head = self.read_head()
        fields = split_fields(head)
        length = first_value(fields, b"content-length")
        if first_value(fields, b"transfer-encoding") is not None:
            body = b""
            while True:
                line = self.read_until(b"\r\n")
                size = int(line.split(b";")[0], 16)
                if not size:
                    break
                body += line + self.read_exactly(size + 2)
            body += line
            while (line := self.read_until(b"\r\n")) != b"\r\n":
                body += line
            return head + body + b"\r\n"
        return head + self.read_exactly(int(length or b"0"))

    def read_response(self, method: str = "GET") -> Response:
        """Read one response, interim ones not skipped. ``whole`` is False where it was cut, or ended with the
        connection.

        Raises: PeerGone if there was no whole head.
        """
        head = self.read_head()
        line, *_ = head.split(b"\r\n")
        _, status, *reason = line.split(b" ", 2)
        response = Response(int(status), reason[0] if reason else b"", split_fields(head), head=head)
        if method == "HEAD" or response.status < 200 or response.status in (204, 304):
            response.whole = True
            return response
        try:
            if response.get("transfer-encoding") is not None:
                self._read_chunks(response)
            elif (length := response.get("content-length")) is not None:
                while len(response.body) < int(length):
                    part = self.read(int(length) - len(response.body))
                    if not part:
                        return response
                    response.body += part
                response.whole = True
            else:
                response.body = self.read_to_end()
        except PeerGone:
            pass  # cut: whole stays False
        return response

    def _read_chunks(self, response: Response) -> None:
        while True:
            size = int(self.read_until(b"\r\n").split(b";")[0], 16)
            if not size:
                break
            while size:
                part = self.read(size)
                if not part:
                    return
                response.body += part
                size -= len(part)
            self.read_exactly(2)
        trailers = b""
        while (line := self.read_until(b"\r\n")) != b"\r\n":
            trailers += line
        response.trailers = split_fields(b"\r\n" + trailers + b"\r\n")
        response.whole = True

    def get(self, target: str = "/", host: str = "test", extra: str = "") -> None:
        """Send a plain GET."""
        self.send(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n{extra}\r\n".encode())


class TlsWire(Wire):
    """A wire under TLS, with the TLS state in memory: so that close_notify, FIN and reset can be sent each on its
    own.
    """

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        name: str | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        super().__init__(sock, patience_s)
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side, server_hostname=name)
        self._unsent = b""

    def handshake(self) -> None:
        """Raises: ssl.SSLError, PeerGone, TimeoutError."""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                if not self._feed():
                    raise PeerGone("in the TLS handshake") from None
            except ssl.SSLError:
                with contextlib.suppress(OSError):  # the alert may find nobody
                    self._flush()
                raise
            else:
                self._flush()
                return

    def _feed(self) -> bool:
        try:
            octets = self.sock.recv(_READ)
        except ConnectionError:
            self.note_end("reset")
            return False
        if octets:
            self._incoming.write(octets)
            return True
        self._incoming.write_eof()
        return False

    def _flush(self) -> None:
        self._unsent += self._outgoing.read()
        while self._unsent:
            self._unsent = self._unsent[self.sock.send(self._unsent) :]

    def _receive(self, size: int) -> bytes:
        while True:
            try:
                octets = self.tls.read(size)
            except ssl.SSLWantReadError:
                self._flush()
                self._feed()
                if self.end is not None:
                    return b""
                continue
            except ssl.SSLZeroReturnError:
                octets = b""
            except ssl.SSLEOFError:
                self.note_end("fin")
                return b""
            if not octets:
                self.note_end("close_notify")
            return octets

    def _transmit(self, octets: memoryview) -> int:
        self._flush()
        taken = self.tls.write(octets[:_TLS_CHUNK])
        with contextlib.suppress(BlockingIOError):  # goes out with the next octets
            self._flush()
        return taken

    def send_and_end(self, octets: bytes) -> None:
        """Write octets with close_notify right behind them in one segment."""
        self.tls.write(octets)
        self.sent.add(octets)
        self.end_write()

    def end_write(self) -> None:
        """Send close_notify, no FIN."""
        try:
            while octets := self.tls.read(_READ):  # SSL_shutdown stumbles over data that was not read
                self._ahead += octets
                self.received.add(octets)
        except ssl.SSLError:
            pass  # no more at present, or an error that the next read meets again
        with contextlib.suppress(ssl.SSLError):  # wants the other side's close_notify, which may come later
            self.tls.unwrap()
        with contextlib.suppress(OSError):  # the other side may have reset it already
            self._flush()


Script = collections.abc.Callable[[Wire], None]


def split_fields(head: bytes) -> list[tuple[bytes, bytes]]:
    """Returns: name and value of each field line of a head, its first line left out."""
    fields = []
    for line in head.split(b"\r\n")[1:]:
        if line:
            name, _, value = line.partition(b":")
            fields.append((name, value.strip(b" \t")))
    return fields


def first_value(fields: list[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """Returns: the value of the first field of a name (lowercase)."""
    return next((value for field, value in fields if field.lower() == name), None)


# -- clients ----------------------------------------------------------------------------------------------------------


Address = tuple[str, int] | str


def connect(
    address: Address,
    tls: ssl.SSLContext | None = None,
    *,
    name: str = "localhost",
    receive_buffer: int | None = None,
    send_buffer: int | None = None,
    handshake: bool = True,
    patience_s: float = PATIENCE_S,
) -> Wire:
    """Connect to a ``(host, port)`` or the path of a unix socket. Small buffers make it easy to stop the other side."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(patience_s)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if send_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        sock.connect(address)
        if tls is None:
            return Wire(sock, patience_s)
        wire = TlsWire(sock, tls, server_side=False, name=name, patience_s=patience_s)
        if handshake:
            wire.handshake()
    except BaseException:
        sock.close()
        raise
    return wire


# -- upstreams --------------------------------------------------------------------------------------------------------


class Upstream:
    """A listener that runs ``script`` on a thread for each connection. ``script`` may be changed between connections.

    Kinds: ``tcp``, ``unix``, ``tls``. ``wires`` holds every connection in the order of their coming. Leaving the
    context closes all of them, and raises the first error of a script that was none of the other side's doing.
    """

    def __init__(
        self,
        script: Script,
        kind: str = "tcp",
        *,
        tls: ssl.SSLContext | None = None,
        host: str = "127.0.0.1",
        receive_buffer: int | None = None,
        send_buffer: int | None = None,
        backlog: int = 128,
    ) -> None:
        self.script = script
        self.kind = kind
        self.wires: list[Wire] = []
        self.failures: list[BaseException] = []
        self._tls = tls
        self._lock = threading.Condition()  # guards wires, failures, _running
        self._running = 0
        self._threads: list[threading.Thread] = []
        self._directory: str | None = None
        if kind == "unix":
            self._directory = tempfile.mkdtemp(prefix="up-")
            path = os.path.join(self._directory, "s")
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(path)
            self.url = f"unix://{path}"
            self.name = f"unix:{path}"
        else:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.socket(family, socket.SOCK_STREAM)
            if receive_buffer is not None:
                self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            if send_buffer is not None:
                self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind((host, 0))
            port = self._listener.getsockname()[1]
            spelled = f"[{host}]" if ":" in host else host
            scheme = "https" if kind == "tls" else "http"
            self.url = f"{scheme}://{'localhost' if kind == 'tls' else spelled}:{port}"
            self.name = f"{spelled}:{port}"
        self._listener.listen(backlog)
        self._acceptor = threading.Thread(target=self._accept, name=f"upstream {self.name}")
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # shut down by close()
            with self._lock:
                thread = threading.Thread(target=self._serve, args=(sock,), name=f"upstream connection {self.name}")
                self._threads.append(thread)
                self._running += 1
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        script = self.script
        wire = Wire(sock) if self._tls is None else TlsWire(sock, self._tls, server_side=True)
        with self._lock:
            self.wires.append(wire)
            self._lock.notify_all()
        try:
            if isinstance(wire, TlsWire):
                wire.handshake()
            script(wire)
        except (PeerGone, ssl.SSLError, ConnectionError):
            pass  # what the other side does to its peer is the test's own business: it looks at the wire
        except OSError as error:
            if wire.sock.fileno() >= 0:  # else closed by close()
                self._fail(error)
        except BaseException as error:  # noqa: BLE001  # a failed assertion, too, is raised where the test ends
            self._fail(error)
        finally:
            wire.close()
            with self._lock:
                self._running -= 1
                self._lock.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self.failures.append(error)

    def wire(self, index: int = 0, timeout_s: float = PATIENCE_S) -> Wire:
        """Wait for a connection. Returns: the one that came as number ``index``."""
        with self._lock:
            assert self._lock.wait_for(lambda: len(self.wires) > index, timeout_s), (
                f"{len(self.wires)} connections instead of {index + 1}"
            )
            return self.wires[index]

    def await_head(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait until a head has come whole, and leave out connections on which nothing came: one that was given up
        while it was made may be accepted as late as now.
        """
        until = time.monotonic() + timeout_s
        while not any(b"\r\n\r\n" in wire.received.octets for wire in self.wires):
            assert time.monotonic() < until, f"no head came on {len(self.wires)} connections"
            time.sleep(0.005)
        with self._lock:
            self.wires[:] = [wire for wire in self.wires if wire.received.count]

    def settle(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait until every script has ended."""
        with self._lock:
            assert self._lock.wait_for(lambda: not self._running, timeout_s), f"{self._running} scripts still run"

    def forget(self) -> None:
        """Forget the connections so far, all of which have ended. Raises: the first failure of a script."""
        self.settle()
        with self._lock:
            self.wires.clear()
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            if self.failures:
                raise self.failures.pop(0)

    def stop_listening(self) -> None:
        """Refuse further connections."""
        with contextlib.suppress(OSError):  # already closed
            self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()

    def close(self) -> None:
        """Stop listening, break what is still connected, and wait for the threads."""
        self.stop_listening()
        with self._lock:
            wires, threads = list(self.wires), list(self._threads)
        for wire in wires:
            with contextlib.suppress(OSError):  # ended by itself
                wire.sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(PATIENCE_S + 1)
        if self._directory is not None:
            with contextlib.suppress(FileNotFoundError):  # removed by a test that wanted it gone
                os.unlink(os.path.join(self._directory, "s"))
            os.rmdir(self._directory)

    def __enter__(self) -> typing.Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()
        if error is None and self.failures:
            raise self.failures[0]


@contextlib.contextmanager
def closed_port(host: str = "127.0.0.1") -> collections.abc.Iterator[int]:
    """Give a port on which nothing listens, and nothing else will in the meantime."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind((host, 0))  # bound and not listening: refused
        yield sock.getsockname()[1]


@contextlib.contextmanager
def full_listener(host: str = "127.0.0.1") -> collections.abc.Iterator[int]:
    """Give a port whose backlog is full, so that a connect gets no answer."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        listener.bind((host, 0))
        listener.listen(0)
        for _ in range(4):
            sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


# -- scripts for upstreams --------------------------------------------------------------------------------------------


def ok(body: bytes = b"ok", fields: bytes = b"") -> bytes:
    """Returns: a 200 with a length."""
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%s\r\n%s" % (len(body), fields, body)


def chunk(octets: bytes) -> bytes:
    """Returns: one chunk."""
    return b"%x\r\n%s\r\n" % (len(octets), octets)


def answer(octets: bytes, *, requests: int = 1) -> Script:
    """Answer each of some requests with the same octets, then close."""

    def script(wire: Wire) -> None:
        for _ in range(requests):
            wire.read_request()
            wire.send(octets)
        wire.end_write()

    return script


def answer_all(octets: bytes) -> Script:
    """Answer requests until the connection ends."""

    def script(wire: Wire) -> None:
        while True:
            wire.read_request()
            wire.send(octets)

    return script


def answer_at_once(octets: bytes) -> Script:
    """Answer when the head is there, then read on and see how it ends."""

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.send(octets)
        wire.await_end()

    return script


def answer_and_wait(octets: bytes) -> Script:
    """Answer a request, then only watch how the connection ends."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(octets)
        wire.await_end()

    return script


def answer_and_close(octets: bytes) -> Script:
    """Answer a request with what may be part of a response, then close."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(octets)
        wire.end_write()
        wire.await_end()

    return script


def answer_and_cut(octets: bytes) -> Script:
    """As ``answer_and_close``, under TLS without close_notify."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(octets)
        wire.cut_write()
        wire.await_end()

    return script


def answer_and_reset(octets: bytes, pause_s: float = 0.05) -> Script:
    """Answer a request with what may be part of a response, leave it time to be read, then reset."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(octets)
        time.sleep(pause_s)  # a reset overtakes data that was not read yet
        wire.reset()

    return script


def silent(wire: Wire) -> None:
    """Read a request and never answer."""
    wire.read_request()
    wire.await_end()


def deaf(wire: Wire) -> None:
    """Never read: only watch for the end, which a full buffer may keep from coming."""
    poller = select.poll()
    poller.register(wire.sock, select.POLLRDHUP)
    ready = poller.poll(2000)
    if ready:
        wire.note_end("reset" if ready[0][1] & select.POLLERR else "fin")


def close_at_once(wire: Wire) -> None:
    """Close without a word."""
    wire.end_write()


def reset_after(count: int) -> Script:
    """Read some octets, then reset."""

    def script(wire: Wire) -> None:
        wire.read_exactly(count)
        wire.reset()

    return script


def drip(head: bytes, body: bytes, size: int, pause_s: float) -> Script:
    """Answer with a head, then a body a few octets at a time."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(head)
        wire.send_in_parts(body, size, pause_s)
        wire.end_write()

    return script


def flood(head: bytes, block: bytes = b"\0" * 65536) -> Script:
    """Answer with a head, then as much as the other side takes."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(head)
        while True:
            wire.send(block)

    return script


def upgrade(head: bytes = b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n") -> Script:
    """Switch protocols, then echo until the other side's end, and end too."""

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.send(head)
        while octets := wire.read():
            wire.send(octets)
        wire.end_write()
        wire.await_end()

    return script
