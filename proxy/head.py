"""Heads of messages: bytes to ``RequestHead`` and ``ResponseHead``, untouched octets kept.

Decides whether a head is well formed and what it says about framing and the connection, strictly: whatever two
parsers might read in two ways is refused. Does no input or output and knows no side. What goes on to the other side
is decided in ``fields``.

A peer repeats its header section from message to message, so a ``HeaderSection`` is parsed once and kept for as long
as the same octets come again (``SectionMemory``, one for each connection and direction); it also carries what
``fields`` made of it.
"""

import collections.abc
import dataclasses

from .grammar import (
    ABSOLUTE_FORM,
    BEFORE_QUERY,
    CLEAN_OCTETS,
    CONTENT_LENGTH,
    FIELD_LINE,
    FIELD_LINES,
    HOST,
    LIKE_A_VERSION,
    MAX_FIELDS,
    REQUEST_LINE,
    STATUS_LINE,
    TOKEN,
    MalformedMessage,
)
from .masking import mask_secrets

# The fields whose values this proxy looks at; all others are relayed unread.
_READ_FIELDS = frozenset(
    (
        b"connection",
        b"content-length",
        b"content-encoding",
        b"content-type",
        b"expect",
        b"host",
        b"max-forwards",
        b"te",
        b"transfer-encoding",
        b"upgrade",
        b"x-request-id",
    )
)
# Tabs may stand around their values (RFC 9112 §5.1), but Node and nginx take them for a part of it, and the fields are
# relayed as they came.
_FRAMING_FIELDS = frozenset((b"content-length", b"transfer-encoding"))
_CREDENTIALS = frozenset(
    (b"authorization", b"cookie", b"proxy-authorization", b"set-cookie", b"x-registry-auth", b"x-registry-config")
)
_NO_OPTIONS: frozenset[bytes] = frozenset()
# Octets of a head that is remembered for the next message: a larger one takes many times its size once it is parsed,
# which thousands of idle connections would hold on to.
MOST_REMEMBERED = 8192
# Without these no recipient could find the end of the message or its host; a Connection option that names one asks the
# proxy to remove it, and then the two sides of the proxy would see different messages.
_NEVER_HOP_BY_HOP = frozenset((b"content-length", b"host"))


class HeaderSection:
    """The fields of one message, and what they say about framing and the connection.

    ``fields`` holds (name, raw value) as received, in order; ``known`` the trimmed values of the fields this proxy
    reads, by lowercase name. ``prepared`` belongs to ``fields``: the section as it goes to the other side.
    """

    __slots__ = ("chunked", "content_length", "fields", "has_credentials", "known", "octets", "options", "prepared")

    def __init__(self, octets: bytes) -> None:
        """Parse field lines, each ended by CRLF, without the empty line.

        Raises: MalformedMessage, with the octet counted from the start of ``octets``.
        """
        if FIELD_LINES.fullmatch(octets) is None:
            raise _explain_section(octets)
        self.fields: list[tuple[bytes, bytes]] = FIELD_LINE.findall(octets)
        if len(self.fields) > MAX_FIELDS:
            raise MalformedMessage(f"more than {MAX_FIELDS} fields", len(octets), status=431, bound="max_fields")
        self.octets = octets
        self.has_credentials = False
        self.known: dict[bytes, list[bytes]] = {}
        for name, value in self.fields:
            lower = name.lower()
            if lower in _READ_FIELDS:
                if b"\t" in value and lower in _FRAMING_FIELDS:
                    raise MalformedMessage("a tab in a field that frames the body", 0, name)
                self.known.setdefault(lower, []).append(value.strip(b" \t"))
            elif lower in _CREDENTIALS:
                self.has_credentials = True
        known = self.known
        self.options = _connection_options(known[b"connection"]) if b"connection" in known else _NO_OPTIONS
        self.content_length = _content_length(known[b"content-length"]) if b"content-length" in known else None
        self.chunked = False
        if b"transfer-encoding" in known:
            if self.content_length is not None:
                raise MalformedMessage(
                    "both Transfer-Encoding and Content-Length", 0, b", ".join(known[b"transfer-encoding"])
                )
            self.chunked = _chunked(known[b"transfer-encoding"])
        self.prepared: object = None

    def first(self, name: bytes) -> bytes | None:
        """Returns: the trimmed value of the first field of that lowercase name, one of those the proxy reads."""
        values = self.known.get(name)
        return values[0] if values else None


class SectionMemory:
    """Keeps the last head of one connection and direction, and its header section, since peers repeat theirs.

    ``shared`` is the memory of all connections of a kind: a client that opens one for each request repeats itself,
    too. What has credentials in it is remembered by its own connection alone, and goes with it.
    """

    __slots__ = ("head_octets", "last_request", "request", "response", "section", "shared")

    def __init__(self, shared: "SectionMemory | None" = None) -> None:
        self.head_octets: bytes | None = None  # of the head below, be it a request's or a response's
        self.request: RequestHead | None = None
        self.response: ResponseHead | None = None
        self.section: HeaderSection | None = None
        self.shared = shared
        # Of a shared memory: octets and head together, so that no thread sees those of two requests.
        self.last_request: tuple[bytes, RequestHead] | None = None

    def parse(self, octets: bytes) -> HeaderSection:
        """Like ``HeaderSection(octets)``, from memory where it is the same as last time."""
        section = self.section
        if section is not None and section.octets == octets:
            return section
        shared = self.shared
        section = shared.section if shared is not None else None
        if section is None or section.octets != octets:
            section = HeaderSection(octets)
            if len(octets) > MOST_REMEMBERED:
                return section
            if shared is not None and not section.has_credentials:
                shared.section = section  # one store: another thread sees the old or the new
        self.section = section
        return section


@dataclasses.dataclass(slots=True)
class RequestHead:
    """A request head that is well formed and has one meaning. ``minor`` is the version's: 0 or 1. Requests share
    it: what is worked out from it later is kept with it, and the rest never changes.
    """

    method: bytes
    target: bytes
    minor: int
    section: HeaderSection
    size: int  # octets, the empty line included
    prepared: object = None  # belongs to ``fields``
    passed: bool = False  # belongs to ``exchange``: nothing in it keeps it from going on
    logged: tuple[str, str, str] | None = None  # belongs to ``record``: what the records of this head say alike
    _masked: bytes | None = None

    def masked_target(self) -> bytes:
        """Returns: the target as it may be logged. Several lines tell it, and for a long one it takes milliseconds."""
        if self._masked is None:
            self._masked = mask_secrets(self.target)
        return self._masked


@dataclasses.dataclass(slots=True)
class ResponseHead:
    """A response head, interim ones included."""

    status: int
    reason: bytes
    minor: int
    section: HeaderSection
    size: int
    prepared: object = None  # belongs to ``fields``


def parse_request_head(octets: bytes, memory: SectionMemory) -> RequestHead:
    """Parse a whole request head, from the request line to the empty line.

    Raises: MalformedMessage with the status to answer: 400, 431, 501, 505.
    """
    if octets == memory.head_octets and memory.request is not None:
        return memory.request
    shared = memory.shared
    if shared is not None and (last := shared.last_request) is not None and last[0] == octets:
        known = last[1]
        if memory.head_octets is None:
            memory.head_octets = b""
            return known  # the one request of many a connection
        # A copy: what is prepared for the client of one connection must not push out what is for another's.
        memory.head_octets = octets
        memory.request = head = dataclasses.replace(known)
        return head
    line_end = octets.find(b"\r\n")
    method, target, minor = parse_request_line(octets[:line_end])
    try:
        section = memory.parse(octets[line_end + 2 : -2])
    except MalformedMessage as error:
        error.octet += line_end + 2
        raise
    fields = section.known
    if section.chunked and not minor:
        # RFC 9112 §6.1: such framing is faulty whatever else the message says.
        raise MalformedMessage("Transfer-Encoding in an HTTP/1.0 request", line_end + 2)
    hosts = fields.get(b"host")
    if hosts is None:
        if minor:
            raise MalformedMessage("no Host field in an HTTP/1.1 request", line_end + 2)
    elif len(hosts) > 1:
        raise MalformedMessage("more than one Host field", line_end + 2, _without_user(b", ".join(hosts)))
    elif section.prepared is None and HOST.fullmatch(hosts[0]) is None:
        raise MalformedMessage("a Host field that is no host", line_end + 2, _without_user(hosts[0]))
    if target[0] != 0x2F or b"#" in target:
        _check_target(method, target, None if hosts is None else hosts[0])
    head = RequestHead(method, target, minor, section, len(octets))
    if len(octets) > MOST_REMEMBERED:
        return head
    memory.head_octets = octets
    memory.request = head
    if shared is not None and not section.has_credentials and b"?" not in target and b"@" not in target:
        shared.last_request = octets, head
    return head


def parse_request_line(line: bytes) -> tuple[bytes, bytes, int]:
    """Returns: method, target and minor version of a request line, which stands there without its CRLF.

    Raises: MalformedMessage with the status to answer: 400, 505.
    """
    match = REQUEST_LINE.fullmatch(line)
    if match is None:
        raise _explain_request_line(line)
    method, target, major, minor_digit = match.groups()
    if major != b"1" or minor_digit not in (b"0", b"1"):
        raise MalformedMessage("an HTTP version other than 1.0 and 1.1", len(line) - 3, line[-8:], status=505)
    return method, target, 1 if minor_digit == b"1" else 0


def parse_response_head(octets: bytes, memory: SectionMemory) -> ResponseHead:
    """Parse a whole response head, from the status line to the empty line.

    Raises: MalformedMessage; its ``status`` means nothing here.
    """
    if octets == memory.head_octets and memory.response is not None:
        return memory.response
    line_end = octets.find(b"\r\n")
    minor_digit, status, reason = _parse_status_line(octets, line_end)
    try:
        section = memory.parse(octets[line_end + 2 : -2])
    except MalformedMessage as error:
        error.octet += line_end + 2
        raise
    minor = 0 if minor_digit == b"0" else 1
    if section.chunked and not minor:
        raise MalformedMessage("Transfer-Encoding in an HTTP/1.0 response", line_end + 2)
    head = ResponseHead(int(status), reason or b"", minor, section, len(octets))
    if len(octets) <= MOST_REMEMBERED:
        memory.head_octets = octets
        memory.response = head
    return head


def _parse_status_line(octets: bytes, line_end: int) -> tuple[bytes, bytes, bytes | None]:
    """Returns: the digit of the minor version, status and reason. Raises: MalformedMessage."""
    match = STATUS_LINE.fullmatch(octets, 0, line_end)
    if match is None:
        raise MalformedMessage("not a status line", 0, octets[: min(line_end, 64)])
    major, minor_digit, status, reason = match.groups()
    if major != b"1":
        raise MalformedMessage("an HTTP version other than 1.0 and 1.1", 0, octets[:line_end])
    return minor_digit, status, reason


def check_partial_response_head(octets: bytes, start: int = 0) -> None:
    """As ``check_partial_head``, and also find a first line that is no status line: who speaks another protocol (SSH,
    SMTP) may say no more than that, and wait.

    Raises: MalformedMessage.
    """
    check_partial_head(octets, start)
    line_end = octets.find(b"\r\n")
    if line_end >= 0:
        _parse_status_line(octets, line_end)
    elif not b"HTTP/".startswith(octets[:5]):
        raise MalformedMessage("not a status line", 0, octets[:64])


def check_partial_head(octets: bytes, start: int = 0) -> None:
    """Find what is wrong with the beginning of a head whose end has not come, so that nobody waits for it.

    ``start`` says how many octets have been checked before: without it, a head that comes octet by octet would take
    quadratic time.
    Raises: MalformedMessage.
    """
    if octets[:1] == b"\x16":
        raise MalformedMessage("this looks like a TLS handshake, but plain HTTP is spoken here", 0, octets[:8])
    at = _find_stray(octets, start - 1 if start and octets[start - 1] == 0x0D else start)
    if at is not None:
        # Alone: what stands around it may be a part of a secret.
        raise MalformedMessage(_name_stray(octets[at]), at, octets[at : at + 1])


def _find_stray(octets: bytes, start: int = 0) -> int | None:
    """Returns: where the first octet is that no head holds, None without one; a CR at the end may still get its LF."""
    match = CLEAN_OCTETS.match(octets, start)
    assert match is not None  # the pattern takes an empty sequence too
    at = match.end()
    return None if at == len(octets) or octets[at:] == b"\r" else at


def _without_query(target: bytes) -> bytes:
    """Returns: a target as an error may quote it: secrets are in queries, fragments and user information."""
    match = BEFORE_QUERY.match(target)
    assert match is not None  # the pattern takes an empty path, too
    path = match[0]
    mark = target[len(path) : len(path) + 1]
    return _without_user(path) + (mark + b"..." if mark else b"")


def _without_user(octets: bytes) -> bytes:
    """Returns: ``octets`` with what stands before an "@", back to a slash or a space, replaced."""
    words = [word.split(b"/") for word in octets.split(b" ")]
    return b" ".join(b"/".join(_behind_at(part) for part in word) for word in words)


def _behind_at(octets: bytes) -> bytes:
    return b"***@" + octets.rpartition(b"@")[2] if b"@" in octets else octets


def _name_stray(octet: int) -> str:
    match octet:
        case 0x0A:
            return "a line feed without its carriage return"
        case 0x0D:
            return "a carriage return without its line feed"
        case _:
            return f"a control character (0x{octet:02x})"


def _explain_request_line(line: bytes) -> MalformedMessage:
    """Say what is wrong with a request line that does not match."""
    try:
        check_partial_head(line)
    except MalformedMessage as error:
        return error
    parts = line.split(b" ")
    if not line:
        return MalformedMessage("an empty request line", 0)
    if TOKEN.fullmatch(parts[0]) is None:
        # The octet alone: where a body was longer than its length, its rest stands here.
        token = TOKEN.match(parts[0])
        at = token.end() if token is not None else 0
        return MalformedMessage("a method that is no token", at, line[at : at + 1])
    if len(parts) < 3:
        return MalformedMessage("a request line without an HTTP version", len(line), _without_query(line))
    if len(parts) > 3:
        at = len(b" ".join(parts[:3]))
        return MalformedMessage("more than two spaces in the request line", at, b" ")
    if not parts[1]:
        return MalformedMessage("two spaces in a row in the request line", len(parts[0]), _without_query(line))
    if REQUEST_LINE.fullmatch(b"GET / " + parts[2]) is None:
        quoted = parts[2] if LIKE_A_VERSION.fullmatch(parts[2]) is not None else parts[2][:1]
        return MalformedMessage("not an HTTP version", len(line) - len(parts[2]), quoted)
    return MalformedMessage(
        "octets outside visible ASCII in the request target", len(parts[0]) + 1, _without_query(parts[1])
    )


def _explain_section(octets: bytes) -> MalformedMessage:
    """Say what is wrong with a header section that does not match, and where."""
    match = FIELD_LINES.match(octets)
    assert match is not None  # the pattern takes an empty sequence too
    at = match.end()
    rest = octets[at:]
    line = rest.split(b"\r\n", 1)[0]
    stray = _find_stray(line)
    name, colon, _ = line.partition(b":")
    if rest[:1] in (b" ", b"\t"):
        reason = "a field line that begins with whitespace (obsolete line folding)"
    elif stray is not None:
        at += stray
        reason = _name_stray(line[stray]) + " in a field line"
    elif not colon:
        reason = "a field line without a colon"
    elif not name:
        reason = "a field without a name"
    elif name[-1:] in (b" ", b"\t"):
        reason = "whitespace between a field name and its colon"
    else:
        reason = "a field name that is no token"
    # The name alone, or a few octets where there is none: values hold credentials.
    folded = rest[:1] in (b" ", b"\t")
    return MalformedMessage(reason, at, line[:1] if folded else name[:32] if colon else line[:8])


def list_elements(values: collections.abc.Iterable[bytes]) -> list[bytes]:
    """Returns: the elements of a list over all its field lines, without empty ones (RFC 9110 §5.6.1)."""
    return [element for value in values for part in value.split(b",") if (element := part.strip(b" \t"))]


def _connection_options(values: list[bytes]) -> frozenset[bytes]:
    options = frozenset(element.lower() for element in list_elements(values))
    for option in options:
        if TOKEN.fullmatch(option) is None:
            raise MalformedMessage("a Connection option that is no token", 0, option)
    forbidden = options & _NEVER_HOP_BY_HOP
    if forbidden:
        raise MalformedMessage(
            "a Connection option that names a field meant for all recipients", 0, b", ".join(sorted(forbidden))
        )
    return options


def _content_length(values: list[bytes]) -> int:
    # RFC 9112 §6.3 lets equal lengths pass as one. We relay fields as they came, and would have to trust everyone
    # behind us to do the same; senders that repeat it are broken or worse.
    if len(values) > 1:
        raise MalformedMessage("more than one Content-Length", 0, b", ".join(values))
    if CONTENT_LENGTH.fullmatch(values[0]) is None:
        raise MalformedMessage("a Content-Length that is not a number of at most 18 digits", 0, values[0])
    return int(values[0])


def _chunked(values: list[bytes]) -> bool:
    """True, as all but a single ``chunked`` is refused: it is the one coding that every recipient has (RFC 9112 §6.1).

    ``chunked,`` or an empty second field would pass as lists (RFC 9110 §5.6.1). Fields are relayed as they came, and to
    a parser that compares the whole value they are another coding than ``chunked``, or none.
    """
    if len(values) == 1 and values[0].lower() == b"chunked":
        return True
    joined = b", ".join(values)
    elements = [part.strip(b" \t").lower() for value in values for part in value.split(b",")]
    if b"" in elements:
        raise MalformedMessage("a Transfer-Encoding with an empty element", 0, joined)
    if elements.count(b"chunked") > 1:
        raise MalformedMessage("the chunked coding applied twice", 0, joined)
    if b"chunked" in elements[:-1]:
        raise MalformedMessage("a transfer coding after chunked", 0, joined)
    for element in elements:
        name = element.split(b";", 1)[0].strip(b" \t")
        if TOKEN.fullmatch(name) is None or (name == b"chunked" and element != b"chunked"):
            raise MalformedMessage("a Transfer-Encoding that is no list of codings", 0, joined)
    raise MalformedMessage("an unknown transfer coding", 0, joined, status=501)


def _check_target(method: bytes, target: bytes, host: bytes | None) -> None:
    """Refuse a target that is in none of the forms of RFC 9112 §3.2, or that speaks of another host than ``Host``
    does.
    """
    at = len(method) + 1
    if b"#" in target:
        raise MalformedMessage("a fragment in the request target", at + target.index(b"#"), _without_query(target))
    if target[:1] == b"/" or (target == b"*" and method == b"OPTIONS"):
        return
    if method == b"CONNECT":
        return  # authority-form; answered with 405 where requests are judged
    match = ABSOLUTE_FORM.fullmatch(target)
    if match is None:
        raise MalformedMessage(
            "a request target that is neither a path nor an absolute URI", at, _without_query(target)
        )
    # RFC 9112 §3.2.2 lets the target win over Host. Both are relayed as they came, so where they differ it would be
    # left to chance which of them the upstream serves.
    authority: bytes = match.group(1)
    if not authority or HOST.fullmatch(authority) is None:
        raise MalformedMessage("an absolute request target without a valid host", at, _without_query(target))
    if host is None:
        # Only in HTTP/1.0: the Host field that upstream has to get would be ours, and name another host.
        raise MalformedMessage("an absolute request target without a Host field", at, _without_query(target))
    if authority.lower() != host.lower():
        raise MalformedMessage(
            "a request target for another host than the Host field names", at, _without_query(target)
        )
