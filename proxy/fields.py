"""Which fields go on to the other side: hop-by-hop fields out, the proxy's own in, everything else octet for octet.

The result depends on the header section, on the connection it came over, and on little else (what stands first in
``PreparedRequest`` and ``PreparedResponse``), so it is kept with the section and made once for as long as a peer
repeats itself; what changes from request to request (``X-Request-Id``) is added when the head is serialized.
"""

import typing

from .grammar import CONTENT_LENGTH, REQUEST_ID
from .head import HeaderSection, RequestHead, ResponseHead, list_elements

# RFC 9110 §7.6.1, and the two fields of a proxy's own authentication, which apply to the next hop alone (§11.7).
# Transfer-Encoding is not among them: the chunked coding is relayed as it is, with its field.
_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"upgrade",
        b"proxy-authenticate",
        b"proxy-authorization",
    )
)
# Set by the proxy: what a client sends under these names would let it pose as another.
_SET_ON_REQUESTS = frozenset((b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"x-request-id"))
_SET_ON_RESPONSES = frozenset((b"x-request-id",))
_TRACING = frozenset((b"OPTIONS", b"TRACE"))
# A 1xx or 204 must not have them (RFC 9112 §6.1, RFC 9110 §8.6), and a client that believes them waits for a body.
_FRAMES_A_BODY = frozenset((b"content-length", b"transfer-encoding", b"trailer"))


# These three are made often. A frozen dataclass takes three times as long to make as a named tuple.


class ForwardingContext(typing.NamedTuple):
    """What the proxy says of a client connection to upstream: octets ready for a head."""

    proxy_name: bytes  # the pseudonym in Via
    client_address: bytes  # for X-Forwarded-For
    scheme: bytes  # b"http" or b"https", as the client spoke it
    upstream_host: bytes  # for Host where an HTTP/1.0 client sent none


class PreparedRequest(typing.NamedTuple):
    """A request's header section as it goes upstream, and what it asks of the connection."""

    minor: int
    context: ForwardingContext
    hops: int | None  # what ``max_forwards`` said
    lines: bytes  # field lines, without X-Request-Id and the empty line
    request_id: bytes | None  # the client's own, if well formed
    keep_alive: bool
    upgrade: bool
    expects_continue: bool
    # Octets of body with which the request is whole; -1 where that shows only as they come (chunked), or where the
    # answer has to be more than passed on (HTTP/1.0, Expect).
    whole_with: int


class PreparedResponse(typing.NamedTuple):
    """A response's header section as it goes to the client, and what it says of the connection."""

    dechunk: bool
    bodiless: bool  # 1xx or 204
    minor: int
    lines: bytes  # field lines, without X-Request-Id, Connection, Upgrade and the empty line
    keep_alive: bool


def max_forwards(head: RequestHead) -> int | None:
    """Returns: how many more hops a TRACE or OPTIONS request may take (RFC 9110 §7.6.2), None where that is left open;
    other methods do not ask.
    """
    if head.method not in _TRACING:
        return None
    values = head.section.known.get(b"max-forwards", ())
    return int(values[0]) if len(values) == 1 and CONTENT_LENGTH.fullmatch(values[0]) is not None else None


def _passing_lines(section: HeaderSection, dropped: frozenset[bytes]) -> list[bytes]:
    options = section.options
    lines = []
    for name, value in section.fields:
        lower = name.lower()
        # With "_" for "-" CGI and WSGI make the same name of it, and a client's would pass for ours.
        if (
            lower.replace(b"_", b"-") not in dropped
            and lower not in _HOP_BY_HOP
            and (lower not in options or lower == b"transfer-encoding")
        ):
            lines.append(b"%b:%b\r\n" % (name, value))
    return lines


def prepare_request(head: RequestHead, context: ForwardingContext) -> PreparedRequest:
    """Make, or find again, the field lines of a request for upstream (RFC 9110 §7.6)."""
    prepared = head.prepared  # the very same head, again
    if isinstance(prepared, PreparedRequest) and prepared.context is context:
        return prepared
    section = head.section
    prepared = section.prepared
    hops = max_forwards(head)
    if (
        isinstance(prepared, PreparedRequest)
        and prepared.minor == head.minor
        and prepared.context == context
        and prepared.hops == hops
    ):
        head.prepared = prepared
        return prepared
    section.prepared = head.prepared = made = _make_request(head, context, hops)
    return made


def _make_request(head: RequestHead, context: ForwardingContext, hops: int | None) -> PreparedRequest:
    section = head.section
    known = section.known
    options = section.options
    # Expect and Upgrade mean nothing in HTTP/1.0 (RFC 9110 §10.1.1, §7.8).
    dropped = _SET_ON_REQUESTS if head.minor else _SET_ON_REQUESTS | {b"expect"}
    if hops is not None:
        dropped |= {b"max-forwards"}
    lines = _passing_lines(section, dropped)
    if hops is not None:
        lines.append(b"Max-Forwards: %d\r\n" % max(0, hops - 1))
    host = section.first(b"host")
    if host is None:
        lines.insert(0, b"Host: %b\r\n" % context.upstream_host)
    else:
        lines.append(b"X-Forwarded-Host: %b\r\n" % host)
    lines.append(b"X-Forwarded-For: %b\r\n" % context.client_address)
    lines.append(b"X-Forwarded-Proto: %b\r\n" % context.scheme)
    lines.append(b"Via: 1.%d %b\r\n" % (head.minor, context.proxy_name))
    own_options = []
    upgrade = b"upgrade" in known and b"upgrade" in options and head.minor == 1
    if upgrade:
        lines.append(b"Upgrade: %b\r\n" % b", ".join(known[b"upgrade"]))
        own_options.append(b"Upgrade")
    # An HTTP/1.0 client has no chunks, and so no trailers.
    if head.minor and any(element.lower() == b"trailers" for element in list_elements(known.get(b"te", ()))):
        lines.append(b"TE: trailers\r\n")
        own_options.append(b"TE")
    if own_options:
        lines.append(b"Connection: %b\r\n" % b", ".join(own_options))
    ids = known.get(b"x-request-id", [])
    expect = known.get(b"expect")
    expects_continue = (
        expect is not None
        and head.minor == 1
        and b"expect" not in options
        and any(v.lower() == b"100-continue" for v in expect)
    )
    return PreparedRequest(
        minor=head.minor,
        context=context,
        hops=hops,
        lines=b"".join(lines),
        request_id=ids[0] if len(ids) == 1 and REQUEST_ID.fullmatch(ids[0]) else None,
        keep_alive=_persists(head),
        upgrade=upgrade,
        expects_continue=expects_continue,
        whole_with=-1 if section.chunked or expects_continue or not head.minor else section.content_length or 0,
    )


def _persists(head: RequestHead | ResponseHead) -> bool:
    """Whether the sender keeps its connection open behind this message (RFC 9112 §9.3)."""
    options = head.section.options
    return b"close" not in options and (head.minor == 1 or b"keep-alive" in options)


def prepare_response(head: ResponseHead, proxy_name: bytes, *, dechunk: bool) -> PreparedResponse:
    """Make, or find again, the field lines of a response for the client. ``dechunk`` leaves the chunked coding off,
    for HTTP/1.0.
    """
    prepared = head.prepared  # the very same head, again
    if isinstance(prepared, PreparedResponse) and prepared.dechunk is dechunk:
        return prepared
    section = head.section
    prepared = section.prepared
    bodiless = head.status < 200 or head.status == 204
    if (
        isinstance(prepared, PreparedResponse)
        and prepared.dechunk is dechunk
        and prepared.bodiless is bodiless
        and prepared.minor == head.minor
    ):
        head.prepared = prepared
        return prepared
    dropped = _SET_ON_RESPONSES | {b"transfer-encoding", b"trailer"} if dechunk else _SET_ON_RESPONSES
    if bodiless:
        dropped |= _FRAMES_A_BODY
    lines = _passing_lines(section, dropped)
    lines.append(b"Via: 1.%d %b\r\n" % (head.minor, proxy_name))
    prepared = PreparedResponse(
        dechunk=dechunk,
        bodiless=bodiless,
        minor=head.minor,
        lines=b"".join(lines),
        keep_alive=_persists(head),
    )
    section.prepared = head.prepared = prepared
    return prepared


def serialize_request(head: RequestHead, prepared: PreparedRequest, request_id: bytes) -> bytes:
    """Returns: the request head for upstream; method and target octet for octet, the version ours."""
    return b"%b %b HTTP/1.1\r\n%bX-Request-Id: %b\r\n\r\n" % (head.method, head.target, prepared.lines, request_id)


def serialize_response(
    head: ResponseHead, prepared: PreparedResponse, connection: bytes, request_id: bytes | None
) -> bytes:
    """Returns: the response head for the client. ``connection`` holds whole lines, or nothing; interim responses have
    no ``request_id``.
    """
    id_line = b"X-Request-Id: %b\r\n" % request_id if request_id is not None else b""
    return b"HTTP/1.1 %d %b\r\n%b%b%b\r\n" % (head.status, head.reason, prepared.lines, connection, id_line)


def upgrade_lines(section: HeaderSection) -> bytes:
    """Returns: the Upgrade field of a 101 or 426 response, with the Connection option it needs, as lines."""
    values = section.known.get(b"upgrade")
    return b"Upgrade: %b\r\nConnection: Upgrade\r\n" % b", ".join(values) if values else b""


def upgrade_protocols(section: HeaderSection) -> set[bytes]:
    """Returns: the protocols of the Upgrade field, in lower case, as they are to be compared (RFC 9110 §7.8)."""
    return {element.lower() for element in list_elements(section.known.get(b"upgrade", ()))}
