"""One connected socket of an exchange: its side, its name, how to read and write it, plain or under TLS.

Both kinds have the same operations: ``read``, ``read_into``, ``write``, ``flush``, ``end_write``, ``close``. With
``NO_WAIT`` none of them waits; ``BlockingIOError`` means: poll for ``read_event`` or ``write_event`` and come again.
What an ``OSError`` means for the request is decided by the caller, who knows the phase.
"""

import collections.abc
import contextlib
import errno
import select
import socket
import ssl
import struct
import typing

from .kernel import HAVE_SPLICE, PeerPulse
from .vocabulary import Side

READABLE = select.POLLIN
WRITABLE = select.POLLOUT
# For reads and writes that must not wait.
NO_WAIT = socket.MSG_DONTWAIT

# How long a read may wait inside the kernel for a peer that speaks soon. It must be less than anybody minds, as only
# that one socket is watched meanwhile: while an answer is awaited its client may leave; between two requests nothing
# can happen but the end of the worker.
ANSWER_PATIENCE_S = 0.02
IDLE_PATIENCE_S = 0.1

# Under TLS: plaintext in one record (RFC 8446 §5.1), plaintext that is encrypted before the socket is asked to take
# it, and ciphertext read at once.
_RECORD_SIZE = 16384
_RECORD_HEADER = 5
_BATCH_SIZE = 4 * _RECORD_SIZE
_CIPHERTEXT_READ = 128 * 1024
# How often one read or write asks the socket: a peer that floods us with records without content must not keep us from
# looking at the limits.
_MOST_RECEIVES = 6
# What TLS may have to say that the peer does not take: answers to key updates, of which it can ask for any number.
_MOST_UNSENT = 256 * 1024
_NOTHING = memoryview(b"")


class Endpoint:
    """A plain connected socket. ``read``, ``read_into`` and ``write`` are the socket's own methods, so that they cost
    no frame.

    The socket itself is a blocking one, and each call says ``NO_WAIT``: so one that may wait for a moment can do
    without (``Waiter.read_soon``).
    """

    is_tls = False

    __slots__ = (
        "_patience_before_s",
        "can_splice",
        "fd",
        "has_unread",
        "mid_record",
        "name",
        "patience_s",
        "pulse",
        "read",
        "read_event",
        "read_into",
        "side",
        "sock",
        "unflushed",
        "write",
        "write_event",
    )

    def __init__(self, sock: socket.socket, side: Side, name: str, pulse: PeerPulse | None) -> None:
        """``pulse`` watches over the peer; None for a unix socket, whose peer can't vanish."""
        self.sock = sock
        self.fd = sock.fileno()
        self.side = side
        self.name = name
        self.read: collections.abc.Callable[[int, int], bytes] = sock.recv
        self.read_into: collections.abc.Callable[[memoryview, int, int], int] = sock.recv_into
        self.write: collections.abc.Callable[[bytes | bytearray | memoryview, int], int] = sock.send
        self.read_event = READABLE
        self.write_event = WRITABLE
        self.has_unread = False  # octets that poll does not see
        self.mid_record = False  # a part of a TLS record has come, the rest will
        self.unflushed = False  # the end of writing is said, and not out yet
        self.can_splice = HAVE_SPLICE
        self._patience_before_s: float | None = None  # before it was made ready for splicing; None: it is not
        self.patience_s = 0.0  # how long a read without NO_WAIT waits at most; 0.0: every read must have it
        self.pulse = pulse

    @property
    def mid_write(self) -> bool:
        """Whether the peer may have got a part of what no write has reported as taken: no other octets can follow."""
        return False

    @property
    def takes_more(self) -> bool:
        """Whether a write that took less than all may take more at once."""
        return False

    def become_patient(self, seconds: float) -> None:
        """Let reads without ``NO_WAIT`` wait for so long, less than a second."""
        if self.sock.getblocking():
            timeval = struct.pack("ll", 0, int(seconds * 1_000_000))
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
            self.patience_s = seconds

    def prepare_splice(self) -> None:
        """Splicing takes no NO_WAIT: the socket itself must not wait."""
        if self._patience_before_s is None:
            self._patience_before_s = self.patience_s
            self.patience_s = 0.0
            self.sock.setblocking(False)

    def end_splice(self) -> None:
        """Be as patient again as before ``prepare_splice``, for the next exchange."""
        if self._patience_before_s is not None:
            self.sock.setblocking(True)
            self.patience_s = self._patience_before_s
            self._patience_before_s = None

    def end_write(self) -> None:
        """Tell the peer that nothing more comes. Raises: OSError."""
        self.sock.shutdown(socket.SHUT_WR)

    def flush(self) -> bool:
        """Returns: True, as the kernel holds all that was written."""
        return True

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()


class TlsEndpoint(Endpoint):
    """A socket under TLS, with the TLS state kept apart from the socket.

    ``ssl.SSLSocket`` can't pass on a half-close: its ``unwrap`` reads, and a peer that still sends breaks the
    connection with APPLICATION_DATA_AFTER_CLOSE_NOTIFY. With memory in between, close_notify is sent when nothing is
    left to read. It also takes one system call where SSLSocket takes two for each record.
    """

    is_tls = True

    __slots__ = (
        "_batch",
        "_batch_plain",
        "_batch_reported",
        "_batch_sent",
        "_decrypted",
        "_failure",
        "_follows_records",
        "_incoming",
        "_outgoing",
        "_record_header",
        "_record_left",
        "_unsent",
        "tls",
    )

    def __init__(
        self,
        sock: socket.socket,
        side: Side,
        name: str,
        pulse: PeerPulse | None,
        context: ssl.SSLContext,
        server_hostname: str | None,
    ) -> None:
        super().__init__(sock, side, name, pulse)
        sock.setblocking(False)
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=side is Side.CLIENT, server_hostname=server_hostname
        )
        # Of a client nobody asks, and it takes 2 % of the CPU time of a transfer.
        self._follows_records = side is Side.UPSTREAM
        self._record_left = 0  # octets of a record that are still to come
        self._record_header = b""  # the part of a header that has come
        self._decrypted = b""  # read ahead of a half-close
        self._failure: OSError | None = None  # met behind octets that were to be had, for the next read to raise
        self._unsent = b""  # what TLS itself has to say, and the socket has not taken
        # The batch of records being sent, how much of it the socket has taken, and of the octets of plaintext in it,
        # how many were reported as written.
        self._batch = _NOTHING
        self._batch_sent = 0
        self._batch_plain = 0
        self._batch_reported = 0
        self.can_splice = False
        self.read = self._read
        self.read_into = self._read_into
        self.write = self._write

    # What urllib3 asks of a socket.

    def fileno(self) -> int:
        """Returns: the descriptor, -1 after close."""
        return self.sock.fileno()

    @property
    def mid_write(self) -> bool:
        """Whether a batch of records is half sent."""
        return self._batch_plain > 0

    @property
    def takes_more(self) -> bool:
        """Whether the last batch of records went out whole."""
        return not self._batch_plain

    def handshake(self) -> bool:
        """Take the handshake as far as it goes without waiting.

        Returns: whether it is done. If not, poll for ``read_event`` and come again.
        Raises: ssl.SSLError, with the alert for the peer on its way as far as the socket took it; OSError.
        """
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                if not self.flush():
                    self.read_event = WRITABLE
                    return False
                self.read_event = READABLE
                try:
                    self._receive()
                except BlockingIOError:
                    return False
            except ssl.SSLError:
                with contextlib.suppress(OSError):  # the alert may find nobody; the first error is the one that counts
                    self.flush()
                raise
            else:
                if not self.flush():
                    self.read_event = WRITABLE
                    return False
                self.read_event = READABLE
                self.has_unread = self._incoming.pending > 0  # the first request came right behind the handshake
                return True

    def _receive(self) -> bool:
        """Returns: whether the socket may have more. Raises: OSError."""
        octets = self.sock.recv(_CIPHERTEXT_READ)
        if octets:
            self._incoming.write(octets)
            if self._follows_records:
                self._follow_records(octets)
        else:
            self._incoming.write_eof()
        return len(octets) == _CIPHERTEXT_READ

    def _follow_records(self, octets: bytes) -> None:
        """Find out whether what has come ends within a record (RFC 8446 §5.1), which OpenSSL holds without a word."""
        octets = self._record_header + octets
        size = len(octets)
        at = self._record_left
        while at + _RECORD_HEADER <= size:
            at += _RECORD_HEADER + (octets[at + 3] << 8 | octets[at + 4])
        self._record_left = max(0, at - size)
        self._record_header = octets[at:]
        self.mid_record = at != size

    def _read(self, size: int, flags: int = 0) -> bytes:
        """Read up to ``size`` octets of plaintext. As ``_read_into``."""
        buffer = bytearray(size)
        return bytes(memoryview(buffer)[: self._read_into(memoryview(buffer))])

    def _read_into(self, buffer: memoryview, size: int = 0, flags: int = 0) -> int:
        """Read plaintext into ``buffer``, as many records as it takes and there are. ``size`` and ``flags`` are there
        for the sake of ``socket.recv_into``: the buffer says how much, and nothing here waits.

        Returns: the number of octets; 0 at close_notify.
        Raises: BlockingIOError if there are none yet; ssl.SSLEOFError where the connection ended without close_notify;
        OSError.
        """
        size = len(buffer)
        have = 0
        if self._decrypted:
            have = min(size, len(self._decrypted))
            buffer[:have] = self._decrypted[:have]
            self._decrypted = self._decrypted[have:]
        if self._failure is not None and not have:
            raise self._failure
        # Into a buffer it returns a number, which its type stub does not know.
        read = typing.cast(collections.abc.Callable[[int, memoryview], int], self.tls.read)
        more = False  # whether the socket was asked and had at least as much as was wanted
        receives = 0
        while have < size and self._failure is None:
            try:
                count = read(size - have, buffer[have:])
            except ssl.SSLWantReadError:
                self.has_unread = False
                try:
                    if self._outgoing.pending:
                        self.flush()  # an answer to a key update
                    if have and (not more or receives == _MOST_RECEIVES):
                        return have
                    if receives == _MOST_RECEIVES:
                        raise BlockingIOError(errno.EAGAIN, "nothing but records without content")
                    receives += 1
                    more = self._receive()
                    self.write_event = WRITABLE  # a write that waited for the peer to shake hands may go on
                except BlockingIOError:
                    if have:
                        return have
                    raise
                except OSError as error:
                    if not have:
                        raise
                    self._failure = error
                continue
            except ssl.SSLZeroReturnError:
                count = 0  # close_notify after we sent ours
            except ssl.SSLError as error:
                if not isinstance(error, ssl.SSLEOFError):  # whoever has ended without a word is sent none
                    # The alert, as in the handshake; it may find nobody, and the first error is the one that counts.
                    with contextlib.suppress(OSError):
                        self.flush()
                if have:
                    self._failure = error  # asked once more, OpenSSL would speak of an end that there was not
                    break
                raise
            if not count:
                break
            have += count
        self.has_unread = have > 0
        return have

    def _write(self, octets: bytes | bytearray | memoryview, flags: int = 0) -> int:
        """Write plaintext, one batch of records at most; see ``takes_more``. As with OpenSSL itself, a call that took
        less than all must be repeated with the octets not taken.

        Returns: how many octets are in records that the socket took whole.
        Raises: BlockingIOError if none are; OSError.
        """
        if not self._batch_plain:
            if not self.flush():
                raise BlockingIOError(errno.EAGAIN, "the socket takes no more")
            self._batch_plain = self._encrypt(memoryview(octets)[:_BATCH_SIZE])
            self._batch = memoryview(self._outgoing.read())
            self._batch_sent = self._batch_reported = 0
        size = len(self._batch)
        self._batch_sent += self.sock.send(self._batch[self._batch_sent :])
        if self._batch_sent == size:
            done = self._batch_plain - self._batch_reported
            self._batch_plain = 0
            self._batch = _NOTHING
            return done
        # All records of a batch but the last are full, and all have the same overhead.
        count = -(-self._batch_plain // _RECORD_SIZE)
        overhead = (size - self._batch_plain) // count
        done = self._batch_sent // (_RECORD_SIZE + overhead) * _RECORD_SIZE - self._batch_reported
        if not done:
            raise BlockingIOError(errno.EAGAIN, "the socket took no whole record")
        self._batch_reported += done
        return done

    def _encrypt(self, octets: memoryview) -> int:
        """Make records of ``octets``, as many as it takes: memory is never full.

        Returns: the number of octets. Raises: BlockingIOError while the peer shakes hands anew (TLS 1.2), for which
        it must be read from; OSError.
        """
        for _ in range(_MOST_RECEIVES):
            try:
                count = self.tls.write(octets)
            except ssl.SSLWantReadError:
                self.flush()
                self.write_event = READABLE
                self._receive()
                self.has_unread = self._incoming.pending > 0
                self.write_event = WRITABLE
            else:
                return count
        raise BlockingIOError(errno.EAGAIN, "nothing but records without content")

    def flush(self) -> bool:
        """Send what TLS itself has to say (handshake, alerts, close_notify).

        Returns: whether the socket took all of it; if not, poll for writing and come again. Raises: OSError.
        """
        if self._batch_plain:
            if self._outgoing.pending > _MOST_UNSENT:
                raise ssl.SSLError(ssl.SSL_ERROR_SSL, "the peer asks for key updates and takes no answer")
            return False
        if self._outgoing.pending:
            self._unsent += self._outgoing.read()
        if self._unsent:
            try:
                sent = self.sock.send(self._unsent)
            except BlockingIOError:
                sent = 0
            self._unsent = self._unsent[sent:]
            if len(self._unsent) > _MOST_UNSENT:
                raise ssl.SSLError(ssl.SSL_ERROR_SSL, "the peer asks for key updates and takes no answer")
        return not self._unsent

    def end_write(self) -> None:
        """Send close_notify, and leave the reading direction as it is; call ``flush`` until it is out. Raises:
        OSError.
        """
        # SSL_shutdown reads too, and application data would be fatal to it: read first all there is.
        try:
            while octets := self.tls.read(_RECORD_SIZE):
                self._decrypted += octets
                self.has_unread = True
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            self.has_unread = bool(self._decrypted)  # nothing more to read now, or ever
        except ssl.SSLError as error:
            self._failure = error
            self.has_unread = True
        try:
            self.tls.unwrap()
        except ssl.SSLError:
            # Want-read: the peer's own close_notify has not come, and need not.
            pass
        self.unflushed = not self.flush()

    def close(self) -> None:
        """Close the socket; close_notify is the caller's decision, as without it a cut message can't look whole."""
        self.sock.close()
        # Its own methods make a circle of the endpoint; without it, the TLS state goes at once.
        self.read, self.read_into, self.write = self.sock.recv, self.sock.recv_into, self.sock.send
        self._failure = None  # so does an error, through the frames of its traceback


AnyEndpoint = Endpoint | TlsEndpoint
