"""The ABNF of RFC 9110 and RFC 9112 as byte patterns, and the error of a message that does not follow it.

Decides what an octet sequence may look like, and nothing about what it means. Every repetition is possessive, so that
no input can make a match take more than linear time.
"""

import re

# RFC 9110 §5.6.2
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
# An octet of a field value or a reason phrase: HTAB, SP, VCHAR or obs-text (RFC 9110 §5.5).
_TEXT = rb"[\t\x20-\x7e\x80-\xff]"
# RFC 9110 §5.6.4
_QUOTED_STRING = rb"\"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\" + _TEXT + rb")*+\""

TOKEN = re.compile(_TOKEN)

# RFC 9112 §3. The target is kept as octets; whitespace and anything outside visible ASCII in it has been the way to
# make two parsers see two requests. The version is checked apart, so that a well formed one we do not speak gets a
# 505.
REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e]++) HTTP/([0-9])\.([0-9])")
# What a request line that is none still tells of method and target, for the record.
TOLD_METHOD = re.compile(rb"(" + _TOKEN + rb") ")
TOLD_LINE = re.compile(_TOKEN + rb" ([^\x00-\x20\x7f]++)(?: [^\x00-\x20\x7f]*+)?")

# What may be quoted of a target, and of what stands in place of a version.
BEFORE_QUERY = re.compile(rb"[^?&#]*+")
LIKE_A_VERSION = re.compile(rb"[A-Za-z]{1,5}+/?[0-9.]{0,8}+")

# RFC 9112 §4. The space before an empty reason phrase is required there; so many servers leave it out, and so little
# hangs on it, that we take both.
STATUS_LINE = re.compile(rb"HTTP/([0-9])\.([0-9]) ([1-9][0-9]{2})(?: (" + _TEXT + rb"*+))?")

# field-line CRLF, RFC 9112 §5: no space before the colon, no line folding, no control characters. Octets of 0x80 and
# above are obs-text and pass. Whitespace around the value is left in the second group: what is relayed keeps its
# octets.
FIELD_LINE = re.compile(rb"(" + _TOKEN + rb"):(" + _TEXT + rb"*+)\r\n")
FIELD_LINES = re.compile(rb"(?:" + _TOKEN + rb":" + _TEXT + rb"*+\r\n)*+")

# uri-host [ ":" port ], RFC 9110 §7.2. An empty one is allowed there. "@" and "/" are not part of it: they have been
# used to make Host and target disagree.
HOST = re.compile(
    rb"(?:[A-Za-z0-9\-._~!$&'()*+,;=%]*+|\[[0-9A-Fa-f:.]++\]|\[v[0-9A-Fa-f]++\.[A-Za-z0-9\-._~!$&'()*+,;=:]++\])(?::[0-9]*+)?"
)

# http(s) URI in absolute-form, RFC 9112 §3.2.2: the authority, and the rest.
ABSOLUTE_FORM = re.compile(rb"[Hh][Tt][Tt][Pp][Ss]?://([^/?#]*+)([/?].*+)?")

# 1*DIGIT without a bound in RFC 9110 §8.6. 18 digits are an exabyte, and stay inside a signed 64-bit number of a
# parser behind us.
CONTENT_LENGTH = re.compile(rb"[0-9]{1,18}")

# chunk-size is 1*HEXDIG (RFC 9112 §7.1) without a bound. We take at most 15 digits: no honest length needs more, and
# a parser behind us that wraps at 64 bits would see another end of the message than we do. Extensions follow §7.1.1
# without the "bad" whitespace, which no sender is allowed to make.
CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,15}+)(?:;" + _TOKEN + rb"(?:=(?:" + _TOKEN + rb"|" + _QUOTED_STRING + rb"))?)*+"
)

# An X-Request-Id that a client may choose: safe in any log and any field.
REQUEST_ID = re.compile(rb"[A-Za-z0-9._\-]{1,128}+")
# The lines of a head, well formed or not, that say one.
REQUEST_ID_LINE = re.compile(rb"\r\nx-request-id:([^\r\n]*+)", re.IGNORECASE)

# What lines may be made of, as far as it goes: behind its match stands the first control character, or the first CR or
# LF that is without the other. A search for that octet itself would try its alternatives anew at every octet before it.
CLEAN_OCTETS = re.compile(_TEXT + rb"*+(?:\r\n" + _TEXT + rb"*+)*+")

# The beginning of a line in chunked framing whose LF has not come.
PART_OF_LINE = re.compile(_TEXT + rb"*+\r?")
PART_OF_CHUNK_LINE = re.compile(rb"[0-9A-Fa-f]{1,15}+(?:;" + _TEXT + rb"*+)?\r?")

MAX_FIELDS = 256
MAX_CHUNK_LINE = 4096


class MalformedMessage(Exception):
    """Octets that are not an HTTP/1.1 message.

    ``reason`` is a clause that says what is wrong, ``octet`` where, counted from the start of what was parsed,
    ``excerpt`` the offending octets, cut. ``status`` is what a server answers to a request of this kind; ``bound``
    names the bound that was passed, where it was one.
    """

    def __init__(
        self, reason: str, octet: int, excerpt: bytes | bytearray = b"", *, status: int = 400, bound: str | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.octet = octet
        self.excerpt = bytes(excerpt[:64])
        self.status = status
        self.bound = bound

    def __str__(self) -> str:
        near = f" near {self.excerpt!r}" if self.excerpt else ""
        return f"{self.reason} (octet {self.octet}{near})"
