"""What an abort is, which cause an error of the operating system has, and what the client is told.

``Abort`` is raised where the fact is known and carried to the one place that answers, logs and closes; nothing is
changed on the way but what only somebody further up can tell (how long a dead peer had been silent). The table
``ANSWERS`` decides status and RFC 9209 error type; where the response head is already out, only the type is used.
"""

import errno
import os
import socket
import ssl

from .grammar import MalformedMessage
from .limits import Bound, Limit
from .vocabulary import Cause, Operation, Phase, Side


class Abort(Exception):
    """The end of a request before its response was whole: whose doing, in which phase, doing what, why.

    ``limit`` is the option behind it, and ``elapsed_s`` how long it had run, where there is one. ``status`` and
    ``error_type`` replace what the table says where the fact is finer than the table. ``detail`` is a clause for the
    message. ``reject`` says that the proxy refused on the request head alone.
    """

    def __init__(
        self,
        side: Side,
        phase: Phase,
        operation: Operation | None,
        cause: Cause,
        *,
        limit: Limit | Bound | None = None,
        elapsed_s: float | None = None,
        original: BaseException | None = None,
        detail: str | None = None,
        status: int | None = None,
        error_type: str | None = None,
        reject: bool = False,
    ) -> None:
        super().__init__(side, phase, operation, cause)
        self.side = side
        self.phase = phase
        self.operation = operation
        self.cause = cause
        self.limit = limit
        self.elapsed_s = elapsed_s
        self.original = original
        self.detail = detail
        self.reject = reject
        answer = ANSWERS.get((side, phase, cause), (None, None))
        self.status = answer[0] if status is None else status
        self.error_type = answer[1] if error_type is None else error_type

    def __str__(self) -> str:
        operation = f" {self.operation}" if self.operation else ""
        return f"{self.side} {self.phase}{operation}: {self.cause}" + (f" ({self.detail})" if self.detail else "")

    def forget_frames(self) -> None:
        """Let go of the frames in its tracebacks: they hold whoever holds this abort. Call it when it was told of."""
        self.__traceback__ = self.__context__ = None
        if self.original is not None:
            self.original.__traceback__ = self.original.__context__ = None


# What ends a connection that stood.
_ENDED = frozenset((errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ENOTCONN, errno.ESHUTDOWN))
_RESOURCE = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN))


def classify(error: OSError, operation: Operation) -> Cause:
    """Returns: the cause of an error of a socket call, by type and errno, never by its text."""
    if isinstance(error, ssl.SSLError):
        return Cause.TLS
    if isinstance(error, socket.gaierror):
        return Cause.DNS
    if error.errno in _RESOURCE:
        return Cause.RESOURCE
    if error.errno in _ENDED:
        return Cause.RESET
    # Our own limits never come as TimeoutError, since no socket has a timeout: it is the kernel's verdict, ETIMEDOUT.
    if operation is not Operation.CONNECT or isinstance(error, TimeoutError):
        # On a connection that stood the kernel has given the peer up, and says what a router, a firewall or its own
        # routes had answered meanwhile (icmp(7); EACCES: administratively prohibited; EINVAL: a route to nowhere).
        return Cause.DEAD_PEER
    return Cause.REFUSED if isinstance(error, ConnectionRefusedError) else Cause.UNREACHABLE


def tls_error_type(error: OSError) -> str | None:
    """Returns: the RFC 9209 type of a TLS error: certificate, alert or protocol; None where it is none of TLS."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return "tls_certificate_error"
    if isinstance(error, ssl.SSLError):
        # An SSLError that Python makes by itself has no reason.
        return "tls_alert_received" if "ALERT" in str(getattr(error, "reason", "")) else "tls_protocol_error"
    return None


def refuses_certificate(error: OSError) -> bool:
    """Whether the peer says by a TLS alert that it does not accept our certificate, or that we showed none."""
    reason = str(getattr(error, "reason", "")) if isinstance(error, ssl.SSLError) else ""
    return "ALERT" in reason and ("CERTIFICATE" in reason or "UNKNOWN_CA" in reason)


def socket_abort(side: Side, phase: Phase, operation: Operation, error: OSError, limit: Limit | None = None) -> Abort:
    """Make the abort of a failed socket call. ``limit`` is the option behind the kernel's verdict on a dead peer, if
    one is set.
    """
    cause = classify(error, operation)
    fitting_type = tls_error_type(error) if side is Side.UPSTREAM else None
    if cause is Cause.RESOURCE:
        side = Side.PROXY
    return Abort(
        side,
        phase,
        operation,
        cause,
        limit=limit if cause is Cause.DEAD_PEER else None,
        original=error,
        error_type=fitting_type,
    )


def failed_socket(side: Side, phase: Phase, operation: Operation, number: int, limit: Limit | None) -> Abort:
    """Make the abort of a socket that poll reports as failed, with the ``number`` of the error that the kernel told of
    it, 0 where that was told before: then it was a reset. ``limit`` as in ``socket_abort``.
    """
    if not number:
        return Abort(side, phase, operation, Cause.RESET)
    return socket_abort(side, phase, operation, OSError(number, os.strerror(number)), limit)


def malformed_request(error: MalformedMessage, phase: Phase, bounds: dict[str, Bound]) -> Abort:
    """Make the abort of a request that is no HTTP/1.1 message, or passes a bound of one."""
    bound = bounds.get(error.bound) if error.bound else None
    return Abort(
        Side.CLIENT,
        phase,
        Operation.READ,
        Cause.PROTOCOL if error.bound is None else Cause.LIMIT,
        limit=bound,
        original=error,
        detail=str(error),
        status=error.status,
        reject=phase is Phase.REQUEST_HEAD,
    )


def malformed_response(error: MalformedMessage, phase: Phase, bounds: dict[str, Bound]) -> Abort:
    """Make the abort of a response that is no HTTP/1.1 message, or passes a bound of one."""
    bound = bounds.get(error.bound) if error.bound else None
    return Abort(
        Side.UPSTREAM,
        phase,
        Operation.READ,
        Cause.PROTOCOL if error.bound is None else Cause.LIMIT,
        limit=bound,
        original=error,
        detail=str(error),
    )


_ALL_PHASES = tuple(Phase)

_Row = tuple[Side, tuple[Phase, ...], tuple[Cause, ...], int | None, str | None]

# One row for each way to end: sides, phases and causes that can occur, the status of the answer where one can still
# be given, and the type of RFC 9209 §2.3, whose recommended status it is wherever the proxy answers with that
# status.
_ROWS: tuple[_Row, ...] = (
    # The client is gone or cannot be talked to: nobody is left to answer.
    (Side.CLIENT, _ALL_PHASES, (Cause.RESET, Cause.DEAD_PEER, Cause.TLS), None, None),
    # In a tunnel over TCP an end is a half-close and no abort; of a unix socket it is known that both ways have ended.
    (Side.CLIENT, _ALL_PHASES, (Cause.CLOSED,), None, None),
    (Side.CLIENT, (Phase.TLS_HANDSHAKE,), (Cause.TIMEOUT, Cause.PROTOCOL), None, None),
    (Side.CLIENT, (Phase.RESPONSE_BODY, Phase.RESPONSE_HEAD), (Cause.TIMEOUT,), None, None),
    (Side.CLIENT, (Phase.RESPONSE_BODY,), (Cause.DEADLINE,), None, None),
    # The client's doing, and it can be told.
    (Side.CLIENT, (Phase.REQUEST_HEAD, Phase.REQUEST_BODY), (Cause.TIMEOUT, Cause.DEADLINE), 408, "http_request_error"),
    (Side.CLIENT, (Phase.REQUEST_HEAD, Phase.REQUEST_BODY), (Cause.PROTOCOL,), 400, "http_request_error"),
    (Side.CLIENT, (Phase.REQUEST_HEAD,), (Cause.LIMIT,), 431, "http_request_error"),
    (Side.CLIENT, (Phase.REQUEST_BODY,), (Cause.LIMIT,), 413, "http_request_error"),
    (Side.CLIENT, (Phase.REQUEST_HEAD,), (Cause.FORBIDDEN,), 403, "http_request_error"),
    (Side.CLIENT, (Phase.REQUEST_HEAD,), (Cause.UNAUTHORIZED,), 401, "http_request_error"),
    # client_write_deadline, which began with the end of the request head, while upstream had not answered yet.
    (Side.CLIENT, (Phase.CONNECT, Phase.RESPONSE_HEAD), (Cause.DEADLINE,), 504, "http_response_timeout"),
    # Reaching upstream.
    (Side.UPSTREAM, (Phase.CONNECT, Phase.TLS_HANDSHAKE), (Cause.TIMEOUT, Cause.DEAD_PEER), 504, "connection_timeout"),
    (Side.UPSTREAM, (Phase.CONNECT,), (Cause.DNS,), 502, "dns_error"),
    (Side.UPSTREAM, (Phase.CONNECT,), (Cause.REFUSED,), 502, "connection_refused"),
    (Side.UPSTREAM, (Phase.CONNECT,), (Cause.UNREACHABLE,), 502, "destination_ip_unroutable"),
    (Side.UPSTREAM, (Phase.CONNECT, Phase.TLS_HANDSHAKE), (Cause.RESET,), 502, "connection_terminated"),
    # The end of the connection in the middle of a handshake is an error of TLS, too.
    (Side.UPSTREAM, (Phase.TLS_HANDSHAKE, Phase.REQUEST_BODY), (Cause.TLS,), 502, "tls_protocol_error"),
    (Side.UPSTREAM, (Phase.RESPONSE_HEAD,), (Cause.TLS,), 502, "tls_protocol_error"),
    # Sending it the request.
    (Side.UPSTREAM, (Phase.REQUEST_BODY,), (Cause.TIMEOUT, Cause.DEADLINE), 504, "connection_write_timeout"),
    (Side.UPSTREAM, (Phase.REQUEST_BODY,), (Cause.CLOSED, Cause.RESET, Cause.DEAD_PEER), 502, "connection_terminated"),
    # Awaiting its answer.
    (Side.UPSTREAM, (Phase.RESPONSE_HEAD,), (Cause.TIMEOUT,), 504, "http_response_timeout"),
    (Side.UPSTREAM, (Phase.RESPONSE_HEAD,), (Cause.DEADLINE,), 504, "connection_write_timeout"),
    (Side.UPSTREAM, (Phase.RESPONSE_HEAD,), (Cause.CLOSED, Cause.RESET, Cause.DEAD_PEER), 502, "connection_terminated"),
    (Side.UPSTREAM, (Phase.RESPONSE_HEAD,), (Cause.PROTOCOL,), 502, "http_protocol_error"),
    (Side.UPSTREAM, (Phase.RESPONSE_HEAD,), (Cause.LIMIT,), 502, "http_response_header_section_size"),
    # Its response has begun; the status is used only while none of it went to the client.
    (Side.UPSTREAM, (Phase.RESPONSE_BODY,), (Cause.TIMEOUT,), 504, "connection_read_timeout"),
    (Side.UPSTREAM, (Phase.RESPONSE_BODY,), (Cause.DEADLINE,), 504, "http_response_timeout"),
    (Side.UPSTREAM, (Phase.RESPONSE_BODY,), (Cause.CLOSED,), 502, "http_response_incomplete"),
    (Side.UPSTREAM, (Phase.RESPONSE_BODY, Phase.TUNNEL), (Cause.RESET, Cause.DEAD_PEER), 502, "connection_terminated"),
    (Side.UPSTREAM, (Phase.RESPONSE_BODY,), (Cause.PROTOCOL,), 502, "http_response_transfer_coding"),
    (Side.UPSTREAM, (Phase.RESPONSE_BODY,), (Cause.LIMIT,), 502, "http_response_trailer_section_size"),
    (Side.UPSTREAM, (Phase.RESPONSE_BODY, Phase.TUNNEL), (Cause.TLS,), 502, "tls_protocol_error"),
    # The proxy's own doing.
    (Side.PROXY, (Phase.TUNNEL,), (Cause.TIMEOUT,), None, "connection_read_timeout"),
    (Side.PROXY, (Phase.REQUEST_HEAD,), (Cause.LIMIT,), 503, "connection_limit_reached"),
    (Side.PROXY, _ALL_PHASES, (Cause.RESOURCE,), 503, "proxy_internal_error"),
    (Side.PROXY, _ALL_PHASES, (Cause.SHUTDOWN,), 503, "proxy_internal_error"),
    (Side.PROXY, _ALL_PHASES, (Cause.KILLED,), 503, "proxy_internal_response"),
    (Side.PROXY, _ALL_PHASES, (Cause.INTERNAL,), 502, "proxy_internal_error"),
)

# (side, phase, cause) to (status, error type). What is not in it does not occur.
ANSWERS: dict[tuple[Side, Phase, Cause], tuple[int | None, str | None]] = {
    (side, phase, cause): (status, error_type)
    for side, phases, causes, status, error_type in _ROWS
    for phase in phases
    for cause in causes
}
