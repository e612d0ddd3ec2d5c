"""Octets from the known families of request smuggling, each with what this proxy makes of it, and why.

Data only. A case says what becomes of it (``Accept`` with framing and content, or ``Refuse`` with status and place)
under which section of RFC 9112 or RFC 9110. ``h11`` says what the referee does where that is not the same, and then
``why`` says whose reading it should be.
"""

import dataclasses
import typing

# What an attacker would like to see served: it may not reach upstream as a request unless a case says that it is one.
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"


@dataclasses.dataclass(frozen=True, slots=True)
class Accept:
    """One message that is relayed. ``rest`` is the next one's; if not ``complete``, the octets end inside the body."""

    framing: typing.Literal["none", "length", "chunked", "connection"]
    content: bytes = b""
    rest: bytes = b""
    complete: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Refuse:
    """A message that is not relayed. ``where``: the head, by the codec or by what judges it; or the body."""

    status: int = 400
    where: typing.Literal["head", "policy", "body"] = "head"


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One byte string and its verdict. ``method`` is that of the request, for responses."""

    name: str
    octets: bytes
    verdict: Accept | Refuse
    reference: str
    h11: typing.Literal["same", "accepts", "refuses"] = "same"
    why: str = ""
    method: bytes = b"GET"


def _get(*lines: bytes, target: bytes = b"/") -> bytes:
    return b"\r\n".join((b"GET " + target + b" HTTP/1.1", b"Host: a", *lines, b"", b""))


def _post(*lines: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join((b"POST / HTTP/1.1", b"Host: a", *lines, b"", b"")) + body


def _line(line: bytes) -> bytes:
    return line + b"\r\nHost: a\r\n\r\n"


def _chunked(body: bytes) -> bytes:
    return _post(b"Transfer-Encoding: chunked", body=body)


def _length(value: bytes, body: bytes = b"") -> bytes:
    return _post(b"Content-Length:" + value, body=body)


def _hosts(*lines: bytes, target: bytes = b"/") -> bytes:
    return b"\r\n".join((b"GET " + target + b" HTTP/1.1", *lines, b"", b""))


_LIST_WHY = "the list rule allows empty elements; parsers that compare the whole value see another coding"
_LF_WHY = "RFC 9112 §2.2 lets a recipient take a bare LF as a line end; whoever does not sees another message"
_FOLD_WHY = "RFC 9112 §5.2: a server must refuse or unfold; we refuse, since parsers unfold in different ways"
_REPEATED_WHY = "RFC 9112 §6.3 lets equal lengths pass as one; all behind us would have to do the same"

_TAB_WHY = "allowed; Node and nginx take the tab for a part of the value and see another coding or length"

_TE_AND_CL = "RFC 9112 §6.3 item 3"
_TE = "RFC 9112 §6.1"
_FRAMING = "RFC 9112 §6.3"
_CHUNK = "RFC 9112 §7.1"
_EXTENSION = "RFC 9112 §7.1.1"
_TRAILER = "RFC 9110 §6.5.1"
_LENGTH = "RFC 9110 §8.6"
_FIELD = "RFC 9112 §5.1"
_FOLD = "RFC 9112 §5.2"
_VALUE = "RFC 9110 §5.5"
_LINES = "RFC 9112 §2.2"
_REQUEST = "RFC 9112 §3"
_TARGET = "RFC 9112 §3.2"
_HOST = "RFC 9112 §3.2"
_VERSION = "RFC 9112 §2.3"
_METHOD = "RFC 9110 §9.1"
_CONNECTION = "RFC 9110 §7.6.1"
_STATUS = "RFC 9112 §4"

_HELLO = b"5\r\nhello\r\n0\r\n\r\n"

REQUESTS: tuple[Case, ...] = (
    # CL.TE and TE.CL
    Case(
        "cl-te",
        _post(b"Content-Length: 6", b"Transfer-Encoding: chunked", body=b"0\r\n\r\nG"),
        Refuse(),
        _TE_AND_CL,
        "accepts",
        "the coding may win, but only if nobody behind us thinks otherwise",
    ),
    Case(
        "te-cl",
        _post(b"Transfer-Encoding: chunked", b"Content-Length: 4", body=b"23\r\n" + SMUGGLED + b"\r\n0\r\n\r\n"),
        Refuse(),
        _TE_AND_CL,
        "accepts",
        "as cl-te",
    ),
    Case(
        "te-cl-zero",
        _post(b"Transfer-Encoding: chunked", b"Content-Length: 0", body=_HELLO),
        Refuse(),
        _TE_AND_CL,
        "accepts",
        "as cl-te",
    ),
    Case(
        "cl-te-case",
        _post(b"CONTENT-length: 6", b"transfer-ENCODING: Chunked", body=b"0\r\n\r\nG"),
        Refuse(),
        _TE_AND_CL,
        "accepts",
        "as cl-te",
    ),
    Case(
        "cl-te-identity",
        _post(b"Content-Length: 5", b"Transfer-Encoding: identity", body=b"hello"),
        Refuse(),
        _TE_AND_CL,
    ),
    Case(
        "cl-te-unknown",
        _post(b"Content-Length: 5", b"Transfer-Encoding: xchunked", body=b"hello"),
        Refuse(),
        _TE_AND_CL,
    ),
    Case("cl-te-empty", _post(b"Content-Length: 5", b"Transfer-Encoding:", body=b"hello"), Refuse(), _TE_AND_CL),
    Case(
        "cl-te-10",
        b"POST / HTTP/1.0\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + _HELLO,
        Refuse(),
        _TE,
        "accepts",
        "as cl-te",
    ),
    # TE.TE: one of two parsers does not see the coding
    Case("te", _post(b"Transfer-Encoding: chunked", body=_HELLO), Accept("chunked", b"hello"), _TE),
    Case("te-case", _post(b"tRANSFER-eNCODING: cHuNkEd", body=_HELLO), Accept("chunked", b"hello"), _TE),
    Case("te-no-space", _post(b"Transfer-Encoding:chunked", body=_HELLO), Accept("chunked", b"hello"), _FIELD),
    Case("te-spaces", _post(b"Transfer-Encoding:   chunked  ", body=_HELLO), Accept("chunked", b"hello"), _FIELD),
    Case("te-tab-before", _post(b"Transfer-Encoding:\tchunked", body=_HELLO), Refuse(), _FIELD, "accepts", _TAB_WHY),
    Case("te-tab-behind", _post(b"Transfer-Encoding: chunked\t", body=_HELLO), Refuse(), _FIELD, "accepts", _TAB_WHY),
    Case(
        "te-in-get",
        b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + _HELLO,
        Accept("chunked", b"hello"),
        _FRAMING,
    ),
    Case("te-twice", _post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", body=_HELLO), Refuse(), _TE),
    Case("te-twice-list", _post(b"Transfer-Encoding: chunked, chunked", body=_HELLO), Refuse(), _TE),
    Case("te-chunked-identity", _post(b"Transfer-Encoding: chunked, identity", body=_HELLO), Refuse(), _TE),
    Case("te-chunked-gzip", _post(b"Transfer-Encoding: chunked, gzip", body=_HELLO), Refuse(), _TE),
    Case("te-identity-chunked", _post(b"Transfer-Encoding: identity, chunked", body=_HELLO), Refuse(501), _TE),
    Case(
        "te-two-fields",
        _post(b"Transfer-Encoding: identity", b"Transfer-Encoding: chunked", body=_HELLO),
        Refuse(501),
        _TE,
    ),
    Case(
        "te-two-fields-reversed",
        _post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: x", body=_HELLO),
        Refuse(),
        _TE,
    ),
    Case("te-identity", _post(b"Transfer-Encoding: identity", body=b""), Refuse(501), _TE),
    Case("te-gzip", _post(b"Transfer-Encoding: gzip"), Refuse(501), _TE),
    Case("te-gzip-chunked", _post(b"Transfer-Encoding: gzip, chunked", body=_HELLO), Refuse(501), _TE),
    Case("te-xchunked", _post(b"Transfer-Encoding: xchunked", body=_HELLO), Refuse(501), _TE),
    Case("te-chunkedx", _post(b"Transfer-Encoding: chunkedx", body=_HELLO), Refuse(501), _TE),
    Case("te-apostrophes", _post(b"Transfer-Encoding: 'chunked'", body=_HELLO), Refuse(501), _TE),
    Case("te-quoted", _post(b'Transfer-Encoding: "chunked"', body=_HELLO), Refuse(), _TE),
    Case("te-parameter", _post(b"Transfer-Encoding: chunked;q=1", body=_HELLO), Refuse(), _TE),
    Case("te-parameter-space", _post(b"Transfer-Encoding: chunked ; x", body=_HELLO), Refuse(), _TE),
    Case("te-quoted-comma", _post(b'Transfer-Encoding: gzip;x="a, chunked', body=_HELLO), Refuse(501), _TE),
    Case("te-empty", _post(b"Transfer-Encoding:", body=_HELLO), Refuse(), _TE),
    Case(
        "te-comma-behind",
        _post(b"Transfer-Encoding: chunked,", body=_HELLO),
        Refuse(),
        "RFC 9110 §5.6.1",
        why=_LIST_WHY,
    ),
    Case(
        "te-comma-before",
        _post(b"Transfer-Encoding: , chunked", body=_HELLO),
        Refuse(),
        "RFC 9110 §5.6.1",
        why=_LIST_WHY,
    ),
    Case("te-commas-only", _post(b"Transfer-Encoding: ,,", body=_HELLO), Refuse(), "RFC 9110 §5.6.1"),
    Case(
        "te-empty-second",
        _post(b"Transfer-Encoding: chunked", b"Transfer-Encoding:", body=_HELLO),
        Refuse(),
        "RFC 9110 §5.6.1",
        why=_LIST_WHY,
    ),
    Case(
        "te-empty-first",
        _post(b"Transfer-Encoding:", b"Transfer-Encoding: chunked", body=_HELLO),
        Refuse(),
        "RFC 9110 §5.6.1",
        why=_LIST_WHY,
    ),
    Case("te-space-inside", _post(b"Transfer-Encoding: chunk ed", body=_HELLO), Refuse(), _TE),
    Case("te-vertical-tab-before", _post(b"Transfer-Encoding: \x0bchunked", body=_HELLO), Refuse(), _VALUE),
    Case("te-vertical-tab-behind", _post(b"Transfer-Encoding: chunked\x0b", body=_HELLO), Refuse(), _VALUE),
    Case("te-form-feed", _post(b"Transfer-Encoding:\x0cchunked", body=_HELLO), Refuse(), _VALUE),
    Case("te-nul-behind", _post(b"Transfer-Encoding: chunked\x00", body=_HELLO), Refuse(), _VALUE),
    Case("te-nbsp", _post(b"Transfer-Encoding: \xa0chunked", body=_HELLO), Refuse(), _TE),
    Case("te-byte-order-mark", _post(b"Transfer-Encoding: \xef\xbb\xbfchunked", body=_HELLO), Refuse(), _TE),
    Case("te-cr-behind", _post(b"Transfer-Encoding: chunked\r", body=_HELLO), Refuse(), _LINES),
    Case("te-cr-before", _post(b"Transfer-Encoding: \rchunked", body=_HELLO), Refuse(), _LINES),
    Case("te-space-before-colon", _post(b"Transfer-Encoding : chunked", body=_HELLO), Refuse(), _FIELD),
    Case("te-tab-before-colon", _post(b"Transfer-Encoding\t: chunked", body=_HELLO), Refuse(), _FIELD),
    Case("te-nul-before-colon", _post(b"Transfer-Encoding\x00: chunked", body=_HELLO), Refuse(), _FIELD),
    Case(
        "te-folded-name",
        _post(b"X: y", b" Transfer-Encoding: chunked", body=_HELLO),
        Refuse(),
        _FOLD,
        "accepts",
        _FOLD_WHY,
    ),
    Case(
        "te-folded-value", _post(b"Transfer-Encoding:", b" chunked", body=_HELLO), Refuse(), _FOLD, "accepts", _FOLD_WHY
    ),
    Case(
        "te-behind-bare-lf",
        _post(b"X: y\nTransfer-Encoding: chunked", body=_HELLO),
        Refuse(),
        _LINES,
        "accepts",
        _LF_WHY,
    ),
    Case("te-behind-bare-cr", _post(b"X: y\rTransfer-Encoding: chunked", body=_HELLO), Refuse(), _LINES),
    Case("te-no-colon", _post(b"Transfer-Encoding chunked", body=_HELLO), Refuse(), _FIELD),
    Case("te-equals", _post(b"Transfer-Encoding= chunked", body=_HELLO), Refuse(), _FIELD),
    Case("te-non-ascii-name", _post(b"Transf\xc3\xa9r-Encoding: chunked", body=_HELLO), Refuse(), _FIELD),
    Case(
        "te-underscore",
        _post(b"Transfer_Encoding: chunked"),
        Accept("none"),
        _FIELD,
        why="another field; only gateways that make variables of field names confuse the two, behind their own framing",
    ),
    Case("te-in-te", _post(b"TE: chunked"), Accept("none"), "RFC 9110 §10.1.4"),
    Case(
        "te-content-encoding",
        _post(b"Content-Encoding: chunked", b"Content-Length: 5", body=b"hello"),
        Accept("length", b"hello"),
        _FRAMING,
    ),
    Case(
        "te-10",
        b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n" + _HELLO,
        Refuse(),
        _TE,
        "accepts",
        "§6.1: faulty framing, whatever else it says",
    ),
    Case("te-10-gzip", b"POST / HTTP/1.0\r\nTransfer-Encoding: gzip\r\n\r\n", Refuse(501), _TE),
    # CL.0 and 0.CL: one of two parsers sees no body
    Case("cl-get", _get(b"Content-Length: %d" % len(SMUGGLED)) + SMUGGLED, Accept("length", SMUGGLED), _FRAMING),
    Case("cl-hides-request", _length(b" %d" % len(SMUGGLED), SMUGGLED), Accept("length", SMUGGLED), _FRAMING),
    Case(
        "cl-head", b"HEAD / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", Accept("length", b"hello"), _FRAMING
    ),
    Case(
        "cl-options",
        b"OPTIONS * HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
        Accept("length", b"hello"),
        _FRAMING,
    ),
    Case("cl-none", _post(body=SMUGGLED), Accept("none", rest=SMUGGLED), "RFC 9112 §6.3 item 7"),
    Case("cl-zero", _length(b" 0", SMUGGLED), Accept("none", rest=SMUGGLED), _FRAMING),
    Case("cl-zeros", _length(b" 0000", SMUGGLED), Accept("none", rest=SMUGGLED), _LENGTH),
    Case("cl-short", _length(b" 5", b"hello" + SMUGGLED), Accept("length", b"hello", SMUGGLED), _FRAMING),
    Case("cl-long", _length(b" 100", SMUGGLED), Accept("length", SMUGGLED, complete=False), _FRAMING),
    Case("te-then-request", _chunked(_HELLO + SMUGGLED), Accept("chunked", b"hello", SMUGGLED), _FRAMING),
    Case(
        "te-hides-request",
        _chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)),
        Accept("chunked", SMUGGLED),
        _CHUNK,
    ),
    Case(
        "expect",
        _post(b"Expect: 100-continue", b"Content-Length: 5", body=b"hello"),
        Accept("length", b"hello"),
        "RFC 9110 §10.1.1",
    ),
    Case(
        "expect-odd",
        _post(b"Expect: y 100-continue", b"Content-Length: 5", body=b"hello"),
        Accept("length", b"hello"),
        "RFC 9110 §10.1.1",
    ),
    Case("cl-10", b"POST / HTTP/1.0\r\nContent-Length: 5\r\n\r\nhello", Accept("length", b"hello"), _FRAMING),
    # Content-Length
    Case("cl-twice-different", _post(b"Content-Length: 5", b"Content-Length: 6", body=b"hello!"), Refuse(), _FRAMING),
    Case(
        "cl-twice-same",
        _post(b"Content-Length: 5", b"content-length: 5", body=b"hello"),
        Refuse(),
        _FRAMING,
        "accepts",
        _REPEATED_WHY,
    ),
    Case("cl-list-same", _length(b" 5, 5", b"hello"), Refuse(), _FRAMING, "accepts", _REPEATED_WHY),
    Case("cl-list-different", _length(b" 5, 6", b"hello!"), Refuse(), _FRAMING),
    Case("cl-comma-behind", _length(b" 5,", b"hello"), Refuse(), _LENGTH),
    Case("cl-empty", _length(b"", b"hello"), Refuse(), _LENGTH),
    Case("cl-empty-second", _post(b"Content-Length: 5", b"Content-Length:", body=b"hello"), Refuse(), _LENGTH),
    Case("cl-plus", _length(b" +5", b"hello"), Refuse(), _LENGTH),
    Case("cl-minus", _length(b" -5", b"hello"), Refuse(), _LENGTH),
    Case("cl-minus-zero", _length(b" -0"), Refuse(), _LENGTH),
    Case("cl-hex", _length(b" 0x5", b"hello"), Refuse(), _LENGTH),
    Case("cl-hex-digit", _length(b" a", b"hellohello"), Refuse(), _LENGTH),
    Case("cl-fraction", _length(b" 5.0", b"hello"), Refuse(), _LENGTH),
    Case("cl-exponent", _length(b" 5e0", b"hello"), Refuse(), _LENGTH),
    Case("cl-underscore", _length(b" 1_0", b"hellohello"), Refuse(), _LENGTH),
    Case("cl-space-inside", _length(b" 1 0", b"hellohello"), Refuse(), _LENGTH),
    Case("cl-behind-space", _length(b" 5 6", b"hello!"), Refuse(), _LENGTH),
    Case("cl-semicolon", _length(b" 5;x", b"hello"), Refuse(), _LENGTH),
    Case("cl-quoted", _length(b' "5"', b"hello"), Refuse(), _LENGTH),
    Case("cl-nul", _length(b" 5\x00", b"hello"), Refuse(), _VALUE),
    Case("cl-vertical-tab", _length(b" \x0b5", b"hello"), Refuse(), _VALUE),
    Case("cl-nbsp", _length(b" 5\xa0", b"hello"), Refuse(), _LENGTH),
    Case("cl-arabic-digit", _length(b" \xd9\xa5", b"hello"), Refuse(), _LENGTH),
    Case("cl-wide-digit", _length(b" \xef\xbc\x95", b"hello"), Refuse(), _LENGTH),
    Case(
        "cl-leading-zeros", _length(b" 00005", b"hello"), Accept("length", b"hello"), _LENGTH, why="1*DIGIT, in decimal"
    ),
    Case(
        "cl-not-octal",
        _length(b" 010", b"hellohello"),
        Accept("length", b"hellohello"),
        _LENGTH,
        why="1*DIGIT, in decimal",
    ),
    Case("cl-tabs", _length(b"\t5\t ", b"hello"), Refuse(), _FIELD, "accepts", _TAB_WHY),
    Case("cl-spaces", _length(b"   5  ", b"hello"), Accept("length", b"hello"), _FIELD),
    Case("cl-no-space", _length(b"5", b"hello"), Accept("length", b"hello"), _FIELD),
    Case(
        "cl-18-digits", _length(b" 999999999999999999", b"hello"), Accept("length", b"hello", complete=False), _LENGTH
    ),
    Case(
        "cl-19-digits",
        _length(b" 1000000000000000000", b"hello"),
        Refuse(),
        _LENGTH,
        "accepts",
        "1*DIGIT has no bound; numbers of a parser behind us have",
    ),
    Case(
        "cl-wraps-64-bits", _length(b" 18446744073709551621", b"hello"), Refuse(), _LENGTH, "accepts", "as cl-19-digits"
    ),
    Case("cl-wraps-32-bits", _length(b" 4294967301", b"hello"), Accept("length", b"hello", complete=False), _LENGTH),
    Case("cl-space-before-colon", _post(b"Content-Length : 5", body=b"hello"), Refuse(), _FIELD),
    Case("cl-folded", _post(b"Content-Length:", b"\t5", body=b"hello"), Refuse(), _FOLD, "accepts", _FOLD_WHY),
    Case("cl-folded-digits", _post(b"Content-Length: 1", b" 0", body=b"hellohello"), Refuse(), _FOLD),
    Case("cl-split-name", _post(b"Content-Length", b": 5", body=b"hello"), Refuse(), _FIELD),
    Case(
        "cl-underscore-name",
        _post(b"Content_Length: 5", body=SMUGGLED),
        Accept("none", rest=SMUGGLED),
        _FIELD,
        why="another field",
    ),
    # field lines
    Case("fold", _get(b"X: a", b" b"), Refuse(), _FOLD, "accepts", _FOLD_WHY),
    Case("fold-tab", _get(b"X: a", b"\tb"), Refuse(), _FOLD, "accepts", _FOLD_WHY),
    Case("fold-first", b"GET / HTTP/1.1\r\n Host: a\r\nHost: a\r\n\r\n", Refuse(), _LINES),
    Case("fold-empty", _get(b"X: a", b" "), Refuse(), _FOLD, "accepts", _FOLD_WHY),
    Case("name-space", _get(b"X : a"), Refuse(), _FIELD),
    Case("name-space-inside", _get(b"X Y: a"), Refuse(), _FIELD),
    Case("name-empty", _get(b": a"), Refuse(), _FIELD),
    Case("name-nul", _get(b"X\x00Y: a"), Refuse(), _FIELD),
    Case("name-del", _get(b"X\x7f: a"), Refuse(), _FIELD),
    Case("name-parentheses", _get(b"(X): a"), Refuse(), _FIELD),
    Case("name-comma", _get(b"X,Y: a"), Refuse(), _FIELD),
    Case("name-quoted", _get(b'"X": a'), Refuse(), _FIELD),
    Case("name-obs-text", _get(b"X\xe9: a"), Refuse(), _FIELD),
    Case("no-colon", _get(b"X"), Refuse(), _FIELD),
    Case("no-colon-request-line", _get(b"GET /smuggled HTTP/1.1"), Refuse(), _FIELD),
    Case("value-nul", _get(b"X: a\x00b"), Refuse(), _VALUE),
    Case("value-bell", _get(b"X: a\x07b"), Refuse(), _VALUE, "accepts", "§5.5: CTL other than HTAB is no field-vchar"),
    Case("value-escape", _get(b"X: \x1b[2J"), Refuse(), _VALUE, "accepts", "as value-bell"),
    Case("value-vertical-tab", _get(b"X: a\x0bb"), Refuse(), _VALUE),
    Case("value-form-feed", _get(b"X: a\x0cb"), Refuse(), _VALUE),
    Case("value-del", _get(b"X: a\x7fb"), Refuse(), _VALUE, "accepts", "as value-bell"),
    Case("value-cr", _get(b"X: a\rb"), Refuse(), _LINES),
    Case("value-cr-request", _get(b"X: a\r\r" + SMUGGLED[:-4]), Refuse(), _LINES),
    Case("value-cr-cr-lf", _get(b"X: a\r"), Refuse(), _LINES),
    Case("value-lf", _get(b"X: a\nY: b"), Refuse(), _LINES, "accepts", _LF_WHY),
    Case("value-empty", _get(b"X:"), Accept("none"), _VALUE),
    Case("value-tab", _get(b"X: a\tb"), Accept("none"), _VALUE),
    Case("value-obs-text", _get(b"X: \xe9\xff"), Accept("none"), _VALUE),
    Case(
        "value-next-line",
        _get(b"X: a\x85b"),
        Accept("none"),
        _VALUE,
        why="obs-text; no octet parser takes it as a line end",
    ),
    Case("fields-256", _get(*[b"X: a"] * 255), Accept("none"), "RFC 9110 §5.4"),
    Case("fields-257", _get(*[b"X: a"] * 256), Refuse(431), "RFC 9110 §5.4", "accepts", "our bound"),
    # line ends
    Case("lf-only", b"GET / HTTP/1.1\nHost: a\n\n", Refuse(), _LINES, "accepts", _LF_WHY),
    Case("lf-request-line", b"GET / HTTP/1.1\nHost: a\r\n\r\n", Refuse(), _LINES, "accepts", _LF_WHY),
    Case("lf-last-field", b"GET / HTTP/1.1\r\nHost: a\n\r\n", Refuse(), _LINES, "accepts", _LF_WHY),
    Case("lf-empty-line", b"GET / HTTP/1.1\r\nHost: a\r\n\n" + SMUGGLED, Refuse(), _LINES, "accepts", _LF_WHY),
    Case("cr-request-line", b"GET / HTTP/1.1\rHost: a\r\n\r\n", Refuse(), _LINES),
    Case("cr-only", b"GET / HTTP/1.1\rHost: a\r\r", Refuse(), _LINES, "same"),
    Case("cr-empty-line", b"GET / HTTP/1.1\r\nHost: a\r\n\r\r\n", Refuse(), _LINES),
    Case(
        "leading-crlf",
        b"\r\n" + _get(),
        Accept("none"),
        _LINES,
        "refuses",
        "§2.2: at least one empty line should be ignored",
    ),
    Case("leading-crlf-twice", b"\r\n\r\n" + _get(), Refuse(), _LINES),
    Case("leading-lf", b"\n" + _get(), Refuse(), _LINES),
    Case("leading-cr", b"\r" + _get(), Refuse(), _LINES),
    Case("leading-crlf-lf", b"\r\n\n" + _get(), Refuse(), _LINES),
    Case("leading-space", b" " + _get(), Refuse(), _REQUEST),
    Case("leading-nul", b"\x00" + _get(), Refuse(), _REQUEST),
    Case("leading-byte-order-mark", b"\xef\xbb\xbf" + _get(), Refuse(), _REQUEST),
    Case("tls-hello", b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00", Refuse(), _REQUEST),
    # chunk sizes
    Case("chunk-0x", _chunked(b"0x5\r\nhello\r\n0\r\n\r\n"), Refuse(where="body"), _CHUNK),
    Case("chunk-plus", _chunked(b"+5\r\nhello\r\n0\r\n\r\n"), Refuse(where="body"), _CHUNK),
    Case("chunk-minus", _chunked(b"-5\r\nhello\r\n0\r\n\r\n"), Refuse(where="body"), _CHUNK),
    Case("chunk-minus-zero", _chunked(b"5\r\nhello\r\n-0\r\n\r\n"), Refuse(where="body"), _CHUNK),
    Case("chunk-underscore", _chunked(b"0_5\r\nhello\r\n0\r\n\r\n"), Refuse(where="body"), _CHUNK),
    Case("chunk-no-digit", _chunked(b"g\r\nhello\r\n0\r\n\r\n"), Refuse(where="body"), _CHUNK),
    Case("chunk-h", _chunked(b"5h\r\nhello\r\n0\r\n\r\n"), Refuse(where="body"), _CHUNK),
    Case("chunk-wide-digit", _chunked(b"\xef\xbc\x95\r\nhello\r\n0\r\n\r\n"), Refuse(where="body"), _CHUNK),
    Case("chunk-empty", _chunked(b"\r\nhello\r\n0\r\n\r\n"), Refuse(where="body"), _CHUNK),
    Case("chunk-space-before", _chunked(b" 5\r\nhello\r\n0\r\n\r\n"), Refuse(where="body"), _CHUNK),
    Case(
        "chunk-space-behind",
        _chunked(b"5 \r\nhello\r\n0\r\n\r\n"),
        Refuse(where="body"),
        _CHUNK,
        "accepts",
        "h11 tolerates it for old servers; the grammar does not",
    ),
    Case(
        "chunk-tab-behind",
        _chunked(b"5\t\r\nhello\r\n0\r\n\r\n"),
        Refuse(where="body"),
        _CHUNK,
        "accepts",
        "as chunk-space-behind",
    ),
    Case("chunk-nul", _chunked(b"5\x00\r\nhello\r\n0\r\n\r\n"), Refuse(where="body"), _CHUNK),
    Case("chunk-fraction", _chunked(b"5.0\r\nhello\r\n0\r\n\r\n"), Refuse(where="body"), _CHUNK),
    Case("chunk-15-digits", _chunked(b"000000000000005\r\nhello\r\n0\r\n\r\n"), Accept("chunked", b"hello"), _CHUNK),
    Case(
        "chunk-16-digits",
        _chunked(b"0000000000000005\r\nhello\r\n0\r\n\r\n"),
        Refuse(where="body"),
        _CHUNK,
        "accepts",
        "our bound",
    ),
    Case(
        "chunk-wraps-64-bits",
        _chunked(b"10000000000000005\r\nhello\r\n0\r\n\r\n"),
        Refuse(where="body"),
        _CHUNK,
        "accepts",
        "our bound",
    ),
    Case(
        "chunk-all-f",
        _chunked(b"ffffffffffffffff\r\nhello"),
        Refuse(where="body"),
        _CHUNK,
        "accepts",
        "our bound: minus one in 64 bits",
    ),
    Case(
        "chunk-wraps-32-bits",
        _chunked(b"100000005\r\nhello\r\n0\r\n\r\n"),
        Accept("chunked", b"hello\r\n0\r\n\r\n", complete=False),
        _CHUNK,
    ),
    Case("chunk-upper-case", _chunked(b"A\r\nhellohello\r\n0\r\n\r\n"), Accept("chunked", b"hellohello"), _CHUNK),
    Case("chunk-zeros", _chunked(b"05\r\nhello\r\n000\r\n\r\n"), Accept("chunked", b"hello"), _CHUNK),
    # chunk lines: where they end
    Case("chunk-line-lf", _chunked(b"5\nhello\r\n0\r\n\r\n"), Refuse(where="body"), _CHUNK),
    Case("chunk-line-cr", _chunked(b"5\rhello\r\n0\r\n\r\n"), Refuse(where="body"), _CHUNK),
    Case("chunk-line-cr-cr-lf", _chunked(b"5\r\r\nhello\r\n0\r\n\r\n"), Refuse(where="body"), _CHUNK),
    Case("chunk-line-lf-cr", _chunked(b"5\n\rhello\r\n0\r\n\r\n"), Refuse(where="body"), _CHUNK),
    Case("chunk-end-lf", _chunked(b"5\r\nhello\n0\r\n\r\n"), Refuse(where="body"), _CHUNK),
    Case("chunk-end-cr", _chunked(b"5\r\nhello\r0\r\n\r\n"), Refuse(where="body"), _CHUNK),
    Case("chunk-end-missing", _chunked(b"5\r\nhello0\r\n\r\n"), Refuse(where="body"), _CHUNK),
    Case("chunk-end-any-two", _chunked(b"5\r\nhelloXX0\r\n\r\n"), Refuse(where="body"), _CHUNK),
    Case("chunk-too-long", _chunked(b"5\r\nhello!\r\n0\r\n\r\n"), Refuse(where="body"), _CHUNK),
    Case("chunk-too-short", _chunked(b"6\r\nhello\r\n0\r\n\r\n"), Refuse(where="body"), _CHUNK),
    Case("chunk-leading-crlf", _chunked(b"\r\n" + _HELLO), Refuse(where="body"), _CHUNK),
    Case("chunk-double-crlf", _chunked(b"5\r\nhello\r\n\r\n0\r\n\r\n"), Refuse(where="body"), _CHUNK),
    Case("chunk-last-lf", _chunked(b"5\r\nhello\r\n0\n\r\n"), Refuse(where="body"), _CHUNK),
    Case(
        "chunk-final-lf",
        _chunked(b"5\r\nhello\r\n0\r\n\n" + SMUGGLED),
        Refuse(where="body"),
        _CHUNK,
        "accepts",
        _LF_WHY,
    ),
    Case("chunk-final-cr", _chunked(b"5\r\nhello\r\n0\r\n\r" + SMUGGLED), Refuse(where="body"), _CHUNK),
    Case("chunk-final-missing", _chunked(b"5\r\nhello\r\n0\r\n"), Accept("chunked", b"hello", complete=False), _CHUNK),
    Case("chunk-final-other", _chunked(b"5\r\nhello\r\n0\r\n" + SMUGGLED), Refuse(where="body"), _CHUNK),
    Case("chunk-no-last", _chunked(b"5\r\nhello\r\n"), Accept("chunked", b"hello", complete=False), _CHUNK),
    # chunk extensions
    Case("extension", _chunked(b"5;a\r\nhello\r\n0;b=c\r\n\r\n"), Accept("chunked", b"hello"), _EXTENSION),
    Case(
        "extension-quoted",
        _chunked(b'5;a="b;\\"c\\\\";d=e\r\nhello\r\n0\r\n\r\n'),
        Accept("chunked", b"hello"),
        _EXTENSION,
    ),
    Case(
        "extension-lf",
        _chunked(b"5;\nhello\r\n0\r\n\r\n"),
        Refuse(where="body"),
        _EXTENSION,
        why="TERM.EXT: a line end for one, a part of the extension for the other",
    ),
    Case(
        "extension-lf-named",
        _chunked(b"5;a=b\nhello\r\n0\r\n\r\n"),
        Refuse(where="body"),
        _EXTENSION,
        why="as extension-lf",
    ),
    Case(
        "extension-lf-lf",
        _chunked(b"2;\nxx\r\n45\r\n0\r\n\r\n" + SMUGGLED),
        Refuse(where="body"),
        _EXTENSION,
        why="as extension-lf",
    ),
    Case(
        "extension-cr",
        _chunked(b"5;\rhello\r\n0\r\n\r\n"),
        Refuse(where="body"),
        _EXTENSION,
        "accepts",
        "EXT.TERM: to h11 the extension goes on and takes the data with it",
    ),
    Case(
        "extension-cr-inside",
        _chunked(b"5;a\rb\r\nhello\r\n0\r\n\r\n"),
        Refuse(where="body"),
        _EXTENSION,
        "accepts",
        "as extension-cr",
    ),
    Case("extension-lf-quoted", _chunked(b'5;a="\n"\r\nhello\r\n0\r\n\r\n'), Refuse(where="body"), _EXTENSION),
    Case(
        "extension-crlf-quoted",
        _chunked(b'5;a="\r\nhello\r\n0\r\n\r\n"\r\n'),
        Refuse(where="body"),
        _EXTENSION,
        "accepts",
        "a quoted string that a line end cuts",
    ),
    Case(
        "extension-nul",
        _chunked(b"5;a=\x00\r\nhello\r\n0\r\n\r\n"),
        Refuse(where="body"),
        _EXTENSION,
        "accepts",
        "as extension-empty",
    ),
    Case(
        "extension-empty",
        _chunked(b"5;\r\nhello\r\n0\r\n\r\n"),
        Refuse(where="body"),
        _EXTENSION,
        "accepts",
        "chunk-ext-name is a token; h11 reads no extension",
    ),
    Case(
        "extension-empty-two",
        _chunked(b"5;;a\r\nhello\r\n0\r\n\r\n"),
        Refuse(where="body"),
        _EXTENSION,
        "accepts",
        "as extension-empty",
    ),
    Case(
        "extension-no-value",
        _chunked(b"5;a=\r\nhello\r\n0\r\n\r\n"),
        Refuse(where="body"),
        _EXTENSION,
        "accepts",
        "as extension-empty",
    ),
    Case(
        "extension-unterminated",
        _chunked(b'5;a="b\r\nhello\r\n0\r\n\r\n'),
        Refuse(where="body"),
        _EXTENSION,
        "accepts",
        "as extension-empty",
    ),
    Case(
        "extension-space",
        _chunked(b"5 ;a=b\r\nhello\r\n0\r\n\r\n"),
        Refuse(where="body"),
        _EXTENSION,
        why="§7.1.1 has recipients take this whitespace and forbids senders to make it; none is known that does",
    ),
    Case(
        "extension-space-inside",
        _chunked(b"5; a = b\r\nhello\r\n0\r\n\r\n"),
        Refuse(where="body"),
        _EXTENSION,
        "accepts",
        "as extension-space",
    ),
    Case(
        "extension-two-words",
        _chunked(b"5;a=b c\r\nhello\r\n0\r\n\r\n"),
        Refuse(where="body"),
        _EXTENSION,
        "accepts",
        "as extension-empty",
    ),
    Case("extension-comma", _chunked(b"5,a\r\nhello\r\n0\r\n\r\n"), Refuse(where="body"), _EXTENSION),
    Case(
        "extension-4096",
        _chunked(b"5;" + b"a" * 4092 + b"\r\nhello\r\n0\r\n\r\n"),
        Accept("chunked", b"hello"),
        _EXTENSION,
    ),
    Case(
        "extension-4097",
        _chunked(b"5;" + b"a" * 4093 + b"\r\nhello\r\n0\r\n\r\n"),
        Refuse(where="body"),
        _EXTENSION,
        "accepts",
        "§7.1.1: limit the total length of chunk extensions",
    ),
    # trailers
    Case("trailer", _chunked(b"0\r\nX: a\r\nX-B: \xe9\r\n\r\n"), Accept("chunked"), "RFC 9112 §7.1.2"),
    Case(
        "trailer-length",
        _chunked(b"0\r\nContent-Length: 5\r\n\r\n"),
        Refuse(where="body"),
        _TRAILER,
        "accepts",
        "framing has no place behind a body",
    ),
    Case(
        "trailer-coding",
        _chunked(b"0\r\ntransfer-encoding: chunked\r\n\r\n"),
        Refuse(where="body"),
        _TRAILER,
        "accepts",
        "as trailer-length",
    ),
    Case(
        "trailer-host",
        _chunked(b"0\r\nHost: b\r\n\r\n"),
        Refuse(where="body"),
        _TRAILER,
        "accepts",
        "as trailer-length: routing",
    ),
    Case(
        "trailer-connection",
        _chunked(b"0\r\nConnection: close\r\n\r\n"),
        Refuse(where="body"),
        _TRAILER,
        "accepts",
        "as trailer-length: options of the connection",
    ),
    Case(
        "trailer-forwarded",
        _chunked(b"0\r\nX-Forwarded-For: ::1\r\n\r\n"),
        Refuse(where="body"),
        _TRAILER,
        "accepts",
        "dropped from heads; must not come in behind",
    ),
    Case("trailer-space-before-colon", _chunked(b"0\r\nX : a\r\n\r\n"), Refuse(where="body"), _FIELD),
    Case("trailer-fold", _chunked(b"0\r\nX: a\r\n b\r\n\r\n"), Refuse(where="body"), _FOLD, "accepts", _FOLD_WHY),
    Case("trailer-fold-first", _chunked(b"0\r\n X: a\r\n\r\n"), Refuse(where="body"), _FOLD),
    Case("trailer-lf", _chunked(b"0\r\nX: a\n\r\n"), Refuse(where="body"), _LINES, "accepts", _LF_WHY),
    Case("trailer-cr", _chunked(b"0\r\nX: a\rb\r\n\r\n"), Refuse(where="body"), _LINES),
    Case("trailer-nul", _chunked(b"0\r\nX: a\x00\r\n\r\n"), Refuse(where="body"), _VALUE),
    Case("trailer-256", _chunked(b"0\r\n" + b"X: a\r\n" * 256 + b"\r\n"), Accept("chunked"), _TRAILER),
    Case(
        "trailer-257",
        _chunked(b"0\r\n" + b"X: a\r\n" * 257 + b"\r\n"),
        Refuse(431, "body"),
        _TRAILER,
        "accepts",
        "our bound",
    ),
    Case(
        "trailer-64k",
        _chunked(b"0\r\nX: " + b"a" * 65532 + b"\r\n\r\n"),
        Refuse(431, "body"),
        _TRAILER,
        "accepts",
        "our bound",
    ),
    Case(
        "trailer-without-end",
        _chunked(b"0\r\nX: " + b"a" * 65534),
        Refuse(431, "body"),
        _TRAILER,
        "accepts",
        "our bound",
    ),
    # Host and target
    Case("host-missing", _hosts(b"X: a"), Refuse(), _HOST),
    Case("host-missing-10", b"GET / HTTP/1.0\r\n\r\n", Accept("none"), _HOST),
    Case("host-twice", _hosts(b"Host: a", b"Host: b"), Refuse(), _HOST),
    Case("host-twice-same", _hosts(b"Host: a", b"host: a"), Refuse(), _HOST),
    Case("host-twice-10", b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", Refuse(), _HOST),
    Case("host-empty", _hosts(b"Host:"), Accept("none"), _HOST),
    Case("host-space-before-colon", _hosts(b"Host : a"), Refuse(), _FIELD),
    Case("host-fold", _hosts(b"Host: a", b" b"), Refuse(), _FOLD, "accepts", _FOLD_WHY),
    Case("host-userinfo", _hosts(b"Host: a@b"), Refuse(), _HOST, "accepts", "h11 does not look into Host"),
    Case("host-path", _hosts(b"Host: a/b"), Refuse(), _HOST, "accepts", "as host-userinfo"),
    Case("host-query", _hosts(b"Host: a?b"), Refuse(), _HOST, "accepts", "as host-userinfo"),
    Case("host-fragment", _hosts(b"Host: a#b"), Refuse(), _HOST, "accepts", "as host-userinfo"),
    Case("host-backslash", _hosts(b"Host: a\\b"), Refuse(), _HOST, "accepts", "as host-userinfo"),
    Case("host-list", _hosts(b"Host: a, b"), Refuse(), _HOST, "accepts", "as host-userinfo"),
    Case("host-space", _hosts(b"Host: a b"), Refuse(), _HOST, "accepts", "as host-userinfo"),
    Case("host-non-ascii", _hosts(b"Host: \xc3\xa9"), Refuse(), _HOST, "accepts", "as host-userinfo"),
    Case("host-port-word", _hosts(b"Host: a:b"), Refuse(), _HOST, "accepts", "as host-userinfo"),
    Case("host-two-ports", _hosts(b"Host: a:80:81"), Refuse(), _HOST, "accepts", "as host-userinfo"),
    Case("host-half-bracket", _hosts(b"Host: [::1"), Refuse(), _HOST, "accepts", "as host-userinfo"),
    Case("host-behind-bracket", _hosts(b"Host: [::1]a"), Refuse(), _HOST, "accepts", "as host-userinfo"),
    Case("host-port", _hosts(b"Host: a:80"), Accept("none"), _HOST),
    Case("host-port-empty", _hosts(b"Host: a:"), Accept("none"), _HOST),
    Case("host-ipv6", _hosts(b"Host: [::1]:80"), Accept("none"), _HOST),
    Case(
        "host-percent", _hosts(b"Host: %2Fvar%2Frun%2Fdocker.sock"), Accept("none"), _HOST, why="docker clients send it"
    ),
    Case("absolute", _get(target=b"http://a/x?y"), Accept("none"), "RFC 9112 §3.2.2"),
    Case("absolute-case", _get(target=b"HTTP://A/x"), Accept("none"), "RFC 9112 §3.2.2"),
    Case("absolute-no-path", _get(target=b"http://a?x"), Accept("none"), "RFC 9112 §3.2.2"),
    Case("absolute-10", b"GET http://a/ HTTP/1.0\r\nHost: a\r\n\r\n", Accept("none"), "RFC 9112 §3.2.2"),
    Case(
        "absolute-10-no-host",
        b"GET http://a/ HTTP/1.0\r\n\r\n",
        Refuse(),
        "RFC 9112 §3.2.2",
        "accepts",
        "upstream would get our Host field, naming another host than the target",
    ),
    Case(
        "absolute-other-host",
        _get(target=b"http://b/"),
        Refuse(),
        "RFC 9112 §3.2.2",
        "accepts",
        "the target would win over Host, where everybody knows it",
    ),
    Case(
        "absolute-other-port",
        _get(target=b"http://a:81/"),
        Refuse(),
        "RFC 9112 §3.2.2",
        "accepts",
        "as absolute-other-host",
    ),
    Case(
        "absolute-userinfo",
        _get(target=b"http://a@b/"),
        Refuse(),
        "RFC 9110 §4.2.4",
        "accepts",
        "h11 does not look into targets",
    ),
    Case(
        "absolute-userinfo-reversed",
        _get(target=b"http://b@a/"),
        Refuse(),
        "RFC 9110 §4.2.4",
        "accepts",
        "as absolute-userinfo",
    ),
    Case(
        "absolute-backslash",
        _get(target=b"http://a\\@b/"),
        Refuse(),
        "RFC 9110 §4.2",
        "accepts",
        "as absolute-userinfo",
    ),
    Case("absolute-fragment", _get(target=b"http://a#@b/"), Refuse(), _TARGET, "accepts", "as absolute-userinfo"),
    Case("absolute-no-host", _get(target=b"http:///x"), Refuse(), "RFC 9110 §4.2.1", "accepts", "as absolute-userinfo"),
    Case("absolute-one-slash", _get(target=b"http:/a"), Refuse(), _TARGET, "accepts", "as absolute-userinfo"),
    Case(
        "absolute-ftp",
        _get(target=b"ftp://a/"),
        Refuse(),
        _TARGET,
        "accepts",
        "as absolute-userinfo: no scheme we speak",
    ),
    Case(
        "absolute-empty-host-field",
        _hosts(b"Host:", target=b"http://a/"),
        Refuse(),
        "RFC 9112 §3.2.2",
        "accepts",
        "as absolute-other-host",
    ),
    Case("target-two-slashes", _get(target=b"//b/x"), Accept("none"), _TARGET, why="a path, passed on octet for octet"),
    Case("target-encoded", _get(target=b"/%2e%2e%2f%00%0d%0a"), Accept("none"), _TARGET, why="as target-two-slashes"),
    Case("target-dots", _get(target=b"/../../x"), Accept("none"), _TARGET, why="as target-two-slashes"),
    Case("target-fragment", _get(target=b"/x#y"), Refuse(), _TARGET, "accepts", "as absolute-userinfo"),
    Case("target-host", _get(target=b"a:80"), Refuse(), "RFC 9112 §3.2.3", "accepts", "authority-form is CONNECT's"),
    Case("target-word", _get(target=b"x"), Refuse(), _TARGET, "accepts", "as absolute-userinfo"),
    Case("target-asterisk", _get(target=b"*"), Refuse(), "RFC 9112 §3.2.4", "accepts", "asterisk-form is OPTIONS'"),
    Case("target-asterisk-options", _line(b"OPTIONS * HTTP/1.1"), Accept("none"), "RFC 9112 §3.2.4"),
    Case("target-nul", _get(target=b"/\x00"), Refuse(), _REQUEST),
    Case("target-escape", _get(target=b"/\x1b"), Refuse(), _REQUEST),
    Case("target-del", _get(target=b"/\x7f"), Refuse(), _REQUEST),
    Case("target-latin", _get(target=b"/\xe9"), Refuse(), _REQUEST),
    Case("target-utf8", _get(target=b"/\xc3\xa9"), Refuse(), _REQUEST),
    Case("target-nbsp", _get(target=b"/a\xa0b"), Refuse(), _REQUEST),
    Case("target-next-line", _get(target=b"/a\x85b"), Refuse(), _REQUEST),
    Case("target-cr", _get(target=b"/\rX"), Refuse(), _REQUEST),
    Case("target-lf", _get(target=b"/\nX"), Refuse(), _REQUEST),
    Case(
        "connect",
        b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n",
        Refuse(405, "policy"),
        "RFC 9110 §9.3.6",
        "accepts",
        "a reverse proxy opens no tunnels",
    ),
    Case(
        "connect-path",
        b"CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n",
        Refuse(405, "policy"),
        "RFC 9110 §9.3.6",
        "accepts",
        "as connect",
    ),
    # the request line
    Case("line-two-spaces", _line(b"GET  / HTTP/1.1"), Refuse(), _REQUEST),
    Case("line-two-spaces-behind", _line(b"GET /  HTTP/1.1"), Refuse(), _REQUEST),
    Case("line-tab", _line(b"GET\t/ HTTP/1.1"), Refuse(), _REQUEST),
    Case("line-tabs", _line(b"GET\t/\tHTTP/1.1"), Refuse(), _REQUEST),
    Case("line-vertical-tab", _line(b"GET\x0b/ HTTP/1.1"), Refuse(), _REQUEST),
    Case("line-form-feed", _line(b"GET /\x0cHTTP/1.1"), Refuse(), _REQUEST),
    Case("line-space-behind", _line(b"GET / HTTP/1.1 "), Refuse(), _REQUEST),
    Case("line-space-in-target", _line(b"GET /a b HTTP/1.1"), Refuse(), _REQUEST),
    Case("line-no-target", _line(b"GET  HTTP/1.1"), Refuse(), _REQUEST),
    Case("line-version-only", _line(b"HTTP/1.1"), Refuse(), _REQUEST),
    Case("line-request-in-target", _line(b"GET / HTTP/1.1 HTTP/1.1"), Refuse(), _REQUEST),
    Case(
        "method-lower", _line(b"get / HTTP/1.1"), Accept("none"), _METHOD, why="methods are case-sensitive: another one"
    ),
    Case("method-any-token", _line(b"!#$%&'*+-.^_`|~aZ09 / HTTP/1.1"), Accept("none"), _METHOD),
    Case("method-search", _line(b"M-SEARCH / HTTP/1.1"), Accept("none"), _METHOD),
    Case("method-empty", _line(b" / HTTP/1.1"), Refuse(), _METHOD),
    Case("method-parenthesis", _line(b"GE(T / HTTP/1.1"), Refuse(), _METHOD),
    Case("method-colon", _line(b"GET: / HTTP/1.1"), Refuse(), _METHOD),
    Case("method-comma", _line(b"GET,POST / HTTP/1.1"), Refuse(), _METHOD),
    Case("method-quoted", _line(b'"GET" / HTTP/1.1'), Refuse(), _METHOD),
    Case("method-nul", _line(b"GET\x00 / HTTP/1.1"), Refuse(), _METHOD),
    Case("method-non-ascii", _line(b"G\xc3\x8bT / HTTP/1.1"), Refuse(), _METHOD),
    # versions
    Case("version-none", b"GET /\r\n\r\n", Refuse(), _VERSION, why="HTTP/0.9 has no framing at all"),
    Case("version-none-fields", _line(b"GET /"), Refuse(), _VERSION),
    Case("version-09", _line(b"GET / HTTP/0.9"), Refuse(505), _VERSION, "accepts", "h11 leaves versions to its user"),
    Case("version-12", _line(b"GET / HTTP/1.2"), Refuse(505), _VERSION, "accepts", "as version-09"),
    Case("version-20", _line(b"GET / HTTP/2.0"), Refuse(505), _VERSION, "accepts", "as version-09"),
    Case("version-30", _line(b"GET / HTTP/3.0"), Refuse(505), _VERSION, "accepts", "as version-09"),
    Case(
        "version-h2-preface",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        Refuse(505),
        "RFC 9113 §3.4",
        "accepts",
        "as version-09",
    ),
    Case("version-2", _line(b"GET / HTTP/2"), Refuse(), _VERSION),
    Case("version-two-digits", _line(b"GET / HTTP/1.10"), Refuse(), _VERSION),
    Case("version-leading-zero", _line(b"GET / HTTP/01.1"), Refuse(), _VERSION),
    Case("version-lower", _line(b"GET / http/1.1"), Refuse(), _VERSION),
    Case("version-comma", _line(b"GET / HTTP/1,1"), Refuse(), _VERSION),
    Case("version-letter", _line(b"GET / HTTP/1.1a"), Refuse(), _VERSION),
    Case("version-space", _line(b"GET / HTTP /1.1"), Refuse(), _VERSION),
    Case("version-short", _line(b"GET / HTTP/1."), Refuse(), _VERSION),
    Case("version-other-name", _line(b"GET / ICY/1.1"), Refuse(), _VERSION),
    Case("version-wide-digit", _line(b"GET / HTTP/1.\xef\xbc\x91"), Refuse(), _VERSION),
    # Connection
    Case(
        "connection-length",
        _post(b"Connection: Content-Length", b"Content-Length: 5", body=b"hello"),
        Refuse(),
        _CONNECTION,
        "accepts",
        "a proxy that obeys removes the length, and the body becomes a request",
    ),
    Case(
        "connection-length-list",
        _post(b"Connection: close, content-length", b"Content-Length: 5", body=b"hello"),
        Refuse(),
        _CONNECTION,
        "accepts",
        "as connection-length",
    ),
    Case(
        "connection-host",
        _get(b"Connection: Host"),
        Refuse(),
        _CONNECTION,
        "accepts",
        "as connection-length, with the host",
    ),
    Case(
        "connection-coding",
        _post(b"Connection: Transfer-Encoding", b"Transfer-Encoding: chunked", body=_HELLO),
        Accept("chunked", b"hello"),
        _CONNECTION,
        why="RFC 2616 had the field among the hop-by-hop ones; it stays with the body it frames",
    ),
    Case(
        "connection-coding-te",
        _post(b"Connection: close, TE, Transfer-Encoding", b"TE: trailers"),
        Accept("none"),
        _CONNECTION,
    ),
    Case(
        "connection-two-words", _get(b"Connection: close Content-Length"), Refuse(), _CONNECTION, "accepts", "no token"
    ),
    Case("connection-parameter", _get(b"Connection: close;x"), Refuse(), _CONNECTION, "accepts", "no token"),
    Case("connection-empty-elements", _get(b"Connection: , ,keep-alive,"), Accept("none"), "RFC 9110 §5.6.1"),
    Case(
        "connection-forwarded",
        _get(b"Connection: X-Forwarded-For", b"X-Forwarded-For: ::1"),
        Accept("none"),
        _CONNECTION,
        why="dropped, and set by us",
    ),
)


def _response(line: bytes, *lines: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join((line, *lines, b"", b"")) + body


def _ok(*lines: bytes, body: bytes = b"") -> bytes:
    return _response(b"HTTP/1.1 200 OK", *lines, body=body)


_SPLIT = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nEVIL!"

RESPONSES: tuple[Case, ...] = (
    Case("length", _ok(b"Content-Length: 5", body=b"hello"), Accept("length", b"hello"), _FRAMING),
    Case("length-zero", _ok(b"Content-Length: 0"), Accept("none"), _FRAMING),
    Case("chunked", _ok(b"Transfer-Encoding: chunked", body=_HELLO), Accept("chunked", b"hello"), _FRAMING),
    Case("no-length", _ok(body=b"hello"), Accept("connection", b"hello"), "RFC 9112 §6.3 item 8"),
    Case(
        "no-length-10",
        _response(b"HTTP/1.0 200 OK", body=b"hello"),
        Accept("connection", b"hello"),
        "RFC 9112 §6.3 item 8",
    ),
    Case(
        "excess", _ok(b"Content-Length: 5", body=b"hello" + _SPLIT), Accept("length", b"hello", _SPLIT), "RFC 9112 §9.2"
    ),
    Case(
        "excess-chunked",
        _ok(b"Transfer-Encoding: chunked", body=_HELLO + _SPLIT),
        Accept("chunked", b"hello", _SPLIT),
        "RFC 9112 §9.2",
    ),
    Case("short", _ok(b"Content-Length: 10", body=b"hello"), Accept("length", b"hello", complete=False), "RFC 9112 §8"),
    Case(
        "cl-te",
        _ok(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=_HELLO),
        Refuse(502),
        _TE_AND_CL,
        "accepts",
        "as for requests",
    ),
    Case(
        "te-cl",
        _ok(b"Transfer-Encoding: chunked", b"Content-Length: 5", body=_HELLO),
        Refuse(502),
        _TE_AND_CL,
        "accepts",
        "as for requests",
    ),
    Case(
        "cl-twice-same",
        _ok(b"Content-Length: 5", b"Content-Length: 5", body=b"hello"),
        Refuse(502),
        _FRAMING,
        "accepts",
        _REPEATED_WHY,
    ),
    Case("cl-twice-different", _ok(b"Content-Length: 5", b"Content-Length: 6", body=b"hello!"), Refuse(502), _FRAMING),
    Case("cl-list", _ok(b"Content-Length: 5, 5", body=b"hello"), Refuse(502), _FRAMING, "accepts", _REPEATED_WHY),
    Case("cl-plus", _ok(b"Content-Length: +5", body=b"hello"), Refuse(502), _LENGTH),
    Case("cl-hex", _ok(b"Content-Length: 0x5", body=b"hello"), Refuse(502), _LENGTH),
    Case("cl-empty", _ok(b"Content-Length:", body=b"hello"), Refuse(502), _LENGTH),
    Case(
        "cl-huge",
        _ok(b"Content-Length: 18446744073709551621", body=b"hello"),
        Refuse(502),
        _LENGTH,
        "accepts",
        "as for requests",
    ),
    Case(
        "te-10",
        _response(b"HTTP/1.0 200 OK", b"Transfer-Encoding: chunked", body=_HELLO),
        Refuse(502),
        _TE,
        "accepts",
        "as for requests",
    ),
    Case(
        "te-gzip",
        _ok(b"Transfer-Encoding: gzip, chunked", body=_HELLO),
        Refuse(502),
        _TE,
        why="we never ask for it in TE",
    ),
    Case("te-identity", _ok(b"Transfer-Encoding: identity", body=b"hello"), Refuse(502), _TE),
    Case("te-comma", _ok(b"Transfer-Encoding: chunked,", body=_HELLO), Refuse(502), "RFC 9110 §5.6.1", why=_LIST_WHY),
    Case("te-space-before-colon", _ok(b"Transfer-Encoding : chunked", body=_HELLO), Refuse(502), _FIELD),
    Case("head-length", _ok(b"Content-Length: 5"), Accept("none"), "RFC 9112 §6.3 item 1", method=b"HEAD"),
    Case("head-chunked", _ok(b"Transfer-Encoding: chunked"), Accept("none"), "RFC 9112 §6.3 item 1", method=b"HEAD"),
    Case(
        "head-body",
        _ok(b"Content-Length: 25", body=b"HTTP/1.1 200 OK\r\nX: y\r\n\r\n"),
        Accept("none", rest=b"HTTP/1.1 200 OK\r\nX: y\r\n\r\n"),
        "RFC 9112 §6.3 item 1",
        method=b"HEAD",
    ),
    Case(
        "204-length",
        _response(b"HTTP/1.1 204 No Content", b"Content-Length: 5", body=b"hello"),
        Accept("none", rest=b"hello"),
        "RFC 9112 §6.3 item 1",
    ),
    Case(
        "204-chunked",
        _response(b"HTTP/1.1 204 No Content", b"Transfer-Encoding: chunked", body=_HELLO),
        Accept("none", rest=_HELLO),
        "RFC 9112 §6.3 item 1",
    ),
    Case(
        "304-length",
        _response(b"HTTP/1.1 304 Not Modified", b"Content-Length: 5"),
        Accept("none"),
        "RFC 9112 §6.3 item 1",
    ),
    Case(
        "304-body",
        _response(b"HTTP/1.1 304 Not Modified", b"Content-Length: 5", body=_SPLIT),
        Accept("none", rest=_SPLIT),
        "RFC 9112 §6.3 item 1",
    ),
    Case("205-length", _response(b"HTTP/1.1 205 Reset Content", b"Content-Length: 0"), Accept("none"), _FRAMING),
    Case(
        "interim",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
        + _ok(b"Content-Length: 5", body=b"hello"),
        Accept("length", b"hello"),
        "RFC 9110 §15.2",
    ),
    Case(
        "interim-length",
        b"HTTP/1.1 103 Early Hints\r\nContent-Length: 5\r\n\r\n" + _ok(b"Content-Length: 5", body=b"hello"),
        Accept("length", b"hello"),
        "RFC 9112 §6.3 item 1",
    ),
    Case("status-two-digits", _response(b"HTTP/1.1 20 OK"), Refuse(502), _STATUS),
    Case("status-four-digits", _response(b"HTTP/1.1 2000 OK"), Refuse(502), _STATUS),
    Case("status-099", _response(b"HTTP/1.1 099 OK"), Refuse(502), _STATUS),
    Case("status-plus", _response(b"HTTP/1.1 +20 OK"), Refuse(502), _STATUS),
    Case("status-glued", _response(b"HTTP/1.1 200OK"), Refuse(502), _STATUS),
    Case("status-two-spaces", _response(b"HTTP/1.1  200 OK"), Refuse(502), _STATUS),
    Case("status-space-before", _response(b" HTTP/1.1 200 OK"), Refuse(502), _STATUS),
    Case("status-tab", _response(b"HTTP/1.1\t200 OK"), Refuse(502), _STATUS),
    Case("status-no-reason", _response(b"HTTP/1.1 200 ", b"Content-Length: 0"), Accept("none"), _STATUS),
    Case(
        "status-no-space",
        _response(b"HTTP/1.1 200", b"Content-Length: 0"),
        Accept("none"),
        _STATUS,
        why="enough servers do; nothing hangs on it",
    ),
    Case("status-reason-obs-text", _response(b"HTTP/1.1 200 \xe9\t", b"Content-Length: 0"), Accept("none"), _STATUS),
    Case("status-reason-nul", _response(b"HTTP/1.1 200 O\x00K", b"Content-Length: 0"), Refuse(502), _STATUS),
    Case("status-reason-cr", _response(b"HTTP/1.1 200 O\rK", b"Content-Length: 0"), Refuse(502), _STATUS),
    Case(
        "status-reason-lf",
        _response(b"HTTP/1.1 200 O\nX: y", b"Content-Length: 0"),
        Refuse(502),
        _LINES,
        "accepts",
        _LF_WHY,
    ),
    Case("status-999", _response(b"HTTP/1.1 999 X", b"Content-Length: 0"), Accept("none"), "RFC 9110 §15"),
    Case(
        "version-20",
        _response(b"HTTP/2.0 200 OK", b"Content-Length: 0"),
        Refuse(502),
        _VERSION,
        "accepts",
        "h11 leaves versions to its user",
    ),
    Case(
        "version-09",
        _response(b"HTTP/0.9 200 OK", b"Content-Length: 0"),
        Refuse(502),
        _VERSION,
        "accepts",
        "as version-20",
    ),
    Case(
        "version-12",
        _response(b"HTTP/1.2 200 OK", b"Content-Length: 5", body=b"hello"),
        Accept("length", b"hello"),
        _VERSION,
        why="a higher minor version is read as 1.1",
    ),
    Case("version-lower", _response(b"http/1.1 200 OK"), Refuse(502), _VERSION),
    Case("version-icy", _response(b"ICY 200 OK"), Refuse(502), _VERSION),
    Case("version-none", b"<html>hello</html>\r\n\r\n", Refuse(502), _VERSION, why="HTTP/0.9"),
    Case("leading-crlf", b"\r\n" + _ok(b"Content-Length: 0"), Refuse(502), _LINES, why="§2.2 forgives requests alone"),
    Case("request", SMUGGLED, Refuse(502), _STATUS),
    Case("fold", _ok(b"X: a", b" b", b"Content-Length: 0"), Refuse(502), _FOLD, "accepts", _FOLD_WHY),
    Case("value-nul", _ok(b"X: a\x00", b"Content-Length: 0"), Refuse(502), _VALUE),
    Case("value-cr", _ok(b"X: a\rSet-Cookie: b", b"Content-Length: 0"), Refuse(502), _LINES),
    Case("value-lf", _ok(b"X: a\nSet-Cookie: b", b"Content-Length: 0"), Refuse(502), _LINES, "accepts", _LF_WHY),
    Case(
        "name-space",
        _ok(b"X : a", b"Content-Length: 0"),
        Refuse(502),
        _FIELD,
        why="§5.1 lets a proxy remove it; we refuse",
    ),
    Case("no-colon", _ok(b"X", b"Content-Length: 0"), Refuse(502), _FIELD),
    Case("fields-257", _ok(*[b"X: a"] * 257), Refuse(502), "RFC 9110 §5.4", "accepts", "our bound"),
    Case(
        "connection-length",
        _ok(b"Connection: Content-Length", b"Content-Length: 5", body=b"hello"),
        Refuse(502),
        _CONNECTION,
        "accepts",
        "as for requests",
    ),
    Case("chunk-lf", _ok(b"Transfer-Encoding: chunked", body=b"5\nhello\r\n0\r\n\r\n"), Refuse(502, "body"), _CHUNK),
    Case(
        "chunk-0x", _ok(b"Transfer-Encoding: chunked", body=b"0x5\r\nhello\r\n0\r\n\r\n"), Refuse(502, "body"), _CHUNK
    ),
    Case(
        "chunk-too-long",
        _ok(b"Transfer-Encoding: chunked", body=b"5\r\nhello!\r\n0\r\n\r\n"),
        Refuse(502, "body"),
        _CHUNK,
    ),
    Case(
        "chunk-huge",
        _ok(b"Transfer-Encoding: chunked", body=b"10000000000000005\r\nhello\r\n0\r\n\r\n"),
        Refuse(502, "body"),
        _CHUNK,
        "accepts",
        "our bound",
    ),
    Case(
        "trailer", _ok(b"Transfer-Encoding: chunked", body=b"0\r\nX: a\r\n\r\n"), Accept("chunked"), "RFC 9112 §7.1.2"
    ),
    Case(
        "trailer-length",
        _ok(b"Transfer-Encoding: chunked", body=b"0\r\nContent-Length: 5\r\n\r\n"),
        Refuse(502, "body"),
        _TRAILER,
        "accepts",
        "framing has no place behind a body",
    ),
)
