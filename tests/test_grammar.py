"""The patterns against RFC 9110 and 9112, octet for octet, and against inputs made to keep them busy."""

import importlib
import re
import string
import typing

import pytest

import proxy.grammar
from proxy.grammar import (
    ABSOLUTE_FORM,
    CHUNK_LINE,
    CLEAN_OCTETS,
    CONTENT_LENGTH,
    FIELD_LINE,
    FIELD_LINES,
    HOST,
    MAX_CHUNK_LINE,
    PART_OF_CHUNK_LINE,
    PART_OF_LINE,
    REQUEST_ID,
    REQUEST_LINE,
    STATUS_LINE,
    TOKEN,
    MalformedMessage,
)
from referee import check_linear

_ALNUM = string.ascii_letters + string.digits
_TCHAR = frozenset((_ALNUM + "!#$%&'*+-.^_`|~").encode())
_VCHAR = frozenset(range(0x21, 0x7F))
_OBS_TEXT = frozenset(range(0x80, 0x100))
_TEXT = _VCHAR | _OBS_TEXT | frozenset(b" \t")
_REG_NAME = frozenset((_ALNUM + "-._~!$&'()*+,;=%").encode())
_HEX = frozenset(string.hexdigits.encode())
_DIGITS = frozenset(string.digits.encode())

# Pattern, what stands before and behind the octet in question, and the octets that may stand there.
_PLACES: dict[str, tuple[re.Pattern[bytes], bytes, bytes, frozenset[int]]] = {
    "token": (TOKEN, b"a", b"b", _TCHAR),
    "token alone": (TOKEN, b"", b"", _TCHAR),
    "method": (REQUEST_LINE, b"", b" / HTTP/1.1", _TCHAR),
    "target": (REQUEST_LINE, b"GET /", b" HTTP/1.1", _VCHAR),
    "major version": (REQUEST_LINE, b"GET / HTTP/", b".1", _DIGITS),
    "minor version": (REQUEST_LINE, b"GET / HTTP/1.", b"", _DIGITS),
    "version point": (REQUEST_LINE, b"GET / HTTP/1", b"1", frozenset(b".")),
    "space behind method": (REQUEST_LINE, b"GET", b"/ HTTP/1.1", frozenset(b" ")),
    "space behind target": (REQUEST_LINE, b"GET /", b"HTTP/1.1", frozenset(b" ")),
    "status first digit": (STATUS_LINE, b"HTTP/1.1 ", b"00 OK", _DIGITS - frozenset(b"0")),
    "status last digit": (STATUS_LINE, b"HTTP/1.1 20", b" OK", _DIGITS),
    "reason": (STATUS_LINE, b"HTTP/1.1 200 O", b"K", _TEXT),
    "status version": (STATUS_LINE, b"HTTP/1.", b" 200 OK", _DIGITS),
    "field name": (FIELD_LINE, b"a", b": b\r\n", _TCHAR | frozenset(b":")),
    "field name alone": (FIELD_LINES, b"", b": b\r\n", _TCHAR),
    "field value": (FIELD_LINE, b"a: b", b"c\r\n", _TEXT),
    "field value alone": (FIELD_LINES, b"a:", b"\r\n", _TEXT),
    "second line": (FIELD_LINES, b"a: b\r\n", b"c: d\r\n", _TCHAR),
    "end of field line": (FIELD_LINES, b"a: b", b"\n", frozenset(b"\r")),
    "host": (HOST, b"a", b"b:80", _REG_NAME),
    "port": (HOST, b"a:8", b"", _DIGITS),
    "address in brackets": (HOST, b"[", b"]", _HEX | frozenset(b":.")),
    "future address": (HOST, b"[v1.", b"]", _REG_NAME - frozenset(b"%") | frozenset(b":")),
    "authority": (ABSOLUTE_FORM, b"http://a", b"b/", frozenset(range(256)) - frozenset(b"#")),
    "length": (CONTENT_LENGTH, b"1", b"", _DIGITS),
    "chunk size": (CHUNK_LINE, b"1", b"", _HEX),
    "chunk size first": (CHUNK_LINE, b"", b"", _HEX),
    "extension name": (CHUNK_LINE, b"1;a", b"b", _TCHAR | frozenset(b";=")),
    "extension name first": (CHUNK_LINE, b"1;", b"", _TCHAR),
    "extension value": (CHUNK_LINE, b"1;a=", b"", _TCHAR),
    "quoted": (CHUNK_LINE, b'1;a="', b'"', _TEXT - frozenset(b'"\\')),
    "quoted pair": (CHUNK_LINE, b'1;a="\\', b'"', _TEXT),
    "request id": (REQUEST_ID, b"a", b"", frozenset((_ALNUM + "._-").encode())),
    "part of a line": (PART_OF_LINE, b"a", b"b\r", _TEXT),
    "part of a chunk line": (PART_OF_CHUNK_LINE, b"1;a", b"", _TEXT | frozenset(b"\r")),
    "part of a chunk size": (PART_OF_CHUNK_LINE, b"1", b"", _HEX | frozenset(b";\r")),
    "clean": (CLEAN_OCTETS, b"a\r\n", b"\r\nb", _TEXT),
}


@pytest.mark.parametrize("place", _PLACES)
def test_each_octet(place: str) -> None:
    pattern, before, behind, allowed = _PLACES[place]
    taken = frozenset(octet for octet in range(256) if pattern.fullmatch(before + bytes((octet,)) + behind) is not None)
    assert taken == allowed


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (CONTENT_LENGTH, b"9" * 18, b"9" * 19),
        (CHUNK_LINE, b"f" * 15, b"f" * 16),
        (CHUNK_LINE, b'1;a="b;c=d\\"";e;f=g', b'1;a="b"c'),
        (REQUEST_ID, b"a" * 128, b"a" * 129),
        (HOST, b"", b"[]"),
        (HOST, b":", b"::"),
        (HOST, b"[::1]:", b"[::1"),
        (HOST, b"a:80", b"a:80:80"),
        (ABSOLUTE_FORM, b"hTTpS://a", b"http:a"),
        (STATUS_LINE, b"HTTP/1.1 200", b"HTTP/1.1 2000"),
        (STATUS_LINE, b"HTTP/1.1 200 ", b"HTTP/1.1 200\r\n"),
        (TOKEN, b"a", b""),
        (TOKEN, b"a", b"a\n"),
        (FIELD_LINES, b"", b"\r\n"),
        (PART_OF_LINE, b"", b"\r\r"),
        (PART_OF_CHUNK_LINE, b"1\r", b"\r"),
    ],
)
def test_lengths_and_ends(pattern: re.Pattern[bytes], good: bytes, bad: bytes) -> None:
    assert pattern.fullmatch(good) is not None
    assert pattern.fullmatch(bad) is None
    assert pattern.fullmatch(bytearray(good)) is not None


def _patterns() -> dict[str, re.Pattern[bytes]]:
    return {name: value for name, value in vars(proxy.grammar).items() if isinstance(value, re.Pattern)}


def _unbounded_repeats(tree: typing.Any) -> typing.Iterator[str]:
    """Names of the operations in a parsed pattern that repeat without a bound."""
    for operation, argument in tree:
        name = str(operation)
        if name.endswith("REPEAT"):
            _, highest, inner = argument
            if str(highest) == "MAXREPEAT":
                yield name
            yield from _unbounded_repeats(inner)
        elif name == "SUBPATTERN":
            yield from _unbounded_repeats(argument[-1])
        elif name == "BRANCH":
            for inner in argument[1]:
                yield from _unbounded_repeats(inner)
        elif name in ("ATOMIC_GROUP", "GROUPREF_EXISTS", "ASSERT", "ASSERT_NOT"):
            raise AssertionError(f"{name}: this test does not know how to look into it")


@pytest.mark.parametrize("name", _patterns())
def test_every_repetition_is_possessive(name: str) -> None:
    """A repetition that gives octets back is how a pattern comes to take more than linear time."""
    parser = importlib.import_module("re._parser")
    for operation in _unbounded_repeats(parser.parse(_patterns()[name].pattern)):
        assert operation == "POSSESSIVE_REPEAT"


def test_the_test_of_repetitions_sees_them() -> None:
    parser = importlib.import_module("re._parser")
    assert list(_unbounded_repeats(parser.parse(rb"(?:a|b*)+(c++)?"))) == [
        "MAX_REPEAT",
        "MAX_REPEAT",
        "POSSESSIVE_REPEAT",
    ]


# What a pattern could be made to read twice: long runs of what it repeats, and then no match.
_BUSY: dict[str, tuple[re.Pattern[bytes], bytes, bytes, bytes]] = {
    "token": (TOKEN, b"", b"a", b"\x00"),
    "method": (REQUEST_LINE, b"", b"a", b"\x00"),
    "target": (REQUEST_LINE, b"GET ", b"/", b"\x00"),
    "target spaces": (REQUEST_LINE, b"GET / ", b" ", b""),
    "reason": (STATUS_LINE, b"HTTP/1.1 200 ", b" ", b"\x00"),
    "field name": (FIELD_LINES, b"", b"a", b"\x00"),
    "field value spaces": (FIELD_LINES, b"a:", b" ", b"\x00"),
    "field value colons": (FIELD_LINES, b"a:", b":", b"\x00"),
    "field lines": (FIELD_LINES, b"", b"a:\r\n", b"\x00"),
    "host": (HOST, b"", b"a", b"@"),
    "host brackets": (HOST, b"[", b":", b"@"),
    "host future address": (HOST, b"[v", b"1", b"@"),
    "port": (HOST, b"a:", b"1", b"a"),
    "authority": (ABSOLUTE_FORM, b"http://", b"a", b"#"),
    "path": (ABSOLUTE_FORM, b"http://a/", b"/", b"\n"),
    "extensions": (CHUNK_LINE, b"1", b";a", b"\x00"),
    "extension values": (CHUNK_LINE, b"1", b";a=b", b"\x00"),
    "extension quoted": (CHUNK_LINE, b'1;a="', b"b", b""),
    "extension quoted pairs": (CHUNK_LINE, b'1;a="', b"\\\\", b""),
    "extension quotes": (CHUNK_LINE, b"1", b';a=""', b'"'),
    "clean": (CLEAN_OCTETS, b"", b"\r\n", b"\r"),
    "part of a chunk line": (PART_OF_CHUNK_LINE, b"1;", b";", b"\x00"),
}


@pytest.mark.parametrize("name", _BUSY)
def test_linear_time(name: str) -> None:
    pattern, before, run, behind = _BUSY[name]
    octets = before + run * 3 + behind
    assert pattern.fullmatch(octets) is None, "this input ends too soon"
    check_linear(lambda count: lambda: pattern.fullmatch(before + run * count + behind), 16384)


def test_what_is_not_linear_is_found() -> None:
    pattern = re.compile(b"a+b")
    with pytest.raises(AssertionError, match="16 times that"):
        check_linear(lambda count: lambda: pattern.search(b"a" * count), 512)


def test_bound_of_chunk_line_leaves_room() -> None:
    assert CHUNK_LINE.fullmatch(b"1;" + b"a" * (MAX_CHUNK_LINE - 4)) is not None


def test_malformed_message_says_where_and_what() -> None:
    error = MalformedMessage("no good", 7, bytearray(b"x" * 100), status=431, bound="max_fields")
    assert str(error) == f"no good (octet 7 near {b'x' * 64!r})"
    assert (error.reason, error.octet, error.status, error.bound) == ("no good", 7, 431, "max_fields")
    assert type(error.excerpt) is bytes
    assert str(MalformedMessage("no good", 0)) == "no good (octet 0)"
    assert MalformedMessage("no good", 0).status == 400
