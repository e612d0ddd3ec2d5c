"""Where a message ends: by no body, by length, by chunks, or with the connection.

Each framing is fed the octets that follow a head, says how many of them belong to the message, and counts the
content; it buffers nothing but a part of a line, and changes nothing: the octets are relayed as they came. Does no
input or output and knows no side.

Invariant: after ``feed(octets, start, end)`` returned ``stop``, the octets ``[start:stop]`` belong to this message,
and ``stop < end`` only if it is complete.
"""

import re

from .grammar import (
    CHUNK_LINE,
    FIELD_LINES,
    MAX_CHUNK_LINE,
    MAX_FIELDS,
    PART_OF_CHUNK_LINE,
    PART_OF_LINE,
    MalformedMessage,
)
from .head import HeaderSection

# More than any body, and small enough for every interface that takes a count.
ENDLESS = 1 << 62

Octets = bytes | bytearray
# Where a framing stands, for ``content_between``: the state of a ChunkedFraming, the octets that remain of its chunk,
# and the part of a line that has come. For the other framings it makes no difference.
Mark = tuple[int, int, bytes]
# Of one that nothing was fed yet, or that stands between two chunks.
FRESH: Mark = (0, 0, b"")


class NoBody:
    """A message that ends with its head."""

    __slots__ = ()
    complete = True
    content = 0
    ends_with_connection = False
    between_chunks = True
    undecided = 0
    mark: Mark = FRESH

    def feed(self, octets: Octets, start: int, end: int, contents: list[tuple[int, int]] | None = None) -> int:
        """Returns: ``start``, as nothing belongs to the body."""
        return start

    def take_whole(self, octets: bytes) -> bool:
        """Returns: False, as nothing belongs to the body."""
        return False

    def opaque(self) -> int:
        """Returns: 0: no octet may pass unlooked at."""
        return 0

    def skip(self, count: int) -> None:
        """Never called with more than 0."""

    def content_between(self, mark: Mark, octets: Octets, start: int, end: int) -> tuple[int, Mark]:
        """Returns: 0, and the mark."""
        return 0, mark


NO_BODY = NoBody()


class LengthFraming:
    """A body of a length announced in the head (RFC 9112 §6.2)."""

    __slots__ = ("complete", "content", "remaining")
    ends_with_connection = False
    between_chunks = True
    undecided = 0
    mark: Mark = FRESH

    def __init__(self, length: int) -> None:
        self.remaining = length
        self.content = 0
        self.complete = length == 0

    def feed(self, octets: Octets, start: int, end: int, contents: list[tuple[int, int]] | None = None) -> int:
        """Returns: the index behind the last octet of the message."""
        count = end - start
        if count >= self.remaining:
            count = self.remaining
            self.complete = True
        self.remaining -= count
        self.content += count
        if contents is not None:
            contents.append((start, start + count))
        return start + count

    def take_whole(self, octets: bytes) -> bool:
        """Take the octets if the message goes on behind them.

        Returns: False where that is for ``feed`` to say; nothing has changed, then.
        """
        count = len(octets)
        if count >= self.remaining:
            return False
        self.remaining -= count
        self.content += count
        return True

    def opaque(self) -> int:
        """Returns: how many of the next octets are content whatever they are."""
        return self.remaining

    def skip(self, count: int) -> None:
        """Take ``count`` opaque octets as passed."""
        self.remaining -= count
        self.content += count
        self.complete = self.remaining == 0

    def content_between(self, mark: Mark, octets: Octets, start: int, end: int) -> tuple[int, Mark]:
        """Returns: the octets of content in ``[start:end]``, which was fed when the framing stood at ``mark``, and
        where it stood behind them.
        """
        return end - start, mark


class ConnectionFraming(LengthFraming):
    """A body, or one direction of a tunnel, that ends with the connection: ``complete`` is set by whoever sees that
    end.
    """

    __slots__ = ()
    ends_with_connection = True

    def __init__(self) -> None:
        super().__init__(ENDLESS)

    def feed(self, octets: Octets, start: int, end: int, contents: list[tuple[int, int]] | None = None) -> int:
        """Returns: ``end``, as all that comes belongs to the message."""
        self.content += end - start
        if contents is not None:
            contents.append((start, end))
        return end

    def take_whole(self, octets: bytes) -> bool:
        """Take the octets. Returns: True."""
        self.content += len(octets)
        return True

    def skip(self, count: int) -> None:
        """Take ``count`` octets as passed."""
        self.content += count


_CHUNK_SIZE, _CHUNK_DATA, _CHUNK_END, _TRAILER = range(4)
CRLF = b"\r\n"
# A chunk size as nearly all are: without extensions.
_PLAIN_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})\r\n")
# A recipient that merges trailers into the header section must not find other framing there, another host, options of
# the connection, or what a client says of its own address and we drop from heads (RFC 9110 §6.5.1).
_NEVER_IN_TRAILERS = frozenset(
    (
        b"connection",
        b"content-length",
        b"host",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-proto",
        b"x-request-id",
    )
)


class ChunkedFraming:
    """A body in the chunked coding (RFC 9112 §7.1), read strictly: lines end with CRLF, sizes are plain hexadecimal,
    trailer fields are fields. ``max_trailer_size`` bounds the trailer section in octets.
    """

    __slots__ = (
        "complete",
        "content",
        "last_chunk_size",
        "line",
        "max_trailer_size",
        "options",
        "remaining",
        "state",
        "trailer_fields",
        "trailer_size",
    )
    ends_with_connection = False

    def __init__(self, max_trailer_size: int = 65536, options: frozenset[bytes] = frozenset()) -> None:
        self.state = _CHUNK_SIZE
        self.remaining = 0
        self.content = 0
        self.complete = False
        self.line = bytearray()  # the part of a line (or of the CRLF after a chunk) that has come so far
        self.max_trailer_size = max_trailer_size
        self.trailer_size = 0
        self.trailer_fields = 0
        self.last_chunk_size = 0  # octets of the chunk line read last: from the trailer section on, of the last chunk
        self.options = options  # which fields the head's Connection names

    @property
    def between_chunks(self) -> bool:
        """Whether what has passed ends exactly where a chunk could begin."""
        return self.state == _CHUNK_SIZE and not self.line

    @property
    def undecided(self) -> int:
        """How many of the octets taken last may not go on yet: a part of a chunk line, or the last chunk while its
        trailer section is not whole. Some recipients take either for the end of the message (``int("0", 16)``), and a
        message that is cut there must not look whole.
        """
        if self.state == _CHUNK_SIZE:
            return len(self.line)
        if self.state != _TRAILER or self.complete:
            return 0
        return self.last_chunk_size + self.trailer_size + len(self.line)

    @property
    def mark(self) -> Mark:
        """Where the framing stands; see ``Mark``."""
        # A part of a trailer may be long and come octet by octet, and there is no content behind it: it is not copied.
        line = b"" if self.state == _TRAILER else bytes(self.line)
        return (self.state, self.remaining, line)

    def content_between(self, mark: Mark, octets: Octets, start: int, end: int) -> tuple[int, Mark]:
        """Returns: the octets of content in ``[start:end]``, which was fed when the framing stood at ``mark``, and
        where it stood behind them.
        """
        if mark[0] == _TRAILER:
            return 0, mark
        replay = ChunkedFraming(self.max_trailer_size)
        replay.state, replay.remaining, line = mark
        replay.line += line
        replay.feed(octets, start, end)
        return replay.content, replay.mark

    def feed(self, octets: Octets, start: int, end: int, contents: list[tuple[int, int]] | None = None) -> int:
        """Take the octets ``[start:end]``; where ``contents`` is given, append the (start, end) of each run of content.

        Returns: the index behind the last octet of the message.
        Raises: MalformedMessage, with the octet counted from ``start``.
        """
        at = start
        while at < end and not self.complete:
            if self.state == _CHUNK_SIZE and contents is None and not self.line:
                at = self._pass_chunks(octets, at, end)
                if at == end:
                    break
            if self.state == _CHUNK_DATA:
                count = end - at
                if count >= self.remaining:
                    count = self.remaining
                    self.state = _CHUNK_END
                if contents is not None:
                    contents.append((at, at + count))
                self.remaining -= count
                self.content += count
                at += count
                continue
            line_end = octets.find(b"\n", at, end)
            if line_end < 0:
                self._hold(octets[at:end], at - start)
                return end
            line = octets[at : line_end + 1]
            if self.line:
                line = bytes(self.line + line)
                self.line.clear()
            if line[-2:] != b"\r\n":
                raise MalformedMessage(
                    "a line feed without its carriage return in chunked framing",
                    line_end - start,
                    self._quotable(line),
                )
            if self.state == _CHUNK_SIZE:
                match = CHUNK_LINE.fullmatch(line, 0, len(line) - 2)
                if match is None or len(line) > MAX_CHUNK_LINE:
                    raise MalformedMessage("not a chunk size", at - start, self._quotable(line))
                self.remaining = int(match[1], 16)
                self.state = _CHUNK_DATA if self.remaining else _TRAILER
                self.last_chunk_size = len(line)
            elif self.state == _CHUNK_END:
                if len(line) != 2:
                    raise MalformedMessage("a chunk longer than its size", at - start, self._quotable(line))
                self.state = _CHUNK_SIZE
            else:
                self._take_trailer_line(bytes(line), at - start)
            at = line_end + 1
        return at

    def take_whole(self, octets: bytes) -> bool:
        """Take the octets if they are one chunk, whole, as a sender writes that says something now and then.

        Returns: False where it takes ``feed`` to find out what they are; nothing has changed, then.
        """
        if self.state != _CHUNK_SIZE or self.line:
            return False
        match = _PLAIN_SIZE.match(octets)
        if match is None:
            return False
        size = int(match[1], 16)
        end = match.end() + size
        if not size or end + len(CRLF) != len(octets) or octets[end:] != CRLF:
            return False
        self.content += size
        return True

    def _pass_chunks(self, octets: Octets, at: int, end: int) -> int:
        """Pass over chunks from ``at``, where one begins, as long as their lines are whole, plain sizes. Most senders
        make all chunks but the last of one size, and a third of the instructions finds the same line again.

        Returns: where they end, or the content of the last one, for ``feed`` to go on.
        """
        while (match := _PLAIN_SIZE.match(octets, at, end)) is not None:
            line = match[0]
            size = int(match[1], 16)
            if not size:
                break  # the last chunk
            at += len(line) + size
            if at + len(CRLF) < end:
                between = CRLF + line
                step = len(between) + size
                first_at = at
                while octets.startswith(between, at, end):
                    at += step
                self.content += (at - first_at) // step * size
            if at > end:
                self.state = _CHUNK_DATA
                self.remaining = at - end
                self.content += size - self.remaining
                return end
            self.content += size
            if octets[at : at + 2] != CRLF or at + 2 > end:
                self.state = _CHUNK_END
                break
            at += 2
        return at

    def _hold(self, part: Octets, octet: int) -> None:
        """Keep the beginning of a line, unless it can have no good end: nobody should wait for that, and a peer behind
        us that ends its lines in other ways should not get it.
        """
        if PART_OF_LINE.fullmatch(part) is None or self.line[-1:] == b"\r":
            raise MalformedMessage("a control character in chunked framing", octet, self._quotable(self.line + part))
        line = self.line
        line += part
        if self.state == _CHUNK_SIZE:
            if len(line) > MAX_CHUNK_LINE or PART_OF_CHUNK_LINE.fullmatch(line) is None:
                raise MalformedMessage("not a chunk size", octet, self._quotable(line))
        elif self.state == _CHUNK_END:
            if line != b"\r":
                raise MalformedMessage("a chunk longer than its size", octet, self._quotable(line))
        elif self.trailer_size + len(line) > self.max_trailer_size and line != b"\r":
            raise MalformedMessage("a trailer section too large", octet, status=431, bound="max_head_size")

    def _quotable(self, line: Octets) -> Octets:
        """Returns: what of a line may be quoted. Of a trailer the name alone, as in heads: values hold credentials. Of
        what stands in place of a chunk line or its end no more than shows that: it may be content.
        """
        if self.state != _TRAILER:
            return line[:2] if self.state == _CHUNK_END else line[:16]
        name, colon, _ = line.partition(b":")
        return name[:32] if colon else line[:8]

    def _take_trailer_line(self, line: bytes, octet: int) -> None:
        if line == b"\r\n":
            self.complete = True
            return
        self.trailer_size += len(line)
        self.trailer_fields += 1
        if self.trailer_size > self.max_trailer_size:
            raise MalformedMessage("a trailer section too large", octet, status=431, bound="max_head_size")
        if self.trailer_fields > MAX_FIELDS:
            raise MalformedMessage(f"more than {MAX_FIELDS} trailer fields", octet, status=431, bound="max_fields")
        if FIELD_LINES.fullmatch(line) is None:
            raise MalformedMessage("a trailer field that is no field", octet, self._quotable(line))
        # Some recipients read "_" as "-", as heads are judged, too.
        name = line.split(b":", 1)[0].lower().replace(b"_", b"-")
        if name in _NEVER_IN_TRAILERS or name in self.options:
            raise MalformedMessage("a trailer field that may only stand in a head", octet, name)

    def opaque(self) -> int:
        """Returns: how many of the next octets are content whatever they are: what is left of the chunk."""
        return self.remaining if self.state == _CHUNK_DATA else 0

    def skip(self, count: int) -> None:
        """Take ``count`` opaque octets as passed."""
        self.remaining -= count
        self.content += count
        if not self.remaining:
            self.state = _CHUNK_END


Framing = NoBody | LengthFraming | ConnectionFraming | ChunkedFraming


def request_framing(section: HeaderSection, max_trailer_size: int) -> Framing:
    """Returns: the framing of a request body (RFC 9112 §6.3): chunked, by length, or none."""
    if section.chunked:
        return ChunkedFraming(max_trailer_size, section.options)
    if section.content_length:
        return LengthFraming(section.content_length)
    return NO_BODY


def response_framing(status: int, section: HeaderSection, request_method: bytes, max_trailer_size: int) -> Framing:
    """Returns: the framing of the body of a final response (RFC 9112 §6.3)."""
    if request_method == b"HEAD" or status in (204, 304):
        return NO_BODY
    if section.chunked:
        return ChunkedFraming(max_trailer_size, section.options)
    if section.content_length is not None:
        return LengthFraming(section.content_length) if section.content_length else NO_BODY
    return ConnectionFraming()
