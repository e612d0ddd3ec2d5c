"""The words of the log: who ended a request, in which phase, doing what, and why.

The values are the strings that appear in records, in the words of docs/records.md; nothing is translated on the way.
This module decides names only; which combinations mean which status is decided in ``aborts``.
"""

import enum


class Side(enum.StrEnum):
    """Whose doing an abort was; for the proxy's own limits, the socket whose limit it is."""

    CLIENT = "client"
    UPSTREAM = "upstream"
    PROXY = "proxy"


class Phase(enum.StrEnum):
    """How far the exchange had come. While both bodies run: the direction that failed."""

    TLS_HANDSHAKE = "tls_handshake"
    REQUEST_HEAD = "request_head"
    CONNECT = "connect"
    REQUEST_BODY = "request_body"
    RESPONSE_HEAD = "response_head"
    RESPONSE_BODY = "response_body"
    TUNNEL = "tunnel"


class Operation(enum.StrEnum):
    """What the proxy was doing on that side's socket."""

    READ = "read"
    WRITE = "write"
    CONNECT = "connect"
    HANDSHAKE = "handshake"


class Cause(enum.StrEnum):
    """Why the request ended before its response was whole."""

    TIMEOUT = "timeout"  # one of the proxy's own limits on waiting without progress
    DEADLINE = "deadline"  # one of the proxy's own limits on a whole transfer
    DEAD_PEER = "dead_peer"  # the kernel, or --peer-dead-timeout, gave the peer up
    CLOSED = "closed"  # orderly end before the message was whole
    RESET = "reset"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"  # a missing unix socket too
    DNS = "dns"
    TLS = "tls"
    PROTOCOL = "protocol"
    LIMIT = "limit"  # size, rate or number
    FORBIDDEN = "forbidden"
    UNAUTHORIZED = "unauthorized"
    RESOURCE = "resource"  # out of files, memory, threads
    KILLED = "killed"  # ended through the admin listener
    SHUTDOWN = "shutdown"
    INTERNAL = "internal"  # a bug in the proxy
